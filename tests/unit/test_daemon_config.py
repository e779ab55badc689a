import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

import pytest

from corral.daemon import config
from corral.daemon.config import DaemonConfig, build, find_services, listen_on, load, parse, service_config
from corral.daemon.main import arguments, with_options
from corral.daemon.table import TABLE, Entry, select
from corral.rpc.address import TcpAddress, UnixAddress, parse_address
from corral.rpc.errors import InvalidArgument


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Inner:
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    root: Path = Path("/r")
    state: Path = Path("/s")
    size_bytes: int = 1
    grace_s: float = 1.0
    on: bool = False
    name: str | None = None
    subnet: IPv4Network | None = None
    pools: Sequence[str] = ()
    exact: tuple[int, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    colour: Colour = Colour.RED
    mode: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    addresses: Mapping[str, str] = field(default_factory=dict)


def test_values_become_the_types_of_the_fields():
    table = {
        "root": "/x",
        "grace_s": 3,
        "on": True,
        "subnet": "10.0.0.0/8",
        "pools": ["a", "b"],
        "exact": [1, 2],
        "labels": {"k": 1},
        "colour": "red",
        "mode": "b",
        "inner": {"depth": 2},
    }
    made = build(Example, table, "example")
    assert (made.root, made.grace_s, made.on) == (Path("/x"), 3.0, True)
    assert isinstance(made.grace_s, float)
    assert made.subnet == IPv4Network("10.0.0.0/8")
    assert (made.pools, made.exact, made.labels) == (("a", "b"), (1, 2), {"k": 1})
    assert (made.colour, made.mode, made.inner) == (Colour.RED, "b", Inner(2))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("size_bytes", "big", "[example] size_bytes must be a whole number, not 'big'"),
        ("size_bytes", True, "[example] size_bytes must be a whole number, not True"),
        ("size_bytes", 1.5, "[example] size_bytes must be a whole number, not 1.5"),
        ("on", 1, "[example] on must be a true or false, not 1"),
        ("pools", "a", "[example] pools must be a list, not 'a'"),
        ("exact", [1, "x"], "[example] exact[1] must be a whole number, not 'x'"),
        ("labels", [], "[example] labels must be a table, not []"),
        ("labels", {"k": "v"}, "[example] labels.k must be a whole number, not 'v'"),
        ("subnet", "10.0.0.1/8", "[example] subnet: 10.0.0.1/8 has host bits set"),
        ("mode", "c", "[example] mode must be one of 'a', 'b', not 'c'"),
        ("colour", "blue", "[example] colour: 'blue' is not a valid Colour"),
        ("inner", {"dept": 1}, "[example.inner] has no setting 'dept'; did you mean 'depth'?"),
        ("siz_bytes", 1, "[example] has no setting 'siz_bytes'; did you mean 'size_bytes'?"),
    ],
)
def test_a_wrong_value_is_refused_with_section_and_key(key: str, value: object, sentence: str):
    with pytest.raises(InvalidArgument) as caught:
        build(Example, {key: value}, "example")
    assert str(caught.value) == sentence


def test_no_file_means_defaults():
    assert load(None).daemon == DaemonConfig()


def test_the_file_is_named_in_errors(tmp_path: Path):
    path = tmp_path / "config.toml"
    with pytest.raises(InvalidArgument, match=r"cannot read .*config.toml"):
        load(path)
    path.write_text("[daemon]\nroot = 3\n")
    with pytest.raises(InvalidArgument, match=r"config.toml: \[daemon\] root must be a path, not 3"):
        load(path)


def test_unknown_sections_and_addresses_are_refused():
    with pytest.raises(InvalidArgument, match=r"no section \[image\]; did you mean 'images'"):
        parse({"image": {}})
    with pytest.raises(InvalidArgument, match=r"\[addresses\] image: there is no such service"):
        parse({"addresses": {"image": "unix:///x"}})
    with pytest.raises(InvalidArgument, match="tasks must be a section"):
        parse({"tasks": 3})


def test_a_service_gets_its_own_directory_and_the_addresses(monkeypatch: pytest.MonkeyPatch):
    entry = Entry("unused", f"{__name__}:Example")
    document = config.Config(services={"engine": {"size_bytes": 7}})
    made = service_config("engine", entry, document, {"tasks": "unix:///t"}, root=Path("/r"), state=Path("/s"))
    assert made == Example(Path("/r/engine"), Path("/s"), 7, addresses={"tasks": "unix:///t"})
    moved = config.Config(services={"engine": {"root": "/disk"}})
    assert service_config("engine", entry, moved, {}, root=Path("/r"), state=Path("/s")).root == Path("/disk")
    wrong = config.Config(services={"engine": {"addresses": {}}})
    with pytest.raises(InvalidArgument, match=r"use the section \[addresses\]"):
        service_config("engine", entry, wrong, {}, root=Path("/r"), state=Path("/s"))


def test_every_section_of_the_table_has_a_config_that_defaults_can_fill():
    for name, entry in TABLE.items():
        made = service_config(name, entry, config.Config(), {}, root=Path("/r"), state=Path("/s"))
        assert made.root == Path("/r") / name


def test_services_start_leaves_first_whatever_the_order_asked_for():
    assert select([]) == tuple(TABLE)
    assert select(["engine", "tasks"]) == ("tasks", "engine")
    assert list(TABLE)[-1] == "engine"
    with pytest.raises(InvalidArgument, match="did you mean 'tasks'"):
        select(["task"])


def test_a_unix_socket_is_always_there():
    daemon = DaemonConfig(state=Path("/s"))
    assert listen_on(daemon, tuple(TABLE), all_in_one=True) == (UnixAddress(Path("/s/corrald.sock")),)
    assert listen_on(daemon, ["tasks"], all_in_one=False) == (UnixAddress(Path("/s/tasks.sock")),)
    tcp = DaemonConfig(state=Path("/s"), address=("tcp://h:1",))
    assert listen_on(tcp, ["tasks"], all_in_one=False) == (UnixAddress(Path("/s/tasks.sock")), TcpAddress("h", 1))
    own = DaemonConfig(address=("tcp://h:1", "unix:///x"))
    assert listen_on(own, ["tasks"], all_in_one=False) == (UnixAddress(Path("/x")), TcpAddress("h", 1))


def test_hosted_services_are_found_here_others_at_their_default_and_the_file_wins():
    daemon = DaemonConfig(state=Path("/s"))
    found = find_services(config.Config(daemon, {"images": "tcp://h:1"}), ["tasks"], UnixAddress(Path("/own")))
    assert found["tasks"] == "unix:///own"
    assert found["network"] == "unix:///s/network.sock"
    assert found["images"] == "tcp://h:1"


def test_options_win_over_the_file():
    document = parse({"daemon": {"root": "/file", "grace_s": 9, "log_level": "error"}})
    options = arguments().parse_args(["--root", "/option", "--address", "unix:///a", "--log-level", "debug"])
    daemon = with_options(document, options).daemon
    assert (daemon.root, daemon.grace_s, daemon.log_level) == (Path("/option"), 9.0, "debug")
    assert daemon.address == ("unix:///a",)


def test_tls_needs_all_three_files():
    with pytest.raises(InvalidArgument, match="all of"):
        DaemonConfig(tls_cert=Path("/c")).tls()
    assert DaemonConfig().tls() is None


@pytest.mark.parametrize(
    "text", ["", "/run/x", "unix://x/y", "unix:", "tcp://host", "tcp://:1", "tcp://h:x", "http://h:1"]
)
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(InvalidArgument, match="is not an address"):
        parse_address(text)


@pytest.mark.parametrize("text", ["unix:///run/x.sock", "tcp://host:1", "tcp://[::1]:8080", "tcp://10.0.0.1:0"])
def test_addresses_are_written_as_they_are_read(text: str):
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("h", False)]
)
def test_what_counts_as_loopback(host: str, loopback: bool):
    assert TcpAddress(host, 1).is_loopback is loopback
