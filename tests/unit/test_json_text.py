"""The JSON that is read and written by the standard library's part in C alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.oci import json_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_a_value_is_written_and_read_as_json_does(value: object) -> None:
    assert json_text.dumps(value) == json.dumps(value)
    assert json_text.loads(json.dumps(value, ensure_ascii=False)) == value
    assert json_text.loads(json.dumps(value, indent=2).encode()) == value


@pytest.mark.parametrize(
    "text",
    ["", "  ", "{", "[1,2", '{"a":1}x', "nul", '"\n"', "\ufeff{}", "[1,]", '{"a" 1}', "01", b"\xff", b'"\xed\xa0\x80"'],
)
def test_what_is_no_document_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError) as ours:  # noqa: PT011 - compared below
        json_text.loads(text)
    if isinstance(text, str):
        with pytest.raises(ValueError) as theirs:  # noqa: PT011 - what ours are compared with
            json.loads(text)
        assert str(ours.value) == str(theirs.value)


def test_endless_nesting_is_refused() -> None:
    with pytest.raises(RecursionError):
        json_text.loads("[" * 1_000_000)


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no JSON form for object"):
        json_text.dumps([object()])
