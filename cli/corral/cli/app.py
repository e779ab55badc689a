"""What every verb is given: where corrald is, the namespace, and a client made when first asked for."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from corral.client.sync import Client


class App:
    """Global options of one run of the command."""

    def __init__(self, address: str | None = None, namespace: str | None = None) -> None:
        self.address = address
        self.namespace = namespace
        self._client: Client | None = None

    @property
    def client(self) -> "Client":
        """The client, which is imported here and not before."""
        if self._client is None:
            from corral.client.sync import Client
            from corral.client.transport import BriefTransport

            self._client = Client(self.address, namespace=self.namespace, transport=BriefTransport)
        return self._client


def pass_app(function: Callable[..., object]) -> Callable[..., object]:
    """Gives a verb the App as its first argument."""
    return click.make_pass_decorator(App)(function)


def readable(text: str) -> str:
    """Text that an image or a container may have chosen, for a terminal: what would steer that is shown as \\xNN."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def complain(error: object) -> None:
    """Say on stderr what went wrong, in one line."""
    click.echo(f"corral: {readable(str(error))}", err=True)


def each[T](
    names: tuple[str, ...],
    act: Callable[[str], T],
    *,
    show: Callable[[str, T], str] = lambda name, _: name,
    may_be_gone: bool = False,
    at_once: bool = False,
) -> int:
    """Does `act` for every name, printing the name (or what `show` makes of the answer) or the error.

    0 if all went well, else 1. may_be_gone: as with docker's --force, what is not there is told, and no failure.
    at_once: nobody waits for the one before; what is printed does.
    """
    from corral.rpc import errors

    failed = 0
    answers: Iterable[Callable[[], T]] = (partial(act, name) for name in names)
    if at_once and len(names) > 1:
        from corral.cli.side_by_side import side_by_side

        answers = side_by_side(names, act)
    for name, answer_of in zip(names, answers, strict=True):
        try:
            answer = answer_of()
        except errors.CorralError as e:
            complain(e)
            failed = failed if may_be_gone and isinstance(e, errors.NotFound) else 1
        else:
            click.echo(show(name, answer))
    return failed


class ContainerName(click.ParamType[str, str]):
    """A container's name, completed by the shell from those that exist."""

    name = "container"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        app = ctx.find_object(App) or App()
        try:
            containers = app.client.containers.list(all=True)
        except Exception:  # noqa: BLE001 - completion stays silent, whatever is wrong
            return []
        return [CompletionItem(c.name) for c in containers if c.name.startswith(incomplete)]


class ImageName(click.ParamType[str, str]):
    """An image's name, completed by the shell from those that exist."""

    name = "image"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        app = ctx.find_object(App) or App()
        try:
            images = app.client.images.list()
        except Exception:  # noqa: BLE001 - completion stays silent, whatever is wrong
            return []
        return [CompletionItem(i.familiar_name) for i in images if i.familiar_name.startswith(incomplete)]
