"""The import rules hold, and each of them is able to fail."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ROOTS = ("protos", "shim", "services", "cli")
CONTRACTS = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]

# Contract -> a file, and the line planted in it that breaks the contract.
VIOLATIONS = {
    "core-is-stdlib": ("shim/corral/oci/planted_stdlib.py", "import structlog"),
    "core-layers": ("shim/corral/kernel/planted_layers.py", "import corral.shim.wire"),
    "leaves": ("services/corral/images/planted_leaf.py", "import corral.network.config"),
    "proxy-is-stdlib": ("services/corral/network/proxy/planted_log.py", "import structlog"),
    "composers": ("services/corral/engine/planted_leaf.py", "import corral.tasks.config"),
    "services-below-daemon": ("services/corral/tasks/planted_daemon.py", "import corral.daemon.config"),
    "clients": ("cli/corral/cli/planted_service.py", "import corral.engine.config"),
    "client-below-command": ("cli/corral/client/planted_command.py", "import corral.cli.app"),
    "ctypes": ("services/corral/network/planted_ctypes.py", "import ctypes"),
    "netlink": ("services/corral/network/planted_netlink.py", "import pyroute2"),
    "dns": ("services/corral/network/planted_dns.py", "import dns.message"),
    "http": ("services/corral/images/planted_http.py", "import aiohttp"),
    "signatures": ("services/corral/images/planted_signature.py", "import cryptography"),
    "sqlite": ("services/corral/images/planted_sqlite.py", "import sqlite3"),
}
# Rules that speak of calls rather than modules are ruff's.
BANNED_CALLS = {
    "services/corral/tasks/planted_fork.py": "import os\n\nos.fork()\n",
    "shim/corral/shim/planted_ctypes.py": "import ctypes\n\nctypes.CDLL(None)\n",
    "cli/corral/cli/planted_subprocess.py": "import subprocess\n\nsubprocess.run([])\n",
    "services/corral/engine/planted_sqlite.py": "import sqlite3\n\nsqlite3.connect('')\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source roots, to plant things in."""
    for root in ROOTS:
        shutil.copytree(REPO / root, tmp_path / root, ignore=shutil.ignore_patterns("__pycache__", "*.proto"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(tree / root) for root in ROOTS)}
    return subprocess.run(
        [BIN / "lint-imports", "--no-cache"], cwd=tree, env=env, capture_output=True, text=True, check=False
    )


def test_every_contract_has_a_planted_violation() -> None:
    assert {c["id"] for c in CONTRACTS} == VIOLATIONS.keys()


def test_a_planted_violation_of_each_contract_breaks_it(tree: Path) -> None:
    for file, line in VIOLATIONS.values():
        (tree / file).write_text(f"{line}\n")
    result = lint_imports(tree)
    assert result.returncode != 0
    missed = [c["id"] for c in CONTRACTS if f"{c['name']} BROKEN" not in " ".join(result.stdout.split())]
    assert not missed, result.stdout + result.stderr


def test_banned_calls_are_found_where_they_are_banned(tree: Path) -> None:
    for file, text in BANNED_CALLS.items():
        (tree / file).write_text(text)
    result = subprocess.run(
        [BIN / "ruff", "check", "--no-cache", "--select", "TID251", "--output-format", "concise", "."],
        cwd=tree, capture_output=True, text=True, check=False,
    )  # fmt: skip
    missed = [file for file in BANNED_CALLS if file not in result.stdout]
    assert result.returncode != 0
    assert not missed, result.stdout


def test_no_init_file_hides_the_other_source_roots() -> None:
    assert [root for root in ROOTS if (REPO / root / "corral" / "__init__.py").exists()] == []


def test_the_core_imports_nothing_outside_the_standard_library() -> None:
    """What import-linter cannot say: not "none of these", but "nothing else"."""
    program = (
        "import sys, pkgutil, importlib; sys.path.insert(0, sys.argv[1])\n"
        "import corral.kernel, corral.oci, corral.shim, corral.runtime\n"
        "for p in (corral.kernel, corral.oci, corral.shim, corral.runtime):\n"
        "    for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'):\n"
        "        if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
        "top = {n.split('.')[0] for n in sys.modules} - set(sys.stdlib_module_names) - {'corral', '__main__'}\n"
        "sys.exit(', '.join(sorted(top)) or None)\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(REPO / "shim")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
