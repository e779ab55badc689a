"""What a container can do to the processes that are being set up inside it, and to who waits for them."""

import contextlib
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import keyring
from corral.kernel.namespaces import Kind
from corral.oci.errors import EXEC_DENIED, SETUP, ExecFailed
from corral.oci.runtime import Stdio
from corral.oci.spec import Mount, Namespace

pytestmark = needs("root", "overlayfs", "busybox")

STOP_EVERYBODY = """
trap "" TERM
while :; do
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        [ $pid -gt 1 ] && [ $pid != $$ ] && kill -STOP $pid 2>/dev/null
    done
done
"""


class TestAContainerThatStopsWhateverEntersIt:
    """The runtime waits for what it sets up, and is who has to kill the container: it must not wait for ever."""

    def test_does_not_hold_up_an_exec(self, lab):
        container = lab.create(lab.spec(STOP_EVERYBODY))
        container.start()
        began = time.monotonic()
        stopped = 0
        while not stopped and time.monotonic() - began < 15:
            try:
                handle = container.exec(lab.process("true"), stdio=Stdio())
            except ExecFailed as failed:
                stopped += failed.kind == SETUP
            else:
                signal.pidfd_send_signal(handle.pidfd, signal.SIGKILL)
                lab.made.append(handle)
                lab.wait(handle)
        assert stopped, "the container never met a process during its set-up"

    def test_does_not_hold_up_a_container_that_shares_its_pids(self, lab):
        first = lab.create(lab.spec(STOP_EVERYBODY))
        first.start()
        spec = lab.spec("sleep", "60")
        joined = Namespace(Kind.PID, f"/proc/{first.init.pid}/ns/pid")
        kinds = tuple(joined if n.type is Kind.PID else n for n in spec.linux.namespaces)
        spec = replace(spec, linux=replace(spec.linux, namespaces=kinds))
        root = Mount(type="bind", source=str(lab.busybox), options=("rbind", "ro"))
        # Whether create() or start() is caught, or neither, is a matter of luck; that both return is not.
        for _ in range(5):
            with contextlib.suppress(ExecFailed):
                lab.create(spec, rootfs=[root]).start()


LOOK_OUT = """
while :; do
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        [ $pid -gt 1 ] && [ $pid != $$ ] && read seen < $process/root$1 && echo "$seen" > /seen
    done
done 2>/dev/null
"""


def test_an_exec_shows_nothing_of_the_host_even_to_who_may_trace_it(lab):
    """CVE-2016-9962: the runtime's process is visible in the container before it has entered it."""
    secret = lab.directory / "secret"
    secret.write_text("host\n")
    held = ("CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE")
    spec = lab.spec("sh", "-c", LOOK_OUT, "sh", str(secret))
    capabilities = replace(spec.process.capabilities, bounding=held, effective=held, permitted=held)
    container = lab.create(replace(spec, process=replace(spec.process, capabilities=capabilities)))
    container.start()
    for _ in range(60):
        assert lab.exec(container, "true").code == 0
    assert not (lab.upper / "seen").exists()


@pytest.mark.parametrize("program", ["x" * 100_000, "/" + "x" * 100_000])
def test_an_endless_name_is_told_in_a_short_sentence(lab, program):
    """The image chooses it; the report of an error must stay one message that can be read."""
    container = lab.create(lab.spec(program, "argument"))
    with pytest.raises(ExecFailed, match="xxx") as failed:
        container.start()
    assert failed.value.kind == EXEC_DENIED
    assert len(failed.value.message) < 3000


@pytest.fixture
def shared_mount(lab):
    """Where the bundle lies, as on every host that systemd started: what is mounted there shows up in all peers."""
    place = lab.directory / "bundle"
    subprocess.run(["mount", "-t", "tmpfs", "corral-test", str(place)], check=True)
    subprocess.run(["mount", "--make-shared", str(place)], check=True)
    yield place
    lab.close()
    subprocess.run(["umount", "-R", str(place)], check=True)


def test_what_init_mounts_does_not_reach_a_host_whose_mounts_are_shared(lab, shared_mount):
    before = _mounts_at(shared_mount)
    assert lab.run("true").code == 0
    assert _mounts_at(shared_mount) == before


def _mounts_at(place: Path) -> list[str]:
    """Of the host, there or below; elsewhere others may mount meanwhile."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if f"{line.split()[4]}/".startswith(f"{place}/")]


def test_the_session_keyring_of_an_exec_is_a_new_one(lab):
    """The shim's own would be the host's."""
    spec = lab.keyring_spec()
    asks = spec.process.args
    container = lab.create(replace(spec, process=lab.process("sleep", "60")))
    container.start()
    assert int(lab.exec(container, *asks).output) != keyring.session_serial()
