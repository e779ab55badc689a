"""Network configurations and results of CNI as values, and what is said to plugins. Pure.

    configuration   {cniVersion, name, plugins: [{type, capabilities, …}]}, or one plugin's by itself
    to a plugin     its part, with cniVersion, name, prevResult and runtimeConfig put in
    result          {cniVersion, ips: [{address, gateway}], routes: [{dst}], …}

Source: CNI specification 1.1, sections 1, 3 and 5.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_interface

from corral.network.ipam import Address
from corral.network.model import Dns, Port, Range
from corral.rpc.errors import InvalidArgument

type Json = bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_VERSION = re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}")
OLDEST, NEWEST = (0, 4, 0), (1, 1, 0)
WITH_STATUS_AND_GC = (1, 1, 0)
MAX_BYTES = 256 << 10
PORT_MAPPINGS, IPS, MAC, ALIASES = "portMappings", "ips", "mac", "aliases"


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin of a chain: the program's name, and its part of the configuration as it came."""

    kind: str
    part: Mapping[str, Json]

    def has(self, capability: str) -> bool:
        """Whether it takes such a runtimeConfig."""
        asked = self.part.get("capabilities")
        return isinstance(asked, Mapping) and asked.get(capability) is True


@dataclass(frozen=True, slots=True)
class Configuration:
    """A network as its plugins are told of it."""

    name: str
    version: str
    plugins: tuple[Plugin, ...]
    disable_check: bool = False
    disable_gc: bool = False

    @property
    def has_status_and_gc(self) -> bool:
        """Whether plugins know these verbs, by the configuration's word."""
        return _numbers(self.version) >= WITH_STATUS_AND_GC

    def has(self, capability: str) -> bool:
        """Whether one of the plugins takes such a runtimeConfig."""
        return any(plugin.has(capability) for plugin in self.plugins)


@lru_cache(maxsize=64)
def parse(text: str, default_name: str) -> Configuration:
    """A network's configuration. Raises InvalidArgument."""
    if len(text) > MAX_BYTES:
        raise _refused(f"it has more than {MAX_BYTES >> 10} KiB")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _refused(f"it is no JSON: {e}") from e
    if not isinstance(raw, dict):
        raise _refused("it is no JSON object")
    name, version = raw.get("name", default_name), raw.get("cniVersion", "")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refused(f"its name {name!r} is none: letters, digits, '_', '.' and '-'")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise _refused(f"its cniVersion {version!r} is no version like 1.0.0")
    if not OLDEST <= _numbers(version) <= NEWEST:
        raise _refused(f"its cniVersion {version} is not between 0.4.0 and 1.1.0")
    parts = raw.get("plugins", [raw] if "type" in raw else [])
    if not isinstance(parts, list) or not parts:
        raise _refused("it has no plugins")
    return Configuration(
        name=name,
        version=version,
        plugins=tuple(_plugin(part) for part in parts),
        disable_check=raw.get("disableCheck") in (True, "true"),
        disable_gc=raw.get("disableGC") in (True, "true"),
    )


def _plugin(part: object) -> Plugin:
    kind = part.get("type") if isinstance(part, dict) else None
    # It is looked for in directories, so it must not lead out of them.
    if not isinstance(part, dict) or not isinstance(kind, str) or not _NAME.fullmatch(kind):
        raise _refused(f"a plugin's type {kind!r} is no name of a program")
    return Plugin(kind, part)


def _refused(why: str) -> InvalidArgument:
    return InvalidArgument(f"the CNI configuration is not understood: {why}", reason="BAD_CNI_CONFIG")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def said(
    configuration: Configuration,
    plugin: Plugin,
    *,
    previous: Json = None,
    runtime: Mapping[str, Json] | None = None,
    more: Mapping[str, Json] | None = None,
) -> bytes:
    """What a plugin reads. runtime: by capability; a plugin gets those that it takes."""
    part: dict[str, Json] = {key: value for key, value in plugin.part.items() if key != "capabilities"}
    part |= {"cniVersion": configuration.version, "name": configuration.name, "type": plugin.kind}
    asked = {key: value for key, value in (runtime or {}).items() if value and plugin.has(key)}
    if asked:
        part["runtimeConfig"] = asked
    if previous is not None:
        part["prevResult"] = previous
    return json.dumps(part | dict(more or {})).encode()


def port_mappings(ports: Sequence[Port]) -> Json:
    """Published ports as the capability portMappings has them."""
    return [
        {
            "hostPort": port.host_port,
            "containerPort": port.container_port,
            "protocol": port.protocol,
            **({"hostIP": port.host_ip} if port.host_ip else {}),
        }
        for port in ports
    ]


def result_of(plugin: Plugin, output: bytes, previous: Json) -> Json:
    """What a plugin's ADD printed; the previous result if it printed nothing. Raises InvalidArgument."""
    if not output.strip():
        return previous
    try:
        result = json.loads(output)
    except (ValueError, RecursionError) as e:
        raise InvalidArgument(
            f"CNI plugin {plugin.kind} answered ADD with what is no JSON: {e}", reason="BAD_CNI_RESULT"
        ) from e
    addresses(json.dumps(result))
    routed_versions(json.dumps(result))
    dns_of(json.dumps(result))
    return result  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def addresses(result: str) -> tuple[tuple[Address, Range], ...]:
    """What a result says that the container has. Raises InvalidArgument for what is no result."""
    found = []
    try:
        for one in json.loads(result).get("ips") or ():
            own = ip_interface(one["address"])
            gateway = ip_interface(one["gateway"]).ip if one.get("gateway") else own.network.network_address
            found.append((own.ip, Range(own.network, gateway)))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidArgument(f"a CNI plugin gave a result that is none: {e}", reason="BAD_CNI_RESULT") from e
    return tuple(found)


def routed_versions(result: str) -> frozenset[int]:
    """The IP versions for which a result has a default route. Raises InvalidArgument for what is no result."""
    found = set()
    try:
        for one in json.loads(result).get("routes") or () if result else ():
            destination = ip_interface(one["dst"])
            if destination.network.prefixlen == 0:
                found.add(destination.version)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidArgument(f"a CNI plugin gave routes that are none: {e}", reason="BAD_CNI_RESULT") from e
    return frozenset(found)


def dns_of(result: str) -> Dns:
    """What a result says of name servers. Raises InvalidArgument for what is no result."""
    try:
        raw = (json.loads(result).get("dns") or {}) if result else {}
        servers, search, options = (_words(raw.get(key) or []) for key in ("nameservers", "search", "options"))
        return Dns(servers, search or _words([raw["domain"]] if raw.get("domain") else []), options)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidArgument(f"a CNI plugin gave name servers that are none: {e}", reason="BAD_CNI_RESULT") from e


def _words(values: Sequence[str]) -> tuple[str, ...]:
    """Each a word of resolv.conf. Raises ValueError, TypeError."""
    for value in values:
        if not isinstance(value, str) or len(value.split()) != 1:
            raise ValueError(f"{value!r} is no word")
    return tuple(values)


def complaint(output: bytes) -> str:
    """What a plugin that failed says why. Source: section 5, "Error"."""
    try:
        raw = json.loads(output)
        words = [str(raw[key]) for key in ("msg", "details") if raw.get(key)]
    except (ValueError, TypeError, AttributeError):
        words = [output.decode("utf-8", "replace").strip()[-500:]]
    return ": ".join(words) or "it gave no reason"
