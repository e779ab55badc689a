"""The crash test in small: kills of anything under load; and that it finds a shim which reports before it writes."""

import random
import shutil
import sys
from pathlib import Path

import pytest
from crash.load import Lives
from crash.storm import DAEMON_ONLY, FIVE_PROCESSES, ONE_PROCESS, Storm
from crash.tally import Fault
from support.corrald import Corrald, running
from support.requirements import needs

import corral.shim

pytestmark = needs("root", "overlayfs", "busybox", "netns")

KILLS = 10
SHIM_SOURCES = Path(next(iter(corral.shim.__path__))).parents[1]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("split", [False, True])
def test_whatever_is_killed_under_load_nothing_is_lost_or_left(busybox_archive: Path, *, split: bool) -> None:
    with running(split=split) as daemon:
        load_image(daemon, busybox_archive)
        kinds = FIVE_PROCESSES if split else ONE_PROCESS
        storm = Storm(daemon, KILLS, random.randrange(1 << 32), kinds)
        print(f"seed {storm.seed}")
        assert storm.run() == []
        assert storm.tally.is_clean, storm.tally.faults


def load_image(daemon: Corrald, archive: Path) -> None:
    with daemon.client() as client:
        client.images.load(archive, name="busybox")


@pytest.mark.timeout(240)
def test_a_shim_that_reports_an_exit_before_it_has_written_it_down_is_found_out(
    tmp_path: Path, busybox_archive: Path
) -> None:
    """Shims are killed right after they have told the daemon, which is killed, too, so that some tell nobody."""
    patched = tmp_path / "shim"
    shutil.copytree(SHIM_SOURCES, patched, ignore=shutil.ignore_patterns("__pycache__"))
    report_first(patched / "corral/shim/processes.py")
    with running(command=with_shim(patched)) as daemon:
        load_image(daemon, busybox_archive)
        storm = Storm(
            daemon, 40, 1, DAEMON_ONLY, (Lives,) * 8, arm=1, points=("shim.exit.after_event",), stop_at_fault=True
        )
        storm.run()
    assert storm.tally.faults[Fault.WRONG_CODE] > 0


def report_first(source: Path) -> None:
    """Have the shim reap a process and tell of its end, and only then write that down."""
    text = source.read_text("utf-8")
    for right, wrong in (
        ("        process.exit = self._write_exit(process)\n", "        process.exit = self._exit_record(process)\n"),
        (
            '        failpoint("shim.exit.after_event")\n',
            '        failpoint("shim.exit.after_event")\n        self._write_exit(process)\n',
        ),
        (
            "    def _write_exit(self",
            "    def _exit_record(self, process: ContainerProcess) -> records.Exit:\n"
            "        process.reap()\n"
            "        return process.exit_record(oom=False, dropped_bytes=0)\n\n"
            "    def _write_exit(self",
        ),
    ):
        assert text.count(right) == 1, f"the shim has changed, and so must this test: {right}"
        text = text.replace(right, wrong)
    source.write_text(text, "utf-8")


def with_shim(sources: Path) -> list[str]:
    """corrald whose shims have this source."""
    code = f"import sys; sys.path.insert(0, {str(sources)!r}); from corral.daemon.__main__ import main; main()"
    return [sys.executable, "-c", code]
