"""Modules that the command's libraries import but that hardly any verb uses: each is loaded once it is used.

Of some they use a function or two that are small: these are here, and such a module is loaded for what else it has.

They are a third of what `corral ps` would load. The interpreter's own LazyLoader loads a module when it is imported
for the second time, as most are, and not when it is used.
"""

import _signal  # type: ignore[import-not-found]  # the part in C, which is there already
import sys
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock, current_thread, main_thread
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader

DEFERRED = frozenset(
    {
        # For calls with many requests or answers, those to another host, and those that fail.
        "grpc",
        "corral.rpc.attempts",
        "corral.rpc.errors",
        # For calls with one answer.
        "corral.client.http2",
        # gRPC's form for asyncio, and what its library imports for that alone.
        "asyncio",
        "grpc.aio",
        "pkgutil",
        "socket",
        # protobuf's messages in Python, in place of which there are those in C; with them go pickle and a text format.
        "google.protobuf.internal.python_message",
        "calendar",
        # For --format json.
        "json",
        # Of these, logging and click use what shows an exception, and what indents a text.
        "ast",
        "tokenize",
        "traceback",
        # See STAND_INS.
        "gettext",
        "inspect",
    }
)
OF_MESSAGES = frozenset(
    {
        "google.protobuf.descriptor",
        "google.protobuf.descriptor_pool",
        "google.protobuf.symbol_database",
        "google.protobuf.internal.builder",
    }
)
"""For these corral.cli.messages has stand-ins, where protobuf's messages are those in C."""


def cleandoc(doc: str) -> str:
    """What inspect.cleandoc() makes of a docstring."""
    first, *rest = doc.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip(" ")), default=0)
    return "\n".join((first.lstrip(" "), *(line[margin:] for line in rest))).strip("\n")


def isfunction(value: object) -> bool:
    """Whether it was made by def or lambda."""
    return isinstance(value, FunctionType)


def gettext(message: str) -> str:
    """What click says is said as it is: it brings no translations, and looks for some at every word."""
    return message


def ngettext(one: str, many: str, n: int) -> str:
    """gettext() of one or many."""
    return one if n == 1 else many


STAND_INS: "dict[tuple[str, str], Callable[..., object]]" = {
    ("inspect", "cleandoc"): cleandoc,
    ("inspect", "isfunction"): isfunction,
    ("gettext", "gettext"): gettext,
    ("gettext", "ngettext"): ngettext,
}
"""By module and name."""


def _has_stubs(module: str) -> bool:
    """Instead of which there are those of corral.cli.stubs: they load gRPC's library, and make what nobody calls."""
    return module.startswith("corral.api.") and module.endswith("_pb2_grpc")


def _stand_in(module: str, name: str) -> object:
    """None if there is none."""
    if module in OF_MESSAGES:
        from corral.cli import messages

        return messages.STAND_INS.get((module, name))
    if name.endswith("Stub") and _has_stubs(module):
        from corral.cli.stubs import stub

        return stub(module, name)
    return STAND_INS.get((module, name))


def _is_deferred(module: str) -> bool:
    if module in OF_MESSAGES:
        from google.protobuf.internal import api_implementation

        return api_implementation.Type() == "upb"
    return module in DEFERRED or _has_stubs(module)


class _Loader:
    """Leaves a module empty until it is used."""

    def __init__(self, loader: "Loader") -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Deferred


class _Deferred(ModuleType):
    def __getattribute__(self, name: str) -> object:
        """Loads it, unless it is only imported again. Another thread waits, what it imports itself does not."""
        get = super().__getattribute__
        spec = get("__spec__")
        if name == "__spec__":
            return spec
        if stand_in := _stand_in(spec.name, name):
            return stand_in
        if name == "__path__" and spec.submodule_search_locations is None:  # `from gettext import gettext` asks for it
            raise AttributeError(name=name, obj=self)
        with spec.loader_state:
            if isinstance(spec.loader, _Loader):
                _uninterrupted(lambda: _load(self, spec, spec.loader))
        return get(name)


def _load(module: ModuleType, spec: ModuleSpec, deferring: _Loader) -> None:
    """What cannot be loaded now is loaded at its next use."""
    spec.loader = module.__loader__ = deferring.loader
    try:
        deferring.loader.exec_module(module)
    except BaseException:
        spec.loader = module.__loader__ = deferring  # type: ignore[assignment]
        raise
    module.__class__ = ModuleType


def _uninterrupted(load: "Callable[[], None]") -> None:
    """Ctrl-C has its effect afterwards: what failures are told by may be just what is loaded.

    It interrupts the main thread, whichever thread the signal came to, so that to block it would not do.
    """
    interrupt = _signal.default_int_handler
    if current_thread() is not main_thread() or _signal.getsignal(_signal.SIGINT) is not interrupt:
        return load()
    came: list[int] = []
    _signal.signal(_signal.SIGINT, lambda number, _: came.append(number))
    try:
        load()
    finally:
        _signal.signal(_signal.SIGINT, interrupt)
        if came:
            raise KeyboardInterrupt


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: "Sequence[str] | None" = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As the interpreter finds it, but for the loader."""
        if not _is_deferred(name):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # by its methods it is one
            spec.loader_state = RLock()
        return spec


def defer() -> None:
    """From now on."""
    sys.meta_path.insert(0, _Finder)
