"""Directories that are renamed away at once and removed later."""

import asyncio
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.requirements import needs

from corral.store.trash import Trash


def filled(path: Path, files: int) -> Path:
    path.mkdir()
    for number in range(files):
        (path / str(number)).touch()
    return path


def count(directory: Path) -> int:
    return len(list(directory.iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it is files that are looked at
            await asyncio.sleep(0)


def test_a_name_is_free_at_once_and_the_tree_goes_soon(tmp_path):
    async def body() -> None:
        trash = Trash(tmp_path / "trash")
        trash.throw(filled(tmp_path / "a", 3))
        assert not (tmp_path / "a").exists()
        await until(lambda: count(tmp_path / "trash") == 0)

    asyncio.run(body())


def test_what_is_thrown_in_while_it_is_emptied_goes_too(tmp_path):
    async def body() -> None:
        trash = Trash(tmp_path / "trash")
        trash.throw(filled(tmp_path / "a", 5000))
        (large,) = (tmp_path / "trash").iterdir()
        await until(lambda: count(large) < 5000)
        trash.throw(filled(tmp_path / "b", 3))
        await until(lambda: count(tmp_path / "trash") == 0)

    asyncio.run(body())


def test_what_cannot_be_emptied_keeps_none_of_the_others(tmp_path):
    async def body() -> None:
        trashes = [Trash(tmp_path / name) for name in ("one", "two", "three")]
        for number, trash in enumerate(trashes):
            trash.throw(filled(tmp_path / f"a{number}", 3))
        (tmp_path / "one").rename(tmp_path / "elsewhere")
        (tmp_path / "one").touch()
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))
        await until(lambda: count(tmp_path / "two") + count(tmp_path / "three") == 0)
        await until(lambda: bool(told))
        assert isinstance(told[0], NotADirectoryError)
        (tmp_path / "one").unlink()
        trashes[0].throw(filled(tmp_path / "b", 3))
        await until(lambda: count(tmp_path / "one") == 0)

    asyncio.run(body())


@needs("root")
def test_what_cannot_be_removed_keeps_nothing_beside_it(tmp_path):
    trash = Trash(tmp_path / "trash")
    for name in "abc":
        trash.discard(filled(tmp_path / name, 3))
    busy, *_ = (tmp_path / "trash").iterdir()
    subprocess.run(["mount", "-t", "tmpfs", "corral-test", busy], check=True)
    try:
        with pytest.raises(OSError, match="busy"):
            trash.empty()
        assert list((tmp_path / "trash").iterdir()) == [busy]
    finally:
        subprocess.run(["umount", busy], check=True)
    trash.empty_or_report()
    assert count(tmp_path / "trash") == 0


def test_what_no_thread_can_be_had_for_goes_with_what_is_thrown_in_next(tmp_path):
    async def body() -> None:
        loop = asyncio.get_running_loop()
        told: list[object] = []
        loop.set_exception_handler(lambda _loop, context: told.append(context["exception"]))
        ended = ThreadPoolExecutor(1)
        ended.shutdown()
        loop.set_default_executor(ended)
        trash = Trash(tmp_path / "trash")
        trash.throw(filled(tmp_path / "a", 3))
        await until(lambda: bool(told))
        assert count(tmp_path / "trash") == 1
        loop.set_default_executor(ThreadPoolExecutor(1))
        Trash(tmp_path / "another").throw(filled(tmp_path / "b", 3))
        await until(lambda: count(tmp_path / "trash") + count(tmp_path / "another") == 0)

    asyncio.run(body())


def test_closing_removes_what_was_thrown_in_just_now(tmp_path):
    async def body() -> None:
        trash = Trash(tmp_path / "trash")
        trash.throw(filled(tmp_path / "a", 3))
        await trash.close()
        assert not list((tmp_path / "trash").iterdir())

    asyncio.run(body())
