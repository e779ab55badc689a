"""What users of runc are used to: where flags may stand, what is printed, and which words and codes errors have."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ocicommand import Runtime, runtime_in
from support.requirements import needs

pytestmark = [needs("root", "busybox"), pytest.mark.timeout(90)]


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Runtime]:
    with runtime_in(tmp_path) as runtime:
        yield runtime


def refused(result: "subprocess.CompletedProcess[str]", *words: str, code: int = 1) -> None:
    assert result.returncode == code, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr


def test_flags_may_stand_behind_the_id(oci: Runtime) -> None:
    name = oci.new_id()
    oci.write("sleep", "1000")
    oci.detached("run", name, "--detach", "--pid-file", str(oci.directory / "pid"))
    assert int((oci.directory / "pid").read_text()) == oci.state(name)["pid"]
    oci.ok("delete", name, "--force")
    refused(oci.call("state", name), "does not exist")


def test_flags_of_a_command_in_the_container_are_its_own(oci: Runtime) -> None:
    assert oci.ok("exec", oci.sleeping(), "echo", "--detach", "-u").strip() == "--detach -u"


def test_a_wrong_number_of_arguments_is_told_with_the_right_one(oci: Runtime) -> None:
    refused(oci.call("create"), "requires exactly 1 argument(s)", "usage: corral-oci create")
    refused(oci.call("delete", "a", "b"), "requires exactly 1 argument(s)")
    refused(oci.call("kill", "a", "b", "c"), "a minimum of 1 and a maximum of 2 argument(s)")
    assert "USAGE:\n   corral-oci exec" in oci.ok("exec", "--help")
    assert oci.ok("help", "kill") == oci.ok("kill", "--help")
    refused(oci.call("help", "nonsense"), "No help topic for 'nonsense'", code=3)


@pytest.mark.parametrize("words", [["create"], ["run"], ["run", "--detach"]])
def test_a_pid_file_that_cant_be_written_is_named_and_no_container_is_left(oci: Runtime, words: list[str]) -> None:
    oci.write("sleep", "1000")
    name = oci.new_id()
    log = oci.directory / "stderr"
    with log.open("w") as file:
        code = subprocess.run(
            oci.words(*words, "--pid-file", "/nowhere/pid", name), cwd=oci.bundle, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=file, timeout=30, check=False,
        ).returncode  # fmt: skip
    assert code == 1
    assert log.read_text().endswith('msg="--pid-file: no such file or directory: /nowhere/pid"\n')
    refused(oci.call("state", name), "does not exist")


def test_exec_with_a_pid_file_that_cant_be_written_leaves_no_process(oci: Runtime) -> None:
    name = oci.sleeping()
    refused(oci.call("exec", "--pid-file", "/nowhere/pid", name, "sleep", "1000"), "/nowhere/pid", code=255)
    assert len(json.loads(oci.ok("ps", "--format", "json", name))) == 1


def test_update_takes_what_runc_takes(oci: Runtime) -> None:
    name = oci.sleeping()
    warned = oci.call("update", "--kernel-memory", "64m", "--kernel-memory-tcp", "64m", "--memory", "1.5g", name)
    assert (warned.returncode, "kernel memory are ignored" in warned.stderr) == (0, True)
    stats = json.loads(oci.ok("events", "--stats", name))
    assert stats["data"]["memory"]["usage"]["limit"] == 3 << 29
    assert oci.call("update", "--resources", "-", name, input="null", stdin=None).returncode == 0
    refused(oci.call("update", "--resources", "-", name, input="{bad", stdin=None), "standard input: ")
    refused(oci.call("update", "--resources", "/nowhere.json", name), "no such file or directory: /nowhere.json")


def test_events_have_the_kernels_own_counters_of_memory_and_swap_with_memory(oci: Runtime) -> None:
    name = oci.sleeping()
    memory = json.loads(oci.ok("events", "--stats", "--interval", "1m30s", name))["data"]["memory"]
    pid = oci.state(name)["pid"]
    cgroups = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    places = [Path(f"/sys/fs/cgroup/{controllers}{path}/memory.stat") for _, controllers, path in cgroups]
    (text,) = [place.read_text() for place in places if place.exists()]
    assert {line.split()[0] for line in text.splitlines()} == set(memory["raw"])
    assert memory["swap"]["usage"] >= memory["usage"]["usage"] > 0


def test_exec_as_another_uid_keeps_the_groups_and_a_name_brings_its_own(oci: Runtime) -> None:
    (oci.bundle / "rootfs/etc").mkdir(exist_ok=True)
    (oci.bundle / "rootfs/etc/passwd").write_text("bob:x:1000:1001::/home/bob:/bin/sh\n")
    name = oci.new_id()
    oci.write("sleep 1000", user={"uid": 3, "gid": 7, "additionalGids": [8, 9]})
    oci.detached("run", "--detach", name)
    ids = "id -u; id -g; id -G"
    assert oci.ok("exec", "--user", "5", name, "sh", "-c", ids).split() == ["5", "7", "7", "8", "9"]
    assert oci.ok("exec", "--user", "5:6", name, "sh", "-c", ids).split() == ["5", "6", "6", "8", "9"]
    assert oci.ok("exec", "--user", "bob", name, "sh", "-c", ids).split()[:2] == ["1000", "1001"]
    refused(oci.call("exec", "--user", "4294967296", name, "id"), "process.user.uid", code=255)
    refused(oci.call("exec", "--user", "0x0", name, "id"), "unable to find user 0x0", code=255)


@pytest.mark.parametrize("text", ["{bad", "[]", "7", "{}", '"text"', ""])
def test_a_record_that_cant_be_read_is_named_and_hides_no_other_container(oci: Runtime, text: str) -> None:
    name = oci.sleeping()
    (oci.root / "broken").mkdir()
    (oci.root / "broken/state.json").write_text(text)
    (oci.root / "empty").mkdir()
    (oci.root / "file").touch()
    for words in (["list", "--quiet"], ["list", "--format", "json"], ["list"]):
        listed = oci.call(*words)
        assert (listed.returncode, name in listed.stdout) == (0, True)
        assert "broken/state.json" in listed.stderr
    for words in (["state"], ["kill"], ["delete"], ["delete", "--force"], ["pause"]):
        refused(oci.call(*words, "broken"), f"{oci.root}/broken/state.json")
    assert (oci.root / "broken/state.json").exists()


def test_a_joined_mount_namespace_keeps_its_root_and_it_is_said_what_is_left_out(oci: Runtime) -> None:
    first = oci.sleeping()
    oci.ok("exec", first, "touch", "/tmp/of-the-first")
    spec = oci.spec("ls /tmp")
    linux = spec["linux"]
    assert isinstance(linux, dict)
    for namespace in linux["namespaces"]:
        if namespace["type"] == "mount":
            namespace["path"] = f"/proc/{oci.state(first)['pid']}/ns/mnt"
    oci.write_spec(spec)
    joined = oci.call("run", oci.new_id())
    assert (joined.returncode, joined.stdout) == (0, "of-the-first\n")
    assert "root and mounts are left out" in joined.stderr


def test_a_process_document_that_is_wrong_is_told_by_what_is_wrong(oci: Runtime) -> None:
    name, document = oci.sleeping(), oci.directory / "process.json"
    for text, words in {
        "{bad": ["Expecting property name"],
        "{}": ["process.cwd: missing"],
        '{"cwd": "/"}': ["process.args"],
        '{"cwd": "etc", "args": ["true"]}': ["process.cwd: 'etc' is not an absolute path"],
        '{"cwd": "/", "args": "true"}': ["process.args: must be an array"],
        '{"cwd": "/", "args": ["true"], "rlimits": [{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]}': [
            "process.rlimits[0]: the soft limit 2 is above the hard limit 1"
        ],
    }.items():
        document.write_text(text)
        refused(oci.call("exec", "--process", str(document), name), *words, code=255)
    refused(oci.call("exec", "--process", "/nowhere.json", name), "no such file or directory: /nowhere.json", code=255)
