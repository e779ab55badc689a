"""A stand-in for the standard typing module that is loaded many times faster.

Annotations are read by corral.oci.decode alone, which finds here what it asks for; everywhere else they are only made.
"""

import sys
import types

from corral.runtime.standins import standard

TYPE_CHECKING = False


class Form:
    """A special form, plain (Any) or with something in brackets (Annotated[int, …], int | None of one)."""

    __slots__ = ("__args__", "__metadata__", "__origin__")

    def __init__(self, origin: object = None, args: tuple[object, ...] = (), metadata: tuple[object, ...] = ()) -> None:
        self.__origin__, self.__args__, self.__metadata__ = origin, args, metadata

    def __getitem__(self, items: object) -> "Form":
        args = items if isinstance(items, tuple) else (items,)
        if self is Annotated:
            return Form(self, args[:1], args[1:])
        return Form(self, args)

    def __or__(self, other: object) -> "Form":
        return Form(Union, (self, other if other is not None else types.NoneType))

    def __ror__(self, other: object) -> "Form":
        return Form(Union, (other if other is not None else types.NoneType, self))


Annotated, Any, ClassVar, Literal, NoReturn, Self, Union = (Form() for _ in range(7))


class Protocol:
    """What others are like."""

    __slots__ = ()


def cast(_kind: object, value: object) -> object:
    """The value."""
    return value


def get_origin(hint: object) -> object:
    """What is in front of the brackets."""
    return types.UnionType if isinstance(hint, types.UnionType) else getattr(hint, "__origin__", None)


def get_args(hint: object) -> tuple[object, ...]:
    """What is in them."""
    args: tuple[object, ...] = getattr(hint, "__args__", ()) + getattr(hint, "__metadata__", ())
    return args


def get_type_hints(cls: type, *, include_extras: bool = False) -> dict[str, object]:
    """The annotations of a class and its bases."""
    assert include_extras
    hints: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        names = vars(sys.modules[base.__module__])
        for name, hint in getattr(base, "__annotations__", {}).items():
            hints[name] = eval(hint, names) if isinstance(hint, str) else hint  # noqa: S307 - our own annotation
    return hints


__getattr__ = standard("typing")
