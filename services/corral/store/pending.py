"""A write that waits for its turn, and the one who waits for it."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from corral.store.database import Transaction


class Pending:
    """One function for the writer thread. Its outcome is kept until settle(): nobody may learn of a result that is not
    committed yet."""

    def __init__(
        self,
        fn: "Callable[[Transaction], object]",
        begin: Callable[[], bool],
        deliver: "Callable[[object, BaseException | None], None]",
    ) -> None:
        self._fn = fn
        self._context = contextvars.copy_context()
        self._deliver = deliver
        self._result: object = None
        self._error: BaseException | None = None
        self.begin = begin
        self.durable: bool | None = None  # as the database is

    @classmethod
    def for_thread[T](cls, fn: "Callable[[Transaction], T]") -> tuple[Self, Future[T]]:
        """For a caller that blocks on the future."""
        future: Future[Any] = Future()

        def deliver(result: object, error: BaseException | None) -> None:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        return cls(fn, future.set_running_or_notify_cancel, deliver), future

    @classmethod
    def for_loop[T](cls, fn: "Callable[[Transaction], T]") -> "tuple[Self, asyncio.Future[T]]":
        """For a caller that awaits the future on the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def set_outcome(result: object, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def deliver(result: object, error: BaseException | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(set_outcome, result, error)

        return cls(fn, lambda: not future.cancelled(), deliver), future

    def run(self, transaction: "Transaction") -> None:
        self._result = self._context.run(self._fn, transaction)

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error

    def settle(self) -> None:
        """Tell the one who waits."""
        self._deliver(self._result, self._error)
