"""What a process is given of the machine: scheduler, priorities, CPUs, memory, personality."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support.requirements import needs

from corral.kernel.namespaces import Kind
from corral.kernel.syscalls import MACHINE
from corral.oci.errors import SETUP, ExecFailed
from corral.oci.scheduling import CPUAffinity, IOPriority, MemoryPolicy, Personality, Scheduler
from corral.oci.spec import IdMapping, Namespace

pytestmark = needs("root", "overlayfs", "busybox", "userns")

# Tells the scheduler, the priority of I/O, the memory policy and the CPUs of the process that runs it.
PROBE = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) {
    struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period;
             uint32_t util[2]; } a = {0};
    int mode = -1; unsigned long nodes[128] = {0};
    syscall(SYS_sched_getattr, 0, &a, sizeof a, 0);
    long io = syscall(SYS_ioprio_get, 1, 0);
    syscall(SYS_get_mempolicy, &mode, nodes, 128 * 64, 0, 0);
    printf("{\"policy\": %u, \"flags\": %lu, \"nice\": %d, \"priority\": %u, \"runtime\": %lu, \"period\": %lu, "
           "\"io_class\": %ld, \"io\": %ld, \"mode\": %d, \"nodes\": %lu}\n", a.policy, (unsigned long) a.flags, a.nice,
           a.priority, (unsigned long) a.runtime, (unsigned long) a.period, io >> 13, io & 7, mode, nodes[0]);
    return 0;
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    directory = tmp_path_factory.mktemp("probe")
    (directory / "probe.c").write_text(PROBE)
    command = ["gcc", "-static", "-O1", "-o", str(directory / "probe"), str(directory / "probe.c")]
    subprocess.run(command, check=True, capture_output=True)
    return directory / "probe"


@pytest.fixture
def ask(lab, probe):
    """Run the probe in a container: what it found."""
    shutil.copy(probe, lab.plant / "probe")

    def run(linux: dict[str, object] | None = None, **changes: object) -> dict[str, int]:
        result = lab.run("/probe", "x", linux=(linux or {}) | {"seccomp": None}, **changes)
        assert result.code == 0, result.output
        return json.loads(result.output)

    return run


class TestScheduler:
    @pytest.mark.parametrize(
        ("scheduler", "facts"),
        [
            (Scheduler("SCHED_BATCH", nice=5), {"policy": 3, "nice": 5}),
            (Scheduler("SCHED_OTHER", nice=-3), {"policy": 0, "nice": -3}),
            (Scheduler("SCHED_IDLE"), {"policy": 5}),
            (Scheduler("SCHED_FIFO", priority=7), {"policy": 1, "priority": 7}),
            (Scheduler("SCHED_RR", priority=8, flags=("SCHED_FLAG_RESET_ON_FORK",)), {"policy": 2, "flags": 1}),
            (
                Scheduler("SCHED_DEADLINE", runtime=10_000_000, deadline=30_000_000, period=40_000_000),
                {"policy": 6, "runtime": 10_000_000, "period": 40_000_000},
            ),
        ],
    )
    @pytest.mark.parametrize("no_new_privileges", [True, False])
    def test_is_the_programs(self, ask, scheduler, facts, no_new_privileges):
        found = ask(scheduler=scheduler, no_new_privileges=no_new_privileges, user="bob")
        assert found | facts == found

    @pytest.mark.parametrize(
        "scheduler",
        [
            Scheduler("SCHED_RR", priority=8, flags=("SCHED_FLAG_RESET_ON_FORK",)),
            Scheduler("SCHED_DEADLINE", runtime=10_000_000, deadline=30_000_000, period=40_000_000),
        ],
    )
    def test_is_that_of_a_process_that_joins_though_it_is_made_by_another(self, lab, probe, scheduler):
        """One that does not survive a fork, or is in the way of one, is set by the runtime."""
        shutil.copy(probe, lab.plant / "probe")
        container = lab.create(lab.spec("sleep", "60", linux={"seccomp": None}))
        container.start()
        found = json.loads(lab.exec(container, "/probe", "x", scheduler=scheduler).output)
        assert found["policy"] == {"SCHED_RR": 2, "SCHED_DEADLINE": 6}[scheduler.policy]

    def test_is_there_in_a_joined_pid_namespace(self, lab, probe):
        shutil.copy(probe, lab.plant / "probe")
        first = lab.create(lab.spec("sleep", "60"))
        first.start()
        scheduler = Scheduler("SCHED_DEADLINE", runtime=10_000_000, deadline=30_000_000, period=40_000_000)
        spec = lab.spec("/probe", "x", linux={"seccomp": None}, scheduler=scheduler)
        joined = Namespace(Kind.PID, f"/proc/{first.init.pid}/ns/pid")
        kinds = tuple(joined if n.type is Kind.PID else n for n in spec.linux.namespaces)
        result = lab.run_spec(replace(spec, linux=replace(spec.linux, namespaces=kinds)))
        assert json.loads(result.output)["policy"] == 6

    def test_is_there_in_a_user_namespace(self, lab, probe):
        """Where nobody has the right to it: the runtime sets it."""
        shutil.copy(probe, lab.plant / "probe")
        spec = lab.spec("/probe", "x", linux={"seccomp": None}, scheduler=Scheduler("SCHED_FIFO", priority=3))
        mapping = (IdMapping(0, 100_000, 65536),)
        kinds = (*spec.linux.namespaces, Namespace(Kind.USER))
        linux = replace(spec.linux, namespaces=kinds, uid_mappings=mapping, gid_mappings=mapping)
        result = lab.run_spec(replace(spec, linux=linux))
        assert json.loads(result.output)["policy"] == 1

    def test_the_kernel_lacks_is_refused_by_name(self, lab):
        with pytest.raises(ExecFailed, match=r"^process\.scheduler: sched_setattr SCHED_ISO: ") as failed:
            lab.create(lab.spec("true", scheduler=Scheduler("SCHED_ISO")))
        assert failed.value.kind == SETUP


class TestIOPriority:
    @pytest.mark.parametrize(
        ("wanted", "facts"),
        [
            (IOPriority("IOPRIO_CLASS_BE", 7), (2, 7)),
            (IOPriority("IOPRIO_CLASS_RT", 3), (1, 3)),
            (IOPriority("IOPRIO_CLASS_IDLE", 0), (3, 0)),
        ],
    )
    def test_is_the_programs(self, ask, wanted, facts):
        found = ask(io_priority=wanted, user="bob")
        assert (found["io_class"], found["io"]) == facts

    def test_is_that_of_a_process_that_joins(self, lab, probe):
        shutil.copy(probe, lab.plant / "probe")
        container = lab.create(lab.spec("sleep", "60", linux={"seccomp": None}))
        container.start()
        wanted = IOPriority("IOPRIO_CLASS_BE", 6)
        found = json.loads(lab.exec(container, "/probe", "x", io_priority=wanted).output)
        assert (found["io_class"], found["io"]) == (2, 6)


class TestMemoryPolicy:
    @pytest.mark.parametrize(
        ("policy", "mode", "nodes"),
        [
            (MemoryPolicy("MPOL_BIND", "0"), 2, 1),
            (MemoryPolicy("MPOL_INTERLEAVE", "0", ("MPOL_F_STATIC_NODES",)), 3 | 1 << 15, 1),
            (MemoryPolicy("MPOL_PREFERRED", "0", ("MPOL_F_RELATIVE_NODES",)), 1 | 1 << 14, 1),
            (MemoryPolicy("MPOL_PREFERRED_MANY", "0"), 5, 1),
            (MemoryPolicy("MPOL_LOCAL"), 4, 0),
            (MemoryPolicy("MPOL_DEFAULT"), 0, 0),
        ],
    )
    def test_is_the_programs(self, ask, policy, mode, nodes):
        found = ask({"memory_policy": policy})
        assert (found["mode"], found["nodes"]) == (mode, nodes)

    def test_for_a_node_that_is_not_there_is_refused_by_name(self, lab):
        with pytest.raises(ExecFailed, match=r"^linux\.memoryPolicy: set_mempolicy MPOL_BIND: Invalid argument"):
            lab.create(lab.spec("true", linux={"memory_policy": MemoryPolicy("MPOL_BIND", "63")}))


@pytest.mark.skipif(MACHINE != "x86_64", reason="uname says something else on other machines")
class TestPersonality:
    def test_is_that_of_every_process(self, lab):
        container = lab.create(lab.spec("uname -m; exec sleep 60", linux={"personality": Personality("LINUX32")}))
        container.start()
        assert lab.exec(container, "uname", "-m").output == "i686\n"

    def test_linux_is_the_usual_one(self, lab):
        assert lab.run("uname", "-m", linux={"personality": Personality("LINUX")}).output == "x86_64\n"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
class TestAffinity:
    SHOW = "grep Cpus_allowed_list /proc/self/status"

    def exec(self, lab, affinity: CPUAffinity | None, own: CPUAffinity | None = None) -> str:
        before = os.sched_getaffinity(0)
        container = lab.create(lab.spec(f"{self.SHOW}; exec sleep 60", exec_cpu_affinity=own))
        container.start()
        output = lab.exec(container, self.SHOW, exec_cpu_affinity=affinity).output
        assert os.sched_getaffinity(0) == before
        return output.split()[-1]

    def test_the_final_one_counts(self, lab):
        assert self.exec(lab, CPUAffinity("0", "1")) == "1"

    def test_without_a_final_one_it_is_as_it_comes(self, lab):
        """The process is in the cgroup already, and that did not change it."""
        assert self.exec(lab, CPUAffinity("1", "")) == "1"

    def test_the_containers_own_counts_for_those_that_say_nothing(self, lab):
        assert self.exec(lab, None, CPUAffinity(final="0")) == "0"

    def test_is_not_for_init(self, lab):
        output = lab.run(self.SHOW, exec_cpu_affinity=CPUAffinity("0", "0")).output
        assert output.split()[-1] == Path("/proc/self/status").read_text().split("Cpus_allowed_list:")[1].split()[0]

    @pytest.mark.parametrize("member", ["initial", "final"])
    def test_for_a_cpu_that_is_not_there_is_refused_by_name(self, lab, member):
        before = os.sched_getaffinity(0)
        container = lab.create(lab.spec("sleep", "60"))
        container.start()
        with pytest.raises(ExecFailed, match=rf"^process\.execCPUAffinity\.{member}: Invalid argument"):
            lab.exec(container, "true", exec_cpu_affinity=CPUAffinity(**{member: "5000"}))
        assert os.sched_getaffinity(0) == before
