"""The address allocator, against a set that does the same slowly."""

import time
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.network.ipam import LEAF_BITS, MAX_WINDOW, Bitmap, Exhausted, Pool, unusable


@given(
    size=st.integers(1, 3 * LEAF_BITS),
    numbers=st.sets(st.integers(0, 3 * LEAF_BITS - 1)),
    start=st.integers(0, 3 * LEAF_BITS - 1),
)
def test_next_free_is_what_a_search_from_start_finds(size: int, numbers: set[int], start: int) -> None:
    taken = {number for number in numbers if number < size}
    start %= size
    bitmap = Bitmap.empty(size).add_all(taken)
    expected = next((n % size for n in range(start, start + size) if n % size not in taken), None)
    assert bitmap.next_free(start) == expected
    assert bitmap.count() == len(taken)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2 * LEAF_BITS))))
def test_adding_and_removing_one_by_one_is_adding_all_that_remain(steps: list[tuple[bool, int]]) -> None:
    bitmap, model = Bitmap.empty(2 * LEAF_BITS + 1), set[int]()
    for add, number in steps:
        bitmap = bitmap.add(number) if add else bitmap.remove(number)
        model = model | {number} if add else model - {number}
    assert bitmap == Bitmap.empty(2 * LEAF_BITS + 1).add_all(model)
    assert all((number in bitmap) == (number in model) for _, number in steps)


@pytest.mark.parametrize("size", [1, LEAF_BITS - 1, LEAF_BITS, LEAF_BITS + 1, 2 * LEAF_BITS])
def test_a_full_bitmap_has_no_free_number_and_one_removed_is_found(size: int) -> None:
    bitmap = Bitmap.empty(size).add_all(range(size))
    assert bitmap.next_free(size // 2) is None
    assert bitmap.remove(size - 1).next_free(0) == size - 1
    assert bitmap.remove(0).next_free(size - 1) == 0


def test_addresses_come_in_order_and_a_freed_one_comes_last() -> None:
    pool = Pool.of(IPv4Network("10.0.0.0/29"), reserved=[IPv4Address("10.0.0.1")])
    pool, first = pool.allocate()
    pool, second = pool.allocate()
    assert (str(first), str(second)) == ("10.0.0.2", "10.0.0.3")
    pool = pool.release([first])
    rest = []
    for _ in range(4):
        pool, address = pool.allocate()
        rest.append(str(address))
    assert rest == ["10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.2"]
    with pytest.raises(Exhausted, match="all 5 addresses"):
        pool.allocate()


def test_the_pool_given_in_is_not_changed() -> None:
    pool = Pool.of(IPv4Network("10.0.0.0/29"))
    changed, address = pool.allocate()
    assert pool.is_free(address)
    assert not changed.is_free(address)
    assert changed.release([address]).bitmap == pool.bitmap


@given(st.integers(8, 30), st.data())
def test_every_usable_address_of_a_small_subnet_is_given_out_once(length: int, data: st.DataObject) -> None:
    subnet = IPv4Network((0x0A000000, max(length, 22)))
    gateway = subnet.network_address + 1
    cursor = data.draw(st.integers(-5, subnet.num_addresses + 5))
    pool = Pool.of(subnet, reserved=[gateway], cursor=cursor)
    given_out = set()
    for _ in range(pool.capacity):
        pool, address = pool.allocate()
        given_out.add(address)
    assert given_out == set(subnet.hosts()) - {gateway}
    assert (pool.used, pool.capacity) == (len(given_out), len(given_out))


def test_a_window_bounds_what_is_given_out_and_ignores_the_rest() -> None:
    pool = Pool.of(
        IPv4Network("10.0.0.0/24"), window=IPv4Network("10.0.0.128/30"), reserved=[IPv4Address("10.0.0.129")]
    )
    assert pool.capacity == 3
    pool = pool.hold([ip_address("10.0.0.7"), ip_address("10.0.0.130"), ip_address("fd00::1")])
    assert pool.used == 1
    pool, first = pool.allocate()
    pool, second = pool.allocate()
    assert {str(first), str(second)} == {"10.0.0.128", "10.0.0.131"}


def test_what_is_reserved_stays_reserved() -> None:
    gateway = IPv4Address("10.0.0.1")
    pool = Pool.of(IPv4Network("10.0.0.0/30"), reserved=[gateway]).release([gateway, IPv4Address("10.0.0.0")])
    assert not pool.is_free(gateway)
    assert pool.capacity == 1


@pytest.mark.parametrize(
    ("subnet", "addresses"),
    [
        ("10.0.0.0/24", {"10.0.0.0", "10.0.0.255"}),
        ("10.0.0.0/31", set()),
        ("10.0.0.0/32", set()),
        ("fd00::/64", {"fd00::"}),
        ("fd00::/127", set()),
    ],
)
def test_addresses_that_no_host_may_have(subnet: str, addresses: set[str]) -> None:
    assert {str(address) for address in unusable(ip_network(subnet))} == addresses


def test_an_ipv6_subnet_gives_out_its_first_addresses() -> None:
    pool = Pool.of(IPv6Network("fd00::/64"), reserved=[ip_address("fd00::1")])
    pool, address = pool.allocate()
    assert str(address) == "fd00::2"
    assert pool.bitmap.size == MAX_WINDOW


def test_the_next_address_costs_the_same_whether_the_subnet_is_empty_or_full() -> None:
    empty = Pool.of(IPv4Network("10.0.0.0/16"))
    full = empty.hold(empty.address(number) for number in range(65_535) if number != 40_000)

    def seconds(pool: Pool) -> float:
        def once() -> float:
            start = time.perf_counter()
            for _ in range(50):
                pool.allocate()
            return time.perf_counter() - start

        return min(once() for _ in range(20))

    assert seconds(full) < 3 * seconds(empty)
