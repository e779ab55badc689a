"""Fixtures of all tests, and two rules of a whole run: nothing is left on the machine; in CI only listed skips pass.

@needs("root", "overlayfs")            skip, with the reason, where the machine lacks it
def test_x(daemon): ...                a corrald of its own per module, in one process (or --services split: in five)
def test_y(start_daemon): ...          any number of them: start_daemon(split=True, settings={"tasks": {...}})
"""

import contextlib
import gc
import os
import secrets
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from support.amounts import amount
from support.corrald import Corrald
from support.file_systems import FileSystems
from support.images import write_busybox
from support.leaks import TAG_VARIABLE, Watch
from support.preloaded import PROGRAMS
from support.requirements import lacking

ALLOWED_SKIPS = Path(__file__).parent / "allowed-skips.txt"
WATCH = pytest.StashKey[Watch]()
SKIPS = pytest.StashKey[dict[str, str]]()
PROBLEMS = pytest.StashKey[list[str]]()

# How long an example takes says more about who else uses the processor.
hypothesis.settings.register_profile("corral", deadline=None, max_examples=amount(100, in_ci=40))
hypothesis.settings.load_profile("corral")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--services",
        choices=("all", "split"),
        default="all",
        help="the daemon under test: all services in one process, or one process each",
    )
    parser.addoption(
        "--preloaded",
        action="store_true",
        help="fork corrald and corral from processes that have loaded them, instead of executing them",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Ignored where a shell has started this in its background, and then by all that is started from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tag = f"corral{secrets.token_hex(2)}"
    os.environ[TAG_VARIABLE] = tag
    config.stash[WATCH] = Watch(tag)
    config.stash[SKIPS] = {}
    config.stash[PROBLEMS] = []
    PROGRAMS.wanted = config.getoption("--preloaded")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("requires"):
        for what in marker.args:
            reason = lacking(what)
            if reason is not None:
                pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        item.config.stash[SKIPS][item.nodeid] = str(report.longrepr[2]).removeprefix("Skipped: ")
    if report.failed and call.excinfo is not None:  # what it held open would be found at the end, as the run's error
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            traceback.clear_frames(call.excinfo.tb)
            gc.collect()
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    PROGRAMS.close()
    problems = config.stash[PROBLEMS]
    problems += [f"left on the machine: {item}" for item in config.stash[WATCH].left_behind()]
    if os.environ.get("CI") == "true":
        problems += unexpected_skips(config.stash[SKIPS])
    if problems and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def unexpected_skips(skips: dict[str, str]) -> list[str]:
    """Skips whose reason is not on the list. A list entry is a whole reason; lines with '#' are comments."""
    lines = ALLOWED_SKIPS.read_text("utf-8").splitlines() if ALLOWED_SKIPS.exists() else []
    allowed = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    return [f"skipped, but not allowed in CI: {test}: {why}" for test, why in skips.items() if why not in allowed]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    problems = config.stash[PROBLEMS]
    if problems:
        terminalreporter.section("the run fails because of", red=True, bold=True)
        for problem in problems:
            terminalreporter.line(problem)


def pytest_unconfigure(config: pytest.Config) -> None:
    if WATCH in config.stash:
        config.stash[WATCH].close()


@pytest.fixture
def start_daemon(request: pytest.FixtureRequest) -> Iterator[Callable[..., Corrald]]:
    """Start a corrald with private directories and kernel names; keywords are the fields of Corrald.

    Split into five processes if the run was asked for that and the test does not say.
    """
    split = request.config.getoption("--services") == "split"
    with contextlib.ExitStack() as daemons:

        def start(**options: object) -> Corrald:
            daemon = daemons.enter_context(Corrald(**{"split": split, **options}))  # type: ignore[arg-type]
            daemon.start()
            return daemon

        yield start


@pytest.fixture(scope="module")
def daemon(request: pytest.FixtureRequest) -> Iterator[Corrald]:
    """One corrald for the tests of a module. A test that stops or kills it starts it again."""
    with Corrald(split=request.config.getoption("--services") == "split") as corrald:
        corrald.start()
        yield corrald


@pytest.fixture(scope="session")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystems]:
    """File systems that this machine's own disk does not have."""
    made = FileSystems(tmp_path_factory.mktemp("file-systems"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def busybox_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A docker-archive of `busybox:latest` made from this machine's static busybox."""
    if reason := lacking("busybox"):
        pytest.skip(reason)
    return write_busybox(tmp_path_factory.mktemp("images") / "busybox.tar")


@pytest.fixture(scope="session")
def busybox_oci_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an OCI archive with compressed layers."""
    if reason := lacking("busybox"):
        pytest.skip(reason)
    return write_busybox(tmp_path_factory.mktemp("images") / "busybox-oci.tar", form="oci")
