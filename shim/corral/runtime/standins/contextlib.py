"""A stand-in for contextlib: contextmanager, suppress, closing, nullcontext and ExitStack."""

from __future__ import annotations

from corral.runtime.standins import standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType
    from typing import Any, Self

    type _Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], object]


class _Block:
    """A block whose beginning and end are one generator."""

    def __init__(self, generator: Generator[Any, None, None]) -> None:
        self._generator = generator

    def __enter__(self) -> Any:
        try:
            return next(self._generator)
        except StopIteration:
            raise RuntimeError("generator didn't yield") from None

    def __exit__(self, _kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if error is None:
            if next(self._generator, self) is not self:
                raise RuntimeError("generator didn't stop")
            return False
        try:
            self._generator.throw(error)
        except StopIteration as e:
            return e is not error
        except BaseException as e:
            # A StopIteration of the block comes out of the generator as the cause of a RuntimeError.
            if e is not error and not (isinstance(error, StopIteration) and e.__cause__ is error):
                raise
            error.__traceback__ = traceback
            return False
        raise RuntimeError("generator didn't stop after throw()")


def contextmanager(function: Callable[..., Generator[Any, None, None]]) -> Callable[..., _Block]:
    """Make a block of a generator function: what is before its yield is the beginning, the rest the end."""

    def begin(*args: object, **members: object) -> _Block:
        return _Block(function(*args, **members))

    return begin


class suppress:  # noqa: N801 - the names are those of contextlib
    """A block that ends quietly at one of these exceptions."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        """Name them."""
        self._kinds = kinds

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, _error: object, _traceback: object) -> bool:
        """Whether it was one of them."""
        return kind is not None and issubclass(kind, self._kinds)


class closing:  # noqa: N801
    """A block at whose end a thing is closed."""

    def __init__(self, thing: Any) -> None:
        """Take it."""
        self._thing = thing

    def __enter__(self) -> Any:
        """The thing."""
        return self._thing

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._thing.close()


class nullcontext:  # noqa: N801
    """A block, no more."""

    def __init__(self, enter_result: Any = None) -> None:
        """Take what `as` gives."""
        self._result = enter_result

    def __enter__(self) -> Any:
        """That."""
        return self._result

    def __exit__(self, *_: object) -> None:
        """Nothing to do."""


class ExitStack:
    """A block at whose end several others end, and functions are called, the last one first."""

    def __init__(self) -> None:
        """None yet."""
        self._exits: list[_Exit] = []

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def enter_context(self, block: Any) -> Any:
        """Begin a block, and end it in the end."""
        result = block.__enter__()
        self._exits.append(block.__exit__)
        return result

    def callback(self, function: Callable[..., object], /, *args: object, **members: object) -> None:
        """Call a function in the end."""

        def call(*_: object) -> None:
            function(*args, **members)

        self._exits.append(call)

    def pop_all(self) -> ExitStack:
        """Hand all that is to be done over to a new one."""
        other = type(self)()
        vars(other)["_exits"], self._exits = self._exits, []
        return other

    def close(self) -> None:
        """Do it now."""
        self.__exit__(None, None, None)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        """Do it all, whatever of it fails; what failed last is raised, with what was being handled as its context."""
        received = error
        while self._exits:
            try:
                if self._exits.pop()(*_about(error)):
                    error = None
            except BaseException as e:  # noqa: BLE001 - it is raised in the end
                if e is not error and e.__context__ is None:
                    e.__context__ = error
                error = e
        if error is not None and error is not received:
            raise error
        return received is not None and error is None


def _about(
    error: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


__getattr__ = standard("contextlib")
