"""The file that is executed as `corral`, without the interpreter's site module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from corral.cli import launcher


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "corral"
    subprocess.run([sys.executable, "-m", "corral.cli.launcher", path], check=True)
    return path


def test_it_does_what_the_entry_point_does(written: Path) -> None:
    for words in (["--help"], ["run", "--no-such"], ["-a", "unix:///tmp/corral-nowhere.sock", "ps"]):
        entry = [sys.executable, "-m", "corral.cli.command", *words]
        plain = subprocess.run(entry, capture_output=True, check=False)
        result = subprocess.run([written, *words], capture_output=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (plain.returncode, plain.stdout, plain.stderr)
        assert plain.stdout + plain.stderr


def test_it_finds_the_packages_of_its_interpreter_wherever_it_is_and_loads_no_site(written: Path) -> None:
    words = [sys.executable, "-IS", "-X", "importtime", written, "-a", "unix:///tmp/corral-nowhere.sock", "ps"]
    result = subprocess.run(words, cwd="/", env={"PYTHONPATH": "/nowhere"}, capture_output=True, text=True, check=False)
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert {"click", "grpc", "corral.client.sync"} <= loaded
    assert "site" not in loaded
    assert os.access(written, os.X_OK)


def test_what_the_kernel_would_not_take_is_refused() -> None:
    for interpreter in ("/with space/python", f"/{'x' * 250}"):
        with pytest.raises(ValueError, match="can't stand in"):
            launcher.script(interpreter, [])
