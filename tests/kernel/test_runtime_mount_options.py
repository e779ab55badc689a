"""Options of mounts: what the kernel makes of them, seen from inside; id-mapped mounts; propagation."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import mount as kernel_mount
from corral.kernel.mount import MS_SHARED
from corral.kernel.namespaces import Kind
from corral.oci.runtime import ExecFailed
from corral.oci.spec import IdMapping, Mount, Namespace, Root

pytestmark = needs("root", "overlayfs", "busybox")


def options_of(output: str) -> dict[str, set[str]]:
    """The output of `cat /proc/self/mountinfo`: options, of the mount and of its file system, by mount point."""
    table = {}
    for line in output.splitlines():
        before, _, after = line.partition(" - ")
        table[before.split()[4]] = {*before.split()[5].split(","), *after.split()[2].split(","), *before.split()[6:]}
    return table


def seen(lab, mount: Mount, **changes) -> dict[str, set[str]]:
    return options_of(lab.run("cat", "/proc/self/mountinfo", mounts=[mount], **changes).output)


@pytest.fixture
def source(lab) -> Path:
    directory = lab.directory / "source"
    (directory / "sub").mkdir(parents=True)
    (directory / "file").write_text("x")
    return directory


@pytest.fixture
def nested(source: Path) -> Iterator[Path]:
    """A source with a tmpfs mounted below it, on the host."""
    kernel_mount.mount("tmpfs", source / "sub", "tmpfs", 0)
    yield source
    kernel_mount.umount(source / "sub", kernel_mount.MNT_DETACH)


class TestAttributes:
    @pytest.mark.parametrize("option", ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow"])
    def test_of_a_bind_mount_are_set(self, lab, source, option):
        assert option in seen(lab, Mount("/data", "bind", str(source), ("bind", option)))["/data"]

    @pytest.mark.parametrize("option", ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow"])
    def test_recursive_ones_reach_what_is_mounted_below(self, lab, nested, option):
        table = seen(lab, Mount("/data", "bind", str(nested), ("rbind", f"r{option}")))
        assert option in table["/data"]
        assert option in table["/data/sub"]

    @pytest.mark.parametrize("option", ["ro", "nosuid", "nodev", "noexec"])
    def test_others_do_not(self, lab, nested, option):
        table = seen(lab, Mount("/data", "bind", str(nested), ("rbind", option)))
        assert option in table["/data"]
        assert option not in table["/data/sub"]

    def test_can_be_cleared(self, lab, nested):
        kernel_mount.mount(None, nested / "sub", None, 0x1020 | 1 | 2 | 4)  # bind remount ro nosuid nodev
        table = seen(lab, Mount("/data", "bind", str(nested), ("rbind", "rrw", "rsuid", "rdev")))
        assert not {"ro", "nosuid", "nodev"} & table["/data/sub"]

    def test_strictatime_and_relatime_replace_one_another(self, lab, source):
        assert "relatime" not in seen(lab, Mount("/d", "bind", str(source), ("bind", "strictatime")))["/d"]
        assert "relatime" in seen(lab, Mount("/d", "bind", str(source), ("bind", "noatime", "relatime")))["/d"]

    def test_links_are_not_followed_where_that_was_asked_for(self, lab, source):
        (source / "link").symlink_to("file")
        result = lab.run("cat /data/link", mounts=[Mount("/data", "bind", str(source), ("bind", "nosymfollow"))])
        assert "Too many levels of symbolic links" in result.output


class TestNewFileSystems:
    def test_sync_dirsync_and_lazytime_are_flags_of_the_file_system(self, lab):
        table = seen(lab, Mount("/data", "tmpfs", "tmpfs", ("sync", "dirsync", "lazytime", "size=64k")))
        assert {"sync", "dirsync", "lazytime", "size=64k"} <= table["/data"]

    def test_the_later_of_two_opposites_wins(self, lab):
        table = seen(lab, Mount("/data", "tmpfs", "tmpfs", ("sync", "async", "lazytime", "nolazytime")))
        assert not {"sync", "lazytime"} & table["/data"]

    def test_mean_nothing_to_a_bind_mount(self, lab, source):
        table = seen(
            lab, Mount("/data", "bind", str(source), ("bind", "sync", "lazytime", "iversion", "mand", "silent"))
        )
        assert "sync" not in table["/data"]

    def test_mode_owner_and_size_of_a_tmpfs(self, lab):
        options = ("mode=1770", "uid=3", "gid=4", "size=8k", "nr_inodes=10")
        script = "stat -c %a:%u:%g /data; head -c 100000 /dev/zero > /data/x 2>/dev/null; wc -c < /data/x"
        result = lab.run(script, mounts=[Mount("/data", "tmpfs", "tmpfs", options)])
        assert result.output.split() == ["1770:3:4", "8192"]

    def test_data_that_the_file_system_does_not_know_is_an_error_that_names_it(self, lab):
        with pytest.raises(OSError, match="nonsense"):
            lab.create(lab.spec("true", mounts=[Mount("/data", "tmpfs", "tmpfs", ("nonsense=1",))]))

    def test_an_unknown_type_is_an_error_that_names_it(self, lab):
        with pytest.raises(OSError, match="nonsensefs"):
            lab.create(lab.spec("true", mounts=[Mount("/data", "nonsensefs", "none")]))


class TestCopyUp:
    @pytest.fixture
    def image(self, lab) -> Path:
        directory = lab.plant / "data"
        (directory / "deep/er").mkdir(parents=True)
        (directory / "deep/er/file").write_text("content")
        (directory / "deep/er/file").chmod(0o4711)
        os.chown(directory / "deep", 1000, 1001)
        (directory / "link").symlink_to("deep/er/file")
        (directory / "outside").symlink_to("/etc/shadow")
        os.mkfifo(directory / "pipe", 0o640)
        os.mknod(directory / "device", 0o20666, os.makedev(1, 3))
        directory.chmod(0o751)
        return directory

    MOUNT = Mount("/data", "tmpfs", "tmpfs", ("tmpcopyup", "nosuid"))

    def test_a_tmpfs_begins_with_what_the_image_has(self, lab, image):
        script = (
            "cd /data; stat -c %a . ; stat -c %u:%g deep; cat link; stat -c %a deep/er/file; readlink outside;"
            "[ -p pipe ] && echo pipe; ls; grep ' /data ' /proc/mounts | cut -d' ' -f3"
        )
        assert lab.run(script, mounts=[self.MOUNT]).output.split() == [
            *("751", "1000:1001", "content4711", "/etc/shadow", "pipe"),
            *("deep", "link", "outside", "pipe", "tmpfs"),
        ]

    def test_what_is_written_stays_out_of_the_image(self, lab, image):
        assert lab.run("echo new > /data/deep/er/file", mounts=[self.MOUNT]).code == 0
        assert (image / "deep/er/file").read_text() == "content"
        assert not (lab.upper / "data/deep").exists()

    def test_a_read_only_one_is_filled_first(self, lab, image):
        mount = replace(self.MOUNT, options=("tmpcopyup", "ro"))
        assert "Read-only" in lab.run("cat /data/link; touch /data/x", mounts=[mount]).output

    def test_what_is_mounted_below_is_not_copied(self, lab, image, source):
        (source / "secret").write_text("of the host")
        (image / "mounted").mkdir()
        mounts = [Mount("/data/mounted", "bind", str(source), ("rbind",)), self.MOUNT]
        assert "mounted" not in lab.run("ls /data", mounts=mounts).output

    def test_links_lead_nowhere_while_it_is_copied(self, lab, image):
        """A file of the host, reached by a link of the image, would be handed to the container."""
        secret = lab.directory / "secret"
        secret.write_text("of the host")
        (image / "secret").symlink_to(secret)
        (image / "up").symlink_to("../" * 20 + str(secret).lstrip("/"))
        assert lab.run("cat /data/secret /data/up 2>/dev/null; true", mounts=[self.MOUNT]).output == ""

    def test_an_image_that_nests_without_end_is_refused(self, lab, image):
        (image / "/".join("d" * 150)).mkdir(parents=True)
        with pytest.raises(ExecFailed, match="copying up"):
            lab.create(lab.spec("true", mounts=[self.MOUNT]))

    def test_more_than_fits_is_an_error(self, lab, image):
        (image / "big").write_bytes(b"x" * 100_000)
        mount = replace(self.MOUNT, options=("tmpcopyup", "size=16k"))
        with pytest.raises(OSError, match="No space left"):
            lab.create(lab.spec("true", mounts=[mount]))

    def test_where_the_image_has_nothing_it_is_empty(self, lab):
        assert lab.run("ls /fresh", mounts=[replace(self.MOUNT, destination="/fresh")]).output == ""

    def test_is_for_a_tmpfs(self, lab):
        with pytest.raises(ValueError, match=r"^mounts\[7\]\.options: tmpcopyup"):
            lab.create(lab.spec("true", mounts=[Mount("/data", "ramfs", "none", ("tmpcopyup",))]))


class TestRemount:
    def test_changes_what_is_there(self, lab):
        spec = lab.spec("touch /data/x; grep ' /data ' /proc/mounts")
        mounts = [Mount("/data", "tmpfs", "tmpfs"), Mount("/data", "tmpfs", "tmpfs", ("remount", "ro", "noexec"))]
        output = lab.run_spec(replace(spec, mounts=(*spec.mounts, *mounts))).output
        assert "Read-only file system" in output
        assert output.count(" /data ") == 1
        assert "noexec" in output

    def test_of_what_is_not_mounted_is_refused(self, lab):
        with pytest.raises(ExecFailed, match="remount /etc: nothing is mounted there"):
            lab.create(lab.spec("true", mounts=[Mount("/etc", "none", "none", ("remount", "ro"))]))

    def test_reaches_no_file_system_of_the_hosts(self, lab, source):
        """What is the same for all mounts of a file system is not the container's to change."""
        mounts = [Mount("/d", "bind", str(source), ("bind",)), Mount("/d", "none", "none", ("remount", "sync"))]
        with pytest.raises(ExecFailed, match="'sync' can't be changed"):
            lab.create(lab.spec("true", mounts=mounts))


class TestIdMapped:
    UIDS = (IdMapping(0, 5000, 2000),)

    def owners(self, lab, source, *options: str, **mappings) -> list[str]:
        mount = Mount("/data", "bind", str(source), ("rbind", *options), **mappings)
        return lab.run("stat -c %u:%g /data/file /data/sub", mounts=[mount]).output.split()

    def test_ids_are_those_of_the_mapping(self, lab, source):
        os.chown(source / "file", 7, 8)
        seen = self.owners(lab, source, "idmap", uid_mappings=self.UIDS, gid_mappings=(IdMapping(0, 9000, 100),))
        assert seen[0] == "5007:9008"

    def test_without_the_option_too(self, lab, source):
        assert self.owners(lab, source, uid_mappings=self.UIDS, gid_mappings=self.UIDS)[0] == "5000:5000"

    def test_what_is_written_has_the_ids_of_the_file_system(self, lab, source):
        source.chmod(0o777)
        mount = Mount("/data", "bind", str(source), ("bind", "idmap"), self.UIDS, self.UIDS)
        container = lab.create(lab.spec("echo x > /data/new", mounts=[mount]), user="6000:6000")
        container.start()
        assert lab.wait(container.init) == 0
        assert (source / "new").stat().st_uid == 1000

    def test_idmap_leaves_what_is_mounted_below_as_it_is_and_ridmap_maps_it(self, lab, nested):
        mappings = {"uid_mappings": self.UIDS, "gid_mappings": self.UIDS}
        assert self.owners(lab, nested, "idmap", **mappings) == ["5000:5000", "0:0"]
        try:
            assert self.owners(lab, nested, "ridmap", **mappings) == ["5000:5000", "5000:5000"]
        except ExecFailed as e:  # a tmpfs can from Linux 6.3 on
            assert "can't be mapped" in e.message  # noqa: PT017

    def test_the_mapping_of_the_containers_user_namespace_is_the_default(self, lab, source):
        """So files of the host's root are the container's root's."""
        os.chown(lab.upper, 300000, 300000)
        mapping = (IdMapping(0, 300000, 65536),)
        spec = lab.spec("stat -c %u:%g /data/file; echo x > /data/new; stat -c %u /data/new")
        mount = Mount("/data", "bind", str(source), ("bind", "idmap"))
        linux = replace(
            spec.linux,
            namespaces=(*spec.linux.namespaces, Namespace(Kind.USER)),
            uid_mappings=mapping,
            gid_mappings=mapping,
        )
        assert lab.run_spec(replace(spec, mounts=(*spec.mounts, mount), linux=linux)).output.split() == ["0:0", "0"]
        assert (source / "new").stat().st_uid == 0

    def test_the_root_can_be_one(self, lab):
        root = lab.directory / "root"
        root.mkdir()
        kernel_mount.bind(lab.busybox, root)
        try:
            mount = Mount("", "bind", str(root), ("bind",), self.UIDS, self.UIDS)
            assert lab.run("stat -c %u /bin/busybox", options={"rootfs": [mount]}).output == "5000\n"
        finally:
            kernel_mount.umount(root, kernel_mount.MNT_DETACH)

    @pytest.mark.parametrize(
        ("mount", "match"),
        [
            (Mount("/d", "bind", "/etc", ("bind", "idmap")), r"^mounts\[7\]\.options: idmap without uidMappings"),
            (Mount("/d", "bind", "/etc", ("bind",), UIDS), r"^mounts\[7\]\.gidMappings: missing"),
            (Mount("/d", "bind", "/etc", ("bind",), (), UIDS), r"^mounts\[7\]\.uidMappings: missing"),
            (Mount("/d", "tmpfs", "tmpfs", ("idmap",), UIDS, UIDS), r"^mounts\[7\]: only a bind mount"),
            (
                Mount("/d", "bind", "/etc", ("bind",), (IdMapping(0, 1, 0),), UIDS),
                r"^mounts\[7\]\.uidMappings\[0\]\.size: must not be 0",
            ),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, lab, mount, match):
        with pytest.raises(ValueError, match=match):
            lab.create(lab.spec("true", mounts=[mount]))

    def test_a_file_system_that_can_not_is_refused_by_name(self, lab):
        mount = Mount("/d", "bind", "/proc/sys", ("bind",), self.UIDS, self.UIDS)
        with pytest.raises(ExecFailed, match="mount /d: its ids can't be mapped"):
            lab.create(lab.spec("true", mounts=[mount]))


class TestRootPropagation:
    """Of a root that is a directory of the host, in a mount of the host's that is shared."""

    @pytest.fixture
    def root(self, lab) -> Iterator[Path]:
        root = lab.directory / "root"
        root.mkdir()
        kernel_mount.mount("tmpfs", root, "tmpfs", 0)
        kernel_mount.set_propagation(root, MS_SHARED, recursive=False)
        try:
            for name in ("bin", "proc", "sys", "dev", "late", "inner"):
                (root / name).mkdir()
            (root / "bin/busybox").write_bytes((lab.busybox / "bin/busybox").read_bytes())
            (root / "bin/busybox").chmod(0o755)
            (root / "bin/sh").symlink_to("busybox")
            yield root
        finally:
            kernel_mount.umount(root, kernel_mount.MNT_DETACH)

    def container(self, lab, root: Path, propagation: str):
        spec = lab.spec("busybox", "sleep", "60", linux={"rootfs_propagation": propagation})
        container = lab.create(replace(spec, root=Root(str(root))), rootfs=())
        container.start()
        return container

    def tags(self, lab, container, place: str = "/") -> set[str]:
        output = lab.exec(container, "busybox", "cat", "/proc/self/mountinfo").output
        return {tag.partition(":")[0] for tag in options_of(output)[place] if ":" in tag or tag == "unbindable"}

    @pytest.mark.parametrize(
        ("propagation", "root_is", "others_are"),
        [
            ("", set(), set()),
            ("private", set(), set()),
            ("rprivate", set(), set()),
            ("slave", {"master"}, set()),
            ("rslave", {"master"}, set()),
            ("shared", {"shared"}, set()),
            ("rshared", {"shared"}, {"shared"}),
            ("unbindable", {"unbindable"}, set()),
            ("runbindable", {"unbindable"}, {"unbindable"}),
        ],
    )
    def test_is_as_asked(self, lab, root, propagation, root_is, others_are):
        container = self.container(lab, root, propagation)
        assert self.tags(lab, container) == root_is
        assert self.tags(lab, container, "/dev") == others_are

    @pytest.mark.parametrize(("propagation", "seen"), [("rslave", True), ("private", False), ("rshared", False)])
    def test_a_later_mount_of_the_host_shows_in_a_slave_only(self, lab, root, propagation, seen):
        container = self.container(lab, root, propagation)
        kernel_mount.mount("tmpfs", root / "late", "tmpfs", 0)
        try:
            (root / "late/file").write_text("x")
            assert ("file" in lab.exec(container, "busybox", "ls", "/late").output) is seen
        finally:
            kernel_mount.umount(root / "late")

    @pytest.mark.parametrize("propagation", ["", "rslave", "rshared", "runbindable"])
    def test_nothing_of_the_container_shows_on_the_host(self, lab, root, propagation):
        before = Path("/proc/self/mountinfo").read_text().count(str(root))
        self.container(lab, root, propagation)
        assert Path("/proc/self/mountinfo").read_text().count(str(root)) == before
        assert not list((root / "proc").iterdir())

    def test_another_value_is_refused(self, lab):
        with pytest.raises(ValueError, match=r"^linux\.rootfsPropagation: 'loud'"):
            lab.create(lab.spec("true", linux={"rootfs_propagation": "loud"}))


class TestMountPropagation:
    @pytest.fixture
    def shared(self, source: Path) -> Iterator[Path]:
        kernel_mount.mount("tmpfs", source, "tmpfs", 0)
        kernel_mount.set_propagation(source, MS_SHARED, recursive=False)
        (source / "below").mkdir()
        yield source
        with contextlib.suppress(OSError):
            kernel_mount.umount(source / "below", kernel_mount.MNT_DETACH)
        kernel_mount.umount(source, kernel_mount.MNT_DETACH)

    @pytest.mark.parametrize(
        ("option", "tags"),
        [
            *(("", set()), ("private", set()), ("rprivate", set())),
            *(("slave", {"master"}), ("rslave", {"master"}), ("shared", {"shared"}), ("rshared", {"shared"})),
            *(("unbindable", {"unbindable"}), ("runbindable", {"unbindable"})),
        ],
    )
    def test_of_a_bind_mount_is_as_asked(self, lab, shared, option, tags):
        table = seen(lab, Mount("/data", "bind", str(shared), ("rbind", option)))
        assert {tag.partition(":")[0] for tag in table["/data"] if ":" in tag or tag == "unbindable"} == tags

    @pytest.mark.parametrize(("option", "shows"), [("rslave", True), ("rshared", True), ("rprivate", False)])
    def test_a_later_mount_of_the_host_shows_where_that_was_asked_for(self, lab, shared, option, shows):
        mount = Mount("/data", "bind", str(shared), ("rbind", option))
        container = lab.create(lab.spec("sleep", "60", mounts=[mount]))
        container.start()
        kernel_mount.mount("tmpfs", shared / "below", "tmpfs", 0)
        (shared / "below/file").write_text("x")
        assert ("file" in lab.exec(container, "ls /data/below").output) is shows
