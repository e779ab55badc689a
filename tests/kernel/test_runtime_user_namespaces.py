"""User namespaces: new ones and joined ones, what belongs to them, and what the container's root can't do in them."""

import contextlib
import fcntl
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import capabilities, netns, user_namespaces
from corral.kernel.namespaces import Kind
from corral.oci.runtime import Container, ExecFailed, Stdio
from corral.oci.spec import Device, DeviceType, IdMapping, Mount, Namespace, Rlimit, User

pytestmark = needs("root", "overlayfs", "busybox", "userns")

FIRST = 300000
"""The host's id of the container's root."""
RANGE = (IdMapping(0, FIRST, 65536),)
OTHER_RANGE = (IdMapping(0, 2 * FIRST, 65536),)
OWN = (Kind.MOUNT, Kind.PID, Kind.IPC, Kind.UTS, Kind.CGROUP, Kind.NETWORK)


@pytest.fixture(autouse=True)
def _image_of_the_containers_root(lab):
    """The upper directory is theirs, so that they can make mount points and files."""
    for directory in (lab.upper, lab.plant):
        os.chown(directory, FIRST, FIRST)


def in_user_namespace(spec, *, path: str = "", **linux):
    """The same specification, with a user namespace, new or joined."""
    kinds = (*spec.linux.namespaces, Namespace(Kind.USER, path))
    mappings = {} if path else {"uid_mappings": RANGE, "gid_mappings": RANGE}
    return replace(spec, linux=replace(spec.linux, namespaces=kinds, **mappings | linux))


def run(lab, *args, user=None, options=None, linux=None, **changes):
    return lab.run_spec(in_user_namespace(lab.spec(*args, **changes), **(linux or {})), user=user, **(options or {}))


def with_namespaces(spec, **paths):
    """Namespaces by kind: joined by a path, or with None left out."""
    kept = []
    for each in spec.linux.namespaces:
        path = paths.get(each.type.value, "")
        if path is not None:
            kept.append(Namespace(each.type, path or each.path))
    return replace(spec, linux=replace(spec.linux, namespaces=tuple(kept)))


def owner_of(path: str) -> int:
    """The inode of the user namespace that a namespace belongs to. Source: ioctl_ns(2) NS_GET_USERNS."""
    fd = os.open(path, os.O_RDONLY)
    try:
        owner = fcntl.ioctl(fd, 0xB701)
        try:
            return os.fstat(owner).st_ino
        finally:
            os.close(owner)
    finally:
        os.close(fd)


def sleeping(lab, **options):
    container = lab.create(in_user_namespace(lab.spec("sleep", "60"), **options))
    container.start()
    return container


class TestNew:
    def test_root_inside_is_the_mapped_user_outside(self, lab):
        container = sleeping(lab)
        status = Path(f"/proc/{container.init.pid}/status").read_text()
        assert f"Uid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}\n" in status
        assert f"Gid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}\n" in status
        assert "\nGroups:\t \n" in status
        seen = lab.exec(container, "id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map").output.split()
        assert seen == ["0", "0", *("0", str(FIRST), "65536") * 2]

    def test_all_other_namespaces_belong_to_it(self, lab):
        pid = sleeping(lab).init.pid
        own = Path(f"/proc/{pid}/ns/user").stat().st_ino
        assert own != Path("/proc/self/ns/user").stat().st_ino
        assert {owner_of(f"/proc/{pid}/ns/{kind.file}") for kind in OWN} == {own}

    def test_a_user_of_the_image_is_mapped_too(self, lab):
        container = lab.create(in_user_namespace(lab.spec("sleep", "60")), user="bob")
        container.start()
        status = Path(f"/proc/{container.init.pid}/status").read_text()
        assert f"Uid:\t{FIRST + 1000}\t" in status
        assert f"Groups:\t{FIRST + 10} {FIRST + 1001} {FIRST + 2000} \n" in status
        assert lab.exec(container, "id -u; id -G", user="bob").output.split() == ["1000", "1001", "10", "2000"]

    def test_what_it_writes_is_the_mapped_users(self, lab):
        assert run(lab, "echo x > /file").code == 0
        status = (lab.upper / "file").stat()
        assert (status.st_uid, status.st_gid) == (FIRST, FIRST)

    def test_it_has_the_usual_mounts_and_network_and_name(self, lab):
        script = (
            "hostname; ip addr show lo | grep -c 127.0.0.1; stat -c %u:%g /dev /dev/pts /dev/shm /dev/mqueue; ls /dev"
        )
        seen = run(lab, script).output.split()
        assert seen[:6] == ["box", "1", *["0:0"] * 4]
        names = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
        assert seen[6:] == names.split()

    def test_paths_are_masked_and_read_only_as_without(self, lab):
        script = "cat /proc/timer_list; ls -A /sys/firmware; echo 1 > /proc/sys/kernel/shmmni; touch /sys/firmware/x"
        lines = run(lab, script).output.splitlines()
        assert len(lines) == 2, lines
        assert all("Read-only file system" in line or "ermission denied" in line for line in lines)

    def test_bundle_and_layers_may_be_closed_to_the_mapped_user(self, lab):
        (lab.directory / "bundle").chmod(0o700)
        lab.directory.chmod(0o700)
        assert run(lab, "echo fine").output == "fine\n"

    def test_a_bind_mount_is_opened_by_the_host(self, lab):
        source = lab.directory / "closed/source"
        source.mkdir(parents=True)
        (source / "file").write_text("seen")
        (lab.directory / "closed").chmod(0o700)
        mounts = [Mount("/data", "bind", str(source), ("rbind", "ro"))]
        assert run(lab, "cat /data/file; touch /data/x", mounts=mounts).output.startswith("seen")

    def test_pipes_given_for_stdio_can_be_opened_again(self, lab):
        seen = run(lab, "echo again > /dev/stdout; echo error > /dev/stderr", user="bob")
        assert seen.output.splitlines() == ["again", "error"]
        container = sleeping(lab)
        assert lab.exec(container, "echo again > /dev/stdout", user="bob").output == "again\n"

    def test_a_terminal_is_the_containers_users(self, lab):
        spec = in_user_namespace(lab.spec("stat -c %u:%g $(tty) /dev/console; tty; echo x > /dev/tty", terminal=True))
        container = lab.create(spec, user="bob", console_size=(80, 24))
        container.start()
        output = b""
        with contextlib.suppress(OSError):
            while part := os.read(container.init.console, 1000):
                output += part
        assert output.decode().split() == ["1000:5", "1000:5", "/dev/pts/0", "x"]

    def test_capabilities_are_those_asked_for_and_count_inside_only(self, lab):
        seen = run(lab, "grep -E 'Cap(Prm|Bnd|Inh|Amb)' /proc/self/status").output.split()
        assert seen[1::2] == ["0" * 16, "00000000a80425fb", "00000000a80425fb", "0" * 16]

    def test_hard_limits_are_those_asked_for(self, lab):
        seen = run(lab, "ulimit -Hn; ulimit -Sn", rlimits=(Rlimit("RLIMIT_NOFILE", 512, 1024),)).output
        assert seen.split() == ["1024", "512"]

    def test_nothing_of_the_host_is_left_open(self, lab):
        assert run(lab, "ls /proc/self/fd").output.split() == ["0", "1", "2", "3"]

    def test_the_guide_is_gone_and_reaped(self, lab):
        before = children()
        container = sleeping(lab)
        assert children() - before == {container.init.pid}

    def test_init_is_not_dumpable_while_it_waits(self, lab):
        container = lab.create(in_user_namespace(lab.spec("true")))
        assert Path(f"/proc/{container.init.pid}/exe").lstat().st_uid == 0
        assert Path(f"/proc/{container.init.pid}/status").stat().st_uid == 0

    def test_sysctls_of_its_namespaces_are_set(self, lab):
        linux = {"sysctl": {"net.ipv4.ip_unprivileged_port_start": "81", "kernel.shmmni": "77"}}
        script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni"
        assert run(lab, script, linux=linux).output.split() == ["81", "77"]

    def test_pipes_are_not_given_to_who_has_the_pid_of_an_init_that_was(self, lab):
        container, other = sleeping(lab), sleeping(lab, uid_mappings=OTHER_RANGE, gid_mappings=OTHER_RANGE)
        adopted = Container.adopt(container.spec, pid=container.init.pid, start_time=container.init.start_time)
        signal.pidfd_send_signal(container.init.pidfd, signal.SIGKILL)
        lab.wait(container.init)
        adopted.init.pid = other.init.pid  # as if it had been given out again
        reader, writer = os.pipe()
        with pytest.raises(ExecFailed, match="not running"):
            adopted.exec(lab.process("true"), stdio=Stdio(None, writer, writer))
        assert os.fstat(writer).st_uid == 0
        for fd in (reader, writer, adopted.init.pidfd):
            os.close(fd)


def children() -> set[int]:
    return {int(pid) for pid in Path("/proc/thread-self/children").read_text().split()}


class TestDevices:
    def test_default_nodes_are_the_hosts_and_work(self, lab):
        script = "stat -c %t:%T /dev/null /dev/zero; echo x > /dev/null; head -c 4 /dev/zero | wc -c"
        assert run(lab, script).output.split() == ["1:3", "1:5", "4"]

    def test_one_of_the_specification_is_bound_wherever_the_host_has_it(self, lab):
        device = Device("/dev/deep/full", DeviceType.CHAR, 1, 7)
        linux = {"devices": (Device("/dev/full", DeviceType.CHAR, 1, 7), Device("/dev/pipe", DeviceType.FIFO))}
        seen = run(lab, "stat -c %t:%T /dev/full; [ -p /dev/pipe ] && echo pipe", linux=linux).output
        assert seen.split() == ["1:7", "pipe"]
        if Path("/dev/char/1:7").exists():
            assert run(lab, "stat -c %t:%T /dev/deep/full", linux={"devices": (device,)}).output == "1:7\n"

    def test_one_that_the_host_has_not_is_refused_by_name(self, lab):
        device = Device("/dev/nothing", DeviceType.CHAR, 250, 77)
        with pytest.raises(ExecFailed, match="device /dev/nothing"):
            run(lab, "true", linux={"devices": (device,)})

    def test_a_name_of_the_host_is_not_enough(self, lab):
        """config.json says which device: another one that is called so on the host is not given."""
        with pytest.raises(ExecFailed, match="device /dev/kmsg"):
            run(lab, "true", linux={"devices": (Device("/dev/kmsg", DeviceType.CHAR, 250, 77),)})

    def test_no_node_can_be_made(self, lab):
        assert "Operation not permitted" in run(lab, "mknod /dev/mem c 1 1").output


@pytest.fixture
def cgroup():
    """A cgroup of v2."""
    roots = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
    root = next((path for path in roots if (path / "cgroup.procs").exists()), None)
    if root is None:
        pytest.skip("needs cgroup v2")
    path = root / f"corral-test-{os.getpid()}"
    path.mkdir()
    yield path
    for attempt in range(100):
        try:
            path.rmdir()
            break
        except OSError:
            time.sleep(0.02 * bool(attempt < 99))


class TestCgroup:
    def owners(self, lab, cgroup: Path, *options: str, user: User | None = None) -> tuple[int, int, int]:
        """Of the directory, of what moves processes, and of what tells events."""
        spec = in_user_namespace(lab.spec("sleep", "60", user=user or User()))
        mounts = tuple(replace(m, options=options) if m.type == "cgroup" else m for m in spec.mounts)
        container = lab.create(replace(spec, mounts=mounts), cgroup_paths=[cgroup])
        owners = tuple((cgroup / name).stat().st_uid for name in ("", "cgroup.procs", "cgroup.events"))
        container.close()
        lab.wait(container.init)
        return owners

    def test_mounted_for_writing_is_the_processs_users(self, lab, cgroup):
        assert self.owners(lab, cgroup, "rw", user=User(uid=7)) == (FIRST + 7, FIRST + 7, 0)

    def test_mounted_read_only_stays_the_hosts(self, lab, cgroup):
        assert self.owners(lab, cgroup, "ro") == (0, 0, 0)


class TestConfinement:
    """The container's root is nobody on the host, whatever capabilities it has inside."""

    def test_a_file_of_the_hosts_root_can_not_be_touched(self, lab):
        source = lab.directory / "data"
        source.mkdir()
        (source / "secret").write_text("x")
        (source / "secret").chmod(0o600)
        script = (
            "id -u; cat /data/secret; chown 0 /data/secret; chmod 666 /data/secret; touch /data/new; stat -c %u /data"
        )
        output = run(lab, script, mounts=[Mount("/data", "bind", str(source), ("rbind",))]).output
        assert output.startswith("0\n")
        assert output.endswith("65534\n")
        assert output.count("ermission denied") + output.count("not permitted") == 4
        assert [entry.name for entry in source.iterdir()] == ["secret"]

    def test_a_setuid_file_makes_nobody_the_hosts_root(self, lab):
        source = lab.directory / "data"
        source.mkdir()
        program = source / "sh"
        program.write_bytes((lab.busybox / "bin/busybox").read_bytes())
        program.chmod(0o4755)
        mounts = [Mount("/data", "bind", str(source), ("rbind",))]
        output = run(lab, "/data/sh -c 'id -u'", user="bob", mounts=mounts, no_new_privileges=False).output
        assert output == "1000\n"

    def test_kernel_parameters_of_the_host_can_not_be_written(self, lab):
        linux = {"readonly_paths": (), "masked_paths": ()}
        for name in ("kernel/core_pattern", "vm/swappiness", "kernel/panic"):
            before = Path("/proc/sys", name).read_text()
            assert "ermission denied" in run(lab, f"echo /evil > /proc/sys/{name}", linux=linux).output
            assert Path("/proc/sys", name).read_text() == before

    def test_with_every_capability_it_is_still_nobody_outside(self, lab):
        spec = in_user_namespace(lab.spec("mount -t tmpfs x /tmp && echo mounted; dmesg | head -1; date -s 2000-01-01"))
        everything = tuple(f"CAP_{name}" for name in capabilities.NAMES)
        held = replace(spec.process.capabilities, bounding=everything, effective=everything, permitted=everything)
        spec = replace(spec, process=replace(spec.process, capabilities=held), linux=replace(spec.linux, seccomp=None))
        output = lab.run_spec(spec).output
        assert "mounted" in output
        assert "can't set date" in output

    def test_a_read_only_root_stays_so(self, lab):
        spec = in_user_namespace(lab.spec("touch /x"))
        rootfs = [replace(lab.rootfs()[0], options=(*lab.rootfs()[0].options, "ro"))]
        assert "Read-only file system" in lab.run_spec(spec, rootfs=rootfs).output


class TestJoined:
    def test_one_by_path_is_entered_first_and_the_others_belong_to_it(self, lab):
        first = sleeping(lab)
        path = f"/proc/{first.init.pid}/ns/user"
        second = lab.create(in_user_namespace(lab.spec("sleep", "60"), path=path), rootfs=second_root(lab))
        second.start()
        assert Path(f"/proc/{second.init.pid}/ns/user").stat().st_ino == Path(path).stat().st_ino
        for kind in OWN:
            assert owner_of(f"/proc/{second.init.pid}/ns/{kind.file}") == Path(path).stat().st_ino
            assert (
                Path(f"/proc/{second.init.pid}/ns/{kind.file}").readlink()
                != Path(f"/proc/{first.init.pid}/ns/{kind.file}").readlink()
            )
        assert lab.exec(second, "id -u; echo again > /dev/stdout").output.split() == ["0", "again"]

    @pytest.mark.parametrize("kind", [Kind.IPC, Kind.UTS, Kind.NETWORK, Kind.PID, Kind.CGROUP])
    def test_with_another_that_belongs_to_it(self, lab, kind):
        """As the containers of a pod."""
        first = sleeping(lab)
        directory = f"/proc/{first.init.pid}/ns"
        spec = in_user_namespace(lab.spec("sleep", "60", hostname=""), path=f"{directory}/user")
        spec = with_namespaces(spec, **{kind.value: f"{directory}/{kind.file}"})
        second = lab.create(spec, rootfs=second_root(lab))
        second.start()
        ours, theirs = (Path(f"/proc/{c.init.pid}/ns/{kind.file}").readlink() for c in (second, first))
        assert ours == theirs
        assert lab.exec(second, "id -u").output == "0\n"

    def test_mappings_that_are_not_its_own_are_refused(self, lab):
        path = f"/proc/{sleeping(lab).init.pid}/ns/user"
        other = (IdMapping(0, FIRST + 1, 65536),)
        with pytest.raises(ValueError, match=r"linux\.uidMappings: the user namespace that is joined has others"):
            lab.create(
                in_user_namespace(lab.spec("true"), path=path, uid_mappings=other, gid_mappings=RANGE),
                rootfs=second_root(lab),
            )

    def test_mappings_that_are_its_own_are_taken(self, lab):
        path = f"/proc/{sleeping(lab).init.pid}/ns/user"
        spec = in_user_namespace(lab.spec("echo fine"), path=path, uid_mappings=RANGE, gid_mappings=RANGE)
        assert lab.run_spec(spec, rootfs=second_root(lab)).output == "fine\n"

    def test_a_network_of_the_hosts_is_joined_before(self, lab):
        path = lab.directory / "netns"
        netns.create_pinned(path)
        try:
            spec = with_namespaces(in_user_namespace(lab.spec("readlink /proc/self/ns/net")), network=str(path))
            assert lab.run_spec(spec).output == f"net:[{path.stat().st_ino}]\n"
        finally:
            netns.remove_pinned(path)


def second_root(lab) -> list[Mount]:
    """An overlay of its own: two may not share an upper directory."""
    for name in ("upper2", "work2"):
        (lab.directory / name).mkdir()
        os.chown(lab.directory / name, FIRST, FIRST)
    options = (f"lowerdir={lab.busybox}", f"upperdir={lab.directory}/upper2", f"workdir={lab.directory}/work2")
    return [Mount(type="overlay", source="overlay", options=options)]


PORT_START = "net/ipv4/ip_unprivileged_port_start"


def rebound(mount: Mount, place: str) -> Mount:
    """The host's, where it would be a new one."""
    return Mount(place, "bind", place, ("rbind",)) if mount.destination == place else mount


class TestSharedWithTheHost:
    """What shows a namespace that belongs to the host can't be mounted anew: the host's is bound."""

    def test_network_sys_is_the_hosts_and_read_only(self, lab):
        spec = with_namespaces(
            in_user_namespace(lab.spec("ls /sys/class/net; touch /sys/x /sys/kernel/x")), network=None
        )
        lines = lab.run_spec(spec).output.split("\n")
        assert {entry.name for entry in Path("/sys/class/net").iterdir()} <= set(lines)
        assert sum("Read-only file system" in line for line in lines) == 2

    def test_nothing_below_the_hosts_sys_is_writable(self, lab):
        spec = with_namespaces(in_user_namespace(lab.spec("cat", "/proc/self/mountinfo")), network=None)
        below = [line.split() for line in lab.run_spec(spec).output.splitlines() if line.split()[4].startswith("/sys")]
        assert below
        assert all("ro" in fields[5].split(",") for fields in below)

    def test_processes_proc_is_the_hosts_and_masked(self, lab):
        spec = with_namespaces(in_user_namespace(lab.spec("readlink /proc/self; cat /proc/timer_list")), pid=None)
        output = lab.run_spec(spec).output
        assert int(output) > 1

    def test_processes_kernel_parameters_of_its_own_namespaces_are_set(self, lab):
        linux = {"sysctl": {"net.ipv4.ip_unprivileged_port_start": "81"}}
        script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; echo 1 > /proc/sys/net/ipv4/ip_forward"
        output = lab.run_spec(with_namespaces(in_user_namespace(lab.spec(script), **linux), pid=None)).output
        assert output.startswith("81\n")
        assert "Read-only file system" in output

    def test_processes_the_same_where_proc_is_a_bind_mount(self, lab):
        """As podman has it; what else lies there is not written to."""
        linux = {"sysctl": {"net.ipv4.ip_unprivileged_port_start": "81"}}
        spec = with_namespaces(in_user_namespace(lab.spec("cat", f"/proc/sys/{PORT_START}"), **linux), pid=None)
        bound = replace(spec, mounts=tuple(rebound(m, "/proc") for m in spec.mounts))
        assert lab.run_spec(bound).output == "81\n"
        none = replace(spec, mounts=tuple(m for m in spec.mounts if m.destination != "/proc"))
        with pytest.raises(ExecFailed, match="not a procfs"):
            lab.create(none, rootfs=second_root(lab))

    def test_processes_with_hidepid_is_refused(self, lab):
        spec = with_namespaces(in_user_namespace(lab.spec("true")), pid=None)
        mounts = tuple(replace(m, options=(*m.options, "hidepid=2")) if m.type == "proc" else m for m in spec.mounts)
        with pytest.raises(ExecFailed, match="hidepid"):
            lab.create(replace(spec, mounts=mounts))

    def test_ipc_queues_are_the_hosts_or_refused(self, lab):
        spec = with_namespaces(in_user_namespace(lab.spec("stat -f -c %T /dev/mqueue")), ipc=None)
        if Path("/dev/mqueue").exists():
            assert lab.run_spec(spec).code == 0
        else:
            with pytest.raises(OSError, match="mqueue"):
                lab.create(spec)


class TestRefused:
    def refuse(self, lab, match: str, **changes):
        with pytest.raises(ValueError, match=match):
            lab.create(in_user_namespace(lab.spec("true"), **changes))

    def test_ids_that_are_not_mapped(self, lab):
        spec = in_user_namespace(lab.spec("true", user=User(uid=70000)))
        with pytest.raises(ValueError, match=r"^process\.user\.uid: 70000 is not mapped"):
            lab.create(spec)
        spec = in_user_namespace(lab.spec("true", user=User(additional_gids=(1, 99999))))
        with pytest.raises(ValueError, match=r"^process\.user\.additionalGids\[1\]: 99999"):
            lab.create(spec)
        small = (IdMapping(0, FIRST, 1),)
        self.refuse(lab, r"^mounts\[2\]\.options: gid=5: 5 is not mapped", gid_mappings=small)

    def test_mappings_without_a_user_namespace(self, lab):
        with pytest.raises(ValueError, match=r"^linux\.uidMappings: the container has no user namespace"):
            lab.create(lab.spec("true", linux={"uid_mappings": RANGE}))

    def test_a_path_that_is_another_namespace(self, lab):
        with pytest.raises(OSError, match="setns"):
            lab.create(in_user_namespace(lab.spec("true"), path="/proc/self/ns/net"))

    def test_nothing_is_left_of_a_container_that_failed(self, lab):
        before = children()
        for changes in ({"linux": {"devices": (Device("/dev/n", DeviceType.CHAR, 250, 77),)}}, {"cwd": "/etc/passwd"}):
            linux = changes.pop("linux", {})
            with pytest.raises(ExecFailed):
                lab.create(in_user_namespace(lab.spec("true", **changes), **linux))
        assert children() == before


class TestMappings:
    def test_are_written_and_read(self):
        uids, gids = [(0, 100000, 10), (10, 200000, 5)], [(0, 300000, 65536)]
        fd = user_namespaces.new_uninhabited(uids, gids)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setns(fd, Kind.USER.flag)
            os.write(writer, b"x")
            time.sleep(60)
        try:
            os.read(reader, 1)
            assert user_namespaces.read_mappings(pid) == (uids, gids)
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            for each in (fd, reader, writer):
                os.close(each)

    def test_the_id_outside(self):
        ranges = [(0, 100000, 10), (10, 200000, 5)]
        assert [user_namespaces.to_outside(ranges, n) for n in (0, 9, 10, 14, 15)] == [
            *(100000, 100009, 200000, 200004),
            None,
        ]

    def test_too_many_ranges_for_the_kernel_are_an_error(self):
        with pytest.raises(OSError, match="too many ranges"):
            user_namespaces.new_uninhabited([(i, 1000000 + i * 2, 1) for i in range(0, 800, 2)], [(0, 1, 1)])
