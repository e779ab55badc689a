"""linux.mountLabel: which file systems of a container are labelled by it."""

from corral.oci import mount_options
from corral.oci.image_mounts import ImageMount
from corral.oci.labels import labelled
from corral.oci.mounts import NewFilesystem
from corral.oci.secret_files import SecretFile, SecretFiles

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def new(fstype: str, *options: str) -> NewFilesystem:
    return NewFilesystem("/x", fstype, "", mount_options.parse(options))


def test_secrets_and_trees_of_images_are_labelled_as_all_that_is_new() -> None:
    secrets = SecretFiles((SecretFile("/run/secrets/a", 0, 0, 0o444, b"x"),))
    overlay = ImageMount("/x", new("overlay", "lowerdir=/a:/b"), bound=False)
    first, second, third = labelled([new("tmpfs", "size=1m"), overlay, secrets], LABEL)
    assert isinstance(first, NewFilesystem)
    assert first.options.data == ("size=1m", f"context={LABEL}")
    assert isinstance(second, ImageMount)
    assert second.tree.options.data == ("lowerdir=/a:/b", f"context={LABEL}")
    assert isinstance(third, SecretFiles)
    assert (third.context, third.files) == (LABEL, secrets.files)


def test_what_is_the_hosts_or_the_kernels_keeps_its_labels() -> None:
    steps = [new("proc"), ImageMount("/x", new("bind", "bind"), bound=True)]
    assert labelled(steps, LABEL) == steps
