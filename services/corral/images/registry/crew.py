"""Tasks that succeed together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def crew() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error is raised as it is: when one fails, the others and the block are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from e.exceptions[0].__cause__
