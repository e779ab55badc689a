"""At every failpoint of every service: killed there, nothing is lost and nothing is left.

One daemon lives through all of it. For each failpoint it is killed and started again with that one armed, led through
the whole life of images, networks, volumes and containers, started again where it died, and looked through in the end.
The same is asked of lives with several failpoints armed, which die at one after the other, in a tenth of the time. The
names are read from the sources: a new failpoint is tested as soon as it is there, and one that the life below does
not reach fails.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from support.corrald import Corrald
from support.file_systems import loop_devices
from support.images import Entry, busybox_layer, image_config, layer, write_docker_archive, write_oci_archive
from support.registry import Registry, running, skopeo
from support.requirements import needs
from support.sweep import cgroups, depth_below, forgotten

from corral.api.cgroups.v1 import cgroups_pb2, cgroups_pb2_grpc
from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc
from corral.api.images.v1 import images_pb2, images_pb2_grpc
from corral.api.network.v1 import network_pb2
from corral.api.types.v1 import types_pb2
from corral.client.sync import Client
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, NotFound, Unavailable, from_rpc_error

pytestmark = needs("root", "overlayfs", "busybox", "netns", "docker-registry", "skopeo")

SERVICES = Path(__file__).resolve().parents[2] / "services"
DRIVERS = SERVICES / "corral/images/drivers"  # theirs are passed in tests/contracts/test_snapshotter_crash.py
# Not always at the start of a line: one of the log may be being written.
DIED_AT = re.compile(r"failpoint (\S+)$", re.MULTILINE)
CALL = re.compile(r'\bfailpoint\(("(?P<name>[^"]*)")?')
# Reached at every commit of every service, so that one hit would always be at the start.
HITS = {"store.before_commit": (3, 20, 40, 60), "store.after_commit": (3, 20, 40, 60)}
# Runs until somebody puts /v/go there, as often as it is started.
SCRIPT = "while [ ! -e /v/go ]; do sleep 0.01; done; rm /v/go; exit 7"


def calls() -> list[re.Match[str]]:
    sources = [path.read_text("utf-8") for path in SERVICES.rglob("*.py") if path.parent != DRIVERS]
    return [match for source in sources for match in CALL.finditer(source)]


def triggers() -> list[str]:
    names = sorted({match["name"] for match in calls() if match["name"]})
    return [f"{name}=kill{f'@{hit}' if hit else ''}" for name in names for hit in HITS.get(name, (0,))]


CNI_CONFIG = '{"cniVersion": "1.0.0", "type": "stub"}'
# Gives the address that it has, once.
CNI_PLUGIN = """#!/bin/sh
cat > /dev/null
case $CNI_COMMAND in
ADD) mkdir {directory}/held-192.0.2.2 && echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "192.0.2.2/24"}}]}}';;
DEL) rm -rf {directory}/held-192.0.2.2;;
esac
"""
LIVES = 8


def shared_lives() -> list[list[str]]:
    """All triggers, in lives that share them out; no life has a name twice."""
    every = triggers()
    return [every[i::LIVES] for i in range(LIVES)]


@dataclass
class Life:
    """A daemon, what happens to it while one failpoint is armed, and what must be true of it afterwards."""

    daemon: Corrald
    archive: Path
    registry: Registry
    client: Client
    armed: list[str] = field(default_factory=list)
    """Triggers that have not fired yet."""
    sound: bool = True
    """The last test ended well."""
    kept: engine_pb2.Container = field(default_factory=engine_pb2.Container)
    lost: engine_pb2.Container = field(default_factory=engine_pb2.Container)

    # Calls that a kill may break

    def call[T](self, work: Callable[[], T], *done: type[CorralError]) -> T | None:
        """Repeat a call that a kill broke; `done` is what a repetition says if the broken call had been carried out."""
        broken = False
        while True:
            try:
                return work()
            except Unavailable:
                broken = True
                self.revive()
            except done:
                if not broken:
                    raise
                return None

    def revive(self) -> None:
        self.bury()
        self.launch()
        self.call(self.look_through)

    def launch(self) -> None:
        """Start the daemon with what is still armed, again if it dies of that on its way."""
        while True:
            try:
                return self.daemon.start(environment={"CORRAL_FAILPOINTS": ",".join(self.armed)})
            except RuntimeError:
                self.bury()

    def bury(self) -> None:
        """It was killed, and at a failpoint that was armed."""
        assert self.daemon.processes["corrald"].wait(5) == -signal.SIGKILL, f"not killed: {self.daemon.log()[-4000:]}"
        [*_, name] = DIED_AT.findall(self.daemon.log())
        [trigger] = [trigger for trigger in self.armed if trigger.startswith(f"{name}=")]
        self.armed.remove(trigger)

    def look_through(self) -> None:
        """Nothing is left where it died, whatever it was about to do."""
        assert [f"{f.service}: {f.subject} {f.problem}" for f in self.client.system.check()] == []

    # Before: what a start finds

    def prepare(self) -> None:
        """A container that runs, one that dies with its shim and zygote while no daemon looks, a cgroup of none."""
        containers = self.client.containers
        self.kept = containers.run("busybox", ["sleep", "1000"], name="kept", network="bridge")
        self.lost = containers.run("busybox", ["sleep", "1000"], name="lost", network="none")
        lost = containers.get("lost")
        zygote = int(Path(f"/proc/{lost.shim_pid}/stat").read_text().rpartition(")")[2].split()[1])
        labels = {"corral.owner": "engine", "corral.namespace": "default", "corral.container": "stray"}
        leaf = self.client.leaf("cgroups")
        stub = cgroups_pb2_grpc.CgroupsStub(leaf.channel)
        leaf.unary(stub.Create, cgroups_pb2.CreateCgroupRequest(id="stray", labels=labels))
        self.daemon.kill9()
        pids = (zygote, lost.shim_pid, lost.pid)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        while any(Path(f"/proc/{pid}").exists() for pid in pids):  # as long as it is a zombie, its exit is known
            time.sleep(0.05)

    def start(self, armed: Sequence[str]) -> None:
        self.armed = list(armed)
        self.launch()

    def disarm(self) -> list[str]:
        """Start it without the triggers that have not fired, if any; returns them."""
        left, self.armed = self.armed, []
        if left:
            self.daemon.kill9()
            self.daemon.start()
        return left

    # Meanwhile: everything that can be done

    def live(self) -> None:
        self.make()
        self.run_once()
        self.run_once()
        self.build()
        self.unmake()

    def make(self) -> None:
        client = self.client
        header = images_pb2.ImportHeader(name="img", no_unpack=True)
        self.call(lambda: list(client.images.load_stream(header, [self.archive.read_bytes()])))
        self.call(lambda: client.images.tag("img", "other:1"))
        self.call(lambda: client.images.push("img", f"{self.registry.host}/{secrets.token_hex(8)}:1"))
        self.call(lambda: client.images.pull(f"{self.registry.host}/far:1", keep_blobs=False))
        self.call(lambda: client.volumes.create("vol"), AlreadyExists)
        self.call(lambda: client.volumes.create("bounded", options={"size": "8m"}), AlreadyExists)
        elsewhere = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m"}
        self.call(lambda: client.volumes.create("elsewhere", options=elsewhere), AlreadyExists)
        self.call(lambda: client.secrets.create("key", b"of nobody"), AlreadyExists)
        first, second = self.daemon.place.network
        subnet = network_pb2.Subnet(cidr=f"{first}.{second}.128.0/24")
        network = network_pb2.CreateNetworkRequest(name="net", subnets=[subnet])
        self.call(lambda: client.networks.create(network), AlreadyExists)
        lan = network_pb2.CreateNetworkRequest(name="lan", driver="macvlan")
        self.call(lambda: client.networks.create(lan), AlreadyExists)
        plugged = network_pb2.CreateNetworkRequest(name="plugged", driver="cni", options={"cni.config": CNI_CONFIG})
        self.call(lambda: client.networks.create(plugged), AlreadyExists)
        with pytest.raises(CorralError, match="nobody-here"):
            self.call(lambda: client.containers.create("busybox", ["true"], name="no", user="nobody-here"))
        parent = f"{self.daemon.place.cgroup_parent}-own"
        self.call(
            lambda: client.containers.create(
                "img",
                ["sh", "-c", SCRIPT],
                name="one",
                network="net",
                ports=["7"],
                volumes=["vol:/v", "elsewhere:/elsewhere", "/anonymous"],
                secrets=["key"],
                mounts=["type=image,source=busybox,target=/box", "type=image,source=busybox,target=/own,rw"],
                cgroup_parent=parent,
                memory="64m",
            ),
            AlreadyExists,
        )

    def run_once(self) -> None:
        containers = self.client.containers
        self.call(lambda: containers.start("one"))
        self.call(self.update)
        self.call(lambda: self.client.networks.connect("bridge", "one"))
        self.call(lambda: self.client.networks.disconnect("bridge", "one"), NotFound)
        self.call(lambda: self.client.networks.connect("lan", "one"))
        self.call(lambda: self.client.networks.disconnect("lan", "one"), NotFound)
        self.call(lambda: self.client.networks.connect("plugged", "one"))
        self.call(lambda: self.client.networks.disconnect("plugged", "one"), NotFound)
        self.call(lambda: containers.publish("one", ["8"]))
        self.call(lambda: containers.unpublish("one", ["8"]), NotFound)
        self.call(lambda: containers.pause("one"), FailedPrecondition)
        # The pause of a daemon that died before it said so is undone.
        if self.call(lambda: containers.get("one")).status == engine_pb2.STATUS_PAUSED:
            self.call(lambda: containers.resume("one"), FailedPrecondition)
        self.call(lambda: containers.commit("one"))
        assert self.call(lambda: containers.get("one")).status == engine_pb2.STATUS_RUNNING
        self.call(lambda: containers.exec("one", ["touch", "/v/go"]), FailedPrecondition, NotFound)
        status = self.call(lambda: containers.wait("one"))
        assert (status.code, status.known) == (7, True), status

    def update(self) -> None:
        resources = types_pb2.Resources(memory=types_pb2.MemoryResources(limit_bytes=48 << 20))
        engine = self.client.engine()
        stub = engine_pb2_grpc.ContainersStub(engine.channel)
        rate = engine_pb2.NetworkRate(receive_bps=80_000_000, send_bps=40_000_000)
        request = engine_pb2.UpdateContainerRequest(container="one", resources=resources, network_rate=rate)
        engine.unary(stub.Update, request)

    def build(self) -> None:
        """What a builder does: blobs and committed snapshots."""
        leaf = self.client.leaf("images")
        content = images_pb2_grpc.ContentStub(leaf.channel)
        snapshots = images_pb2_grpc.SnapshotsStub(leaf.channel)

        def write() -> None:
            try:
                content.Write(iter([images_pb2.WriteBlobRequest(data=b"blob")]))
            except grpc.RpcError as e:
                raise from_rpc_error(e) from e

        self.call(write)
        prepare = images_pb2.PrepareSnapshotRequest(key="step", image="img")
        self.call(lambda: leaf.unary(snapshots.Prepare, prepare))
        images = images_pb2_grpc.ImagesStub(leaf.channel)
        where = self.archive.parent / "mounted"
        where.mkdir(exist_ok=True)
        mount = images_pb2.MountImageRequest(image="img", directory=str(where), writable=True)
        self.call(lambda: leaf.unary(snapshots.Mount, mount), AlreadyExists)
        unmount = images_pb2.UnmountImageRequest(directory=str(where))
        self.call(lambda: leaf.unary(snapshots.Unmount, unmount), NotFound)
        committed = images_pb2.CommitImageRequest(key="step", name="committed")
        self.call(lambda: leaf.unary(images.Commit, committed))
        commit = images_pb2.CommitSnapshotRequest(key="step", name="stage")
        self.call(lambda: leaf.unary(snapshots.Commit, commit), NotFound)
        self.call(lambda: leaf.unary(snapshots.Remove, images_pb2.RemoveSnapshotRequest(key="stage")))

    def unmake(self) -> None:
        client = self.client
        for name in ("one", "kept", "lost"):
            self.call(lambda name=name: client.containers.remove(name, force=True, volumes=True), NotFound)
        self.call(lambda: client.networks.remove("net"), NotFound)
        self.call(lambda: client.networks.remove("lan"), NotFound)
        self.call(lambda: client.networks.remove("plugged"), NotFound)
        self.call(lambda: client.volumes.remove("vol"), NotFound)
        self.call(lambda: client.volumes.remove("bounded"), NotFound)
        self.call(lambda: client.volumes.remove("elsewhere"), NotFound)
        self.call(lambda: client.secrets.remove("key"), NotFound)
        self.call(lambda: client.images.remove("img"), NotFound)
        self.call(lambda: client.images.remove("other:1"), NotFound)
        self.call(lambda: client.images.remove(f"{self.registry.host}/far:1"), NotFound)
        self.call(lambda: client.images.remove("committed"), NotFound)
        self.call(client.images.prune)  # a commit that was done again has left an image without a name

    # Afterwards

    def check(self, after: int) -> None:
        """Nothing is left, and the journal tells each thing once."""
        self.look_through()
        assert eventually_empty(lambda: forgotten(self.daemon) + self.strays()) == []
        assert eventually_empty(lambda: self.mistold(after)) == []

    def strays(self) -> list[str]:
        """What the services do not list."""
        place = self.daemon.place
        own = f"{place.cgroup_parent}-own"
        found = [f"cgroup {path}" for path in cgroups(own) if depth_below(path, own) > 0]
        for what, root in {
            "volume": place.root / "engine" / "volumes",
            "secret": place.root / "engine" / "secrets",
            "log of": place.root / "engine" / "containers",
            "files of": place.root / "network" / "endpoints",
        }.items():
            found += [f"{what} {path.name}" for path in root.glob("*/*")]
        found += [f"{path.name} of a plugin" for path in (self.archive.parent / "plugins").glob("held-*")]
        found += [f"part of blob {path.name}" for path in (place.root / "images" / "partial").iterdir()]
        volumes = f"{place.root}/engine/volumes/"
        mounts = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
        found += [f"mount of {line.split()[4]}" for line in mounts if volumes in line]
        return found + [f"loop device of {file}" for file in loop_devices(place.root)]

    def mistold(self, after: int) -> list[str]:
        """What the journal tells of the three containers that it should not, and the other way round."""
        request = types_pb2.EventsRequest(after=after, no_follow=True, all_namespaces=True)
        events = [event for answer in self.client.system.events(request) for event in answer.events]
        told = Counter(
            (event.payload["name"], event.topic) for event in events if event.topic in TOLD and not event.origin
        )
        wrong = [f"{key}: {told[key]} times" for key in told.keys() | EXPECTED.keys() if told[key] != EXPECTED.get(key)]
        for origin in ("tasks", "images", "network", "cgroups"):
            numbers = [event.origin_seq for event in events if event.origin == origin]
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                wrong.append(f"the journal of {origin}, merged: {numbers}")
        return wrong


TOLD = ("container.created", "container.started", "container.died", "container.removed")
EXPECTED = {(name, topic): 1 for name in ("kept", "lost", "one") for topic in TOLD}
EXPECTED |= {("one", "container.started"): 2, ("one", "container.died"): 2}


def eventually_empty(look: Callable[[], list[str]]) -> list[str]:
    """What is still found after a while."""
    deadline = time.monotonic() + 20
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@dataclass
class Lives:
    """The life that goes on from test to test; after a test that failed, which may have left anything, a new one."""

    archive: Path
    busybox: Path
    registry: Registry
    life: Life | None = None
    _end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __call__(self) -> Life:
        if self.life is None or not self.life.sound:
            self.end()
            self.life = self._begin()
        return self.life

    def _begin(self) -> Life:
        plugins = self.archive.parent / "plugins"
        plugins.mkdir(exist_ok=True)
        plugin = plugins / "stub"
        plugin.write_text(CNI_PLUGIN.format(directory=plugins))
        plugin.chmod(0o755)
        daemon = Corrald(settings={"network": {"cni_bin_dirs": [str(plugins)]}})
        parent = f"{daemon.place.cgroup_parent}-own"
        self._end.callback(lambda: [path.rmdir() for path in cgroups(parent)])  # as with docker, one asked for stays
        self._end.enter_context(daemon)
        daemon.start()
        client = self._end.enter_context(daemon.client())
        client.images.load(self.busybox, name="busybox")
        return Life(daemon, self.archive, self.registry, client)

    def end(self) -> None:
        with contextlib.ExitStack() as tolerant:
            if self.life is not None and not self.life.sound:
                print(self.life.daemon.log()[-8000:])
                tolerant.enter_context(contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired))
            self._end.close()


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory, busybox_archive: Path) -> Iterator[Lives]:
    archive = tmp_path_factory.mktemp("image") / "img.tar"
    layers = [busybox_layer(), layer([Entry("etc/more", b"a layer that busybox does not have")])]
    write_docker_archive(archive, "img", layers, image_config(layers))
    with running(tmp_path_factory.mktemp("registry")) as registry:
        put_far_image(registry, tmp_path_factory.mktemp("far"))
        lives = Lives(archive, busybox_archive, registry)
        yield lives
        lives.end()


def put_far_image(registry: Registry, directory: Path) -> None:
    """An image whose content no other one has, for pulls."""
    layers = [layer([Entry(f"etc/far{i}", bytes([i]) * 1000)]) for i in range(2)]
    archive = write_oci_archive(directory / "far.tar", "far:1", layers, image_config(layers))
    skopeo("--insecure-policy", "copy", "-q", "--dest-tls-verify=false", f"oci-archive:{archive}",
           f"docker://{registry.host}/far:1")  # fmt: skip


@pytest.fixture
def life(lives: Lives) -> Life:
    return lives()


def test_every_failpoint_has_its_name_where_it_stands() -> None:
    assert [match.string[match.start() :][:60] for match in calls() if not match["name"]] == []


@pytest.mark.parametrize("trigger", triggers())
def test_killed_there_nothing_is_lost_and_nothing_is_left(life: Life, trigger: str) -> None:
    life.sound = False
    assert live_with(life, [trigger]) == [], "it was not reached: extend the life above"
    life.sound = True


@pytest.mark.timeout(600)
@pytest.mark.parametrize("armed", shared_lives(), ids=range(LIVES))
def test_killed_at_one_after_the_other_nothing_is_lost_and_nothing_is_left(life: Life, armed: list[str]) -> None:
    """What a life did not reach, because it had died before in the same call, is for the next life."""
    life.sound = False
    while armed:
        left = live_with(life, armed)
        assert len(left) < len(armed), f"not reached: {left}"
        armed = left
    life.sound = True


def live_with(life: Life, armed: Sequence[str]) -> list[str]:
    """Lead through a life; returns the triggers that have not fired."""
    life.daemon.start()
    after = last_event(life.client)
    life.prepare()
    life.start(armed)
    life.live()
    left = life.disarm()
    life.check(after)
    return left


def last_event(client: Client) -> int:
    request = types_pb2.EventsRequest(no_follow=True, all_namespaces=True)
    return max((event.seq for answer in client.system.events(request) for event in answer.events), default=0)
