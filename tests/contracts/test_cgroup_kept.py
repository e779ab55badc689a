"""A scope of systemd's can be read after systemd has removed its cgroup. Here that is done in systemd's place."""

import contextlib
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cgroups import Child, eventually, inside, parent, sleep
from support.requirements import needs

from corral.kernel.cgroup import Cgroup, Driver, MemoryLimits, OomWatch, Resources
from corral.kernel.cgroup.systemd.removal import Kept
from corral.kernel.cgroup.v1.foothold import Foothold

pytestmark = needs("root", "cgroup1")
MIB = 1 << 20
numbers = itertools.count()
LIMIT = Resources(memory=MemoryLimits(limit_bytes=32 * MIB))


@pytest.fixture
def scope(cgroup_driver: Driver) -> Cgroup:
    return cgroup_driver.create(f"{parent()}/ns/a.scope", LIMIT)


def memory_of(group: Cgroup) -> str:
    return next(directory for directory in group.directories if "/memory/" in directory)


def hog(_: int) -> None:
    area = mmap.mmap(-1, 128 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(area), mmap.PAGESIZE):
        area[at] = 1


@contextlib.contextmanager
def kept(group: Cgroup) -> Iterator[Kept]:
    found = Kept.of(memory_of(group), group.directories)
    assert found is not None
    try:
        yield found
    finally:
        found.close()


def removed_by_systemd(group: Cgroup) -> None:
    """As it does it, what is below first: what refuses is left behind."""
    for top in group.directories:
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()


@contextlib.contextmanager
def sleeping_below(group: Cgroup) -> Iterator[tuple[Child, Path]]:
    """A process in a sub-cgroup of the memory controller, and its directory."""
    below = Path(memory_of(group), f"b{next(numbers)}")
    below.mkdir()
    with inside(group, sleep) as child:
        (below / "cgroup.procs").write_text(str(child.pid))
        yield child, below


def test_a_kill_is_counted_that_was_not_looked_for_before_systemd_came(scope: Cgroup) -> None:
    with OomWatch.open(scope.paths()) as watch, kept(scope) as keeping:
        with inside(scope, hog) as child:
            child.wait()
        assert not keeping.is_left()
        removed_by_systemd(scope)
        assert keeping.is_left()
        assert [each for each in scope.directories if Path(each).exists()] == [memory_of(scope)]
        assert watch.count() == 1
    assert eventually(lambda: _is_gone(memory_of(scope)))
    assert not scope.exists()


def _is_gone(directory: str) -> bool:
    with contextlib.suppress(OSError):
        Path(directory).rmdir()
    return not Path(directory).exists()


def test_the_sub_cgroup_that_a_containers_own_process_is_in_is_kept_and_no_other(scope: Cgroup) -> None:
    with kept(scope) as keeping, sleeping_below(scope) as (init, own), sleeping_below(scope) as (other, others):
        keeping.keep_below(pid := init.pid)
        scope.kill()
        for child in (init, other):
            child.wait()
        removed_by_systemd(scope)
        assert (own.exists(), others.exists()) == (True, False)
        keeping.keep_below(pid)  # it is nowhere any more
    assert eventually(lambda: _is_gone(str(own)))


def test_a_sub_cgroup_that_the_containers_own_process_has_left_is_kept_no_longer(scope: Cgroup) -> None:
    with kept(scope) as keeping, sleeping_below(scope) as (init, before):
        keeping.keep_below(init.pid)
        Path(memory_of(scope), "cgroup.procs").write_text(str(init.pid))
        keeping.keep_below(init.pid)
        assert eventually(lambda: _is_gone(str(before)))
        scope.kill()
        init.wait()
        removed_by_systemd(scope)
        assert Path(memory_of(scope)).exists()


def test_who_keeps_it_is_no_process_of_it_and_not_chosen_by_the_oom_killer(scope: Cgroup) -> None:
    with kept(scope):
        assert scope.pids() == []
        with inside(scope, sleep), OomWatch.open(scope.paths()) as watch:
            for kills in range(1, 4):
                with inside(scope, hog) as child:
                    child.wait()
                assert watch.count() == kills
            scope.kill()
        scope.read()


def test_a_new_cgroup_at_the_place_of_another_is_not_taken_for_it(cgroup_driver: Driver, scope: Cgroup) -> None:
    with kept(scope) as keeping:
        removed_by_systemd(scope)
        cgroup_driver.create(scope.path, adopt=True)
        assert keeping.is_left()


def test_it_is_removed_by_its_maker_as_soon_as_it_is_kept_no_longer(scope: Cgroup) -> None:
    with kept(scope), pytest.raises(OSError, match="do not die"):
        scope.remove(timeout_s=0.2)
    scope.remove(timeout_s=5)
    assert not scope.exists()


def test_what_nobody_else_removes_is_not_kept(group: Cgroup) -> None:
    assert Kept.of(memory_of(group), group.directories) is None


def test_a_foothold_in_a_cgroup_that_is_gone_is_refused_and_leaves_no_thread_or_descriptor(scope: Cgroup) -> None:
    before = own()
    directory = memory_of(scope)
    scope.remove()
    with pytest.raises(FileNotFoundError):
        Foothold(directory)
    assert eventually(lambda: own() == before)


def own() -> list[int]:
    """How many threads and descriptors this process has."""
    return [len(list(Path("/proc/self", name).iterdir())) for name in ("task", "fd")]
