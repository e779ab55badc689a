"""Output, input, terminals, logs and further processes of containers, over gRPC."""

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from support.engine import EngineClient, everything
from support.engine_fixtures import engine, loaded
from support.requirements import needs

from corral.api.engine.v1 import engine_pb2 as pb
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1.types_pb2 import WindowSize
from corral.rpc.errors import AlreadyExists, CorralError, FailedPrecondition, InvalidArgument, NotFound

__all__ = ["engine", "loaded"]
pytestmark = needs("root", "overlayfs", "busybox", "netns")

MIB = 1 << 20


def stdin(data: bytes) -> tasks_pb2.AttachRequest:
    return tasks_pb2.AttachRequest(stdin=data)


async def test_attached_before_the_start_a_client_sees_every_byte_and_then_the_exit(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", "echo out; echo err >&2; exit 3", name="chatty")
    streams = {"stdout": b"", "stderr": b""}
    async with engine.attached("chatty") as call:
        await engine.start(id_)
        while isinstance(response := await call.read(), tasks_pb2.AttachResponse):
            kind = response.WhichOneof("part")
            if kind == "exited":
                assert response.exited.code == 3
            else:
                streams[str(kind)] += getattr(response, str(kind))
    assert streams == {"stdout": b"out\n", "stderr": b"err\n"}


async def test_several_clients_see_the_same(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", "for i in 1 2 3 4 5; do echo $i; done")
    async with engine.attached(id_) as first, engine.attached(id_[:10]) as second:
        await engine.start(id_)
        assert await everything(first) == await everything(second) == b"1\n2\n3\n4\n5\n"


async def test_stdin_reaches_the_process_and_its_end_too(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", "cat; echo end", stdin=True, stdin_once=True)
    async with engine.attached(id_, stdin=True) as call:
        await engine.start(id_)
        await call.write(stdin(b"hello "))
        await call.write(stdin(b"world\n"))
        await call.done_writing()
        assert await everything(call) == b"hello world\nend\n"


async def test_binary_data_goes_through_untouched_in_both_directions(engine: EngineClient) -> None:
    data = os.urandom(8 * MIB)
    id_ = await engine.create("cat", stdin=True, stdin_once=True)
    async with engine.attached(id_, stdin=True) as call:
        await engine.start(id_)

        async def send() -> None:
            for at in range(0, len(data), MIB):
                await call.write(stdin(data[at : at + MIB]))
            await call.done_writing()

        sending = asyncio.ensure_future(send())
        received = await everything(call)
        await sending
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


async def test_a_terminal_has_a_size_that_can_change(engine: EngineClient) -> None:
    script = "stty size; trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    id_ = await engine.create(
        "sh", "-c", script, terminal=True, stdin=True, console_size=WindowSize(width=100, height=30)
    )
    async with engine.attached(id_, stdin=True) as call:
        await engine.start(id_)
        output = b""
        while b"ready" not in output:
            output += (await call.read()).stdout
        assert b"30 100" in output
        size = WindowSize(width=120, height=40)
        await engine.containers.Resize(pb.ResizeContainerRequest(container=id_, size=size))
        assert b"40 120" in await everything(call)


async def test_what_a_client_detaches_from_goes_on(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", "while :; do echo x; sleep 0.01; done")
    async with engine.attached(id_) as call:
        await engine.start(id_)
        await call.read()
    await asyncio.sleep(0.1)
    assert (await engine.get(id_)).status == pb.STATUS_RUNNING


async def test_attach_says_what_is_wrong(engine: EngineClient) -> None:
    with pytest.raises(NotFound, match="no such container: nobody"):
        async with engine.attached("nobody"):
            pass
    call = engine.containers.Attach()
    await call.write(stdin(b"x"))
    with pytest.raises(InvalidArgument, match="header"):
        await call.read()


async def test_logs_hold_both_streams_and_can_be_followed(engine: EngineClient) -> None:
    id_ = await engine.run("sh", "-c", "echo one; echo two >&2; sleep 0.3; echo three")
    lines = [
        (entry.stream, entry.line)
        async for response in engine.containers.Logs(tasks_pb2.LogsRequest(id=id_[:12], follow=True))
        for entry in response.entries
    ]
    out, err = tasks_pb2.LogEntry.STREAM_STDOUT, tasks_pb2.LogEntry.STREAM_STDERR
    assert sorted(lines) == sorted([(out, b"one\n"), (err, b"two\n"), (out, b"three\n")])
    tail = [
        entry.line
        async for response in engine.containers.Logs(tasks_pb2.LogsRequest(id=id_, tail=1))
        for entry in response.entries
    ]
    assert tail == [b"three\n"]


async def test_a_container_that_removes_itself_is_read_to_the_end_first(engine: EngineClient) -> None:
    id_ = await engine.create("sh", "-c", "seq 1 20000", auto_remove=True)
    async with engine.attached(id_) as call:
        await engine.start(id_)
        await asyncio.sleep(0.5)
        output = await everything(call)
    assert output == b"".join(b"%d\n" % number for number in range(1, 20001))


# Exec


async def test_exec_tells_output_and_exit_code(engine: EngineClient) -> None:
    await engine.run("sleep", "100", name="host", env=["A=1"], working_dir="/etc")
    assert await engine.exec("host", "sh", "-c", "echo $A $B; pwd; exit 4", env=["B=2"]) == (4, b"1 2\n/etc\n")
    assert await engine.exec("host", "pwd", working_dir="/tmp") == (0, b"/tmp\n")
    assert (await engine.exec("host", "id", "-u", user="1000:1000"))[1] == b"1000\n"


async def test_exec_has_a_terminal_and_input_if_asked(engine: EngineClient) -> None:
    await engine.run("sleep", "100", name="host")
    request = pb.ExecContainerRequest(container="host", args=["sh", "-c", "tty; cat"], terminal=True, stdin=True)
    made = await engine.containers.Exec(request)
    async with engine.attached(made.id, exec_id=made.exec_id, stdin=True) as call:
        await engine.containers.ExecStart(pb.ExecStartRequest(container="host", exec_id=made.exec_id))
        await call.write(stdin(b"hi\n\x04"))
        output = await everything(call)
    assert b"/dev/pts/0" in output
    assert b"hi\r\n" in output


def exec_header(*args: str, **process: object) -> pb.ExecRunRequest:
    request = pb.ExecContainerRequest(container="host", args=args, **process)  # type: ignore[arg-type]
    return pb.ExecRunRequest(header=pb.ExecRunHeader(process=request, stdout=True, stderr=True, lossless=True))


async def no_execs(engine: EngineClient) -> bool:
    async with asyncio.timeout(5):
        while (await engine.get("host")).exec_ids:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.01)
    return True


async def test_an_exec_in_one_call_tells_all_and_is_forgotten(engine: EngineClient) -> None:
    await engine.run("sleep", "100", name="host")
    call = engine.containers.ExecRun()
    await call.write(exec_header("sh", "-c", "cat; echo bad >&2; exit 4", stdin=True))
    attached = (await call.read()).attached
    os.kill(attached.pid, 0)
    assert list((await engine.get("host")).exec_ids) == [attached.exec_id]
    await call.write(pb.ExecRunRequest(stdin=b"in\n"))
    await call.done_writing()
    parts = []
    while isinstance(part := await call.read(), tasks_pb2.AttachResponse):
        parts.append(part)
    assert b"".join(part.stdout for part in parts) == b"in\n"
    assert b"".join(part.stderr for part in parts) == b"bad\n"
    assert parts[-1].exited.code == 4
    assert await no_execs(engine)


@pytest.mark.parametrize(("program", "reason"), [("nosuch", "EXEC_NOT_FOUND"), ("/etc", "EXEC_DENIED")])
async def test_an_exec_in_one_call_that_cannot_run_says_why_and_is_forgotten(
    engine: EngineClient, program: str, reason: str
) -> None:
    await engine.run("sleep", "100", name="host")
    call = engine.containers.ExecRun()
    await call.write(exec_header(program))
    with pytest.raises(CorralError) as raised:
        await call.read()
    assert raised.value.reason == reason
    assert await no_execs(engine)


async def test_the_process_of_an_exec_in_one_call_goes_on_when_its_client_leaves(engine: EngineClient) -> None:
    await engine.run("sleep", "100", name="host")
    call = engine.containers.ExecRun()
    await call.write(exec_header("sh", "-c", "sleep 0.5; echo done > /tmp/done; while test -e /tmp/done; do :; done"))
    await call.read()
    call.cancel()
    await asyncio.sleep(1)
    assert (await engine.exec("host", "cat", "/tmp/done")) == (0, b"done\n")
    assert len((await engine.get("host")).exec_ids) >= 1
    assert (await engine.exec("host", "rm", "/tmp/done"))[0] == 0
    assert await no_execs(engine)


async def test_an_exec_in_one_call_whose_client_leaves_at_once_is_forgotten(engine: EngineClient) -> None:
    """Wherever its making is by then."""
    await engine.run("sleep", "100", name="host")
    for i in range(20):
        call = engine.containers.ExecRun()
        await call.write(exec_header("true"))
        await asyncio.sleep(i / 1000)
        call.cancel()
    await asyncio.sleep(0.5)
    assert await no_execs(engine)


async def test_an_exec_in_one_call_begins_with_its_header(engine: EngineClient) -> None:
    call = engine.containers.ExecRun()
    await call.write(pb.ExecRunRequest(stdin=b"x"))
    with pytest.raises(InvalidArgument, match="header"):
        await call.read()


@pytest.mark.parametrize(("program", "reason"), [("nosuch", "EXEC_NOT_FOUND"), ("/etc", "EXEC_DENIED")])
async def test_an_exec_that_cannot_run_says_why(engine: EngineClient, program: str, reason: str) -> None:
    await engine.run("sleep", "100", name="host")
    made = await engine.containers.Exec(pb.ExecContainerRequest(container="host", args=[program]))
    with pytest.raises(CorralError) as raised:
        await engine.containers.ExecStart(pb.ExecStartRequest(container="host", exec_id=made.exec_id))
    assert raised.value.reason == reason


async def test_exec_needs_a_running_container_a_command_and_a_free_id(engine: EngineClient) -> None:
    id_ = await engine.create("sleep", "100")
    with pytest.raises(FailedPrecondition, match="not running"):
        await engine.exec(id_, "true")
    await engine.start(id_)
    with pytest.raises(InvalidArgument, match="nothing to run"):
        await engine.exec(id_)
    await engine.containers.Exec(pb.ExecContainerRequest(container=id_, exec_id="mine", args=["sleep", "9"]))
    assert list((await engine.get(id_)).exec_ids) == ["mine"]
    with pytest.raises(AlreadyExists):
        await engine.containers.Exec(pb.ExecContainerRequest(container=id_, exec_id="mine", args=["true"]))


async def test_a_privileged_exec_has_what_its_container_lacks(engine: EngineClient) -> None:
    await engine.run("sleep", "100", name="host", cap_drop=["ALL"])
    held = (await engine.exec("host", "sh", "-c", "grep CapEff /proc/self/status"))[1]
    more = (await engine.exec("host", "sh", "-c", "grep CapEff /proc/self/status", privileged=True))[1]
    assert held == b"CapEff:\t0000000000000000\n"
    assert int(more.split()[1], 16) & 1 << 21, "CAP_SYS_ADMIN"


def cpu_s(engine: EngineClient) -> float:
    """What the daemon's processes have used so far."""
    ticks = 0
    for process in engine.daemon.processes.values():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def test_output_passes_the_engine_at_full_speed(engine: EngineClient) -> None:
    """A floor far below the aim of 300 MB/s, in time on a processor: it catches a stream that is parsed or copied."""
    size = 256 * MIB
    id_ = await engine.create("sh", "-c", f"dd if=/dev/zero bs=1M count={size // MIB} 2>/dev/null")
    received = 0
    async with engine.attached(id_) as call:
        await engine.start(id_)
        began_s = cpu_s(engine)
        while isinstance(response := await call.read(), tasks_pb2.AttachResponse):
            received += len(response.stdout)
        seconds = cpu_s(engine) - began_s
    assert received == size
    print(f"{size / seconds / 1e6:.0f} MB/s")
    assert size / seconds > 40e6
