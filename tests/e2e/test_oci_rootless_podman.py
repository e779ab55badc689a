"""An ordinary user's podman runs its containers with corral-oci, which is then root of podman's user namespace."""

import contextlib
import os
import pty
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.ocicommand import COMMAND
from support.requirements import needs
from support.rootless import NAME, SUBIDS, USER, give, machine, users_directory

pytestmark = needs("root", "userns", "busybox", "podman", "conmon", "newuidmap", "unshare", "nsenter", "setpriv")

TIMEOUT_S = 60
NO_NETWORK = ("--network", "none")
_CONTAINERS_CONF = f"""\
[engine]
cgroup_manager = "cgroupfs"
runtime_supports_nocgroup = ["{COMMAND.name}"]
"""


@dataclass
class Podman:
    """The user's: his containers, his home."""

    words: list[str]
    directory: Path

    def call(self, *words: str) -> "subprocess.CompletedProcess[str]":
        # Into files, not pipes: a container that stays would hold them.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            command = [*self.words, *words]
            result = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=TIMEOUT_S, check=False
            )
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(command, result.returncode, out.read(), err.read())

    def ok(self, *words: str) -> str:
        result = self.call(*words)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def run(self, script: str, *options: str) -> "subprocess.CompletedProcess[str]":
        """A shell in a container that is gone afterwards."""
        network = () if "--network" in options else NO_NETWORK
        return self.call("run", "--rm", *network, *options, "busybox", "sh", "-c", script)

    def in_terminal(self, *words: str) -> tuple[int, str]:
        """The exit code, and what is seen."""
        main, replica = pty.openpty()
        process = subprocess.Popen([*self.words, *words], stdin=replica, stdout=replica, stderr=replica)
        os.close(replica)
        shown = b""
        with contextlib.suppress(OSError):
            while data := os.read(main, 4096):
                shown += data
        os.close(main)
        return process.wait(TIMEOUT_S), shown.decode("utf-8", "replace")


@contextlib.contextmanager
def podman_in(directory: Path, archive: Path, *options: str, subids: bool = True) -> Iterator[Podman]:
    settings = directory / ".config/containers"
    settings.mkdir(parents=True)
    (settings / "containers.conf").write_text(_CONTAINERS_CONF)
    (directory / "busybox.tar").write_bytes(archive.read_bytes())
    give(directory)
    with machine(directory, subids=subids) as words:
        command = [*words, "PODMAN_IGNORE_CGROUPSV1_WARNING=1", "podman", "--runtime", str(COMMAND)]
        podman = Podman([*command, "--cgroup-manager", "cgroupfs", *options], directory)
        podman.ok("load", "--input", str(directory / "busybox.tar"))
        yield podman


@pytest.fixture(scope="module")
def podman(busybox_archive: Path) -> Iterator[Podman]:
    with users_directory() as directory, podman_in(directory, busybox_archive) as podman:
        yield podman


@pytest.fixture
def name(podman: Podman) -> Iterator[str]:
    """A container's, which is removed."""
    name = f"t{secrets.token_hex(4)}"
    yield name
    podman.call("rm", "--force", "--time", "0", name)


@pytest.fixture
def sleeping(podman: Podman, name: str) -> str:
    script = "trap 'exit 3' TERM; sleep 1000 & wait"
    podman.ok("run", "--detach", "--name", name, *NO_NETWORK, "busybox", "sh", "-c", script)
    return name


@pytest.fixture
def volume(podman: Podman) -> Path:
    """A directory of the user's."""
    directory = podman.directory / f"volume-{secrets.token_hex(4)}"
    directory.mkdir()
    (directory / "file").write_text("from the host\n")
    give(directory)
    return directory


def test_output_and_exit_code_are_passed_on(podman):
    result = podman.run("echo out; echo err >&2; cat /proc/self/uid_map; exit 5")
    mapped = ["0", str(USER), "1", "1", str(SUBIDS), "65536"]
    assert (result.returncode, result.stdout.split(), result.stderr) == (5, ["out", *mapped], "err\n")


def test_a_missing_program_is_told_apart(podman):
    result = podman.call("run", "--rm", *NO_NETWORK, "busybox", "nope")
    assert result.returncode == 127
    assert "executable file not found" in result.stderr


def test_a_terminal(podman):
    code, shown = podman.in_terminal("run", "--rm", "-it", *NO_NETWORK, "busybox", "sh", "-c", "tty; id -u; exit 3")
    assert (code, shown.split()) == (3, ["/dev/pts/0", "0"])


def test_exec_also_in_a_terminal_and_as_another_user(podman, sleeping):
    result = podman.call("exec", sleeping, "sh", "-c", "echo in; exit 9")
    assert (result.returncode, result.stdout) == (9, "in\n"), result.stderr
    assert podman.ok("exec", "--user", "5:6", sleeping, "id").strip() == "uid=5 gid=6"
    code, shown = podman.in_terminal("exec", "-it", sleeping, "sh", "-c", "test -t 0; echo $?; exit 4")
    assert (code, shown.split()) == (4, ["0"])
    assert podman.call("exec", sleeping, "nope").returncode == 127


def test_stop_start_and_kill(podman, sleeping):
    podman.ok("stop", "--time", "10", sleeping)
    assert podman.ok("inspect", "--format", "{{.State.ExitCode}}", sleeping) == "3\n"
    podman.ok("start", sleeping)
    podman.ok("kill", sleeping)
    assert podman.ok("wait", sleeping) == "137\n"


def test_top_names_the_processes(podman, sleeping):
    assert podman.ok("top", sleeping, "user", "args").splitlines()[-1].split() == ["root", "sleep", "1000"]


def test_a_read_only_root(podman):
    result = podman.run("touch /x; touch /tmp/x && echo written", "--read-only")
    assert "Read-only file system" in result.stderr
    assert result.stdout == "written\n"


def test_another_user(podman, volume):
    volume.chmod(0o777)
    result = podman.run("id -u; id -g; touch /volume/made", "--user", "5:6", "--volume", f"{volume}:/volume")
    assert result.stdout == "5\n6\n", result.stderr
    made = (volume / "made").stat()
    assert (made.st_uid, made.st_gid) == (SUBIDS + 4, SUBIDS + 5)


def test_groups(podman):
    assert podman.run("id -G", "--group-add", "7").stdout == "0 7\n"


def test_a_bind_mount_is_the_users(podman, volume):
    result = podman.run("cat /volume/file; touch /volume/made", "--volume", f"{volume}:/volume")
    assert (result.stdout, result.stderr) == ("from the host\n", "")
    assert (volume / "made").stat().st_uid == USER
    result = podman.run("touch /volume/again", "--volume", f"{volume}:/volume:ro")
    assert "Read-only file system" in result.stderr


def test_the_user_keeps_his_id(podman, volume):
    """podman makes one more user namespace for that."""
    result = podman.run("id -un; id -u; touch /volume/made", "--userns", "keep-id", "--volume", f"{volume}:/volume")
    assert (result.stdout.split(), result.stderr) == ([NAME, str(USER)], "")
    assert (volume / "made").stat().st_uid == USER


def test_a_volume_that_is_written_over(podman, volume):
    script = "cat /volume/file; echo changed > /volume/file; cat /volume/file"
    result = podman.run(script, "--volume", f"{volume}:/volume:O")
    assert result.stdout == "from the host\nchanged\n", result.stderr
    assert (volume / "file").read_text() == "from the host\n"


def test_an_image_with_systemd(podman):
    result = podman.run("ls /sys/fs/cgroup/; touch /run/x /run/lock/x && echo written", "--systemd", "always")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "written"


@pytest.mark.parametrize("way", ["nomap", "auto"])
def test_a_user_namespace_without_the_user(podman, way):
    result = podman.run("id -u; cat /proc/self/uid_map", "--userns", way)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:3] == ["0", "0", "1"]


@pytest.mark.parametrize("what", ["network", "pid", "uts"])
def test_namespaces_of_the_host(podman, what):
    kind = {"network": "net"}.get(what, what)
    result = podman.run(f"readlink /proc/self/ns/{kind}", f"--{what}", "host")
    expected = podman.ok("unshare", "readlink", f"/proc/self/ns/{kind}")
    assert result.stdout == expected, result.stderr


def test_no_container_has_a_cgroup_and_limits_are_not_asked_for(podman):
    script = "cat /proc/self/cgroup"
    before = subprocess.run([*podman.words, "unshare", "cat", "/proc/self/cgroup"], capture_output=True, check=True)
    for options in ((), ("--memory", "64m"), ("--cgroups", "disabled")):
        result = podman.run(script, *options)
        assert result.returncode == 0, result.stderr
        assert result.stdout == before.stdout.decode()


def test_devices_are_the_hosts(podman):
    script = "head -c 3 /dev/zero | wc -c; stat -c %t:%T /dev/null /dev/extra; test -b /dev/loop0 || echo no more"
    result = podman.run(script, "--device", "/dev/full:/dev/extra")
    assert result.stdout == "3\n1:3\n1:7\nno more\n", result.stderr


def test_a_privileged_container_may_mount(podman):
    result = podman.run("mount -t tmpfs x /tmp && grep -c ' /tmp ' /proc/mounts", "--privileged")
    assert result.stdout == "1\n", result.stderr


def test_kernel_parameters_tmpfs_and_limits_of_processes(podman):
    script = "cat /proc/sys/net/ipv4/ip_default_ttl; grep -c ' /t tmpfs' /proc/mounts; ulimit -n"
    options = ("--sysctl", "net.ipv4.ip_default_ttl=77", "--tmpfs", "/t", "--ulimit", "nofile=100:200")
    assert podman.run(script, *options).stdout == "77\n1\n100\n"


def test_an_image_is_built(podman):
    directory = podman.directory / "context"
    directory.mkdir()
    (directory / "Containerfile").write_text("FROM localhost/busybox\nRUN id -u > /built\n")
    give(directory)
    podman.ok("build", "--isolation", "oci", *NO_NETWORK, "--tag", "built", str(directory))
    assert podman.ok("run", "--rm", *NO_NETWORK, "built", "cat", "/built") == "0\n"


def test_state_lies_in_the_users_run_directory_and_goes(podman, sleeping):
    place = podman.directory / "run/corral-oci"
    identity = podman.ok("inspect", "--format", "{{.Id}}", sleeping).strip()
    assert (place / identity / "state.json").exists()
    podman.ok("rm", "--force", "--time", "0", sleeping)
    assert not (place / identity).exists()


def test_a_user_with_one_id_only(busybox_archive):
    options = ("--storage-driver", "overlay", "--storage-opt", "overlay.ignore_chown_errors=true")
    with users_directory() as directory, podman_in(directory, busybox_archive, *options, subids=False) as podman:
        result = podman.run("id -u; cat /proc/self/uid_map /proc/self/setgroups", "--user", "root")
        assert result.stdout.split() == ["0", "0", str(USER), "1", "deny"], result.stderr
        assert "user 5 is not mapped in the user namespace" in podman.run("true", "--user", "5").stderr
