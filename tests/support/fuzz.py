"""How the fuzzing tests run: always the same examples, few enough for every run; more and others with CORRAL_FUZZ=N."""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from corral.oci.decode import Choice, Range, json_name
from support.amounts import amount

_WANTED = os.environ.get("CORRAL_FUZZ", "")


def refusal[E: Exception](kind: type[E], call: Callable[[], object]) -> E | None:
    """The error of this kind that a call raises, if it does; any other is the test's failure."""
    try:
        call()
    except kind as e:
        return e
    return None


def fuzz(max_examples: int) -> settings:
    """Settings of one test."""
    return settings(
        max_examples=int(_WANTED) if _WANTED else amount(max_examples, in_ci=max_examples // 3),
        derandomize=not _WANTED,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


EDGES = (-(2**63) - 1, -(2**31), -2, -1, 0, 1, 10, 2**16, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64)
TEXTS = (
    *("", "/", ".", "..", "/..", "/proc", "/proc/self/fd/3", "/dev/null", "rbind", "ro", "a=b", "A=", "=", "x" * 300),
    *("\0", "\n", "\ud800", "\udcff", "٣", "\U0010ffff", "1.2.0", "CAP_KILL", "RLIMIT_NOFILE", "net.ipv4.ip_forward"),
    *("SCMP_ARCH_X86_64", "read", "clone3", "tmpfs", "bind", "proc", "cgroup", "private", "nosuch"),
)
texts = st.sampled_from(TEXTS) | st.text(max_size=8)
numbers = st.sampled_from(EDGES) | st.integers()
junk: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def json_of(hint: object, *, wrong: float = 0.03) -> st.SearchStrategy[object]:
    """JSON that an annotation of corral.oci.decode describes, with something else in its place now and then."""
    good = _of(hint, wrong)
    if wrong <= 0:
        return good
    return st.floats(0, 1, allow_nan=False).flatmap(lambda dice: junk if dice < wrong else good)


def one_member(cls: type, *, wrong: float = 0.0) -> st.SearchStrategy[dict[str, object]]:
    """An object with one member that a dataclass describes: where all are there, the first wrong one hides the rest."""
    hints = typing.get_type_hints(cls, include_extras=True)
    members = [
        st.deferred(lambda f=field: json_of(hints[f.name], wrong=wrong)).map(  # type: ignore[misc]
            lambda value, f=field: {json_name(f.name): value}  # type: ignore[misc]
        )
        for field in dataclasses.fields(cls)
    ]
    return st.one_of(members)


def _of(hint: object, wrong: float) -> st.SearchStrategy[object]:
    simple = {str: texts, int: numbers, bool: st.booleans()}
    if hint in simple:
        return simple[hint]  # type: ignore[index]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from([member.value for member in hint])
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _of_dataclass(hint, wrong)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(st.none(), *(json_of(a, wrong=wrong) for a in arguments if a is not types.NoneType))
    if origin is typing.Annotated and isinstance(arguments[1], Range):
        low, high = arguments[1].low, arguments[1].high
        return st.sampled_from([low, high, low - 1, high + 1]) | st.integers(low, high)
    if origin is typing.Annotated and isinstance(arguments[1], Choice):
        return st.sampled_from(sorted(map(str, arguments[1].values))) | texts
    if origin is tuple:
        return st.lists(json_of(arguments[0], wrong=wrong), max_size=3)
    if origin is Mapping:
        return st.dictionaries(texts, json_of(arguments[1], wrong=wrong), max_size=3)
    raise TypeError(f"no strategy for {hint!r}")


def _of_dataclass(cls: type, wrong: float) -> st.SearchStrategy[object]:
    hints = typing.get_type_hints(cls, include_extras=True)
    required, optional = {}, {}
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        # Built when it is drawn from: a specification has hundreds of members.
        hint = hints[field.name]
        chosen = st.deferred(lambda hint=hint: json_of(hint, wrong=wrong))  # type: ignore[misc]
        (required if needed else optional)[json_name(field.name)] = chosen
    return st.fixed_dictionaries(required, optional=optional)
