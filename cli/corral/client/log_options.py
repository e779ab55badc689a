"""Log drivers and their options, in docker's words."""

from collections.abc import Mapping

from corral.api.tasks.v1.tasks_pb2 import LogOptions
from corral.client.quantities import size_bytes

DRIVERS = {
    "json-file": LogOptions.DRIVER_JSON_FILE,
    "cri": LogOptions.DRIVER_CRI,
    "none": LogOptions.DRIVER_NONE,
    "syslog": LogOptions.DRIVER_SYSLOG,
    "journald": LogOptions.DRIVER_JOURNALD,
}
PROGRAM = "binary://"
MOST_FILES = 1000
_KEEPING = ("", "json-file", "cri")
_UNLIMITED = (1 << 63) - 1


def log_options(driver: str, options: Mapping[str, str]) -> LogOptions | None:
    """The message for a driver and its options, which the service checks. Raises ValueError."""
    if not driver and not options:
        return None
    is_program = driver.startswith(PROGRAM)
    if driver and not is_program and driver not in DRIVERS:
        raise ValueError(
            f"log driver {driver!r} is not known: give one of {', '.join(DRIVERS)} or binary:///path/of/program"
        )
    rest = dict(options)
    # What a driver that sends keeps beside that is a cache, and docker names its limits so.
    cache = "" if driver in _KEEPING else "cache-"
    size, count = rest.pop(f"{cache}max-size", "0"), rest.pop(f"{cache}max-file", "0")
    return LogOptions(
        driver=LogOptions.DRIVER_BINARY if is_program else DRIVERS.get(driver, LogOptions.DRIVER_UNSPECIFIED),
        program=driver if is_program else "",
        max_size_bytes=_limit(size),
        max_files=_count(count, f"{cache}max-file"),
        options=rest,
    )


def _limit(text: str) -> int:
    """As docker, -1 is no limit: more than any file holds."""
    return _UNLIMITED if text == "-1" else size_bytes(text)


def _count(text: str, option: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > MOST_FILES:
        raise ValueError(f"log option {option}={text!r} is not understood: give a number of files, 1 to {MOST_FILES}")
    return int(text)
