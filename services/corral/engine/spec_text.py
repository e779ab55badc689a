"""A spec as the text of config.json. Most of it is in every container's: parts are turned into text once. Pure."""

import json
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from typing import Any

from corral.oci.decode import encode as encode_json
from corral.oci.decode import json_name
from corral.oci.spec import Linux, Process, Spec

_MADE_OF_PARTS = (Spec, Process, Linux)
_dumps = json.JSONEncoder(separators=(",", ":"), default=encode_json).encode


def encode(spec: Spec) -> bytes:
    """config.json, but for the cgroup's path."""
    return _object(spec).encode()


def with_cgroup(spec: bytes, path: str) -> bytes:
    """What encode() gave, with the cgroup's path."""
    return b'%s,"cgroupsPath":%s}}' % (spec[:-2], _dumps(path).encode())


def _object(value: Spec | Process | Linux) -> str:
    """As corral.oci.decode has it: members that hold their default are left out."""
    members = [
        f'"{name}":{_text(item)}'
        for field, name, default in _members(type(value))  # type: ignore[arg-type]  # a class can be hashed
        if (item := getattr(value, field)) != default
    ]
    return f"{{{','.join(members)}}}"


@cache
def _members(cls: type[Any]) -> tuple[tuple[str, str, object], ...]:
    """Of each field its name, that in JSON, and what it holds unless it is given."""
    return tuple(
        (each.name, json_name(each.name), each.default_factory() if callable(each.default_factory) else each.default)
        for each in fields(cls)
    )


def _text(value: object) -> str:
    if isinstance(value, _MADE_OF_PARTS):
        return _object(value)
    if isinstance(value, tuple) and is_dataclass(value[0]):
        return f"[{','.join(map(_part, value))}]"
    if is_dataclass(value) and type(value).__hash__ is not None:
        return _part(value)  # type: ignore[arg-type]  # it can be hashed
    return _dumps(value)


@lru_cache(maxsize=256)
def _part(part: Hashable) -> str:
    return _dumps(part)
