"""From config and facts to an OCI spec, as docker would have it; devices and seccomp profiles."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from corral.api.engine.v1.engine_pb2 import ContainerConfig, Ulimit, VolumeMount
from corral.api.network.v1.network_pb2 import Endpoint
from corral.engine.devices import GrantedDevice, grant, host_device
from corral.engine.seccomp import Host, kernel_version, parse_profile
from corral.engine.spec import Facts, HostFacts, build, process_for_exec
from corral.engine.spec_text import encode, with_cgroup
from corral.kernel import capabilities
from corral.kernel.namespaces import Kind
from corral.kernel.rlimits import UNLIMITED
from corral.oci import defaults
from corral.oci.spec import Action, Device, DeviceType, Mount, Process, Spec
from corral.rpc.errors import InvalidArgument, NotFound

ALL = frozenset(f"CAP_{name}" for name in capabilities.NAMES)
HOST = HostFacts(hostname="thehost", machine="x86_64", kernel=(6, 18), capabilities=ALL)
ENDPOINT = Endpoint(
    netns_path="/run/corral/netns/x",
    hosts_path="/n/hosts",
    resolv_conf_path="/n/resolv.conf",
    hostname_path="/n/hostname",
)


def facts(**changes: object) -> Facts:
    given: dict[str, object] = {"id": "a" * 64, "host": HOST, "endpoint": ENDPOINT}
    return Facts(**given | changes)  # type: ignore[arg-type]


def spec(**fields: object) -> Spec:
    given: dict[str, object] = {"image": "busybox", "args": ["sh"], "hostname": "box", "working_dir": "/"}
    return build(ContainerConfig(**given | fields), facts())  # type: ignore[arg-type]


def process(**fields: object) -> Process:
    found = spec(**fields).process
    assert found is not None
    return found


def mount_at(target: str, found: Spec) -> Mount:
    [mount] = [mount for mount in found.mounts if mount.destination == target]
    return mount


def kinds(found: Spec) -> dict[Kind, str]:
    return {namespace.type: namespace.path for namespace in found.linux.namespaces}


def test_a_plain_container_has_everything_of_its_own() -> None:
    found = spec()
    assert kinds(found) == {
        Kind.MOUNT: "",
        Kind.PID: "",
        Kind.IPC: "",
        Kind.UTS: "",
        Kind.CGROUP: "",
        Kind.NETWORK: "/run/corral/netns/x",
    }
    assert found.hostname == "box"
    assert found.linux.masked_paths == tuple(defaults.MASKED_PATHS)
    assert found.linux.readonly_paths == tuple(defaults.READONLY_PATHS)
    assert found.linux.seccomp is not None
    assert found.process is not None
    assert found.process.no_new_privileges
    assert found.root is not None
    assert not found.root.readonly


def test_the_spec_survives_its_own_json() -> None:
    found = spec(ulimits=[Ulimit(name="nofile", soft=5, hard=-1)], sysctls={"net/ipv4/ip_forward": "1"})
    text = encode(found)
    assert Spec.from_json(json.loads(text)) == found
    in_cgroup = replace(found, linux=replace(found.linux, cgroups_path='/corral/"a"'))
    assert Spec.from_json(json.loads(with_cgroup(text, '/corral/"a"'))) == in_cgroup
    assert found.linux.sysctl == {"net.ipv4.ip_forward": "1"}


def test_the_environment_begins_with_path_hostname_and_term() -> None:
    assert process().env[:2] == (
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME=box",
    )
    assert "TERM=xterm" in process(terminal=True).env
    own = process(terminal=True, env=["PATH=/bin", "TERM=vt100", "X=1"])
    assert own.env == ("PATH=/bin", "HOSTNAME=box", "TERM=vt100", "X=1")


def test_capabilities_are_dockers_defaults_in_three_sets_and_in_no_other() -> None:
    held = process().capabilities
    assert held is not None
    assert set(held.bounding) == set(defaults.CAPABILITIES)
    assert held.bounding == held.effective == held.permitted
    assert held.ambient == held.inheritable == ()


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        (["NET_ADMIN"], [], set(defaults.CAPABILITIES) | {"CAP_NET_ADMIN"}),
        ([], ["cap_chown"], set(defaults.CAPABILITIES) - {"CAP_CHOWN"}),
        (["SYS_TIME"], ["ALL"], {"CAP_SYS_TIME"}),
        ([], ["ALL"], set()),
        (["ALL"], [], set(ALL)),
        (["ALL"], ["SYS_ADMIN"], set(ALL) - {"CAP_SYS_ADMIN"}),
    ],
)
def test_capabilities_are_added_and_dropped_as_docker_does(add: list[str], drop: list[str], expected: set[str]) -> None:
    held = process(cap_add=add, cap_drop=drop).capabilities
    assert held is not None
    assert set(held.bounding) == expected


def test_nobody_can_hand_on_a_capability_that_corral_lacks() -> None:
    poor = HostFacts("h", "x86_64", (6, 18), ALL - {"CAP_SYS_RESOURCE", "CAP_MKNOD"})
    config = ContainerConfig(args=["x"], privileged=True)
    found = build(config, facts(host=poor)).process
    assert found is not None
    assert found.capabilities is not None
    assert "CAP_SYS_RESOURCE" not in found.capabilities.bounding
    assert "CAP_SYS_ADMIN" in found.capabilities.bounding
    with pytest.raises(InvalidArgument, match="CAP_SYS_RESOURCE"):
        build(ContainerConfig(args=["x"], cap_add=["SYS_RESOURCE"]), facts(host=poor))


def test_a_privileged_container_sees_and_may_all() -> None:
    found = spec(privileged=True)
    assert found.linux.masked_paths == found.linux.readonly_paths == ()
    assert found.linux.seccomp is None
    assert "ro" not in mount_at("/sys", found).options
    assert "ro" not in mount_at("/sys/fs/cgroup", found).options
    assert "ro" in mount_at("/sys", spec()).options
    assert "ro" in mount_at("/sys/fs/cgroup", spec(privileged=True, writable_cgroups=False)).options


def test_who_may_divide_its_cgroup_writes_there_alone() -> None:
    found = spec(writable_cgroups=True)
    assert "ro" not in mount_at("/sys/fs/cgroup", found).options
    assert "ro" in mount_at("/sys", found).options
    assert "ro" in mount_at("/sys/fs/cgroup", spec()).options


def test_namespaces_of_the_host_are_left_out_and_those_of_others_joined() -> None:
    config = ContainerConfig(args=["x"], pid_mode="host", ipc_mode="container:b", uts_mode="host", cgroupns_mode="host")
    joined = {Kind.IPC: "/proc/7/ns/ipc"}
    found = build(config, facts(joined=joined, endpoint=Endpoint()))
    assert kinds(found) == {Kind.MOUNT: "", Kind.IPC: "/proc/7/ns/ipc"}
    assert found.hostname == ""
    assert found.process is not None
    assert "HOSTNAME=thehost" in found.process.env


def test_the_networks_files_are_mounted_writable() -> None:
    found = spec()
    for target, source in (
        ("/etc/hosts", "/n/hosts"),
        ("/etc/resolv.conf", "/n/resolv.conf"),
        ("/etc/hostname", "/n/hostname"),
    ):
        assert mount_at(target, found) == Mount(target, "bind", source, ("rbind", "rprivate"))


def test_a_mount_that_was_asked_for_replaces_ours_and_parents_come_first() -> None:
    mounts = [
        VolumeMount(type=VolumeMount.TYPE_BIND, source="/h", target="/srv/deep", read_only=True),
        VolumeMount(type=VolumeMount.TYPE_VOLUME, source="data", target="/srv", propagation="rslave"),
        VolumeMount(type=VolumeMount.TYPE_TMPFS, target="/dev/shm", tmpfs_size_bytes=4096, tmpfs_mode=0o1777),
        VolumeMount(type=VolumeMount.TYPE_BIND, source="/my/hosts", target="/etc/hosts"),
    ]
    config = ContainerConfig(args=["x"], mounts=mounts)
    found = build(config, facts(volume_paths={"data": "/v/data"}))
    order = [mount.destination for mount in found.mounts]
    assert order.index("/srv") < order.index("/srv/deep")
    assert mount_at("/srv", found) == Mount("/srv", "bind", "/v/data", ("rbind", "rslave"))
    assert mount_at("/srv/deep", found).options == ("rbind", "rprivate", "ro", "rro")
    assert mount_at("/etc/hosts", found).source == "/my/hosts"
    shm = mount_at("/dev/shm", found)
    assert {"noexec", "nosuid", "nodev", "size=4096", "mode=1777"} <= set(shm.options)


def test_tmpfs_takes_the_opposite_of_its_defaults() -> None:
    mount = VolumeMount(type=VolumeMount.TYPE_TMPFS, target="/t", options=["exec"])
    assert mount_at("/t", spec(mounts=[mount])).options == ("nosuid", "nodev", "exec")


def test_the_size_of_shm() -> None:
    assert "size=67108864" in mount_at("/dev/shm", spec()).options
    sizes = [o for o in mount_at("/dev/shm", spec(shm_size_bytes=1 << 20)).options if o.startswith("size=")]
    assert sizes == ["size=1048576"]
    assert mount_at("/dev/shm", spec(ipc_mode="host")).source == "/dev/shm"


def test_limits_users_groups_and_scores_reach_the_process() -> None:
    found = process(
        ulimits=[Ulimit(name="core", soft=-1, hard=-1), Ulimit(name="nproc", soft=5, hard=9)],
        group_add=["27", "audio", "44"],
        oom_score_adj=-5,
        working_dir="/srv",
        no_new_privileges=False,
        terminal=True,
    )
    limits = {limit.type: (limit.soft, limit.hard) for limit in found.rlimits}
    assert limits["RLIMIT_CORE"] == (UNLIMITED, UNLIMITED)
    assert limits["RLIMIT_NPROC"] == (5, 9)
    assert (found.user.additional_gids, found.user.group_names) == ((27, 44), ("audio",))
    assert (found.oom_score_adj, found.cwd, found.no_new_privileges, found.terminal) == (-5, "/srv", False, True)


def test_what_is_no_group_is_refused() -> None:
    for name in ("", "a:b", "a\nb"):
        with pytest.raises(InvalidArgument, match="no name of a group"):
            spec(group_add=[name])
    with pytest.raises(InvalidArgument, match="too large"):
        spec(group_add=["4294967295"])


def test_paths_can_be_overridden() -> None:
    found = spec(override_paths=True, masked_paths=["/proc/kcore"])
    assert found.linux.masked_paths == ("/proc/kcore",)
    assert found.linux.readonly_paths == ()


def test_labels_steer_nothing() -> None:
    assert spec(labels={"privileged": "true", "io.x": "y"}) == spec()


def test_an_exec_is_as_the_container_but_for_what_it_says() -> None:
    config = ContainerConfig(args=["x"], env=["A=1"], working_dir="/srv", hostname="box", cap_drop=["ALL"])
    found = process_for_exec(config, HOST, args=("ls",), env=["B=2"], working_dir="", terminal=True, privileged=False)
    assert (found.args, found.cwd, found.terminal) == (("ls",), "/srv", True)
    assert {"A=1", "B=2", "HOSTNAME=box", "TERM=xterm"} <= set(found.env)
    assert found.capabilities is not None
    assert found.capabilities.bounding == ()
    strong = process_for_exec(config, HOST, args=("ls",), env=[], working_dir="/", terminal=False, privileged=True)
    assert strong.capabilities is not None
    assert set(strong.capabilities.bounding) == set(ALL)


# Devices


def test_a_device_is_found_on_the_host_and_may_be_renamed() -> None:
    null = Device("/dev/nothing", DeviceType.CHAR, 1, 3, 0o666, 0, 0)
    assert grant(["/dev/null:/dev/nothing:r"]) == [GrantedDevice(null, "r")]
    assert grant(["/dev/null:rw"])[0].access == "rw"
    assert host_device(Path("/etc/passwd")) is None


@pytest.mark.parametrize("option", ["null", "/etc/passwd", "/dev/null:/dev/x:rq", "/dev/null:relative:rw", ""])
def test_what_is_no_device_is_refused(option: str) -> None:
    with pytest.raises(InvalidArgument, match="no device"):
        grant([option])


def test_a_device_the_host_lacks_is_not_found() -> None:
    with pytest.raises(NotFound, match="/dev/does-not-exist"):
        grant(["/dev/does-not-exist"])


def test_a_directory_of_devices_means_all_in_it() -> None:
    if not Path("/dev/net").is_dir():
        pytest.skip("the host has no /dev/net")
    assert {granted.device.path for granted in grant(["/dev/net"])} >= {"/dev/net/tun"}


# Seccomp

SECCOMP_HOST = Host("x86_64", (6, 1), frozenset({"CAP_CHOWN"}))
PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
    ],
    "syscalls": [
        {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
        {"name": "old_form", "action": "SCMP_ACT_ALLOW"},
        {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["chown"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_CHOWN"]}},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_CHOWN"]}},
        {"names": ["arm_only"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "7.0"}},
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}],
        },
    ],
}


def test_a_profile_of_docker_is_worked_out_for_this_host() -> None:
    found = parse_profile(json.dumps(PROFILE), SECCOMP_HOST)
    assert found.default_action is Action.ERRNO
    assert found.architectures == ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86")
    assert [rule.names for rule in found.syscalls] == [
        ("read", "write"),
        ("old_form",),
        ("chown",),
        ("ptrace",),
        ("personality",),
    ]
    assert found.syscalls[-1].args[0].index == 0


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"defaultAction": "SCMP_ACT_NOPE"}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {}}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [7]}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"], "action": "x"}]}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [7]}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [], "includes": {"minKernel": "x"}}]}',
    ],
)
def test_a_malformed_profile_is_refused_with_one_sentence(text: str) -> None:
    with pytest.raises(InvalidArgument, match="seccomp profile"):
        parse_profile(text, SECCOMP_HOST)


def test_profiles_can_be_given_and_refused() -> None:
    assert spec(seccomp_profile="unconfined").linux.seccomp is None
    own = json.dumps({"defaultAction": "SCMP_ACT_ALLOW"})
    found = spec(seccomp_profile=own, privileged=True).linux.seccomp
    assert found is not None
    assert found.default_action is Action.ALLOW


def test_kernel_versions() -> None:
    assert kernel_version("6.18.5-amd64") == (6, 18)
    assert kernel_version("weird") == (0, 0)
