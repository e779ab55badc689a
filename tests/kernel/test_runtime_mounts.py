"""The root of a container and what is mounted in it, seen from inside and from the host."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import mount as kernel_mount
from corral.oci.runtime import SETUP, ExecFailed
from corral.oci.spec import Device, DeviceType, Mount, Root

pytestmark = needs("root", "overlayfs", "busybox")


def mounts_of(output: str) -> dict[str, tuple[str, set[str]]]:
    """The output of `cat /proc/mounts`: type and options by mount point."""
    table = {}
    for line in output.splitlines():
        _, place, kind, options, *_ = line.split()
        table[place] = kind, set(options.split(","))
    return table


@pytest.fixture
def table(lab):
    return mounts_of(lab.run("cat", "/proc/mounts").output)


class TestDefaultMounts:
    def test_are_all_there_and_nothing_else(self, table):
        expected = {
            "/": "overlay",
            "/proc": "proc",
            "/dev": "tmpfs",
            "/dev/pts": "devpts",
            "/dev/shm": "tmpfs",
            "/dev/mqueue": "mqueue",
            "/sys": "sysfs",
        }
        for place, kind in expected.items():
            assert table[place][0] == kind
        rest = set(table) - set(expected)
        assert all(place.startswith(("/proc/", "/sys/")) for place in rest)

    def test_have_the_flags_asked_for(self, table):
        assert {"nosuid", "noexec", "nodev", "rw"} <= table["/proc"][1]
        assert {"nosuid", "noexec", "nodev", "ro"} <= table["/sys"][1]
        assert {"nosuid", "mode=755"} <= table["/dev"][1]
        assert {"gid=5", "mode=620", "ptmxmode=666", "noexec"} <= table["/dev/pts"][1]

    def test_masked_paths_are_empty_and_read_only(self, lab):
        present = [p for p in ("/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/acpi") if Path(p).exists()]
        script = "; ".join(f"[ -d {p} ] && ls -A {p} || cat {p}" for p in present)
        assert lab.run(script).output == ""
        script = "; ".join(f"[ -d {p} ] && touch {p}/x" for p in present)
        for line in lab.run(script).output.splitlines():
            assert "Read-only file system" in line

    def test_read_only_paths_cannot_be_written(self, lab):
        for path in filter(os.path.exists, ("/proc/sys/kernel/hostname", "/proc/sysrq-trigger")):
            assert "Read-only file system" in lab.run(f"echo x > {path}").output

    def test_read_only_paths_are_so_with_all_that_is_mounted_below(self, lab):
        mounts = [Mount("/data", "tmpfs", "tmpfs", ()), Mount("/data/below", "tmpfs", "below", ())]
        script = "grep /data/below /proc/mounts; touch /data/below/x"
        output = lab.run(script, mounts=mounts, linux={"readonly_paths": ("/data",)}).output
        assert "below /data/below tmpfs ro," in output
        assert "Read-only file system" in output

    def test_nothing_propagates(self, lab):
        lines = lab.run("cat", "/proc/self/mountinfo").output.splitlines()
        assert not [line for line in lines if "shared:" in line.split(" - ")[0] or "master:" in line.split(" - ")[0]]

    def test_the_old_root_is_gone(self, lab, table):
        assert str(lab.directory) not in " ".join(table)


class TestDev:
    def test_holds_exactly_the_default_nodes(self, lab):
        names = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
        assert lab.run("ls /dev").output.split() == names.split()

    def test_nodes_work(self, lab):
        assert (
            lab.run("head -c 4 /dev/zero | od -An -tx1; echo x > /dev/null; echo x > /dev/full").output.split()[:4]
            == ["00"] * 4
        )

    def test_nodes_are_open_to_all(self, lab):
        assert lab.run("stat -c %a:%u:%g:%t:%T /dev/null /dev/urandom", user="bob").output.split() == [
            "666:0:0:1:3",
            "666:0:0:1:9",
        ]

    def test_a_device_of_the_specification_is_made(self, lab):
        device = Device("/dev/deep/loop7", DeviceType.BLOCK, 7, 7, file_mode=0o640, uid=3, gid=4)
        seen = lab.run("stat -c %F:%a:%u:%g:%t:%T /dev/deep/loop7", linux={"devices": (device,)}).output
        assert seen.strip() == "block special file:640:3:4:7:7"

    def test_may_be_read_only(self, lab):
        """Nodes and mount points are made in it first."""
        spec = lab.spec("touch /dev/x; ls /dev/null /dev/shm/ && echo x > /dev/null && touch /dev/shm/x && echo fine")
        mounts = [replace(m, options=(*m.options, "ro")) if m.destination == "/dev" else m for m in spec.mounts]
        seen = lab.run_spec(replace(spec, mounts=tuple(mounts))).output
        assert "Read-only file system" in seen
        assert seen.endswith("fine\n")

    def test_may_be_the_images_own(self, lab):
        spec = lab.spec("stat -c %F /dev/null; stat -f -c %T /dev")
        mounts = tuple(m for m in spec.mounts if not m.destination.startswith("/dev"))
        assert lab.run_spec(replace(spec, mounts=mounts)).output.splitlines()[0] == "character special file"

    def test_of_the_host_is_left_as_it_is(self, lab):
        directory = lab.directory / "hostdev"
        directory.mkdir()
        (directory / "null").write_text("")
        spec = lab.spec("true", mounts=[Mount("/dev", "bind", str(directory), ("rbind",))])
        mounts = tuple(m for m in spec.mounts if m.type == "bind" or not m.destination.startswith("/dev"))
        with pytest.raises(ExecFailed, match="not the null device"):
            lab.run_spec(replace(spec, mounts=mounts, process=replace(spec.process, args=("true",))))
        assert [entry.name for entry in directory.iterdir()] == ["null"]

    def test_the_hosts_devices_are_not_seen(self, lab):
        assert lab.run("ls /dev/vda /dev/kmsg /dev/mem 2>&1 | grep -vc 'No such file'").output == "0\n"


class TestRoot:
    def test_takes_any_number_of_long_layers(self, lab):
        """More than a page of options, and paths longer than what fsconfig takes at once."""
        layers = []
        for i in range(120):
            layer = lab.directory / ("x" * 100) / ("y" * 100) / ("z" * 80) / f"layer:{i}"
            layer.mkdir(parents=True)
            (layer / f"file{i}").touch()
            layers.append(str(layer).replace(":", "\\:"))
        (root,) = lab.rootfs()
        options = (f"lowerdir={':'.join([*layers, str(lab.busybox)])}", *root.options[1:])
        result = lab.run("ls / | grep -c file", options={"rootfs": [replace(root, options=options)]})
        assert result.output == "120\n"

    def test_changes_land_in_the_upper_directory(self, lab):
        lab.run("echo x > /new; rm /etc/group")
        assert (lab.upper / "new").read_text() == "x\n"
        assert (lab.upper / "etc/group").is_char_device()
        assert not (lab.busybox / "new").exists()

    def test_may_be_a_directory_of_the_host(self, lab):
        root = [Mount(type="bind", source=str(lab.busybox), options=("rbind", "ro"))]
        result = lab.run("touch /x; hostname", options={"rootfs": root})
        assert "Read-only file system" in result.output
        assert result.output.endswith("box\n")

    def test_may_be_named_by_the_specification(self, lab):
        spec = lab.spec("echo", "hi", root=Root(str(lab.busybox), readonly=True))
        assert lab.run_spec(spec, rootfs=[]).output == "hi\n"

    def test_read_only_leaves_its_mounts_writable(self, lab):
        result = lab.run("touch /x; touch /tmp/x; touch /dev/shm/x && echo shm", root=Root("", readonly=True))
        assert result.output.count("Read-only file system") == 2
        assert "shm" in result.output

    def test_that_is_missing_is_named(self, lab):
        root = [Mount(type="bind", source="/nowhere/at/all", options=("rbind",))]
        with pytest.raises(ExecFailed, match="/nowhere/at/all does not exist"):
            lab.run("true", options={"rootfs": root})

    def test_with_a_bad_layer_gives_the_kernels_reason(self, lab):
        root = [Mount(type="overlay", source="overlay", options=("lowerdir=/nowhere/at/all",))]
        with pytest.raises(OSError, match="overlay") as failed:
            lab.run("true", options={"rootfs": root})
        assert "lowerdir" in str(failed.value)


class TestOverlays:
    def test_its_directories_may_lie_in_the_bundle(self, lab):
        """Over which the root is put. podman has them there."""
        bundle = lab.directory / "bundle"
        for name in ("lower", "upper", "work"):
            (bundle / name).mkdir(parents=True)
        (bundle / "lower/file").write_text("below\n")
        options = (f"lowerdir={bundle}/lower", f"upperdir={bundle}/upper", f"workdir={bundle}/work")
        mounts = [Mount(destination="/data", type="overlay", source="overlay", options=options)]
        assert lab.run("cat /data/file; touch /data/made", mounts=mounts).output == "below\n"
        assert (bundle / "upper/made").exists()


class TestBindMounts:
    @pytest.fixture
    def source(self, lab) -> Path:
        source = lab.directory / "source"
        (source / "below").mkdir(parents=True)
        (source / "file").write_text("host\n")
        return source

    def test_a_directory_is_the_hosts(self, lab, source):
        lab.run("cp /data/file /data/copy", mounts=[Mount("/data", "bind", str(source), ("rbind",))])
        assert (source / "copy").read_text() == "host\n"

    def test_a_file_is_put_over_a_file(self, lab, source):
        bind = Mount("/etc/motd/../hello", "bind", str(source / "file"), ("bind", "ro"))
        result = lab.run("cat /etc/hello; echo x > /etc/hello", mounts=[bind])
        assert result.output.startswith("host\n")
        assert "Read-only file system" in result.output

    def test_read_only_is_of_this_mount_alone(self, lab, source):
        bind = Mount("/data", "bind", str(source), ("rbind", "ro"))
        assert "Read-only file system" in lab.run("touch /data/x", mounts=[bind]).output
        (source / "still-writable").touch()

    def test_recursively_read_only_covers_what_is_mounted_below(self, lab, source):
        kernel_mount.mount("tmpfs", source / "below", "tmpfs", 0, "size=1m")
        try:
            for option, expected in (("ro", 0), ("rro", 1)):
                bind = Mount("/data", "bind", str(source), ("rbind", option))
                assert lab.run("touch /data/below/x", mounts=[bind]).code == expected
        finally:
            kernel_mount.umount(source / "below")

    def test_plain_bind_leaves_out_what_is_mounted_below(self, lab, source):
        (source / "below/plain").touch()
        kernel_mount.mount("tmpfs", source / "below", "tmpfs", 0, "size=1m")
        try:
            assert (
                lab.run("ls /data/below", mounts=[Mount("/data", "bind", str(source), ("bind",))]).output == "plain\n"
            )
            assert lab.run("ls /data/below", mounts=[Mount("/data", "bind", str(source), ("rbind",))]).output == ""
        finally:
            kernel_mount.umount(source / "below")

    def test_flags_of_the_source_are_kept(self, lab, source):
        kernel_mount.mount("tmpfs", source / "below", "tmpfs", 2 | 8, "size=1m")  # nosuid, noexec
        try:
            seen = lab.run("cat", "/proc/mounts", mounts=[Mount("/data", "bind", str(source / "below"), ("bind",))])
            assert {"nosuid", "noexec"} <= mounts_of(seen.output)["/data"][1]
        finally:
            kernel_mount.umount(source / "below")

    def test_a_missing_source_is_named(self, lab):
        with pytest.raises(ExecFailed, match=r"mount /data: the source .*/gone does not exist") as failed:
            lab.run("true", mounts=[Mount("/data", "bind", str(lab.directory / "gone"), ("rbind",))])
        assert failed.value.kind == SETUP

    def test_a_directory_does_not_go_on_a_file(self, lab, source):
        with pytest.raises(ExecFailed, match="mount /etc/passwd: it is no directory"):
            lab.run("true", mounts=[Mount("/etc/passwd", "bind", str(source), ("rbind",))])

    def test_a_file_does_not_go_on_a_directory(self, lab, source):
        with pytest.raises(ExecFailed, match="mount /etc: it is a directory in the image"):
            lab.run("true", mounts=[Mount("/etc", "bind", str(source / "file"), ("bind",))])

    def test_a_relative_source_lies_in_the_bundle(self, lab):
        (lab.directory / "bundle/resolv.conf").write_text("nameserver 1.2.3.4\n")
        seen = lab.run("cat /etc/resolv.conf", mounts=[Mount("/etc/resolv.conf", "bind", "resolv.conf", ("bind",))])
        assert seen.output == "nameserver 1.2.3.4\n"

    def test_the_hosts_own_devices_can_be_bound(self, lab):
        seen = lab.run("ls /dev/vda /dev/null", mounts=[Mount("/dev", "bind", "/dev", ("rbind",))])
        assert "/dev/null" in seen.output


class TestPropagation:
    @pytest.fixture
    def shared(self, lab):
        """A shared mount of the host, to be bound."""
        place = lab.directory / "shared"
        place.mkdir()
        kernel_mount.mount("tmpfs", place, "tmpfs", 0, "size=1m")
        kernel_mount.set_propagation(place, kernel_mount.MS_SHARED, recursive=False)
        (place / "point").mkdir()
        yield place
        kernel_mount.umount(place / "point", kernel_mount.MNT_DETACH) if os.path.ismount(place / "point") else None
        kernel_mount.umount(place, kernel_mount.MNT_DETACH)

    @pytest.mark.parametrize(("option", "seen"), [("rprivate", False), ("rslave", True), ("rshared", True)])
    def test_of_a_bind_mount_is_as_asked(self, lab, shared, option, seen):
        bind = Mount("/data", "bind", str(shared), ("rbind", option))
        container = lab.create(lab.spec("sleep", "60", mounts=[bind]))
        container.start()
        kernel_mount.mount("tmpfs", shared / "point", "tmpfs", 0, "size=1m")
        table = mounts_of(lab.exec(container, "cat", "/proc/mounts").output)
        assert ("/data/point" in table) is seen

    def test_of_the_root_is_as_asked(self, lab):
        spec = lab.spec("cat", "/proc/self/mountinfo", linux={"rootfs_propagation": "shared"})
        root = next(line for line in lab.run_spec(spec).output.splitlines() if line.split()[4] == "/")
        assert "shared:" in root


class TestTmpfs:
    def test_has_the_options_asked_for(self, lab):
        tmpfs = Mount("/scratch", "tmpfs", "tmpfs", ("nosuid", "noexec", "size=1m", "mode=1770", "uid=1000"))
        result = lab.run(
            "cat /proc/mounts; stat -c %a:%u /scratch; dd if=/dev/zero of=/scratch/x bs=1M count=2", mounts=[tmpfs]
        )
        kind, options = mounts_of("\n".join(line for line in result.output.splitlines() if line.count(" ") == 5))[
            "/scratch"
        ]
        assert kind == "tmpfs"
        assert {"nosuid", "noexec", "size=1024k"} <= options
        assert "1770:1000" in result.output
        assert "No space left" in result.output

    def test_looks_like_the_directory_it_covers(self, lab):
        tmpfs = Mount("/tmp", "tmpfs", "tmpfs", ("size=1m",))
        assert lab.run("stat -c %a /tmp", mounts=[tmpfs]).output == "1777\n"

    def test_an_unknown_option_is_refused_with_the_kernels_reason(self, lab):
        with pytest.raises(OSError, match="nonsense"):
            lab.run("true", mounts=[Mount("/scratch", "tmpfs", "tmpfs", ("nonsense",))])


class TestSysctl:
    def test_of_the_containers_namespaces_is_written(self, lab):
        wanted = {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "net/ipv4/conf/lo/forwarding": "0"}
        seen = lab.run("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced", linux={"sysctl": wanted})
        assert seen.output == "1\n1\n"

    def test_of_the_host_is_refused(self, lab):
        before = Path("/proc/sys/kernel/core_pattern").read_text()
        with pytest.raises(ValueError, match=r"kernel\.core_pattern: it belongs to the host"):
            lab.run("true", linux={"sysctl": {"kernel.core_pattern": "|/bin/evil"}})
        assert Path("/proc/sys/kernel/core_pattern").read_text() == before

    def test_that_does_not_exist_is_named(self, lab):
        with pytest.raises(ExecFailed, match="net/nonsense"):
            lab.run("true", linux={"sysctl": {"net.nonsense": "1"}})


def test_mountinfo_has_them_in_the_order_of_the_specification(lab, tmp_path):
    names = ("/a", "/b", "/c")
    mounts = (
        Mount("/a", "bind", str(tmp_path), ("bind", "mode=755")),
        Mount("/b", "tmpfs", "tmpfs"),
        Mount("/c", "bind", str(tmp_path), ("rbind", "rshared")),
    )
    seen = lab.run("cat", "/proc/self/mountinfo", mounts=mounts).output
    places = [line.split()[4] for line in seen.splitlines()]
    assert [place for place in places if place in names] == list(names)
