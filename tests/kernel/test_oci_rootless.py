"""corral-oci run by an ordinary user: the container lives in a user namespace of his, and is nobody but him outside."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import COMMAND, TIMEOUT_S, Runtime, runtime_in
from support.requirements import needs
from support.rootless import AS_USER, SUBIDS, USER, give, users_directory

from corral.kernel.capabilities import NAMES

pytestmark = needs("root", "busybox", "userns")

OWN = [{"containerID": 0, "hostID": USER, "size": 1}]
RANGE = [*OWN, {"containerID": 1, "hostID": SUBIDS, "size": 65536}]


@pytest.fixture
def oci() -> Iterator[Runtime]:
    """A bundle of an ordinary user's."""
    with users_directory() as directory, runtime_in(directory) as runtime:
        give(directory)
        yield runtime


def spec_of(oci: Runtime, *args: str, mappings: list[dict[str, int]] = OWN, **changes: object) -> dict[str, object]:
    """A user's config.json: no ids of others, no limits."""
    spec = oci.spec(*args, **changes)
    linux = spec["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = mappings
    linux.pop("resources", None)
    if mappings is OWN:
        for mount in spec["mounts"]:
            mount["options"] = [o for o in mount.get("options", []) if not o.startswith("gid=")]
    return spec


def run(oci: Runtime, spec: dict[str, object], *flags: str, **options: object) -> "subprocess.CompletedProcess[str]":
    oci.write_spec(spec)
    return oci.call("run", *flags, oci.new_id(), **AS_USER | options)


class TestOneId:
    def test_the_user_is_root_inside_and_himself_outside(self, oci):
        result = run(oci, spec_of(oci, "id -u; id -g; cat /proc/self/uid_map /proc/self/setgroups; touch /made"))
        assert result.stderr == ""
        assert result.stdout.split() == ["0", "0", "0", str(USER), "1", "deny"]
        assert (oci.bundle / "rootfs/made").stat().st_uid == USER

    def test_it_has_devices_mounts_network_and_name(self, oci):
        script = (
            "hostname; echo x > /dev/null; head -c 3 /dev/zero | wc -c; ip addr show lo | grep -c 127.0.0.1;"
            "cut -d' ' -f2 /proc/mounts | sort -u | grep -E '^/(proc|sys|dev/pts|dev/shm|dev/mqueue)$'"
        )
        lines = run(oci, spec_of(oci, script)).stdout.split()
        assert lines[1:3] == ["3", "1"]
        assert lines[3:] == ["/dev/mqueue", "/dev/pts", "/dev/shm", "/proc", "/sys"]

    def test_all_commands_work_on_it(self, oci):
        name = oci.new_id()
        oci.write_spec(spec_of(oci, "sleep", "1000"))
        for words in (("create", name), ("start", name)):
            log = oci.directory / "stderr"
            with log.open("w") as file:
                code = subprocess.run(
                    oci.words(*words), cwd=oci.bundle, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
                    timeout=TIMEOUT_S, check=False, **AS_USER,
                ).returncode  # fmt: skip
            assert code == 0, log.read_text()
        assert json.loads(oci.ok("state", name, **AS_USER))["status"] == "running"
        assert oci.ok("exec", name, "id", "-u", **AS_USER) == "0\n"
        oci.ok("kill", name, "KILL", **AS_USER)
        oci.ok("delete", "--force", name, **AS_USER)
        assert oci.call("state", name, **AS_USER).returncode != 0

    def test_an_init_that_waits_lets_nobody_look_in(self, oci):
        """Files in /proc of a process that does not are root's, whoever it runs as. Source: proc(5)."""
        name, log = oci.new_id(), oci.directory / "stderr"
        oci.write_spec(spec_of(oci, "sleep", "1000"))
        with log.open("w") as file:
            code = subprocess.run(
                oci.words("create", name), cwd=oci.bundle, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=file, timeout=TIMEOUT_S, check=False, **AS_USER,
            ).returncode  # fmt: skip
        assert code == 0, log.read_text()
        pid = json.loads(oci.ok("state", name, **AS_USER))["pid"]
        assert Path(f"/proc/{pid}/status").read_text().split("Uid:\t")[1].split()[0] == str(USER)
        assert Path(f"/proc/{pid}/mem").stat().st_uid == 0
        oci.ok("delete", "--force", name, **AS_USER)

    def test_the_hosts_network_and_sys_may_be_shared(self, oci):
        """As `spec --rootless` of runc has it, or with the sysfs left to us."""
        spec = spec_of(oci, "ls /sys/class/net; touch /sys/x")
        spec["linux"]["namespaces"] = [n for n in spec["linux"]["namespaces"] if n["type"] != "network"]
        result = run(oci, spec)
        assert {entry.name for entry in Path("/sys/class/net").iterdir()} <= set(result.stdout.split())
        assert "Read-only file system" in result.stderr

    def test_with_every_capability_it_can_not_be_another(self, oci):
        secret = oci.directory / "secret"
        secret.write_text("x")
        secret.chmod(0o600)
        script = "cat /secret; chown 5 /made; mknod /node c 1 3; echo 1 > /proc/self/oom_score_adj; su -c id nobody"
        spec = spec_of(oci, f"touch /made; {script}", noNewPrivileges=False)
        held = [f"CAP_{name}" for name in NAMES]
        spec["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), held)
        spec["mounts"].append({"destination": "/secret", "type": "bind", "source": str(secret), "options": ["rbind"]})
        result = run(oci, spec)
        assert "x\n" not in result.stdout
        assert (
            result.stderr.count("denied") + result.stderr.count("not permitted") + result.stderr.count("Invalid") >= 3
        )
        assert not (oci.bundle / "rootfs/node").exists()

    def test_a_supplementary_group_that_it_has_anyway_need_not_be_set(self, oci):
        spec = spec_of(oci, "id -G")
        spec["process"]["user"]["additionalGids"] = [0]
        assert run(oci, spec).stdout == "0\n"

    def test_a_limit_is_refused_by_name(self, oci):
        spec = spec_of(oci, "true")
        spec["linux"]["resources"] = {"pids": {"limit": 10}, "cpu": {"cpus": "0"}}
        result = run(oci, spec)
        assert result.returncode == 1
        assert "cannot set cpuset and pids limits" in result.stderr
        assert "permission denied: /sys/fs/cgroup" in result.stderr

    def test_the_state_lies_in_his_run_directory_and_stays_there(self, oci):
        oci.write_spec(spec_of(oci, "true"))
        place = oci.directory / "state/corral-oci"
        result = oci.call("state", "nobody", **AS_USER, env={"XDG_RUNTIME_DIR": str(oci.root)})
        assert "does not exist" in result.stderr
        assert not place.exists()  # --root was given
        subprocess.run(
            [COMMAND, "list"], check=True, env={"XDG_RUNTIME_DIR": str(place.parent)}, timeout=TIMEOUT_S, **AS_USER
        )
        assert place.stat().st_mode & 0o7777 == 0o1700

    def test_another_users_id_is_refused(self, oci):
        spec = spec_of(oci, "true", mappings=[{"containerID": 0, "hostID": 0, "size": 1}])
        for mount in spec["mounts"]:
            mount["options"] = [o for o in mount.get("options", []) if not o.startswith("gid=")]
        result = run(oci, spec)
        assert result.returncode == 1
        assert "newgidmap" in result.stderr

    def test_ids_of_a_mount_are_refused_by_name(self, oci):
        spec = spec_of(oci, "true")
        mount = {"destination": "/d", "type": "bind", "source": "/etc", "options": ["rbind", "idmap"]}
        spec["mounts"].append(mount)
        result = run(oci, spec)
        assert result.returncode == 1
        assert "mounts[" in result.stderr
        assert "an ordinary user can't map the ids of a mount" in result.stderr

    def test_without_a_user_namespace_nothing_is_made(self, oci):
        spec = oci.spec("true")
        spec["linux"].pop("resources", None)
        result = run(oci, spec)
        assert result.returncode == 1
        assert "not permitted" in result.stderr

    def test_a_terminal_is_the_users(self, oci):
        spec = spec_of(oci, "test -t 0 && stat -c %u $(tty)", terminal=True)
        oci.write_spec(spec)
        words = " ".join(oci.words("run", oci.new_id()))
        result = subprocess.run(
            ["script", "-qec", words, "/dev/null"], cwd=oci.bundle, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False, **AS_USER,
        )  # fmt: skip
        assert result.stdout.strip() == "0"


@needs("newuidmap", "newgidmap", "unshare", "setpriv")
class TestSubordinateIds:
    """Ranges that /etc/subuid and /etc/subgid allow, written by newuidmap and newgidmap."""

    @pytest.fixture
    def allowed(self, oci) -> list[str]:
        """How to run a command as a user that these files, in a mount namespace of the command's own, know."""
        files = oci.directory / "etc"
        files.mkdir()
        passwd = Path("/etc/passwd").read_text() + f"corraltest:x:{USER}:{USER}::/:/bin/sh\n"
        (files / "passwd").write_text(passwd)
        for name in ("subuid", "subgid"):
            (files / name).write_text(f"corraltest:{SUBIDS}:65536\n")
        binds = "; ".join(f"mount --bind {files}/{name} /etc/{name}" for name in ("passwd", "subuid", "subgid"))
        as_user = f"exec setpriv --reuid {USER} --regid {USER} --clear-groups"
        missing = [f"/etc/{name}" for name in ("subuid", "subgid") if not Path("/etc", name).exists()]
        if missing:
            pytest.skip(f"needs {' and '.join(missing)}")
        return ["unshare", "-m", "sh", "-c", f'set -e; {binds}; {as_user} "$@"', "sh"]

    def run(self, oci: Runtime, allowed: list[str], spec: dict[str, object]) -> "subprocess.CompletedProcess[str]":
        oci.write_spec(spec)
        return subprocess.run(
            [*allowed, str(COMMAND), "--root", str(oci.root), "run", oci.new_id()],
            cwd=oci.bundle, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip

    def test_a_range_is_mapped_and_groups_can_be_set(self, oci, allowed):
        spec = spec_of(oci, "cat /proc/self/uid_map /proc/self/gid_map; id -u; id -G; touch /made", mappings=RANGE)
        spec["process"]["user"] = {"uid": 33, "gid": 34, "additionalGids": [35]}
        (oci.bundle / "rootfs").chmod(0o777)
        result = self.run(oci, allowed, spec)
        assert result.stderr == ""
        mapped = ["0", str(USER), "1", "1", str(SUBIDS), "65536"]
        assert result.stdout.split() == [*mapped, *mapped, "33", "34", "35"]
        made = (oci.bundle / "rootfs/made").stat()
        assert (made.st_uid, made.st_gid) == (SUBIDS + 32, SUBIDS + 33)

    def test_a_range_that_is_another_users_is_refused(self, oci, allowed):
        mappings = [*OWN, {"containerID": 1, "hostID": SUBIDS - 1, "size": 65536}]
        result = self.run(oci, allowed, spec_of(oci, "true", mappings=mappings))
        assert result.returncode == 1
        assert "newgidmap: gid range" in result.stderr
        assert "not allowed" in result.stderr

    def test_a_user_without_ranges_is_refused(self, oci):
        result = run(oci, spec_of(oci, "true", mappings=RANGE))
        assert result.returncode == 1
        assert "newgidmap" in result.stderr


def test_the_missing_program_is_named(oci):
    spec = spec_of(oci, "true", mappings=RANGE)
    with contextlib.suppress(KeyError):
        spec["process"].pop("rlimits")
    result = run(oci, spec, env={"PATH": "/nowhere"})
    assert result.returncode == 1
    assert "newgidmap, which maps more than one's own id, is not installed" in result.stderr
