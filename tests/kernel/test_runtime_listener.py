"""SCMP_ACT_NOTIFY: a listener on the host is told of a container, and answers its calls."""

import array
import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel.namespaces import Kind
from corral.kernel.seccomp.tables import numbers
from corral.kernel.syscalls import MACHINE
from corral.oci import defaults
from corral.oci.errors import ExecFailed
from corral.oci.listener import pass_to_listener
from corral.oci.runtime import Stdio
from corral.oci.spec import Action, IdMapping, Namespace, Seccomp, SeccompSyscall
from corral.oci.state import State

pytestmark = needs("root", "overlayfs", "busybox", "userns")

# struct seccomp_notif: id, pid, flags, data (nr, arch, instruction pointer, six arguments); seccomp_notif_resp: id,
# val, error, flags. Source: include/uapi/linux/seccomp.h.
_NOTIF, _RESPONSE = struct.Struct("=QII iIQ6Q"), struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1


class Listener(threading.Thread):
    """Answers every call with an errno, or lets it go on."""

    def __init__(self, path: Path, *, error: int = 0) -> None:
        super().__init__(daemon=True)
        self.error = error
        self.told: list[dict[str, object]] = []
        self.calls: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._ended, self._end = os.pipe()

    def run(self) -> None:
        poller = select.poll()
        for fd in (self._socket.fileno(), self._ended):
            poller.register(fd, select.POLLIN)
        while True:
            for fd, events in poller.poll():
                if fd == self._ended:
                    return
                if fd == self._socket.fileno():
                    poller.register(self._meet(), select.POLLIN)
                elif events & select.POLLIN:
                    self._answer(fd)
                else:
                    poller.unregister(fd)
                    os.close(fd)

    def _meet(self) -> int:
        connection, _ = self._socket.accept()
        with connection:
            data, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(16))
            ((_, _, payload),) = ancillary
            (fd,) = array.array("i", payload)
            while part := connection.recv(65536):
                data += part
        self.told.append(json.loads(data))
        return fd

    def _answer(self, fd: int) -> None:
        notif = bytearray(_NOTIF.size)
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, _RECEIVE, notif)
            identity, _, _, number, *_ = _NOTIF.unpack(notif)
            self.calls.append(number)
            answer = (0, -self.error, 0) if self.error else (0, 0, _CONTINUE)
            fcntl.ioctl(fd, _SEND, _RESPONSE.pack(identity, *answer))

    def close(self) -> None:
        os.write(self._end, b"x")
        self.join()
        self._socket.close()
        os.close(self._end)
        os.close(self._ended)


@contextlib.contextmanager
def listening(path: Path, **options: int) -> Iterator[Listener]:
    """A listener in a thread. That others fork meanwhile does no harm here: it holds no lock that they need."""
    listener = Listener(path, **options)
    listener.start()
    try:
        yield listener
    finally:
        listener.close()


def notifying(path: Path, *names: str, **changes: object) -> Seccomp:
    """The default profile, with these calls for the listener to answer."""
    profile = defaults.seccomp(defaults.CAPABILITIES)
    ask = SeccompSyscall(names, Action.NOTIFY)
    rules = [replace(r, names=tuple(n for n in r.names if n not in names)) for r in profile.syscalls]
    rules = [r for r in rules if r.names]
    return replace(profile, syscalls=(ask, *rules), listener_path=str(path), listener_metadata="opaque", **changes)


MKDIR = ("mkdir", "mkdirat")


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_a_listener_is_told_and_answers(lab, tmp_path, no_new_privileges):
    with listening(tmp_path / "listener", error=28) as listener:
        spec = lab.spec(
            "mkdir /x",
            linux={"seccomp": notifying(tmp_path / "listener", *MKDIR)},
            annotations={"a": "b"},
            no_new_privileges=no_new_privileges,
        )
        container = lab.create(spec, container_id="the-id")
        pid = container.init.pid
        deadline = time.monotonic() + 20  # it is in the listener's socket; the thread may not have read it yet
        while not listener.told and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(listener.told) == 1, "told by the time the container is created"
        container.start()
        assert lab.wait(container.init) == 1
        state = {"ociVersion": "1.3.0", "id": "the-id", "status": "creating", "pid": pid, "annotations": {"a": "b"}}
        assert listener.told == [
            {
                "ociVersion": "1.3.0",
                "fds": ["seccompFd"],
                "pid": pid,
                "metadata": "opaque",
                "state": state | {"bundle": str(lab.directory / "bundle")},
            }
        ]
        assert numbers(MACHINE)["mkdir" if MACHINE == "x86_64" else "mkdirat"] in listener.calls
    assert not lab.upper.joinpath("x").exists()


def test_a_listener_may_let_calls_go_on(lab, tmp_path):
    with listening(tmp_path / "listener"):
        profile = notifying(tmp_path / "listener", *MKDIR, flags=("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",))
        assert lab.run("mkdir /x && echo made", linux={"seccomp": profile}).output == "made\n"


def test_the_calls_of_the_runtime_itself_are_the_listeners_too(lab, tmp_path):
    """What comes after the filter, up to the program, waits for a listener that knows of the container by then."""
    names = ("close", "close_range", "recvfrom", "execve", "setresuid", "setresgid", "setgroups", "capset", "prctl")
    for no_new_privileges in (True, False):
        path = tmp_path / f"listener{no_new_privileges}"
        with listening(path) as listener:
            profile = notifying(path, *names)
            result = lab.run("echo fine", linux={"seccomp": profile}, no_new_privileges=no_new_privileges, user="bob")
            assert result.output == "fine\n"
            assert numbers(MACHINE)["execve"] in listener.calls


def test_an_exec_has_a_listener_of_its_own(lab, tmp_path):
    with listening(tmp_path / "listener", error=28) as listener:
        container = lab.create(lab.spec("sleep", "60", linux={"seccomp": notifying(tmp_path / "listener", *MKDIR)}))
        container.start()
        reader, writer = os.pipe()
        handle = container.exec(lab.process("mkdir /y"), stdio=Stdio(None, writer, writer))
        lab.made.append(handle)
        assert lab.wait(handle) == 1
        assert b"No space left" in os.read(reader, 100)
        os.close(reader)
        os.close(writer)
        _, second = listener.told
        assert second["state"]["status"] == "running"
        assert second["state"]["pid"] == container.init.pid
        assert second["pid"] == handle.pid


@pytest.mark.parametrize("names", [("close", "close_range"), ("clone",), ("sendto", "setsid", "prctl")])
@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_it_answers_its_calls_before_it_is_the_program(lab, tmp_path, names, no_new_privileges):
    with listening(tmp_path / "listener"):
        container = lab.create(lab.spec("sleep", "60", linux={"seccomp": notifying(tmp_path / "listener", *names)}))
        container.start()
        result = lab.exec(container, "echo", "ran", no_new_privileges=no_new_privileges)
        assert result.output == "ran\n"


def test_in_a_joined_pid_namespace(lab, tmp_path):
    first = lab.create(lab.spec("sleep", "60"))
    first.start()
    with listening(tmp_path / "listener", error=28):
        spec = lab.spec("mkdir /x", linux={"seccomp": notifying(tmp_path / "listener", *MKDIR)})
        joined = Namespace(Kind.PID, f"/proc/{first.init.pid}/ns/pid")
        kinds = tuple(joined if n.type is Kind.PID else n for n in spec.linux.namespaces)
        spec = replace(spec, linux=replace(spec.linux, namespaces=kinds))
        assert "No space left" in lab.run_spec(spec).output


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_in_a_user_namespace(lab, tmp_path, no_new_privileges):
    os.chown(lab.upper, 100_000, 100_000)
    with listening(tmp_path / "listener", error=28) as listener:
        profile = notifying(tmp_path / "listener", *MKDIR)
        spec = lab.spec("mkdir /x", linux={"seccomp": profile}, no_new_privileges=no_new_privileges)
        mapping = (IdMapping(0, 100_000, 65536),)
        kinds = (*spec.linux.namespaces, Namespace(Kind.USER))
        linux = replace(spec.linux, namespaces=kinds, uid_mappings=mapping, gid_mappings=mapping)
        container = lab.create(replace(spec, linux=linux))
        container.start()
        assert lab.wait(container.init) == 1
        assert [told["pid"] for told in listener.told] == [container.init.pid]


def test_the_program_does_not_get_the_descriptor(lab, tmp_path):
    with listening(tmp_path / "listener"):
        seen = lab.run("ls -l /proc/self/fd", linux={"seccomp": notifying(tmp_path / "listener", *MKDIR)}).output
    assert "seccomp" not in seen


@pytest.mark.parametrize("kind", ["missing", "nobody listens", "too long"])
def test_a_listener_that_is_not_there_fails_the_container(lab, tmp_path, kind):
    path = tmp_path / ("x" * 120 if kind == "too long" else "listener")
    if kind == "nobody listens":
        with socket.socket(socket.AF_UNIX) as unused:
            unused.bind(str(path))
    with pytest.raises(ExecFailed, match=r"linux\.seccomp\.listenerPath"):
        lab.create(lab.spec("true", linux={"seccomp": notifying(path, *MKDIR)}))


def test_without_one_the_path_is_ignored(lab):
    profile = replace(defaults.seccomp(defaults.CAPABILITIES), listener_path="/no/such/socket")
    assert lab.run("echo fine", linux={"seccomp": profile}).output == "fine\n"


def test_a_listener_may_hang_up_as_soon_as_it_has_been_told(tmp_path):
    """It was told once more, of nothing, which fails where nobody is left; and one that is busy was not waited for."""
    path = tmp_path / "agent"
    profile = Seccomp(default_action=Action.ALLOW, listener_path=str(path))
    told = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def listen() -> None:
            for _ in range(500):
                connection, _ = listener.accept()
                told.append(connection.recv(65536))
                connection.close()

        thread = threading.Thread(target=listen)
        thread.start()
        for _ in range(500):
            pass_to_listener(profile, 0, os.getpid(), State("the-id", "/bundle", {}))
        thread.join()
    assert len(told) == 500
