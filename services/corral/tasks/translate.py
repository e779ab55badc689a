"""Between the wire of corral.tasks.v1 and the values of this package."""

import json
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from typing import cast

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.api.types.v1 import types_pb2 as types_pb
from corral.oci.usual import usual_profile
from corral.rpc.context import check_id
from corral.rpc.errors import InvalidArgument
from corral.rpc.events import nanoseconds, timestamp
from corral.shim.requests import MOST_OUTPUT
from corral.tasks import log_drivers
from corral.tasks.attach import Taker, Wanted
from corral.tasks.bundle import default_log
from corral.tasks.config import TasksConfig
from corral.tasks.entries import Entry, Selection
from corral.tasks.execs import NewExec
from corral.tasks.lifecycle import NewTask
from corral.tasks.live import Process, Task
from corral.tasks.model import Exit, LogRow, ProcessRow, Status, TaskKey, mapping
from corral.tasks.probes import NewProbe

_STREAMS = {"stdout": pb.LogEntry.STREAM_STDOUT, "stderr": pb.LogEntry.STREAM_STDERR}


def exit_status(how: Exit) -> types_pb.ExitStatus:
    """How a process ended."""
    return types_pb.ExitStatus(
        code=how.code,
        signal=how.signal or 0,
        oom_killed=how.oom,
        exited_at=timestamp(how.exited_at_ns),
        reason=how.sentence,
        known=how.known,
        timed_out=how.timed_out,
    )


def task_message(task: Task) -> pb.Task:
    """A task as it is now."""
    init = task.init.row
    message = pb.Task(
        id=task.row.key.id,
        status=cast(pb.Status.ValueType, int(init.status)),
        pid=0 if init.status is Status.STOPPED else init.pid,
        start_time=0 if init.status is Status.STOPPED else init.start_time,
        shim_pid=task.row.shim_pid if task.shim is not None else 0,
        created_at=timestamp(task.row.created_at_ns),
        bundle=str(task.bundle.path),
        log_path=task.row.log.path,
        terminal=init.terminal,
        stdin=init.stdin,
        execs=[_exec_message(process) for exec_id, process in task.processes.items() if exec_id],
        labels=task.row.labels,
    )
    if init.started_at_ns is not None:
        message.started_at.CopyFrom(timestamp(init.started_at_ns))
    if init.exit is not None:
        message.exit.CopyFrom(exit_status(init.exit))
        message.dropped_bytes = init.exit.dropped_bytes
    return message


def _exec_message(process: Process) -> pb.ExecProcess:
    row = process.row
    return pb.ExecProcess(
        id=row.exec_id,
        status=cast(pb.Status.ValueType, int(row.status)),
        pid=0 if row.status is Status.STOPPED else row.pid,
        exit=None if row.exit is None else exit_status(row.exit),
        args=row.args,
        terminal=row.terminal,
    )


def wanted(header: pb.AttachHeader) -> Wanted:
    """What an attaching client asks for."""
    return Wanted(
        stdin=header.stdin,
        stdout=header.stdout,
        stderr=header.stderr,
        lossless=header.lossless,
        replay=header.replay,
    )


def taker(request: pb.Take) -> Taker:
    """An attached client that wants pipes."""
    return Taker(request.socket, request.secret, request.pid, request.stdin)


def attached(row: ProcessRow) -> pb.Attached:
    """The first message to a client that is attached."""
    return pb.Attached(terminal=row.terminal, exec_id=row.exec_id, pid=row.pid or 0)


def selection(request: pb.LogsRequest) -> Selection:
    """Which entries of a log are asked for."""
    wanted_streams = {"stdout": request.stdout, "stderr": request.stderr}
    chosen = frozenset(name for name, asked in wanted_streams.items() if asked)
    return Selection(
        streams=chosen or frozenset(wanted_streams),
        since_ns=nanoseconds(request.since) if request.HasField("since") else None,
        until_ns=nanoseconds(request.until) if request.HasField("until") else None,
        tail=request.tail if request.HasField("tail") else None,
    )


def log_entry(entry: Entry) -> pb.LogEntry:
    """A line of a log."""
    return pb.LogEntry(
        time=timestamp(entry.time_ns), stream=_STREAMS[entry.stream], line=entry.line, partial=entry.partial
    )


def new_task(namespace: str, request: pb.CreateTaskRequest, config: TasksConfig) -> NewTask:
    """Raises InvalidArgument, naming the field."""
    key = TaskKey(namespace, check_id(request.id, "container id"))
    process = mapping(_object(_without_usual_profile(request.spec), "spec"), "process")
    log = log_row(request.log, config, key)
    sent = log_drivers.fields(request.log, log.driver, config, key)
    fields: dict[str, object] = {
        "rootfs": [_mount(mount) for mount in request.rootfs],
        "user": request.user or None,
        "stdin": request.stdin,
        "stdin_once": request.stdin_once,
        "terminal": bool(process.get("terminal")),
        "console_size": _size(request.console_size) if request.HasField("console_size") else None,
        "log": {
            "driver": log.driver,
            "path": log.path,
            "max_size": log.max_size_bytes,
            "max_files": log.max_files,
            **sent,
        },
        "timeout_ns": _timeout(request),
        "images": [_image(image) for image in request.images],
        "cgroup": {"paths": [_absolute(path, "cgroup_paths") for path in request.cgroup_paths]},
    }
    return NewTask(
        key=key,
        config=request.spec,
        fields=fields,
        args=_args(process),
        terminal=bool(process.get("terminal")),
        stdin=request.stdin,
        stdin_once=request.stdin_once,
        log=log,
        cgroup_paths=tuple(request.cgroup_paths),
        labels=dict(request.labels),
        secrets=_secrets(request),
    )


def _image(image: pb.ImageMount) -> dict[str, object]:
    if image.tree.parts:
        raise InvalidArgument("images.tree: only the root can be put together from parts", reason="BAD_MOUNT")
    return {
        "target": _absolute(image.target, "images.target"),
        "tree": _mount(image.tree),
        "subpath": image.subpath,
        "writable": image.writable,
    }


def _secrets(request: pb.CreateTaskRequest) -> dict[str, object]:
    found: dict[str, object] = {}
    if request.secrets:
        found["secrets"] = [
            {
                "target": _absolute(secret.target, "secrets.target"),
                "uid": secret.uid,
                "gid": secret.gid,
                "mode": secret.mode & 0o7777,
                "data": b64encode(secret.data).decode(),
            }
            for secret in request.secrets
        ]
    if request.secret_env:
        found["secret_env"] = [f"{name}={value}" for name, value in request.secret_env.items()]
    return found


def new_probe(request: pb.ProbeRequest) -> NewProbe:
    """Raises InvalidArgument, naming the field."""
    if request.output_bytes > MOST_OUTPUT:
        raise InvalidArgument(f"output_bytes: must be at most {MOST_OUTPUT}", reason="BAD_SIZE")
    process = _object(request.process, "process")
    new = NewExec(
        exec_id=check_id(request.exec_id, "exec id"),
        process=process,
        fields={"user": request.user or None},
        args=_args(process),
        terminal=False,
        stdin=False,
    )
    return NewProbe(new, _timeout(request), request.output_bytes)


def new_exec(request: pb.ExecRequest, exec_id: str) -> NewExec:
    """Raises InvalidArgument, naming the field."""
    process = dict(_object(request.process, "process"))
    if request.HasField("console_size"):
        process["consoleSize"] = {"width": request.console_size.width, "height": request.console_size.height}
    return NewExec(
        exec_id=check_id(exec_id, "exec id"),
        process=process,
        fields={"user": request.user or None, "stdin": request.stdin},
        args=_args(process),
        terminal=bool(process.get("terminal")),
        stdin=request.stdin,
    )


def _timeout(request: pb.CreateTaskRequest | pb.ProbeRequest) -> int:
    timeout_ns = request.timeout.ToNanoseconds()
    if request.HasField("timeout") and timeout_ns <= 0:
        raise InvalidArgument("timeout: must be more than 0", reason="BAD_TIMEOUT")
    return timeout_ns


def _without_usual_profile(spec: bytes) -> bytes:
    """The same but for the seccomp profile that nearly every one has, most of its text. It is looked for as corral
    writes it; within a string its quotes would be others."""
    return spec.replace(_usual_member(), b'"seccomp":null', 1)


@cache
def _usual_member() -> bytes:
    member, _ = usual_profile()
    return member.encode()


def _object(data: bytes, what: str) -> Mapping[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise InvalidArgument(f"{what} is not JSON: {e}", reason="BAD_SPEC") from e
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} must be a JSON object", reason="BAD_SPEC")
    return value


def _args(process: Mapping[str, object]) -> tuple[str, ...]:
    args = process.get("args")
    return tuple(str(arg) for arg in args) if isinstance(args, list) else ()


def log_row(options: pb.LogOptions, config: TasksConfig, key: TaskKey) -> LogRow:
    """Where a log goes. Raises InvalidArgument, Unimplemented."""
    driver = log_drivers.check_options(options)
    kept = driver not in log_drivers.SENDING or log_drivers.is_cached(options)
    if options.max_size_bytes < 0:
        raise InvalidArgument("log.max_size_bytes must not be negative", reason="BAD_LOG")
    path = _absolute(options.path, "log.path") if options.path else default_log(config.root, key)
    return LogRow(
        driver=driver,
        path="" if driver == "none" or not kept else path,
        max_size_bytes=options.max_size_bytes or config.log_max_size_bytes,
        max_files=options.max_files or config.log_max_files,
    )


def _absolute(path: str, what: str) -> str:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise InvalidArgument(f"{what}: {path!r} is not an absolute path", reason="BAD_PATH")
    return path


def _mount(mount: types_pb.Mount) -> dict[str, object]:
    return {
        "type": mount.type,
        "source": mount.source,
        "target": mount.target,
        "options": list(mount.options),
        **({"parts": [_mount(part) for part in mount.parts]} if mount.parts else {}),
    }


def _size(size: types_pb.WindowSize) -> list[int]:
    return [size.width, size.height]
