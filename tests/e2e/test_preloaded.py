"""What tests fork, with --preloaded, is what they would execute."""

import os
import subprocess
from collections.abc import Sequence

import pytest
from support.corrald import COMMAND, CORRAL
from support.preloaded import Preloaded


@pytest.mark.parametrize(
    ("package", "command", "arguments"),
    [
        ("corral.daemon", COMMAND, ["--no-such-option"]),
        ("corral.daemon", COMMAND, ["--config", "nowhere.toml"]),
        ("corral.cli", [CORRAL], ["ps", "--no-such-option"]),
        ("corral.cli", [CORRAL], ["run", "--help"]),
        ("corral.cli", [CORRAL], ["--address", "unix:///tmp/corral-nowhere.sock", "ps"]),
    ],
)
def test_it_says_the_same_and_ends_alike(package: str, command: Sequence[str], arguments: Sequence[str]) -> None:
    executed = subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    preloaded = Preloaded(package)
    try:
        forked = preloaded.run(arguments, os.environ, timeout_s=30, check=False)
    finally:
        preloaded.close()
    told = (executed.returncode, executed.stdout, executed.stderr)
    assert (forked.returncode, forked.stdout, forked.stderr) == told
    assert executed.stdout + executed.stderr
