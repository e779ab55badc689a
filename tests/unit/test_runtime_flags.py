"""corral-oci's flags, signals and cgroup paths."""

import signal

import pytest

from corral.oci.spec import Linux
from corral.runtime import control, events, groups, remove
from corral.runtime.errors import CommandError
from corral.runtime.flags import MANY, SWITCH, VALUE, parse

FLAGS = {"bundle,b": VALUE, "detach,d": SWITCH, "env,e": MANY}


def test_flags_end_at_the_first_argument() -> None:
    options, rest = parse(["-b", "x", "--env=A=1", "-e", "B=2", "--detach", "id", "-d", "--nope"], FLAGS)
    assert (options.text("bundle"), options.texts("env"), options.on("detach")) == ("x", ["A=1", "B=2"], True)
    assert rest == ["id", "-d", "--nope"]
    assert parse(["--detach=false", "--", "-x"], FLAGS)[1] == ["-x"]
    assert not parse(["--detach=false"], FLAGS)[0].on("detach")


def test_flags_may_stand_behind_arguments_where_no_command_follows() -> None:
    options, rest = parse(["id", "-d", "--bundle", "x", "TERM", "--", "-9"], FLAGS, anywhere=True)
    assert (options.on("detach"), options.text("bundle"), rest) == (True, "x", ["id", "TERM", "-9"])
    assert parse(["-", "-d"], FLAGS, anywhere=True)[1] == ["-"]
    assert parse(["id", "-1", "-d"], FLAGS, anywhere=True)[1] == ["id", "-1"]
    with pytest.raises(CommandError, match="not defined: -1"):
        parse(["-1", "id"], FLAGS, anywhere=True)


@pytest.mark.parametrize(("text", "on"), [("1", True), ("T", True), ("TRUE", True), ("0", False), ("f", False)])
def test_switches_are_given_as_go_reads_them(text: str, on: bool) -> None:
    assert parse([f"--detach={text}"], FLAGS)[0].on("detach") is on


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


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        *((text, 64 << 20) for text in ("64m", "64M", "64mb", "64 MiB", "65536KiB", "67108864b")),
        *(("1.5g", 3 << 29), ("0", 0), ("-1", -1), ("2t", 2 << 40), ("1p", 1 << 50)),
    ],
)
def test_update_reads_sizes_as_docker_and_runc_do(text: str, limit: int) -> None:
    options, _ = parse(["--memory", text], control.UPDATE_FLAGS)
    assert control._wanted(options) == {"memory": {"limit": limit}}


@pytest.mark.parametrize("text", ["x", "-5m", ".5g", "1.g", "1_0m", "0x10", "1ki2", "m", "²m", "1.5.5g", "1e3"])
def test_update_refuses_sizes_that_are_none(text: str) -> None:
    options, _ = parse(["--memory", text], control.UPDATE_FLAGS)
    with pytest.raises(CommandError, match=r"--memory: .* is not a number"):
        control._wanted(options)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5s", 5), ("500ms", 0.5), ("1h30m", 5400), ("1m30.5s", 90.5), ("10us", 1e-5), ("3ns", 3e-9)]
)
def test_an_interval_is_written_as_go_writes_it(text: str, seconds: float) -> None:
    assert events._seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "x", "0s", "-1s", "1h30", "1sm", "s", "1..5s", "1hm", "5 s", "1µ"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="--interval"):
        events._seconds(text)


def test_update_takes_sizes_with_a_unit() -> None:
    options, _ = parse(["--memory", "32m", "--pids-limit=-1", "--cpuset-cpus", "0"], control.UPDATE_FLAGS)
    assert control._wanted(options) == {"memory": {"limit": 32 << 20}, "pids": {"limit": -1}, "cpu": {"cpus": "0"}}
