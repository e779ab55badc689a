"""Base64 by each of the encoders that a machine may have, and bytes counted."""

import base64 as reference
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.kernel import base64, vectors
from corral.kernel.syscalls import MACHINE

ENCODERS = {
    name: encode
    for name, encode in (
        ("vectors", base64.by_vectors()),
        ("library", base64.by_library()),
        ("interpreter", base64.by_interpreter),
    )
    if encode is not None
}
each_encoder = pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS.keys())
type Encode = Callable[[bytes], tuple[bytes, bytes]]


@each_encoder
@given(st.binary(max_size=200))
def test_bytes_are_encoded_as_by_python(encode: Encode, data: bytes) -> None:
    assert b"".join(encode(data)) == reference.b64encode(data)


@each_encoder
def test_every_length_and_every_letter_is_encoded(encode: Encode) -> None:
    data = b"".join(number.to_bytes(3) for number in range(1 << 24) if not number & 0x0F0F0F)
    for size in (*range(100), 98_303, 98_304, 98_305):
        assert b"".join(encode(data[:size])) == reference.b64encode(data[:size])
    assert b"".join(encode(data)) == reference.b64encode(data)
    for place in range(0, 24, 6):
        letters = b"".join((number << place).to_bytes(3) for number in range(64)) * 2
        assert b"".join(encode(letters)) == reference.b64encode(letters)


@pytest.mark.parametrize("loops", [vectors.LOOPS, None])
@given(st.lists(st.binary(max_size=40) | st.just(b"\n" * 5000)), st.sampled_from([0, 10, 255]))
def test_bytes_are_counted_as_by_python(loops: vectors.Vectors | None, parts: list[bytes], byte: int) -> None:
    data = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "LOOPS", loops)
        assert vectors.count(data, byte) == data.count(byte)


@pytest.mark.skipif(MACHINE != "x86_64", reason="the code is x86-64's")
def test_the_fastest_is_taken_and_its_code_cannot_be_written_to() -> None:
    assert "vectors" in ENCODERS
    assert base64.encoded.__qualname__.startswith("by_vectors")
    maps = Path("/proc/self/maps").read_text("ascii")
    assert not re.search(r" [r-]wx[ps] ", maps)
