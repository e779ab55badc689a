"""What a caller may ask of a container, refused before anything is made; an image's defaults under it."""

import pytest

from corral.api.engine.v1.engine_pb2 import ContainerConfig, NetworkConfig, RestartPolicy, Ulimit, VolumeMount
from corral.api.images.v1.images_pb2 import Healthcheck, ImageConfig
from corral.engine.options import capability_name, check, check_writable_cgroups, rlimit_name
from corral.engine.resolve import command, default_hostname, lay_env, resolve
from corral.engine.signals import parse_signal
from corral.kernel.cgroup import Hierarchy, Kind, Layout
from corral.rpc.errors import FailedPrecondition, InvalidArgument, Unimplemented


def config(**fields: object) -> ContainerConfig:
    return ContainerConfig(image="busybox", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        (Layout(Kind.HYBRID, ()), "on cgroup v1"),
        (Layout(Kind.V2, (Hierarchy(2, "/cg", frozenset()),)), "mount -o remount,nsdelegate /cg"),
    ],
)
def test_write_access_to_its_cgroup_is_for_who_cannot_lift_limits_by_it(layout: Layout, word: str) -> None:
    delegated = Layout(Kind.V2, (Hierarchy(2, "/cg", frozenset(), nsdelegate=True),))
    with pytest.raises(FailedPrecondition, match=word):
        check_writable_cgroups(config(writable_cgroups=True), (), layout)
    check_writable_cgroups(config(writable_cgroups=True), ["CAP_SYS_CHROOT"], delegated)
    check_writable_cgroups(config(writable_cgroups=True, privileged=True), ["CAP_SYS_ADMIN"], layout)
    for mode in ("host", "container:web"):
        with pytest.raises(InvalidArgument, match="cgroup namespace of its own"):
            check_writable_cgroups(config(writable_cgroups=True, cgroupns_mode=mode), (), delegated)
    with pytest.raises(InvalidArgument, match="leave SYS_ADMIN out"):
        check_writable_cgroups(config(writable_cgroups=True), ["CAP_SYS_ADMIN"], delegated)
    for profile in ("unconfined", "{}"):
        with pytest.raises(InvalidArgument, match="leave --security-opt seccomp out"):
            check_writable_cgroups(config(writable_cgroups=True, seccomp_profile=profile), (), delegated)


def mount(kind: "VolumeMount.Type.ValueType" = VolumeMount.TYPE_TMPFS, **fields: object) -> VolumeMount:
    return VolumeMount(type=kind, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        (ContainerConfig(), "image"),
        (config(env=["=x"]), "environment"),
        (config(working_dir="tmp"), "absolute"),
        (config(stop_signal="SIGNOPE"), "signal"),
        (config(hostname="-x"), "hostname"),
        (config(hostname="a" * 65), "hostname"),
        (config(mounts=[mount(target="tmp")]), "absolute"),
        (config(mounts=[mount(target="/a/../../etc")]), "'..'"),
        (config(mounts=[mount(target="/")]), "root"),
        (config(mounts=[mount(target="/a"), mount(target="/a/")]), "same target"),
        (config(mounts=[mount(VolumeMount.TYPE_BIND, source="data", target="/a")]), "absolute"),
        (config(mounts=[mount(VolumeMount.TYPE_VOLUME, source="../x", target="/a")]), "volume name"),
        (config(mounts=[mount(VolumeMount.TYPE_BIND, source="/x", target="/a", propagation="odd")]), "propagation"),
        (config(mounts=[VolumeMount(target="/a")]), "no type"),
        (config(ulimits=[Ulimit(name="nofiles", soft=1, hard=1)]), "resource limit"),
        (config(ulimits=[Ulimit(name="nofile", soft=2, hard=1)]), "above"),
        (config(cap_add=["NET_ADMINS"]), "capability"),
        (config(pid_mode="other"), "pid mode"),
        (config(uts_mode="host", hostname="x"), "hostname"),
        (config(network=NetworkConfig(mode="host", ports=[{"container_port": 80}])), "host"),  # type: ignore[list-item]
        (config(sysctls={"kernel.panic": "1"}), "whole host"),
        (config(sysctls={"net.ipv4.ip_forward": "1"}, network=NetworkConfig(mode="host")), "host"),
        (config(sysctls={"kernel.shmmax": "1"}, ipc_mode="host"), "host"),
        (config(oom_score_adj=1001), "1000"),
        (config(shm_size_bytes=-1), "negative"),
    ],
)
def test_a_request_that_can_never_work_is_refused_with_a_sentence_that_names_the_option(
    wanted: ContainerConfig, word: str
) -> None:
    with pytest.raises(InvalidArgument, match=word):
        check(wanted)


def test_what_is_not_there_yet_is_refused_and_not_ignored() -> None:
    with pytest.raises(Unimplemented, match="not there yet"):
        check(config(userns_mode="keep-id"))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({}, "names no image"),
        ({"source": "busybox", "subpath": "a/../b"}, "without '..'"),
        ({"source": "busybox", "read_only": True, "writable": True}, "either read-only or rw"),
    ],
)
def test_mounts_of_images_that_can_never_work_are_refused(more: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        check(config(mounts=[mount(VolumeMount.TYPE_IMAGE, target="/a", **more)]))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"type": VolumeMount.TYPE_VOLUME, "source": "v", "subpath": "a/../b"}, "without '..'"),
        ({"type": VolumeMount.TYPE_VOLUME, "source": "v", "subpath": "a", "propagation": "rshared"}, "propagation"),
        ({"type": VolumeMount.TYPE_VOLUME, "subpath": "a"}, "is a new one"),
        ({"type": VolumeMount.TYPE_TMPFS, "subpath": "a"}, "images and volumes have a subpath"),
        ({"type": VolumeMount.TYPE_VOLUME, "source": "v", "writable": True}, "images are rw"),
    ],
)
def test_parts_of_what_has_none_are_refused(more: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        check(config(mounts=[VolumeMount(target="/a", **more)]))  # type: ignore[arg-type]


def test_everything_that_works_at_once_is_accepted() -> None:
    check(
        config(
            env=["A=b", "UNSET"],
            working_dir="/srv",
            stop_signal="RTMIN+3",
            hostname="web-1.example",
            mounts=[mount(target="/tmp"), mount(VolumeMount.TYPE_VOLUME, target="/data")],
            ulimits=[Ulimit(name="nofile", soft=1024, hard=-1)],
            cap_add=["all"],
            cap_drop=["cap_net_raw"],
            pid_mode="host",
            ipc_mode="container:abc",
            sysctls={"net/core/somaxconn": "9", "fs.mqueue.msg_max": "9"},
            restart=RestartPolicy(mode=RestartPolicy.MODE_NO),
            healthcheck=Healthcheck(test=["NONE"]),
        )
    )


def test_signals_are_known_by_name_and_number() -> None:
    assert [parse_signal(text) for text in ("TERM", "sigkill", "9", "SIGRTMIN+2")] == [15, 9, 9, 36]
    for text in ("", "0", "65", "TERMINATE", "RTMIN+99", "-9"):
        with pytest.raises(InvalidArgument, match="no signal"):
            parse_signal(text)


def test_names_of_limits_and_capabilities_are_taken_in_any_form() -> None:
    assert rlimit_name(Ulimit(name="NoFile", soft=1, hard=2)) == "RLIMIT_NOFILE"
    assert [capability_name(text) for text in ("net_admin", "CAP_CHOWN", "All")] == [
        "CAP_NET_ADMIN",
        "CAP_CHOWN",
        "ALL",
    ]


IMAGE = ImageConfig(
    entrypoint=["/entry", "-v"],
    cmd=["serve"],
    env=["PATH=/image", "A=image", "B=image"],
    working_dir="/srv",
    user="www",
    stop_signal="SIGQUIT",
    labels={"vendor": "x", "tier": "image"},
    volumes=["/data", "/cache"],
)


@pytest.mark.parametrize(
    ("entrypoint", "args", "words"),
    [
        ([], [], ["/entry", "-v", "serve"]),
        ([], ["stop"], ["/entry", "-v", "stop"]),
        (["/mine"], [], ["/mine"]),
        (["/mine"], ["x"], ["/mine", "x"]),
        ([""], ["ls", "-l"], ["ls", "-l"]),
    ],
)
def test_entrypoint_and_args_merge_as_docker_merges_them(
    entrypoint: list[str], args: list[str], words: list[str]
) -> None:
    first, rest = command(config(entrypoint=entrypoint, args=args), IMAGE)
    assert first + rest == words


@pytest.mark.parametrize("asked", [config(), config(entrypoint=[""]), config(args=[""])])
def test_a_container_without_a_command_is_refused(asked: ContainerConfig) -> None:
    with pytest.raises(InvalidArgument, match="nothing to run"):
        command(asked, ImageConfig())


def test_later_environments_win_and_a_bare_name_unsets() -> None:
    assert lay_env(["A=1", "B=1", "C=1"], ["B=2", "A"], ["D=x=y"]) == ["B=2", "C=1", "D=x=y"]


def test_the_image_fills_in_what_was_not_asked_for() -> None:
    asked = config(
        env=["A=mine"],
        labels={"tier": "mine"},
        mounts=[mount(target="/data")],
    )
    names = iter(["v1", "v2"])
    full = resolve(asked, IMAGE, id_="0123456789abcdef", new_volume_name=lambda: next(names))
    assert list(full.entrypoint) + list(full.args) == ["/entry", "-v", "serve"]
    assert list(full.env) == ["PATH=/image", "A=mine", "B=image"]
    assert (full.working_dir, full.user, full.stop_signal) == ("/srv", "www", "SIGQUIT")
    assert dict(full.labels) == {"vendor": "x", "tier": "mine"}
    assert full.hostname == "0123456789ab"
    assert [(m.target, m.source) for m in full.mounts] == [("/data", ""), ("/cache", "v1")]
    assert not asked.args, "what was asked for is not changed"


def test_labels_of_an_image_steer_nothing() -> None:
    hostile = ImageConfig(cmd=["x"], labels={"corral.privileged": "true", "corral.network": "host"})
    full = resolve(config(), hostile, id_="a" * 64, new_volume_name=lambda: "v")
    full.ClearField("labels")
    assert full == resolve(config(), ImageConfig(cmd=["x"]), id_="a" * 64, new_volume_name=lambda: "v")


@pytest.mark.parametrize("path", ["/a/../../etc", "relative", "/", "/x\0y"])
def test_a_volume_path_of_an_image_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match="mount"):
        resolve(config(), ImageConfig(cmd=["x"], volumes=[path]), id_="a" * 64, new_volume_name=lambda: "v")


def test_a_hostname_made_of_an_id_is_always_valid() -> None:
    assert default_hostname("web_1.backend") == "web-1.backen"
    assert default_hostname("a___________") == "a"
