"""Containers that take all they can get are held by their limits, and the engine answers meanwhile."""

import time

from support.corrald import Corrald, merged, to_toml
from support.engine import EngineClient, eventually
from support.engine_fixtures import engine, loaded
from support.hogs import FD_LIMIT, HOGS, PIDS_LIMIT, open_files, run_hogs
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox", "netns", "cgroup")

PATIENCE_S = 60.0


async def test_a_fork_bomb_a_memory_hog_and_an_fd_hog_are_held_while_ps_answers(engine: EngineClient) -> None:
    with run_hogs(engine.daemon) as ids:
        bomb, memory, fds = (ids[name] for name in HOGS)

        async def are_at_their_limits() -> bool:
            [answer] = [
                each async for each in engine.containers.Stats(pb.ContainerStatsRequest(containers=[bomb, memory]))
            ]
            by_id = {stats.id: stats.cgroup for stats in answer.stats}
            return by_id[bomb].pids.current == PIDS_LIMIT and by_id[memory].memory.oom_kills > 2

        await eventually(are_at_their_limits, timeout_s=PATIENCE_S)
        pid = (await engine.get(fds)).pid
        assert open_files(pid) == FD_LIMIT
        began = time.monotonic()
        listed = engine.daemon.corral("ps", "--quiet", "--no-trunc", check=True).stdout.decode().split()
        assert set(listed) >= set(ids.values())
        assert time.monotonic() - began < PATIENCE_S


def test_limits_of_all_containers_are_shown_and_change_with_a_reload(loaded: Corrald) -> None:
    def restarted_with(**limits: float) -> str:
        settings = to_toml(
            merged(loaded.place.settings(), {"cgroups": {"parent": loaded.place.cgroup_parent} | limits})
        )
        (loaded.place.directory / "config.toml").write_text(settings)
        loaded.corral("system", "upgrade", check=True)
        info = loaded.corral("system", "info", check=True).stdout.decode()
        return next(line for line in info.splitlines() if line.startswith("Limits: "))

    loaded.corral("run", "--detach", "--name", "one", "--network", "none", "busybox", "sleep", "1000", check=True)
    held = restarted_with(memory_bytes=200 << 20, cpus=1.5, pids=500)
    assert held.endswith("of 500 processes")
    assert " of 210MB memory, 1.5 CPUs, " in held
    loaded.corral("rm", "--force", "one", check=True)
    assert restarted_with() == "Limits: none"
