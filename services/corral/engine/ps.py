"""A container's processes as ps(1) of the host tells them, with what options a user gives, as docker's top does.

ps is asked for these processes alone (-q). Some options exclude that; then it is asked for what they choose. In either
case the rows of others are left out by the column PID, which has to be there.
"""

import asyncio
import contextlib
import re
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Collection, Iterator, Sequence

from corral.api.engine.v1.engine_pb2 import ProcessRow, TopResponse
from corral.rpc.errors import FailedPrecondition, InvalidArgument

PATIENCE_S = 10.0
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "COLUMNS": "65536"}
_RENAMED = re.compile(r"\w+=.*PID", re.IGNORECASE)
"""A column with a name of the user's, who could call any of them PID. Source: moby, daemon/top_unix.go."""


async def table(pids: Collection[int], options: Sequence[str]) -> TopResponse:
    """Raises InvalidArgument for options that ps does not take, FailedPrecondition if the host has no ps."""
    if any("\0" in option for option in options):
        raise InvalidArgument("ps does not take these options: there is a NUL in them", reason="BAD_OPTIONS")
    if any(_RENAMED.search(option) for option in options):
        raise InvalidArgument("a column cannot be called PID beside the real one", reason="BAD_OPTIONS")
    # With nobody left to look for, 0 is nobody's: ps wants one.
    code, output, _ = await _run([*options, f"-q{','.join(map(str, pids or [0]))}"])
    if code and output.count("\n") != 1:  # titles alone: all have ended by now
        code, output, complaint = await _run(options)
        if code:
            raise InvalidArgument(f"ps does not take these options: {_first_line(complaint)}", reason="BAD_OPTIONS")
    titles, *rows = _split(output)
    if "PID" not in titles:
        raise InvalidArgument("the column PID has to be among what ps shows", reason="BAD_OPTIONS")
    kept = _of(pids, rows, titles.index("PID"))
    return TopResponse(titles=titles, rows=[ProcessRow(fields=row) for row in kept])


async def _run(arguments: Sequence[str]) -> tuple[int, str, str]:
    try:
        process = await asyncio.create_subprocess_exec(
            "ps", *arguments, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=_ENVIRONMENT
        )
    except FileNotFoundError as e:
        raise FailedPrecondition("this host has no ps: install procps, or leave the options out", reason="NO_PS") from e
    except OSError as e:
        raise InvalidArgument(f"ps cannot be run with these options: {e.strerror}", reason="BAD_OPTIONS") from e
    try:
        async with asyncio.timeout(PATIENCE_S):
            output, complaint = await process.communicate()
    except TimeoutError as e:
        raise InvalidArgument(f"ps did not end within {PATIENCE_S:.0f} s", reason="BAD_OPTIONS") from e
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace"), complaint.decode(errors="replace")


def _split(output: str) -> list[list[str]]:
    """Titles and rows, the last column with all that is left of the line."""
    lines = [line for line in output.split("\n") if line.strip()]
    if not lines:
        raise InvalidArgument("ps shows nothing with these options", reason="BAD_OPTIONS")
    titles = lines[0].split()
    return [titles, *(line.split(None, len(titles) - 1) for line in lines[1:])]


def _of(pids: Collection[int], rows: Sequence[list[str]], column: int) -> Iterator[list[str]]:
    """Those of these processes; a thread, whose pid is "-", is of the process above it."""
    ours = False
    for row in rows:
        if len(row) > column and row[column] != "-":
            ours = row[column].isdecimal() and int(row[column]) in pids
        if ours:
            yield row


def _first_line(complaint: str) -> str:
    return next((line.strip() for line in complaint.split("\n") if line.strip()), "it says nothing")
