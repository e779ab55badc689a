"""Mounts made ahead: a container that is served with them can't be told from one that made its own."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from shimclient import Message, workshop
from support.requirements import needs

from corral.oci import defaults
from corral.oci.decode import encode
from corral.oci.larder import Larder
from corral.oci.spec import Device, DeviceType, Mount
from corral.shim import wire

pytestmark = needs("root", "overlayfs", "busybox")

LOOK = """
grep -v overlay /proc/self/mountinfo | cut -d' ' -f4- | sort
ls -lanR /dev /sys/fs/cgroup | sed 's/ [A-Z][a-z][a-z] .*:[0-9][0-9] / /'
stat -c '%n %a %u %g' /dev /dev/* /dev/pts /dev/shm /dev/mqueue
echo x > /dev/shm/x; cat /dev/shm/x; echo x > /dev/null; ls -a /proc/acpi /sys/firmware; touch /sys/firmware/x
tty; echo *
"""


@pytest.fixture
def larder() -> Iterator[Larder]:
    made = Larder()
    made.stock()
    try:
        yield made
    finally:
        made.close()


def mounts_with(replacement: Mount) -> tuple[Mount, ...]:
    return tuple(replacement if mount.destination == replacement.destination else mount for mount in defaults.MOUNTS)


def look(lab, larder: Larder | None, script: str = LOOK, **changes: object) -> str:
    spec = lab.spec(script)
    mounts = changes.pop("all_mounts", spec.mounts)
    linux = replace(spec.linux, **changes)
    return lab.run_spec(replace(spec, mounts=mounts, linux=linux), larder=larder).output


def test_a_container_looks_the_same_with_and_without(lab, larder):
    assert look(lab, larder) == look(lab, None)


def test_everything_but_what_it_could_not_use_is_used(lab, larder):
    devices = {os.fstat(fd).st_dev for fd in larder.fds}
    seen = look(lab, larder, "stat -c %d /dev /dev/pts /dev/shm /sys/firmware")
    assert {int(line) for line in seen.split()} <= devices


def test_a_mount_that_is_asked_for_differently_is_made_anew(lab, larder):
    shm = Mount("/dev/shm", "tmpfs", "shm", ("nosuid", "nodev", "noexec", "mode=1777", "size=64k"))
    seen = look(lab, larder, "df -k /dev/shm | tail -n1", all_mounts=mounts_with(shm))
    assert " 64 " in seen


def test_no_directory_is_left_in_dev_that_nobody_asked_for(lab, larder):
    without = tuple(mount for mount in defaults.MOUNTS if mount.destination != "/dev/mqueue")
    assert look(lab, larder, "ls /dev", all_mounts=without) == look(lab, None, "ls /dev", all_mounts=without)


def test_a_mount_and_a_device_win_over_the_default_name(lab, larder):
    (lab.directory / "given").mkdir()
    (lab.directory / "given/file").touch()
    bind = Mount("/dev/fd", "bind", str(lab.directory / "given"), ("rbind",))
    assert look(lab, larder, "ls /dev/fd", all_mounts=(*defaults.MOUNTS, bind)) == "file\n"
    device = Device("/dev/ptmx", DeviceType.CHAR, 5, 2, 0o666)
    with contextlib.closing(Larder()) as another:
        another.stock()
        assert look(lab, another, "stat -c %F /dev/ptmx", devices=(device,)) == "character special file\n"


def test_no_descriptor_of_it_reaches_the_program(lab, larder):
    assert look(lab, larder, "ls /proc/self/fd | wc -l") == look(lab, None, "ls /proc/self/fd | wc -l")


def test_stocking_leaves_the_umask_and_closing_leaves_nothing(tmp_path: Path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    umask = os.umask(0o077)
    try:
        larder = Larder()
        larder.stock()
        assert os.umask(0o077) == 0o077
        larder.close()
        larder.close()
    finally:
        os.umask(umask)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_by_the_time_that_a_program_runs_its_mounts_are_its_own_alone():
    """Also where create and start come at once. One that its shim still holds can't be unmounted, it is busy."""
    with workshop({"CORRAL_FAILPOINTS": "shim.start.after_exec=sleep:0.5"}) as shop:
        caps = ["CAP_SYS_ADMIN"]
        sets = {"bounding": caps, "effective": caps, "permitted": caps}
        shim = shop.spawn("sh", "-c", "umount /dev/shm && echo mine", capabilities=sets)
        path = shim.bundle / "config.json"
        content = cast(Message, json.loads(path.read_text()))
        path.write_text(json.dumps(content | {"mounts": encode(defaults.MOUNTS)}))
        log = {"driver": "json-file", "path": str(shim.log)}
        requests = ({"id": 1, "op": "create", "log": log}, {"id": 2, "op": "start", "exec": ""})
        shim.peer.sock.sendall(b"".join(map(wire.encode, requests)))
        assert "ok" in shim.peer.receive()
        assert "ok" in shim.peer.receive()
        shim.wait()
        assert shim.log_entries() == [("stdout", "mine\n")]
