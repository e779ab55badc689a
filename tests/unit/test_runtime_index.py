"""The files from which corral-oci loads its modules, and the one that is executed as corral-oci."""

import json
import marshal
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import pytest

from corral.runtime import index, launcher
from corral.runtime.bare_code import bare_code


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that is run after its module, in the group "some"."""
    directory = tmp_path / "sample_package"
    directory.mkdir()
    (directory / "__init__.py").write_text("from sample_package.part import VALUE\n")
    (directory / "part.py").write_text('"""Doc."""\nVALUE: int = 1\n')
    write_group(tmp_path / "some", directory)
    monkeypatch.setattr(index, "_files", f"{tmp_path}/")
    yield directory
    for name in ("sample_package", "sample_package.part"):
        sys.modules.pop(name, None)


def write_group(path: Path, directory: Path, magic: bytes = MAGIC_NUMBER) -> None:
    entries = []
    for name, file, place in (
        ("sample_package.part", "part.py", ""),
        ("sample_package", "__init__.py", str(directory)),
    ):
        source = directory / file
        status = source.stat()
        entries.append((name, str(source), status.st_mtime_ns, status.st_size, place, bare_code(str(source))))
    path.write_bytes(magic + marshal.dumps(entries))


def test_the_modules_of_a_group_are_loaded_at_once(package: Path) -> None:
    index.load("some")
    loaded = sys.modules["sample_package"]
    assert (loaded.VALUE, loaded.part.VALUE, loaded.__path__) == (1, 1, [str(package)])
    assert sys.modules["sample_package.part"].__file__ == str(package / "part.py")
    import sample_package

    assert sample_package is loaded


def test_a_module_that_is_there_stays(package: Path) -> None:
    index.load("some")
    loaded = sys.modules["sample_package.part"]
    del sys.modules["sample_package"]
    index.load("some")
    assert sys.modules["sample_package.part"] is loaded


def test_a_module_that_was_changed_is_left_to_the_interpreter(package: Path) -> None:
    (package / "part.py").write_text("VALUE = 1000\n")
    index.load("some")
    assert sys.modules["sample_package"].VALUE == sys.modules["sample_package.part"].VALUE == 1000


def test_a_module_that_was_touched_is_left_to_the_interpreter(package: Path) -> None:
    os.utime(package / "part.py", (1, 1))
    index.load("some")
    assert sys.modules["sample_package.part"].__doc__ == "Doc."


def test_a_module_that_is_gone_is_missed(package: Path) -> None:
    (package / "part.py").unlink()
    with pytest.raises(ModuleNotFoundError):
        index.load("some")


def test_a_package_that_was_changed_is_left_to_the_interpreter_with_its_modules(package: Path) -> None:
    (package / "__init__.py").write_text("VALUE = 2\n")
    index.load("some")
    assert not {"sample_package", "sample_package.part"} & sys.modules.keys()


def test_a_file_of_another_python_is_left_alone(package: Path) -> None:
    write_group(package.parent / "some", package, b"\0\0\r\n")
    index.load("some")
    assert "sample_package" not in sys.modules


def test_a_group_that_has_no_file_is_left_to_the_interpreter(package: Path) -> None:
    index.load("other")
    assert "sample_package" not in sys.modules


def test_the_code_of_a_module_keeps_what_runs(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        '"""Doc."""\nnumber: int = 3\nnothing: str\n\nclass A:\n    """Doc."""\n    field: int = 1\n\n'
        'def f(a: "missing" = 2, *rest: "missing", b: int = 4, **more: "missing") -> "missing":\n'
        '    """Doc."""\n\nasync def g(x: missing):\n    """Doc."""\n    assert x, "no"\n    return x\n'
    )
    names: dict[str, object] = {"__name__": "sample"}
    exec(bare_code(str(source)), names)
    assert (names["number"], names.get("__doc__"), names["A"].__doc__) == (3, None, None)  # type: ignore[attr-defined]
    assert names["A"].__annotations__ == {"field": int}  # type: ignore[attr-defined]
    assert (names["f"](), names["f"].__annotations__, names["f"].__doc__) == (None, {}, None)  # type: ignore[operator,attr-defined]
    with pytest.raises(AssertionError, match="no"):
        names["g"](0).send(None)  # type: ignore[operator]


def written(tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the core, and the file for it."""
    place = tmp_path / "{some}%s place"
    shutil.copytree(Path(launcher.__file__).parents[2], place, ignore=shutil.ignore_patterns("__pycache__"))
    write = f"import sys; sys.path.insert(0, {str(place)!r}); from corral.runtime import launcher; launcher.main()"
    command = tmp_path / "command"
    subprocess.run([sys.executable, "-IS", "-c", write, command], check=True)
    return place, command


def output(command: Path, *arguments: str) -> str:
    return subprocess.run([command, *arguments], capture_output=True, text=True, check=True).stdout


def test_the_written_file_runs_with_and_without_what_it_reads(tmp_path: Path) -> None:
    place, command = written(tmp_path)
    files = sorted(place.rglob("corral-oci.*"))
    names = ["commands", "create", "execute", "index", "main", "remove", "show", "standins", "start"]
    assert [file.suffix[1:] for file in files] == names
    assert str(place / "corral/oci/runtime.py").encode() in files[1].read_bytes()
    assert "ociVersionMin" in json.loads(output(command, "features"))
    for file in reversed(files):
        file.unlink()
        assert "ociVersionMin" in json.loads(output(command, "features"))


def test_what_was_changed_after_the_file_was_written_counts(tmp_path: Path) -> None:
    place, command = written(tmp_path)
    for name in ("commands", "main"):
        source = place / f"corral/runtime/{name}.py"
        source.write_text(source.read_text().replace("corral-oci version", "corral-oci  version") + "\n")
    assert output(command, "--version").startswith("corral-oci  version")


def test_an_interpreter_whose_path_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="can't stand in a #! line"):
        launcher.script("/with space/python", "/place")
