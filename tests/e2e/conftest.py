"""A whole corral with the busybox image, as one process and again as five."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.corrald import Corrald, running


@pytest.fixture(scope="module", params=["one-process", "five-processes"])
def box(request: pytest.FixtureRequest, busybox_archive: Path) -> Iterator[Corrald]:
    """A daemon that has busybox; when the module's tests are done, nothing of their containers may be left."""
    with running(split=request.param == "five-processes") as daemon:
        result = daemon.corral("image", "import", str(busybox_archive), "--as", "busybox")
        assert result.returncode == 0, result.stderr.decode() + daemon.log()
        yield daemon


@pytest.fixture
def name(request: pytest.FixtureRequest, box: Corrald) -> Iterator[str]:
    """A container name of the test's own; what has it afterwards is removed."""
    chosen = f"t-{abs(hash(request.node.nodeid)) % 10**8}"
    yield chosen
    box.corral("rm", "-f", chosen)
