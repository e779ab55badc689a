"""podman, docker and containerd run their containers with corral-oci as with any other OCI runtime."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.ocicommand import COMMAND, wait_until
from support.requirements import lacking

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import peers

TIMEOUT_S = 60
NEEDS = {
    "podman": ("root", "cgroup", "busybox", "podman", "conmon"),
    "docker": ("root", "cgroup", "busybox", "docker", "dockerd", "containerd"),
    "ctr": ("root", "cgroup", "busybox", "ctr", "containerd", "containerd-shim-runc-v2"),
}


@dataclass
class Client:
    """One of them: the words before `run`, `exec` and so on, and those that every `run` has."""

    name: str
    command: list[str]
    options: list[str]
    image: str
    inside: list[str] = field(default_factory=list)
    """Words before a command that is to run in its network namespace."""
    directory: Path | None = None
    """Where it runs: conmon leaves a file `oom` there."""

    def call(self, *words: str, **options: object) -> "subprocess.CompletedProcess[str]":
        # Into files, not pipes: a container that stays would hold them.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            result = subprocess.run(
                [*self.command, *words],
                stdin=subprocess.DEVNULL,
                cwd=self.directory,
                stdout=out,
                stderr=err,
                timeout=TIMEOUT_S,
                check=False,
            )
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(result.args, result.returncode, out.read(), err.read())

    def run(self, *words: str, options: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
        """A container that is gone afterwards."""
        name = [] if self.name != "ctr" else [f"corral-test-{os.getpid()}"]
        return self.call("run", "--rm", *self.options, *options, self.image, *name, *words)


PARAMETERS = ("podman", "docker", "ctr")


@pytest.fixture(scope="module", params=PARAMETERS)
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, busybox_archive: Path
) -> Iterator[Client]:
    name = request.param
    if missing := [reason for what in NEEDS[name] if (reason := lacking(what))]:
        pytest.skip(missing[0])
    scratch = tmp_path_factory.mktemp(name)
    with contextlib.ExitStack() as stack:
        client = {"podman": podman, "docker": docker, "ctr": ctr}[name](stack, scratch, busybox_archive)
        client.directory = scratch
        yield client


def podman(stack: contextlib.ExitStack, scratch: Path, archive: Path) -> Client:
    command = [
        "podman", "--root", f"{scratch}/root", "--runroot", f"{scratch}/run", "--cgroup-manager", "cgroupfs",
        "--runtime", str(COMMAND), "--tmpdir", f"{scratch}/tmp", "--network-config-dir", f"{scratch}/net",
    ]  # fmt: skip
    inside = peers.in_own_network(stack)
    client = Client("podman", [*inside, *command], ["--network", "none"], "busybox", inside)
    assert client.call("load", "--input", str(archive)).returncode == 0
    stack.callback(lambda: client.call("rmi", "--all", "--force"))
    stack.callback(lambda: client.call("rm", "--all", "--force", "--time", "0"))
    return client


def docker(stack: contextlib.ExitStack, scratch: Path, archive: Path) -> Client:
    base = Path(tempfile.mkdtemp(prefix="cdk", dir="/tmp"))  # dockerd's sockets need a short path
    stack.callback(lambda: wait_until(lambda: removed(base)))
    (base / "daemon.json").write_text(json.dumps({"runtimes": {"corral": {"path": str(COMMAND)}}}))
    daemon = [
        "dockerd", "--data-root", f"{base}/root", "--exec-root", f"{base}/exec", "--pidfile", f"{base}/pid",
        "--host", f"unix://{base}/d.sock", "--ip-forward=false", "--userland-proxy=false",
        "--config-file", f"{base}/daemon.json",
    ]  # fmt: skip
    inside = peers.in_own_network(stack)
    peers.start(stack, [*inside, *daemon], base / "log")
    options = ["--runtime", "corral", "--network", "none"]
    client = Client("docker", ["docker", "--host", f"unix://{base}/d.sock"], options, "busybox", inside)
    wait_until(lambda: client.call("version").returncode == 0, 30)
    assert client.call("load", "--input", str(archive)).returncode == 0
    return client


def removed(directory: Path) -> bool:
    """Remove a directory; dockerd lets go of what it mounted there a moment after its end."""
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def ctr(stack: contextlib.ExitStack, scratch: Path, archive: Path) -> Client:
    peer = peers.Ctr(scratch, archive, stack)
    return Client("ctr", peer.command, ["--runc-binary", str(COMMAND)], peer.image)


def running(client: Client, stack: contextlib.ExitStack) -> str:
    """A container that sleeps, removed with the stack."""
    name = f"corral-test-{os.getpid()}-s"
    words = ["run", "-d", *client.options]
    words += [client.image, name] if client.name == "ctr" else ["--name", name, client.image]
    made = client.call(*words, "sleep", "1000")
    assert made.returncode == 0, made.stderr
    stack.callback(remove, client, name)
    return name


def remove(client: Client, name: str) -> None:
    if client.name != "ctr":
        client.call("rm", "-f", "-t", "0", name) if client.name == "podman" else client.call("rm", "-f", name)
        return
    client.call("task", "kill", "--signal", "SIGKILL", name)
    wait_until(lambda: "RUNNING" not in client.call("task", "ls").stdout)
    client.call("task", "rm", name)
    client.call("container", "rm", name)


def in_terminal(words: list[str]) -> tuple[int, str]:
    """Run a command in a terminal of its own: exit code and what it showed."""
    main, replica = pty.openpty()
    process = subprocess.Popen(words, stdin=replica, stdout=replica, stderr=replica, start_new_session=True)
    os.close(replica)
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(main, 4096):
            shown += data
    os.close(main)
    return process.wait(TIMEOUT_S), shown.decode("utf-8", "replace")


def test_run_passes_output_and_exit_code_on(client: Client) -> None:
    result = client.run("sh", "-c", "echo out; exit 5")
    assert (result.returncode, result.stdout) == (5, "out\n"), result.stderr


def test_run_in_a_terminal(client: Client) -> None:
    flags = ["-t"] if client.name == "ctr" else ["-it"]
    name = [f"corral-test-{os.getpid()}-t"] if client.name == "ctr" else []
    words = [*client.command, "run", "--rm", *client.options, *flags, client.image, *name]
    code, shown = in_terminal([*words, "sh", "-c", "tty; exit 3"])
    assert code == 3, shown
    assert "/dev/pts/0" in shown


def test_a_missing_program_is_told_apart(client: Client) -> None:
    result = client.run("nope")
    assert result.returncode == (1 if client.name == "ctr" else 127)
    assert "executable file not found" in result.stderr


def test_memory_user_read_only_and_bind_mount(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the host")
    tmp_path.chmod(0o755)
    script = "id -u; touch /x 2>/dev/null || echo read-only; cat /vol/file; touch /vol/y 2>/dev/null || echo no"
    options = {
        "podman": ("-m", "64m", "--read-only", "--user", "5", "-v", f"{tmp_path}:/vol:ro"),
        "docker": ("-m", "64m", "--read-only", "--user", "5", "-v", f"{tmp_path}:/vol:ro"),
        "ctr": (
            "--memory-limit", "67108864", "--read-only", "--user", "5",
            "--mount", f"type=bind,src={tmp_path},dst=/vol,options=rbind:ro",
        ),
    }[client.name]  # fmt: skip
    result = client.run("sh", "-c", script, options=options)
    assert result.stdout == "5\nread-only\nfrom the hostno\n", result.stderr


def test_a_memory_limit_holds(client: Client) -> None:
    option = "--memory-limit" if client.name == "ctr" else "--memory"
    script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=60 2>/dev/null; echo $?"
    result = client.run("sh", "-c", script, options=(option, str(32 << 20)))
    assert result.stdout == "137\n", result.stderr


def test_a_running_container_takes_exec_pause_and_an_end(client: Client) -> None:
    with contextlib.ExitStack() as stack:
        name = running(client, stack)
        exec_ = ["task", "exec", "--exec-id", "one"] if client.name == "ctr" else ["exec"]
        result = client.call(*exec_, name, "sh", "-c", "echo in; exit 9")
        assert (result.returncode, result.stdout) == (9, "in\n"), result.stderr
        pause = ["task", "pause"] if client.name == "ctr" else ["pause"]
        assert client.call(*pause, name).returncode == 0
        resume = ["task", "resume"] if client.name == "ctr" else ["unpause"]
        assert client.call(*resume, name).returncode == 0
        if client.name != "ctr":
            stopped = client.call("stop", "-t", "1", name)
            assert stopped.returncode == 0, stopped.stderr
            assert client.call("start", name).returncode == 0
            updated = client.call("update", "--memory", "50m", "--memory-swap", "50m", name)
            assert updated.returncode == 0, updated.stderr
        else:
            # containerd leaves out whom its shim does not tell of within two seconds.
            wait_until(lambda: "memory.usage_in_bytes" in client.call("task", "metrics", name).stdout)


def test_a_published_port_reaches_the_container(client: Client) -> None:
    if client.name == "ctr":
        return  # it has no ports to publish
    if client.name == "podman" and (reason := lacking("/usr/lib/podman/netavark")):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        name = f"corral-test-{os.getpid()}-p"
        stack.callback(remove, client, name)
        options = [word for word in client.options if word not in ("--network", "none")]
        serve = "echo hello > /index.html; exec httpd -f -p 80 -h /"
        words = ["run", "-d", "--name", name, *options, "-p", "18080:80", client.image, "sh", "-c", serve]
        made = client.call(*words)
        assert made.returncode == 0, made.stderr
        gateway = client.call("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.Gateway}}{{end}}", name).stdout
        fetch = [*client.inside, "busybox", "wget", "-q", "-O", "-", f"http://{gateway.strip()}:18080/"]
        wait_until(lambda: subprocess.run(fetch, capture_output=True, text=True, check=False).stdout == "hello\n", 15)
