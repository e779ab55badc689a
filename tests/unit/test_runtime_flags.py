"""corral-oci's flags, signals and cgroup paths."""

import signal

import pytest

from corral.oci.spec import Linux
from corral.runtime import control, groups, remove
from corral.runtime.errors import CommandError
from corral.runtime.flags import MANY, SWITCH, VALUE, parse

FLAGS = {"bundle,b": VALUE, "detach,d": SWITCH, "env,e": MANY}


def test_flags_end_at_the_first_argument() -> None:
    options, rest = parse(["-b", "x", "--env=A=1", "-e", "B=2", "--detach", "id", "-d", "--nope"], FLAGS)
    assert (options.text("bundle"), options.texts("env"), options.on("detach")) == ("x", ["A=1", "B=2"], True)
    assert rest == ["id", "-d", "--nope"]
    assert parse(["--detach=false", "--", "-x"], FLAGS)[1] == ["-x"]
    assert not parse(["--detach=false"], FLAGS)[0].on("detach")


@pytest.mark.parametrize("words", [["--nope"], ["-b"], ["--detach=maybe"]])
def test_wrong_flags_are_refused(words: list[str]) -> None:
    with pytest.raises(CommandError):
        parse(words, FLAGS)


def test_signals_by_number_and_name() -> None:
    for text in ("9", "KILL", "SIGKILL", "sigkill"):
        assert remove.parse_signal(text) == signal.SIGKILL
    assert remove.parse_signal("RTMIN+3") == signal.SIGRTMIN + 3
    assert remove.parse_signal("SIGRTMAX-1") == signal.SIGRTMAX - 1
    assert remove.parse_signal("0") == 0
    for text in ("", "99", "NOPE", "-9", "RTMIN+99"):
        with pytest.raises(CommandError):
            remove.parse_signal(text)


def test_a_cgroup_path_is_never_relative_to_the_caller() -> None:
    assert groups.path_of(Linux(), "a") == "/corral-oci/a"
    assert groups.path_of(Linux(cgroups_path="x/y"), "a") == "/corral-oci/x/y"
    assert groups.path_of(Linux(cgroups_path="/x//y/"), "a") == "/x/y"
    for path in ("/", "../x", "/a/../b", "system.slice:docker:id"):
        with pytest.raises(CommandError):
            groups.path_of(Linux(cgroups_path=path), "a")


def test_update_takes_sizes_with_a_unit() -> None:
    options, _ = parse(["--memory", "32m", "--pids-limit=-1", "--cpuset-cpus", "0"], control.UPDATE_FLAGS)
    assert control._wanted(options) == {"memory": {"limit": 32 << 20}, "pids": {"limit": -1}, "cpu": {"cpus": "0"}}
