"""Events of pressure, as a user asks for them: on run, on update, over a restart; or refused in a sentence."""

import json
import time
from collections.abc import Iterator

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox", "netns", "psi")

BUSY = "for n in 1 2 3 4 5 6; do while :; do :; done & done; wait"
"""More than there are CPUs for."""
HALF = ("--cpus", "0.5", "--network", "none")
PATIENCE_S = 30


@pytest.fixture(scope="module")
def box(busybox_archive) -> Iterator[Corrald]:
    with Corrald() as daemon:
        daemon.start()
        daemon.corral("image", "import", str(busybox_archive), "--as", "busybox", check=True)
        yield daemon


def told(box: Corrald, name: str) -> list[dict[str, object]]:
    """The facts of the events that `corral events` shows."""
    words = ("--since", "1h", "--until", "0s", "--filter", "event=pressure", "--filter", f"container={name}")
    lines = ok(box, "events", *words, "--format", "json").splitlines()
    return [json.loads(line)["payload"] for line in lines]


def soon_told(box: Corrald, name: str, more_than: int = 0) -> list[dict[str, object]]:
    deadline = time.monotonic() + PATIENCE_S
    while len(found := told(box, name)) <= more_than:
        assert time.monotonic() < deadline, "no event came"
        time.sleep(0.2)
    return found


def triggers(box: Corrald, name: str) -> object:
    [container] = json.loads(ok(box, "inspect", name))
    return container["config"]["resources"].get("pressure", {}).get("triggers", [])


def test_an_event_tells_that_processes_wait_for_cpu_time_and_nothing_of_who_does_not(box: Corrald, name: str) -> None:
    wanted = ("--pressure", "cpu:some:50ms/2s", "--pressure", "memory:full:1s/2s")
    ok(box, "run", "-d", "--name", name, *HALF, *wanted, "busybox", "sh", "-c", BUSY)
    fact = soon_told(box, name)[0]
    assert fact == {"resource": "cpu", "stall_us": 50_000, "window_us": 2_000_000, "full": False}
    assert all(each["resource"] == "cpu" for each in told(box, name))


def test_an_update_asks_for_it_and_for_none_any_more_and_a_restart_keeps_it(box: Corrald, name: str) -> None:
    ok(box, "run", "-d", "--name", name, *HALF, "busybox", "sh", "-c", BUSY)
    assert triggers(box, name) == []
    ok(box, "update", "--pressure", "cpu:some:50ms/2s", name)
    assert len(triggers(box, name)) == 1
    before = len(soon_told(box, name))
    box.restart()
    before = len(soon_told(box, name, before))
    ok(box, "update", "--pressure", "none", name)
    assert triggers(box, name) == []
    before = len(told(box, name))
    time.sleep(12.5)  # longer than events are held back for
    assert len(told(box, name)) == before


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cpu", "pressure 'cpu' is not understood: give memory:some:150ms/2s, or none"),
        ("disk:some:1s/2s", "there is no pressure of 'disk': use one of cpu, memory, io"),
        ("cpu:some:3s/2s", "the wait must fit in the window"),
        ("cpu:some:1s/20s", "the wait must fit in the window, and that in 10 s"),
    ],
)
def test_what_can_not_be_is_refused_and_changes_nothing(box: Corrald, name: str, text: str, sentence: str) -> None:
    refused = box.corral("run", "-d", "--name", name, *HALF, "--pressure", text, "busybox", "sleep", "100")
    assert refused.returncode == 125
    assert sentence in refused.stderr.decode()
    assert name not in ok(box, "ps", "-a")
    ok(box, "run", "-d", "--name", name, *HALF, "--memory", "64m", "busybox", "sleep", "100")
    refused = box.corral("update", "--memory", "32m", "--pressure", text, name)
    assert refused.returncode == 1
    assert sentence in refused.stderr.decode()
    [container] = json.loads(ok(box, "inspect", name))
    assert container["config"]["resources"]["memory"]["limit_bytes"] == 64 << 20
    assert triggers(box, name) == []
