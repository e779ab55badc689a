"""Kills, restarts, reboots and strangers' hands: afterwards nothing is lost, has leaked or is half there."""

import asyncio
import contextlib
import os
import random
import sqlite3
from collections.abc import AsyncIterator, Coroutine

import pytest
from support.databases import copied
from support.netlab import BRIDGE, GATEWAY, OUTSIDE, READY, TABLE, Calls, Lab, address, command, eventually, reaches
from support.requirements import needs

from corral.api.network.v1 import network_pb2 as pb
from corral.kernel.netns import remove_pinned
from corral.rpc.errors import CorralError, NotFound

pytestmark = needs("root", "netns", "nft", "nsenter", "ip")
NONE = pb.AttachRequest.MODE_NONE
TURNS = 400 if os.environ.get("CI") else 2000


def rows(lab: Lab, table: str) -> int:
    with copied(lab.place.root / "network/network.db") as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


async def nothing_leaked(lab: Lab, net: Calls, *, endpoints: int = 0) -> None:
    """What the kernel holds, what the rows say and what is on disk agree."""
    assert len(await net.ids()) == endpoints
    assert rows(lab, "endpoints") == endpoints
    assert rows(lab, "allocations") == rows(lab, "interfaces") == endpoints
    assert eventually(lambda: len(lab.veths()) == endpoints), lab.links()
    assert eventually(lambda: len(lab.pins) == endpoints + READY), lab.pins
    directory = lab.place.root / "network/endpoints/default"
    assert len(list(directory.iterdir()) if directory.is_dir() else []) == endpoints


async def test_endpoints_outlive_the_daemon(lab: Lab) -> None:
    async with lab.calls() as net:
        a, b = await net.attach("a"), await net.attach("b")
        lab.corrald.kill9()
        assert reaches(a.netns_path, address(b))
        assert reaches(a.netns_path, OUTSIDE)
        lab.corrald.start()
        assert await net.get("a") == a
        assert await net.attach("a") == a
        c = await net.attach("c")
        assert address(c) not in (address(a), address(b))
        assert reaches(c.netns_path, address(a))
        await nothing_leaked(lab, net, endpoints=3)
        await net.clear()
        await nothing_leaked(lab, net)


ATTACH_FAILPOINTS = ["network.attach.after_row", "network.attach.after_plug", "network.attach.before_ready"]
DETACH_FAILPOINTS = ["network.detach.after_unplug", "network.detach.before_delete"]


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize("failpoint", ATTACH_FAILPOINTS)
async def test_an_attach_cut_short_leaves_nothing(lab: Lab, failpoint: str, action: str) -> None:
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": f"{failpoint}={action}@1"})
    async with lab.calls() as net:
        with pytest.raises(CorralError):
            await net.attach("a")
    if action == "kill":
        lab.corrald.kill9()
        lab.corrald.start()
    async with lab.calls() as net:
        await nothing_leaked(lab, net)
        endpoint = await net.attach("a")
        assert reaches(endpoint.netns_path, GATEWAY)
        await net.clear()
        await nothing_leaked(lab, net)


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize("failpoint", DETACH_FAILPOINTS)
async def test_a_detach_cut_short_is_finished_by_the_next(lab: Lab, failpoint: str, action: str) -> None:
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": f"{failpoint}={action}@1"})
    async with lab.calls() as net:
        await net.attach("a")
        with pytest.raises(CorralError):
            await net.detach("a")
    if action == "kill":
        lab.corrald.kill9()
        lab.corrald.start()
    async with lab.calls() as net:
        await net.detach("a")
        await nothing_leaked(lab, net)


async def test_a_half_detached_endpoint_can_be_attached_anew(lab: Lab) -> None:
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.detach.before_delete=kill@1"})
    async with lab.calls() as net:
        first = await net.attach("a")
        with pytest.raises(CorralError):
            await net.detach("a")
    lab.corrald.kill9()
    lab.corrald.start()
    async with lab.calls() as net:
        again = await net.attach("a")
        assert address(again) == address(first)
        assert reaches(again.netns_path, GATEWAY)
        await nothing_leaked(lab, net, endpoints=1)
        await net.clear()


async def create_and_remove(net: Calls) -> None:
    await net.create("mine", interface="crltmine")
    await net.remove("mine")


@pytest.mark.parametrize(
    "failpoint",
    [
        "network.create.after_row",
        "network.build.after_bridge",
        "network.remove.after_row",
        "network.remove.after_bridge",
    ],
)
async def test_a_network_half_made_or_half_removed_is_gone_after_a_kill(lab: Lab, failpoint: str) -> None:
    async with lab.calls() as net:
        await net.attach("keep")  # the default network is built, so the failpoint is met by ours only
        await net.detach("keep")
    lab.corrald.stop()
    at = 2 if "build" in failpoint else 1
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": f"{failpoint}=kill@{at}"})
    async with lab.calls() as net:
        await net.attach("keep")
        with pytest.raises(CorralError):
            await create_and_remove(net)
    lab.corrald.kill9()
    lab.corrald.start()
    async with lab.calls() as net:
        assert "mine" not in await net.network_names()
        assert eventually(lambda: "crltmine" not in lab.links())
        assert eventually(lambda: "crltmine" not in lab.ruleset())
        await net.create("mine", interface="crltmine")
        assert reaches((await net.attach("a", "mine")).netns_path, OUTSIDE)
        await net.clear()


def recorded(lab: Lab) -> dict[str, str]:
    """Networks by their rows, each with its state."""
    with copied(lab.place.root / "network/network.db") as db:
        return dict(db.execute("SELECT name, state FROM networks WHERE name != 'bridge'"))


@contextlib.asynccontextmanager
async def failing(lab: Lab, points: str) -> AsyncIterator[Calls]:
    """A daemon with failpoints, whose default network stands, so that they are met by what the test does only."""
    async with lab.calls() as net:
        await net.attach("keep")
        await net.detach("keep")
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": points})
    async with lab.calls() as net:
        await net.attach("keep")
        try:
            yield net
        finally:
            lab.corrald.stop()
            lab.corrald.start()
    async with lab.calls() as net:
        await net.clear()
        await nothing_leaked(lab, net)


async def given_up(call: Coroutine[object, object, object], after_s: float = 0.5) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, after_s)


async def test_a_network_whose_maker_gave_up_is_whole_and_can_be_removed(lab: Lab) -> None:
    async with failing(lab, "network.build.after_bridge=sleep:1.5@2") as net:
        await given_up(net.create("mine", interface="crltmine"))
        assert recorded(lab) == {"mine": "creating"}
        assert eventually(lambda: recorded(lab) == {"mine": "ready"})
        assert reaches((await net.attach("a", "mine")).netns_path, OUTSIDE)
        await net.detach("a")
        await net.remove("mine")
        assert "crltmine" not in lab.links()
        assert "crltmine" not in lab.ruleset()


async def test_a_network_whose_maker_gave_up_is_whole_after_the_daemon_has_stopped(lab: Lab) -> None:
    async with failing(lab, "network.build.after_bridge=sleep:1.5@2") as net:
        await given_up(net.create("mine", interface="crltmine"))
        lab.corrald.stop()
        assert recorded(lab) == {"mine": "ready"}
        assert "crltmine" in lab.bridges()


async def test_a_network_that_is_removed_while_it_is_made_is_gone(lab: Lab) -> None:
    async with failing(lab, "network.build.after_bridge=sleep:1.5@2") as net:
        making = asyncio.ensure_future(net.create("mine", interface="crltmine"))
        assert await asyncio.to_thread(eventually, lambda: recorded(lab) == {"mine": "creating"})
        await net.remove("mine")
        with contextlib.suppress(NotFound):  # or it was whole for a moment
            await making
        assert eventually(lambda: not recorded(lab))
        assert "crltmine" not in lab.links()
        assert "crltmine" not in lab.ruleset()


async def test_a_removal_goes_on_when_who_asked_for_it_gave_up(lab: Lab) -> None:
    async with failing(lab, "network.remove.after_bridge=sleep:1.5@1") as net:
        await net.create("mine", interface="crltmine")
        await given_up(net.remove("mine"))
        assert eventually(lambda: not recorded(lab))
        assert "crltmine" not in lab.ruleset()


async def test_a_network_that_was_neither_made_nor_undone_is_remembered_and_can_be_removed(lab: Lab) -> None:
    points = "network.create.after_build=error@1,network.remove.after_bridge=error@1"
    async with failing(lab, points) as net:
        with pytest.raises(CorralError, match="after_build"):
            await net.create("mine", interface="crltmine")
        assert "crltmine" in lab.ruleset()
        assert recorded(lab) == {"mine": "creating"}
        await net.remove("mine")
        assert not recorded(lab)
        assert "crltmine" not in lab.ruleset()


async def test_a_network_half_made_takes_no_bridge_of_the_hosts_with_it(lab: Lab) -> None:
    lab.corrald.stop()
    lab.corrald.start(environment={"CORRAL_FAILPOINTS": "network.create.after_row=kill@1"})
    command(lab.host, "ip", "link", "add", "hostsown", "type", "bridge")
    async with lab.calls() as net:
        with pytest.raises(CorralError):
            await net.create("mine", interface="hostsown")
    lab.corrald.kill9()
    lab.corrald.start()
    async with lab.calls() as net:
        assert eventually(lambda: rows(lab, "networks") == 1)
        assert "hostsown" in lab.links()
        command(lab.host, "ip", "link", "delete", "hostsown")
        await net.clear()


async def test_a_bridge_that_another_made_after_a_reboot_is_not_removed_with_its_network(lab: Lab) -> None:
    async with lab.calls() as net:
        await net.create("mine", interface="crltmine")
        lab.corrald.stop()
        command(lab.host, "ip", "link", "delete", "crltmine")
        command(lab.host, "ip", "link", "add", "crltmine", "type", "bridge")
        lab.corrald.start()
    async with lab.calls() as net:
        assert reaches((await net.attach("a", "mine")).netns_path, OUTSIDE)
        await net.clear()
        assert "crltmine" in lab.links()
        command(lab.host, "ip", "link", "delete", "crltmine")


async def test_namespaces_and_links_that_nobody_owns_are_removed_and_strangers_are_not(lab: Lab) -> None:
    async with lab.calls() as net:
        endpoint = await net.attach("a")
    lab.corrald.kill9()
    ours = endpoint.interfaces[0].host_name[:7]
    strays = {f"{ours}aaaaaaaa": "", f"{ours}bbbbbbbb": BRIDGE}
    strangers = {"crl0000cccccccc": "", "crl0000dddddddd": BRIDGE, "vethstranger": BRIDGE}
    for number, (name, bridge) in enumerate({**strays, **strangers}.items()):
        command(lab.host, "ip", "link", "add", name, "type", "veth", "peer", "name", f"peer{number}")
        if bridge:
            command(lab.host, "ip", "link", "set", name, "master", bridge)
    before = lab.pins
    lab.corrald.start()
    async with lab.calls() as net:
        assert eventually(lambda: not set(strays) & set(lab.links()))
        assert set(strangers) <= set(lab.links())
        assert await net.get("a") == endpoint
        assert lab.pins & before == {endpoint.netns_path.rpartition("/")[2]}
        for name in strangers:
            command(lab.host, "ip", "link", "del", name)
        await net.clear()
        await nothing_leaked(lab, net)


async def test_a_bridge_and_a_table_that_were_removed_are_made_anew(lab: Lab) -> None:
    async with lab.calls() as net:
        a, b = await net.attach("a"), await net.attach("b")
    lab.corrald.stop()
    command(lab.host, "ip", "link", "del", BRIDGE)
    command(lab.host, "nft", "flush", "ruleset")
    command(lab.host, "nft", "add", "table", "inet", "stranger")
    lab.corrald.start()
    async with lab.calls() as net:
        assert eventually(lambda: BRIDGE in lab.links() and TABLE in lab.ruleset())
        assert eventually(lambda: {lab.links()[name] for name in lab.veths()} == {BRIDGE})
        assert reaches(a.netns_path, address(b))
        assert reaches(a.netns_path, OUTSIDE)
        assert "stranger" in lab.ruleset()
        await net.clear()


async def test_a_bridge_removed_under_a_running_daemon_is_back_with_the_next_attach(lab: Lab) -> None:
    async with lab.calls() as net:
        await net.attach("a")
        command(lab.host, "ip", "link", "del", BRIDGE)
        command(lab.host, "nft", "flush", "ruleset")
        b = await net.attach("b")
        assert reaches(b.netns_path, OUTSIDE)
        await net.clear()
        await nothing_leaked(lab, net)


async def test_an_endpoint_whose_link_somebody_deleted_is_made_anew_by_the_same_call(lab: Lab) -> None:
    async with lab.calls() as net:
        first = await net.attach("a")
        command(lab.host, "ip", "link", "del", first.interfaces[0].host_name)
        again = await net.attach("a")
        assert address(again) == address(first)
        assert reaches(again.netns_path, OUTSIDE)
        await nothing_leaked(lab, net, endpoints=1)
        await net.clear()
        await nothing_leaked(lab, net)


async def test_after_a_reboot_endpoints_can_be_attached_again_with_their_addresses(lab: Lab) -> None:
    async with lab.calls() as net:
        a, b = await net.attach("a", hostname="alpha"), await net.attach("b", mode=NONE)
        await net.attach("c")
    lab.corrald.stop()
    for name in lab.pins:
        remove_pinned(lab.place.state / "netns" / name)
    command(lab.host, "ip", "link", "del", BRIDGE)
    command(lab.host, "nft", "flush", "ruleset")
    with contextlib.closing(sqlite3.connect(lab.place.root / "network/network.db")) as db:
        db.execute("UPDATE endpoints SET boot_id = 'an earlier one'")
        db.commit()
    lab.corrald.start()
    async with lab.calls() as net:
        again = await net.attach("a", hostname="alpha")
        assert address(again) == address(a)
        assert again.netns_path != a.netns_path
        assert reaches(again.netns_path, OUTSIDE)
        assert (await net.attach("b", mode=NONE)).netns_path != b.netns_path
        await net.detach("c")
        await net.clear()
        await nothing_leaked(lab, net)


async def test_many_at_once_have_addresses_of_their_own(lab: Lab) -> None:
    """Attached and detached at random by eight clients, each of which holds a few at a time, in two networks."""
    held: dict[str, str] = {}

    async def client(number: int, net: Calls) -> None:
        generator = random.Random(number)
        own: list[str] = []
        for turn in range(TURNS // 8):
            if own and generator.random() < 0.5:
                name = own.pop(generator.randrange(len(own)))
                del held[name]  # from the moment that we ask, it may be another's
                await net.detach(name)
            else:
                name = f"c{number}-{turn}"
                got = address(await net.attach(name, generator.choice(("bridge", "crowd"))))
                assert got not in held.values()
                held[name] = got
                own.append(name)
        for name in own:
            del held[name]
            await net.detach(name)

    async with lab.calls() as net:
        await net.create("crowd", "10.231.48.0/24")
        await asyncio.gather(*(client(number, net) for number in range(8)))
        await nothing_leaked(lab, net)
        assert [(await net.network(name)).subnets[0].used for name in ("bridge", "crowd")] == [0, 0]
        await net.clear()


async def test_clients_that_give_up_leave_whole_endpoints_or_none(lab: Lab) -> None:
    async with lab.calls() as net:

        async def impatient(number: int) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.0005 * number):
                    await net.attach(f"i{number}")

        await asyncio.gather(*(impatient(number) for number in range(30)))
        lab.corrald.restart()
        for name in await net.ids():
            assert reaches((await net.get(name)).netns_path, GATEWAY)
        for number in range(30):
            await net.detach(f"i{number}")
        await nothing_leaked(lab, net)


async def test_kills_at_random_moments_leak_nothing(lab: Lab) -> None:
    generator = random.Random(11)
    for _ in range(6):
        async with lab.calls() as net:

            async def churn(number: int, net: Calls = net) -> None:
                with contextlib.suppress(CorralError):
                    for turn in range(1000):
                        await net.attach(f"k{number}-{turn}")
                        await net.detach(f"k{number}-{turn}")

            tasks = [asyncio.ensure_future(churn(number)) for number in range(4)]
            await asyncio.sleep(generator.uniform(0.02, 0.2))
            lab.corrald.kill9()
            await asyncio.wait(tasks)
        lab.corrald.start()
    async with lab.calls() as net:
        await net.clear()
        await nothing_leaked(lab, net)
        with pytest.raises(NotFound):
            await net.get("k0-0")
