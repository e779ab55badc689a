"""`corral run` and `corral create`."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from corral.cli.app import App, ImageName, pass_app
from corral.cli.environment import lines_of, passed_on
from corral.cli.exit_status import exit_code
from corral.cli.flags import SwitchCommand

if TYPE_CHECKING:
    from corral.api.engine.v1 import engine_pb2
    from corral.client.fetching import Pull
    from corral.client.options import ContainerOptions

_MANY: dict[str, Any] = {"multiple": True}
_NETWORKS = "a network's name; may be repeated, and be name=web,alias=db,ip=…"


def _no_kernel_memory(_context: click.Context, _option: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise ValueError("kernel memory has no limit of its own since Linux 5.16: it counts towards --memory")


# Flags, name of the option in corral.client.options, help; the rest goes to click.
CHANGEABLE: tuple[tuple[tuple[str, ...], str, dict[str, Any]], ...] = (
    (("-m", "--memory"), "Memory limit, such as 64m", {"default": ""}),
    (
        ("--kernel-memory",),
        "Refused: it counts towards --memory",
        {"hidden": True, "expose_value": False, "callback": _no_kernel_memory},
    ),
    (("--memory-swap",), "Memory plus swap; -1 for no limit", {"default": ""}),
    (("--memory-reservation",), "Soft memory limit", {"default": ""}),
    (("--memory-high",), "Above it the kernel slows it down; cgroup v2 only", {"default": ""}),
    (("--memory-min",), "Memory that nobody takes away; cgroup v2 only", {"default": ""}),
    (("--memory-swappiness",), "0 to 100; cgroup v1 only", {"type": click.IntRange(0, 100), "default": None}),
    (("--oom-kill-disable/--no-oom-kill-disable",), "Sleep, not be killed; cgroup v1 only", {"default": None}),
    (("--oom-group/--no-oom-group",), "An OOM kills all of its processes; cgroup v2 only", {"default": None}),
    (("--cpus",), "CPUs, such as 1.5", {"type": float, "default": 0.0}),
    (("--cpu-period",), "Period of the CPU quota, in microseconds", {"type": int, "default": 0}),
    (("--cpu-quota",), "CPU time in each period, in microseconds; -1 for no limit", {"type": int, "default": 0}),
    (("--cpu-burst",), "Time saved up for use above the quota, in microseconds", {"type": int, "default": None}),
    (("--cpu-idle/--no-cpu-idle",), "Run when nobody else wants to", {"default": None}),
    (("--cpu-rt-period",), "Period of real-time CPU time, in microseconds", {"type": int, "default": 0}),
    (
        ("--cpu-rt-runtime",),
        "Real-time CPU time in each period, in microseconds; cgroup v1 only",
        {"type": int, "default": None},
    ),
    (("-c", "--cpu-shares"), "Relative weight, default 1024", {"type": int, "default": 0}),
    (("--cpuset-cpus",), "CPUs to run on, such as 0-2,4", {"default": ""}),
    (("--cpuset-mems",), "Memory nodes to use", {"default": ""}),
    (("--pids-limit",), "Most processes; 0 or -1 for no limit", {"type": int}),
    (("--blkio-weight",), "Relative weight of block I/O, 10 to 1000", {"type": int, "default": 0}),
    (("--blkio-weight-device", "blkio_weight_devices"), "The same for one device, /dev/x:WEIGHT", _MANY),
    (("--device-read-bps",), "Most bytes read per second, /dev/x:10m", _MANY),
    (("--device-write-bps",), "Most bytes written per second, /dev/x:10m", _MANY),
    (("--device-read-iops",), "Most reads per second, /dev/x:100", _MANY),
    (("--device-write-iops",), "Most writes per second, /dev/x:100", _MANY),
    (("--hugetlb",), "Most huge pages, 2MB=64m", _MANY),
    (("--rdma",), "Most of an RDMA device, mlx5_0=hca_handle=2,hca_object=100", _MANY),
    (("--pressure",), "Event when its processes wait, memory:some:150ms/2s; cpu, memory or io, some or full", _MANY),
    (("--cgroup-conf",), "Raw key of cgroup v2, memory.high=64M", _MANY),
    (
        ("--net-rate",),
        "Most bits per second that it receives and sends, 100m, or 100m/20m; 0: no limit",
        {"default": ""},
    ),
    (("--restart",), "no, always, on-failure[:N] or unless-stopped", {"default": ""}),
    (("-l", "--label", "labels"), "Label, KEY=VALUE", _MANY),
)
_OPTIONS: tuple[tuple[tuple[str, ...], str, dict[str, Any]], ...] = (
    (("--entrypoint",), "Replace the image's entrypoint", {"default": None}),
    (("-e", "--env"), "Set an environment variable, NAME=VALUE, or NAME to pass it on", _MANY),
    (("--label-file",), "Read labels from a file", {"multiple": True, "type": click.Path(exists=True)}),
    (("--env-file",), "Read environment variables from a file", {"multiple": True, "type": click.Path(exists=True)}),
    (("-w", "--workdir", "working_dir"), "Working directory inside", {"default": ""}),
    (("-u", "--user"), "User: name or uid, with :group", {"default": ""}),
    (("--group-add",), "Further group of the process", _MANY),
    (("-h", "--hostname"), "Host name inside", {"default": ""}),
    (("--domainname",), "NIS domain name inside", {"default": ""}),
    (("-v", "--volume", "volumes"), "Bind mount or volume, SOURCE:TARGET[:ro]", _MANY),
    (("--volumes-from",), "The volumes and bind mounts of another container, NAME[:ro]", _MANY),
    (("--mount", "mounts"), "Mount, type=bind|volume|tmpfs|image,source=…,target=…", _MANY),
    (("--tmpfs",), "tmpfs, TARGET[:size=64m,mode=1777]", _MANY),
    (("--secret", "secrets"), "Secret, NAME[,target=…,uid=…,gid=…,mode=…,type=mount|env]", _MANY),
    (("--read-only",), "Root file system read-only", {"is_flag": True}),
    *CHANGEABLE,
    (("--annotation", "annotations"), "Annotation of its config.json, KEY=VALUE", _MANY),
    (("--oom-score-adj",), "Whom the kernel kills first, -1000 to 1000", {"type": int, "default": None}),
    (("--network", "--net", "network"), f"bridge, host, none, container:ID or {_NETWORKS}", _MANY),
    (("--network-alias", "network_aliases"), "Further name in the network", _MANY),
    (("--ip",), "Fixed address in the network", {"default": ""}),
    (("--ip6",), "Fixed IPv6 address in the network", {"default": ""}),
    (("--mac-address",), "MAC address", {"default": ""}),
    (
        ("-p", "--publish", "ports"),
        "Publish a port, [IP:][HOST:]CONTAINER[/udp]; HOST may be a range, for the first that is free",
        _MANY,
    ),
    (("-P", "--publish-all"), "Publish every port that the image exposes", {"is_flag": True}),
    (("--dns",), "Name server", _MANY),
    (("--dns-search",), "Search domain", _MANY),
    (("--dns-option", "dns_options"), "Resolver option", _MANY),
    (("--add-host", "extra_hosts"), "Line for /etc/hosts, NAME:ADDRESS", _MANY),
    (("--cap-add",), "Add a capability, or ALL", _MANY),
    (("--cap-drop",), "Drop a capability, or ALL", _MANY),
    (("--privileged",), "All capabilities and devices", {"is_flag": True}),
    (
        ("--security-opt", "security"),
        "seccomp=unconfined|FILE, no-new-privileges[=false], writable-cgroups=true",
        _MANY,
    ),
    (("--sysctl", "sysctls"), "Kernel parameter of the container's namespaces, NAME=VALUE", _MANY),
    (("--ulimit", "ulimits"), "Resource limit, NAME=SOFT[:HARD]", _MANY),
    (
        ("--device-cgroup-rule", "device_cgroup_rules"),
        "Devices that may be used besides, where there is a node, 'c 42:* rmw'",
        _MANY,
    ),
    (("--device", "devices"), "Host device, /dev/x[:/dev/y[:rwm]]", _MANY),
    (("--shm-size",), "Size of /dev/shm, default 64m", {"default": ""}),
    (("--storage-opt", "storage_options"), "size=10g: no more than that is written in it", _MANY),
    (("--stop-signal",), "Signal that ends it, default the image's, else SIGTERM", {"default": ""}),
    (("--stop-timeout", "stop_timeout_s"), "Seconds until SIGKILL, default 10", {"type": float, "default": None}),
    (("--timeout",), "Kill it when it has run for so many seconds, 0: never", {"default": ""}),
    (("--init",), "Run a small init as pid 1", {"is_flag": True}),
    (("--pid",), "PID namespace: host or container:ID", {"default": ""}),
    (("--ipc",), "IPC namespace: host or container:ID", {"default": ""}),
    (("--uts",), "UTS namespace: host", {"default": ""}),
    (("--cgroupns",), "cgroup namespace: private or host", {"default": ""}),
    (("--cgroup-parent",), "Parent of the container's cgroup", {"default": ""}),
    (("--health-cmd",), "Line for its shell whose exit code tells its health", {"default": ""}),
    (("--health-interval",), "Time between two of its runs, default 30s", {"default": ""}),
    (("--health-timeout",), "Time that it may take, default 30s", {"default": ""}),
    (("--health-retries",), "Failures in a row that make it unhealthy, default 3", {"type": int, "default": 0}),
    (("--health-start-period",), "Time in which failures do not count", {"default": ""}),
    (("--health-start-interval",), "Time between two runs in that, default 5s", {"default": ""}),
    (("--health-on-failure",), "none, kill, restart or stop", {"default": ""}),
    (("--no-healthcheck",), "Not the image's health check", {"is_flag": True}),
    (("--log-driver",), "json-file, cri, none, syslog, journald, binary:///path/of/program", {"default": ""}),
    (("--log-opt", "log_options"), "Log option, such as max-size=16m or tag={{.Name}}", _MANY),
)
_PAIRS = ("labels", "annotations", "sysctls", "log_options", "cgroup_conf")
MAY_BE_ZERO = (
    *("stop_timeout_s", "memory_swappiness", "oom_score_adj", "cpu_burst", "pids_limit"),
    *("cpu_idle", "cpu_rt_runtime", "oom_group", "oom_kill_disable"),
)
"""Not given is None."""


def _container_options[F: Callable[..., object]](function: F) -> F:
    """What `run` and `create` have in common."""
    function = click.argument("args", nargs=-1, type=click.UNPROCESSED)(function)
    function = click.argument("image", type=ImageName())(function)
    for flags, text, more in reversed(_OPTIONS):
        function = click.option(*flags, help=text, **more)(function)
    function = click.option("--rm", "auto_remove", is_flag=True, help="Remove it when it has ended")(function)
    function = click.option("--cidfile", type=click.Path(), help="Write the id to this file")(function)
    function = click.option(
        "--pull", type=click.Choice(["always", "missing", "never"]), default="missing", show_default=True,
        help="When to fetch the image",
    )(function)  # fmt: skip
    function = click.option("--platform", default="", metavar="OS/ARCH[/VARIANT]", help="Platform of the image")(
        function
    )
    function = click.option("-q", "--quiet", is_flag=True, help="Say nothing while the image is fetched")(function)
    function = click.option("--name", default="", help="Name; one is made otherwise")(function)
    function = click.option("-t", "--tty", "terminal", is_flag=True, help="Give it a terminal")(function)
    return click.option("-i", "--interactive", "stdin", is_flag=True, help="Keep stdin open")(function)


_CONTEXT = {"ignore_unknown_options": False, "allow_interspersed_args": False, "help_option_names": ["--help"]}


@click.command("create", cls=SwitchCommand, context_settings=_CONTEXT)
@_container_options
@pass_app
def create_command(app: App, image: str, args: Sequence[str], name: str, cidfile: str | None, **flags: Any) -> None:
    """Create a container without starting it."""
    click.echo(_create(app, image, args, name, cidfile, flags | {"stdin_once": flags["stdin"]}).id)


@click.command("run", cls=SwitchCommand, context_settings=_CONTEXT)
@_container_options
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the background and print its id")
@click.option(
    "-a",
    "--attach",
    "streams",
    multiple=True,
    type=click.Choice(("stdin", "stdout", "stderr"), case_sensitive=False),
    help="Only attach to these",
)
@click.option("--detach-keys", default="ctrl-p,ctrl-q", show_default=True, help="Keys that detach this terminal")
@click.option("--sig-proxy/--no-sig-proxy", default=True, help="Pass signals on to the container")
@pass_app
def run_command(
    app: App,
    image: str,
    args: Sequence[str],
    name: str,
    cidfile: str | None,
    detach: bool,
    streams: Sequence[str],
    detach_keys: str,
    sig_proxy: bool,
    **flags: Any,
) -> int:
    """Create a container and run a command in it; the exit code is the command's."""
    from corral.cli import terminal
    from corral.cli.detach_keys import parse_detach_keys

    if detach and streams:
        raise ValueError("-d and -a exclude one another: leave one out")
    keys = parse_detach_keys(detach_keys)
    attached = set(streams) or {"stdin", "stdout", "stderr"}
    stdin = "stdin" in attached and (flags["stdin"] or "stdin" in streams)
    if flags["terminal"] and stdin and not detach:
        terminal.require_terminal()
    flags["stdin"] = flags["stdin"] or stdin
    made = _create(app, image, args, name, cidfile, flags | {"stdin_once": stdin and not detach})
    if detach:
        _start(app, made)
        click.echo(made.id)
        return 0
    from corral.client.execution import Attachment
    from corral.rpc.errors import NotFound, Unavailable

    session = terminal.Session(
        app.client,
        Attachment(made.id, stdin=stdin, stdout="stdout" in attached, stderr="stderr" in attached, lossless=True),
        terminal=flags["terminal"],
        detach_keys=keys,
        signal_proxy=sig_proxy,
    )
    if attached == {"stdin"}:
        click.echo(made.id)
    status = session.run(lambda: _start(app, made))
    if status is None:
        return 0
    if flags["auto_remove"]:
        with contextlib.suppress(NotFound, Unavailable):  # it is gone already; or whoever removes it is
            app.client.containers.wait(made.id, "removed")
    return exit_code(status)


def _create(
    app: App, image: str, args: Sequence[str], name: str, cidfile: str | None, flags: dict[str, Any]
) -> "engine_pb2.Container":
    fetch = Fetch(flags.pop("pull"), flags.pop("platform"), flags.pop("quiet"))
    borrowed = [volume for text in flags.pop("volumes_from") for volume in _volumes_of(app, text)]
    flags["volumes"] = (*borrowed, *flags["volumes"])
    options = _options_from_flags(flags)
    if cidfile and Path(cidfile).exists():
        raise ValueError(f"the file {cidfile} exists: remove it, or give another --cidfile")
    containers = app.client.containers
    made = _with_image(app, image, fetch, lambda: containers.create(image, args, name=name, pull="never", **options))
    if cidfile:
        Path(cidfile).write_text(made.id, encoding="utf-8")
    return made


def _volumes_of(app: App, text: str) -> list[str]:
    """What another container has mounted from outside, as for -v; of ours at the same place ours is taken."""
    from corral.api.engine.v1 import engine_pb2

    name, _, access = text.partition(":")
    if access not in ("", "ro", "rw"):
        raise ValueError(f"volumes from {text!r} are not understood: give NAME, NAME:ro or NAME:rw")
    kinds = (engine_pb2.VolumeMount.TYPE_BIND, engine_pb2.VolumeMount.TYPE_VOLUME)
    mounts = [mount for mount in app.client.containers.get(name).config.mounts if mount.type in kinds]
    return [f"{m.source}:{m.target}:{'ro' if m.read_only or access == 'ro' else 'rw'}" for m in mounts]


class Fetch(NamedTuple):
    """When and how the image is fetched."""

    pull: "Pull"
    platform: str
    quiet: bool


def _with_image(
    app: App, image: str, fetch: Fetch, create: "Callable[[], engine_pb2.Container]"
) -> "engine_pb2.Container":
    """Create, and fetch the image before if it is not here for the platform, or in any case."""
    from corral.client.fetching import may_fetch
    from corral.rpc.errors import NotFound

    pull, platform, quiet = fetch
    if pull == "always":
        from corral.cli.registry import pull_image

        pull_image(app, image, platform=platform, quiet=quiet)
    elif platform and app.client.images.lacks(image, platform=platform, pull=pull):
        _pull_missing(app, image, fetch)
    try:
        return create()
    except NotFound as e:
        if not may_fetch(e, image, pull):
            raise
    _pull_missing(app, image, fetch)
    return create()


def _pull_missing(app: App, image: str, fetch: Fetch) -> None:
    from corral.cli.registry import pull_image

    if not fetch.quiet:
        where = f"for {fetch.platform} locally" if fetch.platform else "locally"
        click.echo(f"Unable to find image {_tagged(image)!r} {where}", err=True)
    pull_image(app, image, platform=fetch.platform, quiet=fetch.quiet)


def _tagged(image: str) -> str:
    return image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"


def _start(app: App, made: "engine_pb2.Container") -> None:
    app.client.containers.start(made.id)


def _options_from_flags(flags: dict[str, Any]) -> "ContainerOptions":
    """click's values as options of the client: unset ones left out, files read, pairs split."""
    from corral.cli.terminal import window_size

    flags = dict(flags)
    flags["env"] = passed_on(flags.pop("env_file"), flags["env"])
    flags["labels"] = [*(line for file in flags.pop("label_file") for line in lines_of(file)), *flags["labels"]]
    for key in _PAIRS:
        flags[key] = dict(_pair(key, text) for text in flags[key])
    if flags.pop("no_healthcheck"):
        if flags["health_cmd"]:
            raise ValueError("--no-healthcheck and --health-cmd exclude one another: leave one out")
        flags["health_cmd"] = "none"
    if flags["terminal"] and (size := window_size()):
        flags["console_size"] = size
    options: ContainerOptions = {
        k: v for k, v in flags.items() if v not in (None, (), {}, [], 0, False) or k == "entrypoint"
    }  # type: ignore[assignment]
    options.update({key: flags[key] for key in MAY_BE_ZERO if flags[key] is not None})  # type: ignore[typeddict-item]
    for key in ("memory", "memory_swap", "memory_reservation", "shm_size", *("user", "hostname")):
        if options.get(key) == "":
            del options[key]  # type: ignore[misc]
    return options


def _pair(what: str, text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not key or (not separator and what not in ("labels", "annotations")):
        raise ValueError(f"{what.rstrip('s').replace('_', '-')} {text!r} is not understood: give KEY=VALUE")
    return key, value
