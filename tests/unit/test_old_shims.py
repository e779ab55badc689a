"""Shims that an older version started, under the daemon of today: their recorded answers, replayed to it.

The other way round, an older daemon's requests to a shim of today, is tests/kernel/test_shim_recordings.py.
"""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from corral.rpc.errors import FailedPrecondition, NotFound
from corral.shim.wire import Channel, Message, encode
from corral.tasks.identity import Identity
from corral.tasks.model import Exit
from corral.tasks.shim import Begun, Shim

RECORDINGS = Path(__file__).parents[1] / "kernel" / "recordings"
PID, START_TIME = 4242, 77
REAL: Mapping[str, object] = {"pid": PID, "start_time": START_TIME, "shim_pid": 11, "exited_at_ns": 5}
FUTURE = {"of_the_future": {"nobody": "knows"}}


def real(value: object) -> object:
    """A recorded value with numbers for names and times, and members that nobody knows."""
    if not isinstance(value, dict):
        return value
    return {name: REAL.get(name, real(member)) for name, member in value.items()} | FUTURE


class OldShim:
    """Answers as recorded, in a thread of its own; what it is asked must be what it was asked then, and may be more."""

    def __init__(self, lines: list[dict[str, Message]], sock: socket.socket) -> None:
        self._lines, self._sock = lines, sock
        self._channel = Channel(sock)
        self._asked: list[Message] = []

    def run(self) -> None:
        hello = self._receive()
        assert hello["v"] == self._lines[0]["client"]["v"]
        ids: dict[object, object] = {}
        for line in self._lines[1:]:
            if "client" in line:
                recorded, asked = line["client"], self._receive()
                ids[recorded["id"]] = asked["id"]
                missing = {k for k in recorded.keys() - {"id"} if asked.get(k) != recorded[k]}
                assert not missing, f"{missing} of {recorded} in {asked}"
            else:
                answer = real(line["shim"])
                assert isinstance(answer, dict)
                if "id" in answer:
                    answer["id"] = ids[answer["id"]]
                self._sock.sendall(encode(answer))
        self._sock.close()

    def _receive(self) -> Message:
        while not self._asked:
            self._asked.extend(self._channel.receive())
        return self._asked.pop(0)


type Act = Callable[[Shim, Message], Awaitable[object]]
ACTS: Mapping[str, Act] = {
    "create": lambda shim, m: shim.create(m),
    "start": lambda shim, m: shim.start(str(m["exec"])),
    "state": lambda shim, _: shim.state(),
    "exec": lambda shim, m: shim.exec(str(m["exec"]), m),
    "delete_exec": lambda shim, m: shim.delete_exec(str(m["exec"])),
    "resize": lambda shim, m: shim.resize(str(m["exec"]), 80, 24),
    "kill": lambda shim, m: shim.kill(str(m["exec"]), 15, everything=False),
    "reopen_log": lambda shim, _: shim.reopen_log(),
    "close_stdin": lambda shim, m: shim.close_stdin(str(m["exec"])),
}


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDINGS.glob("shim-v*.jsonl")))
async def test_the_daemon_of_today_understands_what_an_older_shim_says(name: str):
    lines = [json.loads(line) for line in (RECORDINGS / name).read_text("utf-8").splitlines()]
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    replay = asyncio.create_task(asyncio.to_thread(OldShim(lines, theirs).run))
    shim = Shim(ours, timeout_s=10)
    exits: list[tuple[str, Exit]] = []
    gone = asyncio.Event()
    shim.follow(lambda exec_id, how: exits.append((exec_id, how)), gone.set)
    said: dict[str, list[object]] = {}
    for request in (line["client"] for line in lines[3:] if "client" in line):
        try:
            answer: object = await ACTS[str(request["op"])](shim, {k: v for k, v in request.items() if k != "id"})
        except (FailedPrecondition, NotFound) as e:
            answer = type(e)
        said.setdefault(str(request["op"]), []).append(answer)
    await replay
    await asyncio.wait_for(gone.wait(), 10)
    shim.close()
    init = Identity(PID, START_TIME)
    assert said["create"] == [init]
    assert said["start"] == [None, init]
    assert (said["resize"], said["kill"]) == ([FailedPrecondition], [NotFound])
    [state] = said["state"]
    assert (state.shim_pid, state.init.state, state.init.identity, state.init.exit) == (11, "running", init, None)
    assert [(exec_id, how.code, how.signal, how.known) for exec_id, how in exits] == [
        ("e1", 3, None, True),
        ("", 0, None, True),
    ]


async def test_streams_that_a_shim_does_not_tell_of_are_not_none():
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    shim = Shim(ours, timeout_s=10)
    kept: list[object] = []
    shim.streams("e1", kept.append)
    begun = asyncio.ensure_future(shim.exec("e1", {"start": True}))
    await asyncio.sleep(0)
    channel, asked = Channel(theirs), []
    while len(asked) < 4:
        asked.extend(channel.receive())
    theirs.sendall(encode({"id": asked[2]["id"], "ok": {}}))
    theirs.sendall(encode({"id": asked[3]["id"], "ok": {"pid": 1, "start_time": 2}}))
    assert await begun == Begun(Identity(1, 2), None)
    assert kept == []
    shim.close()
    theirs.close()


async def test_what_an_older_shim_does_not_know_is_done_without():
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    shim = Shim(ours, timeout_s=10)
    kept: list[object] = []
    shim.streams("", kept.append)
    channel, asked = Channel(theirs), []
    while len(asked) < 3:
        asked.extend(channel.receive())
    refusal = {"kind": "unimplemented", "message": "no operation streams"}
    theirs.sendall(encode({"id": asked[2]["id"], "error": refusal}))
    theirs.sendall(encode({"event": "of_the_future", "exec": ""}))
    shim.follow(lambda *_: None, lambda: None)
    await asyncio.sleep(0.05)
    assert shim.is_open
    assert kept == []
    shim.close()
    theirs.close()
