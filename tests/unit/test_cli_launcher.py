"""The file that is executed as `corral`, without the interpreter's site module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from corral.cli import launcher

FOUND_ELSEWHERE = """\
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return super().find_spec(name, path or {places!r}, target)
sys.meta_path.append(Finder)
"""


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
    words = [sys.executable, "-PS", "-X", "importtime", written, "-a", "unix:///tmp/corral-nowhere.sock", "ps"]
    result = subprocess.run(words, cwd="/", env={"PYTHONPATH": "/nowhere"}, capture_output=True, text=True, check=False)
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert {"click", "grpc", "corral.client.sync"} <= loaded
    assert "site" not in loaded
    assert os.access(written, os.X_OK)


@pytest.mark.parametrize("variable", ["PYTHONUTF8=1", "PYTHONIOENCODING=utf-16", "PYTHONPATH="])
def test_it_heeds_the_environment_as_the_entry_point_does(written: Path, tmp_path: Path, variable: str) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('another click')")
    name, _, value = variable.partition("=")
    bare = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    said = []
    for command in ([sys.executable, "-m", "corral.cli.command"], [written]):
        for environment in (bare | {name: value or str(tmp_path)}, bare):
            result = subprocess.run([*command, "ps", "--\u00df"], env=environment, capture_output=True, check=False)
            said.append(result.stderr)
    assert said[:2] == said[2:]
    assert said[0] != said[1]


@pytest.fixture
def user_site(tmp_path: Path) -> tuple[str, dict[str, str], Path]:
    """An interpreter of the system, an environment with a user's packages for it, and where those are."""
    python = str(Path(sys.executable).resolve())
    environment = {"PYTHONUSERBASE": str(tmp_path / "user"), "PATH": os.defpath}
    ask = "import site; print(site.getusersitepackages())"
    place = Path(subprocess.check_output([python, "-c", ask], env=environment, text=True).strip())
    place.mkdir(parents=True)
    return python, environment, place


def install(python: str, environment: dict[str, str], path: Path) -> "subprocess.CompletedProcess[str]":
    command = [python, "-m", "corral.cli.launcher", path]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)


def test_packages_that_only_a_user_has_are_found(user_site: tuple[str, dict[str, str], Path], tmp_path: Path) -> None:
    python, environment, place = user_site
    (place / "corral.pth").write_text("\n".join(sys.path))
    path = tmp_path / "corral"
    assert install(python, environment, path).stderr == ""
    result = subprocess.run([path, "--help"], env={}, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: corral")


def test_one_that_would_not_run_replaces_nothing(user_site: tuple[str, dict[str, str], Path], tmp_path: Path) -> None:
    python, environment, place = user_site
    (place / "corral.pth").write_text("import found_elsewhere")
    (place / "found_elsewhere.py").write_text(FOUND_ELSEWHERE.format(places=sys.path))
    path = tmp_path / "corral"
    path.write_text("the installer's")
    result = install(python, environment, path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"{path} was not written, and what is there stays: ")
    assert 'Traceback (most recent call last):\n  File "/' in result.stderr
    assert path.read_text() == "the installer's"
    assert [each.name for each in tmp_path.iterdir() if "new" in each.name] == []


def test_it_is_told_how_it_is_called() -> None:
    result = subprocess.run([sys.executable, "-m", "corral.cli.launcher"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "usage: python -m corral.cli.launcher FILE\n")


def test_what_the_kernel_would_not_take_is_refused() -> None:
    for interpreter in ("/with space/python", f"/{'x' * 250}"):
        with pytest.raises(ValueError, match="can't stand in"):
            launcher.script(interpreter, [])
