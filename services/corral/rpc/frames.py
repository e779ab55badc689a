"""The frames of HTTP/2, as both ends write them here. Source: RFC 9113, 4.1 and 6."""

DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ENDS_STREAM = ACKNOWLEDGES = 0x1
ENDS_HEADERS, IS_PADDED, HAS_PRIORITY = 0x4, 0x8, 0x20
ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW = 2, 3, 4
"""Settings."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
MAX_FRAME = 16384
DEFAULT_WINDOW = 65535
CHUNK = 64 << 10


def frame(kind: int, flags: int, stream: int, payload: bytes | memoryview) -> bytes:
    """One."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload
