"""Calls on one thing at the same moment: each is carried out or refused, none fails inside, nothing is left.

What is allowed to win is not said here; what may never happen is an INTERNAL error, a call without an answer, a line in
the log that says "error", or something that is left over.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.corrald import Corrald
from support.images import Entry, busybox_layer, image_config, layer, write_docker_archive
from support.requirements import needs
from support.sweep import forgotten

from corral.api.network.v1 import network_pb2
from corral.client.sync import Client
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, NotFound

pytestmark = needs("root", "overlayfs", "busybox", "netns")

ROUNDS = 5
ANSWER_S = 40

type Call = Callable[[Client], object]


class Arena:
    """A daemon and three clients that call at once."""

    def __init__(self, daemon: Corrald, archive: Path) -> None:
        self.daemon = daemon
        self.archive = archive
        self.clients = [daemon.client() for _ in range(3)]

    @property
    def client(self) -> Client:
        return self.clients[0]

    def at_once(self, *calls: Call) -> list[object]:
        """Every call's answer, or the refusal."""
        answers: list[object] = [None] * len(calls)
        together = threading.Barrier(len(calls))

        def make(number: int) -> None:
            together.wait()
            try:
                answers[number] = calls[number](self.clients[number])
            except Exception as e:  # noqa: BLE001 - looked at below
                answers[number] = e

        threads = [threading.Thread(target=make, args=(number,), daemon=True) for number in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ANSWER_S)
        assert not any(thread.is_alive() for thread in threads), f"no answer: {answers}"
        refused = (AlreadyExists, FailedPrecondition, NotFound)
        failed = [answer for answer in answers if isinstance(answer, Exception) and not isinstance(answer, refused)]
        assert failed == []
        return answers

    def check(self) -> None:
        for container in self.client.containers.list(all=True):
            self.client.containers.remove(container.id, force=True, volumes=True)
        assert forgotten(self.daemon) == []
        assert [line for line in self.daemon.log().splitlines() if '"level": "error"' in line] == []


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a layer that busybox does not have."""
    path = tmp_path_factory.mktemp("img") / "img.tar"
    layers = [busybox_layer(), layer([Entry("etc/more", b"more")])]
    write_docker_archive(path, "img", layers, image_config(layers))
    return path


@pytest.fixture
def arena(daemon: Corrald, busybox_archive: Path, archive: Path) -> Iterator[Arena]:
    arena = Arena(daemon, archive)
    arena.client.images.load(busybox_archive, name="busybox")
    yield arena
    arena.check()
    for client in arena.clients:
        client.close()


def done(answers: list[object]) -> int:
    return sum(not isinstance(answer, CorralError) for answer in answers)


def run(client: Client) -> None:
    client.containers.run("busybox", ["sleep", "100"], name="c", network="bridge")


def remove(client: Client) -> None:
    client.containers.remove("c", force=True)


def test_of_creates_with_one_name_one_succeeds(arena: Arena) -> None:
    def create(client: Client) -> object:
        return client.containers.create("busybox", ["sleep", "100"], name="c", network="bridge")

    for _ in range(ROUNDS):
        assert done(arena.at_once(create, create, create)) == 1
        remove(arena.client)


def test_starts_at_once_start_it_once(arena: Arena) -> None:
    for _ in range(ROUNDS):
        arena.client.containers.create("busybox", ["sleep", "100"], name="c")
        answers = arena.at_once(*[lambda client: client.containers.start("c").pid] * 3)
        assert len(set(answers)) == 1
        remove(arena.client)


@pytest.mark.parametrize(
    "others",
    [
        (lambda c: c.containers.stop("c", timeout_s=0.1), lambda c: c.containers.start("c")),
        (lambda c: c.containers.restart("c", timeout_s=0.1), lambda c: c.containers.wait("c")),
        (lambda c: c.containers.pause("c"), lambda c: c.containers.kill("c")),
        (lambda c: c.containers.exec("c", ["true"]), lambda c: c.containers.exec("c", ["sleep", "1"])),
        (lambda c: list(c.containers.logs("c", follow=True)), lambda c: c.containers.rename("c", "d")),
        (remove, lambda c: c.containers.wait("c", "removed")),
    ],
    ids=["stop-start", "restart-wait", "pause-kill", "exec-exec", "logs-rename", "remove-wait"],
)
def test_a_removal_beside_anything_else(arena: Arena, others: tuple[Call, Call]) -> None:
    for _ in range(ROUNDS):
        run(arena.client)
        id_ = arena.client.containers.get("c").id
        arena.at_once(*others, lambda client, id_=id_: client.containers.remove(id_, force=True))


def test_imports_of_one_image_beside_prunes_of_everything(arena: Arena) -> None:
    def load(client: Client) -> object:
        return client.images.load(arena.archive, name="img")

    for _ in range(ROUNDS):
        arena.at_once(load, load, lambda client: [client.images.prune(all=True) for _ in range(20)])
        load(arena.client)
        assert arena.client.containers.create("img", ["true"], name="c", pull="never")
        remove(arena.client)


def test_an_image_removed_beside_its_first_container(arena: Arena) -> None:
    for _ in range(ROUNDS):
        arena.client.images.load(arena.archive, name="img")
        arena.at_once(
            lambda client: client.images.remove("img"),
            lambda client: client.containers.create("img", ["true"], name="c", pull="never"),
            lambda client: client.images.prune(),
        )
        if arena.client.containers.list(all=True):
            arena.client.containers.start("c")
            assert arena.client.containers.wait("c").code == 0
            remove(arena.client)


def test_a_network_removed_beside_its_first_container(arena: Arena) -> None:
    first, second = arena.daemon.place.network
    subnet = network_pb2.Subnet(cidr=f"{first}.{second}.128.0/24")

    def create(client: Client) -> object:
        return client.networks.create(network_pb2.CreateNetworkRequest(name="n", subnets=[subnet]))

    for _ in range(ROUNDS):
        assert done(arena.at_once(create, create, create)) == 1
        _, made = arena.at_once(
            lambda client: client.networks.remove("n"),
            lambda client: client.containers.run("busybox", ["sleep", "100"], name="c", network="n"),
        )
        if not isinstance(made, CorralError):
            remove(arena.client)
            arena.client.networks.remove("n")


def test_a_volume_is_made_while_what_was_in_another_of_that_name_is_removed(arena: Arena) -> None:
    volume = arena.client.volumes.create("v")
    for number in range(200):
        (deep := Path(volume.mountpoint) / str(number)).mkdir()
        for name in range(100):
            (deep / str(name)).touch()
    removing = threading.Thread(target=lambda: arena.clients[1].volumes.remove("v"))
    removing.start()
    while arena.client.volumes.list():
        assert removing.is_alive()
    arena.client.containers.create("busybox", ["touch", "/v/x"], name="c", volumes=["v:/v"])
    arena.client.containers.start("c")
    assert arena.client.containers.wait("c").code == 0
    removing.join(ANSWER_S)
    assert [path.name for path in Path(volume.mountpoint).iterdir()] == ["x"]
    remove(arena.client)
    arena.client.volumes.remove("v")


def test_a_volume_removed_beside_its_first_container(arena: Arena) -> None:
    for _ in range(ROUNDS):
        assert done(arena.at_once(*[lambda client: client.volumes.create("v")] * 3)) == 1
        arena.at_once(
            lambda client: client.volumes.remove("v"),
            lambda client: client.containers.create("busybox", ["touch", "/v/x"], name="c", volumes=["v:/v"]),
            lambda client: client.volumes.prune(all=True),
        )
        arena.client.containers.start("c")
        assert arena.client.containers.wait("c").code == 0
        remove(arena.client)
        arena.client.volumes.remove("v")
