"""Settings: one TOML file for all services, none of it needed.

    [daemon]      this process: see DaemonConfig
    [addresses]   where each service listens, for composers: images = "unix:///run/corral/images.sock"
    [images] …    the settings of one service: the fields of its config class

A key that does not exist is refused by name: a misspelt limit must not silently be no limit. Values are checked
against the types of the dataclass fields.
"""

import dataclasses
import enum
import ipaddress
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corral.daemon.table import TABLE, Entry, suggestion
from corral.rpc.address import Address, Tls, UnixAddress, parse_address
from corral.rpc.errors import InvalidArgument

DEFAULT_ROOT = Path("/var/lib/corral")
DEFAULT_STATE = Path("/run/corral")


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """The section [daemon]; options of the command line come first."""

    # What must survive a reboot; each service has a directory of its own in it.
    root: Path = DEFAULT_ROOT
    # Sockets, bundles, network namespaces: gone after a reboot.
    state: Path = DEFAULT_STATE
    # Where to listen. A unix socket <state>/corrald.sock (or <state>/<service>.sock) if none is given.
    address: tuple[str, ...] = ()
    # Its members may use the sockets. They are as good as root.
    socket_group: str = "corral"
    # "auto" is console on a terminal and json elsewhere.
    log_format: str = "auto"
    log_level: str = "info"
    # How long calls may take to end when the daemon is stopped.
    grace_s: float = 2.0
    # How long they may take when it executes itself anew: whoever connects meanwhile waits.
    upgrade_grace_s: float = 10.0
    # PEM files, for addresses tcp://.
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None

    def tls(self) -> Tls | None:
        """Raises InvalidArgument if only some of the three files are given."""
        given = [self.tls_cert, self.tls_key, self.tls_ca]
        if not any(given):
            return None
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            raise InvalidArgument("TLS needs all of tls_cert, tls_key and tls_ca")
        return Tls(self.tls_cert, self.tls_key, self.tls_ca)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. Sections of services are kept as read: only the process that hosts one knows its fields."""

    daemon: DaemonConfig = DaemonConfig()
    addresses: Mapping[str, str] = field(default_factory=dict)
    services: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def load(path: Path | None) -> Config:
    """Read the file; None means defaults. Raises InvalidArgument with file, section and key."""
    if path is None:
        return Config()
    try:
        return parse(tomllib.loads(path.read_text("utf-8")))
    except OSError as e:
        raise InvalidArgument(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, InvalidArgument) as e:
        raise InvalidArgument(f"{path}: {e}") from e


def parse(document: Mapping[str, object]) -> Config:
    """Raises InvalidArgument."""
    sections = {"daemon", "addresses", *TABLE}
    tables: dict[str, Mapping[str, object]] = {}
    for name, value in document.items():
        if name not in sections:
            raise InvalidArgument(f"there is no section [{name}]{suggestion(name, sections)}")
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"{name} must be a section, [{name}]")
        tables[name] = value
    daemon = build(DaemonConfig, tables.pop("daemon", {}), "daemon")
    addresses = _addresses(tables.pop("addresses", {}))
    return Config(daemon, addresses, tables)


def _addresses(table: Mapping[str, object]) -> Mapping[str, str]:
    for name, value in table.items():
        if name not in TABLE:
            raise InvalidArgument(f"[addresses] {name}: there is no such service{suggestion(name, TABLE)}")
        parse_address(str(value))
    return {name: str(value) for name, value in table.items()}


def service_config(
    name: str, entry: Entry, config: Config, addresses: Mapping[str, str], *, root: Path, state: Path
) -> Any:
    """The settings of one service, as its config class. Raises InvalidArgument."""
    cls = entry.config_class()
    fields = {f.name for f in dataclasses.fields(cls)}
    given: dict[str, object] = {"root": str(root / name), "state": str(state)}
    table = config.services.get(name, {})
    if "addresses" in table:
        raise InvalidArgument(f"[{name}] addresses: use the section [addresses]")
    if "addresses" in fields:
        given["addresses"] = addresses
    return build(cls, given | dict(table), name)


def listen_on(config: DaemonConfig, services: Sequence[str], *, all_in_one: bool) -> tuple[Address, ...]:
    """The addresses of this process; the first is a unix socket, by which it reaches itself. Raises InvalidArgument."""
    addresses = [parse_address(text) for text in config.address]
    unix = [address for address in addresses if isinstance(address, UnixAddress)]
    others = [address for address in addresses if not isinstance(address, UnixAddress)]
    if not unix:
        name = services[0] if len(services) == 1 and not all_in_one else "corrald"
        unix = [UnixAddress(config.state / f"{name}.sock")]
    return (*unix, *others)


def find_services(config: Config, services: Sequence[str], own: Address) -> Mapping[str, str]:
    """The address of every service, as composers of this process call it."""
    elsewhere = {name: str(UnixAddress(config.daemon.state / f"{name}.sock")) for name in TABLE}
    return elsewhere | dict.fromkeys(services, str(own)) | dict(config.addresses)


def build[T](cls: type[T], table: Mapping[str, object], section: str) -> T:
    """An instance of the dataclass from a TOML table. Raises InvalidArgument with section and key."""
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise InvalidArgument(f"[{section}] has no setting {key!r}{suggestion(key, hints)}")
    values = {key: convert(value, hints[key], f"[{section}] {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"[{section}]: {e}") from e


_SCALARS: tuple[type, ...] = (bool, int, float, str)
_FROM_STRING: tuple[type, ...] = (
    Path,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
)


def convert(value: object, wanted: Any, where: str) -> Any:
    """The TOML value as the type of a dataclass field. Raises InvalidArgument."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return _convert_to_one_of(value, typing.get_args(wanted), where)
    if origin is typing.Literal:
        return _convert_literal(value, typing.get_args(wanted), where)
    if origin is not None and issubclass(origin, Mapping):
        return _convert_mapping(value, typing.get_args(wanted), where)
    if origin in (tuple, list, frozenset, set) or (origin is not None and issubclass(origin, Sequence)):
        return _convert_sequence(value, typing.get_args(wanted)[0], origin, where)
    if wanted is Any or wanted is object:
        return value
    if dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        return build(typing.cast(type[Any], wanted), value, where.replace("[", "", 1).replace("] ", ".", 1))
    return _convert_scalar(value, wanted, where)


def _convert_scalar(value: object, wanted: Any, where: str) -> Any:
    if wanted is float and type(value) is int:
        return float(value)
    if wanted in _SCALARS and type(value) is wanted:  # not isinstance: true is no number
        return value
    if isinstance(value, str) and isinstance(wanted, type) and issubclass(wanted, (*_FROM_STRING, enum.Enum)):
        from_string = typing.cast(Callable[[str], Any], wanted)
        try:
            return from_string(value)
        except ValueError as e:
            raise InvalidArgument(f"{where}: {e}") from e
    name = getattr(wanted, "__name__", str(wanted))
    raise InvalidArgument(f"{where} must be a {_NAMES.get(name, name)}, not {value!r}")


_NAMES = {"bool": "true or false", "int": "whole number", "float": "number", "str": "string", "Path": "path"}


def _convert_to_one_of(value: object, options: Sequence[Any], where: str) -> Any:
    problem: InvalidArgument | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(value, option, where)
        except InvalidArgument as e:
            problem = e
    raise problem or InvalidArgument(f"{where}: {value!r} is not valid")


def _convert_literal(value: object, options: Sequence[object], where: str) -> object:
    if value not in options:
        raise InvalidArgument(f"{where} must be one of {', '.join(map(repr, options))}, not {value!r}")
    return value


def _convert_mapping(value: object, args: Sequence[Any], where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{where} must be a table, not {value!r}")
    return {str(key): convert(item, args[1], f"{where}.{key}") for key, item in value.items()}


def _convert_sequence(value: object, item: Any, origin: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise InvalidArgument(f"{where} must be a list, not {value!r}")
    converted = [convert(element, item, f"{where}[{n}]") for n, element in enumerate(value)]
    return converted if origin is list else origin(converted) if origin in (frozenset, set) else tuple(converted)
