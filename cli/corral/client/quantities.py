"""Sizes and durations in the words people use: "64m", "1m30s"."""

import re

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[bkmgtp]?)(i?b)?", re.IGNORECASE)
_UNITS = {unit: 1024**power for power, unit in enumerate("bkmgtp")} | {"": 1}
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>ns|us|µs|ms|s|m|h)")
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def size_bytes(value: int | str) -> int:
    """Bytes of 64, "64m", "1.5g", "-1". Units are powers of 1024, as docker has them."""
    if isinstance(value, int):
        return value
    if value.strip() == "-1":
        return -1
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"size {value!r} is not understood: give a number with b, k, m, g or t, such as 64m")
    number, unit = found["number"], _UNITS[found["unit"].lower()]
    return int(number) * unit if number.isdecimal() else int(float(number) * unit)


def duration_s(value: float | str) -> float:
    """Seconds of 10, "10", "1m30s", "500ms"."""
    if isinstance(value, int | float):
        return float(value)
    try:
        return float(value)
    except ValueError:
        pass
    parts = list(_DURATION.finditer(value))
    if not parts or "".join(p[0] for p in parts) != value:
        raise ValueError(f"duration {value!r} is not understood: give seconds, or 1h2m3s, or 500ms")
    return sum(float(p["number"]) * _DURATION_UNITS[p["unit"]] for p in parts)
