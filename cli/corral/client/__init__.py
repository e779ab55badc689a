"""The typed client of corral: `Client` for ordinary code, `AsyncClient` for asyncio, the same verbs in both.

    from corral.client import Client

    with Client() as corral:
        corral.images.load("busybox.tar", name="busybox")
        web = corral.containers.run("busybox", ["httpd", "-f"], name="web", memory="64m")
        print(corral.containers.exec(web.id, ["ps"]).stdout.decode())
        corral.containers.stop("web")

Every call raises a kind of `CorralError` with a sentence for a person. Answers are the messages of
`corral.api.*.v1`, which document every field.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient
    from corral.client.options import ContainerOptions, container_config
    from corral.client.sync import Client
    from corral.rpc.errors import CorralError

__all__ = ["AsyncClient", "Client", "ContainerOptions", "CorralError", "container_config"]

_HOMES = {
    "AsyncClient": "corral.client.aio",
    "Client": "corral.client.sync",
    "ContainerOptions": "corral.client.options",
    "CorralError": "corral.rpc.errors",
    "container_config": "corral.client.options",
}


def __getattr__(name: str) -> object:
    """Loads what is asked for, when it is: importing gRPC alone takes longer than most commands run."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
