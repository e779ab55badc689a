"""What a configuration, or an image's database, says to steer the host by: values that pass as something else."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import cgroups
from support.ocicommand import Runtime, runtime_in
from support.requirements import needs

from corral.kernel.cgroup import Cgroup, Driver, detect
from corral.kernel.namespaces import Kind
from corral.oci.runtime import SETUP, ExecFailed
from corral.oci.spec import IdMapping, Mount, Namespace, Spec
from corral.oci.users import MAX_GROUPS

pytestmark = needs("root", "overlayfs", "busybox")

OF_THE_HOST = Path("/proc/sys/vm/stat_interval")
"""A kernel parameter of no namespace."""
FIRST = 300000


@pytest.fixture
def hosts_parameter() -> Iterator[str]:
    """Its value, put back in the end; "7" is another one."""
    before = OF_THE_HOST.read_text()
    assert before.strip() != "7"
    try:
        yield before
    finally:
        OF_THE_HOST.write_text(before)


class TestCve20220811:
    """A parameter of the container's namespaces, whose name or value is taken for one of the host's as well."""

    @pytest.mark.parametrize("name", ["kernel.shm_rmid_forced", "net.ipv4.ip_unprivileged_port_start"])
    @pytest.mark.parametrize("separator", ["+", "\n", " ", ",", "\0", "\n\n"])
    def test_cve_2022_0811_by_its_value(self, lab, hosts_parameter, name, separator):
        with contextlib.suppress(ExecFailed, ValueError):
            lab.run("true", linux={"sysctl": {name: f"1{separator}vm.stat_interval=7"}})
        assert OF_THE_HOST.read_text() == hosts_parameter

    @pytest.mark.parametrize(
        "name",
        [
            *("vm.stat_interval", "vm/stat_interval", "net/../vm/stat_interval", "net.//vm.stat_interval"),
            *("net/ipv4/../../vm/stat_interval", "kernel.shm_rmid_forced/../../vm/stat_interval", "/vm/stat_interval"),
            *("fs/mqueue/../../vm/stat_interval", "net..vm.stat_interval", "user/../vm/stat_interval"),
        ],
    )
    def test_cve_2022_0811_by_its_name(self, lab, hosts_parameter, name):
        with pytest.raises((ValueError, ExecFailed), match="sysctl"):
            lab.run("true", linux={"sysctl": {name: "7"}})
        assert OF_THE_HOST.read_text() == hosts_parameter


WRITE_ALL = """
for procs in $(find /sys/fs/cgroup -name cgroup.procs); do
    echo found
    mkdir ${procs%/*}/corral-attack && { echo written; rmdir ${procs%/*}/corral-attack; }
    echo 0 > $procs && echo written
done 2>/dev/null
grep ' - cgroup' /proc/self/mountinfo | grep -v ' ro,' && echo written
echo end
"""


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A cgroup for one container."""
    driver = Driver(detect())
    made = driver.create(cgroups.fresh_path())
    try:
        yield made
    finally:
        made.remove()
        driver.prune(made.path.rpartition("/")[0])


class TestCgroups:
    def test_cve_2022_0492_no_cgroup_tells_the_host_what_to_run(self, lab, group):
        """release_agent of v1 is a program of the host's: who writes it, in the root of a hierarchy, is root there."""
        script = (
            "find /sys/fs/cgroup -name release_agent; mkdir /tmp/cg; "
            "for kind in cgroup cgroup2; do mount -t $kind none /tmp/cg && echo mounted; done; "
            "mount -t cgroup -o memory none /tmp/cg && echo mounted; unshare -Ur true && echo unshared; "
            f"{WRITE_ALL}"
        )
        said = lab.run(script, options={"cgroup_paths": group.directories}).output.splitlines()
        assert said[-1] == "end"
        assert "found" in said
        assert not [line for line in said if line in ("mounted", "unshared", "written") or line.startswith("/")]

    def test_they_hold_no_programs_and_no_devices_whatever_is_asked(self, lab, group):
        spec = lab.spec("grep ' - cgroup' /proc/self/mountinfo")
        options = ("rw", "suid", "dev", "exec")
        mounts = tuple(replace(m, options=options) if m.type == "cgroup" else m for m in spec.mounts)
        seen = lab.run_spec(replace(spec, mounts=mounts), cgroup_paths=group.directories).output
        assert seen
        assert all({"nosuid", "nodev", "noexec"} <= set(line.split()[5].split(",")) for line in seen.splitlines())

    def test_cve_2023_25809_cgroups_of_others_are_to_look_at_only(self, lab):
        """A user namespace without a cgroup namespace: the host's hierarchies are all that can be shown."""
        os.chown(lab.upper, FIRST, FIRST)
        spec = in_user_namespace(lab.spec(WRITE_ALL), without=Kind.CGROUP)
        mounts = tuple(replace(m, options=("rw",)) if m.type == "cgroup" else m for m in spec.mounts)
        said = lab.run_spec(replace(spec, mounts=mounts)).output
        assert said.endswith("end\n")
        assert "written" not in said


def in_user_namespace(spec: Spec, *, without: Kind) -> Spec:
    kinds = (*(each for each in spec.linux.namespaces if each.type is not without), Namespace(Kind.USER))
    mappings = (IdMapping(0, FIRST, 65536),)
    return replace(spec, linux=replace(spec.linux, namespaces=kinds, uid_mappings=mappings, gid_mappings=mappings))


class TestCve202647262:
    """A group database without end, or with more groups than a process can have."""

    @pytest.mark.parametrize("how", ["create", "exec"])
    @pytest.mark.parametrize("count", [MAX_GROUPS + 1, 200_000])
    def test_cve_2026_47262_more_groups_than_there_can_be_are_refused(self, lab, how, count):
        """Were some left out, the user could do what a group that is left out may not (CVE-2022-36109)."""
        text = "".join(f"g{number}:x:{number}:bob\n" for number in range(100, 100 + count))
        began = time.monotonic()
        with pytest.raises(ExecFailed, match=r"user bob is in more groups|larger than") as failed:
            self.become_bob(lab, how, text)
        assert failed.value.kind == SETUP
        assert time.monotonic() - began < 15

    @pytest.mark.parametrize("how", ["create", "exec"])
    def test_cve_2026_47262_a_file_without_end_is_not_read_to_its_end(self, lab, how):
        began = time.monotonic()
        with pytest.raises(ExecFailed, match="larger than"):
            self.become_bob(lab, how, "x:x:1:" + "bob," * (2 << 20))
        assert time.monotonic() - began < 5

    @staticmethod
    def become_bob(lab, how: str, group: str) -> None:
        (lab.plant / "etc").mkdir()
        (lab.plant / "etc/group").write_text(group)
        if how == "create":
            lab.run("true", user="bob")
        else:
            container = lab.create(lab.spec("sleep", "60"))
            container.start()
            lab.exec(container, "true", "", user="bob")


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


def test_cve_2024_3154_annotations_of_a_container_run_nothing_on_the_host(oci: Runtime):
    """Clients make them of what users, and images, say. Other runtimes take orders from some."""
    marker = oci.directory / "pwned"
    touch = f"/bin/touch {marker}"
    spec = oci.spec("id -G; grep NoNewPrivs /proc/self/status; readlink /proc/self/exe")
    spec["annotations"] = {
        "org.systemd.property.ExecStopPost": f"[('/bin/touch', ['/bin/touch', '{marker}'], false)]",
        "org.systemd.property.OnFailure": "['evil.service']",
        "run.oci.hooks.stdout": str(marker),
        "run.oci.hooks.stderr": str(marker),
        "run.oci.handler": "krun",
        "run.oci.keep_original_groups": "1",
        "run.oci.seccomp.receiver": str(marker),
        "run.oci.systemd.subgroup": "../../evil",
        "run.oci.delegate-cgroup": "../../evil",
        "io.containers.trace-syscall": f"of:{marker}",
        "org.criu.config": touch,
        "com.docker.runc.exec": touch,
    }
    oci.write_spec(spec)
    oci.ok("run", oci.new_id(), extra_groups=[4321])
    assert not marker.exists()


CLIMBS = "`..` components are not allowed"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("..", CLIMBS),
        ("../../other", CLIMBS),
        ("/x/../../other", CLIMBS),
        ("memory:../other", CLIMBS),
        ("memory:/other", "/{name}/other: no such file or directory"),  # of the container's own
    ],
)
def test_a_cgroup_of_exec_is_none_of_others(oci: Runtime, path: str, why: str):
    name = oci.sleeping()
    refused = oci.call("exec", "--cgroup", path, name, "true")
    assert refused.returncode != 0
    assert why.format(name=name) in refused.stderr


def test_cve_2024_25621_state_is_for_root_alone(oci: Runtime):
    before = os.umask(0)
    try:
        name = oci.sleeping()
    finally:
        os.umask(before)
    kept = [oci.root, *oci.root.rglob("*")]
    assert {path.name for path in kept} >= {name, "state.json", "config.json"}
    assert [path for path in kept if path.lstat().st_mode & 0o077] == []


def test_a_mount_of_the_specification_climbs_no_higher_than_the_root(lab):
    """And what it names there is the container's, though the host has it too."""
    (lab.plant / "inside").write_text("inside")
    source = lab.directory / "source"
    source.write_text("source")
    mount = Mount("/../../../../../../../../inside", "bind", str(source), ("bind",))
    assert lab.run("cat", "/inside", mounts=[mount]).output == "source"
