"""Modules with messages, as they are loaded where protobuf is in C: what a module defines is made as it is asked for.

Generated code makes the classes of all messages, which is most of what it takes to load, and has protobuf load what it
does so with. The library in C makes any of them by itself, from the same descriptor.
"""

from typing import TYPE_CHECKING, Any

from google._upb import _message
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FileDescriptor


_pool = getattr(_message, "default_pool", None)
_class_of_messages: Any = getattr(_message, "MessageMeta", None)


def pool() -> object:
    """What google.protobuf.descriptor_pool.Default() answers."""
    return _pool


def nothing(*_: object) -> None:
    """Is kept, or made, for nobody."""


def build_on_demand(file: "FileDescriptor", module: str, found: dict[str, Any]) -> None:
    """In place of making all that a module defines."""

    def make(name: str) -> Any:
        value = found[name] = _made(file, module, name)
        return value

    found["__getattr__"] = make


def _made(file: "FileDescriptor", module: str, name: str) -> Any:
    """Raises AttributeError if the file has nothing of that name."""
    if (message := file.message_types_by_name.get(name)) is not None:
        return _message_class(message, module)
    if (enum := file.enum_types_by_name.get(name)) is not None:
        return EnumTypeWrapper(enum)
    for enum in file.enum_types_by_name.values():
        if (value := enum.values_by_name.get(name)) is not None:
            return value.number
    raise AttributeError(f"{file.name} defines no {name}")


def _message_class(message: "Descriptor", module: str) -> Any:
    """The library makes it once, perhaps before now, and those within it by itself.

    For the first, it loads a module, and if that fails or is interrupted, the process dies of SIGSEGV.
    """
    from google.protobuf.internal import well_known_types  # noqa: F401 - here, failures are told

    members = {"DESCRIPTOR": message, "__module__": module, "__qualname__": message.name}
    return _class_of_messages(message.name, (Message,), members)


_ALL: dict[tuple[str, str], object] = {
    ("google.protobuf.descriptor", "_USE_C_DESCRIPTORS"): True,
    ("google.protobuf.descriptor_pool", "Default"): pool,
    ("google.protobuf.symbol_database", "Default"): nothing,
    ("google.protobuf.internal.builder", "BuildMessageAndEnumDescriptors"): nothing,
    ("google.protobuf.internal.builder", "BuildTopDescriptorsAndMessages"): build_on_demand,
}
STAND_INS = _ALL if _pool is not None and _class_of_messages is not None else {}
"""By module and name, as those of corral.cli.deferred. A library that has not what they need is used as it is."""
