"""What init is between Python and its program, so that no container gets at an interpreter that is not sealed.

A program that is a link to /proc/self/exe, or a script that asks to be run by it, executes what its process was before:
the runtime, whose file it can write to from then on (CVE-2019-5736). An interpreter that was sealed (corral.shim.seal)
may be written to by nobody, but has to be started once more for that, which takes longer than all the rest.

So init executes a few hundred bytes (corral.kernel.stone) first, in a sealed file of their own in memory. They wait for
start in its place, and then execute the program: all that a container gets at is those bytes, which it may have.

    init --execve--> stone: wait for start, at the gate if there is one --execve--> the program
                                                                        --fails---> an answer on corral.oci.channel

An execve more is not quite nothing: see suits(). What Python does in the end is in corral.oci.crossing.
"""

import os

from corral.kernel import stone
from corral.kernel.namespaces import Kind
from corral.kernel.privilege import is_hosts_root
from corral.oci.crossing import can_be_made
from corral.oci.plan import created
from corral.oci.reaper import ANNOTATION
from corral.oci.spec import Process, Seccomp, Spec

_OF_USE_AT_EXECVE = frozenset(("CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"))


def suits(spec: Spec) -> bool:
    """Whether a container is the same with one execve more, and nobody can see its init before that.

    It is not where a filter stands in the way, or tells somebody; where each execve changes the label; where the
    program may be executed by virtue of capabilities only that an execve takes away; where Python itself executes hooks
    inside. And others see init where they are in its PID namespace, or it is in an ordinary user's hands.
    """
    new, hooks = created(spec), spec.hooks
    return (
        spec.process is not None
        and os.uname().machine in stone.MACHINES
        and {Kind.PID, Kind.MOUNT} <= new
        and not any(namespace.type in (Kind.USER, Kind.TIME) for namespace in spec.linux.namespaces)
        and is_hosts_root()
        and _is_executed_alike(spec.process)
        and ANNOTATION not in spec.annotations
        and not (hooks is not None and (hooks.create_container or hooks.start_container))
        and _passes(spec.linux.seccomp)
        and can_be_made()
    )


def _is_executed_alike(spec: Process) -> bool:
    if not spec.args or spec.apparmor_profile or spec.selinux_label:
        return False
    return spec.user.uid == 0 or spec.capabilities is None or _OF_USE_AT_EXECVE.isdisjoint(spec.capabilities.effective)


def _passes(profile: Seccomp | None) -> bool:
    if profile is None:
        return True
    from corral.oci.seccomp import asks, lets_pass

    return lets_pass(profile, [asks(*stone.CALLS, "execveat")])
