"""Namespaces new, shared with the host, or joined by path; and cgroups."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel import netns
from corral.kernel.namespaces import Kind
from corral.oci.runtime import ExecFailed, Stdio
from corral.oci.spec import Mount, Namespace

pytestmark = needs("root", "overlayfs", "busybox")

FILES = {kind: kind.file for kind in (Kind.MOUNT, Kind.PID, Kind.IPC, Kind.UTS, Kind.CGROUP, Kind.NETWORK)}


def namespace(pid: int | str, kind: Kind) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind.file}").readlink())


@pytest.mark.parametrize("kind", FILES)
def test_a_new_one_is_the_containers_own(lab, kind):
    container = lab.create(lab.spec("true"))
    assert namespace(container.init.pid, kind) != namespace("self", kind)


@pytest.mark.parametrize("kind", FILES)
def test_one_left_out_is_the_hosts(lab, kind):
    spec = lab.spec("sleep", "60")
    kept = tuple(item for item in spec.linux.namespaces if item.type is not kind)
    spec = replace(spec, hostname="" if kind is Kind.UTS else "box", linux=replace(spec.linux, namespaces=kept))
    container = lab.create(spec)
    container.start()
    assert namespace(container.init.pid, kind) == namespace("self", kind)
    assert lab.exec(container, f"readlink /proc/self/ns/{kind.file}").output.strip() == namespace("self", kind)


@pytest.mark.parametrize("kind", FILES)
def test_one_by_path_is_joined(lab, kind):
    first = lab.create(lab.spec("sleep", "60"))
    first.start()
    path = f"/proc/{first.init.pid}/ns/{kind.file}"
    spec = lab.spec("sleep", "60")
    namespaces = tuple(Namespace(kind, path) if n.type is kind else n for n in spec.linux.namespaces)
    second = lab.create(replace(spec, linux=replace(spec.linux, namespaces=namespaces)), rootfs=second_root(lab))
    second.start()
    assert namespace(second.init.pid, kind) == namespace(first.init.pid, kind)
    third = second.exec(lab.process("sleep", "60"), stdio=Stdio())
    lab.made.append(third)
    assert namespace(third.pid, kind) == namespace(first.init.pid, kind)


def second_root(lab) -> list[Mount]:
    """An overlay of its own: two may not share an upper directory."""
    for name in ("upper2", "work2"):
        (lab.directory / name).mkdir()
    options = (f"lowerdir={lab.busybox}", f"upperdir={lab.directory}/upper2", f"workdir={lab.directory}/work2")
    return [Mount(type="overlay", source="overlay", options=options)]


def test_a_pinned_network_namespace_is_joined(lab):
    path = lab.directory / "netns"
    netns.create_pinned(path)
    try:
        spec = lab.spec("readlink /proc/self/ns/net")
        namespaces = tuple(Namespace(n.type, str(path)) if n.type is Kind.NETWORK else n for n in spec.linux.namespaces)
        seen = lab.run_spec(replace(spec, linux=replace(spec.linux, namespaces=namespaces))).output
        assert seen == f"net:[{path.stat().st_ino}]\n"
    finally:
        netns.remove_pinned(path)


def test_a_new_network_has_its_loopback_up(lab):
    assert "127.0.0.1" in lab.run("ip addr show lo; ping -c1 -W1 127.0.0.1 >/dev/null || echo broken").output
    assert "broken" not in lab.run("ping -c1 -W1 127.0.0.1 >/dev/null || echo broken").output


def test_a_path_that_is_no_namespace_is_refused(lab):
    spec = lab.spec("true")
    namespaces = tuple(Namespace(n.type, "/etc/passwd") if n.type is Kind.IPC else n for n in spec.linux.namespaces)
    with pytest.raises(OSError, match="setns"):
        lab.create(replace(spec, linux=replace(spec.linux, namespaces=namespaces)))


def test_the_host_name_is_the_containers_own(lab):
    before = os.uname().nodename
    spec = lab.spec("hostname; cat /proc/sys/kernel/domainname", hostname="inside", domainname="example.org")
    assert lab.run_spec(spec).output == "inside\nexample.org\n"
    assert os.uname().nodename == before


def test_a_host_name_without_a_namespace_of_its_own_is_refused(lab):
    spec = lab.spec("true")
    kept = tuple(item for item in spec.linux.namespaces if item.type is not Kind.UTS)
    with pytest.raises(ValueError, match="hostname"):
        lab.create(replace(spec, linux=replace(spec.linux, namespaces=kept)))


class TestCgroups:
    def members(self, cgroup: Path) -> list[str]:
        return (cgroup / "cgroup.procs").read_text().split()

    def test_init_and_execs_are_members_of_all(self, cgroups, lab):
        container = lab.create(lab.spec("sleep", "60"), cgroup_paths=cgroups)
        container.start()
        handle = container.exec(lab.process("sleep", "60"), stdio=Stdio(), cgroup_paths=cgroups)
        lab.made.append(handle)
        for cgroup in cgroups:
            assert sorted(self.members(cgroup)) == sorted([str(container.init.pid), str(handle.pid)])

    def test_the_runtime_stays_where_it_is(self, cgroups, lab):
        before = Path("/proc/self/cgroup").read_text()
        lab.create(lab.spec("true"), cgroup_paths=cgroups)
        assert Path("/proc/self/cgroup").read_text() == before

    def test_the_containers_own_is_its_root(self, cgroups, lab):
        container = lab.create(lab.spec("sleep", "60"), cgroup_paths=cgroups)
        container.start()
        seen = lab.exec(container, "cat /proc/1/cgroup", cgroup_paths=cgroups).output
        joined = {path.parent.name for path in cgroups}
        for line in seen.splitlines():
            _, name, path = line.split(":")
            if name.removeprefix("name=") in joined or (not name and "unified" in joined):
                assert path == "/"

    def test_are_mounted_read_only_inside(self, cgroups, lab):
        script = "cat /proc/mounts | grep cgroup; find /sys/fs/cgroup -name cgroup.procs | sort; mkdir /sys/fs/cgroup/x"
        seen = lab.run(script, options={"cgroup_paths": cgroups}).output
        assert "Read-only file system" in seen
        lines = [line for line in seen.splitlines() if line.startswith("/sys/fs/cgroup")]
        if len(cgroups) > 1:
            assert lines == [f"/sys/fs/cgroup/{path.parent.name}/cgroup.procs" for path in cgroups]
        else:
            assert lines == ["/sys/fs/cgroup/cgroup.procs"]
        assert all(" ro," in line for line in seen.splitlines() if line.startswith("cgroup"))

    def test_show_the_container_only_itself(self, cgroups, lab):
        name = "" if len(cgroups) == 1 else "/memory"
        seen = lab.run(f"cat /sys/fs/cgroup{name}/cgroup.procs", options={"cgroup_paths": cgroups}).output
        assert all(int(pid) < 10 for pid in seen.split())

    def test_exec_into_a_paused_container_is_refused(self, cgroups, lab):
        container = lab.create(lab.spec("sleep", "60"), cgroup_paths=cgroups)
        container.start()
        freezer = next((p for p in cgroups if p.parent.name == "freezer"), cgroups[0])
        switch, frozen, thawed = (
            ("freezer.state", "FROZEN", "THAWED")
            if (freezer / "freezer.state").exists()
            else ("cgroup.freeze", "1", "0")
        )
        (freezer / switch).write_text(frozen)
        try:
            with pytest.raises(ExecFailed, match="paused"):
                lab.exec(container, "true", cgroup_paths=cgroups)
        finally:
            (freezer / switch).write_text(thawed)

    def test_a_limit_too_small_to_start_in_is_told(self, cgroups, lab):
        memory = next((p for p in cgroups if p.parent.name == "memory"), None)
        if memory is None:
            pytest.skip("needs the memory hierarchy of cgroup v1")
        (memory / "memory.limit_in_bytes").write_text("65536")
        with pytest.raises(ExecFailed, match="memory limit"):
            lab.create(lab.spec("true"), cgroup_paths=cgroups)

    def test_one_that_is_missing_is_named(self, lab):
        with pytest.raises(FileNotFoundError, match="corral-nowhere"):
            lab.create(lab.spec("true"), cgroup_paths=[Path("/sys/fs/cgroup/corral-nowhere")])
