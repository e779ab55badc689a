"""Containers, and the processes in them.

What only makes and changes them needs is loaded by that.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Unpack

from google.protobuf.timestamp_pb2 import Timestamp

from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc
from corral.api.images.v1 import images_pb2
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2
from corral.client.async_transport import AsyncExchange, AsyncTransport
from corral.rpc import errors

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient
    from corral.client.execution import Attachment, ExecResult, Execution
    from corral.client.fetching import Pull
    from corral.client.options import ContainerOptions, UpdateOptions


class Containers:
    """Containers. `container` is a name, an id, or an unambiguous prefix of an id."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    @property
    def _engine(self) -> AsyncTransport:
        return self._client.engine()

    @cached_property
    def _stub(self) -> "engine_pb2_grpc.ContainersAsyncStub":
        return engine_pb2_grpc.ContainersStub(self._engine.channel)

    async def create(
        self,
        image: str,
        args: Sequence[str] = (),
        *,
        name: str = "",
        id: str = "",  # noqa: A002 - the field's name
        pull: "Pull" = "missing",
        platform: str = "",
        **options: "Unpack[ContainerOptions]",
    ) -> engine_pb2.Container:
        """Makes a container, not started. Its image is fetched if it is "missing", "always" or "never", as for docker;
        so it is if what is here is for another `platform` than is given."""
        from corral.client.fetching import check_pull, may_fetch
        from corral.client.options import container_config

        check_pull(pull)
        config = container_config(image, args, **options)
        request = engine_pb2.CreateContainerRequest(name=name, id=id, config=config)
        if pull == "always" or (platform and await self._client.images.lacks(image, platform=platform, pull=pull)):
            await self._client.images.pull(image, platform=platform)
        try:
            return await self.create_from(request)
        except errors.NotFound as error:
            if not may_fetch(error, image, pull):
                raise
        await self._client.images.pull(image, platform=platform)
        return await self.create_from(request)

    async def create_from(self, request: engine_pb2.CreateContainerRequest) -> engine_pb2.Container:
        """Makes a container from the whole message."""
        return await self._engine.unary(self._stub.Create, request)

    async def run(
        self,
        image: str,
        args: Sequence[str] = (),
        *,
        name: str = "",
        pull: "Pull" = "missing",
        platform: str = "",
        **options: "Unpack[ContainerOptions]",
    ) -> engine_pb2.Container:
        """Makes a container as `create` does and starts it, in the background."""
        made = await self.create(image, args, name=name, pull=pull, platform=platform, **options)
        return await self.start(made.id)

    async def start(self, container: str, *, create_only: bool = False) -> engine_pb2.Container:
        """Starts a created or exited container.

        create_only: an exited one is only made again, as create() leaves it: attach, then start it.
        """
        request = engine_pb2.StartContainerRequest(container=container, create_only=create_only)
        return await self._engine.unary(self._stub.Start, request)

    async def stop(self, container: str, *, timeout_s: float | None = None, signal: str = "") -> engine_pb2.Container:
        """The stop signal, after `timeout_s` SIGKILL; returns when it has ended."""
        return await self._engine.unary(self._stub.Stop, _stop_request(container, timeout_s, signal))

    async def restart(
        self, container: str, *, timeout_s: float | None = None, signal: str = ""
    ) -> engine_pb2.Container:
        """Stops a container if it runs, and starts it."""
        return await self._engine.unary(self._stub.Restart, _stop_request(container, timeout_s, signal))

    async def kill(self, container: str, signal: str = "KILL", *, everyone: bool = False) -> None:
        """Sends a signal to the container's first process, or to every one."""
        request = engine_pb2.KillContainerRequest(container=container, signal=signal, all=everyone)
        await self._engine.unary(self._stub.Kill, request)

    async def pause(self, container: str) -> engine_pb2.Container:
        """Freezes every process."""
        return await self._engine.unary(self._stub.Pause, engine_pb2.PauseContainerRequest(container=container))

    async def resume(self, container: str) -> engine_pb2.Container:
        """Lets a paused container go on."""
        return await self._engine.unary(self._stub.Resume, engine_pb2.ResumeContainerRequest(container=container))

    async def remove(self, container: str, *, force: bool = False, volumes: bool = False) -> str:
        """Removes a container; returns its id. `force` kills it first."""
        request = engine_pb2.DeleteContainerRequest(container=container, force=force, volumes=volumes)
        answer = await self._engine.unary(self._stub.Delete, request)
        return answer.id

    async def wait(self, container: str, condition: str = "not-running") -> types_pb2.ExitStatus:
        """Returns how it ended, once it is "not-running" (default), at its "next-exit", or when "removed"."""
        request = engine_pb2.WaitContainerRequest(
            container=container,
            condition=engine_pb2.WaitContainerRequest.Condition.Value(
                f"CONDITION_{condition.upper().replace('-', '_')}"
            ),
        )
        answer = await self._engine.unary(self._stub.Wait, request)
        return answer.exit

    async def get(self, container: str, *, size: bool = False) -> engine_pb2.Container:
        """All facts about one container, with `size` also how large it is, which takes time."""
        request = engine_pb2.GetContainerRequest(container=container, size=size)
        return await self._engine.unary(self._stub.Get, request)

    async def list(
        self,
        *,
        all: bool = False,  # noqa: A002 - docker's word
        filters: dict[str, Sequence[str]] | None = None,
        size: bool = False,
    ) -> Sequence[engine_pb2.Container]:
        """Containers that run, with `all` the others too, with `size` also how large each is, which takes time."""
        request = engine_pb2.ListContainersRequest(all=all, size=size)
        for key, values in (filters or {}).items():
            request.filters[key].values.extend(values)
        answer = await self._engine.unary(self._stub.List, request)
        return answer.containers

    async def rename(self, container: str, name: str) -> engine_pb2.Container:
        """Gives a container another name."""
        request = engine_pb2.RenameContainerRequest(container=container, name=name)
        return await self._engine.unary(self._stub.Rename, request)

    async def publish(self, container: str, ports: Iterable[str]) -> engine_pb2.Container:
        """Publishes more ports of a container: at once if it runs, else with its next start. All or none.

        ports: "[ip:][host:]container[/protocol]", as when a container is made.
        """
        from corral.client.network_options import ports_request

        return await self._engine.unary(self._stub.Publish, ports_request(container, ports))

    async def unpublish(self, container: str, ports: Iterable[str]) -> engine_pb2.Container:
        """Withdraws ports of a container; one named without the host's port is whichever leads there."""
        from corral.client.network_options import ports_request

        return await self._engine.unary(self._stub.Unpublish, ports_request(container, ports))

    async def reopen_log(self, container: str) -> None:
        """Has the log of a container that runs opened again by its name, as after a rotation by another program."""
        await self._engine.unary(self._stub.ReopenLog, tasks_pb2.ReopenLogRequest(id=container))

    async def update(self, container: str, **changes: "Unpack[UpdateOptions]") -> engine_pb2.Container:
        """Changes limits, restart policy and labels of a container, running or not; what is not named stays."""
        from corral.client.options import update_request

        return await self._engine.unary(self._stub.Update, update_request(container, **changes))

    async def commit(
        self,
        container: str,
        name: str = "",
        *,
        author: str = "",
        comment: str = "",
        changes: Sequence[str] = (),
        pause: bool = True,
    ) -> images_pb2.Image:
        """Makes an image of what a container has written. `changes` are lines of a Dockerfile, such as CMD or ENV."""
        request = engine_pb2.CommitContainerRequest(
            container=container, name=name, author=author, comment=comment, changes=changes, no_pause=not pause
        )
        return await self._engine.unary(self._stub.Commit, request)

    async def changes(self, container: str) -> AsyncIterator[images_pb2.SnapshotChange]:
        """What a container has added to its image's files, changed in them, and deleted."""
        from corral.api.images.v1 import images_pb2_grpc

        found = await self.get(container)
        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        async for part in leaf.stream(stub.Changes, images_pb2.SnapshotRequest(key=found.snapshot_key or found.id)):
            for change in part.changes:
                yield change

    async def export(self, container: str) -> AsyncIterator[bytes]:
        """A container's whole root file system, as the bytes of a plain tar."""
        from corral.api.images.v1 import images_pb2_grpc

        found = await self.get(container)
        leaf = await self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        async for part in leaf.stream(stub.Export, images_pb2.SnapshotRequest(key=found.snapshot_key or found.id)):
            yield part.data

    async def copy_from(
        self, container: str, path: str, *, follow_link: bool = False, stat_only: bool = False
    ) -> AsyncIterator[engine_pb2.CopyFromResponse]:
        """What is at a path of a container, and then the bytes of a tar of it.

        follow_link: if it is a symbolic link, of what that leads to. stat_only: no tar.
        """
        request = engine_pb2.CopyFromRequest(
            container=container, path=path, follow_link=follow_link, stat_only=stat_only
        )
        async for part in self._engine.stream(self._stub.CopyFrom, request):
            yield part

    async def copy_to(self, container: str, path: str, tar: Iterable[bytes], *, as_root: bool = False) -> None:
        """Puts what is in a tar, plain or compressed, into a directory of a container.

        as_root: all belongs to root, instead of to whom the tar says.
        """
        header = engine_pb2.CopyToHeader(container=container, path=path, as_root=as_root)
        await self._engine.gather(self._stub.CopyTo, _copy_requests(header, tar))

    async def resize(self, container: str, *, exec_id: str = "", width: int, height: int) -> None:
        """Sets the size of a process's terminal."""
        size = types_pb2.WindowSize(width=width, height=height)
        request = engine_pb2.ResizeContainerRequest(container=container, exec_id=exec_id, size=size)
        await self._engine.unary(self._stub.Resize, request)

    async def exec_create(
        self,
        container: str,
        args: Sequence[str],
        *,
        env: Sequence[str] = (),
        working_dir: str = "",
        user: str = "",
        terminal: bool = False,
        stdin: bool = False,
        privileged: bool = False,
        console_size: tuple[int, int] | None = None,
    ) -> engine_pb2.ExecContainerResponse:
        """Makes a further process in a running container, not started: attach to it first."""
        from corral.client.execution import exec_request

        request = exec_request(
            container,
            args,
            env=env,
            working_dir=working_dir,
            user=user,
            terminal=terminal,
            stdin=stdin,
            privileged=privileged,
            console_size=console_size,
        )
        return await self._engine.unary(self._stub.Exec, request)

    async def exec_start(self, container: str, exec_id: str) -> int:
        """Runs a made process; returns its pid on the host."""
        request = engine_pb2.ExecStartRequest(container=container, exec_id=exec_id)
        answer = await self._engine.unary(self._stub.ExecStart, request)
        return answer.pid

    async def exec_wait(self, container: str, exec_id: str, *, remove: bool = True) -> types_pb2.ExitStatus:
        """How an exec ended, once it has."""
        request = engine_pb2.ExecWaitRequest(container=container, exec_id=exec_id, remove=remove)
        answer = await self._engine.unary(self._stub.ExecWait, request)
        return answer.exit

    async def exec(
        self,
        container: str,
        args: Sequence[str],
        *,
        env: Sequence[str] = (),
        working_dir: str = "",
        user: str = "",
    ) -> "ExecResult":
        """Runs a further process in a running container and returns its output and exit code."""
        from corral.client.execution import Collected, Execution, exec_request

        process = exec_request(container, args, env=env, working_dir=working_dir, user=user)
        collected = Collected()
        async for part in self._engine.ask(self._stub.ExecRun, Execution(process).first_request()):
            collected.add(part)
        return collected.result()

    def exec_run(
        self, execution: "Execution", requests: AsyncIterator[engine_pb2.ExecRunRequest] | None = None
    ) -> AsyncExchange[tasks_pb2.AttachResponse]:
        """Runs a further process: its output as it comes, the last message telling how it ended.

        `requests` are as those of `attach`.
        """
        from corral.client.execution import async_attach_requests

        return self._engine.exchange(self._stub.ExecRun, async_attach_requests(execution, requests))

    def attach(
        self, attachment: "Attachment", requests: AsyncIterator[tasks_pb2.AttachRequest] | None = None
    ) -> AsyncExchange[tasks_pb2.AttachResponse]:
        """A process's output as it comes, the last message telling how it ended.

        `requests` carry its stdin and its terminal's size; where they end, stdin is closed.
        """
        from corral.client.execution import async_attach_requests

        return self._engine.exchange(self._stub.Attach, async_attach_requests(attachment, requests))

    async def logs(
        self,
        container: str,
        *,
        follow: bool = False,
        since: Timestamp | None = None,
        until: Timestamp | None = None,
        tail: int | None = None,
        stdout: bool = True,
        stderr: bool = True,
    ) -> AsyncIterator[tasks_pb2.LogEntry]:
        """The container's log, oldest line first; over upgrades of the daemon too."""
        from corral.client.following import LogPosition

        request = tasks_pb2.LogsRequest(
            id=container, follow=follow, since=since, until=until, tail=tail, stdout=stdout, stderr=stderr
        )
        position = LogPosition(request)
        async for answer in self._engine.stream(self._stub.Logs, request, position.rest):
            for entry in position.new(answer.entries):
                yield entry

    async def stats(
        self, containers: Sequence[str] = (), *, interval_ms: int = 0
    ) -> AsyncIterator[engine_pb2.ContainerStatsResponse]:
        """What containers use, once, or every `interval_ms`."""
        request = engine_pb2.ContainerStatsRequest(containers=containers, interval_ms=interval_ms)
        async for answer in self._engine.stream(self._stub.Stats, request, resume=lambda: request):
            yield answer

    async def top(self, container: str) -> Sequence[engine_pb2.Process]:
        """The processes inside."""
        answer = await self._engine.unary(self._stub.Top, engine_pb2.TopRequest(container=container))
        return answer.processes

    async def ps(self, container: str, options: Sequence[str]) -> engine_pb2.TopResponse:
        """The processes inside as ps(1) of the daemon's host tells them: its titles and rows."""
        return await self._engine.unary(self._stub.Top, engine_pb2.TopRequest(container=container, ps_options=options))


def _stop_request(container: str, timeout_s: float | None, signal: str) -> engine_pb2.StopContainerRequest:
    request = engine_pb2.StopContainerRequest(container=container, signal=signal)
    if timeout_s is not None:
        request.timeout.FromNanoseconds(round(timeout_s * 1e9))
    return request


async def _copy_requests(
    header: engine_pb2.CopyToHeader, chunks: Iterable[bytes]
) -> AsyncIterator[engine_pb2.CopyToRequest]:
    yield engine_pb2.CopyToRequest(header=header)
    for chunk in chunks:
        yield engine_pb2.CopyToRequest(data=chunk)
