"""Many containers write numbered lines while their daemon is killed every second: no line is missing or there twice."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from support.corrald import Corrald
from support.sweep import forgotten

from crash.excuses import Excuses
from crash.load import Text
from crash.tally import Tally
from crash.worker import Worker

THREADS = 8
EVERY_S = 1.0
BURST, PAUSE_S = 10, 2.0


class Writers(Worker):
    """Not a thread, but what one does: it makes containers that write, and reads what they wrote."""

    kind = "writer"

    def make(self, name: str, text: Text) -> None:
        self.create(name, text.args)
        self.begin(name)

    def check(self, name: str, text: Text) -> None:
        status = self.wait(name)
        self.check_code(name, status, text.code)
        self.check_log(name, status, stdout=text.stdout, stderr=text.stderr)
        self.remove(name)


def kill_under_lines(daemon: Corrald, tally: Tally, *, containers: int, seconds: int) -> list[str]:
    """Returns what is left in the end. Lines go on for as long as there are kills, and a little longer."""
    texts = {
        f"lines-{number}": Text((seconds + 5) * BURST // int(PAUSE_S), number % 256, every=BURST, pause_s=PAUSE_S)
        for number in range(containers)
    }
    with _writers(daemon, tally) as writers, ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda each, writer: writer.make(*each), texts.items(), _endless(writers)))
        began = time.monotonic()
        for number in range(1, seconds + 1):
            time.sleep(max(0.0, began + number * EVERY_S - time.monotonic()))
            daemon.kill9()
            daemon.launch()  # it is killed a second from now, whether it is ready by then or not
            tally.add("kills")
        daemon.kill9()
        daemon.start()
        list(pool.map(lambda each, writer: writer.check(*each), texts.items(), _endless(writers)))
    tally.add("lines", sum(2 * text.lines for text in texts.values()))
    return forgotten(daemon)


@contextmanager
def _writers(daemon: Corrald, tally: Tally) -> Iterator[list[Writers]]:
    import threading

    stop, excuses = threading.Event(), Excuses()
    with ExitStack() as stack:
        writers = [Writers(n, daemon, tally, excuses, stop, seed=0) for n in range(THREADS)]
        for writer in writers:
            stack.enter_context(writer.client)
        yield writers


def _endless(writers: list[Writers]) -> Iterator[Writers]:
    return itertools.cycle(writers)
