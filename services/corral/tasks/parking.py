"""Attached clients whose way to us ends while their process goes on: its service, or this one, is executed anew.

Their pipes are kept, with all that is in them and all that comes, until they are back. The process sees nothing of it.
"""

import asyncio
import secrets
from dataclasses import dataclass

from corral.rpc.errors import CorralError, NotFound
from corral.rpc.handover import Kept, keep, readmit
from corral.tasks.attach import Attachment, Wanted
from corral.tasks.model import TaskKey
from corral.tasks.registry import Registry

PURPOSE = "tasks.attachment"
KEEP_S = 60.0


@dataclass(frozen=True, slots=True)
class Parked:
    """An attachment, and whose it is."""

    key: TaskKey
    exec_id: str
    wanted: Wanted
    attachment: Attachment


class Parking:
    """By token. Use from one event loop."""

    def __init__(self, registry: Registry) -> None:
        """With what an earlier program has left to this one."""
        self._parked: dict[str, Parked] = {}
        self._registry = registry
        readmit(PURPOSE, self._readmit)

    def park(self, parked: Parked) -> str:
        """Returns the token."""
        token = secrets.token_hex(16)
        self._keep(token, parked)
        return token

    def take(self, token: str, key: TaskKey, exec_id: str) -> Attachment:
        """Raises NotFound if it was not kept, for this process."""
        parked = self._parked.get(token)
        if parked is None or (parked.key, parked.exec_id) != (key, exec_id):
            raise NotFound(f"container {key.id} has no attachment that waits under that token", reason="NOT_PARKED")
        del self._parked[token]
        parked.attachment.unpark()
        return parked.attachment

    def close(self) -> None:
        """Leave them to the program that may follow."""
        for token, parked in self._parked.items():
            facts: dict[str, str | int] = {
                "token": token,
                "namespace": parked.key.namespace,
                "id": parked.key.id,
                "exec_id": parked.exec_id,
                "stdin_bytes": parked.attachment.stdin_bytes,
                "stdin_is_taken": int(parked.attachment.stdin_is_taken),
                **{name: int(getattr(parked.wanted, name)) for name in Wanted.__slots__},
            }
            keep(Kept(PURPOSE, facts, parked.attachment.fds))
        self._parked.clear()

    def _readmit(self, kept: Kept) -> None:
        facts = kept.facts
        key, exec_id = TaskKey(str(facts["namespace"]), str(facts["id"])), str(facts["exec_id"])
        token, stdin_bytes = str(facts["token"]), int(facts["stdin_bytes"])
        wanted = Wanted(**{name: bool(facts.get(name)) for name in Wanted.__slots__})
        try:
            task = self._registry.get(key)
            process = task.process(exec_id)
        except CorralError:
            kept.close()
            return
        attachment = Attachment.again(task, process, wanted, kept.fds, stdin_bytes)
        attachment.stdin_is_taken = bool(facts.get("stdin_is_taken"))
        self._keep(token, Parked(key, exec_id, wanted, attachment))

    def _keep(self, token: str, parked: Parked) -> None:
        self._parked[token] = parked
        asyncio.get_running_loop().call_later(KEEP_S, self._forget, token)

    def _forget(self, token: str) -> None:
        if (parked := self._parked.pop(token, None)) is not None:
            parked.attachment.close()
