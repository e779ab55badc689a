"""A stand-in for functools: its parts in C, and the two decorators that make caches of them."""

from __future__ import annotations

from _functools import _lru_cache_wrapper, partial, reduce  # type: ignore[import-not-found]

from corral.runtime.standins import standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["cache", "lru_cache", "partial", "reduce"]


def lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
    """A decorator, with and without brackets: what a function returned it returns again for the same arguments."""
    if callable(maxsize):
        return lru_cache()(maxsize)

    def wrap(function: Callable[..., Any]) -> Any:
        return _lru_cache_wrapper(function, maxsize, typed, _info)

    return wrap


def cache(function: Callable[..., Any]) -> Any:
    """lru_cache without a limit."""
    return lru_cache(None)(function)


def _info(*numbers: int | None) -> tuple[int | None, ...]:
    return numbers


__getattr__ = standard("functools")
