"""Networks of CNI plugins, by packets with Debian's plugins, and by what a plugin of the test's own is told."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.netlab import HOST, OUTSIDE, Calls, Lab, address, eventually, reaches, tcp_call, tcp_server, text
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.api.types.v1 import types_pb2
from corral.kernel.netns import remove_pinned
from corral.network.cni.documents import Plugin
from corral.network.cni.plugins import Attached, run
from corral.rpc.context import in_namespace
from corral.rpc.errors import CorralError, FailedPrecondition, InvalidArgument

pytestmark = needs("root", "netns", "nft", "nsenter", "ip", "iptables", "cni")
NONE = pb.AttachRequest.MODE_NONE
STUB = """#!/bin/sh
cd {directory}
read -r said
echo "$said" > "last-$CNI_COMMAND"
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >> calls
while [ -e "hold-$CNI_COMMAND" ]; do sleep 0.02; done
if [ -e "fail-$CNI_COMMAND" ]; then echo '{{"code": 11, "msg": "not today", "details": "the stub says so"}}'; exit 1; fi
case $CNI_COMMAND in
ADD) echo "$CNI_NETNS" > "held-$CNI_CONTAINERID-$CNI_IFNAME"
    if [ -e garble ]; then echo hello; exit; fi
    if [ -e answer ]; then cat answer; exit; fi
    echo '{{"cniVersion": "1.1.0", "ips": [{{"address": "192.0.2.9/24", "gateway": "192.0.2.1"}}]}}';;
DEL) rm -f "held-$CNI_CONTAINERID-$CNI_IFNAME";;
esac
"""


@dataclass
class Stub:
    """A plugin that writes down what it is told, and what it holds."""

    directory: Path

    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []

    def said(self, verb: str) -> Mapping[str, object]:
        return dict(json.loads((self.directory / f"last-{verb}").read_text()))

    def held(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("held-*"))

    def clear(self) -> None:
        for path in self.directory.glob("*"):
            path.unlink()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Stub]]:
    programs, said = tmp_path_factory.mktemp("plugins"), tmp_path_factory.mktemp("said")
    for name in ("stub", "lame"):
        program = programs / name
        program.write_text(STUB.format(directory=said))
        program.chmod(0o755)
    confs = tmp_path_factory.mktemp("confs")
    settings = {"cni_bin_dirs": [str(programs), "/usr/lib/cni"], "cni_conf_dirs": [str(confs / "none"), str(confs)]}
    with Lab(settings=settings) as lab:
        yield lab, Stub(said)


@pytest.fixture
def lab(made: tuple[Lab, Stub]) -> Lab:
    return made[0]


@pytest.fixture
def stub(made: tuple[Lab, Stub]) -> Iterator[Stub]:
    made[1].clear()
    yield made[1]
    made[1].clear()


@pytest.fixture
def plugins(lab: Lab) -> Path:
    return Path(lab.settings["cni_bin_dirs"][0])  # type: ignore[index]


@pytest.fixture
def confs(lab: Lab) -> Iterator[Path]:
    directory = Path(lab.settings["cni_conf_dirs"][1])  # type: ignore[index]
    yield directory
    for path in directory.iterdir():
        path.unlink()


@contextlib.contextmanager
def without_interpreter(program: Path) -> Iterator[None]:
    whole = program.read_text()
    program.write_text("#!/no/such/interpreter\n")
    try:
        yield
    finally:
        program.write_text(whole)


@pytest.fixture
async def net(lab: Lab) -> AsyncIterator[Calls]:
    async with lab.calls() as calls:
        yield calls
        for name in ("a", "b"):  # also what was never finished
            await calls.detach(name)
        await calls.clear()


async def make(net: Calls, *plugins: Mapping[str, object], name: str = "net", version: str = "1.0.0") -> pb.Network:
    config = json.dumps({"cniVersion": version, "name": "corraltest", "plugins": plugins})
    request = pb.CreateNetworkRequest(name=name, driver="cni", options={"cni.config": config})
    return await net.networks.Create(request)


def host_local(directory: Path, subnet: str = "10.231.80.0/24") -> Mapping[str, object]:
    return {
        "type": "host-local",
        "dataDir": str(directory),
        "ranges": [[{"subnet": subnet}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }


def bridge(directory: Path) -> Mapping[str, object]:
    return {
        "type": "bridge",
        "bridge": "cnitest0",
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": host_local(directory),
    }


def ptp(directory: Path) -> Mapping[str, object]:
    return {"type": "ptp", "ipMasq": True, "ipam": host_local(directory, "10.231.81.0/24")}


PORTMAP: Mapping[str, object] = {"type": "portmap", "capabilities": {"portMappings": True}}


def addresses(directory: Path) -> Sequence[str]:
    """Those that host-local holds."""
    return sorted(path.name for path in directory.glob("corraltest/10.*"))


@pytest.mark.parametrize("plugin", [bridge, ptp])
async def test_containers_reach_each_other_and_the_world(lab: Lab, net: Calls, tmp_path: Path, plugin: object) -> None:
    await make(net, plugin(tmp_path))  # type: ignore[operator]
    a, b = await net.attach("a", "net", hostname="alpha"), await net.attach("b", "net")
    assert addresses(tmp_path) == sorted((address(a), address(b)))
    assert reaches(a.netns_path, address(b))
    assert reaches(a.netns_path, OUTSIDE)
    assert f"{address(a)}\talpha" in text(a.hosts_path)
    assert await net.attach("a", "net", hostname="alpha") == a
    findings = (await net.networks.Check(types_pb2.CheckRequest())).findings
    assert [finding.problem for finding in findings if "plugins" in finding.problem] == []
    for name in ("a", "b"):
        await net.detach(name)
    assert addresses(tmp_path) == []


async def test_portmap_publishes_ports_as_long_as_the_container_is_there(lab: Lab, net: Calls, tmp_path: Path) -> None:
    await make(net, bridge(tmp_path), PORTMAP)
    a = await net.attach("a", "net", ports=[pb.PortMapping(container_port=7, host_port=8080)])
    with tcp_server(a.netns_path, address(a)):
        assert tcp_call(lab.outside, HOST, 8080)
        kept = await net.endpoints.Unpublish(pb.UnpublishRequest(endpoint_id="a"))
        assert [port.host_port for port in kept.ports] == [8080]
        more = pb.PublishRequest(endpoint_id="a", ports=[pb.PortMapping(container_port=7, host_port=8081)])
        with pytest.raises(FailedPrecondition, match="publishes ports only when"):
            await net.endpoints.Publish(more)
        less = pb.UnpublishRequest(endpoint_id="a", ports=kept.ports)
        with pytest.raises(FailedPrecondition, match="publishes ports only when"):
            await net.endpoints.Unpublish(less)
    await net.detach("a")
    with pytest.raises(OSError):  # noqa: PT011 - refused, or nobody answers
        tcp_call(lab.outside, HOST, 8080)


async def test_a_running_container_comes_and_goes(lab: Lab, net: Calls, tmp_path: Path) -> None:
    await make(net, bridge(tmp_path))
    a, b = await net.attach("a"), await net.attach("b", "net")
    request = pb.ConnectRequest(endpoint_id="a", network=pb.NetworkAttachment(network="net"))
    connected = await net.endpoints.Connect(request)
    assert [one.name for one in connected.interfaces] == ["eth0", "eth1"]
    assert reaches(a.netns_path, address(b))
    await net.endpoints.Disconnect(pb.DisconnectRequest(endpoint_id="a", network="net"))
    assert addresses(tmp_path) == [address(b)]
    assert not reaches(b.netns_path, address(connected, 1), within_s=0.3)


async def test_a_plugin_is_told_what_the_specification_says(net: Calls, stub: Stub) -> None:
    first = {"type": "stub", "some": {"thing": 1}, "capabilities": {"portMappings": True, "aliases": True}}
    await make(net, first, {"type": "stub", "second": True}, version="1.1.0")
    attachment = pb.NetworkAttachment(network="net", aliases=["db"])
    await net.attach("a", networks=[attachment], ports=[pb.PortMapping(container_port=7, host_port=8080)])
    assert stub.calls() == ["STATUS", "STATUS", "ADD default-a eth0", "ADD default-a eth0"]
    result = {"cniVersion": "1.1.0", "ips": [{"address": "192.0.2.9/24", "gateway": "192.0.2.1"}]}
    second = {"cniVersion": "1.1.0", "name": "corraltest", "type": "stub", "second": True, "prevResult": result}
    assert stub.said("ADD") == second
    await net.detach("a")
    assert stub.calls()[-2:] == ["DEL default-a eth0", "DEL default-a eth0"]
    runtime = {
        "portMappings": [{"hostPort": 8080, "containerPort": 7, "protocol": "tcp"}],
        "aliases": {"corraltest": ["db"]},
    }
    told = {"cniVersion": "1.1.0", "name": "corraltest", "type": "stub", "some": {"thing": 1}}
    assert stub.said("DEL") == told | {"runtimeConfig": runtime, "prevResult": result}


async def test_what_a_plugin_refuses_is_told_and_undone(net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"}, version="1.1.0")
    for verb in ("STATUS", "ADD"):
        (stub.directory / f"fail-{verb}").touch()
        with pytest.raises(FailedPrecondition, match=f"refused {verb}: not today: the stub says so"):
            await net.attach("a", "net")
        (stub.directory / f"fail-{verb}").unlink()
    assert (await net.ids(), stub.held()) == ([], [])
    await net.attach("a", "net")
    (stub.directory / "fail-DEL").touch()
    with pytest.raises(FailedPrecondition, match="refused DEL"):
        await net.detach("a")
    (stub.directory / "fail-DEL").unlink()
    await net.detach("a")
    assert stub.held() == []


async def test_the_first_failure_is_told_and_what_a_plugin_would_not_undo_is_asked_for_again(
    net: Calls, stub: Stub
) -> None:
    await make(net, {"type": "stub"})
    connect = pb.ConnectRequest(endpoint_id="b", network=pb.NetworkAttachment(network="net"))
    await net.attach("b")
    for verb in ("garble", "fail-DEL"):
        (stub.directory / verb).touch()
    with pytest.raises(InvalidArgument, match="plugin stub answered ADD with what is no JSON"):
        await net.attach("a", "net")
    with pytest.raises(InvalidArgument, match="plugin stub answered ADD with what is no JSON"):
        await net.endpoints.Connect(connect)
    with pytest.raises(FailedPrecondition, match="refused DEL"):
        await net.endpoints.Connect(connect)
    for verb in ("garble", "fail-DEL"):
        (stub.directory / verb).unlink()
    assert stub.held() == ["held-default-a-eth0", "held-default-b-eth1"]
    connected = await net.endpoints.Connect(connect)
    assert [one.name for one in connected.interfaces] == ["eth0", "eth1"]
    assert stub.calls()[-2:] == ["DEL default-b eth1", "ADD default-b eth1"]
    await net.detach("b")
    await net.attach("a", "net")
    await net.detach("a")
    assert stub.held() == []


async def test_a_plugin_that_cannot_be_executed_is_named(net: Calls, stub: Stub, plugins: Path) -> None:
    await make(net, {"type": "lame"})
    with without_interpreter(plugins / "lame"), pytest.raises(FailedPrecondition, match="lame cannot be executed"):
        await net.attach("a", "net")


async def test_a_plugin_that_takes_too_long_is_ended_with_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "slow"
    program.write_text(f"#!/bin/sh\nsleep 100 & echo $! > {tmp_path}/child; wait\n")
    program.chmod(0o755)
    monkeypatch.setattr("corral.network.cni.plugins.TIMEOUT_S", 0.5)
    with pytest.raises(FailedPrecondition, match="slow refused ADD: it took longer than"):
        await run(Plugin("slow", {}), "ADD", Attached(), b"{}", [str(tmp_path)])
    child = int((tmp_path / "child").read_text())
    assert eventually(lambda: ended(child))


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_check_tells_what_a_plugin_finds(net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"})
    await net.attach("a", "net")
    (stub.directory / "fail-CHECK").touch()
    findings = (await net.networks.Check(types_pb2.CheckRequest())).findings
    [problem] = [finding.problem for finding in findings if "plugins" in finding.problem]
    assert "not today" in problem


async def test_garbage_is_collected_when_the_daemon_starts(lab: Lab, net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"}, version="1.1.0")
    await net.attach("a", "net")
    lab.corrald.restart()
    assert eventually(lambda: "GC" in stub.calls())
    assert stub.said("GC")["cni.dev/valid-attachments"] == [{"containerID": "default-a", "ifname": "eth0"}]


async def test_garbage_is_what_no_network_of_that_name_has(lab: Lab, net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"}, version="1.1.0")
    await net.attach("a", "net")
    with in_namespace("other"):
        await make(net, {"type": "stub"}, version="1.1.0")
        await net.attach("b", "net")
    lab.corrald.restart()
    assert eventually(lambda: stub.calls().count("GC") == 2)
    valid = stub.said("GC")["cni.dev/valid-attachments"]
    with in_namespace("other"):
        await net.detach("b")
        await net.remove("net")
    assert isinstance(valid, list)
    assert sorted(one["containerID"] for one in valid) == ["default-a", "other-b"]


def unlink_said_by(lab: Lab, where: str) -> None:
    [said] = [path for path in Path(where).iterdir() if path.read_text() == f"{lab.place.root}/network\n"]
    said.unlink()


async def test_what_another_engine_of_the_host_has_is_not_collected(lab: Lab, net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"}, version="1.1.0")
    names = lab.place.directory / "cni-names"
    with Lab(settings={**lab.settings, "cni_names": str(names)}) as other:
        async with other.calls() as calls:
            await make(calls, {"type": "stub"}, version="1.1.0")
            await calls.attach("b", "net")
        other.corrald.stop()
        lab.corrald.restart()
        assert eventually(lambda: "network.cni_shared" in lab.corrald.log())
        other.corrald.start()
        async with other.calls() as calls:
            assert eventually(lambda: "network.cni_shared" in other.corrald.log())
            await calls.detach("b")
            await calls.remove("net")
        assert "GC" not in stub.calls()
        async with other.calls() as calls:  # and is not to be seen from now on
            await make(calls, {"type": "stub"}, version="1.1.0")
    told = len(lab.corrald.events("network.cni_shared"))
    lab.corrald.restart()
    assert eventually(lambda: len(lab.corrald.events("network.cni_shared")) > told)
    assert "GC" not in stub.calls()
    unlink_said_by(other, str(lab.corrald.events("network.cni_shared")[-1]["said_in"]))
    lab.corrald.restart()
    assert eventually(lambda: "GC" in stub.calls())
    async with lab.calls() as again:
        await again.remove("net")
    assert list(names.iterdir()) == []


async def test_what_another_engine_makes_while_garbage_is_collected_is_made_afterwards(
    lab: Lab, net: Calls, stub: Stub
) -> None:
    await make(net, {"type": "stub"}, version="1.1.0")
    hold = stub.directory / "hold-GC"
    hold.touch()
    with Lab(settings={**lab.settings, "cni_names": str(lab.place.directory / "cni-names")}) as other:
        lab.corrald.restart()
        assert eventually(lambda: "GC" in stub.calls())
        async with other.calls() as calls:
            await make(calls, {"type": "stub"}, version="1.1.0")
            attaching = asyncio.ensure_future(calls.attach("b", "net"))
            await asyncio.sleep(1)
            begun = stub.calls()
            hold.unlink()
            await attaching
            assert not [call for call in begun if call.startswith("ADD")]
            assert stub.held() == ["held-default-b-eth0"]
            await calls.detach("b")
            await calls.remove("net")


async def test_garbage_is_not_collected_while_another_engine_makes_something(lab: Lab, net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"}, version="1.1.0")
    with Lab(settings={**lab.settings, "cni_names": str(lab.place.directory / "cni-names")}) as other:
        async with other.calls() as calls:
            await make(calls, {"type": "stub"}, version="1.1.0")
            (stub.directory / "hold-ADD").touch()
            attaching = asyncio.ensure_future(calls.attach("b", "net"))
            assert await asyncio.to_thread(eventually, lambda: "ADD default-b eth0" in stub.calls())
            told = len(lab.corrald.events("network.cni_shared"))
            await asyncio.to_thread(lab.corrald.restart)
            assert await asyncio.to_thread(eventually, lambda: len(lab.corrald.events("network.cni_shared")) > told)
            (stub.directory / "hold-ADD").unlink()
            await attaching
            await calls.detach("b")
            await calls.remove("net")
    assert "GC" not in stub.calls()


async def test_garbage_of_a_network_that_the_host_has_is_not_ours_to_collect(
    lab: Lab, net: Calls, stub: Stub, confs: Path
) -> None:
    await make(net, {"type": "stub"}, version="1.1.0")
    (confs / "87-podman.conflist").write_text(
        '{"cniVersion": "1.1.0", "name": "corraltest", "plugins": [{"type": "stub"}]}'
    )
    lab.corrald.restart()
    assert eventually(lambda: lab.corrald.events("network.cni_of_the_host"))
    assert "GC" not in stub.calls()


async def come_and_go(lab: Lab) -> None:
    async with lab.calls() as net:
        await net.attach("a", "net")
        await net.detach("a")


@pytest.mark.parametrize("moment", ["after_row", "after_add", "after_delete"])
async def test_a_daemon_that_dies_leaves_nothing_with_a_plugin(lab: Lab, net: Calls, stub: Stub, moment: str) -> None:
    await make(net, {"type": "stub"})
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": f"network.cni.{moment}=kill"})
    with pytest.raises(CorralError):
        await come_and_go(lab)
    lab.corrald.processes["corrald"].wait(5)
    lab.corrald.start()
    async with lab.calls() as again:
        await again.detach("a")
        assert stub.held() == []
        assert (await again.network("net")).endpoints == []


@pytest.mark.parametrize("lame", [False, True])
async def test_what_a_plugin_refuses_at_the_start_is_asked_for_again(
    lab: Lab, net: Calls, stub: Stub, plugins: Path, lame: bool
) -> None:
    await make(net, {"type": "stub"}, {"type": "lame"})
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.cni.after_add=kill"})
    with pytest.raises(CorralError):
        await net.attach("a", "net")
    lab.corrald.processes["corrald"].wait(5)
    (stub.directory / "calls").unlink()
    with without_interpreter(plugins / "lame") if lame else contextlib.nullcontext():
        if not lame:
            (stub.directory / "fail-DEL").touch()
        lab.corrald.start()
        assert eventually(lambda: "DEL default-a eth0" in stub.calls())
        assert await net.ids() == []
        with pytest.raises(FailedPrecondition, match="is used by 1 container"):
            await net.remove("net")
    (stub.directory / "fail-DEL").unlink(missing_ok=True)
    assert eventually(lambda: stub.held() == [], within_s=15)
    await removable(net, "net")


async def removable(net: Calls, name: str) -> None:
    for _ in range(200):
        with contextlib.suppress(FailedPrecondition):
            return await net.remove(name)
        await asyncio.sleep(0.1)
    raise AssertionError(f"{name} is in use")


async def test_after_a_reboot_plugins_are_asked_to_forget_before_they_make_anew(
    lab: Lab, net: Calls, stub: Stub
) -> None:
    await make(net, {"type": "stub"})
    a = await net.attach("a", "net")
    lab.corrald.stop()
    remove_pinned(a.netns_path)
    with contextlib.closing(sqlite3.connect(lab.place.root / "network/network.db")) as db:
        db.execute("UPDATE endpoints SET boot_id = 'an earlier one'")
        db.commit()
    lab.corrald.start()
    async with lab.calls() as again:
        await again.attach("a", "net")
    assert stub.calls() == ["ADD default-a eth0", "DEL default-a eth0", "ADD default-a eth0"]


async def test_many_at_once_have_addresses_of_their_own(net: Calls, tmp_path: Path) -> None:
    await make(net, bridge(tmp_path))
    made = await asyncio.gather(*(net.attach(f"m{number}", "net") for number in range(8)))
    assert len({address(one) for one in made}) == 8
    await asyncio.gather(*(net.detach(f"m{number}") for number in range(8)))
    assert addresses(tmp_path) == []


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("", "needs its --cni-config FILE, or the name of one that the host has in .*: none is called 'net' there"),
        ("{", "it is no JSON"),
        ("[]", "it is no JSON object"),
        ('{"cniVersion": "9.0.0", "type": "stub"}', "is not between"),
        ('{"cniVersion": "1.0.0"}', "it has no plugins"),
        ('{"cniVersion": "1.0.0", "type": "../sh"}', "is no name of a program"),
        ('{"cniVersion": "1.0.0", "name": "../up", "type": "stub"}', "its name '../up' is none"),
        ('{"cniVersion": "1.0.0", "type": "nothing-like-it"}', "there is no CNI plugin 'nothing-like-it'"),
    ],
)
async def test_what_cannot_be_is_refused_in_a_sentence(net: Calls, config: str, complaint: str) -> None:
    request = pb.CreateNetworkRequest(name="net", driver="cni", options={"cni.config": config})
    with pytest.raises((InvalidArgument, FailedPrecondition), match=complaint):
        await net.networks.Create(request)
    assert "net" not in await net.network_names()


async def test_an_address_that_no_plugin_would_heed_is_refused(net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"})
    with pytest.raises(InvalidArgument, match="names no capability 'ips'"):
        await net.attach("a", networks=[pb.NetworkAttachment(network="net", ipv4_address="192.0.2.7")])
    assert list(stub.directory.iterdir()) == []


def answer(stub: Stub, dns: object) -> None:
    said = {"cniVersion": "1.0.0", "ips": [{"address": "192.0.2.9/24"}], "dns": dns}
    (stub.directory / "answer").write_text(json.dumps(said))


async def test_name_servers_that_a_plugin_names_are_the_containers(lab: Lab, net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"})
    answer(stub, {"nameservers": ["192.0.2.53"], "search": ["one.test", "two.test"], "options": ["ndots:3"]})
    a = await net.attach("a", "net")
    wanted = ["nameserver 192.0.2.53", "search one.test two.test", "options ndots:3"]
    assert set(wanted) <= set(text(a.resolv_conf_path).splitlines())
    lab.corrald.restart()
    async with lab.calls() as again:
        assert set(wanted) <= set(text((await again.get("a")).resolv_conf_path).splitlines())
        b = await again.attach("b", "net", dns=pb.DnsOptions(servers=["198.51.100.53"]))
        assert "nameserver 198.51.100.53" in text(b.resolv_conf_path)
        assert "192.0.2.53" not in text(b.resolv_conf_path)


async def test_name_servers_come_and_go_with_a_network_that_is_connected(net: Calls, stub: Stub) -> None:
    await make(net, {"type": "stub"})
    answer(stub, {"nameservers": ["192.0.2.53"], "domain": "here.test"})
    a = await net.attach("a")
    before = text(a.resolv_conf_path)
    await net.endpoints.Connect(pb.ConnectRequest(endpoint_id="a", network=pb.NetworkAttachment(network="net")))
    assert "nameserver 192.0.2.53\n" in text(a.resolv_conf_path)
    assert "search here.test\n" in text(a.resolv_conf_path)
    await net.endpoints.Disconnect(pb.DisconnectRequest(endpoint_id="a", network="net"))
    assert text(a.resolv_conf_path) == before


@pytest.mark.parametrize("dns", [{"nameservers": ["a\nb"]}, {"nameservers": [1]}, {"search": 5}, ["192.0.2.53"]])
async def test_name_servers_that_are_none_are_refused(net: Calls, stub: Stub, dns: object) -> None:
    await make(net, {"type": "stub"})
    answer(stub, dns)
    with pytest.raises(InvalidArgument, match="name servers that are none"):
        await net.attach("a", "net")
    assert stub.held() == []


async def test_a_configuration_that_the_host_has_is_found_by_its_name(net: Calls, stub: Stub, confs: Path) -> None:
    (confs / "05-broken.conf").write_text("{")
    (confs / "10-other.conf").write_text('{"cniVersion": "1.0.0", "name": "other", "type": "stub"}')
    (confs / "20-net.conflist").write_text('{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "stub"}]}')
    (confs / "30-net.conf").write_text('{"cniVersion": "1.0.0", "name": "net", "type": "nothing-like-it"}')
    (confs / "40-net.txt").write_text("{}")
    await net.networks.Create(pb.CreateNetworkRequest(name="net", driver="cni"))
    a = await net.attach("a", "net")
    assert address(a) == "192.0.2.9"
    assert stub.said("ADD")["name"] == "net"
    assert json.loads((await net.network("net")).options["cni.config"])["disableGC"] is True
