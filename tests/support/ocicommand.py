"""`corral-oci` as its clients call it: bundles, a state root of one's own, and an end to all that is left."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from corral.runtime.template import default_spec
from support.leaks import TAG_VARIABLE
from support.tasks import make_rootfs

COMMAND = Path(sys.executable).parent / "corral-oci"
TIMEOUT_S = 30


@dataclass
class Runtime:
    """The command on one state root, and one bundle."""

    directory: Path
    ids: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        """Where the state is."""
        return self.directory / "state"

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    def new_id(self) -> str:
        """An id whose cgroup nobody else has."""
        self.ids.append(f"{os.environ.get(TAG_VARIABLE, 'corral')}-{secrets.token_hex(3)}")
        return self.ids[-1]

    def spec(self, *args: str, **changes: object) -> dict[str, object]:
        """A config.json with the arguments of its process; changes are members of the process."""
        spec = json.loads(json.dumps(default_spec()))
        spec["process"] |= {"terminal": False, "args": list(args) if len(args) > 1 else ["sh", "-c", *args]} | changes
        spec["root"]["readonly"] = False
        return spec

    def write(self, *args: str, **changes: object) -> None:
        """Write the spec into the bundle."""
        self.write_spec(self.spec(*args, **changes))

    def write_spec(self, spec: dict[str, object]) -> None:
        (self.bundle / "config.json").write_text(json.dumps(spec))

    def words(self, *words: str) -> list[str]:
        """The whole command line."""
        return [str(COMMAND), "--root", str(self.root), *words]

    def call(self, *words: str, **options: object) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end, in the bundle."""
        options = {"stdin": subprocess.DEVNULL, "timeout": TIMEOUT_S, "cwd": self.bundle} | options
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            self.words(*words), capture_output=True, text=True, check=False, **options
        )

    def ok(self, *words: str, **options: object) -> str:
        """The stdout of a command that must succeed."""
        result = self.call(*words, **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def detached(self, *words: str) -> None:
        """A command whose container must not hold our pipes."""
        log = self.directory / "stderr"
        with log.open("w") as file:
            code = subprocess.run(
                self.words(*words), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
                timeout=TIMEOUT_S, cwd=self.bundle, check=False,
            ).returncode  # fmt: skip
        assert code == 0, log.read_text()

    def sleeping(self) -> str:
        """A running container that does nothing."""
        name = self.new_id()
        self.write("sleep", "1000")
        self.detached("run", "--detach", name)
        return name

    def state(self, name: str) -> dict[str, object]:
        state: dict[str, object] = json.loads(self.ok("state", name))
        return state

    def status(self, name: str) -> str:
        return str(self.state(name)["status"])

    def close(self) -> None:
        """End what is left."""
        for name in self.ids:
            self.call("delete", "--force", name)


@contextlib.contextmanager
def runtime_in(directory: Path) -> Iterator[Runtime]:
    runtime = Runtime(directory)
    make_rootfs(runtime.bundle / "rootfs")
    try:
        yield runtime
    finally:
        runtime.close()


def wait_until(holds: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
