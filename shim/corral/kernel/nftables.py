"""libnftables: lists of commands in its JSON form, each list one atomic transaction.

Needs libnftables.so.1 (Debian: libnftables1), loaded when the first Nftables is made. Acts on the network namespace
that its thread was in when the Nftables was made. Source: libnftables(3), libnftables-json(5).
"""

import ctypes
import errno
import json
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

LIBRARY = "libnftables.so.1"

type Json = bool | int | str | Sequence[Json] | Mapping[str, Json] | None
type Command = Mapping[str, Json]

_OUTPUT_JSON = 1 << 4


class NftablesError(OSError):
    """The kernel or the library refused a transaction; nothing of it was done."""


class Nftables:
    """A context of the library. Any thread may use it; one transaction runs at a time."""

    def __init__(self) -> None:
        """Raises OSError if the library is missing or the kernel has no nftables."""
        self._library = _load()
        self._lock = threading.Lock()
        context = self._library.nft_ctx_new(0)
        if not context:
            raise NftablesError(errno.EOPNOTSUPP, "nft_ctx_new: nftables is not available")
        self._context: int | None = context
        for call in (self._library.nft_ctx_buffer_output, self._library.nft_ctx_buffer_error):
            if call(context) != 0:
                self.close()
                raise NftablesError(errno.ENOMEM, "nft_ctx_buffer_output: out of memory")
        self._library.nft_ctx_output_set_flags(context, _OUTPUT_JSON)

    def run(self, commands: Sequence[Command]) -> Sequence[Mapping[str, Json]]:
        """Run the commands, all or none; returns what those that list something printed.

        Raises NftablesError with the library's words.
        """
        text = json.dumps({"nftables": commands}).encode()
        with self._lock:
            if self._context is None:
                raise NftablesError(errno.EBADF, "nft: the context is closed")
            failed = self._library.nft_run_cmd_from_buffer(self._context, text)
            output = self._library.nft_ctx_get_output_buffer(self._context)
            message = self._library.nft_ctx_get_error_buffer(self._context)
        if failed:
            raise NftablesError(_code(message), f"nft: {_readable(message)}")
        listed = json.loads(output)["nftables"] if output else []
        return [item for item in listed if "metainfo" not in item]

    def close(self) -> None:
        """Free the context; harmless when repeated."""
        with self._lock:
            context, self._context = self._context, None
            if context is not None:
                self._library.nft_ctx_free(context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError as e:
        raise OSError(errno.ELIBACC, f"{LIBRARY} cannot be loaded: install libnftables1 ({e})") from e
    pointer, string, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, *arguments in (
        ("nft_ctx_new", pointer, ctypes.c_uint32),
        ("nft_ctx_free", None, pointer),
        ("nft_ctx_buffer_output", number, pointer),
        ("nft_ctx_buffer_error", number, pointer),
        ("nft_ctx_output_set_flags", None, pointer, ctypes.c_uint),
        ("nft_run_cmd_from_buffer", number, pointer, string),
        ("nft_ctx_get_output_buffer", string, pointer),
        ("nft_ctx_get_error_buffer", string, pointer),
    ):
        function = getattr(library, str(name))
        function.restype, function.argtypes = result, arguments
    return library


# The library gives words where the kernel gave a number; these are the ones that callers tell apart.
_CODES = {
    b"No such file or directory": errno.ENOENT,
    b"File exists": errno.EEXIST,
    b"Operation not permitted": errno.EPERM,
    b"Device or resource busy": errno.EBUSY,
    b"Operation not supported": errno.EOPNOTSUPP,
    b"Invalid argument": errno.EINVAL,
}


def _code(message: bytes) -> int:
    return next((code for words, code in _CODES.items() if words in message), errno.EIO)


def _readable(message: bytes) -> str:
    """The message in one line, without the positions in a buffer nobody sees."""
    lines = (line.strip() for line in message.decode("utf-8", "replace").splitlines())
    return "; ".join(line.partition("Error: ")[2] or line for line in lines if line and set(line) - set("^~ "))
