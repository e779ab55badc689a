"""A stand-in for signal: the module in C, to which signals are plain numbers."""

from _signal import *  # type: ignore[import-not-found]  # noqa: F403

from corral.runtime.standins import standard

__getattr__ = standard("signal")
