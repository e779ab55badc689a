"""The texts of /etc/hosts, /etc/resolv.conf and /etc/hostname."""

import os
import resource
from pathlib import Path

import pytest

from corral.network import etc
from corral.network.files import FileStore
from corral.network.model import Dns, Endpoint, EndpointKey, EndpointState, Interface, Mode, Network, Request
from corral.network.subnets import make_range
from corral.rpc.errors import FailedPrecondition

FALLBACK = ("1.1.1.1",)


def host(tmp_path: Path, resolv_conf: str, resolved: str | None = None) -> etc.HostFiles:
    (tmp_path / "resolv.conf").write_text(resolv_conf)
    if resolved is not None:
        (tmp_path / "resolved.conf").write_text(resolved)
    return etc.HostFiles(tmp_path / "resolv.conf", tmp_path / "resolved.conf")


def endpoint(mode: Mode = Mode.NETWORKS, **fields: object) -> Endpoint:
    interfaces = ()
    if mode is Mode.NETWORKS:
        part = make_range("10.1.0.0/24")
        network = Network(id="n", namespace="", name="n", driver="bridge", ranges=(part,))
        interfaces = (Interface(network, "eth0", "crl", "02:00:00:00:00:01", ((part.gateway + 1, part),)),)
    request = Request(mode, **fields)  # type: ignore[arg-type]
    return Endpoint(
        EndpointKey("default", "0123456789abcdef"), request, "ns", interfaces, EndpointState.READY, "boot", 0
    )


def test_a_container_finds_itself_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    files = etc.compose(endpoint(), host(tmp_path, "nameserver 10.0.0.53\n"), FALLBACK)
    assert files.hosts.splitlines()[0] == "127.0.0.1\tlocalhost"
    assert files.hosts.splitlines()[-1] == "10.1.0.2\t0123456789ab"
    assert files.hostname == "0123456789ab\n"


def test_the_hosts_servers_domains_and_options_are_passed_on(tmp_path: Path) -> None:
    text = (
        "# made by hand\nnameserver 10.0.0.53 # first\nnameserver 10.0.0.54\ndomain a.org\nsearch b.org c.org\n"
        "options ndots:3\noptions rotate\nnonsense\n"
    )
    files = etc.compose(endpoint(), host(tmp_path, text), FALLBACK)
    assert files.resolv_conf == (
        "nameserver 10.0.0.53\nnameserver 10.0.0.54\nsearch b.org c.org\noptions ndots:3 rotate\n"
    )


def test_behind_a_loopback_resolver_stand_those_of_systemd_resolved(tmp_path: Path) -> None:
    stub = "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch a.org\n"
    files = etc.compose(endpoint(), host(tmp_path, stub, "nameserver 192.0.2.53\nsearch b.org\n"), FALLBACK)
    assert files.resolv_conf == "nameserver 192.0.2.53\nsearch a.org\n"


def test_without_any_reachable_server_the_fallback_is_used(tmp_path: Path) -> None:
    for text in ("", "nameserver 127.0.0.1\n", "nameserver ::1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\n"):
        files = etc.compose(endpoint(), host(tmp_path, text), FALLBACK)
        assert files.resolv_conf == "nameserver 1.1.1.1\n"
    gone = etc.HostFiles(tmp_path / "gone", tmp_path / "gone")
    assert etc.compose(endpoint(), gone, FALLBACK).resolv_conf == "nameserver 1.1.1.1\n"


def test_what_is_asked_for_wins_and_a_dot_means_no_search(tmp_path: Path) -> None:
    own = host(tmp_path, "nameserver 10.0.0.53\nsearch a.org\noptions rotate\n")
    files = etc.compose(endpoint(dns=Dns(("9.9.9.9",), (".",), ("ndots:1",))), own, FALLBACK)
    assert files.resolv_conf == "nameserver 9.9.9.9\noptions ndots:1\n"


def test_in_the_hosts_namespace_its_own_resolver_is_kept(tmp_path: Path) -> None:
    files = etc.compose(endpoint(Mode.HOST), host(tmp_path, "nameserver 127.0.0.53\noptions edns0\n"), FALLBACK)
    assert files.resolv_conf == "nameserver 127.0.0.53\noptions edns0\n"
    assert files.hosts == Path("/etc/hosts").read_text()


def test_extra_hosts_and_the_gateway(tmp_path: Path) -> None:
    own = host(tmp_path, "")
    extra = (("db", "10.9.8.7"), ("gate", etc.HOST_GATEWAY))
    assert etc.compose(endpoint(extra_hosts=extra), own, FALLBACK).hosts.endswith("10.9.8.7\tdb\n10.1.0.1\tgate\n")
    assert etc.compose(endpoint(Mode.HOST, extra_hosts=extra), own, FALLBACK).hosts.endswith("127.0.0.1\tgate\n")
    with pytest.raises(FailedPrecondition, match="host-gateway"):
        etc.compose(endpoint(Mode.NONE, extra_hosts=extra), own, FALLBACK)


def test_files_appear_together_are_replaced_together_and_go_together(tmp_path: Path) -> None:
    store, key = FileStore(tmp_path / "endpoints"), EndpointKey("default", "a")
    store.write(key, etc.EtcFiles("h", "r", "n"))
    store.write(key, etc.EtcFiles("h2", "r2", "n2"))
    assert {path.name: path.read_text() for path in Path(store.path("default", key.id)).iterdir()} == {
        "hosts": "h2",
        "resolv.conf": "r2",
        "hostname": "n2",
    }
    assert [path.name for path in (tmp_path / "endpoints/default").iterdir()] == ["a"]
    store.remove(key)
    store.remove(key)
    assert list((tmp_path / "endpoints/default").iterdir()) == []


def test_where_there_is_room_for_a_part_of_a_file_there_is_none_of_them(tmp_path: Path) -> None:
    store, key = FileStore(tmp_path / "endpoints"), EndpointKey("default", "a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (5000, before[1])
    )  # a write ends there, as it does on a disk that is full
    try:
        with pytest.raises(OSError, match="too large"):
            store.write(key, etc.EtcFiles("h" * 9000, "r", "n"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not Path(store.path("default", key.id)).exists()


def test_files_made_ready_are_used_once_readable_by_all_and_swept_if_they_are_not(tmp_path: Path) -> None:
    store, key = FileStore(tmp_path / "endpoints"), EndpointKey("default", "a")
    previous = os.umask(0o077)
    try:
        for name in ("one", "two", "three"):
            store.make_ready(name)
        store.write(key, etc.EtcFiles("h", "r", "n"), ready="one")
    finally:
        os.umask(previous)
    assert (store.is_ready("one"), store.is_ready("two")) == (False, True)
    assert {
        (path.name, path.read_text(), path.stat().st_mode & 0o777)
        for path in Path(store.path("default", key.id)).iterdir()
    } == {
        ("hosts", "h", 0o644),
        ("resolv.conf", "r", 0o644),
        ("hostname", "n", 0o644),
    }
    store.drop_ready("two")
    ready = tmp_path / "endpoints-ready"
    assert [path.name for path in ready.iterdir()] == ["three"]
    FileStore(tmp_path / "endpoints").sweep({key})
    assert not ready.exists()
    assert Path(store.path("default", key.id)).is_dir()


def test_what_the_host_changes_is_seen_by_the_next(tmp_path: Path) -> None:
    own = host(tmp_path, "nameserver 10.0.0.1\n")
    assert etc.compose(endpoint(), own, FALLBACK).resolv_conf == "nameserver 10.0.0.1\n"
    (tmp_path / "resolv.conf").write_text("nameserver 10.0.0.2\n")
    assert etc.compose(endpoint(), own, FALLBACK).resolv_conf == "nameserver 10.0.0.2\n"
    (tmp_path / "resolv.conf").unlink()
    assert etc.compose(endpoint(), own, ["9.9.9.9"]).resolv_conf == "nameserver 9.9.9.9\n"


def test_a_sweep_removes_what_nobody_owns(tmp_path: Path) -> None:
    root = tmp_path / "endpoints"
    store, kept, stale = FileStore(root), EndpointKey("default", "a"), EndpointKey("other", "b")
    for key in (kept, stale):
        store.write(key, etc.EtcFiles("h", "r", "n"))
    (root / "default/.c.1234").mkdir()
    assert {(key.namespace, key.id) for key in store.sweep({kept})} == {("other", "b"), ("default", ".c.1234")}
    assert [path.name for path in (root / "default").iterdir()] == ["a"]
