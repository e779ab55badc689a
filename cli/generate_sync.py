"""Writes corral/client/sync/ from corral/client/aio/; with --check only compares, and fails when it is stale."""

import re
import subprocess
import sys
from pathlib import Path

AIO = Path(__file__).resolve().parent / "corral" / "client" / "aio"
SYNC = AIO.with_name("sync")
RUFF = Path(sys.executable).parent / "ruff"

# In this order: longer forms before what they contain.
REPLACEMENTS = (
    (
        r"The client for asyncio\. [^\n]*\.py\)\.",
        "The client for ordinary code, as `corral.client.aio` is for asyncio.",
    ),
    (r"from corral\.client\.aio\b", "from corral.client.sync"),
    (r"corral\.client\.async_transport", "corral.client.transport"),
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


def generate(source: Path) -> str:
    """The text of a module of sync, from the one of aio."""
    text = source.read_text(encoding="utf-8")
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    text = f"# Generated from corral/client/aio/{source.name} by cli/generate_sync.py.\n{text}"
    for command in (["check", "--select", "I", "--fix-only", "--quiet"], ["format", "--quiet"]):
        call = [str(RUFF), *command, "--stdin-filename", str(SYNC / source.name), "-"]
        text = subprocess.run(call, input=text, text=True, stdout=subprocess.PIPE, check=True).stdout
    return text


def main() -> None:
    sources = sorted(AIO.glob("*.py"))
    if "--check" not in sys.argv:
        SYNC.mkdir(exist_ok=True)
        for source in sources:
            (SYNC / source.name).touch()  # imports are sorted by which modules there are
    wanted = {source.name: generate(source) for source in sources}
    found = {path.name: path.read_text(encoding="utf-8") for path in SYNC.glob("*.py")}
    if wanted == found:
        return
    if "--check" in sys.argv:
        raise SystemExit("cli/corral/client/sync is stale, run `make generate`")
    for name in found.keys() - wanted.keys():
        (SYNC / name).unlink()
    for name, text in wanted.items():
        (SYNC / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
