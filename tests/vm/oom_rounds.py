"""Who ran out of memory is told right every time: one engine, many rounds of each kind, and how many were wrong.

    .venv/bin/python tests/vm/oom_rounds.py [--driver systemd] [--rounds 100] [--at-once 4] [KIND…]

    init     the container's own process
    below    the container's own process, in a sub-cgroup
    child    a child of it, and it ends at once
    beside   a child of it, and it lives on, until it is stopped
    exec     a further process, and the container lives on
    ending   the container's own process, and a further one ends with it
    group    all processes at once, by memory.oom.group (where there is cgroup v2)
    killed   nobody: it is killed by hand

The exit status of each process is looked at, and what the journals of task and cgroup tell of kills.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.corrald import PATIENCE, Corrald, PlaceOn, running
from support.engine import EngineClient, engine_of, import_image
from support.images import write_busybox

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.api.types.v1.types_pb2 import ExitStatus, MemoryResources, Resources
from corral.kernel.cgroup import Kind, detect
from corral.rpc.errors import CorralError

HOG = "tail /dev/zero"
LIMIT = 16 << 20
COUNTED = {"task.oom": "kills", "cgroup.oom": "oom_kills"}
SEEN_S = 6.0
"""For a shim to have seen where init is."""
TOLD_S, ROUND_S = 5.0 * PATIENCE, 30.0 * PATIENCE


class SlicePlace(PlaceOn):
    """One whose containers are below a slice."""

    @property
    def cgroup_parent(self) -> str:
        return f"/{self.tag}.slice"


def limits(**more: bool) -> Resources:
    return Resources(memory=MemoryResources(limit_bytes=LIMIT, swap_bytes=LIMIT, **more))


def move_below(pid: int) -> None:
    """Put a container's init into a sub-cgroup of where its memory is counted."""
    hierarchy = detect().of("memory")
    assert hierarchy is not None
    places = (line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    wanted = "memory" if hierarchy.version == 1 else ""
    path = next(path for _, controllers, path in places if wanted in controllers.split(","))
    below = Path(f"{hierarchy.mount_point}{path}", "below")
    below.mkdir()
    (below / "cgroup.procs").write_text(str(pid))


def plainly(status: ExitStatus) -> tuple[int, bool]:
    return status.code, status.oom_killed


class Told(dict[str, dict[str, object]]):
    """The last number of kills in each journal, by container."""

    async def follow(self, engine: EngineClient) -> None:
        """Until it is cancelled."""
        async for response in engine.system.Events(types_pb2.EventsRequest(topics=[*COUNTED])):
            for event in response.events:
                self.setdefault(event.subject, {})[event.topic] = dict(event.payload)[COUNTED[event.topic]]


async def run_exec(engine: EngineClient, id_: str, script: str) -> ExitStatus:
    made = await engine.containers.Exec(pb.ExecContainerRequest(container=id_, args=["sh", "-c", script]))
    await engine.containers.ExecStart(pb.ExecStartRequest(container=id_, exec_id=made.exec_id))
    return (await engine.containers.ExecWait(pb.ExecWaitRequest(container=id_, exec_id=made.exec_id, remove=True))).exit


class Round:
    """One container, and what is told of it that is not as it should be."""

    def __init__(self, engine: EngineClient, told: Told) -> None:
        self._engine, self._told, self._id = engine, told, ""
        self.wrong: list[str] = []

    async def _run(self, script: str, **more: bool) -> str:
        self._id = await self._engine.run("sh", "-c", script, resources=limits(**more))
        return self._id

    def _expect(self, what: str, is_: object, wanted: object) -> None:
        if is_ != wanted:
            self.wrong.append(f"{what} {is_}, not {wanted}")

    async def _ends(self, code: int, is_out_of_memory: bool) -> None:
        self._expect("container", plainly(await self._engine.wait(self._id)), (code, is_out_of_memory))

    async def _counts(self, *kills: int) -> None:
        """Both journals come to the same of these numbers."""
        until = time.monotonic() + TOLD_S
        while True:
            counts = self._told.get(self._id, {})
            if len(counts) == 2 and len(set(counts.values())) == 1 and set(counts.values()) <= set(kills):
                return
            if time.monotonic() > until:
                self.wrong.append(f"journals {counts}, not {kills}")
                return
            await asyncio.sleep(0.05)

    async def init(self) -> None:
        await self._run(f"exec {HOG}")
        await self._ends(137, True)
        await self._counts(1)

    async def below(self) -> None:
        id_ = await self._run(f"until [ -e /go ]; do sleep 0.05; done; exec {HOG}")
        pid = (await self._engine.get(id_)).pid
        move_below(pid)
        await asyncio.sleep(SEEN_S)
        Path(f"/proc/{pid}/root/go").touch()  # noqa: ASYNC240 - as short as all that is done here
        await self._ends(137, True)
        await self._counts(1)

    async def child(self) -> None:
        await self._run(f"{HOG}; exit 5")
        await self._ends(5, True)
        await self._counts(1)

    async def beside(self) -> None:
        id_ = await self._run(f"trap 'exit 7' TERM; {HOG}; sleep 100 & wait")
        await self._counts(1)
        await self._engine.stop(id_)
        await self._ends(7, True)

    async def exec(self) -> None:
        id_ = await self._run("exec sleep 1000")
        self._expect("exec", plainly(await run_exec(self._engine, id_, f"exec {HOG}")), (137, True))
        await self._engine.kill(id_)
        await self._ends(137, True)
        await self._counts(1)

    async def ending(self) -> None:
        id_ = await self._run(f"until [ -e /begun ]; do sleep 0.05; done; exec {HOG}")
        self._expect("exec", plainly(await run_exec(self._engine, id_, "touch /begun; exec sleep 1000")), (137, False))
        await self._ends(137, True)
        await self._counts(1)

    async def group(self) -> None:
        await self._run(f"sleep 1000 & {HOG} & wait; wait; echo survived", oom_group=True)
        await self._ends(137, True)
        await self._counts(3, 4)  # the kernel may count the one that it chose once more, as one of the group

    async def killed(self) -> None:
        id_ = await self._run("exec sleep 1000")
        await self._engine.kill(id_)
        await self._ends(137, False)
        self._expect("journals", self._told.get(id_, {}), {})

    async def over(self) -> None:
        await self._engine.delete(self._id, force=True)


KINDS: dict[str, Callable[[Round], Awaitable[None]]] = {
    "init": Round.init, "below": Round.below, "child": Round.child, "beside": Round.beside, "exec": Round.exec,
    "ending": Round.ending, "group": Round.group, "killed": Round.killed,
}  # fmt: skip


async def rounds(engine: EngineClient, told: Told, kind: str, number: int, at_once: int) -> int:
    """How many went wrong."""
    wrong, begun, left = 0, time.monotonic(), iter(range(number))

    async def one_after_the_other() -> None:
        nonlocal wrong
        for each in left:
            round_ = Round(engine, told)
            try:
                await asyncio.wait_for(KINDS[kind](round_), ROUND_S)
            except (TimeoutError, CorralError) as e:
                round_.wrong.append(repr(e))
            await round_.over()
            print(".", end="", file=sys.stderr, flush=True)
            if round_.wrong:
                wrong += 1
                print(f"  {kind} {each}: {'; '.join(round_.wrong)}", flush=True)

    await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
    print(f"{kind}: {number - wrong} of {number} right ({time.monotonic() - begun:.0f} s)", flush=True)
    return wrong


async def run(daemon: Corrald, archive: Path, arguments: argparse.Namespace, kinds: list[str]) -> int:
    await import_image(daemon, archive)
    async with engine_of(daemon) as engine:
        told = Told()
        following = asyncio.ensure_future(told.follow(engine))
        try:
            return sum([await rounds(engine, told, kind, arguments.rounds, arguments.at_once) for kind in kinds])
        finally:
            following.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--driver", choices=("cgroupfs", "systemd"), default="cgroupfs")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=1, help="so many side by side (%(default)s)")
    parser.add_argument("kinds", nargs="*", metavar="KIND", choices=[*KINDS, []])
    arguments = parser.parse_args()
    kind = detect().kind
    kinds = arguments.kinds or [name for name in KINDS if name != "group" or kind is Kind.V2]
    with tempfile.TemporaryDirectory(prefix="corral") as directory:
        archive = Path(directory, "busybox.tar")
        write_busybox(archive)
        place = (SlicePlace if arguments.driver == "systemd" else PlaceOn).make_on(Path(directory, "data"))
        settings = {"cgroups": {"driver": arguments.driver, "parent": place.cgroup_parent.removeprefix("/")}}
        if arguments.driver == "cgroupfs":
            settings = {}
        print(f"driver {arguments.driver}, cgroups {kind.value}", flush=True)
        with running(place=place, settings=settings) as daemon:
            return 1 if asyncio.run(run(daemon, archive, arguments, kinds)) else 0


if __name__ == "__main__":
    sys.exit(main())
