"""Failures of calls that were not made by gRPC's library, as it has them. Only a call that fails loads this."""

import binascii
import re

import grpc

_OF_RESET = {8: "CANCELLED", 7: "UNAVAILABLE", 11: "RESOURCE_EXHAUSTED", 12: "PERMISSION_DENIED"}
"""Code for the reason of a reset. Source: gRPC over HTTP2, Errors."""

_OF_HTTP = {
    b"400": "INTERNAL",
    b"401": "UNAUTHENTICATED",
    b"403": "PERMISSION_DENIED",
    b"404": "UNIMPLEMENTED",
    **dict.fromkeys((b"429", b"502", b"503", b"504"), "UNAVAILABLE"),
}
"""Code for a status of HTTP's. Source: gRPC, HTTP to gRPC Status Code Mapping."""


class CallFailedError(grpc.RpcError):
    """What a call of the library raises tells the same by the same methods."""

    def __init__(self, code: str, details: str, trailers: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        super().__init__(f"{code}: {details}")
        self._code = grpc.StatusCode[code]
        self._details = details
        self._trailers = trailers

    def code(self) -> grpc.StatusCode:
        """Of the failure."""
        return self._code

    def details(self) -> str:
        """For people."""
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:  # type: ignore[override]
        """What the server has said beside."""
        return self._trailers


def from_trailers(fields: dict[bytes, bytes]) -> CallFailedError:
    """Of what the server told, which may be no gRPC at all."""
    number = fields.pop(b"grpc-status", b"")
    details = _decoded(fields.pop(b"grpc-message", b""))
    code = next((code.name for code in grpc.StatusCode if str(code.value[0]).encode() == number), "UNKNOWN")
    status = fields.pop(b":status", b"200")
    if not number:
        code, details = _OF_HTTP.get(status, "UNKNOWN"), "No status received"
        if status != b"200":
            details = f"Received http2 header with status: {status.decode('ascii', 'replace')}"
    return CallFailedError(code, details, tuple(_text(*field) for field in fields.items()))


def from_reset(reason: int) -> CallFailedError:
    """Of a stream that the server has ended by a reset."""
    details = f"Stream removed (RST_STREAM (Received RST_STREAM with error code {reason}))"
    return CallFailedError(_OF_RESET.get(reason, "INTERNAL"), details)


def _decoded(text: bytes) -> str:
    """Source: gRPC over HTTP2, Percent-Encoded."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text).decode(
        "utf-8", "replace"
    )


def _text(key: bytes, value: bytes) -> tuple[str, str | bytes]:
    if key.endswith(b"-bin"):
        return key.decode("ascii", "replace"), binascii.a2b_base64(value + b"==")
    return key.decode("ascii", "replace"), value.decode("utf-8", "replace")
