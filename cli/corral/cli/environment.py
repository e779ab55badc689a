"""Environment variables of a new process, as `run` and `exec` are given them."""

import os
from collections.abc import Sequence
from pathlib import Path


def passed_on(files: Sequence[str], env: Sequence[str]) -> list[str]:
    """Environment variables from files, then single ones; a NAME alone has this process's value, if that has one."""
    lines = [line for file in files for line in lines_of(file)]
    return [_env_value(e) for e in (*lines, *env) if "=" in e or not e or e in os.environ]


def lines_of(path: str) -> list[str]:
    """Of a file with one variable, or label, a line: without empty ones and comments."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _env_value(text: str) -> str:
    """NAME alone passes this process's own value on."""
    return text if "=" in text or not text else f"{text}={os.environ[text]}"
