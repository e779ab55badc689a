"""The error tree, and its mapping to and from gRPC status.

A servicer raises one of the kinds below with a sentence the user can act on; the server interceptor turns it into a
status with a google.rpc.ErrorInfo detail; a channel of corral.rpc.channel turns that back into the same kind.
Source: google.rpc.Code, google/rpc/error_details.proto, gRPC "Richer error model".
"""

import errno
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, cast

import grpc

if TYPE_CHECKING:
    from google.rpc.error_details_pb2 import ErrorInfo

DOMAIN = "corral"
DETAILS_KEY = "grpc-status-details-bin"
# gRPC drops replies with more than 8 KiB of metadata. The message travels twice, percent-encoded and, inside the
# details, base64-encoded: at most 2400 + 3200 bytes, which leaves the rest for the ErrorInfo, base64-encoded too.
MAX_MESSAGE_BYTES = 2400
MAX_FACT_BYTES = 200
MAX_FACTS_BYTES = 1200
ENCODED_ELLIPSIS = 9

# Of an Unavailable: nobody has begun to serve the call, so the same call may be made again.
UNSERVED = "UNSERVED"
# Of an UNSERVED or UNREACHABLE, under "connection": there was one.
CONNECTION_ENDED = "ended"
# What to wait before each further attempt then: an upgrade takes a second or two, on a busy machine more.
PAUSES_S = (0.01, 0.02, 0.05, 0.1, 0.2, *(0.5,) * 60)

_NO_METADATA: Mapping[str, str] = MappingProxyType({})


class CorralError(Exception):
    """One of the kinds below. `message` is a sentence for the user, with the remedy; `reason` is a stable
    UPPER_SNAKE word for programs; `metadata` names the objects concerned."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, reason: str = "", metadata: Mapping[str, str] = _NO_METADATA) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata)

    def __str__(self) -> str:
        return self.message


class InvalidArgument(CorralError):
    """The request can never succeed as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(CorralError):
    """The named object does not exist in this namespace."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(CorralError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(CorralError):
    """The object is not in a state that allows the call."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class PermissionDenied(CorralError):
    """The caller, or corral itself, may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(CorralError):
    """Disk, addresses, memory or another quota ran out."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(CorralError):
    """Nobody answers now; the same call may succeed later."""

    code = grpc.StatusCode.UNAVAILABLE


class Internal(CorralError):
    """A fault of corral."""

    code = grpc.StatusCode.INTERNAL


class Unimplemented(CorralError):
    """This corral, or this kernel, does not offer it."""

    code = grpc.StatusCode.UNIMPLEMENTED


KINDS: tuple[type[CorralError], ...] = (
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Internal,
    Unimplemented,
)

_KIND_OF_CODE: Mapping[grpc.StatusCode, type[CorralError]] = MappingProxyType(
    {kind.code: kind for kind in KINDS}
    | {
        # Codes that corral never sends but a proxy or the gRPC library may.
        grpc.StatusCode.CANCELLED: Unavailable,
        grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
        grpc.StatusCode.ABORTED: FailedPrecondition,
        grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
        grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
        grpc.StatusCode.DATA_LOSS: Internal,
        grpc.StatusCode.UNKNOWN: Internal,
    }
)

_KIND_OF_ERRNO: Mapping[int, type[CorralError]] = MappingProxyType(
    {
        errno.ENOSPC: ResourceExhausted,
        errno.EDQUOT: ResourceExhausted,
        errno.EFBIG: ResourceExhausted,
        errno.EMFILE: ResourceExhausted,
        errno.ENFILE: ResourceExhausted,
        errno.ENOMEM: ResourceExhausted,
    }
)

# Of a disk, or its file system, as a rule: no fault of corral's.
BROKEN_DISK = frozenset({errno.EIO, errno.EROFS, errno.EUCLEAN})

type Trailers = tuple[tuple[str, str | bytes], ...]


def from_os_error(e: OSError, doing: str) -> CorralError:
    """The kind that fits a system call's failure, with one sentence that begins with `doing`."""
    kind = _KIND_OF_ERRNO.get(e.errno or 0, Internal)
    where = f": {os.fsdecode(e.filename)}" if isinstance(e.filename, str | bytes) else ""
    return kind(f"{doing}: {e.strerror or e}{where}", reason=errno.errorcode.get(e.errno or 0, "OS_ERROR"))


def to_status(error: CorralError) -> tuple[grpc.StatusCode, str, Trailers]:
    """Code, message and trailing metadata that carry `error` over the wire."""
    message = _shorten(error.message, MAX_MESSAGE_BYTES)
    if not error.reason and not error.metadata:
        return error.code, message, ()
    from google.rpc import error_details_pb2, status_pb2  # 36 ms to import, and only failing calls need it

    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata=_facts(error.metadata),
    )
    number, _ = error.code.value
    status = status_pb2.Status(code=number, message=message)
    status.details.add().Pack(info)
    return error.code, message, ((DETAILS_KEY, status.SerializeToString()),)


def from_rpc_error(error: grpc.RpcError, *, address: str = "") -> CorralError:
    """The error that the other side raised, or what the gRPC library says went wrong on the way."""
    code = error.code()
    message = error.details() or code.name.replace("_", " ").lower()
    kind = _KIND_OF_CODE.get(code, Internal)
    info = _error_info(error)
    if info is not None:
        return kind(message, reason=info.reason, metadata=dict(info.metadata))
    if _says_unserved(code, message):
        return Unavailable(
            f"corral{f' at {address}' if address else ''} went away; try again",
            reason=UNSERVED,
            metadata={"connection": CONNECTION_ENDED} if "GOAWAY" in message else {},
        )
    if code is grpc.StatusCode.INTERNAL and message.startswith(_BROKEN_CALL):
        return Unavailable(
            f"corral{f' at {address}' if address else ''} went away",
            reason="UNREACHABLE",
            metadata={"connection": CONNECTION_ENDED},
        )
    if code is grpc.StatusCode.UNAVAILABLE and _came_from_library(message):
        where = f" at {address}" if address else ""
        # "failed to connect to all addresses; last error: …; error: No such file or directory"
        why = message.rpartition("error: ")[2].rstrip(")").strip()
        facts = {} if "failed to connect" in message else {"connection": CONNECTION_ENDED}
        return Unavailable(
            f"cannot reach corral{where} ({why}): is corrald running?", reason="UNREACHABLE", metadata=facts
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unavailable(f"no answer within the deadline{f' from {address}' if address else ''}", reason=code.name)
    return kind(message, reason="" if kind.code is code else code.name)


_BROKEN_CALL = "Internal error from Core"
"""Details of a call of grpc.aio's whose channel broke in the middle of a read."""


def _says_unserved(code: grpc.StatusCode, message: str) -> bool:
    """Whether gRPC's own words tell that a server which shut down at this moment has not seen the call. Where corral
    has, it says itself why a call ends."""
    if code is grpc.StatusCode.CANCELLED:
        return message in ("CANCELLED", "RST_STREAM")
    return code is grpc.StatusCode.UNAVAILABLE and message.startswith("Stream removed (GOAWAY received")


def _came_from_library(message: str) -> bool:
    """Whether an UNAVAILABLE without details was made by gRPC's transport; it then reads like a stack of layers."""
    marks = ("failed to connect", "Socket closed", "Connection", "connect", "GOAWAY", "recvmsg", "sendmsg", "DNS")
    return any(mark in message for mark in marks)


def _error_info(error: grpc.RpcError) -> "ErrorInfo | None":
    trailers = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            return _parse_error_info(value)
    return None


def _parse_error_info(data: bytes) -> "ErrorInfo | None":
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    info = error_details_pb2.ErrorInfo()
    try:
        found = any(detail.Unpack(info) for detail in status_pb2.Status.FromString(data).details)
    except DecodeError:
        return None
    return info if found and info.domain == DOMAIN else None


def _facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of the metadata fits."""
    facts: dict[str, str] = {}
    room = MAX_FACTS_BYTES
    for key, value in metadata.items():
        short = _shorten(value, MAX_FACT_BYTES)
        room -= len(key) + len(short.encode())
        if room >= 0:
            facts[key] = short
    return facts


def _shorten(text: str, limit: int) -> str:
    """`text`, cut to `limit` bytes of percent-encoding; what is no Unicode (in a file name) becomes '?'."""
    text = text.encode("utf-8", "replace").decode()
    room = limit - ENCODED_ELLIPSIS
    for n, char in enumerate(text):
        room -= 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode())
        if room < 0:
            return f"{text[:n]}…"
    return text
