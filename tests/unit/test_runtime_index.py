"""The index by which corral-oci finds its modules, and the file that is executed as corral-oci."""

import json
import os
import py_compile
import shutil
import subprocess
import sys
from importlib.util import module_from_spec
from pathlib import Path

import pytest

from corral.runtime import launcher
from corral.runtime.index import Finder


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "some_module.py"
    path.write_text("VALUE = 1\n")
    return path


def finder_of(module: Path) -> Finder:
    return Finder({"some_module": (str(module), py_compile.compile(str(module)), "")})


def test_a_module_of_the_index_is_loaded_from_its_compiled_file(module: Path) -> None:
    spec = finder_of(module).find_spec("some_module")
    assert spec is not None
    assert spec.origin == str(module)
    loaded = module_from_spec(spec)
    assert loaded.__file__ == str(module)
    spec.loader.exec_module(loaded)
    assert loaded.VALUE == 1


def test_a_module_that_was_changed_is_left_to_the_interpreter(module: Path) -> None:
    finder = finder_of(module)
    module.write_text("VALUE = 1000\n")
    assert finder.find_spec("some_module") is None


def test_a_module_that_was_touched_is_left_to_the_interpreter(module: Path) -> None:
    finder = finder_of(module)
    os.utime(module, (1, 1))
    assert finder.find_spec("some_module") is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_module_that_is_gone_is_left_to_the_interpreter(module: Path, which: int) -> None:
    compiled = py_compile.compile(str(module))
    Path((str(module), compiled)[which]).unlink()
    assert Finder({"some_module": (str(module), compiled, "")}).find_spec("some_module") is None


def test_a_compiled_file_of_another_python_is_left_alone(module: Path) -> None:
    compiled = Path(py_compile.compile(str(module)))
    compiled.write_bytes(b"\0\0\r\n" + compiled.read_bytes()[4:])
    assert Finder({"some_module": (str(module), str(compiled), "")}).find_spec("some_module") is None


def test_what_is_not_in_the_index_is_left_to_the_interpreter(module: Path) -> None:
    assert finder_of(module).find_spec("another") is None


@pytest.mark.parametrize("with_index", [True, False])
def test_the_written_file_runs_with_and_without_its_index(tmp_path: Path, with_index: bool) -> None:
    place = tmp_path / "{some}%s place"
    shutil.copytree(Path(launcher.__file__).parents[2], place, ignore=shutil.ignore_patterns("*.index"))
    write = f"import sys; sys.path.insert(0, {str(place)!r}); from corral.runtime import launcher; launcher.main()"
    command = tmp_path / "command"
    subprocess.run([sys.executable, "-IS", "-c", write, command], check=True)
    (index,) = place.rglob("*.index")
    assert str(place / "corral/oci/runtime.py").encode() in index.read_bytes()
    if not with_index:
        index.unlink()
    done = subprocess.run([command, "features"], capture_output=True, text=True, check=True)
    assert "ociVersionMin" in json.loads(done.stdout)


def test_an_interpreter_whose_path_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="can't stand in a #! line"):
        launcher.script("/with space/python", "/place")
