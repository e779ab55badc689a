"""What a container's process is when it begins: ids, capabilities, limits, environment, descriptors, signals."""

import os
import resource
import signal
import stat
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import keyring
from corral.oci import defaults
from corral.oci.runtime import SETUP, ExecFailed, Stdio
from corral.oci.spec import Capabilities, Rlimit, User

pytestmark = needs("root", "overlayfs", "busybox")


def status(output: str) -> dict[str, str]:
    """/proc/<pid>/status as a dict."""
    return dict(line.split(":\t", 1) for line in output.splitlines() if ":\t" in line)


class TestUser:
    @pytest.mark.parametrize(
        ("user", "ids"),
        [
            ("bob", "1000 1001 1001 10 2000"),
            ("1000", "1000 1001 1001 10 2000"),
            ("bob:crew", "1000 2000 2000"),
            ("bob:77", "1000 77 77"),
            ("4242", "4242 0 0"),
            ("4242:4343", "4242 4343 4343"),
            ("root", "0 0 0 10"),
            ("0", "0 0 0 10"),
        ],
    )
    def test_is_looked_up_in_the_container(self, lab, user, ids):
        uid, gid, *groups = ids.split()
        seen = status(lab.run("cat", "/proc/self/status", user=user).output)
        assert set(seen["Uid"].split()) == {uid}
        assert set(seen["Gid"].split()) == {gid}
        assert set(seen["Groups"].split()) | {gid} == set(groups)

    def test_by_number_comes_from_the_specification(self, lab):
        user = User(uid=5, gid=6, additional_gids=(7, 8))
        seen = status(lab.run_process("cat", "/proc/self/status", user=user).output)
        assert (seen["Uid"].split()[0], seen["Gid"].split()[0], seen["Groups"].split()) == ("5", "6", ["7", "8"])

    @pytest.mark.parametrize(
        "user", ["0x0", "-1", "4294967295", "4294967296", "nobody-here", " ", ":0", "bob:", "bob:nogroup", "1e3", "٣"]
    )
    def test_that_names_nobody_is_refused(self, lab, user):
        with pytest.raises(ExecFailed) as failed:
            lab.run("true", user=user)
        assert failed.value.kind == SETUP
        assert "user" in failed.value.message or "group" in failed.value.message

    def test_the_runtimes_groups_are_not_kept(self, lab):
        before = os.getgroups()
        os.setgroups([4, 20])
        try:
            assert status(lab.run("cat", "/proc/self/status").output)["Groups"].split() == []
        finally:
            os.setgroups(before)

    def test_home_comes_from_passwd_unless_it_is_given(self, lab):
        assert lab.run("echo $HOME", user="bob").output == "/home/bob\n"
        assert lab.run("echo $HOME", user="4242").output == "/\n"
        assert lab.run("echo $HOME", user="bob", env=("HOME=/elsewhere",)).output == "/elsewhere\n"

    def test_owns_its_pipes(self, lab):
        """So that it can open /dev/stdout."""
        assert lab.run("echo again > /dev/stdout", user="bob").output == "again\n"

    def test_a_device_given_as_stdio_keeps_its_owner(self, lab):
        fd = os.open("/dev/null", os.O_RDWR)
        container = lab.create(lab.spec("true"), user="bob", stdio=Stdio(fd, fd, fd))
        os.close(fd)
        container.start()
        assert lab.wait(container.init) == 0
        assert Path("/dev/null").stat().st_uid == 0


class TestCapabilities:
    def test_are_those_asked_for_and_no_others(self, lab):
        held = ("CAP_CHOWN", "CAP_KILL")
        wanted = Capabilities(bounding=(*held, "CAP_SETUID"), effective=("CAP_KILL",), permitted=held)
        seen = status(lab.run("cat", "/proc/self/status", capabilities=wanted).output)
        # Root regains on exec what the bounding set leaves: the sets before exec are not what counts for uid 0.
        assert int(seen["CapBnd"], 16) == 1 << 0 | 1 << 5 | 1 << 7
        assert int(seen["CapInh"], 16) == int(seen["CapAmb"], 16) == 0

    def test_by_default_none_can_be_inherited(self, lab):
        """CVE-2022-24769."""
        seen = status(lab.run("cat", "/proc/self/status").output)
        assert int(seen["CapInh"], 16) == 0

    def test_an_ordinary_user_has_none(self, lab):
        seen = status(lab.run("cat", "/proc/self/status", user="bob").output)
        assert int(seen["CapEff"], 16) == int(seen["CapPrm"], 16) == 0

    def test_ambient_ones_reach_an_ordinary_user(self, lab):
        one = ("CAP_NET_BIND_SERVICE",)
        seen = status(lab.run("cat", "/proc/self/status", user="bob", capabilities=Capabilities(*[one] * 5)).output)
        assert int(seen["CapEff"], 16) == int(seen["CapAmb"], 16) == 1 << 10

    def test_what_the_runtime_lacks_is_left_out(self, lab):
        every = tuple(f"CAP_{name}" for name in ("SYS_RESOURCE", "CHOWN"))
        seen = status(lab.run("cat", "/proc/self/status", capabilities=Capabilities(every, every, (), every)).output)
        assert int(seen["CapBnd"], 16) & 1

    def test_an_unknown_one_is_none(self, lab):
        some = ("CAP_FLY", "CAP_KILL")
        seen = status(lab.run("cat", "/proc/self/status", capabilities=Capabilities(bounding=some)).output)
        assert int(seen["CapBnd"], 16) == 1 << 5


def test_no_new_privs_is_set_as_asked(lab):
    assert status(lab.run("cat", "/proc/self/status").output)["NoNewPrivs"] == "1"
    assert status(lab.run("cat", "/proc/self/status", no_new_privileges=False).output)["NoNewPrivs"] == "0"


def test_without_no_new_privs_the_filter_is_loaded_all_the_same(lab):
    assert status(lab.run("cat", "/proc/self/status", no_new_privileges=False).output)["Seccomp"] == "2"


class TestEnvironment:
    def test_nothing_of_the_runtimes_reaches_it(self, lab, monkeypatch):
        monkeypatch.setenv("SECRET_OF_THE_HOST", "x")
        seen = lab.run("cat", "/proc/self/environ", env=("A=b=c", "A2=")).output.split("\0")
        assert sorted(filter(None, seen)) == ["A2=", "A=b=c", "HOME=/root"]


class TestDescriptors:
    def test_only_0_1_and_2_are_open(self, lab):
        held = [os.open("/etc", os.O_RDONLY) for _ in range(3)]
        for fd in held:
            os.set_inheritable(fd, True)
        try:
            assert lab.run("cd /proc/self/fd; echo *").output.split() == ["0", "1", "2", "3"]  # 3: the shell's own
        finally:
            for fd in held:
                os.close(fd)

    def test_what_is_not_given_is_the_containers_own_null(self, lab):
        script = "stat -c %d:%t:%T -L /proc/self/fd/0 /dev/null > /seen"
        container = lab.create(lab.spec(script))
        container.start()
        assert lab.wait(container.init) == 0
        stdin, null = (lab.upper / "seen").read_text().split()
        assert stdin == null
        assert int(null.split(":")[0]) != Path("/dev/null").stat().st_dev

    def test_0_1_and_2_of_the_runtime_may_be_given_in_any_order(self, lab):
        """They are copied out of the way before they are put in place."""
        readers, writers = zip(*(os.pipe() for _ in range(2)), strict=True)
        saved = [os.dup(fd) for fd in (1, 2)]
        os.dup2(writers[0], 1)
        os.dup2(writers[1], 2)
        try:
            container = lab.create(lab.spec("echo out; echo err >&2"), stdio=Stdio(None, 2, 1))
        finally:
            for fd, place in zip(saved, (1, 2), strict=True):
                os.dup2(fd, place)
                os.close(fd)
            for fd in writers:
                os.close(fd)
        container.start()
        lab.wait(container.init)
        assert [os.read(fd, 99) for fd in readers] == [b"err\n", b"out\n"]
        for fd in readers:
            os.close(fd)


class TestSignals:
    def test_none_is_ignored_or_blocked(self, lab):
        """Python ignores SIGPIPE, and the shim blocks what its signalfd reads."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1})
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            seen = status(lab.run("cat", "/proc/self/status").output)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            signal.signal(signal.SIGHUP, handler)
        assert {int(seen[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")} == {0}

    def test_a_session_of_its_own(self, lab):
        container = lab.create(lab.spec("sleep", "60"))
        container.start()
        assert os.getsid(container.init.pid) == os.getpgid(container.init.pid) == container.init.pid


class TestDirectory:
    def test_is_made_where_the_image_lacks_it(self, lab):
        assert lab.run("pwd; stat -c %u:%a .", cwd="/srv/app/deep").output == "/srv/app/deep\n0:755\n"

    def test_may_be_a_link_inside_the_image(self, lab):
        (lab.plant / "link").symlink_to("/usr/bin")
        assert lab.run("/bin/pwd -P", cwd="/link").output == "/usr/bin\n"

    def test_a_dangling_link_is_made_inside_the_image(self, lab):
        (lab.plant / "dangling").symlink_to("/made/by/us")
        assert lab.run("/bin/pwd -P", cwd="/dangling").output == "/made/by/us\n"
        assert not Path("/made").exists()

    def test_a_file_is_refused(self, lab):
        with pytest.raises(ExecFailed, match="not a directory"):
            lab.run("true", cwd="/etc/passwd")


class TestLimits:
    def test_are_set(self, lab):
        limits = (Rlimit("RLIMIT_NOFILE", 100, 200), Rlimit("RLIMIT_CORE", 0, 0))
        assert lab.run("ulimit -Sn; ulimit -Hn; ulimit -c", rlimits=limits).output.split() == ["100", "200", "0"]

    def test_are_clamped_to_what_this_host_allows(self, lab):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        result = lab.run("ulimit -Hn", rlimits=(Rlimit("RLIMIT_NOFILE", 1 << 19, 1 << 20),))
        assert result.code == 0
        assert int(result.output) in (hard, 1 << 20)

    def test_an_unknown_one_is_refused(self, lab):
        with pytest.raises(ValueError, match="RLIMIT_FUN"):
            lab.run("true", rlimits=(Rlimit("RLIMIT_FUN", 1, 1),))

    @pytest.mark.parametrize("wanted", [-999, 0, 500])
    def test_an_oom_score_that_cannot_be_lowered_stays(self, lab, wanted):
        own = int(Path("/proc/self/oom_score_adj").read_text())
        seen = int(lab.run("cat /proc/self/oom_score_adj", oom_score_adj=wanted).output)
        assert seen == wanted if wanted >= own else seen in (wanted, own)


def test_umask(lab):
    assert lab.run("umask").output == "0022\n"
    assert lab.run_process("umask", user=User(umask=0o77)).output == "0077\n"


def test_the_session_keyring_is_a_new_one(lab):
    """Keys are not namespaced: with the host's session keyring a container would hold the host's keys."""
    serials = [int(lab.run_spec(lab.keyring_spec()).output) for _ in range(2)]
    assert len({keyring.session_serial(), *serials}) == 3


def test_bytes_that_are_no_text_pass_through(lab):
    container = lab.create(lab.spec("sh", "-c", 'printf "%s" "$1" > /seen', "-", "\udcff\udcfe"))
    container.start()
    assert lab.wait(container.init) == 0
    assert (lab.upper / "seen").read_bytes() == b"\xff\xfe"


def test_a_script_without_a_user_runs_as_root(lab):
    assert lab.run("id -u").output == "0\n"


def test_files_are_made_by_the_user(lab):
    lab.run("touch /tmp/mine", user="bob")
    made = (lab.upper / "tmp/mine").stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (1000, 1001, 0o644)


def test_docker_default_capabilities(lab):
    seen = status(lab.run("cat", "/proc/self/status").output)
    assert int(seen["CapEff"], 16) == 0xA80425FB
    assert len(defaults.CAPABILITIES) == 14
