"""Threads that take one function after the other."""

import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from corral.rpc.threads import Threads, Work

WAIT_S = 10.0


def untold(do: Callable[[], object]) -> Work:
    """Work that nobody waits for."""

    def work() -> Callable[[], object]:
        do()
        return lambda: None

    return work


def ran_by(threads: Threads) -> str:
    """The name of the thread that takes what is submitted now; it is idle again, or nearly."""
    names: SimpleQueue[str] = SimpleQueue()
    threads.submit(untold(lambda: names.put(threading.current_thread().name)))
    return names.get(timeout=WAIT_S)


def until_idle(threads: Threads, number: int) -> None:
    while len(threads._idle) < number:
        threading.Event().wait(0.001)


def test_one_after_the_other_is_the_work_of_one_thread() -> None:
    threads = Threads(4, "one")
    found = set()
    for _ in range(20):
        found.add(ran_by(threads))
        until_idle(threads, 1)
    assert found == {"one_0"}


def test_who_hears_of_its_end_may_give_a_thread_more() -> None:
    threads, names = Threads(4, "same"), SimpleQueue[str]()

    def more(left: int) -> Callable[[], object]:
        names.put(threading.current_thread().name)
        return (lambda: threads.submit(lambda: more(left - 1))) if left else (lambda: None)

    threads.submit(lambda: more(5))
    assert {names.get(timeout=WAIT_S) for _ in range(6)} == {"same_0"}


def test_who_became_idle_last_works_next() -> None:
    threads, go, done = Threads(2, "two"), [threading.Event(), threading.Event()], SimpleQueue[int]()
    for number in (0, 1):
        threads.submit(untold(lambda number=number: (go[number].wait(WAIT_S), done.put(number))))  # type: ignore[misc]
    for number in (1, 0):
        go[number].set()
        assert done.get(timeout=WAIT_S) == number
        until_idle(threads, 2 - number)
    assert ran_by(threads) == "two_0"


def test_more_than_there_are_threads_wait_their_turn() -> None:
    threads, lock = Threads(2, "few"), threading.Lock()
    order: SimpleQueue[int] = SimpleQueue()
    busy = most = 0
    go = threading.Event()

    def work(number: int) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        go.wait(WAIT_S)
        order.put(number)
        with lock:
            busy -= 1

    for number in range(50):
        threads.submit(untold(lambda number=number: work(number)))  # type: ignore[misc]
    go.set()
    assert sorted(order.get(timeout=WAIT_S) for _ in range(50)) == list(range(50))
    assert most == 2


PROGRAM = """
import time
from corral.rpc.threads import Threads
threads = Threads(2, "last")
threads.submit(lambda: int)
threads.submit(lambda: (time.sleep(0.3), print("done", flush=True), int)[2])
"""


def test_what_was_begun_is_done_when_the_program_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=30)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


class Thing:
    """Can be looked for."""


def test_what_came_of_work_is_not_kept_by_an_idle_thread() -> None:
    made = [Thing()]
    seen, threads = weakref.ref(made[0]), Threads(2, "kept")
    threads.submit(lambda: partial(id, made.pop()))
    for _ in range(2):  # the second begins when all is over with the first
        assert ran_by(threads) == "kept_0"
        until_idle(threads, 1)
    assert seen() is None


def test_who_cannot_be_told_costs_no_thread() -> None:
    threads = Threads(1, "untold")

    def fail() -> None:
        raise OSError

    threads.submit(lambda: fail)
    assert ran_by(threads) == "untold_0"
