"""A corrald of one's own: private directories, bridge, subnet, table and cgroup parent, in one process or in five."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from support import sweep
from support.leaks import TAG_VARIABLE
from support.preloaded import PROGRAMS, Forked

if TYPE_CHECKING:
    from corral.client.sync import Client

SERVICES = ("images", "cgroups", "network", "tasks", "engine")
CORRAL = Path(sys.executable).parent / "corral"
COMMAND = (sys.executable, "-m", "corral.daemon")
PATIENCE = float(os.environ.get("CORRAL_TEST_PATIENCE", "1"))
"""How much longer everything may take: an emulated machine is slow."""
START_TIMEOUT_S = 30.0 * PATIENCE
DYING_S = 2.0
STOP_TIMEOUT_S = 15.0 * PATIENCE


def _second_byte(tag: str) -> int:
    return 70 + int(tag[-4:], 16) % 180


def _second_bytes() -> set[int]:
    """Of the host's routes below 10.0.0.0/8: those of neighbours. Source: proc_pid_net(5), route."""
    rows = (line.split() for line in Path("/proc/net/route").read_text("utf-8").splitlines()[1:])
    found = (int(row[1], 16).to_bytes(4, "little") for row in rows)
    return {address[1] for address in found if address[0] == 10}


@dataclass(frozen=True, slots=True)
class Place:
    """Names that no other engine on this machine has."""

    tag: str
    directory: Path
    run: Path | None = None
    """Where the run state is, if not in the directory."""

    @classmethod
    def make(cls, run_in: str = "") -> "Place":
        """run_in: where to have the run state, say on a tmpfs, as /run is on most hosts."""
        # The session's tag is part of it, so that the search for leaks knows whose it is. Short: a link's name has at
        # most 15 characters.
        taken = _second_bytes()
        while True:
            tag = f"{os.environ.get(TAG_VARIABLE, 'corral')}{secrets.token_hex(2)}"
            if _second_byte(tag) not in taken:
                break
        return cls(tag, Path(tempfile.mkdtemp(prefix=f"{tag}-", dir="/tmp")), Path(run_in, tag) if run_in else None)

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def state(self) -> Path:
        return self.run or self.directory / "state"

    @property
    def bridge(self) -> str:
        return self.tag

    @property
    def nft_table(self) -> str:
        return self.tag

    @property
    def cgroup_parent(self) -> str:
        return f"/{self.tag}"

    @property
    def network(self) -> tuple[int, int]:
        """The first two bytes of its private /16, below those that tests name; neighbours differ, in practice."""
        return 10, _second_byte(self.tag)

    def settings(self) -> dict[str, dict[str, object]]:
        first, second = self.network
        return {
            "daemon": {"socket_group": ""},
            "cgroups": {"parent": self.cgroup_parent},
            "network": {
                "bridge": self.bridge,
                "nft_table": self.nft_table,
                "subnet": f"{first}.{second}.0.0/20",
                "pools": [f"{first}.{second}.128.0/17"],
                "forward": "leave",  # the machine's own iptables is none of ours
                "cni_names": f"{self.directory}/cni-names",
            },
        }


@dataclass(frozen=True, slots=True)
class PlaceOn(Place):
    """One whose data lies elsewhere, on a file system of the test's own say."""

    data: Path = Path()

    @classmethod
    def make_on(cls, data: Path) -> "PlaceOn":
        plain = Place.make()
        return cls(plain.tag, plain.directory, plain.run, data)

    @property
    def root(self) -> Path:
        return self.data


@dataclass
class Corrald:
    """Started and stopped by tests at will; use as a context manager, which leaves nothing behind."""

    split: bool = False
    services: Sequence[str] = ()  # those wanted, if not all
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # these win over the private ones
    private_names: bool = True  # bridge, table and cgroups of its own; False where no real service is hosted
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    command: Sequence[str] = COMMAND
    netns: Path | None = None  # where it lives, if not in the tests' own namespace of the network
    place: Place = field(default_factory=Place.make)
    processes: dict[str, subprocess.Popen[bytes] | Forked] = field(default_factory=dict)
    altered: set[str] = field(default_factory=set)
    """Those that have more in their environment than they were to have, failpoints say."""

    @property
    def address(self) -> str:
        """Where the engine, and in one process everything else, listens."""
        return self.address_of("engine")

    def address_of(self, service: str) -> str:
        wanted = self.services or SERVICES
        alone = self.split or len(wanted) == 1
        return f"unix://{self.place.state}/{service if alone else 'corrald'}.sock"

    @property
    def root(self) -> Path:
        return self.place.root

    @property
    def state(self) -> Path:
        return self.place.state

    def log(self, name: str = "") -> str:
        """What was logged so far, of one process or of all."""
        logs = sorted(self.place.directory.glob(f"{name or '*'}.log"))
        return "".join(path.read_text("utf-8", "replace") for path in logs)

    def events(self, event: str) -> list[dict[str, object]]:
        """The log's entries with this event name."""
        lines = (json.loads(line) for line in self.log().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == event]

    def start(self, *only: str, environment: Mapping[str, str] | None = None) -> None:
        """Start what does not run, all at once, and wait until each says that it is ready.

        Raises RuntimeError, with the end of its log, if one does not get there.
        """
        for name, mark in self.launch(*only, environment=environment).items():
            self._await_ready(name, mark)

    def launch(self, *only: str, environment: Mapping[str, str] | None = None) -> dict[str, int]:
        """Start what does not run, without waiting; returns where each one's log begins."""
        names = self._dead(only or self._names())
        marks = {name: len(self.log(name)) for name in names}
        for name in names:
            self.processes[name] = self._spawn(name, environment or {})
            (self.altered.add if environment else self.altered.discard)(name)
        return marks

    def _dead(self, wanted: Sequence[str]) -> list[str]:
        """Those that do not run. Who was to kill itself may be about to end still: its clients hear of it before."""
        deadline = time.monotonic() + DYING_S
        while not (dead := [name for name in wanted if not self._runs(name)]) and self.altered.issuperset(wanted):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return dead

    def _names(self) -> Sequence[str]:
        wanted = self.services or SERVICES
        return wanted if self.split else ["corrald"]

    def _runs(self, name: str) -> bool:
        process = self.processes.get(name)
        return process is not None and process.poll() is None

    def _spawn(self, name: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | Forked:
        config = self.place.directory / "config.toml"
        private = self.place.settings() if self.private_names else {"daemon": {"socket_group": ""}}
        text = to_toml(merged(private, self.settings))
        if not config.exists() or config.read_text("utf-8") != text:  # one that was just started may be reading it
            config.write_text(text, "utf-8")
        arguments = ["--config", str(config), "--root", str(self.root), "--state", str(self.state)]
        wanted = [name] if self.split else self.services
        for service in wanted:
            arguments += ["--service", service]
        arguments += self.options
        environment = os.environ | self.environment | environment
        with (self.place.directory / f"{name}.log").open("ab") as log, open(os.devnull, "rb") as null:
            as_is = self.command == COMMAND and "PYTHONPATH" not in self.environment
            preloaded = PROGRAMS.get("corral.daemon") if as_is else None
            if preloaded is not None:
                return preloaded.fork(arguments, environment, (null, log, log), netns=self.netns)
            within = () if self.netns is None else ("nsenter", f"--net={self.netns}")
            command = [*within, *self.command, *arguments]
            return subprocess.Popen(command, stdin=null, stdout=log, stderr=log, env=environment)

    def _await_ready(self, name: str, mark: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while '"daemon.ready"' not in self.log(name)[mark:]:
            code = self.processes[name].poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with {code}" if code is not None else "is not ready in time"
                raise RuntimeError(f"{name} {what}:\n{self.log(name)[mark:][-4000:]}")
            time.sleep(0.01)

    def stop(self, *only: str) -> dict[str, int]:
        """SIGTERM to all, composers first, and wait; returns their exit codes. Raises TimeoutExpired."""
        codes = {}
        for name in reversed(only or list(self.processes)):
            process = self.processes.pop(name)
            process.terminate()
            codes[name] = process.wait(STOP_TIMEOUT_S)
        return codes

    def kill9(self, *only: str) -> None:
        """SIGKILL to all at once, and wait until they are gone."""
        names = only or tuple(self.processes)
        for name in names:
            self.processes[name].send_signal(signal.SIGKILL)
        for name in names:
            self.processes.pop(name).wait(STOP_TIMEOUT_S)

    def restart(self, *only: str) -> None:
        """stop() and start()."""
        self.stop(*only)
        self.start(*only)

    def restart_with(self, environment: Mapping[str, str]) -> None:
        """Stop, and start with more in the environment, failpoints say."""
        self.stop()
        self.start(environment=environment)

    def revive(self) -> None:
        """Start again what died, failpoints off. Raises AssertionError if nothing did."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not (dead := [name for name in self.processes if not self._runs(name)]):
            assert time.monotonic() < deadline, "nothing died"
            time.sleep(0.01)
        self.start(*dead)

    def corral(
        self, *arguments: str, stdin: bytes | None = None, timeout_s: float = 60.0, check: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the command `corral` against this daemon; without `stdin` it reads /dev/null."""
        environment = os.environ | {"CORRAL_ADDRESS": self.address}
        if stdin is None and (preloaded := PROGRAMS.get("corral.cli")) is not None:
            return preloaded.run(arguments, environment, timeout_s=timeout_s, check=check)
        return subprocess.run(
            [CORRAL, *arguments],
            env=environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout_s,
            check=check,
        )

    def client(self, namespace: str | None = None) -> "Client":
        """The typed client, connected to this daemon."""
        from corral.client.sync import Client

        return Client(self.address, namespace=namespace)

    def leftovers(self) -> list[str]:
        """What of containers is still there; empty once all were deleted."""
        found = sweep.leftovers(self.state, self.place.cgroup_parent, self.place.bridge)
        makers = {process.pid for process in self.processes.values()}
        return found + [f"zygote {pid}" for pid in sweep.abandoned_zygotes(self.place.root, makers)]

    def close(self) -> None:
        """Stop, and remove every trace. Raises AssertionError naming what a clean stop should not have left."""
        left: list[str] = []
        try:
            if self.processes:
                left = sweep.delete_containers(self)
                self.stop()
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
            self.processes.clear()
            left += self.leftovers()
            place = self.place
            sweep.kill(sweep.zygotes(place.root), lambda: sweep.zygotes(place.root))
            sweep.purge(place.directory, place.state, place.cgroup_parent, place.bridge, place.nft_table)
            for directory in (place.directory, place.state):
                shutil.rmtree(directory, ignore_errors=True)
        assert not left, f"left behind: {left}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: object) -> None:
        if e is None:
            self.close()
            return
        sys.stderr.write(self.log()[-8000:])
        with contextlib.suppress(AssertionError):
            self.close()


@contextlib.contextmanager
def running(**options: object) -> Iterator[Corrald]:
    """A daemon that runs within the block."""
    with Corrald(**options) as daemon:  # type: ignore[arg-type]
        daemon.start()
        yield daemon


def merged(
    base: Mapping[str, Mapping[str, object]], more: Mapping[str, Mapping[str, object]]
) -> dict[str, dict[str, object]]:
    return {name: {**base.get(name, {}), **more.get(name, {})} for name in {**base, **more}}


def _to_toml_value(value: object) -> str:
    """JSON is TOML, but for tables."""
    if isinstance(value, list):
        return f"[{', '.join(map(_to_toml_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_to_toml_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def to_toml(document: Mapping[str, Mapping[str, object]]) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's."""
    lines = []
    for section, table in document.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_to_toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"
