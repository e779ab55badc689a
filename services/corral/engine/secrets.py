"""Secrets: small files of the engine's own, which containers get without any disk of theirs seeing them.

    <root>/secrets/<namespace>/<id>     mode 0600, written before its row and removed after it

A container that uses one keeps it from being removed. Its content is read each time the container's task is made, goes
to the shim with that request, and is written down nowhere on the way.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from corral.api.engine.v1.engine_pb2 import CreateSecretRequest, Secret, SecretMount
from corral.api.tasks.v1.tasks_pb2 import SecretFile
from corral.engine import secret_rows
from corral.engine.core import Core
from corral.engine.naming import random_id
from corral.engine.records import ContainerRecord, from_ns
from corral.engine.secret_rows import SecretRecord
from corral.rpc.blocking import run_blocking
from corral.rpc.context import check_id, current_namespace
from corral.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, from_os_error
from corral.store import Duplicate, Referenced, failpoint
from corral.store.files import atomic_write

MAX_BYTES = 512_000
MAX_BYTES_IN_ALL = 2 << 20
"""Of one container: a request to its shim has a bound too."""
DIRECTORY = PurePosixPath("/run/secrets")
DEFAULT_MODE = 0o444


class Secrets:
    """See the module. Names are unique in a namespace."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def create(self, request: CreateSecretRequest) -> Secret:
        """Raises AlreadyExists, InvalidArgument."""
        name = check_id(request.name, "secret name")
        if not 0 < len(request.data) <= MAX_BYTES:
            raise InvalidArgument(
                f"the secret {name!r} has {len(request.data)} bytes: it must have 1 to {MAX_BYTES}", reason="BAD_SECRET"
            )
        record = SecretRecord(
            current_namespace(), name, random_id(), time.time_ns(), dict(request.labels), len(request.data)
        )
        return await self._core.background.to_the_end(self._create(record, request.data))

    async def _create(self, record: SecretRecord, data: bytes) -> Secret:
        path = file_of(self._core, record)
        try:
            await run_blocking(_write, path, data)
        except OSError as e:
            raise from_os_error(e, f"cannot keep the secret {record.name!r}") from e
        failpoint("engine.secret.after_file")
        try:
            await self._core.database.write(lambda tx: secret_rows.insert_secret(tx, record), durable=True)
        except BaseException as e:
            await run_blocking(path.unlink, missing_ok=True)
            if isinstance(e, Duplicate):
                raise AlreadyExists(f"a secret named {record.name!r} exists already", reason="SECRET_EXISTS") from e
            raise
        failpoint("engine.secret.after_row")
        return _message(record)

    async def get(self, name: str) -> Secret:
        """Raises NotFound."""
        namespace = current_namespace()
        return _message(self._core.database.read_sync(lambda view: secret_rows.get_secret(view, namespace, name)))

    async def every(self) -> list[Secret]:
        """All of the namespace, by name."""
        namespace = current_namespace()
        found = await self._core.database.read(lambda view: secret_rows.secrets(view, namespace))
        return [_message(record) for record in found]

    async def remove(self, name: str) -> None:
        """Raises NotFound, FailedPrecondition while a container uses it."""
        namespace = current_namespace()
        record = self._core.database.read_sync(lambda view: secret_rows.get_secret(view, namespace, name))
        await self._core.background.to_the_end(self._remove(record))

    async def _remove(self, record: SecretRecord) -> None:
        try:
            id_ = await self._core.database.write(
                lambda tx: secret_rows.delete_secret(tx, record.namespace, record.name), durable=True
            )
        except Referenced as e:
            users = ", ".join(id_[:12] for id_ in record.containers) or "a container"
            raise FailedPrecondition(
                f"the secret {record.name!r} is used by {users}: remove that first", reason="SECRET_IN_USE"
            ) from e
        failpoint("engine.secret.after_removal")
        await run_blocking(_directory(self._core, record.namespace).joinpath(id_).unlink, missing_ok=True)


def _message(record: SecretRecord) -> Secret:
    return Secret(
        name=record.name,
        id=record.id,
        created_at=from_ns(record.created_ns),
        labels=record.labels,
        size_bytes=record.size_bytes,
        containers=record.containers,
    )


def _directory(core: Core, namespace: str) -> Path:
    return core.config.root / "secrets" / namespace


def file_of(core: Core, record: SecretRecord) -> Path:
    """Where its content is."""
    return _directory(core, record.namespace) / record.id


def _write(path: Path, data: bytes) -> None:
    path.parent.parent.mkdir(mode=0o700, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    atomic_write(path, data, mode=0o600)


# What a container is given


def check(mounts: Sequence[SecretMount], targets: Iterable[str]) -> None:
    """targets: of the container's other mounts. Raises InvalidArgument."""
    seen = set()
    for mount in mounts:
        check_id(mount.secret, "secret name")
        place = target(mount)
        if place in seen:
            raise InvalidArgument(f"two secrets have the same target {place}", reason="BAD_SECRET")
        seen.add(place)
        if mount.env:
            _check_variable(place)
        else:
            _check_path(mount, place)
    files = {target(mount) for mount in mounts if not mount.env}
    for place in sorted(files):
        if above := files.intersection(map(str, PurePosixPath(place).parents)):
            raise InvalidArgument(
                f"the target {place} of a secret lies in {above.pop()}, which is a secret too: choose another",
                reason="BAD_SECRET",
            )
    below = [path for path in targets if PurePosixPath(path).is_relative_to(DIRECTORY)]
    if below and any(not mount.env for mount in mounts):
        raise InvalidArgument(f"the mount target {below[0]} lies in {DIRECTORY}, where the secrets are: choose another")


def target(mount: SecretMount) -> str:
    """The variable's name, or the absolute path."""
    given = mount.target or mount.secret
    # Two slashes are not one to pathlib, as POSIX leaves open what they mean.
    return given if mount.env else f"/{str(DIRECTORY / given).lstrip('/')}"


def _check_variable(name: str) -> None:
    if not name or "=" in name or "\0" in name:
        raise InvalidArgument(f"{name!r} is no name of an environment variable", reason="BAD_SECRET")


def _check_path(mount: SecretMount, place: str) -> None:
    path = PurePosixPath(place)
    if ".." in path.parts or "\0" in place or path in (DIRECTORY, PurePosixPath("/")):
        raise InvalidArgument(
            f"the target {mount.target!r} of the secret {mount.secret!r} is no path of a file without '..'",
            reason="BAD_SECRET",
        )
    if mount.HasField("mode") and mount.mode > 0o7777:
        raise InvalidArgument(f"the mode {mount.mode:o} of the secret {mount.secret!r} is none", reason="BAD_SECRET")


def of_container(
    core: Core, record: ContainerRecord, *, env_only: bool = False
) -> tuple[list[SecretFile], dict[str, str]]:
    """The files and the variables of a container, with their content. Blocks.

    Raises FailedPrecondition if one is lost, InvalidArgument if they are too much, or one cannot be a variable.
    """
    files, env = [], dict[str, str]()
    left = MAX_BYTES_IN_ALL
    for mount in record.config.secrets:
        if env_only and not mount.env:
            continue
        data = _content(core, record.namespace, mount.secret)
        if (left := left - len(data)) < 0:
            raise InvalidArgument(f"the secrets of a container have more than {MAX_BYTES_IN_ALL} bytes in all")
        if mount.env:
            env[target(mount)] = _text(mount, data)
        else:
            mode = mount.mode if mount.HasField("mode") else DEFAULT_MODE
            files.append(SecretFile(target=target(mount), uid=mount.uid, gid=mount.gid, mode=mode, data=data))
    return files, env


def _content(core: Core, namespace: str, name: str) -> bytes:
    record = core.database.read_sync(lambda view: secret_rows.get_secret(view, namespace, name))
    try:
        return file_of(core, record).read_bytes()
    except FileNotFoundError as e:
        raise FailedPrecondition(
            f"the content of the secret {name!r} is lost: remove the container and the secret, and make them again",
            reason="SECRET_LOST",
        ) from e


def _text(mount: SecretMount, data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InvalidArgument(
            f"the secret {mount.secret!r} is no text, as an environment variable must be: leave type=env out",
            reason="BAD_SECRET",
        )
    return text


def sweep(core: Core) -> None:
    """Remove files that no row describes. Called at start-up, before any secret can be made."""
    known = known_files(core)
    for path in core.config.root.glob("secrets/*/*"):
        if (path.parent.name, path.name) not in known:
            path.unlink(missing_ok=True)


def known_files(core: Core) -> Mapping[tuple[str, str], SecretRecord]:
    """Rows by namespace and name of the file."""
    found = core.database.read_sync(lambda view: secret_rows.secrets(view, None))
    return {(record.namespace, record.id): record for record in found}
