"""What the tasks leaf reads of a spec."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.api.tasks.v1 import tasks_pb2 as pb
from corral.oci.usual import usual_profile
from corral.rpc.errors import InvalidArgument
from corral.tasks.config import TasksConfig
from corral.tasks.lifecycle import NewTask
from corral.tasks.translate import new_task

MEMBER, _ = usual_profile()


@pytest.fixture
def new(tmp_path: Path) -> Callable[[str], NewTask]:
    config = TasksConfig(root=tmp_path, state=tmp_path)
    return lambda spec: new_task("default", pb.CreateTaskRequest(id="a", spec=spec.encode()), config)


@pytest.mark.parametrize(
    "spec",
    [
        f'{{"linux":{{{MEMBER}}},"process":{{"args":["a","b"],"terminal":true}}}}',
        f'{{"process":{{"args":["a","b"],"terminal":true}},"linux":{{{MEMBER},"x":{{{MEMBER}}}}}}}',
        json.dumps({"process": {"args": ["a", "b"], "terminal": True}, "linux": {"seccomp": {"names": ["read"]}}}),
    ],
)
def test_the_program_is_read_whatever_the_profile_and_the_spec_stays_as_it_is(
    new: Callable[[str], NewTask], spec: str
) -> None:
    task = new(spec)
    assert (task.args, task.terminal, task.config) == (("a", "b"), True, spec.encode())


def test_a_text_that_looks_like_the_profile_is_an_argument_as_any_other(new: Callable[[str], NewTask]) -> None:
    assert new(json.dumps({"process": {"args": ["a", MEMBER]}})).args == ("a", MEMBER)


@pytest.mark.parametrize("spec", [f"{{{MEMBER}", f"[{MEMBER}]", f'"{MEMBER}"', f"{MEMBER}{{}}"])
def test_what_is_no_json_stays_none_with_the_profile_in_it(new: Callable[[str], NewTask], spec: str) -> None:
    with pytest.raises(InvalidArgument, match="spec is not JSON"):
        new(spec)
