"""From a specification to all that init needs to know, computed before it is born."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from corral.kernel.namespaces import Kind
from corral.oci import plan as plans
from corral.oci.init import InitPlan
from corral.oci.program import program_of
from corral.oci.reaper import ANNOTATION
from corral.oci.spec import Hooks, Mount, Spec
from corral.oci.stage import Step
from corral.oci.state import State
from corral.oci.support import check_spec
from corral.oci.sysctl import check_sysctl

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.oci.hooks import InitHooks
    from corral.oci.image_mounts import ImageMount


def plan_of(
    spec: Spec,
    *,
    bundle: str,
    rootfs: Sequence[Mount],
    user: str | None,
    cgroups: Sequence[str],
    console_size: tuple[int, int] | None,
    new_keyring: bool = True,
    container_id: str = "",
    by_stone: bool = False,
    secrets: Step | None = None,
    images: "Sequence[ImageMount]" = (),
) -> InitPlan:
    """All that init needs to know. Raises ValueError naming the member that can't be honoured."""
    check_spec(spec)
    assert spec.process is not None
    sysctl = check_sysctl(spec.linux.sysctl, [namespace.type for namespace in spec.linux.namespaces])
    if spec.domainname and sysctl.get("kernel/domainname", spec.domainname) != spec.domainname:
        raise ValueError("linux.sysctl.kernel.domainname: domainname says something else")
    new = plans.created(spec)
    if console_size is None and (box := spec.process.console_size) is not None:
        console_size = (box.width, box.height)
    steps: list[Step] = []
    hooks, place = (None, bundle) if spec.hooks is None else _hooks(spec, spec.hooks, bundle, container_id)
    shares_mounts = all(namespace.type is not Kind.MOUNT for namespace in spec.linux.namespaces)
    if Kind.MOUNT in new or shares_mounts:
        steps = plans.steps_of(
            spec,
            bundle=bundle,
            rootfs=rootfs,
            cgroups=cgroups,
            console_size=console_size,
            hooks=hooks,
            secrets=secrets,
            images=images,
        )
    program = program_of(spec.process, spec.linux, user=user)
    return InitPlan(
        bundle=place,
        steps=tuple(steps),
        program=program,
        hostname=spec.hostname,
        domainname=spec.domainname,
        sysctl=sysctl,
        propagation=plans.PROPAGATION[spec.linux.rootfs_propagation],
        propagation_recursive=spec.linux.rootfs_propagation[:1] == "r",
        unshare=Kind.CGROUP.flag if Kind.CGROUP in new else 0,
        shares_mounts=shares_mounts,
        loopback=Kind.NETWORK in new,
        new_keyring=new_keyring,
        own=frozenset(new) if program.in_user_namespace else None,
        devices=_devices(spec),
        idmaps=plans.idmaps_of(steps),
        hooks=hooks,
        by_stone=by_stone,
        stays=_stays(spec),
    )


def _stays(spec: Spec) -> bool:
    if spec.annotations.get(ANNOTATION) != "true":
        return False
    if Kind.PID not in plans.created(spec):
        raise ValueError(f"annotations: {ANNOTATION} takes a PID namespace of the container's own")
    assert spec.process is not None
    if spec.process.apparmor_profile or spec.process.selinux_label:
        raise ValueError(f"annotations: {ANNOTATION} goes with no label of the process: it comes with an execve only")
    return True


def _hooks(spec: Spec, hooks: Hooks, bundle: str, container_id: str) -> "tuple[InitHooks, str]":
    """What init has to do with hooks; and where the root is put for them to see, which is where config.json says."""
    from corral.oci.hooks import InitHooks

    place = os.path.join(bundle, spec.root.path) if spec.root is not None else bundle  # noqa: PTH118 - as config.json
    state = State(container_id or os.path.basename(bundle), bundle, spec.annotations)  # noqa: PTH119 - likewise
    return InitHooks(hooks, state), place if os.path.isdir(place) else bundle  # noqa: PTH112 - likewise


def _devices(spec: Spec) -> tuple[str, ...]:
    if not spec.linux.net_devices:
        return ()
    from corral.oci.net_devices import names_inside

    return names_inside(spec.linux.net_devices)
