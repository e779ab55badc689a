"""The files under deploy/ say what the code does."""

import configparser
import dataclasses
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from corral.daemon import config

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SERVICES = ("images", "tasks", "network", "cgroups", "engine")
UNITS = ["corrald", *(f"corral-{s}" for s in SERVICES)]
# Set for each service by corrald itself.
IMPLIED = {"root", "state", "addresses"}


def uncommented() -> dict[str, dict[str, object]]:
    text = (DEPLOY / "config.toml").read_text()
    return tomllib.loads(re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE))


def config_class(service: str) -> type:
    module = importlib.import_module(f"corral.{service}.config")
    cls: type = getattr(module, f"{service.capitalize()}Config")
    return cls


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_of_a_service_is_shown_with_its_default(service: str) -> None:
    fields = {f.name: f.default for f in dataclasses.fields(config_class(service)) if f.name not in IMPLIED}
    shown = {key: tuple(v) if isinstance(v, list) else v for key, v in uncommented()[service].items()}
    assert shown == {key: str(v) if isinstance(v, Path) else v for key, v in fields.items()}


def test_every_setting_of_the_daemon_is_shown() -> None:
    assert uncommented()["daemon"].keys() == {f.name for f in dataclasses.fields(config.DaemonConfig)}


def test_the_file_is_accepted_as_it_is_and_with_everything_uncommented() -> None:
    config.load(DEPLOY / "config.toml")
    config.parse(uncommented())


@pytest.mark.parametrize("unit", UNITS)
def test_containers_outlive_the_unit_and_its_restart(unit: str) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(DEPLOY / "systemd" / f"{unit}.service")
    service = parser["Service"]
    assert (service["Type"], service["KillMode"], service["Delegate"]) == ("notify", "process", "yes")
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["ExecReload"] == "/bin/kill -USR2 $MAINPID"
    name = unit.removeprefix("corral-")
    assert service["ExecStart"].endswith("json" if unit == "corrald" else f"--service {name}")
