"""JSON by that part of the standard library's json which is in C: to load the rest takes as long as a whole set-up.

What is read and written is the same. The rest is loaded to say what is wrong with a document, so where imports are
closed it must have been loaded before.
"""

import _json

_SPACE = " \t\n\r"


class _Context:
    """What the scanner asks for. Source: Lib/json/decoder.py, JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


_scan = _json.make_scanner(_Context)  # type: ignore[arg-type]  # anything with these attributes


def loads(text: str | bytes) -> object:
    """The value of a JSON document; bytes are UTF-8. Raises ValueError, RecursionError."""
    if isinstance(text, bytes):
        text = text.decode()
    document = text.strip(_SPACE)
    value: object = None
    try:
        value, end = _scan(document, 0)
    except StopIteration:
        end = -1
    if end == len(document):
        return value
    import json

    return json.loads(text)  # which raises


def dumps(value: object) -> str:
    """The JSON document of a value, in ASCII. Raises TypeError for what has no such form."""
    encode = _json.make_encoder(None, _refuse, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True)
    return "".join(encode(value, 0))


def _refuse(value: object) -> object:
    raise TypeError(f"no JSON form for {type(value).__name__}")
