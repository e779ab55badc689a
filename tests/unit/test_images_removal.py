"""Trees are removed whatever is in them, and nothing else is."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.images.layers.removal import remove_below, remove_tree


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_tree(tmp_path / "none")


def test_everything_in_a_tree_goes_and_nothing_that_its_links_name(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").write_text("p")
    tree = tmp_path / "tree"
    (tree / "a/b/c").mkdir(parents=True)
    (tree / "a/b/c/f").write_text("x")
    (tree / "a/b/link").symlink_to(tmp_path / "outside")
    (tree / "a/up").symlink_to("../..")
    (tree / "empty").mkdir()
    (tree / "hard").hardlink_to(tmp_path / "outside/precious")
    os.mkfifo(tree / "pipe")
    (tree / ".corral-removed-1/x").mkdir(parents=True)
    remove_tree(tree)
    assert {path.name for path in tmp_path.iterdir()} == {"outside"}
    assert (tmp_path / "outside/precious").read_text() == "p"


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, old)


def test_a_tree_deeper_than_any_path_and_than_there_are_descriptors(tmp_path: Path, few_descriptors: None) -> None:
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=at)
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    remove_tree(tmp_path / "d")
    assert {path.name for path in tmp_path.iterdir()} == {"f"}


def test_a_removal_can_be_ended_and_gone_on_with(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"t/d{i}/e").mkdir(parents=True)
    asked = iter([True] * 10)
    remove_tree(tmp_path / "t", go_on=lambda: next(asked, False))
    assert 0 < len(list((tmp_path / "t").iterdir())) < 20
    remove_tree(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_by_descriptor_only_the_named_one_goes(tmp_path: Path) -> None:
    for name in ("a/b/c/d", "other"):
        (tmp_path / name).mkdir(parents=True)
    parent = os.open(tmp_path, os.O_RDONLY)
    try:
        remove_below("a", parent)
    finally:
        os.close(parent)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


@needs("root", "chattr")
def test_what_resists_is_left_and_the_rest_goes(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "t/a/b").mkdir(parents=True)
    (tmp_path / "t/a/b/immutable").write_text("x")
    (tmp_path / "t/c").write_text("x")
    subprocess.run(["chattr", "+i", tmp_path / "t/a/b/immutable"], check=True)
    try:
        remove_tree(tmp_path / "t")
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path.name for path in left] == ["immutable"]
    finally:
        for path in tmp_path.rglob("immutable"):
            subprocess.run(["chattr", "-i", path], check=True)
    remove_tree(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []
