"""Configurations of networks that a host has already, where other runtimes look for theirs.

Source: libcni, "ConfFiles" (names and their order); CNI specification 1.1, section 1.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.network.cni.documents import MAX_BYTES

_ENDINGS = (".conflist", ".conf", ".json")


def find(name: str, directories: Sequence[str]) -> str:
    """The text of the first one that calls its network so; "" if there is none. What is none, or too large, is passed
    over."""
    for path in _files(directories):
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_BYTES + 1)
            raw = json.loads(text)
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(raw, dict) and raw.get("name") == name:
            return text
    return ""


def _files(directories: Sequence[str]) -> Iterator[Path]:
    for directory in map(Path, directories):
        if directory.is_dir():
            yield from sorted(path for path in directory.iterdir() if path.suffix in _ENDINGS)
