"""Hostile images and hostile containers: each test tries an attack, and looks at what it reached."""

import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import capabilities, process
from corral.oci import defaults, mount_options, plan, program
from corral.oci.image_mounts import ImageMount
from corral.oci.mounts import NewFilesystem
from corral.oci.runtime import SETUP, Container, ExecFailed, Stdio
from corral.oci.secret_files import SecretFile, SecretFiles
from corral.oci.spec import Device, DeviceType, Mount

pytestmark = needs("root", "overlayfs", "busybox")

ESCAPES = ("/", "/etc", "../../../../../../..", "/proc/self/root", "/proc/1/root")


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


@pytest.fixture
def running(lab) -> Container:
    container = lab.create(lab.spec("sleep", "60"))
    container.start()
    return container


class TestLinksInTheImage:
    @pytest.mark.parametrize("name", ["proc", "sys"])
    @pytest.mark.parametrize("target", ESCAPES)
    def test_kernel_file_systems_do_not_follow_them(self, lab, name, target):
        """CVE-2019-19921: /proc as a link, so that what is masked and write-protected lies elsewhere."""
        (lab.plant / name).symlink_to(target)
        with pytest.raises(ExecFailed, match=f"mount /{name}"):
            lab.run("true")

    @pytest.mark.parametrize("name", ["dev", "dev/shm", "dev/pts", "sys/fs"])
    def test_other_mounts_stay_inside(self, lab, name):
        """CVE-2021-30465's target: a mount point that leads to the host."""
        before = Path("/proc/self/mountinfo").read_text().count(str(lab.directory))
        path = lab.plant / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(lab.directory)
        with contextlib.suppress(ExecFailed, OSError):
            lab.run("true")
        assert Path("/proc/self/mountinfo").read_text().count(str(lab.directory)) == before
        assert names(lab.directory) == {"plant", "upper", "work", "bundle"}

    @pytest.mark.parametrize("target", ["/data", "../../../../data", "/proc/self/root/data"])
    def test_bind_mounts_stay_inside(self, lab, target):
        outside = lab.directory / "outside"
        outside.mkdir()
        (lab.plant / "link").symlink_to(str(outside) if target == "/data" else target)
        source = lab.directory / "source"
        source.mkdir()
        with contextlib.suppress(ExecFailed):
            lab.run("touch /link/made", mounts=[Mount("/link/deep", "bind", str(source), ("rbind",))])
        assert names(outside) == set()
        assert not Path("/data").exists()

    def test_created_mount_points_stay_inside(self, lab):
        """A dangling link: what is made for the mount point must be made in the image."""
        (lab.plant / "var").mkdir()
        (lab.plant / "var/run").symlink_to("/corral-made-on-the-host")
        source = lab.directory / "sock"
        source.write_text("x")
        bind = Mount("/var/run/docker.sock", "bind", str(source), ("bind",))
        assert lab.run("cat /corral-made-on-the-host/docker.sock", mounts=[bind]).output == "x"
        assert not Path("/corral-made-on-the-host").exists()

    def test_a_loop_of_links_ends(self, lab):
        (lab.plant / "a").symlink_to("b")
        (lab.plant / "b").symlink_to("a")
        with pytest.raises(ExecFailed, match="symbolic link stands in the way"):
            lab.run("true", mounts=[Mount("/a/x", "tmpfs", "tmpfs", ())])

    def test_device_nodes_stay_inside(self, lab):
        (lab.plant / "link").symlink_to(lab.directory)
        device = Device("/link/node", DeviceType.CHAR, 1, 3)
        with contextlib.suppress(ExecFailed, OSError):
            lab.run("true", linux={"devices": (device,)})
        assert not (lab.directory / "node").exists()

    def test_masked_paths_elsewhere_are_masked_where_they_lead(self, lab):
        (lab.plant / "secret").write_text("secret")
        (lab.plant / "alias").symlink_to("/secret")
        seen = lab.run("cat /alias /secret", linux={"masked_paths": ("/alias",)})
        assert seen.output == ""


class TestProc:
    @pytest.mark.parametrize("kind", ["bind", "tmpfs"])
    def test_nothing_else_is_mounted_on_it(self, lab, kind):
        """CVE-2019-16884, CVE-2023-27561: a volume over /proc takes the ground from every check."""
        volume = lab.directory / "fake"
        (volume / "self/attr").mkdir(parents=True)
        mount = Mount("/proc", kind, str(volume), ("rbind",) if kind == "bind" else ())
        with pytest.raises(ExecFailed, match="only a procfs") as failed:
            lab.run("true", mounts=[mount])
        assert failed.value.kind == SETUP

    @pytest.mark.parametrize("place", ["/proc/sys", "/proc/self/attr", "/proc/1/../sys/kernel", "/alias/sys"])
    def test_nothing_is_mounted_inside_it(self, lab, place):
        (lab.plant / "alias").symlink_to("/proc")
        with pytest.raises(ExecFailed, match="inside /proc"):
            lab.run("true", mounts=[Mount(place, "tmpfs", "tmpfs", ())])

    @pytest.mark.parametrize("place", ["/proc", "/proc/sys", "/alias"])
    def test_no_image_is_mounted_on_it_nor_inside_it(self, lab, place):
        (lab.plant / "alias").symlink_to("/proc/sys/kernel")
        (tree := lab.directory / "tree").mkdir()
        image = ImageMount(place, NewFilesystem(place, "bind", str(tree), mount_options.parse(["bind"])), bound=True)
        with pytest.raises(ExecFailed, match=r"only a procfs|inside /proc"):
            lab.run_spec(lab.spec("true"), images=(image,))

    @pytest.mark.parametrize(
        ("link", "leads_to", "target"),
        [
            ("run/secrets", "/proc/sys/kernel", "/run/secrets/a"),
            ("srv/token", "/proc/sys/kernel/ostype", "/srv/token"),
            ("srv", "/proc", "/srv/version"),
        ],
    )
    def test_no_secret_is_put_inside_it(self, lab, link, leads_to, target):
        (lab.plant / link).parent.mkdir(exist_ok=True)
        (lab.plant / link).symlink_to(leads_to)
        secrets = SecretFiles((SecretFile(target, 0, 0, 0o444, b"x"),))
        with pytest.raises(ExecFailed, match="inside /proc"):
            lab.run_spec(lab.spec("true"), secrets=secrets)

    def test_single_files_of_it_may_be_covered(self, lab):
        """As lxcfs does."""
        source = lab.directory / "meminfo"
        source.write_text("MemTotal: 1 kB\n")
        seen = lab.run("cat /proc/meminfo", mounts=[Mount("/proc/meminfo", "bind", str(source), ("bind", "ro"))])
        assert seen.output == "MemTotal: 1 kB\n"


class TestWorkingDirectory:
    @pytest.mark.parametrize("cwd", ["/proc/self/fd/7", "/proc/self/fd/8/../../..", "/proc/1/cwd", "/proc/self/root"])
    def test_does_not_lead_out_by_an_open_descriptor(self, lab, cwd):
        """CVE-2024-21626."""
        held = [os.open("/", os.O_RDONLY | os.O_DIRECTORY) for _ in range(12)]
        try:
            with pytest.raises(ExecFailed) as failed:
                lab.run("ls", cwd=cwd)
            assert "cwd" in failed.value.message
        finally:
            for fd in held:
                os.close(fd)

    def test_of_an_exec_does_not_either(self, lab, running):
        for fd in range(20):
            with pytest.raises(ExecFailed):
                lab.exec(running, "ls", "/", cwd=f"/proc/self/fd/{fd}")

    def test_that_is_a_link_is_resolved_inside(self, lab):
        (lab.plant / "out").symlink_to("../../../../../..")
        assert lab.run("/bin/pwd -P", cwd="/out").output == "/\n"


class TestImports:
    def test_nothing_is_imported_after_the_root_was_entered(self, lab, monkeypatch):
        """A module planted where the runtime would look for it, as the class of CVE-2019-14271."""
        evil = "open('/pwned', 'w').write('x')\nraise SystemExit(0)\n"
        for directory in ("usr/lib/python3.13", "usr/lib/python3.13/encodings", str(Path.cwd()).lstrip("/")):
            (lab.plant / directory).mkdir(parents=True, exist_ok=True)
            for name in ("json", "idna", "traceback", "wsgiref", "colorsys"):
                (lab.plant / directory / f"{name}.py").write_text(evil)

        def become(plan, root, *rest, original=program.become):
            for name in ("wsgiref", "colorsys", "xml.dom"):
                sys.modules.pop(name, None)  # other tests of this process may have needed it
                with contextlib.suppress(ImportError):
                    __import__(name)
                    os.close(os.open("/imported", os.O_CREAT | os.O_WRONLY))
            with contextlib.suppress(LookupError):
                "x".encode("idna")
            return original(plan, root, *rest)

        monkeypatch.setattr(program, "become", become)
        assert lab.run("true").code == 0
        assert not (lab.upper / "pwned").exists()
        assert not (lab.upper / "imported").exists()


class TestSetupIsOutOfReach:
    def test_init_is_not_dumpable_while_it_waits(self, lab):
        """CVE-2019-5736's class: a container that may look into the runtime's process."""
        container = lab.create(lab.spec("true"))
        stat = Path(f"/proc/{container.init.pid}/mem").stat()
        assert stat.st_uid == 0
        assert dumpable(container.init.pid) is False

    def test_a_waiting_init_holds_no_descriptor_of_the_host(self, lab):
        held = os.open("/etc/shadow", os.O_RDONLY)
        container = lab.create(lab.spec("true"))
        os.close(held)
        links = [str(link.readlink()) for link in Path(f"/proc/{container.init.pid}/fd").iterdir()]
        assert all(link.startswith("socket:") or link == "/dev/null" for link in links)
        assert len(links) == 4

    def test_a_waiting_init_has_given_up_its_privilege(self, lab):
        container = lab.create(lab.spec("true"), user="bob")
        status = Path(f"/proc/{container.init.pid}/status").read_text()
        assert "Uid:\t1000\t1000\t1000\t1000" in status
        assert "CapBnd:\t00000000a80425fb" in status
        assert "NoNewPrivs:\t1" in status


def dumpable(pid: int) -> bool:
    """An ordinary process's files in /proc belong to its user; those of a non-dumpable one always to root."""
    child = Path(f"/proc/{pid}")
    return child.stat().st_uid != 0 or _same_user_can_read(child)


def _same_user_can_read(child: Path) -> bool:
    reader, writer = os.pipe()
    pid, pidfd = process.clone(0)
    if pid == 0:
        # As many as the container's own processes have: with fewer nobody is let in, dumpable or not.
        held = capabilities.mask_of(defaults.CAPABILITIES)
        capabilities.set_process(effective=held, permitted=held, inheritable=0)
        try:
            (child / "exe").readlink()
            os.write(writer, b"read")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    seen = os.read(reader, 10)
    os.close(reader)
    return bool(seen)


class TestHostileContainer:
    """It has changed its own root since it began; exec must not be fooled."""

    def test_a_false_null_is_not_used(self, lab, running):
        lab.exec(running, "rm /dev/null; echo evil > /dev/null")
        with pytest.raises(ExecFailed, match="not the null device"):
            running.exec(lab.process("true"), stdio=Stdio())

    def test_a_null_that_blocks_is_not_waited_for(self, lab, running):
        lab.exec(running, "rm /dev/null; mkfifo /dev/null")
        with pytest.raises(ExecFailed, match="null"):
            running.exec(lab.process("true"), stdio=Stdio())

    @pytest.mark.parametrize(
        "passwd",
        [
            "ln -sf /proc/self/environ /etc/passwd",
            "rm /etc/passwd; mkfifo /etc/passwd",
            "rm /etc/passwd; mkdir /etc/passwd",
            "ln -sf /dev/zero /etc/passwd",
            "ln -sf /etc/passwd /etc/passwd",
            "dd if=/dev/urandom of=/etc/passwd bs=64k count=16 2>/dev/null",
            "dd if=/dev/zero of=/etc/passwd bs=1 count=1 seek=8g 2>/dev/null",
            "yes evil:x:0x0:0::: | head -c 3000000 > /etc/passwd",
            "echo evil:x:4294967296:0:::/bin/sh > /etc/passwd",
            "echo evil:x:-1:0:::/bin/sh > /etc/passwd",
        ],
    )
    def test_a_hostile_passwd_makes_nobody_root(self, lab, running, passwd):
        lab.exec(running, passwd)
        began = time.monotonic()
        with pytest.raises(ExecFailed) as failed:
            lab.exec(running, "id -u", user="evil")
        assert failed.value.kind == SETUP
        assert "1234" in lab.exec(running, "grep Uid /proc/self/status", user="1234").output
        assert time.monotonic() - began < 30

    def test_a_number_is_never_a_name(self, lab, running):
        lab.exec(running, "echo '1000:x:0:0:::/bin/sh' > /etc/passwd")
        assert lab.exec(running, "grep Uid /proc/self/status", user="1000").output.split()[1:] == ["1000"] * 4

    def test_a_program_that_is_the_runtime_cannot_be_written(self, lab, running):
        """CVE-2019-5736: the container's program is /proc/self/exe, the interpreter that runs exec."""
        script = "#!/proc/self/exe\n"
        lab.exec(running, "printf '%s' '" + script + "' > /evil; chmod 755 /evil")
        with contextlib.suppress(ExecFailed):
            lab.exec(running, "/evil", "x")

    def test_a_replaced_proc_is_not_trusted(self, lab):
        """CVE-2025-52881: writes meant for procfs that land elsewhere. Exec writes to no file of the container's."""
        held = ("CAP_SYS_ADMIN",)
        spec = lab.spec("sleep", "60", linux={"seccomp": None})
        capabilities = replace(spec.process.capabilities, bounding=held, effective=held, permitted=held)
        spec = replace(spec, process=replace(spec.process, capabilities=capabilities))
        container = lab.create(spec)
        container.start()
        result = lab.exec(container, "mount -t tmpfs none /proc && ls /proc | wc -l", capabilities=None)
        assert result.output == "0\n"
        assert lab.exec(container, "echo", "fine", oom_score_adj=500, capabilities=None).output == "fine\n"


def test_steps_describe_themselves(lab):
    """--debug prints the list."""
    spec = lab.spec("true", mounts=[Mount("/data", "bind", "/srv", ("rbind", "ro"))])
    steps = plan.steps_of(spec, bundle="/b", rootfs=lab.rootfs(), cgroups=[], console_size=None)
    lines = [step.describe() for step in steps]
    assert "/data: bind of /srv" in lines
    assert all(lines)
