"""From a specification to the list of steps that set a container up. Pure: nothing here touches the kernel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from corral.kernel.mount import MOUNT_ATTR_RDONLY, MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE
from corral.kernel.namespaces import Kind
from corral.oci import mount_options
from corral.oci.cgroup_mounts import CgroupMount
from corral.oci.devices import Console, DefaultDevices, DefaultLinks, DeviceNode
from corral.oci.masks import MaskedPaths, ReadonlyPaths
from corral.oci.mount_options import Attributes
from corral.oci.mounts import (
    BindMount,
    NewFilesystem,
    ReadonlyRoot,
    ReadonlyTmpfs,
    Remount,
    RootFilesystem,
    WorkingDirectory,
)
from corral.oci.spec import IdMapping, Mount, Spec
from corral.oci.stage import IdMap, Step

if TYPE_CHECKING:  # loaded for those who ask for it
    from corral.oci.image_mounts import ImageMount

PROPAGATION = {
    "": MS_PRIVATE,
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE,
    "slave": MS_SLAVE,
    "rslave": MS_SLAVE,
    "shared": MS_SHARED,
    "rshared": MS_SHARED,
    "unbindable": MS_UNBINDABLE,
    "runbindable": MS_UNBINDABLE,
}


def steps_of(
    spec: Spec,
    *,
    bundle: str,
    rootfs: Sequence[Mount],
    cgroups: Sequence[str],
    console_size: tuple[int, int] | None,
    hooks: Step | None = None,
    secrets: Step | None = None,
    images: "Sequence[ImageMount]" = (),
) -> list[Step]:
    """The steps of a container's root, in order. Raises ValueError naming the member that can't be honoured.

    hooks: what is to be done once all is mounted; what it puts there is masked, or made read-only, as all else.
    secrets: what comes after all mounts that were asked for. images: what comes among those.
    """
    root = _root(spec, bundle, rootfs)
    steps: list[Step] = [root]
    steps += [_mount(mount, f"rootfs[{i}]", bundle, cgroups, spec) for i, mount in enumerate(rootfs) if i > 0]
    mounts = [_mount(mount, f"mounts[{i}]", bundle, cgroups, spec) for i, mount in enumerate(spec.mounts)]
    if images:
        from corral.oci.image_mounts import laid_in

        mounts = laid_in([(mount.destination, step) for mount, step in zip(spec.mounts, mounts, strict=True)], images)
    steps += mounts
    if secrets is not None:
        steps.append(secrets)
    steps.append(DefaultDevices())
    steps += [DeviceNode(device) for device in spec.linux.devices]
    steps.append(DefaultLinks())
    if spec.process is not None and spec.process.terminal:
        steps.append(Console(console_size))
    if spec.process is not None and spec.process.cwd != "/":
        steps.append(WorkingDirectory(spec.process.cwd))
    if spec.linux.mount_label:
        from corral.oci.labels import labelled

        steps = labelled(steps, spec.linux.mount_label)
    if hooks is not None:
        steps.append(hooks)
    if spec.linux.readonly_paths:
        steps.append(ReadonlyPaths(spec.linux.readonly_paths))
    if spec.linux.masked_paths:
        steps.append(MaskedPaths(tuple(dict.fromkeys(spec.linux.masked_paths))))
    steps.append(ReadonlyTmpfs())
    if (spec.root is not None and spec.root.readonly) or root.options.attributes.set & MOUNT_ATTR_RDONLY:
        steps.append(ReadonlyRoot())
    return steps


def _root(spec: Spec, bundle: str, rootfs: Sequence[Mount]) -> RootFilesystem:
    propagation = MS_SLAVE if PROPAGATION[spec.linux.rootfs_propagation] == MS_SLAVE else MS_PRIVATE
    if rootfs:
        mount = rootfs[0]
        options = _options(mount, "rootfs[0]")
        is_part = mount.source.startswith("@")  # see corral.oci.parts
        source = _from(bundle, mount.source) if options.bind and not is_part else mount.source
        return RootFilesystem(mount.type, source, options, propagation, _idmap(mount, options, spec, "rootfs[0]"))
    if spec.root is None:
        raise ValueError("root: missing")
    options = mount_options.MountOptions(bind=True, bind_recursive=True, attributes=Attributes())
    return RootFilesystem("bind", _from(bundle, spec.root.path), options, propagation)


def _from(bundle: str, path: str) -> str:
    """A path of config.json, which may be relative to the bundle."""
    return (path if path.startswith("/") else f"{bundle}/{path}").rstrip("/") or "/"


def _options(mount: Mount, path: str) -> mount_options.MountOptions:
    options = list(mount.options)
    if mount.type in ("bind", "rbind") and not {"bind", "rbind"} & set(options):
        options.append(mount.type)
    if mount.type == "tmpfs":
        options = [option for option in options if option not in mount_options.OF_ACLS]
    try:
        return mount_options.parse(options)
    except ValueError as e:
        raise ValueError(f"{path}.options: {e}") from e


def _mount(mount: Mount, path: str, bundle: str, cgroups: Sequence[str], spec: Spec) -> Step:
    options = _options(mount, path)
    if not mount.destination:
        raise ValueError(f"{path}.destination: missing")
    if options.bind:
        if not mount.source:
            raise ValueError(f"{path}.source: missing")
        if options.fill:
            import corral.oci.copy_up
        source = _from(bundle, mount.source)
        return BindMount(mount.destination, source, options, _idmap(mount, options, spec, path))
    if mount.uid_mappings or mount.gid_mappings or options.idmap:
        raise ValueError(f"{path}: only a bind mount can have ids of its own")
    if options.fill:
        raise ValueError(f"{path}.options: copyup is for a bind mount")
    if options.remount:
        return Remount(mount.destination, options)
    if options.copy_up:
        if mount.type != "tmpfs":
            raise ValueError(f"{path}.options: tmpcopyup is for a tmpfs")
        import corral.oci.copy_up  # noqa: F401 - for init, which imports nothing
    if mount.type in ("cgroup", "cgroup2"):
        return CgroupMount(mount.destination, tuple(cgroups), options)
    if not mount.type:
        raise ValueError(f"{path}.type: missing")
    return NewFilesystem(mount.destination, mount.type, mount.source, options)


def _idmap(mount: Mount, options: mount_options.MountOptions, spec: Spec, path: str) -> IdMap | None:
    """The ids of an id-mapped bind mount: its own or, where it has none, those of the container's user namespace."""
    if not (mount.uid_mappings or mount.gid_mappings or options.idmap):
        return None
    from corral.oci.confinement import check_ranges

    uids, gids, namespace = mount.uid_mappings, mount.gid_mappings, ""
    if not uids and not gids:
        uids, gids = spec.linux.uid_mappings, spec.linux.gid_mappings
        namespace = joined(spec).get(Kind.USER, "")
        if not namespace and not uids:
            raise ValueError(f"{path}.options: idmap without uidMappings takes a user namespace of the container's own")
    elif not uids or not gids:
        raise ValueError(f"{path}.{'gidMappings' if uids else 'uidMappings'}: missing")
    for name, mappings in (("uidMappings", uids), ("gidMappings", gids)):
        check_ranges(mappings, f"{path}.{name}")
    if namespace:
        return IdMap((), (), namespace, options.idmap_recursive, path)
    return IdMap(ranges(uids), ranges(gids), "", options.idmap_recursive, path)


def idmaps_of(steps: Sequence[Step]) -> tuple[IdMap, ...]:
    """All that the steps need."""
    return tuple(each.idmap for each in steps if isinstance(each, _CLONES) and each.idmap is not None)


_CLONES = (BindMount, RootFilesystem)


def ranges(mappings: Sequence[IdMapping]) -> tuple[tuple[int, int, int], ...]:
    """As the kernel takes them."""
    return tuple((each.container_id, each.host_id, each.size) for each in mappings)


def mount_step(mount: Mount) -> NewFilesystem:
    """The step of a file system of the container's own."""
    return NewFilesystem(mount.destination, mount.type, mount.source, _options(mount, mount.destination))


def joined(spec: Spec) -> dict[Kind, str]:
    """The namespaces to join, and where they are."""
    return {namespace.type: namespace.path for namespace in spec.linux.namespaces if namespace.path}


def created(spec: Spec) -> set[Kind]:
    """The namespaces to make."""
    return {namespace.type for namespace in spec.linux.namespaces if not namespace.path}
