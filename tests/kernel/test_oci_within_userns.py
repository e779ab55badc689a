"""corral-oci run by the root of a user namespace that another made, as under rootless podman or in a container."""

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.leaks import TAG_VARIABLE
from support.ocicommand import TIMEOUT_S, Runtime, runtime_in
from support.requirements import needs
from support.rootless import SUBIDS, USER, give, machine, users_directory

from corral.kernel.cgroup import Cgroup, Driver, detect

pytestmark = needs("root", "busybox", "userns", "unshare", "nsenter", "setpriv")

ONE_ID = ["unshare", "--user", "--map-root-user"]
WAYS = {
    "one id": ONE_ID,
    "one id, and mounts of its own": [*ONE_ID, "--mount"],
    "a range of ids": [*ONE_ID, "--map-auto"],
}


@pytest.fixture
def oci() -> Iterator[Runtime]:
    with users_directory() as directory, runtime_in(directory) as runtime:
        give(directory)
        yield runtime


@pytest.fixture
def user(oci: Runtime) -> Iterator[list[str]]:
    with machine(oci.directory) as words:
        yield words


@pytest.fixture(params=WAYS)
def inside(request: pytest.FixtureRequest, user: list[str]) -> list[str]:
    """The words before a command that the root of a user namespace is to run."""
    if "--map-auto" in (way := WAYS[request.param]):
        _need_map_auto()
    return [*user, *way]


def _need_map_auto() -> None:
    help_ = subprocess.run(["unshare", "--help"], capture_output=True, text=True, check=False).stdout
    if "--map-auto" not in help_:
        pytest.skip("needs unshare --map-auto")


def spec_of(oci: Runtime, *args: str, **changes: object) -> dict[str, object]:
    """A config.json without ids that may not be there."""
    spec = oci.spec(*args, **changes)
    for mount in spec["mounts"]:
        mount["options"] = [o for o in mount.get("options", []) if not o.startswith("gid=")]
    return spec


def call(words: list[str], *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*words, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def run(words: list[str], oci: Runtime, spec: dict[str, object], *flags: str) -> "subprocess.CompletedProcess[str]":
    oci.write_spec(spec)
    command = oci.words()
    return call(words, *command, *flags, "run", "--bundle", str(oci.bundle), oci.new_id())


def detached(words: list[str], oci: Runtime, *command: str) -> None:
    """A command whose container must not hold our pipes."""
    log = oci.directory / "stderr"
    with log.open("w") as file:
        code = subprocess.run(
            [*words, *oci.words(*command)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
            timeout=TIMEOUT_S, check=False,
        ).returncode  # fmt: skip
    assert code == 0, log.read_text()


def without(spec: dict[str, object], *kinds: str) -> dict[str, object]:
    """The same spec, with namespaces of the host."""
    linux = spec["linux"]
    linux["namespaces"] = [each for each in linux["namespaces"] if each["type"] not in kinds]
    return spec


def with_ids_of_its_own(spec: dict[str, object]) -> dict[str, object]:
    """The same spec, with a user namespace within the one there is."""
    linux = spec["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 1}]
    return spec


@pytest.mark.parametrize("nested", [False, True], ids=["its user namespace", "one more user namespace"])
class TestEverywhere:
    def spec(self, nested: bool, oci: Runtime, *args: str, **changes: object) -> dict[str, object]:
        spec = spec_of(oci, *args, **changes)
        return with_ids_of_its_own(spec) if nested else spec

    def test_it_is_root_inside_and_the_user_outside(self, oci, inside, nested):
        result = run(inside, oci, self.spec(nested, oci, "id -u; id -g; touch /made"))
        assert (result.returncode, result.stdout, result.stderr) == (0, "0\n0\n", "")
        assert (oci.bundle / "rootfs/made").stat().st_uid == USER

    def test_its_devices_are_the_hosts(self, oci, inside, nested):
        script = (
            "head -c 3 /dev/zero | wc -c; echo x > /dev/null; stat -c %t:%T /dev/null /dev/full; echo x > /dev/full"
        )
        result = run(inside, oci, self.spec(nested, oci, script))
        assert result.stdout == "3\n1:3\n1:7\n"
        assert "No space left" in result.stderr

    def test_it_has_mounts_network_and_name(self, oci, inside, nested):
        script = (
            "hostname; ip addr show lo | grep -c 127.0.0.1;"
            "cut -d' ' -f2 /proc/mounts | sort -u | grep -E '^/(proc|sys|dev/pts|dev/shm|dev/mqueue)$'"
        )
        lines = run(inside, oci, self.spec(nested, oci, script)).stdout.split()
        assert lines == ["corral", "1", "/dev/mqueue", "/dev/pts", "/dev/shm", "/proc", "/sys"]

    def test_overlays_may_have_their_directories_in_the_bundle(self, oci, inside, nested):
        for name in ("lower", "upper", "work"):
            (oci.bundle / name).mkdir()
        (oci.bundle / "lower/file").write_text("below\n")
        give(oci.bundle)
        spec = self.spec(nested, oci, "cat /data/file; touch /data/made")
        places = [f"{name}dir={oci.bundle}/{name}" for name in ("lower", "upper", "work")]
        mount = {"destination": "/data", "type": "overlay", "source": "overlay", "options": [*places, "userxattr"]}
        spec["mounts"].append(mount)
        result = run(inside, oci, spec)
        assert (result.stdout, result.stderr) == ("below\n", "")
        assert (oci.bundle / "upper/made").stat().st_uid == USER

    def test_a_mount_of_the_hosts_may_lie_where_no_hierarchy_is(self, oci, inside, nested):
        """podman --systemd has systemd's there."""
        spec = self.spec(nested, oci, "cat /sys/fs/cgroup/systemd/file; touch /sys/fs/cgroup/x")
        (oci.bundle / "systemd").mkdir()
        (oci.bundle / "systemd/file").write_text("it\n")
        give(oci.bundle)
        spec["mounts"].append(
            {
                "destination": "/sys/fs/cgroup/systemd",
                "type": "bind",
                "source": f"{oci.bundle}/systemd",
                "options": ["bind"],
            }
        )
        result = run(inside, oci, spec)
        assert result.stdout == "it\n", result.stderr
        assert "Read-only file system" in result.stderr

    def test_kernel_parameters_of_its_network_are_set(self, oci, inside, nested):
        spec = self.spec(nested, oci, "cat /proc/sys/net/ipv4/ip_default_ttl")
        spec["linux"]["sysctl"] = {"net.ipv4.ip_default_ttl": "77"}
        assert run(inside, oci, spec).stdout == "77\n"

    def test_an_oom_score_that_needs_privilege_stays(self, oci, inside, nested):
        before = Path("/proc/self/oom_score_adj").read_text()
        spec = self.spec(nested, oci, "cat /proc/self/oom_score_adj", oomScoreAdj=-900)
        assert run(inside, oci, spec).stdout == before

    def test_the_pids_of_the_host_may_be_shared(self, oci, inside, nested):
        spec = without(self.spec(nested, oci, "test -d /proc/1 && cat /proc/1/comm"), "pid")
        assert run(inside, oci, spec).stdout == "sleep\n"

    def test_the_hosts_network_may_be_shared(self, oci, inside, nested):
        spec = without(self.spec(nested, oci, "ls /sys/class/net; touch /sys/x"), "network")
        result = run(inside, oci, spec)
        assert {entry.name for entry in Path("/sys/class/net").iterdir()} <= set(result.stdout.split())
        assert "Read-only file system" in result.stderr

    def test_all_commands_work_on_it(self, oci, user, nested):
        """In one user namespace, which a process of it keeps."""
        name = oci.new_id()
        oci.write_spec(self.spec(nested, oci, "sleep", "1000"))
        runtime = " ".join(oci.words())
        script = f"""
            set -e
            {runtime} create --bundle {oci.bundle} {name} > {oci.directory}/out 2>&1 < /dev/null
            {runtime} state {name} | grep '"status"'
            {runtime} start {name}
            {runtime} exec {name} sh -c 'id -u; cat /proc/1/comm'
            {runtime} kill {name} KILL
            {runtime} delete --force {name}
            {runtime} list -q
        """
        result = call([*user, *ONE_ID], "sh", "-c", script)
        assert result.stderr == ""
        assert result.stdout.split() == ['"status":', '"created",', "0", "sleep"]


class TestIds:
    def test_groups_can_be_set_where_the_namespace_has_them(self, oci, user):
        _need_map_auto()
        spec = spec_of(oci, "id -u; id -g; id -G; touch /made")
        spec["process"]["user"] = {"uid": 33, "gid": 34, "additionalGids": [35]}
        (oci.bundle / "rootfs").chmod(0o777)
        result = run([*user, *WAYS["a range of ids"]], oci, spec)
        assert (result.stdout.split(), result.stderr) == (["33", "34", "34", "35"], "")
        assert (oci.bundle / "rootfs/made").stat().st_uid == SUBIDS + 32

    def test_groups_that_cannot_be_set_are_refused_by_name(self, oci, user):
        spec = spec_of(oci, "true")
        spec["process"]["user"]["additionalGids"] = [0, 35]
        result = run([*user, *ONE_ID], oci, spec)
        assert result.returncode == 1
        assert "supplementary groups (0 35) can't be had in this user namespace" in result.stderr

    def test_a_group_that_it_has_anyway_need_not_be_set(self, oci, user):
        spec = spec_of(oci, "id -u")
        spec["process"]["user"]["additionalGids"] = [0]
        assert run([*user, *ONE_ID], oci, spec).stdout == "0\n"

    @pytest.mark.parametrize(("member", "kind"), [("uid", "user"), ("gid", "group")])
    def test_an_id_that_the_namespace_lacks_is_named(self, oci, user, member, kind):
        spec = spec_of(oci, "true")
        spec["process"]["user"][member] = 7
        result = run([*user, *ONE_ID], oci, spec)
        assert result.returncode == 1
        assert f"{kind} 7 is not mapped in the user namespace" in result.stderr


class TestState:
    def test_it_lies_in_the_users_run_directory_and_stays_there(self, oci, user):
        oci.write_spec(spec_of(oci, "ls -a"))
        command = oci.words()[0]
        result = call([*user, *ONE_ID], command, "run", "--bundle", str(oci.bundle), oci.new_id())
        assert result.returncode == 0, result.stderr
        place = oci.directory / "run/corral-oci"
        assert place.stat().st_mode & 0o7777 == 0o1700  # the sticky bit: not to be cleared away
        assert place.stat().st_uid == USER

    def test_a_root_who_is_called_so_has_that_of_the_host(self, oci, user):
        """As in a container that is a whole system: $USER tells it, as with runc."""
        oci.write_spec(spec_of(oci, "true"))
        command = f"{oci.words()[0]} run --bundle {oci.bundle} {oci.new_id()}"
        script = f"mount -t tmpfs none /run && {command} && ls /run"
        result = call([*user, "env", "USER=root", *ONE_ID, "--mount"], "sh", "-c", script)
        assert (result.stdout, result.stderr) == ("corral-oci\n", "")
        assert not (oci.directory / "run/corral-oci").exists()


class TestLimits:
    def spec(self, oci: Runtime, **resources: object) -> dict[str, object]:
        spec = spec_of(oci, "true")
        spec["linux"]["resources"] |= resources
        return spec

    def test_without_any_there_is_no_cgroup(self, oci, inside):
        result = run(inside, oci, self.spec(oci))
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("member", "limits", "name"),
        [("pids", {"limit": 10}, "pids"), ("memory", {"limit": 1 << 26}, "memory"), ("cpu", {"shares": 100}, "cpu")],
    )
    def test_one_that_cannot_be_had_is_refused_by_name(self, oci, inside, member, limits, name):
        result = run(inside, oci, self.spec(oci, **{member: limits}))
        assert result.returncode == 1
        assert f"cannot set {name} limits" in result.stderr
        assert "permission denied" in result.stderr

    def test_a_cgroup_that_cannot_be_had_is_an_error_if_its_path_was_given(self, oci, inside):
        spec = self.spec(oci)
        spec["linux"]["cgroupsPath"] = "/corral-somewhere"
        result = run(inside, oci, spec)
        assert result.returncode == 1
        assert "permission denied: /sys/fs/cgroup" in result.stderr

    def test_nothing_is_forgiven_with_rootless_false(self, oci, inside):
        result = run(inside, oci, self.spec(oci), "--rootless", "false")
        assert result.returncode == 1
        assert "permission denied: /sys/fs/cgroup" in result.stderr

    def test_they_hold_in_a_cgroup_that_is_the_users(self, oci, inside, users_cgroup):
        spec = self.spec(oci, pids={"limit": 2})
        spec["linux"]["cgroupsPath"] = f"{users_cgroup.path}/own"
        spec["process"]["args"] = ["sh", "-c", "sleep 0 & sleep 0 & sleep 0 & wait"]
        result = run([*within(users_cgroup), *inside], oci, spec)
        assert "can't fork" in result.stderr

    def test_a_cgroup_that_cannot_be_entered_is_named(self, oci, inside, users_cgroup):
        """To move from one cgroup of v2 to another takes power over what has them both."""
        if detect().unified is None:
            pytest.skip("needs cgroup v2")
        spec = self.spec(oci)
        spec["linux"]["cgroupsPath"] = f"{users_cgroup.path}/own"
        result = run(inside, oci, spec)
        assert result.returncode == 1
        assert f"{users_cgroup.path}/own" in result.stderr


@pytest.fixture
def users_cgroup() -> Iterator[Cgroup]:
    """One that the user may have others in."""
    group = Driver(detect()).create(f"/{os.environ[TAG_VARIABLE]}-{secrets.token_hex(3)}")
    try:
        for directory in group.paths():
            for path in (directory, *directory.iterdir()):
                os.chown(path, USER, USER)
        yield group
    finally:
        group.remove()


def within(group: Cgroup) -> list[str]:
    """The words before a command that is to be in a cgroup of the user's, beside which he may make others."""
    session = Driver(detect()).create(f"{group.path}/session")
    join = f"for place in {' '.join(session.directories)}; do echo 0 > $place/cgroup.procs; done"
    return ["sh", "-c", f'set -e; {join}; exec "$@"', "sh"]


class TestNoCgroups:
    def test_the_container_is_in_none_of_its_own(self, oci):
        spec = spec_of(oci, "cat /proc/self/cgroup")
        result = run([], oci, without(spec, "cgroup"), "--cgroup-manager", "disabled")
        assert result.stdout == Path("/proc/self/cgroup").read_text()

    def test_a_limit_is_refused_by_name(self, oci):
        spec = spec_of(oci, "true")
        spec["linux"]["resources"] |= {"pids": {"limit": 5}, "memory": {"limit": 1 << 26}}
        result = run([], oci, spec, "--cgroup-manager", "disabled")
        assert result.returncode == 1
        assert "cannot set memory and pids limits (linux.resources): cgroups are disabled" in result.stderr

    @pytest.mark.parametrize("flag", [("--cgroup-manager", "none"), ("--rootless", "maybe")])
    def test_what_is_not_known_is_refused(self, oci, flag):
        result = call([], *oci.words()[:1], *flag, "list")
        assert result.returncode == 1
        assert flag[0] in result.stderr


def test_root_of_a_user_namespace_with_the_same_ids_is_not_the_hosts(oci):
    """The mappings are those of the host; only the namespace is another."""
    script = "import os; from corral.kernel.privilege import is_hosts_root; print(os.geteuid(), is_hosts_root())"
    python = f"{oci.words()[0].rpartition('/')[0]}/python"
    child = [
        "unshare",
        "--user",
        "--map-users",
        "0,0,4294967295",
        "--map-groups",
        "0,0,4294967295",
        python,
        "-c",
        script,
    ]
    assert call([], *child).stdout == "0 False\n"
    assert call([], python, "-c", script).stdout == "0 True\n"


def test_where_the_kernel_has_no_user_namespaces_root_is_the_hosts(oci):
    """The names of the namespaces are hidden, as a kernel without CONFIG_USER_NS lacks this one."""
    program = "from corral.kernel.privilege import is_hosts_root; print(is_hosts_root())"
    python = f"{oci.words()[0].rpartition('/')[0]}/python"
    script = 'mount -t tmpfs none /proc/$$/ns && exec "$1" -c "$2"'
    assert call([], "unshare", "--mount", "sh", "-ec", script, "sh", python, program).stdout == "True\n"
