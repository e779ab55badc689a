"""`corral pull`, `push`, `login` and `logout`."""

import sys
from typing import TYPE_CHECKING

import click

from corral.cli.app import App, ImageName, complain, pass_app
from corral.cli.archive import keep_blobs_option
from corral.cli.output import format_option, human_size, show_rows
from corral.cli.progress import shown

if TYPE_CHECKING:
    from corral.api.images.v1 import images_pb2

_platform = click.option("--platform", default="", metavar="OS/ARCH[/VARIANT]", help="Platform, such as linux/arm64")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Only the name")
_insecure = click.option(
    "--insecure", is_flag=True, help="Take any certificate of this registry, or plain HTTP where it has no TLS"
)


def pull_image(
    app: App,
    name: str,
    *,
    platform: str = "",
    all_platforms: bool = False,
    insecure: bool = False,
    keep_blobs: bool | None = None,
    quiet: bool = False,
) -> "images_pb2.Image":
    """Pull with what is kept of logins, showing how far it is."""
    parts = app.client.images.pull_stream(
        name, platform=platform, all_platforms=all_platforms, insecure=insecure, keep_blobs=keep_blobs
    )
    for part in shown(parts, quiet=quiet):
        image = part.image
    return image


@click.command("pull")
@_platform
@click.option("--all-platforms", is_flag=True, help="All that the image is there for")
@_insecure
@keep_blobs_option
@_quiet
@click.argument("name")
@pass_app
def pull_command(
    app: App,
    name: str,
    platform: str,
    all_platforms: bool,
    insecure: bool,
    keep_blobs: bool | None,
    quiet: bool,
) -> None:
    """Fetch an image from its registry."""
    if not quiet and "@" not in name and ":" not in name.rpartition("/")[2]:
        click.echo("Using default tag: latest")
    before = _digest_here(app, name)
    image = pull_image(
        app,
        name,
        platform=platform,
        all_platforms=all_platforms,
        insecure=insecure,
        keep_blobs=keep_blobs,
        quiet=quiet,
    )
    if not quiet:
        click.echo(f"Digest: {image.target.digest}")
        is_same = before == (image.target.digest, image.manifest.digest)
        click.echo(
            f"Status: {'Image is up to date' if is_same else 'Downloaded newer image'} for {image.familiar_name}"
        )
    click.echo(image.name)


def _digest_here(app: App, name: str) -> tuple[str, str]:
    from corral.rpc.errors import CorralError

    try:
        image = app.client.images.get(name)
    except CorralError:  # it is not here; or is no name, as the pull will say
        return "", ""
    return image.target.digest, image.manifest.digest


@click.command("push")
@_platform
@click.option("--all-platforms", is_flag=True, help="The whole index, or nothing")
@_insecure
@_quiet
@click.argument("name", type=ImageName())
@click.argument("destination", default="")
@pass_app
def push_command(
    app: App, name: str, destination: str, platform: str, all_platforms: bool, insecure: bool, quiet: bool
) -> None:
    """Bring an image to the registry that its name begins with, or under another name to another."""
    parts = app.client.images.push_stream(
        name, destination, platform=platform, all_platforms=all_platforms, insecure=insecure
    )
    for part in shown(parts, quiet=quiet):
        pushed = part.pushed
    click.echo(pushed.digest if quiet else f"Digest: {pushed.digest}")


@click.command("referrers")
@click.option("--type", "artifact_type", default="", metavar="TYPE", help="Only those of this artifact type")
@_insecure
@format_option
@click.argument("name")
@pass_app
def referrers_command(app: App, name: str, artifact_type: str, insecure: bool, form: str, quiet: bool) -> None:
    """List what refers to an image in its registry: signatures, attestations."""
    found = app.client.images.referrers(name, artifact_type=artifact_type, insecure=insecure).referrers
    rows = [(each.digest, each.artifact_type or each.media_type, human_size(each.size_bytes)) for each in found]
    show_rows(("DIGEST", "TYPE", "SIZE"), rows, found, form, [each.digest for each in found] if quiet else None)


@click.command("login")
@click.option("-u", "--username", default="", help="User name")
@click.option("-p", "--password", default="", help="Password; others may see it in the list of processes")
@click.option("--password-stdin", is_flag=True, help="Read the password from stdin")
@_insecure
@click.argument("registry", default="docker.io")
@pass_app
def login_command(app: App, registry: str, username: str, password: str, password_stdin: bool, insecure: bool) -> None:
    """Prove who you are to a registry, and keep it for pulls and pushes."""
    from corral.api.images.v1.images_pb2 import RegistryAuth
    from corral.client import credentials

    registry = _registry(registry)
    if password:
        click.echo("corral: others may see a password in the list of processes: --password-stdin avoids that", err=True)
    if password_stdin:
        if not username or password:
            raise click.UsageError("--password-stdin needs --username, and no --password")
        password = sys.stdin.read().rstrip("\r\n")
        if not password:
            raise click.UsageError("no password came from stdin")
    if not username and _still_good(app, registry, insecure=insecure):
        click.echo("Login Succeeded")
        return
    if not (username and password) and not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: give --username and --password-stdin")
    username = username or click.prompt("Username", err=True)
    password = password or click.prompt("Password", hide_input=True, err=True)
    token = app.client.images.login(registry, username, password, insecure=insecure)
    where = credentials.store(registry, RegistryAuth(username=username, password=password, identity_token=token))
    if where and not token:
        click.echo(f"corral: the password is kept unencrypted in {where}; a credential helper avoids that", err=True)
    click.echo("Login Succeeded")


def _still_good(app: App, registry: str, *, insecure: bool) -> bool:
    """Whether what is kept of an earlier login is taken by the registry."""
    from corral.client import credentials
    from corral.rpc.errors import PermissionDenied

    known = credentials.find(registry)
    if not (known.username and known.password):
        return False
    click.echo("Authenticating with existing credentials...", err=True)
    try:
        app.client.images.login(registry, known.username, known.password, insecure=insecure)
    except PermissionDenied as e:
        complain(e)
        return False
    return True


def _registry(text: str) -> str:
    """As the beginning of a name has it; people give addresses, too."""
    from corral.client import credentials

    return credentials.registry_of(f"{text.removeprefix('https://').removeprefix('http://').split('/')[0]}/x")


@click.command("logout")
@click.argument("registry", default="docker.io")
def logout_command(registry: str) -> None:
    """Forget what was kept of a login."""
    from corral.client import credentials

    registry = _registry(registry)
    known = credentials.erase(registry)
    click.echo(f"Removing login credentials for {registry}" if known else f"Not logged in to {registry}")
