"""A check: what a service has written down, compared with what is there. One way of doing it for all services.

What is on its way looks like what is left over. So whatever is found is looked for again and again for a while, and
only what stays is a finding; and a repair looks once more, under the lock of what it changes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from corral.api.types.v1 import types_pb2
from corral.rpc.errors import CorralError

# Pauses between the looks.
PAUSES_S = (0.1, 0.4, 1.0)
# A repair may bring to light what it hid, and that again.
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Found:
    """One thing that does not fit: its name, what is wrong with it, and what is done about that.

    repair: does it; None if nobody can but the user.
    """

    subject: str
    problem: str
    remedy: str
    repair: Callable[[], Awaitable[object]] | None = field(default=None, compare=False)


type Look = Callable[[], Awaitable[Sequence[Found]]]


async def check(service: str, look: Look, *, repair: bool) -> types_pb2.CheckResponse:
    """What stays wrong; with `repair` it is put right, in the order in which it was found, and looked at again.

    What comes to light only by a repair, since it was hidden by what was repaired, is repaired too.
    """
    found = await settled(look)
    failures: dict[Found, str] = {}
    left, tried = set(found), set[Found]()
    for _ in range(ROUNDS if repair else 0):
        new = [one for one in found if one not in tried]
        if not new:
            break
        for one in new:
            tried.add(one)
            try:
                if one.repair is not None:
                    await one.repair()
            except (CorralError, OSError) as e:
                failures[one] = str(e)
        again = await settled(look)
        left = set(again)
        found += [one for one in again if one not in tried]
    return types_pb2.CheckResponse(
        findings=[_message(service, one, failures.get(one, ""), repaired=one not in left) for one in found]
    )


async def settled(look: Look) -> list[Found]:
    """What every one of several looks finds."""
    found = list(await look())
    for pause_s in PAUSES_S:
        if not found:
            break
        await asyncio.sleep(pause_s)
        again = set(await look())
        found = [one for one in found if one in again]
    return found


def _message(service: str, found: Found, failure: str, *, repaired: bool) -> types_pb2.Finding:
    return types_pb2.Finding(
        service=service,
        subject=found.subject,
        problem=found.problem,
        remedy=found.remedy,
        repaired=repaired,
        failure=failure,
    )
