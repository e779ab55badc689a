"""Lines of a Dockerfile that change an image's config, as `commit --change` takes them.

Source: docker's Dockerfile reference; `docker container commit --change`.
"""

import json
import posixpath
import shlex
from collections.abc import Callable, Mapping, Sequence

from corral.api.images.v1.images_pb2 import ImageConfig
from corral.rpc.errors import InvalidArgument

_SHELL = ("/bin/sh", "-c")


def change(config: ImageConfig, lines: Sequence[str]) -> None:
    """Let the lines have their effect. Raises InvalidArgument."""
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        instruction = _INSTRUCTIONS.get(word.upper())
        if instruction is None:
            raise _refusal(line, f"{word[:20]!r} is none of {', '.join(_INSTRUCTIONS)}")
        if not rest.strip():
            raise _refusal(line, "it says nothing")
        try:
            instruction(config, rest.strip())
        except ValueError as e:
            raise _refusal(line, str(e)) from e


def _refusal(line: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"change {line[:200]!r} is not understood: {why}", reason="BAD_CHANGE")


def _command(text: str) -> Sequence[str]:
    """Words as JSON, else a line for the shell."""
    return _listed(text) if text.startswith("[") else (*_SHELL, text)


def _listed(text: str) -> Sequence[str]:
    if not text.startswith("["):
        return shlex.split(text)
    words = json.loads(text)
    if not all(isinstance(word, str) for word in words):
        raise ValueError("it is not a list of strings")
    return list(words)


def _pairs(text: str) -> Mapping[str, str]:
    """NAME=value …, or NAME and all the rest."""
    words = shlex.split(text)
    if "=" not in words[0]:
        name, _, value = text.partition(" ")
        if not value.strip():
            raise ValueError(f"{name!r} has no value")
        return {name: value.strip()}
    if not all("=" in word.lstrip("=") for word in words):
        raise ValueError("it is not of the form NAME=value")
    return dict(word.split("=", 1) for word in words)


def _cmd(config: ImageConfig, text: str) -> None:
    config.cmd[:] = _command(text)


def _entrypoint(config: ImageConfig, text: str) -> None:
    config.entrypoint[:] = _command(text)


def _env(config: ImageConfig, text: str) -> None:
    known = dict(variable.partition("=")[::2] for variable in config.env)
    config.env[:] = [f"{name}={value}" for name, value in {**known, **_pairs(text)}.items()]


def _expose(config: ImageConfig, text: str) -> None:
    for port in shlex.split(text):
        number, _, protocol = port.partition("/")
        if not number.isdecimal() or not 0 < int(number) < 1 << 16 or protocol not in ("", "tcp", "udp", "sctp"):
            raise ValueError(f"{port!r} is not a port")
        full = f"{number}/{protocol or 'tcp'}"
        if full not in config.exposed_ports:
            config.exposed_ports.append(full)


def _label(config: ImageConfig, text: str) -> None:
    config.labels.update(_pairs(text))


def _stop_signal(config: ImageConfig, text: str) -> None:
    config.stop_signal = text


def _user(config: ImageConfig, text: str) -> None:
    config.user = text


def _volume(config: ImageConfig, text: str) -> None:
    config.volumes.extend(path for path in _listed(text) if path not in config.volumes)


def _workdir(config: ImageConfig, text: str) -> None:
    config.working_dir = posixpath.normpath(posixpath.join("/", config.working_dir, text))


_INSTRUCTIONS: Mapping[str, Callable[[ImageConfig, str], None]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "STOPSIGNAL": _stop_signal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
