"""An init that stays beside its program, looked at while that is about to run."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from corral.kernel import process
from corral.oci import reaper
from corral.oci.channel import ChildEnd
from corral.oci.program import program_of
from corral.oci.reaper import has_begun
from corral.oci.spec import Spec

pytestmark = pytest.mark.timeout(20, method="signal")


def test_an_init_is_known_to_stay_from_before_its_program_is_born() -> None:
    """Else, were both killed in between, the program would be taken for one that never ran, and run once more."""
    spec = Spec.from_json({"ociVersion": "1.2.0", "process": {"args": ["/no/such"], "cwd": "/"}})
    assert spec.process is not None
    program = program_of(spec.process, spec.linux, user=None)
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    writer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            writer.send(b"full")
    writer.setblocking(True)  # the child of init waits here, to say that there is no such program
    init, pidfd = process.clone(0)
    if init == 0:
        try:
            reader.close()  # with the one of the test, the child of init ends, too
            os.kill(os.getpid(), signal.SIGSTOP)
            reaper.stay(ChildEnd(writer), program)
        finally:
            os._exit(1)
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WSTOPPED)
        started = process.start_time(init)
        assert has_begun(init, started) is False
        process.send_signal(pidfd, signal.SIGCONT)
        while not (born := Path(f"/proc/{init}/task/{init}/children").read_text()):
            time.sleep(0.001)
        assert process.name_of(int(born)) == process.name_of(init)
        assert has_begun(init, started) is True
    finally:
        process.send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        reader.close()
        writer.close()
    assert has_begun(init, started) is None
