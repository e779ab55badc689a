"""`corral image`."""

from typing import TYPE_CHECKING

import click

from corral.cli.app import App, ImageName, complain, pass_app
from corral.cli.archive import bring_in, export_command, keep_blobs_option, load_command, save_command
from corral.cli.history import history_command
from corral.cli.image_filters import find_images, parse_prune_filters
from corral.cli.mounting import mount_command, unmount_command
from corral.cli.output import format_option, human_age, human_size, show_json, show_rows
from corral.cli.registry import pull_command, push_command, referrers_command

if TYPE_CHECKING:
    from corral.api.images.v1 import images_pb2
    from corral.cli.output import Json


@click.group("image")
def image_command() -> None:
    """Images."""


image_command.add_command(pull_command)
image_command.add_command(push_command)
image_command.add_command(referrers_command)
image_command.add_command(save_command)
image_command.add_command(export_command)
image_command.add_command(load_command)
image_command.add_command(history_command)
image_command.add_command(mount_command)
image_command.add_command(unmount_command)


@image_command.command("import")
@click.option("--as", "name", default="", metavar="NAME:TAG", help="Name for the image")
@click.option("--entrypoint", multiple=True, help="Plain file system: entrypoint, one word each")
@click.option("--cmd", multiple=True, help="Plain file system: command, one word each")
@click.option("-e", "--env", multiple=True, help="Plain file system: NAME=VALUE")
@click.option("-w", "--workdir", "working_dir", default="", help="Plain file system: working directory")
@click.option("-u", "--user", default="", help="Plain file system: user")
@keep_blobs_option
@click.option("-q", "--quiet", is_flag=True, help="Only the names")
@click.argument("archive", type=click.Path(exists=True, dir_okay=True, allow_dash=True))
@click.argument("called", default="", metavar="[NAME:TAG]")
@pass_app
def import_command(
    app: App, archive: str, called: str, name: str, keep_blobs: bool | None, quiet: bool, **config: object
) -> None:
    """Import ARCHIVE: a docker or OCI archive, an OCI layout, or a plain root file system tar; - reads stdin."""
    from corral.api.images.v1 import images_pb2
    from corral.client.options import image_config

    if name and called:
        raise click.UsageError("the name is given twice, behind the archive and with --as")
    name = name or called
    header = images_pb2.ImportHeader(name=name, keep_blobs=keep_blobs)
    if any(config.values()):
        header.config.CopyFrom(image_config(**config))  # type: ignore[arg-type]
    images = bring_in(app, archive, header, quiet=quiet)
    for image in images:
        click.echo(image.familiar_name if quiet else f"imported {image.familiar_name or image.id}")


@image_command.command("ls")
@click.argument("pattern", default="")
@click.option("-a", "--all", "everything", is_flag=True, help="Accepted for docker's sake: all are shown")
@click.option("--digests", is_flag=True, help="Digests too")
@click.option(
    "-f",
    "--filter",
    "filters",
    multiple=True,
    metavar="KEY=VALUE",
    help="reference=PATTERN, label=KEY[=VALUE], dangling=true, before=IMAGE, since=IMAGE or until=TIME",
)
@click.option("--no-trunc", is_flag=True, help="Whole ids")
@format_option
@pass_app
def ls_command(
    app: App,
    pattern: str,
    everything: bool,
    digests: bool,
    filters: tuple[str, ...],
    no_trunc: bool,
    form: str,
    quiet: bool,
) -> None:
    """List images."""
    del everything
    images = find_images(app.client, pattern, filters)
    digests = digests or form not in ("table", "json")  # a template may ask for it
    ids = [i.id if no_trunc else i.id.partition(":")[2][:12] for i in images]
    headings = ("REPOSITORY", "TAG", *(("DIGEST",) if digests else ()), "IMAGE ID", "UPDATED", "SIZE", "CREATED SINCE")
    rows = []
    for image, short in zip(images, ids, strict=True):
        repository, tag = split_name(image.familiar_name)
        digest = (image.target.digest,) if digests else ()
        age, size = f"{human_age(image.updated_at)} ago", human_size(image.size_bytes)
        created = f"{human_age(image.created_at)} ago" if image.HasField("created_at") else "N/A"
        rows.append((repository, tag, *digest, short, age, size, created))
    if form == "table":
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    show_rows(headings, rows, images, form, ids if quiet else None)


images_command = click.Command("images", params=ls_command.params, callback=ls_command.callback, help="List images.")


def split_name(familiar: str) -> tuple[str, str]:
    """Repository and tag, as tables show them."""
    name, at, digest = familiar.partition("@")
    if at:
        return name, digest
    head, colon, tag = familiar.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (familiar or "<none>", "<none>")


@image_command.command("inspect")
@click.option("-f", "--format", "form", default="json", metavar="TEMPLATE", help="Such as '{{.id}}' instead of JSON")
@click.argument("names", nargs=-1, required=True, type=ImageName())
@pass_app
def inspect_command(app: App, names: tuple[str, ...], form: str) -> int:
    """Show all facts about images, as JSON."""
    from corral.rpc import errors

    found, failed = [], 0
    for name in names:
        try:
            found.append(app.client.images.get(name))
        except errors.CorralError as e:
            complain(e)
            failed = 1
    show_json(found, form, more=_names_of_docker)
    return failed


def _names_of_docker(image: "images_pb2.Image") -> "dict[str, Json]":
    """What templates that were written for docker ask for by other names."""
    repository, _ = split_name(image.familiar_name)
    tagged = [name.removeprefix("docker.io/").removeprefix("library/") for name in image.names if "@" not in name]
    return {
        "repo_tags": list(tagged),
        "repo_digests": [f"{repository}@{image.target.digest}"] if image.name else [],
        "os": image.platform.os,
        "architecture": image.platform.architecture,
        "variant": image.platform.variant,
        "size": image.size_bytes,
        "created": image.created_at.ToJsonString() if image.HasField("created_at") else "",
        "root_fs": {"type": "layers", "layers": [layer.diff_id for layer in image.layers]},
    }


@image_command.command("tag")
@click.argument("source", type=ImageName())
@click.argument("target")
@pass_app
def tag_command(app: App, source: str, target: str) -> None:
    """Give an image another name."""
    app.client.images.tag(source, target)


@image_command.command("rm")
@click.option("-f", "--force", is_flag=True, help="Also a name that a container uses, or none has")
@click.argument("names", nargs=-1, required=True, type=ImageName())
@pass_app
def rm_command(app: App, names: tuple[str, ...], force: bool) -> int:
    """Remove names, and with the last name the image."""
    from corral.rpc import errors

    failed = 0
    for name in names:
        try:
            answer = app.client.images.remove(name, force=force)
        except errors.CorralError as e:
            complain(e)
            failed = failed if force and isinstance(e, errors.NotFound) else 1
            continue
        for untagged in answer.untagged:
            click.echo(f"Untagged: {untagged.removeprefix('docker.io/').removeprefix('library/')}")
        for deleted in answer.deleted:
            click.echo(f"Deleted: {deleted}")
    return failed


rmi_command = click.Command("rmi", params=rm_command.params, callback=rm_command.callback, help=rm_command.help)
# What docker has other words for.
for _alias, _command in (("list", ls_command), ("remove", rm_command), ("umount", unmount_command)):
    image_command.add_command(
        click.Command(_alias, params=_command.params, callback=_command.callback, help=_command.help, hidden=True)
    )


@image_command.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Also named images that no container uses")
@click.option("-f", "--force", is_flag=True, help="Accepted for docker's sake: nothing is asked")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only images made before until=TIME, or that long ago; with or without label[!]=KEY[=VALUE]",
)
@pass_app
def prune_command(app: App, everything: bool, force: bool, filters: tuple[str, ...]) -> None:
    """Remove what nothing refers to."""
    del force
    only = parse_prune_filters(filters)
    answer = app.client.images.prune(
        all=everything, until=only.until, labels=only.labels, without_labels=only.without_labels
    )
    for name in (*answer.untagged, *answer.deleted):
        click.echo(name)
    click.echo(f"Total reclaimed space: {human_size(answer.reclaimed_bytes)}")
