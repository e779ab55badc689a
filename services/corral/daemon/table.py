"""The services that exist, by name; a process imports only those it hosts."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from corral.rpc.errors import InvalidArgument
from corral.rpc.service import Service
from corral.store.schema import require_known


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a service, its settings and the schema of its database are, as `module:name`."""

    service: str
    config: str
    migrations: str = ""
    """None without a database."""

    def service_class(self) -> type[Service]:
        """Imports the service. Raises ImportError."""
        found: type[Service] = _resolve(self.service)
        return found

    def config_class(self) -> type[Any]:
        """Imports its settings only: a frozen dataclass. Raises ImportError."""
        found: type[Any] = _resolve(self.config)
        return found

    def require_known(self, database: Path) -> None:
        """Raises ValueError if a newer corral wrote the database. Imports the store. Raises ImportError, OSError."""
        if self.migrations:
            require_known(database, len(_resolve(self.migrations)))


def _resolve(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


# In the order in which they start: leaves, then the composers that call them.
TABLE: dict[str, Entry] = {
    "images": Entry(
        "corral.images.service:ImagesService", "corral.images.config:ImagesConfig", "corral.images.store:MIGRATIONS"
    ),
    "cgroups": Entry(
        "corral.cgroups.service:CgroupsService",
        "corral.cgroups.config:CgroupsConfig",
        "corral.cgroups.store:MIGRATIONS",
    ),
    "network": Entry(
        "corral.network.service:NetworkService",
        "corral.network.config:NetworkConfig",
        "corral.network.store:MIGRATIONS",
    ),
    "tasks": Entry(
        "corral.tasks.service:TasksService", "corral.tasks.config:TasksConfig", "corral.tasks.store:MIGRATIONS"
    ),
    "engine": Entry(
        "corral.engine.service:EngineService", "corral.engine.config:EngineConfig", "corral.engine.store:MIGRATIONS"
    ),
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
