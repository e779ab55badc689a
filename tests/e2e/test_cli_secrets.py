"""`corral secret`, and `run --secret`: containers have them, and no disk of theirs, no config and no log."""

import base64
import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from support.cli import ok
from support.corrald import Corrald
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox", "netns")

CONTENT = b"a word that is found nowhere else: tuvalu-92731\n"
WORD = b"tuvalu-92731"


@pytest.fixture
def secret(box: Corrald, name: str) -> Iterator[str]:
    """Made before the container called `name`, and removed after it."""
    chosen = f"s-{name}"
    ok(box, "secret", "create", chosen, "-", stdin=CONTENT)
    yield chosen
    box.corral("rm", "-f", name)
    ok(box, "secret", "rm", chosen)


def seen_on_disk(box: Corrald) -> list[Path]:
    """Where the word, or its base64 in any of the three positions, is found below the daemon's directories."""
    forms = [WORD, *(base64.b64encode(b" " * shift + WORD)[4:-4] for shift in range(3))]
    found = []
    for root in (box.root, box.state, box.place.directory):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                try:
                    data = path.read_bytes()
                except OSError:  # the name of a network namespace
                    continue
                if any(form in data for form in forms):
                    found.append(path)
    return sorted(set(found))


def test_a_secret_is_a_read_only_file_in_memory_and_on_no_disk(box: Corrald, name: str, secret: str) -> None:
    ok(box, "run", "-d", "--name", name, "--secret", secret, "busybox", "sleep", "1000")
    assert ok(box, "exec", name, "cat", f"/run/secrets/{secret}").encode() == CONTENT
    assert ok(box, "exec", name, "stat", "-c", "%a %u %g", f"/run/secrets/{secret}") == "444 0 0\n"
    [mount] = [line for line in ok(box, "exec", name, "cat", "/proc/mounts").splitlines() if " /run/secrets " in line]
    assert mount.split()[2] == "tmpfs"
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mount.split()[3].split(","))
    assert box.corral("exec", name, "touch", "/run/secrets/more").returncode == 1
    [kept] = seen_on_disk(box)
    assert kept.parent.parent == box.root / "engine" / "secrets"
    assert (kept.stat().st_mode & 0o7777, kept.parent.stat().st_mode & 0o7777) == (0o600, 0o700)
    assert WORD not in box.log().encode()
    assert WORD.decode() not in ok(box, "inspect", name) + ok(box, "secret", "inspect", secret)


def test_secrets_have_the_target_owner_and_mode_that_were_asked_for(box: Corrald, name: str, secret: str) -> None:
    here = f"{secret},target=deep/in/it,uid=33,gid=44,mode=0400"
    there = f"{secret},target=/etc/app/key.pem,mode=0440"
    ok(box, "run", "-d", "--name", name, "--secret", here, "--secret", there, "busybox", "sleep", "1000")
    told = ok(box, "exec", name, "stat", "-c", "%n %a %u %g", "/run/secrets/deep/in/it", "/etc/app/key.pem")
    assert told == "/run/secrets/deep/in/it 400 33 44\n/etc/app/key.pem 440 0 0\n"
    assert ok(box, "exec", name, "cat", "/etc/app/key.pem").encode() == CONTENT
    assert box.corral("exec", name, "sh", "-c", "echo x > /etc/app/key.pem").returncode == 1
    assert len(seen_on_disk(box)) == 1


def test_a_secret_can_be_a_variable_of_every_process_and_of_no_file(box: Corrald, name: str, secret: str) -> None:
    asked = f"{secret},type=env,target=PASSWORD"
    ok(box, "run", "-d", "--name", name, "--secret", asked, "busybox", "sh", "-c", 'test "$PASSWORD" && sleep 1000')
    assert ok(box, "exec", name, "sh", "-c", "echo $PASSWORD").encode() == CONTENT
    assert ok(box, "exec", "-e", "PASSWORD=mine", name, "sh", "-c", "echo $PASSWORD") == "mine\n"
    assert len(seen_on_disk(box)) == 1
    assert box.corral("exec", name, "ls", "/run/secrets").returncode == 1


def test_secrets_are_there_after_a_restart_of_the_container_the_daemon_and_the_shim(
    box: Corrald, name: str, secret: str
) -> None:
    ok(box, "run", "-d", "--name", name, "--secret", secret, "busybox", "sleep", "1000")
    ok(box, "restart", "-t", "0", name)
    assert ok(box, "exec", name, "cat", f"/run/secrets/{secret}").encode() == CONTENT
    box.kill9()
    box.start()
    ok(box, "restart", "-t", "0", name)
    assert ok(box, "exec", name, "cat", f"/run/secrets/{secret}").encode() == CONTENT
    assert len(seen_on_disk(box)) == 1


def test_images_exports_and_differences_of_a_container_have_no_secret(box: Corrald, name: str, secret: str) -> None:
    there = f"{secret},target=/etc/key"
    ok(box, "run", "-d", "--name", name, "--secret", secret, "--secret", there, "busybox", "sleep", "1000")
    exported = box.corral("export", name)
    assert exported.returncode == 0
    assert WORD not in exported.stdout
    with tarfile.open(fileobj=BytesIO(exported.stdout)) as tar:
        assert [member.name for member in tar if secret in member.name] == []
    assert secret not in ok(box, "diff", name)
    ok(box, "commit", name, f"image-of-{name}")
    try:
        assert WORD.decode() not in ok(box, "run", "--rm", f"image-of-{name}", "cat", "/etc/key")
        assert box.corral("run", "--rm", f"image-of-{name}", "cat", f"/run/secrets/{secret}").returncode == 1
    finally:
        ok(box, "rmi", f"image-of-{name}")


def test_a_secret_that_is_used_cannot_be_removed_nor_made_again(box: Corrald, name: str, secret: str) -> None:
    ok(box, "create", "--name", name, "--secret", secret, "busybox", "true")
    result = box.corral("secret", "rm", secret)
    assert (result.returncode, b"is used by" in result.stderr) == (1, True)
    again = box.corral("secret", "create", secret, "-", stdin=b"other")
    assert (again.returncode, b"exists already" in again.stderr) == (1, True)
    assert ok(box, "start", "-a", name) == ""
    listed = {
        row["name"]: row for row in map(json.loads, ok(box, "secret", "ls", "--format", "{{json .}}").splitlines())
    }
    assert len(listed[secret]["containers"]) == 1
    assert listed[secret]["size_bytes"] == len(CONTENT)


def test_bad_secrets_are_refused_and_nothing_is_made(box: Corrald, name: str, secret: str, tmp_path: Path) -> None:
    for asked, told in {
        "nobody": "no such secret: nobody",
        f"{secret},mode=9": "'mode=9' is no number in octal",
        f"{secret},colour=red": "'colour=red' is not understood",
        f"{secret},target=../x": "without '..'",
        f"{secret},type=env,target=A=B": "no name of an environment variable",
        "": "give its name first",
    }.items():
        result = box.corral("run", "--name", name, "--secret", asked, "busybox", "true")
        assert (result.returncode, told in result.stderr.decode()) == (125, True), (asked, result.stderr)
        assert box.corral("inspect", name).returncode == 1
    twice = box.corral("run", "--name", name, "--secret", secret, "--secret", secret, "busybox", "true")
    assert b"same target" in twice.stderr
    for targets, told in {("a", "a/b"): b"lies in /run/secrets/a", ("/x/y", "//x/y"): b"same target /x/y"}.items():
        flags = [word for target in targets for word in ("--secret", f"{secret},target={target}")]
        result = box.corral("run", "--name", name, *flags, "busybox", "true")
        assert (result.returncode, told in result.stderr) == (125, True), result.stderr
    covered = box.corral("run", "--name", name, "--secret", secret, "--tmpfs", "/run/secrets/x", "busybox", "true")
    assert b"where the secrets are" in covered.stderr
    large = tmp_path / "large"
    for size in (0, 512_001):
        large.write_bytes(bytes(size))
        result = box.corral("secret", "create", "large", str(large))
        assert b"it must have 1 to 512000" in result.stderr
    large.write_bytes(b"a\0b")
    ok(box, "secret", "create", "binary", str(large))
    result = box.corral("run", "--name", name, "--secret", "binary,type=env", "busybox", "true")
    assert b"is no text" in result.stderr
    ok(box, "secret", "rm", "binary")
    assert {path.name for path in (box.root / "engine" / "secrets" / "default").iterdir()} == {
        json.loads(ok(box, "secret", "inspect", secret))[0]["id"]
    }


def test_a_secret_whose_content_is_lost_is_told_of(box: Corrald, name: str, secret: str) -> None:
    ok(box, "create", "--name", name, "--secret", secret, "busybox", "true")
    ok(box, "start", "-a", name)
    [file] = (box.root / "engine" / "secrets" / "default").iterdir()
    file.unlink()
    assert f"secret default/{secret} has lost its content" in " ".join(
        box.corral("system", "check").stdout.decode().split()
    )
    result = box.corral("start", "-a", name)
    assert (result.returncode, b"is lost" in result.stderr) == (1, True)
