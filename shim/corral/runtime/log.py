"""The log that a client reads the reason of a failure from, in runc's two forms."""

import os
import sys
import time

from corral.runtime.errors import CommandError


class Log:
    """Writes to the file of --log, or to stderr."""

    def __init__(self, path: str = "", *, form: str = "text", debug: bool = False) -> None:
        if form not in ("text", "json"):
            raise CommandError(f"--log-format: {form!r} is neither text nor json")
        self._path, self._form, self.debugging = path, form, debug

    def debug(self, message: str) -> None:
        """For --debug only."""
        if self.debugging:
            self._write("debug", message)

    def warning(self, message: str) -> None:
        """What went wrong without consequence."""
        self._write("warning", message)

    def error(self, message: str) -> None:
        """Why the command fails. Goes to stderr too, for whoever looks there."""
        try:
            self._write("error", message)
        except OSError as e:
            sys.stderr.write(f"corral-oci: the log can't be written: {e}\n")
        if self._path:
            sys.stderr.write(f"{message}\n")

    def _write(self, level: str, message: str) -> None:
        import json

        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self._form == "json":
            line = json.dumps({"level": level, "msg": message, "time": now}, separators=(",", ":"))
        else:
            line = f"time={json.dumps(now)} level={level} msg={json.dumps(message, ensure_ascii=False)}"
        data = f"{line}\n".encode("utf-8", "surrogateescape")
        if not self._path:
            sys.stderr.flush()
            os.write(2, data)
            return
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
