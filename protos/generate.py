"""Generates Python code and type stubs beside each .proto file.

`generate.py` writes them; `generate.py --check` only compares, and fails when the committed ones are stale.
"""

import filecmp
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(out: Path) -> list[Path]:
    """Run protoc over every .proto below this folder; returns the files made, relative to `out`."""
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.proto"))
    bin_dir = Path(sys.executable).parent
    rc = protoc.main([
        "protoc", f"--proto_path={ROOT}", f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}", f"--grpc_python_out={out}", f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}",
        *sources,
    ])  # fmt: skip
    if rc:
        raise SystemExit(rc)
    made = sorted(p for s in SUFFIXES for p in out.rglob(f"*{s}"))
    for grpc_file in (p for p in made if p.name.endswith("_pb2_grpc.py") and "class " not in p.read_text()):
        # A file without services has nothing to say.
        grpc_file.unlink()
        grpc_file.with_suffix(".pyi").unlink(missing_ok=True)
    return sorted(p.relative_to(out) for p in made if p.exists())


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="corral-protos-") as tmp:
        fresh = generate(Path(tmp))
        committed = {p.relative_to(ROOT) for s in SUFFIXES for p in ROOT.rglob(f"*{s}")}
        stale = [p for p in fresh if p not in committed or not filecmp.cmp(ROOT / p, Path(tmp) / p, shallow=False)]
        extra = committed - set(fresh)
        if "--check" in sys.argv:
            if stale or extra:
                names = ", ".join(map(str, [*stale, *sorted(extra)]))
                raise SystemExit(f"generated code is stale, run `make generate`: {names}")
            return
        for path in stale:
            shutil.copyfile(Path(tmp) / path, ROOT / path)
        for path in extra:
            (ROOT / path).unlink()


if __name__ == "__main__":
    main()
