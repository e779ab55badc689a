"""What a specification may ask of the runtime core. What is not in here yet is refused by name, never ignored."""

from corral.kernel.namespaces import Kind
from corral.oci.spec import Linux, Process, Spec


def check_spec(spec: Spec) -> None:
    """Raise ValueError that begins with the JSON path of what can't be honoured."""
    kinds = {namespace.type for namespace in spec.linux.namespaces}
    if spec.process is None:
        raise ValueError("process: missing")
    linux = spec.linux
    if Kind.MOUNT not in kinds:
        _check_shared_mounts(linux)
    if Kind.USER in kinds or linux.uid_mappings or linux.gid_mappings or linux.time_offsets or linux.net_devices:
        from corral.oci.confinement import check_confinement

        check_confinement(spec)
    if (spec.hostname or spec.domainname) and Kind.UTS not in kinds:
        raise ValueError("hostname: the container shares the host's uts namespace")
    from corral.oci.plan import PROPAGATION  # who execs has no use for it

    if spec.linux.rootfs_propagation not in PROPAGATION:
        raise ValueError(f"linux.rootfsPropagation: {spec.linux.rootfs_propagation!r} is no propagation")
    if spec.linux.intel_rdt is not None:
        raise ValueError("linux.intelRdt: Intel RDT is not supported")
    if spec.linux.mount_label:
        from corral.oci.labels import check_mount_label

        check_mount_label(spec.linux.mount_label)
    check_process(spec.process)


def _check_shared_mounts(linux: Linux) -> None:
    """Into the host's mount namespace leads no way back from a user namespace; a time namespace has the same guide."""
    for namespace in linux.namespaces:
        if namespace.type is Kind.USER or (namespace.type is Kind.TIME and not namespace.path):
            kind = namespace.type.value
            raise ValueError(f"linux.namespaces: with a {kind} namespace a container needs a mount namespace, too")


def check_process(process: Process) -> None:
    """The same for a process object."""
    if process.apparmor_profile or process.selinux_label:
        from corral.oci.labels import check_labels

        check_labels(process)
