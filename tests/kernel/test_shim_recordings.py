"""Conversations of each released version of the wire, replayed: a newer shim must still answer an older daemon.

A recording is one message a line. Of what the shim says, every member recorded must be there with a value of the same
type; strings and booleans must be equal, unless recorded as ""; numbers too where they are no names or times.
"""

import json
from pathlib import Path

import pytest
from shimclient import Message, connect, workshop
from support.requirements import needs

pytestmark = needs("root", "busybox")

RECORDINGS = Path(__file__).parent / "recordings"
NAMES_AND_TIMES = {"pid", "start_time", "shim_pid", "started_at_ns", "exited_at_ns"}


def check(said: object, recorded: object, path: str) -> None:
    assert type(said) is type(recorded), f"{path}: {said!r}, recorded as {recorded!r}"
    if isinstance(recorded, dict) and isinstance(said, dict):
        for name, value in recorded.items():
            assert name in said, f"{path}.{name} is missing"
            check(said[name], value, f"{path}.{name}")
    elif path.rpartition(".")[2] not in NAMES_AND_TIMES and recorded != "":
        assert said == recorded, path


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDINGS.glob("shim-v*.jsonl")))
def test_a_recorded_conversation_still_goes_the_same_way(name: str) -> None:
    lines = [json.loads(line) for line in (RECORDINGS / name).read_text("utf-8").splitlines()]
    with workshop() as shop:
        shim = shop.spawn("cat")
        peer = connect(shim.bundle, lines[0]["client"])
        heard: list[Message] = [peer.hello]
        for line in lines[1:]:
            if "client" in line:
                peer.send(line["client"])
            else:
                said = heard.pop() if heard else peer.receive()
                check(said, line["shim"], f"{name}: {line['shim']}")
        assert peer.at_end()
        peer.close()
