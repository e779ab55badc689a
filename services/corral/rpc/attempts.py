"""When a call may be made again, because nobody has begun to serve it, and what to wait before."""

from corral.rpc.errors import CONNECTION_ENDED, PAUSES_S, UNSERVED, CorralError


class Attempts:
    """At one call."""

    def __init__(self) -> None:
        self._pauses = iter(PAUSES_S)
        self._refused = False

    def pause_s(self, e: CorralError) -> float:
        """Before the next attempt. Raises `e` if there is to be none."""
        pause_s = self.pause_if_unserved_s(e)
        if pause_s is None:
            raise e
        return pause_s

    def pause_if_unserved_s(self, e: CorralError) -> float | None:
        """The same, None if there is to be none.

        Who has refused a call by an answer serves nothing any more, and then ends the connection, perhaps without a
        word. Once that has ended there is another server, which may have begun what it does not answer.
        """
        ended = e.metadata.get("connection") == CONNECTION_ENDED
        if e.reason != UNSERVED and not (self._refused and ended):
            return None
        self._refused = not ended
        return next(self._pauses, None)
