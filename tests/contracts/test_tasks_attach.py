"""Bytes to and from processes over gRPC: complete, in order, and with the exit after them."""
# ruff: noqa: ASYNC110 (these tests wait for the kernel, and share their loop with nobody)

import asyncio
import hashlib
import os
import socket
from pathlib import Path

import pytest
from support.corrald import Corrald
from support.requirements import needs
from support.tasks import Attached, TaskClient

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.api.types.v1 import types_pb2 as types_pb
from corral.rpc.errors import FailedPrecondition, InvalidArgument, NotFound

pytestmark = needs("root", "busybox")


def open_files(daemon: Corrald) -> int:
    return len(list(Path(f"/proc/{daemon.processes['corrald'].pid}/fd").iterdir()))


async def test_who_attaches_before_start_gets_all_and_the_exit_last(tasks: TaskClient):
    task_id = await tasks.create("sh", "-c", "echo out; echo err >&2; exit 3")
    async with tasks.attached(task_id, stdout=True, stderr=True) as attached:
        assert not attached.terminal
        await tasks.start(task_id)
        exited = await attached.drain()
    assert (bytes(attached.stdout), bytes(attached.stderr), exited.code) == (b"out\n", b"err\n", 3)


async def test_binary_data_passes_untouched_both_ways(tasks: TaskClient):
    data = os.urandom(5 << 20) + bytes(range(256))
    task_id = await tasks.create("cat", stdin=True, stdin_once=True)
    async with tasks.attached(task_id, stdin=True, stdout=True, lossless=True) as attached:
        await tasks.start(task_id)

        async def feed() -> None:
            for start in range(0, len(data), 700_001):
                await attached.send(data[start : start + 700_001])
            await attached.end_stdin()

        feeding = asyncio.create_task(feed())
        exited = await attached.drain()
        await feeding
    assert exited.code == 0
    assert hashlib.sha256(attached.stdout).digest() == hashlib.sha256(data).digest()


async def test_a_slow_lossless_client_loses_nothing_and_makes_the_process_wait(tasks: TaskClient):
    task_id = await tasks.create("sh", "-c", "yes 0123456789abcde | head -c 64000000")
    async with tasks.attached(task_id, stdout=True, lossless=True) as attached:
        await tasks.start(task_id)
        await asyncio.sleep(0.7)
        assert (await tasks.get(task_id)).status == pb.STATUS_RUNNING  # it waits: nobody holds 64 MB for us
        exited = await attached.drain()
    assert exited.code == 0
    assert len(attached.stdout) == 64_000_000
    assert attached.stdout == b"0123456789abcde\n" * 4_000_000


async def test_a_slow_client_that_may_lose_bytes_does_not_make_it_wait(tasks: TaskClient):
    task_id = await tasks.create(
        "sh", "-c", "yes | head -c 64000000", log=pb.LogOptions(driver=pb.LogOptions.DRIVER_NONE)
    )
    async with tasks.attached(task_id, stdout=True):
        await tasks.start(task_id)
        async with asyncio.timeout(20):
            assert (await tasks.wait(task_id)).code == 0


async def test_all_clients_see_the_same(tasks: TaskClient):
    task_id = await tasks.create("sh", "-c", "seq 20000")
    async with (
        tasks.attached(task_id, stdout=True, lossless=True) as one,
        tasks.attached(task_id, stdout=True, lossless=True) as two,
        tasks.attached(task_id, stderr=True) as nothing,
    ):
        await tasks.start(task_id)
        await asyncio.gather(one.drain(), two.drain(), nothing.drain())
    assert one.stdout == two.stdout
    assert one.stdout.endswith(b"\n20000\n")
    assert not nothing.stdout
    assert not nothing.stderr


async def test_stdin_ends_with_the_request_stream_or_stays_open_for_the_next_client(tasks: TaskClient):
    task_id = await tasks.run("cat", stdin=True)
    async with tasks.attached(task_id, stdin=True, stdout=True) as first:
        await first.send(b"one\n")
        await first.read_until(b"one\n")
        await first.end_stdin()
    async with tasks.attached(task_id, stdin=True, stdout=True) as second:
        await second.send(b"two\n")
        await second.read_until(b"two\n")
        await tasks.stub.CloseStdin(pb.CloseStdinRequest(id=task_id))
        assert (await second.drain()).code == 0


async def test_stdin_that_nobody_reads_harms_nobody(tasks: TaskClient):
    task_id = await tasks.create("sh", "-c", "exec <&-; echo closed; sleep 0.2; exit 4", stdin=True, stdin_once=True)
    async with tasks.attached(task_id, stdin=True, stdout=True) as attached:
        await tasks.start(task_id)
        await attached.read_until(b"closed")
        for _ in range(5):
            await attached.send(bytes(1 << 20))
        await attached.end_stdin()
        assert (await attached.drain()).code == 4


async def test_stdin_for_a_process_without_one_is_thrown_away(tasks: TaskClient):
    task_id = await tasks.create("cat")
    async with tasks.attached(task_id, stdin=True, stdout=True) as attached:
        await attached.send(b"lost")
        await tasks.start(task_id)
        assert (await attached.drain()).code == 0
    assert not attached.stdout


async def test_a_terminal_has_one_stream_a_size_and_an_echo(tasks: TaskClient):
    task_id = await tasks.create(
        *(
            "sh",
            "-c",
            "stty size; trap 'stty size' WINCH; echo err >&2; until read x; do :; done; echo got $x; sleep 0.3",
        ),
        terminal=True,
        stdin=True,
        console_size=types_pb.WindowSize(width=101, height=31),
    )
    async with tasks.attached(task_id, stdin=True, stdout=True, stderr=True) as attached:
        assert attached.terminal
        await tasks.start(task_id)
        await attached.read_until(b"err\r\n")
        assert attached.stdout.startswith(b"31 101\r\n")
        await attached.resize(77, 22)
        await attached.send(b"word\n")
        await attached.read_until(b"got word\r\n")
        await attached.drain()
    assert b"22 77" in attached.stdout
    assert not attached.stderr


async def test_resize_by_its_own_call_and_only_of_terminals(tasks: TaskClient):
    size = types_pb.WindowSize(width=90, height=20)
    task_id = await tasks.run("sh", "-c", "read x; stty size", terminal=True, stdin=True)
    async with tasks.attached(task_id, stdin=True, stdout=True) as attached:
        await tasks.stub.Resize(pb.ResizeRequest(id=task_id, size=size))
        await attached.send(b"\n")
        await attached.read_until(b"20 90")
    plain = await tasks.run("sleep", "100")
    with pytest.raises(FailedPrecondition, match="terminal"):
        await tasks.stub.Resize(pb.ResizeRequest(id=plain, size=size))


async def test_a_late_client_gets_what_was_written_lately(tasks: TaskClient):
    task_id = await tasks.create("sh", "-c", "echo early; read x", stdin=True)
    async with tasks.attached(task_id, stdout=True) as first:
        await tasks.start(task_id)
        await first.read_until(b"early")
    async with tasks.attached(task_id, stdout=True, replay=True) as late:
        await late.read_until(b"early\n")


async def test_attaching_to_a_process_that_has_ended_tells_its_exit(tasks: TaskClient):
    task_id = await tasks.run("sh", "-c", "exit 9")
    await tasks.wait(task_id)
    async with tasks.attached(task_id, stdin=True, stdout=True, stderr=True) as attached:
        assert (await attached.drain()).code == 9


async def test_attaching_to_nothing_is_refused(tasks: TaskClient):
    task_id = await tasks.create("true")
    for header in (pb.AttachHeader(id="none"), pb.AttachHeader(id=task_id, exec_id="none")):
        call = tasks.stub.Attach()
        await call.write(pb.AttachRequest(header=header))
        with pytest.raises(NotFound):
            await call.read()
    call = tasks.stub.Attach()
    await call.write(pb.AttachRequest(stdin=b"x"))
    with pytest.raises(InvalidArgument, match="header"):
        await call.read()


async def test_clients_that_go_away_leave_no_descriptors(tasks: TaskClient, tasks_daemon: Corrald):
    task_id = await tasks.run("sh", "-c", "while :; do echo x; usleep 1000; done", stdin=True)
    async with tasks.attached(task_id, stdout=True) as warm:
        await warm.read_one()
    before = open_files(tasks_daemon)
    for number in range(30):
        async with tasks.attached(task_id, stdin=True, stdout=True, stderr=True, lossless=number % 2 == 0) as attached:
            await attached.send(b"x")
            await attached.read_one()
    async with asyncio.timeout(5):
        while open_files(tasks_daemon) > before:
            await asyncio.sleep(0.02)
    assert (await tasks.get(task_id)).status == pb.STATUS_RUNNING


async def test_a_client_may_go_while_it_does_not_read(tasks: TaskClient, tasks_daemon: Corrald):
    """The process waits for the lossless client; when that goes away, it goes on."""
    task_id = await tasks.create("sh", "-c", "yes | head -c 10000000; exit 6")
    async with tasks.attached(task_id, stdout=True, lossless=True):
        await tasks.start(task_id)
        await asyncio.sleep(0.3)
    async with asyncio.timeout(60):
        assert (await tasks.wait(task_id)).code == 6


async def test_an_attachment_is_parked_by_name_whatever_its_process_does_not_read(tasks: TaskClient):
    """And goes on by its token, with the bytes of input that were not taken."""
    task_id = await tasks.run(
        "sh", "-c", "while ! test -e /tmp/read; do usleep 10000; done; md5sum", stdin=True, stdin_once=True
    )
    data = os.urandom(1 << 20)
    async with tasks.attached(task_id, stdin=True, stdout=True, lossless=True, resumable=True, client="me") as attached:
        sending = asyncio.create_task(_send_often(attached, data))
        await asyncio.sleep(0.5)
        assert not sending.done()
        for client in ("you", ""):
            with pytest.raises(NotFound, match="no such client"):
                await tasks.stub.Park(pb.ParkRequest(id=task_id, client=client))
        await tasks.stub.Park(pb.ParkRequest(id=task_id, client="me"))
        parked = (await attached.call.read()).parked  # type: ignore[attr-defined]
        sending.cancel()
    assert 0 < parked.stdin_bytes < 64 << 20
    (tasks.rootfs / "tmp/read").touch()
    rest = (data * 64)[parked.stdin_bytes :]
    try:
        async with tasks.attached(task_id, stdin=True, stdout=True, lossless=True, resume=parked.token) as attached:
            for at in range(0, len(rest), 1 << 20):
                await attached.send(rest[at : at + (1 << 20)])
            await attached.end_stdin()
            assert (await attached.drain()).code == 0
    finally:
        (tasks.rootfs / "tmp/read").unlink()
    assert attached.stdout.split()[0].decode() == hashlib.md5(data * 64, usedforsecurity=False).hexdigest()


async def _send_often(attached: Attached, data: bytes) -> None:
    for _ in range(64):
        await attached.send(data)


async def test_input_by_messages_from_who_has_taken_the_pipe_is_refused(tasks: TaskClient):
    task_id = await tasks.create("cat", stdin=True)
    with socket.socket(socket.AF_UNIX) as ours:
        name = f"corral-{os.urandom(8).hex()}"
        ours.bind(f"\0{name}")
        ours.listen()
        take = pb.Take(socket=name, stdin=True, secret=b"secret", pid=os.getpid())
        async with tasks.attached(task_id, stdin=True, stdout=True, lossless=True) as attached:
            await tasks.start(task_id)
            await attached.send(b"by a message\n")
            await attached.call.write(pb.AttachRequest(take=take))  # type: ignore[attr-defined]
            said = b""
            while not (part := await attached.call.read()).HasField("pipes"):  # type: ignore[attr-defined]
                said += part.stdout
            assert part.pipes == pb.Pipes(streams=["stdin"], reached=True)
            connection, _ = ours.accept()
            with connection:
                _, (pipe,), _, _ = socket.recv_fds(connection, 64, 3)
            os.write(pipe, b"by the pipe\n")
            os.close(pipe)
            while len(said) < 25:
                said += (await attached.call.read()).stdout  # type: ignore[attr-defined]
            assert said == b"by a message\nby the pipe\n"
            await attached.send(b"by a message again\n")
            with pytest.raises(FailedPrecondition, match="through the pipe that was taken"):
                await attached.drain()


async def test_who_attaches_to_no_stream_is_told_of_the_end(tasks: TaskClient):
    task_id = await tasks.create("sh", "-c", "echo out; exit 3")
    async with tasks.attached(task_id) as attached:
        await tasks.start(task_id)
        assert (await attached.drain()).code == 3
    assert not attached.stdout
