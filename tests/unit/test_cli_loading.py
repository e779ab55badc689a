"""What the command loads on its way to the daemon: each module is a part of a millisecond of every run."""

import subprocess
import sys

import pytest

ELSEWHERE = "unix:///tmp/corral-nowhere.sock"
NEVER = {"dataclasses", "ipaddress", "urllib.parse", "google.rpc", "rich", "aiohttp", "corral.rpc.context"}
OF_MAKING = {"corral.cli.run", "corral.client.options", "corral.client.network_options", "corral.client.fetching"}
OF_TERMINALS = {"corral.cli.terminal", "termios"}
OF_TABLES = {"json", "corral.cli.output"}


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["ps"], OF_MAKING | OF_TERMINALS),
        (["start", "x"], OF_MAKING | OF_TERMINALS),
        (["rm", "x"], OF_MAKING | OF_TERMINALS),
        (["logs", "x"], OF_MAKING | OF_TERMINALS),
        (["inspect", "x"], OF_MAKING | OF_TERMINALS),
        (["exec", "x", "true"], OF_MAKING | OF_TABLES),
        (["run", "--rm", "-p", "80", "x", "true"], {"corral.cli.registry"} | OF_TABLES),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_a_verb_loads_nothing_of_others(words: list[str], unwanted: set[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "corral.cli.command", "--address", ELSEWHERE, *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "cannot reach corral" in result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "corral.client.sync.containers" in loaded
    assert not loaded & (NEVER | unwanted)


def test_nothing_is_asked_of_the_daemon_for_help() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "corral.cli.command", "run", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "grpc" not in {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
