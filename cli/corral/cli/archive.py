"""`corral save` and `load`: images as archives."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from corral.cli.app import App, ImageName, pass_app
from corral.cli.progress import shown

if TYPE_CHECKING:
    from corral.api.images.v1 import images_pb2

_CHUNK = 256 * 1024
STANDARD = "-"
keep_blobs_option = click.option(
    "--keep-blobs",
    type=bool,
    default=None,
    metavar="true|false",
    help="false: drop what layers came as once they are unpacked, if it can be made again byte for byte",
)


def bring_in(app: App, archive: str, header: "images_pb2.ImportHeader", *, quiet: bool) -> "list[images_pb2.Image]":
    """Import a file, an OCI layout's directory, or what stdin yields."""
    images: list[images_pb2.Image] = []
    with ExitStack() as stack:
        if archive != STANDARD and Path(archive).is_dir():
            chunks = _tar_of_layout(Path(archive))
        else:
            file = _open_archive(archive, stack)
            header.total_bytes = 0 if archive == STANDARD else os.fstat(file.fileno()).st_size
            chunks = iter(lambda: file.read(_CHUNK), b"")
        for part in shown(app.client.images.load_stream(header, chunks), quiet=quiet, lines=False):
            images.extend(part.result.images)
    return images


def _open_archive(archive: str, stack: ExitStack) -> BinaryIO:
    if archive != STANDARD:
        return stack.enter_context(Path(archive).open("rb"))
    if sys.stdin.isatty():
        raise click.UsageError("the archive would come from the terminal: give a file, or pipe one in")
    return sys.stdin.buffer


def _tar_of_layout(directory: Path) -> Iterator[bytes]:
    """An OCI layout directory as the tar that the service reads, made as it goes. Raises ValueError, OSError."""
    import tarfile

    if not (directory / "oci-layout").exists():
        raise ValueError(f"{directory} is a directory without oci-layout: give an OCI layout, or an archive file")
    found = (Path(above, name) for above, _, names in os.walk(directory, followlinks=True) for name in names)
    for path in sorted(path for path in found if path.is_file()):
        with path.open("rb") as file:
            info = tarfile.TarInfo(str(path.relative_to(directory)))
            info.size = left = os.fstat(file.fileno()).st_size
            yield info.tobuf(tarfile.PAX_FORMAT)
            while left and (data := file.read(min(_CHUNK, left))):
                left -= len(data)
                yield data
        if left:
            raise ValueError(f"{path} became shorter while it was read: import the layout again when it is finished")
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def write_out(chunks: Iterator[bytes], output: str) -> None:
    """Write to a file, which is there when it is whole, or to stdout if that is no terminal."""
    if output != STANDARD:
        from corral.client.files import whole_file

        with whole_file(Path(output)) as file:
            file.writelines(chunks)
        return
    if sys.stdout.isatty():
        raise click.UsageError("an archive is nothing for a terminal: give a file with -o, or pipe it on")
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


output_option = click.option(
    "-o", "--output", default=STANDARD, metavar="FILE", help="Where to write; - is stdout, the default"
)


@click.command("save")
@output_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["docker", "oci"]),
    default="docker",
    show_default=True,
    help="docker has manifest.json beside the OCI layout; oci is the layout alone",
)
@click.option("--platform", default="", metavar="OS/ARCH[/VARIANT]", help="Only this platform; else all that is here")
@click.argument("names", nargs=-1, required=True, type=ImageName())
@pass_app
def save_command(app: App, names: tuple[str, ...], output: str, form: str, platform: str) -> None:
    """Write images to an archive, with the digests that they have."""
    write_out(app.client.images.save_stream(names, form=form, platform=platform), output)


export_command = click.Command("export", params=save_command.params, callback=save_command.callback, help="As save.")


@click.command("load")
@click.option(
    "-i", "--input", "archive", default=STANDARD, metavar="FILE", help="What to read; - is stdin, the default"
)
@click.option("--platform", default="", metavar="OS/ARCH[/VARIANT]", help="What to unpack of an index")
@click.option("-q", "--quiet", is_flag=True, help="Only the names")
@pass_app
def load_command(app: App, archive: str, platform: str, quiet: bool) -> None:
    """Take images, with their names, from an archive that `save`, docker, podman or skopeo wrote."""
    from corral.api.images.v1 import images_pb2
    from corral.client.options import platform_message

    header = images_pb2.ImportHeader(platform=platform_message(platform))
    for image in bring_in(app, archive, header, quiet=quiet):
        named = f"Loaded image: {image.familiar_name}" if image.name else f"Loaded image ID: {image.id}"
        click.echo((image.familiar_name or image.id) if quiet else named)
