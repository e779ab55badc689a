"""The client for ordinary code, generated from `corral.client.aio`."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from google.protobuf.timestamp_pb2 import Timestamp

from corral.client.address import default_address, default_namespace, default_tls
from corral.client.credentials import registry_auth
from corral.client.execution import Attachment, Collected, ExecResult, attach_requests
from corral.client.files import whole_file
from corral.client.options import ContainerOptions, container_config, platform_message
from corral.client.transport import Exchange, Transport
from corral.rpc.address import Tls

if TYPE_CHECKING:
    from corral.api.network.v1 import network_pb2
    from corral.api.version.v1 import version_pb2

from corral.api.engine.v1 import engine_pb2, engine_pb2_grpc
from corral.api.images.v1 import images_pb2
from corral.api.tasks.v1 import tasks_pb2
from corral.api.types.v1 import types_pb2

_CHUNK = 256 * 1024


class Client:
    """One corral, in one namespace. Use it as a context manager, or call `close`.

    `address` is unix:///path or tcp://host:port; by default $CORRAL_ADDRESS, else the system's daemon. `tls`, for
    tcp, is what this side shows and whom it trusts; by default $CORRAL_TLS_CERT, $CORRAL_TLS_KEY and $CORRAL_TLS_CA.
    """

    def __init__(self, address: str | None = None, *, namespace: str | None = None, tls: Tls | None = None) -> None:
        self.address = address or default_address()
        self.namespace = namespace or default_namespace()
        self._tls = tls or default_tls()
        self._transports: dict[str, Transport] = {}
        self._addresses: dict[str, str] | None = None
        self.containers = Containers(self)
        self.images = Images(self)
        self.snapshots = Snapshots(self)
        self.networks = Networks(self)
        self.volumes = Volumes(self)
        self.system = System(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call that still runs."""
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    def engine(self) -> Transport:
        """The channel to the address this client was made for."""
        return self._transport(self.address)

    def leaf(self, service: str) -> Transport:
        """The channel to a leaf, whose address the engine tells."""
        if self._addresses is None:
            answer = self.system.addresses()
            self._addresses = dict(answer.addresses)
        address = self._addresses.get(service, self.address)
        # A socket file of another host is of no use here; that host's engine then serves the leaf at its own address.
        elsewhere = self.address.startswith("tcp:") and address.startswith("unix:")
        return self._transport(self.address if elsewhere else address)

    def _transport(self, address: str) -> Transport:
        if address not in self._transports:
            self._transports[address] = Transport(
                address, self.namespace, self._tls if address.startswith("tcp:") else None
            )
        return self._transports[address]


class Containers:
    """Containers. `container` is a name, an id, or an unambiguous prefix of an id."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def _engine(self) -> Transport:
        return self._client.engine()

    @property
    def _stub(self) -> "engine_pb2_grpc.ContainersStub":
        return engine_pb2_grpc.ContainersStub(self._engine.channel)

    def create(
        self,
        image: str,
        args: Sequence[str] = (),
        *,
        name: str = "",
        id: str = "",  # noqa: A002 - the field's name
        **options: Unpack[ContainerOptions],
    ) -> engine_pb2.Container:
        """Makes a container, not started."""
        config = container_config(image, args, **options)
        return self.create_from(engine_pb2.CreateContainerRequest(name=name, id=id, config=config))

    def create_from(self, request: engine_pb2.CreateContainerRequest) -> engine_pb2.Container:
        """Makes a container from the whole message."""
        return self._engine.unary(self._stub.Create, request)

    def run(
        self, image: str, args: Sequence[str] = (), *, name: str = "", **options: Unpack[ContainerOptions]
    ) -> engine_pb2.Container:
        """Makes a container and starts it, in the background."""
        made = self.create(image, args, name=name, **options)
        return self.start(made.id)

    def start(self, container: str) -> engine_pb2.Container:
        """Starts a created or exited container."""
        return self._engine.unary(self._stub.Start, engine_pb2.StartContainerRequest(container=container))

    def stop(self, container: str, *, timeout_s: float | None = None, signal: str = "") -> engine_pb2.Container:
        """The stop signal, after `timeout_s` SIGKILL; returns when it has ended."""
        return self._engine.unary(self._stub.Stop, _stop_request(container, timeout_s, signal))

    def restart(self, container: str, *, timeout_s: float | None = None, signal: str = "") -> engine_pb2.Container:
        """Stops a container if it runs, and starts it."""
        return self._engine.unary(self._stub.Restart, _stop_request(container, timeout_s, signal))

    def kill(self, container: str, signal: str = "KILL", *, everyone: bool = False) -> None:
        """Sends a signal to the container's first process, or to every one."""
        request = engine_pb2.KillContainerRequest(container=container, signal=signal, all=everyone)
        self._engine.unary(self._stub.Kill, request)

    def pause(self, container: str) -> engine_pb2.Container:
        """Freezes every process."""
        return self._engine.unary(self._stub.Pause, engine_pb2.PauseContainerRequest(container=container))

    def resume(self, container: str) -> engine_pb2.Container:
        """Lets a paused container go on."""
        return self._engine.unary(self._stub.Resume, engine_pb2.ResumeContainerRequest(container=container))

    def remove(self, container: str, *, force: bool = False, volumes: bool = False) -> str:
        """Removes a container; returns its id. `force` kills it first."""
        request = engine_pb2.DeleteContainerRequest(container=container, force=force, volumes=volumes)
        answer = self._engine.unary(self._stub.Delete, request)
        return answer.id

    def wait(self, container: str, condition: str = "not-running") -> types_pb2.ExitStatus:
        """Returns how it ended, once it is "not-running" (default), at its "next-exit", or when "removed"."""
        request = engine_pb2.WaitContainerRequest(
            container=container,
            condition=engine_pb2.WaitContainerRequest.Condition.Value(
                f"CONDITION_{condition.upper().replace('-', '_')}"
            ),
        )
        answer = self._engine.unary(self._stub.Wait, request)
        return answer.exit

    def get(self, container: str, *, size: bool = False) -> engine_pb2.Container:
        """All facts about one container, with `size` also how large it is, which takes time."""
        request = engine_pb2.GetContainerRequest(container=container, size=size)
        return self._engine.unary(self._stub.Get, request)

    def list(
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
        answer = self._engine.unary(self._stub.List, request)
        return answer.containers

    def rename(self, container: str, name: str) -> engine_pb2.Container:
        """Gives a container another name."""
        request = engine_pb2.RenameContainerRequest(container=container, name=name)
        return self._engine.unary(self._stub.Rename, request)

    def commit(
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
        return self._engine.unary(self._stub.Commit, request)

    def changes(self, container: str) -> Iterator[images_pb2.SnapshotChange]:
        """What a container has added to its image's files, changed in them, and deleted."""
        from corral.api.images.v1 import images_pb2_grpc

        found = self.get(container)
        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        for part in leaf.stream(stub.Changes, images_pb2.SnapshotRequest(key=found.snapshot_key or found.id)):
            for change in part.changes:
                yield change

    def export(self, container: str) -> Iterator[bytes]:
        """A container's whole root file system, as the bytes of a plain tar."""
        from corral.api.images.v1 import images_pb2_grpc

        found = self.get(container)
        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        for part in leaf.stream(stub.Export, images_pb2.SnapshotRequest(key=found.snapshot_key or found.id)):
            yield part.data

    def resize(self, container: str, *, exec_id: str = "", width: int, height: int) -> None:
        """Sets the size of a process's terminal."""
        size = types_pb2.WindowSize(width=width, height=height)
        request = engine_pb2.ResizeContainerRequest(container=container, exec_id=exec_id, size=size)
        self._engine.unary(self._stub.Resize, request)

    def exec_create(
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
        request = engine_pb2.ExecContainerRequest(
            container=container,
            args=args,
            env=env,
            working_dir=working_dir,
            user=user,
            terminal=terminal,
            stdin=stdin,
            privileged=privileged,
        )
        if console_size:
            request.console_size.CopyFrom(types_pb2.WindowSize(width=console_size[0], height=console_size[1]))
        return self._engine.unary(self._stub.Exec, request)

    def exec_start(self, container: str, exec_id: str) -> int:
        """Runs a made process; returns its pid on the host."""
        request = engine_pb2.ExecStartRequest(container=container, exec_id=exec_id)
        answer = self._engine.unary(self._stub.ExecStart, request)
        return answer.pid

    def exec_wait(self, container: str, exec_id: str, *, remove: bool = True) -> types_pb2.ExitStatus:
        """How an exec ended, once it has."""
        request = engine_pb2.ExecWaitRequest(container=container, exec_id=exec_id, remove=remove)
        answer = self._engine.unary(self._stub.ExecWait, request)
        return answer.exit

    def exec(
        self,
        container: str,
        args: Sequence[str],
        *,
        env: Sequence[str] = (),
        working_dir: str = "",
        user: str = "",
    ) -> ExecResult:
        """Runs a further process in a running container and returns its output and exit code."""
        made = self.exec_create(container, args, env=env, working_dir=working_dir, user=user)
        collected = Collected()
        for part in self.attach(Attachment(made.id, made.exec_id, stdout=True, stderr=True, lossless=True)):
            if part.HasField("attached"):
                self.exec_start(made.id, made.exec_id)
            collected.add(part)
        self.exec_wait(made.id, made.exec_id)
        return collected.result()

    def attach(
        self, attachment: Attachment, requests: Iterator[tasks_pb2.AttachRequest] | None = None
    ) -> Exchange[tasks_pb2.AttachResponse]:
        """A process's output as it comes, the last message telling how it ended.

        `requests` carry its stdin and its terminal's size; where they end, stdin is closed.
        """
        return self._engine.exchange(self._stub.Attach, attach_requests(attachment, requests))

    def logs(
        self,
        container: str,
        *,
        follow: bool = False,
        since: Timestamp | None = None,
        until: Timestamp | None = None,
        tail: int | None = None,
        stdout: bool = True,
        stderr: bool = True,
    ) -> Iterator[tasks_pb2.LogEntry]:
        """The container's log, oldest line first."""
        request = tasks_pb2.LogsRequest(
            id=container, follow=follow, since=since, until=until, tail=tail, stdout=stdout, stderr=stderr
        )
        for answer in self._engine.stream(self._stub.Logs, request):
            for entry in answer.entries:
                yield entry

    def stats(
        self, containers: Sequence[str] = (), *, interval_ms: int = 0
    ) -> Iterator[engine_pb2.ContainerStatsResponse]:
        """What containers use, once, or every `interval_ms`."""
        request = engine_pb2.ContainerStatsRequest(containers=containers, interval_ms=interval_ms)
        for answer in self._engine.stream(self._stub.Stats, request):
            yield answer

    def top(self, container: str) -> Sequence[engine_pb2.Process]:
        """The processes inside."""
        answer = self._engine.unary(self._stub.Top, engine_pb2.TopRequest(container=container))
        return answer.processes


class Images:
    """Images. `name` is a name, an id, or an unambiguous prefix of an id."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def load(self, archive: str | Path, *, name: str = "") -> Sequence[images_pb2.Image]:
        """Imports an archive file (docker, OCI, or a plain root file system, which needs a `name`)."""
        path = Path(archive)
        header = images_pb2.ImportHeader(name=name, total_bytes=path.stat().st_size)  # noqa: ASYNC240 - one stat
        images: Sequence[images_pb2.Image] = ()
        for part in self.load_stream(header, _file_chunks(path)):
            if part.HasField("result"):
                images = part.result.images
        return images

    def load_stream(
        self, header: images_pb2.ImportHeader, chunks: Iterable[bytes]
    ) -> Iterator[images_pb2.ImportResponse]:
        """Imports an archive from its bytes; progress comes back, and last the images."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        for part in leaf.exchange(stub.Import, _import_requests(header, chunks)):
            yield part

    def save(self, names: Sequence[str], archive: str | Path, *, form: str = "docker", platform: str = "") -> None:
        """Writes images to an archive file. `form` is docker (OCI readers take it too) or oci."""
        with whole_file(Path(archive)) as file:
            for chunk in self.save_stream(names, form=form, platform=platform):
                file.write(chunk)

    def save_stream(self, names: Sequence[str], *, form: str = "docker", platform: str = "") -> Iterator[bytes]:
        """The bytes of an archive of images, as `save` writes it. Without a platform goes all that is here."""
        from corral.api.images.v1 import images_pb2_grpc

        request = images_pb2.ExportRequest(
            names=names,
            format=images_pb2.ImportHeader.Format.Value(f"FORMAT_{form.upper()}_ARCHIVE"),
            platform=platform_message(platform),
        )
        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        for part in leaf.stream(stub.Export, request):
            yield part.data

    def get(self, name: str) -> images_pb2.Image:
        """All facts about one image."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        return leaf.unary(stub.Get, images_pb2.GetImageRequest(name=name))

    def list(self, pattern: str = "") -> Sequence[images_pb2.Image]:
        """Images whose name fits a shell pattern; all without one."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        answer = leaf.unary(stub.List, images_pb2.ListImagesRequest(pattern=pattern))
        return answer.images

    def pull(
        self,
        name: str,
        *,
        platform: str = "",
        all_platforms: bool = False,
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
    ) -> images_pb2.Image:
        """Fetches an image from its registry. `auth` is by default what `corral login` or docker's has kept."""
        image = images_pb2.Image()
        for part in self.pull_stream(
            name, platform=platform, all_platforms=all_platforms, auth=auth, insecure=insecure
        ):
            image = part.image
        return image

    def pull_stream(
        self,
        name: str,
        *,
        platform: str = "",
        all_platforms: bool = False,
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
    ) -> Iterator[images_pb2.PullResponse]:
        """As `pull`; progress comes, and last the image."""
        from corral.api.images.v1 import images_pb2_grpc

        request = images_pb2.PullRequest(
            name=name,
            platform=platform_message(platform),
            all_platforms=all_platforms,
            auth=auth or registry_auth(name),
            insecure=insecure,
        )
        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        for part in leaf.stream(stub.Pull, request):
            yield part

    def push(
        self,
        name: str,
        destination: str = "",
        *,
        platform: str = "",
        all_platforms: bool = False,
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
    ) -> types_pb2.Descriptor:
        """Brings an image to a registry; returns what its name there points at. `auth` as for `pull`."""
        pushed = types_pb2.Descriptor()
        for part in self.push_stream(
            name, destination, platform=platform, all_platforms=all_platforms, auth=auth, insecure=insecure
        ):
            pushed = part.pushed
        return pushed

    def push_stream(
        self,
        name: str,
        destination: str = "",
        *,
        platform: str = "",
        all_platforms: bool = False,
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
    ) -> Iterator[images_pb2.PushResponse]:
        """As `push`; progress comes, and last the descriptor."""
        from corral.api.images.v1 import images_pb2_grpc

        request = images_pb2.PushRequest(
            name=name,
            destination=destination,
            platform=platform_message(platform),
            all_platforms=all_platforms,
            auth=auth or registry_auth(destination or name),
            insecure=insecure,
        )
        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        for part in leaf.stream(stub.Push, request):
            yield part

    def login(self, registry: str, username: str, password: str, *, insecure: bool = False) -> str:
        """Proves credentials to a registry; returns the identity token to keep instead of the password, if any."""
        from corral.api.images.v1 import images_pb2_grpc

        auth = images_pb2.RegistryAuth(username=username, password=password)
        request = images_pb2.LoginRequest(registry=registry, auth=auth, insecure=insecure)
        leaf = self._client.leaf("images")
        answer = leaf.unary(images_pb2_grpc.ImagesStub(leaf.channel).Login, request)
        return answer.identity_token

    def referrers(
        self,
        name: str,
        *,
        artifact_type: str = "",
        auth: images_pb2.RegistryAuth | None = None,
        insecure: bool = False,
    ) -> images_pb2.ReferrersResponse:
        """What refers to an image in its registry: signatures, attestations."""
        from corral.api.images.v1 import images_pb2_grpc

        request = images_pb2.ReferrersRequest(
            name=name, artifact_type=artifact_type, auth=auth or registry_auth(name), insecure=insecure
        )
        leaf = self._client.leaf("images")
        return leaf.unary(images_pb2_grpc.ImagesStub(leaf.channel).Referrers, request)

    def tag(self, source: str, target: str) -> images_pb2.Image:
        """Gives an image another name; a name that exists moves."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        return leaf.unary(stub.Tag, images_pb2.TagImageRequest(source=source, target=target))

    def remove(self, name: str, *, force: bool = False) -> images_pb2.RemoveImageResponse:
        """Removes a name, and with the last one the image."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        return leaf.unary(stub.Remove, images_pb2.RemoveImageRequest(name=name, force=force))

    def prune(
        self,
        *,
        all: bool = False,  # noqa: A002 - docker's word
        until: "Timestamp | None" = None,
    ) -> images_pb2.PruneResponse:
        """Removes what nothing refers to; with `all` also images that no container uses. `until`: only images that say
        that they were made before."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.ImagesStub(leaf.channel)
        return leaf.unary(stub.Prune, images_pb2.PruneRequest(all=all, until=until))


class Snapshots:
    """The trees of containers, and the layers below them. `key` is an active one's key or a committed one's name."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, key: str) -> images_pb2.Snapshot:
        """All facts about one."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return leaf.unary(stub.Get, images_pb2.SnapshotRequest(key=key))

    def list(self) -> Sequence[images_pb2.Snapshot]:
        """The namespace's own, and the layers of all images."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return (leaf.unary(stub.List, images_pb2.ListSnapshotsRequest())).snapshots

    def mounts(self, key: str) -> Sequence[types_pb2.Mount]:
        """How one is mounted."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return (leaf.unary(stub.Mounts, images_pb2.SnapshotRequest(key=key))).mounts

    def usage(self, key: str) -> images_pb2.SnapshotUsage:
        """What one takes on disk beyond what is below it."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return leaf.unary(stub.Usage, images_pb2.SnapshotRequest(key=key))

    def remove(self, key: str) -> None:
        """Removes one that nothing lies on."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        leaf.unary(stub.Remove, images_pb2.RemoveSnapshotRequest(key=key, must_exist=True))

    def drivers(self) -> Sequence[images_pb2.Driver]:
        """The ways to stack layers, and which of them this host can run."""
        from corral.api.images.v1 import images_pb2_grpc

        leaf = self._client.leaf("images")
        stub = images_pb2_grpc.SnapshotsStub(leaf.channel)
        return (leaf.unary(stub.Drivers, images_pb2.DriversRequest())).drivers


class Networks:
    """Networks. `name` is a name, an id, or an unambiguous prefix of an id."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, request: "network_pb2.CreateNetworkRequest") -> "network_pb2.Network":
        """Makes a network."""
        from corral.api.network.v1 import network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        return leaf.unary(stub.Create, request)

    def get(self, name: str) -> "network_pb2.Network":
        """All facts about one network."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        return leaf.unary(stub.Get, network_pb2.GetNetworkRequest(name=name))

    def list(self) -> "Sequence[network_pb2.Network]":
        """All networks."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        answer = leaf.unary(stub.List, network_pb2.ListNetworksRequest())
        return answer.networks

    def remove(self, name: str) -> None:
        """Removes a network that no container uses."""
        from corral.api.network.v1 import network_pb2, network_pb2_grpc

        leaf = self._client.leaf("network")
        stub = network_pb2_grpc.NetworksStub(leaf.channel)
        leaf.unary(stub.Remove, network_pb2.RemoveNetworkRequest(name=name))


class Volumes:
    """Volumes: directories that outlive containers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def _engine(self) -> Transport:
        return self._client.engine()

    @property
    def _stub(self) -> "engine_pb2_grpc.VolumesStub":
        return engine_pb2_grpc.VolumesStub(self._engine.channel)

    def create(
        self, name: str = "", *, labels: dict[str, str] | None = None, options: dict[str, str] | None = None
    ) -> engine_pb2.Volume:
        """Makes a volume; with the option "size", such as "10g", it holds no more than that."""
        request = engine_pb2.CreateVolumeRequest(name=name, labels=labels or {}, options=options or {})
        return self._engine.unary(self._stub.Create, request)

    def get(self, name: str) -> engine_pb2.Volume:
        """All facts about one volume."""
        return self._engine.unary(self._stub.Get, engine_pb2.GetVolumeRequest(name=name))

    def list(self) -> Sequence[engine_pb2.Volume]:
        """All volumes."""
        answer = self._engine.unary(self._stub.List, engine_pb2.ListVolumesRequest())
        return answer.volumes

    def remove(self, name: str) -> None:
        """Removes a volume that no container uses."""
        self._engine.unary(self._stub.Remove, engine_pb2.RemoveVolumeRequest(name=name))

    def prune(self, *, all: bool = False) -> Sequence[str]:  # noqa: A002 - docker's word
        """Removes anonymous volumes that no container uses, with `all` named ones too; returns their names."""
        answer = self._engine.unary(self._stub.Prune, engine_pb2.PruneVolumesRequest(all=all))
        return answer.removed


class System:
    """The engine as a whole."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def _engine(self) -> Transport:
        return self._client.engine()

    @property
    def _stub(self) -> "engine_pb2_grpc.SystemStub":
        return engine_pb2_grpc.SystemStub(self._engine.channel)

    def version(self) -> "version_pb2.GetResponse":
        """What answers at this client's address."""
        from corral.api.version.v1 import version_pb2, version_pb2_grpc

        stub = version_pb2_grpc.VersionStub(self._engine.channel)
        return self._engine.unary(stub.Get, version_pb2.GetRequest())

    def info(self) -> engine_pb2.InfoResponse:
        """Counts, directories and facts about the host."""
        return self._engine.unary(self._stub.Info, engine_pb2.InfoRequest())

    def addresses(self) -> engine_pb2.AddressesResponse:
        """Where each service is reached."""
        return self._engine.unary(self._stub.Addresses, engine_pb2.AddressesRequest())

    def disk_usage(self) -> engine_pb2.DiskUsageResponse:
        """What images, containers and volumes take on disk, and what of it could go."""
        return self._engine.unary(self._stub.DiskUsage, engine_pb2.DiskUsageRequest())

    def check(self, *, repair: bool = False) -> Sequence[types_pb2.Finding]:
        """What does not fit together, in all services and namespaces; with `repair` it is put right."""
        answer = self._engine.unary(self._stub.Check, types_pb2.CheckRequest(repair=repair))
        return answer.findings

    def check_host(self) -> Sequence[engine_pb2.Check]:
        """What the host has and lacks for running containers."""
        answer = self._engine.unary(self._stub.CheckHost, engine_pb2.CheckHostRequest())
        return answer.checks

    def events(self, request: types_pb2.EventsRequest) -> Iterator[types_pb2.EventsResponse]:
        """The journal of all services: replayed from `request.after`, then followed."""
        for answer in self._engine.stream(self._stub.Events, request):
            yield answer


def _stop_request(container: str, timeout_s: float | None, signal: str) -> engine_pb2.StopContainerRequest:
    request = engine_pb2.StopContainerRequest(container=container, signal=signal)
    if timeout_s is not None:
        request.timeout.FromNanoseconds(round(timeout_s * 1e9))
    return request


def _file_chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _import_requests(header: images_pb2.ImportHeader, chunks: Iterable[bytes]) -> Iterator[images_pb2.ImportRequest]:
    yield images_pb2.ImportRequest(header=header)
    for chunk in chunks:
        yield images_pb2.ImportRequest(data=chunk)
