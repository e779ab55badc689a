"""Whether a registry takes somebody's credentials."""

from pathlib import Path

from corral.images.registry.credentials import Credentials
from corral.images.registry.endpoints import Capability, own_endpoints
from corral.images.registry.errors import About, Trouble, explained
from corral.images.registry.host import Host, Request
from corral.images.registry.http import Http
from corral.rpc.blocking import run_blocking
from corral.rpc.errors import PermissionDenied


async def login(http: Http, certs: Path, registry: str, credentials: Credentials, *, insecure: bool) -> str:
    """Have them proven; returns the identity token that the registry gives instead, if it does.

    Raises PermissionDenied, Unavailable and the like. Source: distribution-spec "Determining Support".
    """
    found = await run_blocking(lambda: own_endpoints(certs, registry, insecure=insecure))
    problem: Trouble | None = None
    for endpoint in found:
        if Capability.RESOLVE not in endpoint.capabilities:
            continue
        host = Host(http, endpoint, credentials, offline=True)
        try:
            (await host.ask(Request("GET", ""))).close()
        except Trouble as e:
            problem = e
            continue
        return host.authorizer.identity_token
    error = explained(problem or Trouble("it has no host"), About("this login", registry))
    if isinstance(error, PermissionDenied):
        raise PermissionDenied(
            f"registry {registry} does not take these credentials: check user name and password",
            reason="REGISTRY_DENIED",
            metadata={"registry": registry},
        ) from problem
    raise error
