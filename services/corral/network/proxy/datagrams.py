"""UDP: each address that datagrams come from has a socket of its own towards the target, until it is long silent."""

import contextlib
import socket
import time
from collections import OrderedDict

from corral.network.proxy.loop import READ, Loop
from corral.network.proxy.wire import Target

SILENT_S = 90.0  # as with docker's proxy
MOST_FLOWS = 1024  # of a port; then the one that was silent for longest makes room
_LOOK_S = 10.0
_AT_ONCE = 64
_LONGEST = 1 << 16

type _Source = tuple[str | int, ...]


class DatagramPort:
    """A socket at ::1, and the flows that came by it."""

    def __init__(self, loop: Loop, own: socket.socket, target: Target) -> None:
        self._loop = loop
        self._own = own
        self._target = target
        self._flows: OrderedDict[_Source, _Flow] = OrderedDict()
        self._looks = False
        own.setblocking(False)
        loop.watch(own, READ, self._on_datagrams)

    def lead_to(self, target: Target) -> None:
        """Have another target."""
        if target != self._target:
            self._target = target
            self._cut()

    def close(self) -> None:
        self._loop.watch(self._own, 0, self._on_datagrams)
        self._own.close()
        self._cut()

    def _cut(self) -> None:
        while self._flows:
            self._forget_first()

    def _forget_first(self) -> None:
        _, flow = self._flows.popitem(last=False)
        flow.close()

    def _on_datagrams(self, _events: int) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_AT_ONCE):
                data, source = self._own.recvfrom(_LONGEST)
                with contextlib.suppress(OSError):  # it is lost, as datagrams may be
                    self._flow_of(source).send(data)

    def _flow_of(self, source: _Source) -> "_Flow":
        """Raises OSError."""
        flow = self._flows.get(source)
        if flow is None:
            if len(self._flows) >= MOST_FLOWS:
                self._forget_first()
            flow = self._flows[source] = _Flow(self._loop, self, source, self._target)
            self._look_later()
        self.touch(source)
        return flow

    def touch(self, source: _Source) -> None:
        """Something came, or went."""
        self._flows[source].last = time.monotonic()
        self._flows.move_to_end(source)

    def answer(self, source: _Source, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._own.sendto(data, source)
        self.touch(source)

    def _look_later(self) -> None:
        if not self._looks:
            self._looks = True
            self._loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._looks = False
        while self._flows and next(iter(self._flows.values())).last + SILENT_S < time.monotonic():
            self._forget_first()
        if self._flows:
            self._look_later()


class _Flow:
    def __init__(self, loop: Loop, port: DatagramPort, source: _Source, target: Target) -> None:
        """Raises OSError."""
        self.last = 0.0
        self._loop = loop
        self._port = port
        self._source = source
        self._socket = socket.socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect(target)
            loop.watch(self._socket, READ, self._on_answers)
        except BaseException:
            self._socket.close()
            raise

    def send(self, data: bytes) -> None:
        """Raises OSError."""
        try:
            self._socket.send(data)
        except ConnectionRefusedError:  # the answer to an earlier one
            self._socket.send(data)

    def _on_answers(self, _events: int) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_AT_ONCE):
                self._port.answer(self._source, self._socket.recv(_LONGEST))

    def close(self) -> None:
        self._loop.watch(self._socket, 0, self._on_answers)
        self._socket.close()
