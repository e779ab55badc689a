"""The same for each of several names at once, as docker does."""

import threading
from collections.abc import Callable, Iterator, Sequence

MOST_AT_ONCE = 16


class _Call[T]:
    def __init__(self, act: Callable[[str], T], name: str) -> None:
        self._act, self._name = act, name
        self._ended = threading.Event()
        self._answers: list[T] = []
        self._error: BaseException | None = None

    def make(self) -> None:
        try:
            self._answers.append(self._act(self._name))
        except BaseException as e:  # noqa: BLE001 - for who asks for the answer
            self._error = e
        self._ended.set()

    def answer(self) -> T:
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._answers[0]


def side_by_side[T](names: Sequence[str], act: Callable[[str], T]) -> Iterator[Callable[[], T]]:
    """By name in their order, what waits for the answer, or raises what `act` has raised."""
    calls = [_Call(act, name) for name in names]
    left = iter(calls)
    taking = threading.Lock()

    def work() -> None:
        while True:
            with taking:
                call = next(left, None)
            if call is None:
                return
            call.make()

    for _ in calls[:MOST_AT_ONCE]:
        threading.Thread(target=work, daemon=True).start()
    for call in calls:
        yield call.answer
