"""Writes corral/client/sync.py from corral/client/aio.py; with --check only compares, and fails when it is stale."""

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parent / "corral" / "client"
RUFF = Path(sys.executable).parent / "ruff"

# In this order: longer forms before what they contain.
REPLACEMENTS = (
    (r"The client for asyncio\. [^\n]*\.py\)\.", "The client for ordinary code, generated from `corral.client.aio`."),
    (r"async_attach_requests", "attach_requests"),
    (r"async_registry_auth", "registry_auth"),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"AsyncClient", "Client"),
    (r"AsyncTransport", "Transport"),
    (r"AsyncExchange", "Exchange"),
    (r"AsyncIterator", "Iterator"),
    (r"AsyncStub", "Stub"),
    (r"__a(enter|exit)__", r"__\1__"),
)


def generate() -> str:
    """The text of sync.py."""
    text = (CLIENT / "aio.py").read_text(encoding="utf-8")
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    for command in (["check", "--select", "I", "--fix-only", "--quiet"], ["format", "--quiet"]):
        call = [str(RUFF), *command, "--stdin-filename", str(CLIENT / "sync.py"), "-"]
        text = subprocess.run(call, input=text, text=True, stdout=subprocess.PIPE, check=True).stdout
    return text


def main() -> None:
    target, text = CLIENT / "sync.py", generate()
    if "--check" not in sys.argv:
        target.write_text(text, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != text:
        raise SystemExit("cli/corral/client/sync.py is stale, run `make generate`")


if __name__ == "__main__":
    main()
