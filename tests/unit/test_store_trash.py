"""Directories that are renamed away at once and removed later."""

import asyncio
from collections.abc import Callable
from pathlib import Path

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


def test_closing_removes_what_was_thrown_in_just_now(tmp_path):
    async def body() -> None:
        trash = Trash(tmp_path / "trash")
        trash.throw(filled(tmp_path / "a", 3))
        await trash.close()
        assert not list((tmp_path / "trash").iterdir())

    asyncio.run(body())
