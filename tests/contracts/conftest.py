"""Fixtures of the contract suites."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.cgroups import fresh_path, layouts, parent
from support.corrald import Corrald
from support.faulty import Faulty, faulty_registry
from support.images_leaf import ImagesLeaf, images_leaf
from support.netlab import Calls, Lab
from support.tasks import TaskClient, make_rootfs, task_client

from corral.kernel.cgroup import Cgroup, Driver, open_driver

CGROUP_LAYOUTS = layouts()


@pytest.fixture(params=CGROUP_LAYOUTS)
def cgroup_driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """The driver of each cgroup layout that this host can show; what was made with it is removed."""
    driver = open_driver(CGROUP_LAYOUTS[request.param])
    yield driver
    for name in driver.list(f"{parent()}/ns"):
        driver.open(f"{parent()}/ns/{name}").remove()
    driver.prune(f"{parent()}/ns")
    assert driver.list(parent()) == set()


@pytest.fixture
def group(cgroup_driver: Driver) -> Cgroup:
    """A cgroup of one's own, without limits."""
    return cgroup_driver.create(fresh_path())


@pytest.fixture(scope="module")
def tasks_daemon() -> Iterator[Corrald]:
    """The tasks leaf alone, in a process of its own."""
    with Corrald(services=("tasks",)) as corrald:
        corrald.start()
        yield corrald


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory with busybox's commands."""
    return make_rootfs(tmp_path_factory.mktemp("tasks") / "rootfs")


@pytest.fixture
async def tasks(tasks_daemon: Corrald, rootfs: Path) -> AsyncIterator[TaskClient]:
    """A client of the tasks leaf that deletes what it created."""
    async with task_client(tasks_daemon, rootfs) as client:
        yield client


@pytest.fixture
async def leaf(tmp_path: Path) -> AsyncIterator[ImagesLeaf]:
    """An images leaf of the test's own, which knows the certificates in `certs.d`."""
    async with images_leaf(tmp_path / "images", certs=tmp_path / "certs.d") as made:
        yield made


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    """A registry that does what the test says."""
    with faulty_registry() as made:
        yield made


@pytest.fixture
def mirror() -> Iterator[Faulty]:
    """Another one."""
    with faulty_registry() as made:
        yield made


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A network leaf in a namespace that plays the host."""
    with Lab() as made:
        yield made


@pytest.fixture
async def net(lab: Lab) -> AsyncIterator[Calls]:
    """Calls to the leaf; what a test leaves attached or made is taken back."""
    async with lab.calls() as calls:
        yield calls
        await calls.clear()
