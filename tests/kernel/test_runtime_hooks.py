"""Hooks: where they are run and when, what they are told, and what comes of it if they fail."""

import contextlib
import errno
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel.namespaces import Kind
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.gate import make_gate
from corral.oci.hooks import run_poststop
from corral.oci.runtime import Container
from corral.oci.spec import HOOK_POINTS, Hook, Hooks, IdMapping, Namespace, Root
from corral.oci.state import State

pytestmark = needs("root", "overlayfs", "busybox", "userns")

KINDS = ("mnt", "pid", "ipc", "uts", "net", "cgroup")


def in_container(script: str, **changes: object) -> Hook:
    """A hook that is a script inside the container."""
    return Hook("/bin/busybox", ("busybox", "sh", "-c", script, "sh", "inside"), **changes)


@pytest.fixture
def on_host(tmp_path):
    """A hook that is a script of the host, written to a file that only the host has."""

    def make(name: str, body: str, **changes: object) -> Hook:
        path = tmp_path / f"hook-{name}"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return Hook(str(path), (str(path), name), **changes)

    return make


def seen(directory: Path, name: str) -> dict[str, str]:
    """What a hook wrote down: KEY=value lines, and the state as JSON."""
    lines = (directory / f"{name}.seen").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def look(directory: Path) -> str:
    """The body of a hook that writes down what it sees, to a file that is called after its first argument."""
    return f"""
        state=$(cat)
        {{ echo "args=$1"; echo "env=$(env | grep -Ev '^(PWD|SHLVL|_)=' | sort | tr '\\n' ' ')"
           echo "cwd=$(pwd)"; echo "fds=$(ls /proc/self/fd | tr '\\n' ' ')"; echo "state=$state"
           for kind in {" ".join(KINDS)}; do echo "$kind=$(readlink /proc/self/ns/$kind)"; done
           grep -E '^(Sig(Blk|Ign)|CapEff|Seccomp|NoNewPrivs|Uid)' /proc/self/status | tr ':' '=' | tr -d '\\t'
           cat /proc/sys/kernel/hostname | sed s/^/host=/
        }} > {directory}/$1.seen
    """


def own(kind: str) -> str:
    return str(Path(f"/proc/self/ns/{kind}").readlink())


def hooked(lab, hooks: Hooks, *args: str, **changes: object):
    """A specification with hooks; its root is where config.json says."""
    (lab.directory / "bundle/rootfs").mkdir(exist_ok=True)
    return lab.spec(*(args or ("true",)), hooks=hooks, root=Root("rootfs"), annotations={"a.b": "ü"}, **changes)


class TestMoments:
    def test_come_in_their_order(self, lab, on_host, tmp_path):
        log = tmp_path / "log"
        log.touch()
        lab.plant.joinpath("log").touch()
        for point in ("prestart", "createRuntime", "createContainer", "poststart"):
            on_host(point, f"cat > /dev/null; echo {point}$1 >> {log}")
        of = lambda point: Hook(str(tmp_path / f"hook-{point}"), (point, "1"))  # noqa: E731
        hooks = Hooks(
            prestart=(of("prestart"), replace(of("prestart"), args=("prestart", "2"))),
            create_runtime=(of("createRuntime"),),
            create_container=(of("createContainer"),),
            start_container=(in_container("echo startContainer >> /log"),),
            poststart=(of("poststart"),),
        )
        container = lab.create(hooked(lab, hooks, "echo program >> /log; sleep 60"))
        assert log.read_text().split() == ["prestart1", "prestart2", "createRuntime1", "createContainer1"]
        assert lab.upper.joinpath("log").exists() is False
        container.start()
        assert log.read_text().split()[4:] == ["poststart1"]
        deadline = time.monotonic() + 10
        while lab.upper.joinpath("log").read_text().split() != ["startContainer", "program"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_those_of_create_find_the_mounts_and_the_root_where_config_json_says(self, lab, on_host, tmp_path):
        """Hooks for GPUs go there by the pid they are told. Nothing is masked or read-only yet."""
        root = lab.directory / "bundle/rootfs"
        enter = f"nsenter -t $pid -m sh -c 'test -e {root}/proc/1 && touch {root}/from-runtime'"
        outside = on_host("prestart", f"pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); {enter}")
        look = f"touch {root}/from-container && cat {root}/proc/timer_list > /dev/null"
        inside = on_host("createContainer", look)
        spec = hooked(lab, Hooks(prestart=(outside,), create_container=(inside,)), "ls /; touch /x")
        spec = replace(spec, root=Root("rootfs", readonly=True))
        output = lab.run_spec(spec).output
        assert "from-runtime" in output
        assert "from-container" in output
        assert "Read-only file system" in output

    @pytest.mark.parametrize("point", ["prestart", "create_runtime", "create_container"])
    def test_the_time_they_take_is_not_the_set_ups(self, lab, on_host, monkeypatch, point):
        monkeypatch.setattr("corral.oci.runtime.SETUP_S", 0.2)
        monkeypatch.setattr("corral.oci.channel.LOOK_S", 0.001)
        lab.create(hooked(lab, Hooks(**{point: (on_host("slow", "sleep 0.3"),)})))

    def test_a_container_started_at_its_gate_is_no_exception(self, lab, on_host, tmp_path):
        log = tmp_path / "log"
        hooks = Hooks(start_container=(in_container("echo start > /log"),), poststart=(on_host("p", f"cat > {log}"),))
        spec = hooked(lab, hooks, "true")
        gate = make_gate(str(tmp_path / "gate"))
        made = lab.create(spec, gate=gate.fileno())
        gate.close()
        made.leave_at_gate()
        assert not lab.upper.joinpath("log").exists()
        adopted = Container.adopt(
            spec, pid=made.init.pid, start_time=made.init.start_time, gate=str(tmp_path / "gate"),
            container_id="other", bundle="/bundle",
        )  # fmt: skip
        adopted.start()
        os.close(adopted.init.pidfd)
        assert lab.upper.joinpath("log").read_text() == "start\n"
        state = json.loads(log.read_text())
        assert (state["id"], state["bundle"], state["pid"]) == ("other", "/bundle", made.init.pid)


class TestWhatTheySee:
    @pytest.mark.parametrize("point", ["prestart", "create_runtime", "poststart"])
    def test_those_of_the_runtime_are_in_its_namespaces(self, lab, on_host, tmp_path, point):
        hook = on_host(HOOK_POINTS[point], look(tmp_path), env=("ONLY=this",))
        container = lab.create(hooked(lab, Hooks(**{point: (hook,)}), "sleep", "60"), container_id="the-id")
        container.start()
        facts = seen(tmp_path, HOOK_POINTS[point])
        assert {kind: facts[kind] for kind in KINDS} == {kind: own(kind) for kind in KINDS}
        status = "running" if point == "poststart" else "creating"
        assert json.loads(facts["state"]) == {
            "ociVersion": "1.3.0",
            "id": "the-id",
            "status": status,
            "pid": container.init.pid,
            "bundle": str(lab.directory / "bundle"),
            "annotations": {"a.b": "ü"},
        }
        assert facts["env"].strip() == "ONLY=this"
        assert facts["cwd"] == str(lab.directory / "bundle")
        assert set(facts["fds"].split()) == {"0", "1", "2", "3"}
        assert int(facts["SigBlk"], 16) == int(facts["SigIgn"], 16) == 0

    def test_create_container_is_in_the_containers_but_in_the_hosts_root(self, lab, on_host, tmp_path):
        hook = on_host("createContainer", look(tmp_path), env=("ONLY=this",))
        lab.run_spec(hooked(lab, Hooks(create_container=(hook,)), "true"))
        facts = seen(tmp_path, "createContainer")
        assert not {kind for kind in KINDS if facts[kind] == own(kind)}
        assert json.loads(facts["state"])["pid"] == 1
        assert facts["cwd"] == str(lab.directory / "bundle/rootfs")
        assert set(facts["fds"].split()) == {"0", "1", "2", "3"}

    def test_start_container_is_a_program_of_the_container_and_no_more(self, lab):
        """Its path leads to what the image has there, so it is confined as the container's own program is."""
        hook = in_container(look(Path("/tmp")))
        lab.run_spec(hooked(lab, Hooks(start_container=(hook,)), "true", env=("FROM=container",)), user="bob")
        facts = seen(lab.upper / "tmp", "inside")
        assert facts["Uid"].startswith("1000")
        assert int(facts["CapEff"], 16) == 0
        assert facts["NoNewPrivs"] == "1"
        assert facts["Seccomp"] == "2"
        assert facts["host"] == "box"
        assert "FROM=container" in facts["env"]
        assert set(facts["fds"].split()) == {"0", "1", "2", "3"}
        assert (json.loads(facts["state"])["status"], json.loads(facts["state"])["pid"]) == ("created", 1)

    def test_start_container_meets_the_filter_also_without_no_new_privs(self, lab):
        hook = in_container(look(Path("/tmp")))
        lab.run_spec(hooked(lab, Hooks(start_container=(hook,)), "true", no_new_privileges=False))
        assert seen(lab.upper / "tmp", "inside")["Seccomp"] == "2"

    def test_an_image_says_nothing_to_a_hook_with_the_runtimes_power(self, lab, on_host, tmp_path):
        """CVE-2025-23266: LD_PRELOAD of the image's environment, with the hook's directory the image's root."""
        hook = on_host("createContainer", look(tmp_path))
        env = ("LD_PRELOAD=/proc/self/cwd/evil.so", "EVIL=1", "PATH=/evil")
        lab.create(hooked(lab, Hooks(create_container=(hook,)), "true", env=env))
        facts = seen(tmp_path, "createContainer")
        assert "EVIL" not in facts["env"]
        assert "evil" not in facts["env"]

    def test_in_a_joined_pid_namespace_too(self, lab, on_host, tmp_path):
        first = lab.create(lab.spec("sleep", "60"))
        first.start()
        hook = on_host("createRuntime", f"cat > {tmp_path}/state")
        spec = hooked(lab, Hooks(create_runtime=(hook,), start_container=(in_container("cat > /state"),)))
        joined = Namespace(Kind.PID, f"/proc/{first.init.pid}/ns/pid")
        kinds = tuple(joined if n.type is Kind.PID else n for n in spec.linux.namespaces)
        lab.run_spec(replace(spec, linux=replace(spec.linux, namespaces=kinds)))
        assert json.loads((tmp_path / "state").read_text())["status"] == "creating"
        assert json.loads((lab.upper / "state").read_text())["pid"] > 1

    def test_with_a_user_namespace_they_are_where_they_are_without(self, lab, on_host, tmp_path):
        """Those of createContainer are root of the container's user namespace; those of the runtime the host's."""
        hooks = Hooks(
            create_runtime=(on_host("createRuntime", look(tmp_path)),),
            create_container=(Hook("/bin/sh", ("sh", "-c", "cat /proc/self/uid_map > from-inside")),),
            start_container=(in_container(look(Path("/tmp"))),),
            poststart=(on_host("poststart", look(tmp_path)),),
        )
        (lab.plant / "tmp").mkdir(mode=0o777)
        (lab.plant / "tmp").chmod(0o777)
        os.chown(lab.upper, 100_000, 100_000)
        spec = hooked(lab, hooks, "sleep", "60")
        mapping = (IdMapping(0, 100_000, 65536),)
        kinds = (*spec.linux.namespaces, Namespace(Kind.USER))
        linux = replace(spec.linux, namespaces=kinds, uid_mappings=mapping, gid_mappings=mapping)
        container = lab.create(replace(spec, linux=linux))
        container.start()
        for name in ("createRuntime", "poststart"):
            assert seen(tmp_path, name)["mnt"] == own("mnt")
            assert json.loads(seen(tmp_path, name)["state"])["pid"] == container.init.pid
        assert (lab.upper / "from-inside").read_text().split() == ["0", "100000", "65536"]
        assert json.loads(seen(lab.upper / "tmp", "inside")["state"])["pid"] == 1


class TestStandardInput:
    def test_may_be_left_unread(self, lab, on_host):
        """EPIPE is not a failure."""
        hooks = Hooks(prestart=(on_host("p", "exec < /dev/null"),), start_container=(in_container("exec < /dev/null"),))
        spec = replace(hooked(lab, hooks, "echo fine"), annotations={"long": "x" * 300_000})
        assert lab.run_spec(spec).output == "fine\n"

    def test_ends_after_the_state_however_long_that_is(self, lab, on_host, tmp_path):
        hooks = Hooks(prestart=(on_host("p", f"cat > {tmp_path}/state"),))
        lab.run_spec(replace(hooked(lab, hooks), annotations={"long": "x" * 500_000}))
        assert json.loads((tmp_path / "state").read_text())["annotations"] == {"long": "x" * 500_000}


class TestFailure:
    @pytest.mark.parametrize("point", ["prestart", "create_runtime", "create_container"])
    def test_of_create_undoes_the_container(self, lab, on_host, tmp_path, point):
        before = children()
        hook = on_host("bad", "echo out; echo no such device >&2; exit 3")
        after = on_host("after", f"touch {tmp_path}/after")
        spec = hooked(lab, Hooks(**{point: (on_host("good", "true"), hook, after)}))
        with pytest.raises(ExecFailed) as failed:
            lab.create(spec)
        assert failed.value.kind == SETUP
        assert failed.value.message.startswith(
            f"error running {HOOK_POINTS[point]} hook #1: {hook.path}: exit status 3: out"
        )
        assert failed.value.message.endswith("no such device")
        assert not (tmp_path / "after").exists()
        assert children() <= before

    def test_of_a_first_point_keeps_the_next_from_being_run(self, lab, on_host, tmp_path):
        hooks = Hooks(
            prestart=(on_host("bad", "exit 1"),),
            create_runtime=(on_host("next", f"touch {tmp_path}/next"),),
            create_container=(on_host("last", f"touch {tmp_path}/last"),),
        )
        with pytest.raises(ExecFailed, match="prestart"):
            lab.create(hooked(lab, hooks))
        assert not (tmp_path / "next").exists()
        assert not (tmp_path / "last").exists()

    def test_of_start_container_keeps_the_program_from_being_run(self, lab):
        hooks = Hooks(start_container=(in_container("kill -9 $$"),))
        container = lab.create(hooked(lab, hooks, "touch", "/ran"))
        with pytest.raises(ExecFailed, match=r"error running startContainer hook #0: /bin/busybox: signal 9"):
            container.start()
        assert lab.wait(container.init) == 1
        assert not (lab.upper / "ran").exists()

    def test_of_poststart_stops_the_container(self, lab, on_host):
        container = lab.create(hooked(lab, Hooks(poststart=(on_host("bad", "exit 1"),)), "sleep", "60"))
        with pytest.raises(ExecFailed, match=r"error running poststart hook #0"):
            container.start()
        assert lab.wait(container.init) == -9

    def test_of_poststop_keeps_nothing_from_being_run(self, lab, on_host, tmp_path):
        hooks = Hooks(poststop=(on_host("bad", "exit 1"), Hook("/nowhere"), on_host("good", f"cat > {tmp_path}/state")))
        warnings = run_poststop(hooks, State("the-id", "/no/such/bundle", {"a": "b"}))
        assert [warning.partition(": ")[0] for warning in warnings] == [
            "error running poststop hook #0",
            "error running poststop hook #1",
        ]
        assert os.strerror(errno.ENOENT) in warnings[1]
        state = json.loads((tmp_path / "state").read_text())
        assert (state["status"], state["id"], state["pid"]) == ("stopped", "the-id", 0)

    def test_to_be_there_is_one(self, lab):
        with pytest.raises(
            ExecFailed, match=r"error running prestart hook #0: /no/such/hook: .*No such file or directory"
        ):
            lab.create(hooked(lab, Hooks(prestart=(Hook("/no/such/hook"),))))

    @pytest.mark.parametrize("script", ["sleep 60", "while :; do echo chatter; done", "sleep 60 & wait"])
    def test_to_be_done_in_time_is_one_and_ends_it(self, lab, on_host, script, tmp_path):
        hook = on_host("slow", f"echo $$ > {tmp_path}/pid; {script}", timeout=1)
        began = time.monotonic()
        with pytest.raises(ExecFailed, match="not done within 1 s"):
            lab.create(hooked(lab, Hooks(create_runtime=(hook,))))
        assert 1 <= time.monotonic() - began < 10
        assert not alive_in_group((tmp_path / "pid").read_text().strip())

    @pytest.mark.parametrize("timeout", [2**31, 2**63 - 1])
    def test_may_take_longer_than_poll_can_count(self, lab, on_host, timeout):
        hook = on_host("patient", "sleep 0.1", timeout=timeout)
        assert lab.run_spec(hooked(lab, Hooks(prestart=(hook,)))).code == 0

    def test_what_a_hook_leaves_running_is_not_waited_for(self, lab, on_host, tmp_path):
        hook = on_host("daemon", f"sleep 60 & echo $! > {tmp_path}/pid")
        lab.run_spec(hooked(lab, Hooks(prestart=(hook,))))
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # which would fail if it had ended

    def test_a_state_too_long_to_be_told_is_one(self, lab):
        spec = replace(hooked(lab, Hooks(prestart=(Hook("/bin/true"),))), annotations={"long": "x" * 3_000_000})
        with pytest.raises(ExecFailed, match="too large to be told"):
            lab.create(spec)


def alive_in_group(group: str) -> list[str]:
    """The processes of a process group that are no zombies."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, of, *_ = file.read_text().rpartition(")")[2].split()
            if of == group and state != "Z":
                found.append(file.parent.name)
    return found


def children() -> set[str]:
    """Of this process, ended ones included."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
