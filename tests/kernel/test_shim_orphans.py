"""What the zygote writes down of a container whose shim was killed."""

import json
import os
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import mount, process
from corral.kernel.namespaces import Kind
from corral.shim import records
from corral.shim.orphans import write_exit
from corral.shim.process import Ended
from corral.shim.records import Record

pytestmark = needs("root")


@pytest.mark.parametrize(("readable", "reason"), [(True, records.UNSTARTED), (False, records.BY_ZYGOTE)])
def test_an_end_is_written_down_even_if_it_cannot_be_looked_into(tmp_path: Path, readable: bool, reason: str) -> None:
    pid, pidfd = process.clone(Kind.MOUNT.flag)
    if pid == 0:
        try:
            end_as_init(tmp_path, readable=readable)
        finally:
            os._exit(1)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert json.loads((tmp_path / records.EXIT).read_text())["reason"] == reason


def end_as_init(bundle: Path, *, readable: bool) -> None:
    """Write down the end of this process, which has executed nothing; readable: /proc tells that."""
    pid = os.getpid()
    record = Record(1, 1, pid, process.start_time(pid), created_at_ns=1, started_at_ns=None, terminal=False)
    (bundle / records.RECORD).write_text(json.dumps(record.to_json()))
    if not readable:
        mount.set_propagation("/", mount.MS_PRIVATE, recursive=True)
        mount.mount("tmpfs", "/proc", "tmpfs", 0)
        Path(f"/proc/{pid}").touch()  # not a directory
    write_exit([bundle], pid, Ended(1 << 8, 1))
