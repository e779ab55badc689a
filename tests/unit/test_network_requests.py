"""Requests of endpoints: from the wire, into the database and back."""

from hypothesis import given
from hypothesis import strategies as st

from corral.api.network.v1 import network_pb2 as pb
from corral.network import wire
from corral.network.model import Attachment, Dns, Mode, Request
from corral.network.store import decode_request, encode_request

TEXTS = st.text(max_size=8)
TUPLES = st.lists(TEXTS, max_size=3).map(tuple)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), max_size=3).map(tuple)
REQUESTS = st.builds(
    Request,
    mode=st.sampled_from(Mode),
    attachments=st.lists(st.builds(Attachment, TEXTS, TEXTS, TEXTS, TEXTS, TUPLES, TEXTS), max_size=3).map(tuple),
    container=TEXTS,
    hostname=TEXTS,
    dns=st.builds(Dns, TUPLES, TUPLES, TUPLES),
    extra_hosts=PAIRS,
    sysctls=PAIRS,
    labels=PAIRS,
)


@given(REQUESTS)
def test_a_request_comes_back_from_the_database_as_it_went_in(request: Request) -> None:
    assert decode_request(encode_request(request)) == request


def test_the_order_of_maps_on_the_wire_makes_no_difference() -> None:
    one = pb.AttachRequest(endpoint_id="a", labels={"a": "1", "b": "2"}, sysctls={"net.a.b": "1", "net.c.d": "2"})
    two = pb.AttachRequest(endpoint_id="a", labels={"b": "2", "a": "1"}, sysctls={"net.c.d": "2", "net.a.b": "1"})
    assert wire.attach_request(one) == wire.attach_request(two)


def test_equal_addresses_in_other_letters_are_one_request() -> None:
    def asked(mac: str) -> Request:
        return wire.attach_request(pb.AttachRequest(networks=[pb.NetworkAttachment(network="n", mac_address=mac)]))

    assert asked("02:AB:00:00:00:01") == asked("02-ab-00-00-00-01")
