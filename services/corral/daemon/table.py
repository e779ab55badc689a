"""The services that exist, by name; a process imports only those it hosts."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from corral.rpc.errors import InvalidArgument
from corral.rpc.service import Service


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a service and its settings are, as `module:class`."""

    service: str
    config: str

    def service_class(self) -> type[Service]:
        """Imports the service. Raises ImportError."""
        found: type[Service] = _resolve(self.service)
        return found

    def config_class(self) -> type[Any]:
        """Imports its settings only: a frozen dataclass. Raises ImportError."""
        found: type[Any] = _resolve(self.config)
        return found


def _resolve(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


# In the order in which they start: leaves, then the composers that call them.
TABLE: dict[str, Entry] = {
    "images": Entry("corral.images.service:ImagesService", "corral.images.config:ImagesConfig"),
    "cgroups": Entry("corral.cgroups.service:CgroupsService", "corral.cgroups.config:CgroupsConfig"),
    "network": Entry("corral.network.service:NetworkService", "corral.network.config:NetworkConfig"),
    "tasks": Entry("corral.tasks.service:TasksService", "corral.tasks.config:TasksConfig"),
    "engine": Entry("corral.engine.service:EngineService", "corral.engine.config:EngineConfig"),
}


def select(names: Sequence[str]) -> tuple[str, ...]:
    """The services asked for, in starting order; all of them if none is named. Raises InvalidArgument."""
    for name in names:
        if name not in TABLE:
            raise InvalidArgument(f"there is no service {name!r}{suggestion(name, TABLE)}")
    return tuple(name for name in TABLE if not names or name in names)


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a word that is not known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
