"""Network namespaces without a process, and the pool of ready ones."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.netlab import eventually
from support.requirements import needs

from corral.kernel.netns import create_pinned, in_namespace, in_own_thread, remove_pinned
from corral.network.pool import NetnsPool, is_pinned

pytestmark = needs("root", "netns")
SIZE = 4


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(f"/tmp/corral-pins-{os.getpid()}")
    path.mkdir()
    yield path
    for pin in path.iterdir():
        remove_pinned(pin)
    shutil.rmtree(path)


@pytest.fixture
def pool(directory: Path) -> Iterator[NetnsPool]:
    made = NetnsPool(directory, SIZE)
    yield made
    made.close()


def identity(path: Path) -> int:
    return path.stat().st_ino


def test_a_pinned_namespace_lives_without_a_process_and_is_not_ours(directory: Path) -> None:
    path = directory / "a"
    create_pinned(path)
    assert is_pinned(path)
    assert identity(path) != identity(Path("/proc/self/ns/net"))
    assert in_namespace(path, socket.if_nameindex) == [(1, "lo")]


def test_a_taken_name_is_refused_and_stays_as_it_is(directory: Path) -> None:
    path = directory / "a"
    create_pinned(path)
    before = identity(path)
    with pytest.raises(FileExistsError):
        create_pinned(path)
    assert identity(path) == before


def test_a_pin_that_cannot_be_made_leaves_no_file(directory: Path) -> None:
    with pytest.raises(FileNotFoundError):
        create_pinned(directory / "missing/a")
    with pytest.raises(ZeroDivisionError):
        create_pinned(directory / "b", lambda: 1 // 0)
    assert list(directory.iterdir()) == []


def test_removing_twice_or_what_was_never_pinned_is_no_error(directory: Path) -> None:
    path, plain = directory / "a", directory / "b"
    create_pinned(path)
    plain.touch()
    for one in (path, path, plain):
        remove_pinned(one)
    assert list(directory.iterdir()) == []
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()


def test_the_callers_thread_stays_where_it_is(directory: Path) -> None:
    before = identity(Path("/proc/thread-self/ns/net"))
    create_pinned(directory / "a")
    inside = in_namespace(directory / "a", lambda: identity(Path("/proc/thread-self/ns/net")))
    assert inside == identity(directory / "a")
    assert identity(Path("/proc/thread-self/ns/net")) == before


def test_what_fails_inside_is_raised_outside(directory: Path) -> None:
    create_pinned(directory / "a")
    with pytest.raises(ZeroDivisionError):
        in_namespace(directory / "a", lambda: 1 // 0)
    with pytest.raises(OSError, match="setns"):
        in_namespace(Path("/proc/self/status"), int)
    assert in_own_thread(threading.get_ident) != threading.get_ident()


def test_a_ready_namespace_has_its_loopback_up_and_no_ipv6_for_what_comes(pool: NetnsPool) -> None:
    path = pool.path(pool.make())

    def inside() -> tuple[str, str]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), 2).close()
        return (
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").read_text().strip(),
            Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip(),
        )

    assert in_namespace(path, inside) == ("1", "0")


def test_the_pool_fills_itself_again(pool: NetnsPool, directory: Path) -> None:
    pool.start()
    assert eventually(lambda: pool.ready == SIZE)
    taken = [pool.take() for _ in range(SIZE)]
    assert None not in taken
    assert len(set(taken)) == SIZE
    assert eventually(lambda: pool.ready == SIZE)
    assert len(list(directory.iterdir())) == 2 * SIZE


def test_an_empty_pool_says_so_at_once(pool: NetnsPool) -> None:
    assert pool.take() is None
    name = pool.make()
    pool.give_back(name)
    assert pool.take() == name


def test_nobody_shares_a_namespace(pool: NetnsPool) -> None:
    pool.start()
    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(lambda _: pool.take() or pool.make(), range(40)))
    assert len(set(names)) == 40
    assert len({identity(pool.path(name)) for name in names}) == 40


def test_a_sweep_keeps_what_is_owned_only(directory: Path) -> None:
    old = NetnsPool(directory, SIZE)
    names = [old.make() for _ in range(3)]
    new = NetnsPool(directory, SIZE)
    assert sorted(new.sweep({names[1]})) == sorted([names[0], names[2]])
    assert [path.name for path in directory.iterdir()] == [names[1]]


def test_closing_leaves_those_taken_and_removes_the_rest(pool: NetnsPool, directory: Path) -> None:
    pool.start()
    assert eventually(lambda: pool.ready == SIZE)
    taken = pool.take()
    pool.close()
    assert [path.name for path in directory.iterdir()] == [taken]
