"""Images whose files, links and devices stand where the runtime mounts and makes things. What counts is the host."""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.races import ROUNDS, accomplice, exchange, exchanging, stealing
from support.requirements import needs

from corral.kernel import mount, process
from corral.kernel.paths import opened
from corral.oci.copy_up import copy_directory
from corral.oci.devices import _make as make_node
from corral.oci.runtime import ExecFailed, Stdio
from corral.oci.spec import Device, DeviceType, Mount, Spec

pytestmark = needs("root", "overlayfs", "busybox")

REFUSED = (ExecFailed, OSError)
RACE_S = 2.0


@dataclass
class Bait:
    """A directory of the host, with a file in it, that attacks try to reach."""

    directory: Path

    @property
    def file(self) -> Path:
        return self.directory / "file"

    def make(self) -> None:
        self.directory.mkdir()
        self.file.write_text("bait")
        self.file.chmod(0o640)

    def untouched(self) -> bool:
        status = self.file.lstat()
        names = sorted(path.name for path in self.directory.iterdir())
        owner = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink)
        return names == ["file"] and owner == (stat.S_IFREG | 0o640, 0, 0, 1) and self.file.read_text() == "bait"

    def ways(self) -> list[str]:
        """Targets of links that lead there, if they are followed on the host."""
        return [str(self.directory), f"../../../../../../../..{self.directory}", f"/proc/1/root{self.directory}"]


@pytest.fixture
def bait(lab) -> Bait:
    bait = Bait(lab.directory / "bait")
    bait.make()
    return bait


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def without(spec: Spec, *places: str) -> Spec:
    """The same without the mounts at some places, and below them."""
    kept = [m for m in spec.mounts if not any(m.destination == p or m.destination.startswith(f"{p}/") for p in places)]
    return replace(spec, mounts=tuple(kept))


def with_mounts(spec: Spec, *mounts: Mount) -> Spec:
    return replace(spec, mounts=(*spec.mounts, *mounts))


def attempt(lab, spec: Spec, **options: object) -> str | None:
    """Run it; what it wrote, or None where it was refused."""
    with contextlib.suppress(*REFUSED):
        return lab.run_spec(spec, **options).output
    return None


def bind(destination: str, source: Path, *options: str) -> Mount:
    return Mount(destination, "bind", str(source), ("rbind", *options))


@pytest.mark.parametrize("name", ["proc", "sys"])
@pytest.mark.parametrize("target", ["/", "/tmp", "../../../../..", "/volume/fake"])
def test_cve_2019_19921_and_cve_2025_54867_proc_and_sys_that_are_links(lab, name, target):
    """Also CVE-2023-27561 and CVE-2023-28642: the link leads to a volume, which others can exchange."""
    (lab.plant / name).symlink_to(target)
    volume = lab.directory / "volume"
    (volume / "fake").mkdir(parents=True)
    spec = lab.spec("true")
    for mounts in ((bind("/volume", volume), *spec.mounts), (*spec.mounts, bind("/volume", volume))):
        with pytest.raises(ExecFailed, match=f"mount /{name}: .*a symbolic link"):
            lab.run_spec(replace(spec, mounts=mounts))
    assert list((volume / "fake").iterdir()) == []


@pytest.mark.parametrize("name", ["proc", "sys"])
def test_cve_2019_16884_what_was_exchanged_since_it_was_mounted_is_noticed(lab, monkeypatch, name):
    """A root that others have too: a mount goes where its directory goes, and another lies at its place."""
    root = lab.directory / "root"
    shutil.copytree(lab.busybox, root, symlinks=True)
    (root / "fake").mkdir()
    with accomplice(lab.directory / "sign", root / name, root / "fake") as tell:

        def move(tree, target, place="", original=mount.move_mount, **words):
            original(tree, target, place, **words)
            if words.get("where") == f"/{name}":
                tell()

        monkeypatch.setattr(mount, "move_mount", move)
        linux = {"masked_paths": (), "readonly_paths": ()}
        spec = without(lab.spec("true", linux=linux), "/sys/fs/cgroup")
        with pytest.raises(ExecFailed, match=f"mount /{name}: it was exchanged meanwhile"):
            lab.create(spec, rootfs=[Mount(type="bind", source=str(root), options=("rbind",))])


@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
@pytest.mark.parametrize("place", ["/proc", "/alias", "//proc/./", "/x/../proc", "/proc/sys", "/proc/self", "/proc/1"])
def test_cve_2019_16884_a_volume_that_covers_proc(lab, kind, place):
    """An AppArmor label, or a mask, that is written to a false procfs protects nobody."""
    (lab.plant / "alias").symlink_to("proc")
    fake = lab.directory / "fake"
    (fake / "self/attr").mkdir(parents=True)
    (fake / "self/attr/exec").write_text("")
    mount = bind(place, fake) if kind == "bind" else Mount(place, "tmpfs", "tmpfs", ())
    with pytest.raises(ExecFailed, match=r"procfs|inside /proc"):
        lab.run_spec(with_mounts(lab.spec("true"), mount))
    assert (fake / "self/attr/exec").read_text() == ""


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
def test_cve_2021_30465_and_cve_2024_45310_mount_points_exchanged_for_links(lab, bait, directory):
    """A volume of two containers: one exchanges a directory for a link while the other one starts.

    Mounted, or made, would be what lies where the link leads: on the host.
    """
    volume, source = lab.directory / "volume", lab.directory / "source"
    (volume / "real").mkdir(parents=True)
    (volume / "trap").symlink_to(bait.directory)
    if directory:
        source.mkdir()
    else:
        source.write_text("source")
    spec = with_mounts(lab.spec("true"), bind("/volume", volume))
    give_up_at, started = time.monotonic() + RACE_S, 0
    with exchanging(volume / "real", volume / "trap"):
        while time.monotonic() < give_up_at:
            deep = bind(f"/volume/real/{started}/deep", source)
            started += attempt(lab, with_mounts(spec, deep)) is not None
            assert bait.untouched()
    assert started > 3, "none was started, so nothing was tried"


def test_cve_2021_30465_nothing_of_the_host_is_seen_by_a_mount_that_was_exchanged(lab, bait):
    """The other half: the second mount lands on what the link leads to, and shows it."""
    volume = lab.directory / "volume"
    (volume / "real/sub").mkdir(parents=True)
    link(volume / "trap/sub", f"../../../../../../../..{bait.directory}")
    spec = with_mounts(lab.spec("cat /shown/file; cat /volume/*/sub/file"), bind("/volume", volume))
    give_up_at = time.monotonic() + RACE_S / 2
    with exchanging(volume / "real", volume / "trap"):
        while time.monotonic() < give_up_at:
            seen = attempt(lab, with_mounts(spec, Mount("/volume/real/sub", "tmpfs", "tmpfs", ("size=64k",))))
            assert "bait" not in (seen or "")
    assert bait.untouched()


class TestCve202531133:
    """Masks made of a /dev/null that is something else: the file behind it would be mounted, and writable."""

    def look(self, lab, spec: Spec) -> list[str]:
        null = os.open("/dev/null", os.O_RDWR)
        container = lab.create(spec, stdio=Stdio(null, null, null))
        os.close(null)
        lines = Path(f"/proc/{container.init.pid}/mountinfo").read_text().splitlines()
        return [line for line in lines if line.split()[4] in ("/proc/keys", "/proc/timer_list", "/proc/kcore")]

    def test_cve_2025_31133_a_link_in_the_image(self, lab, bait):
        link(lab.plant / "dev/null", "/proc/sys/kernel/core_pattern")
        masks = self.look(lab, without(lab.spec("true"), "/dev"))
        assert masks
        assert all(line.split()[3] == "/null" and " ro," in line for line in masks)

    def test_cve_2025_31133_a_file_over_our_own(self, lab, bait):
        """A volume at /dev/null: it lies in the tmpfs that the runtime made itself, and is none all the same."""
        masks = self.look(lab, with_mounts(lab.spec("true"), bind("/dev/null", bait.file)))
        assert masks
        assert not [line for line in masks if "/bait/file" in line]
        assert all(line.split()[3] == "/null" for line in masks)

    def test_cve_2025_31133_a_mask_is_never_a_hole(self, lab):
        """Whatever the image holds: what is masked shows nothing, and can't be written."""
        link(lab.plant / "dev/null", "/etc/passwd")
        spec = lab.spec("cat /proc/keys /proc/timer_list; echo x > /proc/timer_list; cat /proc/timer_list; echo done")
        assert attempt(lab, spec).endswith("done\n")
        assert "root:" not in attempt(lab, spec)

    def test_cve_2025_31133_a_masked_link_hides_what_it_leads_to_inside(self, lab, bait):
        link(lab.plant / "masked", bait.file)
        inside = lab.plant / str(bait.file).lstrip("/")
        inside.parent.mkdir(parents=True)
        inside.write_text("inside")
        spec = lab.spec(f"cat {bait.file}", linux={"masked_paths": ("/masked",)})
        assert attempt(lab, spec) == ""
        assert bait.untouched()

    @pytest.mark.parametrize("kind", ["masked_paths", "readonly_paths"])
    def test_cve_2025_31133_what_was_exchanged_since_it_was_covered_is_noticed(self, lab, monkeypatch, kind):
        """Elsewhere than in our own /proc and /sys names are others' to give."""
        volume = lab.directory / "volume"
        for name in ("real", "other"):
            (volume / name).mkdir(parents=True)
            (volume / name / "file").write_text(name)

        def move(tree, target, name="", original=mount.move_mount, **words):
            original(tree, target, name, **words)
            if words.get("where") == "/volume/real/file":
                exchange(volume / "real", volume / "other")

        monkeypatch.setattr(mount, "move_mount", move)
        linux = {"masked_paths": (), "readonly_paths": ()} | {kind: ("/volume/real/file",)}
        with pytest.raises(ExecFailed, match="it was exchanged meanwhile"):
            lab.run_spec(with_mounts(lab.spec("true", linux=linux), bind("/volume", volume)))

    @pytest.mark.parametrize("kind", ["masked_paths", "readonly_paths"])
    @pytest.mark.parametrize("path", ["/proc/self", "/proc/self/environ", "/proc/mounts", "/proc/net/arp"])
    def test_cve_2025_31133_one_name_of_several_is_not_taken_for_all(self, lab, kind, path):
        """What is covered by way of a link of procfs has other names: the container would only seem to lack it."""
        linux = {"masked_paths": (), "readonly_paths": ()} | {kind: (path,)}
        with pytest.raises((ExecFailed, OSError), match="symbolic links"):
            lab.run("true", linux=linux)

    def test_cve_2025_31133_masks_exchanged_while_they_are_made(self, lab, bait):
        volume = lab.directory / "volume"
        (volume / "real").mkdir(parents=True)
        (volume / "real/file").write_text("real")
        (volume / "trap").symlink_to(bait.directory)
        linux = {"masked_paths": ("/volume/real/file",), "readonly_paths": ("/volume/real",)}
        spec = with_mounts(lab.spec("cat /volume/real/file", linux=linux), bind("/volume", volume))
        give_up_at = time.monotonic() + RACE_S / 2
        with exchanging(volume / "real", volume / "trap"):
            while time.monotonic() < give_up_at:
                attempt(lab, spec)
                assert bait.untouched()


class TestCve202552565:
    """/dev/console as a link: the terminal's slave is bound over, or made at, what it leads to."""

    @pytest.mark.parametrize("dev", ["image", "volume", "tmpfs"])
    def test_cve_2025_52565_and_cve_2026_88264_console_as_a_link(self, lab, bait, dev):
        image = lab.plant if dev != "volume" else lab.directory / "volume"
        prefix = image / "dev" if dev != "volume" else image
        link(prefix / "console", bait.directory / "made")
        (prefix / "pts").mkdir()
        spec = lab.spec("sleep", "9", terminal=True)
        devpts = [mount for mount in spec.mounts if mount.type == "devpts"]
        if dev == "image":
            spec = with_mounts(without(spec, "/dev"), *devpts)
        if dev == "volume":
            spec = with_mounts(without(spec, "/dev"), bind("/dev", image), *devpts)
        with contextlib.suppress(*REFUSED):
            container = lab.create(spec)
            container.start()
            shown = Path(f"/proc/{container.init.pid}/mountinfo").read_text()
            assert str(bait.directory) not in shown
        assert bait.untouched()

    def test_cve_2025_52565_a_console_that_is_there_already(self, lab, bait):
        """It is covered; what it was is not written to, and is not made the user's."""
        spec = with_mounts(lab.spec("echo x > /dev/console", terminal=True), bind("/dev/console", bait.file))
        with contextlib.suppress(*REFUSED):
            container = lab.create(spec, user="bob")
            container.start()
            lab.wait(container.init)
        assert bait.untouched()

    def test_cve_2025_52565_the_multiplexer_as_a_link(self, lab, bait):
        spec = lab.spec("sleep", "9", terminal=True)
        link(lab.plant / "dev/pts/ptmx", bait.file)
        devpts = Mount("/dev/pts", "tmpfs", "tmpfs", ("size=64k",))
        with pytest.raises(ExecFailed, match="devpts"):
            lab.create(with_mounts(without(spec, "/dev"), devpts))
        assert bait.untouched()

    @pytest.mark.parametrize("other", ["/bait/file", "/dev/zero"])
    def test_cve_2025_52565_a_multiplexer_that_was_covered(self, lab, bait, other):
        """The devpts is the right one, and what its ptmx leads to is not."""
        held = ("CAP_SYS_ADMIN",)
        spec = lab.spec("sleep", "60", linux={"seccomp": None})
        capabilities = replace(spec.process.capabilities, bounding=held, effective=held, permitted=held)
        spec = replace(spec, process=replace(spec.process, capabilities=capabilities))
        container = lab.create(with_mounts(spec, bind("/bait", bait.directory)))
        container.start()
        assert lab.exec(container, f"mount --bind {other} /dev/pts/ptmx", capabilities=None).code == 0
        with pytest.raises(ExecFailed, match="not a pseudo terminal multiplexer"):
            lab.made.append(container.exec(lab.process("sh", "-i", terminal=True), stdio=Stdio()))
        assert bait.untouched()

    def test_cve_2025_52565_a_terminal_for_exec_in_a_dev_that_was_exchanged(self, lab, bait):
        """The container put links where exec looks for its terminal."""
        held = ("CAP_SYS_ADMIN", "CAP_MKNOD")
        spec = lab.spec("sleep", "60", linux={"seccomp": None})
        capabilities = replace(spec.process.capabilities, bounding=held, effective=held, permitted=held)
        spec = replace(spec, process=replace(spec.process, capabilities=capabilities))
        container = lab.create(with_mounts(spec, bind("/bait", bait.directory)))
        container.start()
        script = "umount -l /dev/pts; rmdir /dev/pts; ln -s /bait /dev/pts; ln -s file /bait/ptmx"
        assert lab.exec(container, script, capabilities=None).code == 0
        with pytest.raises(ExecFailed, match="devpts"):
            lab.made.append(container.exec(lab.process("sh", "-i", terminal=True), stdio=Stdio()))
        (bait.directory / "ptmx").unlink()
        assert bait.untouched()


class TestCve202552881:
    """What is meant for procfs is written elsewhere: to a file that the container chose, or to one that is worse."""

    def test_cve_2025_52881_sysctl(self, lab, bait):
        """No procfs is mounted, and the image has files where one would be."""
        fake = lab.plant / "proc/sys/net/ipv4"
        fake.mkdir(parents=True)
        (fake / "ip_forward").symlink_to(bait.file)
        (lab.plant / "proc/self").symlink_to(bait.directory)
        spec = lab.spec("sleep", "9", linux={"sysctl": {"net.ipv4.ip_forward": "1"}})
        container = lab.create(without(spec, "/proc"))
        assert bait.untouched()
        seen = _in_network_of(container.init.pid, "/proc/sys/net/ipv4/ip_forward")
        assert seen == "1\n"

    def test_cve_2025_52881_oom_score_of_exec(self, lab, bait):
        """The container has mounted its own files over /proc since it began."""
        held = ("CAP_SYS_ADMIN",)
        spec = lab.spec("sleep", "60", linux={"seccomp": None})
        capabilities = replace(spec.process.capabilities, bounding=held, effective=held, permitted=held)
        spec = replace(spec, process=replace(spec.process, capabilities=capabilities))
        container = lab.create(with_mounts(spec, bind("/bait", bait.directory)))
        container.start()
        script = "mount -t tmpfs none /proc; mkdir /proc/self /proc/thread-self /proc/self/attr; cd /proc/self; "
        script += "for i in oom_score_adj attr/exec loginuid setgroups; do ln -s /bait/file $i; done"
        assert lab.exec(container, script, capabilities=None).code == 0
        handle = container.exec(lab.process("sleep", "60", oom_score_adj=512, capabilities=None), stdio=Stdio())
        lab.made.append(handle)
        assert Path(f"/proc/{handle.pid}/oom_score_adj").read_text() == "512\n"
        assert bait.untouched()


def _in_network_of(pid: int, path: str) -> str:
    """A file as a process in another's network namespace sees it."""
    reader, writer = os.pipe()
    child, pidfd = process.clone(0)
    if child == 0:
        try:
            os.setns(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY), 0)
            os.write(writer, Path(path).read_bytes())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    with os.fdopen(reader) as file:
        return file.read()


class TestDevThatIsALink:
    """CVE-2026-41579 (runc) and CVE-2026-47766 (crun): nothing is mounted on /dev, and the image's leads elsewhere."""

    @pytest.mark.parametrize("way", range(3))
    def test_cve_2026_41579_and_cve_2026_47766_nothing_is_made_or_removed_on_the_host(self, lab, bait, way):
        (bait.directory / "ptmx").write_text("decoy")
        (lab.plant / "dev").symlink_to(bait.ways()[way])
        attempt(lab, without(lab.spec("true"), "/dev"))
        assert (bait.directory / "ptmx").read_text() == "decoy"
        (bait.directory / "ptmx").unlink()
        assert bait.untouched()

    @pytest.mark.parametrize("way", range(3))
    def test_cve_2026_41579_device_nodes_of_the_specification(self, lab, bait, way):
        (lab.plant / "deep").symlink_to(bait.ways()[way])
        devices = (Device("/deep/node", DeviceType.CHAR, 1, 3), Device("/deep/er/node", DeviceType.CHAR, 1, 3))
        attempt(lab, lab.spec("true", linux={"devices": devices}))
        assert bait.untouched()

    def test_cve_2026_41579_a_node_exchanged_before_it_is_given_to_its_user(self, lab, bait):
        volume = lab.directory / "volume"
        volume.mkdir()
        device = Device("/dev/x", DeviceType.CHAR, 1, 3, file_mode=0o666, uid=1000, gid=1000)
        parent = os.open(volume, os.O_PATH)
        with stealing(volume, bait.file):
            give_up_at = time.monotonic() + RACE_S
            for number in range(ROUNDS):
                if time.monotonic() > give_up_at:
                    break
                make_node(device, f"made{number}", parent)
        os.close(parent)
        assert bait.untouched()

    def test_cve_2026_41579_a_directory_exchanged_while_devices_are_made(self, lab, bait):
        volume = lab.directory / "volume"
        (volume / "real").mkdir(parents=True)
        (volume / "trap").symlink_to(bait.directory)
        give_up_at, count = time.monotonic() + RACE_S / 2, 0
        with exchanging(volume / "real", volume / "trap"):
            while time.monotonic() < give_up_at:
                count += 1
                devices = (Device(f"/volume/real/node{count}", DeviceType.CHAR, 1, 3),)
                attempt(lab, with_mounts(lab.spec("true", linux={"devices": devices}), bind("/volume", volume)))
                assert bait.untouched()


@pytest.mark.parametrize("way", range(3))
def test_cve_2026_88265_null_as_a_link(lab, bait, way):
    """Nothing is mounted on /dev: a file of the host would become the container's output, and its user's."""
    (lab.plant / "dev").mkdir()
    (lab.plant / "dev/null").symlink_to(f"{bait.ways()[way]}/file")
    with pytest.raises(ExecFailed, match="null"):
        lab.create(without(lab.spec("echo written"), "/dev"), user="bob").start()
    assert bait.untouched()


def test_cve_2026_88265_null_as_a_link_at_exec(lab, bait):
    container = lab.create(with_mounts(lab.spec("sleep", "60"), bind("/bait", bait.directory)))
    container.start()
    lab.exec(container, "rm /dev/null; ln -s /bait/file /dev/null")
    with pytest.raises(ExecFailed, match="null"):
        lab.made.append(container.exec(lab.process("echo written"), user="bob", stdio=Stdio()))
    assert bait.untouched()


@pytest.mark.parametrize("way", range(3))
def test_cve_2026_55686_a_working_directory_behind_a_link(lab, bait, way):
    (lab.plant / "work").symlink_to(bait.ways()[way])
    attempt(lab, lab.spec("touch ./here", cwd="/work/made/by/the/runtime"))
    assert bait.untouched()


def test_cve_2026_55686_a_working_directory_exchanged_for_a_link(lab, bait):
    volume = lab.directory / "volume"
    (volume / "real").mkdir(parents=True)
    (volume / "trap").symlink_to(bait.directory)
    give_up_at, count = time.monotonic() + RACE_S / 2, 0
    with exchanging(volume / "real", volume / "trap"):
        while time.monotonic() < give_up_at:
            count += 1
            spec = with_mounts(lab.spec("touch ./here", cwd=f"/volume/real/{count}/deep"), bind("/volume", volume))
            attempt(lab, spec)
            assert bait.untouched()


def test_a_source_below_the_bundle_does_not_lead_out_of_the_specification(lab):
    """Sources are the caller's, and are named as they are; a destination that climbs stays inside."""
    source = lab.directory / "bundle/given"
    source.write_text("given")
    spec = with_mounts(lab.spec("cat /etc/climbed"), Mount("/../../../etc/climbed", "bind", "given", ("bind",)))
    assert attempt(lab, spec) == "given"
    assert not Path("/etc/climbed").exists()


class TestCopiedUp:
    """tmpcopyup puts what the image holds into the runtime's own tmpfs: what lies there is the image's word again."""

    def spec(self, lab, place: str, *args: str, **changes: object) -> Spec:
        spec = lab.spec(*args, **changes)
        copied = tuple(
            replace(mount, options=(*mount.options, "tmpcopyup")) if mount.destination == place else mount
            for mount in spec.mounts
        )
        return replace(spec, mounts=copied)

    @pytest.mark.parametrize("name", ["console", "null", "ptmx", "shm", "pts", "mqueue", "fd", "stdout", "zero"])
    def test_cve_2025_52565_and_cve_2026_88264_names_in_dev_that_lead_out(self, lab, bait, name):
        ends = ("",) if name in ("shm", "pts", "mqueue") else ("/file", "/made")
        for way in [f"{way}{end}" for way in bait.ways() for end in ends]:
            (lab.plant / "dev" / name).unlink(missing_ok=True)
            link(lab.plant / "dev" / name, way)
            for terminal in (False, True):
                with contextlib.suppress(*REFUSED):
                    container = lab.create(self.spec(lab, "/dev", "true", "", terminal=terminal), user="bob")
                    # Where something is mounted may be called so, inside the image; what is mounted may not.
                    lines = Path(f"/proc/{container.init.pid}/mountinfo").read_text().splitlines()
                    assert not [line for line in lines if str(bait.directory) in line.split()[3]]
                    container.start()
                    lab.wait(container.init)
                assert bait.untouched()

    def test_cve_2024_0132_cve_2025_23359_cve_2024_9341_links_are_copied_and_not_followed(self, lab, bait):
        """Other runtimes mounted, or copied, what a link of the image leads to on the host."""
        (lab.plant / "copied").mkdir()
        for number, way in enumerate(bait.ways()):
            link(lab.plant / f"copied/file{number}", f"{way}/file")
            link(lab.plant / f"copied/directory{number}", way)
        copied = Mount("/copied", "tmpfs", "tmpfs", ("tmpcopyup",))
        assert "bait" not in attempt(lab, with_mounts(lab.spec("cat /copied/file* /copied/*/file"), copied))
        link(lab.plant / "whole", bait.directory)
        seen = attempt(lab, with_mounts(lab.spec("cat /whole/file"), replace(copied, destination="/whole")))
        assert "bait" not in (seen or "")
        assert bait.untouched()

    @pytest.mark.parametrize("kind", ["link", "directory", "device", "fifo"])
    def test_what_is_exchanged_while_it_is_copied(self, lab, bait, kind):
        """The root may be others' too. Copied is what was looked at, or nothing."""
        source, mine, theirs = (lab.directory / name for name in ("source", "source/mine", "source/theirs"))
        source.mkdir()
        mine.mkdir() if kind == "directory" else mine.write_text("mine")
        match kind:
            case "link" | "directory":
                theirs.symlink_to(bait.file if kind == "link" else bait.directory)
            case "device":
                os.mknod(theirs, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # has no end
            case "fifo":
                os.mkfifo(theirs)
        origin = os.open(source, os.O_PATH)
        with exchanging(mine, theirs):
            give_up_at = time.monotonic() + RACE_S / 2
            while time.monotonic() < give_up_at:
                with opened(mount.new_mount("tmpfs", "tmpfs", ("size=64k",))) as copy:
                    with contextlib.suppress(OSError):  # no container then
                        copy_directory(origin, copy)
                    assert set(contents(copy)) <= {"mine"}
        os.close(origin)


def contents(directory: int) -> Iterator[str]:
    """Of the plain files in and below a directory."""
    with opened(os.open(".", os.O_RDONLY, dir_fd=directory)) as readable:
        for name in os.listdir(readable):  # noqa: PTH208 - of an fd
            kind = stat.S_IFMT(os.stat(name, dir_fd=readable, follow_symlinks=False).st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR):
                continue
            with opened(os.open(name, os.O_RDONLY, dir_fd=readable)) as found:
                if kind == stat.S_IFREG:
                    yield os.read(found, 1 << 20).decode()
                else:
                    yield from contents(found)
