"""libnftables through our binding, in a network namespace of the test's own."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel.netns import create_pinned, in_namespace, remove_pinned
from corral.kernel.nftables import Command, Nftables, NftablesError
from corral.network import rules
from corral.network.model import Network
from corral.network.subnets import make_range

pytestmark = needs("root", "netns", "nft")
TABLE = {"family": "inet", "name": "corralt"}
ADD, DELETE = {"add": {"table": TABLE}}, {"delete": {"table": TABLE}}


@pytest.fixture
def nft() -> Iterator[Nftables]:
    path = Path(f"/tmp/corral-nft-{os.getpid()}")
    create_pinned(path)
    opened = in_namespace(path, Nftables)
    try:
        yield opened
    finally:
        opened.close()
        remove_pinned(path)


def tables(nft: Nftables) -> list[str]:
    return [str(item["table"]["name"]) for item in nft.run([{"list": {"tables": None}}])]  # type: ignore[index,call-overload]


def test_a_context_keeps_to_the_namespace_it_was_made_in(nft: Nftables) -> None:
    assert tables(nft) == []
    nft.run([ADD])
    assert tables(nft) == ["corralt"]
    with Nftables() as here:
        assert "corralt" not in tables(here)


def test_a_list_of_commands_happens_as_a_whole_or_not_at_all(nft: Nftables) -> None:
    broken: Command = {"add": {"chain": {"family": "inet", "table": "missing", "name": "x"}}}
    with pytest.raises(NftablesError) as refused:
        nft.run([ADD, broken])
    assert refused.value.errno == errno.ENOENT
    assert "No such file or directory" in str(refused.value)
    assert tables(nft) == []


def test_words_that_are_no_commands_are_refused_with_the_reason(nft: Nftables) -> None:
    with pytest.raises(NftablesError, match="nft: "):
        nft.run([{"frobnicate": {"table": TABLE}}])


def test_a_closed_context_says_so(nft: Nftables) -> None:
    nft.close()
    nft.close()
    with pytest.raises(NftablesError, match="closed"):
        nft.run([ADD])


def network(number: int) -> Network:
    return Network(
        id=str(number),
        namespace="default",
        name=f"n{number}",
        driver="bridge",
        bridge=f"crlt{number}",
        ranges=(make_range(f"10.231.{number}.0/24"), make_range(f"fd00:{number:x}::/64")),
        internal=number % 2 == 1,
    )


def listed(nft: Nftables) -> list[dict[str, object]]:
    """The table's content without handles, which differ each time it is made."""
    items = []
    for item in nft.run([{"list": {"table": TABLE}}]):
        [(kind, content)] = item.items()
        fields = {key: value for key, value in content.items() if key != "handle"}  # type: ignore[union-attr]
        elements = fields.get("elem")
        if isinstance(elements, list):
            fields["elem"] = sorted(elements, key=str)
        items.append({kind: fields})
    return items


def test_the_kernel_takes_our_table_and_adding_a_network_is_building_it_with_that_network(nft: Nftables) -> None:
    first, second, inside = network(0), network(2), network(1)
    nft.run(rules.table("corralt", [first, second, inside]))
    whole = listed(nft)
    nft.run(rules.table("corralt", [first]))
    assert listed(nft) != whole
    nft.run(rules.add_network("corralt", second))
    nft.run(rules.add_network("corralt", inside))
    nft.run(rules.add_network("corralt", inside))
    assert listed(nft) == whole


def test_removing_networks_leads_back_to_the_table_without_them(nft: Nftables) -> None:
    nft.run(rules.table("corralt", []))
    empty = listed(nft)
    for one in (network(0), network(1)):
        nft.run(rules.add_network("corralt", one))
    for one in (network(0), network(1), network(1)):
        nft.run(rules.remove_network("corralt", one))
    assert listed(nft) == empty


def test_the_table_can_be_removed_twice(nft: Nftables) -> None:
    nft.run(rules.table("corralt", [network(0)]))
    nft.run(rules.remove_table("corralt"))
    nft.run(rules.remove_table("corralt"))
    assert tables(nft) == []
