"""Somebody else in the same directory, who exchanges names as fast as the kernel does."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from corral.kernel import process

ROUNDS = 1500
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextlib.contextmanager
def exchanging(a: Path, b: Path) -> Iterator[None]:
    """He exchanges two names, over and over."""
    with _meanwhile(lambda: _exchange_for_ever(os.fsencode(a), os.fsencode(b))):
        yield


@contextlib.contextmanager
def stealing(place: Path, outside: Path) -> Iterator[None]:
    """He exchanges made0, made1, … each as soon as it is there, for a link to outside; up to ROUNDS of them."""
    for number in range(ROUNDS):
        (place / f"trap{number}").symlink_to(outside)
    with _meanwhile(lambda: _steal_each(os.fsencode(place))):
        yield


def exchange(a: Path, b: Path) -> None:
    """Once, and by the caller itself."""
    assert not ctypes.CDLL(None).renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)


@contextlib.contextmanager
def accomplice(sign: Path, a: Path, b: Path, *, seen_as: Path | None = None) -> Iterator[Callable[[], None]]:
    """He exchanges two names once, when he is told to, which can be from any process that sees the file `sign`.

    seen_as: its path there.
    """

    def wait_for_sign() -> NoReturn:
        while not sign.exists():
            time.sleep(0.001)
        exchange(a, b)
        sign.unlink()
        os._exit(0)

    def tell() -> None:
        shown = seen_as or sign
        shown.touch()
        while shown.exists():
            time.sleep(0.001)

    with _meanwhile(wait_for_sign):
        yield tell


@contextlib.contextmanager
def _meanwhile(body: Callable[[], NoReturn]) -> Iterator[None]:
    pid, pidfd = process.clone(0)
    if pid == 0:
        try:
            body()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        process.send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)


def _exchange_for_ever(a: bytes, b: bytes) -> NoReturn:
    rename = ctypes.CDLL(None).renameat2
    while True:
        if rename(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE):
            os._exit(1)
        time.sleep(0.00005)


def _steal_each(place: bytes) -> NoReturn:
    rename = ctypes.CDLL(None).renameat2
    for number in range(ROUNDS):
        made, trap = b"%s/made%d" % (place, number), b"%s/trap%d" % (place, number)
        while rename(_AT_FDCWD, made, _AT_FDCWD, trap, _RENAME_EXCHANGE):
            pass
    os._exit(0)
