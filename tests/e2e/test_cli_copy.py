"""`corral cp`: docker's rules for what goes where, and containers that lie."""

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.corrald import Corrald

SCRIPT = """
mkdir -p /data/sub; echo one > /data/one; echo two > /data/sub/two; ln -s one /data/link; ln -s /etc /data/away
ln /data/one /data/hard; chmod 4751 /data/one; mkfifo /data/fifo; chown 12:34 /data/sub/two; echo vol > /v/file
echo ready > /data/ready; exec sleep 1000
"""


@pytest.fixture
def living(box: Corrald, name: str) -> Iterator[str]:
    box.corral("run", "-d", "--name", name, "-v", f"{name}-vol:/v", "busybox", "sh", "-c", SCRIPT, check=True)
    while box.corral("exec", name, "cat", "/data/ready").returncode:
        pass
    yield name
    box.corral("rm", "-f", name)
    box.corral("volume", "rm", f"{name}-vol", check=True)


@pytest.fixture(params=["running", "stopped"])
def container(request: pytest.FixtureRequest, box: Corrald, living: str) -> str:
    if request.param == "stopped":
        box.corral("kill", living, check=True)
        box.corral("wait", living, check=True)
    return living


def cp(box: Corrald, *args: str | Path, stdin: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
    return box.corral("cp", *map(str, args), stdin=stdin)


def ok(box: Corrald, *args: str | Path, stdin: bytes | None = None) -> bytes:
    result = cp(box, *args, stdin=stdin)
    assert result.returncode == 0, (args, result.stderr)
    return result.stdout


def test_files_and_directories_come_out(box: Corrald, container: str, tmp_path: Path) -> None:
    ok(box, f"{container}:/data/one", tmp_path / "new")
    assert (tmp_path / "new").read_text() == "one\n"
    ok(box, f"{container}:data/one", tmp_path)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o751  # it is another's now: nobody becomes that
    ok(box, f"{container}:/data", tmp_path / "renamed")
    ok(box, f"{container}:/data", tmp_path)
    (tmp_path / "contents").mkdir()
    ok(box, f"{container}:/data/.", tmp_path / "contents")
    for place in ("renamed", "data", "contents"):
        tree = tmp_path / place
        assert (tree / "sub/two").read_text() == "two\n"
        assert (tree / "link").readlink() == Path("one")
        assert (tree / "away").readlink() == Path("/etc")
        assert (tree / "hard").stat().st_ino == (tree / "one").stat().st_ino
        assert (tree / "fifo").is_fifo()
        assert (tree / "sub/two").stat().st_uid == os.geteuid()
    ok(box, "-a", f"{container}:/data/sub/two", tmp_path / "kept")
    assert ((tmp_path / "kept").stat().st_uid, (tmp_path / "kept").stat().st_gid) == (12, 34)
    ok(box, "-L", f"{container}:/data/link", tmp_path / "followed")
    assert (tmp_path / "followed").read_text() == "one\n"
    ok(box, f"{container}:/v/file", tmp_path / "volume")
    assert (tmp_path / "volume").read_text() == "vol\n"


def test_files_and_directories_go_in(box: Corrald, container: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below/file").write_text("inside")
    (tree / "exe").write_text("x")
    (tree / "exe").chmod(0o755)
    os.setxattr(tree / "exe", "user.mark", b"m")
    os.chown(tree / "exe", 77, 78)
    ok(box, tree / "exe", f"{container}:/srv-file")
    ok(box, tree, f"{container}:/srv")
    ok(box, tree, f"{container}:/srv")
    (tmp_path / "merged").mkdir()
    ok(box, f"{tree}/.", f"{container}:/data/sub")
    ok(box, "-a", tree / "exe", f"{container}:/v")
    ok(box, tree / "exe", f"{container}:/data/one")
    back = tmp_path / "back"
    back.mkdir()
    for path in ("/srv-file", "/srv", "/data", "/v"):
        ok(box, "-a", f"{container}:{path}", back)
    assert (back / "srv/below/file").read_text() == (back / "srv/tree/below/file").read_text() == "inside"
    assert (back / "data/sub/below/file").read_text() == "inside"
    assert (back / "data/sub/two").read_text() == "two\n"
    assert (back / "data/one").read_text() == "x"
    assert (back / "data/hard").read_text() == "one\n"  # what was there is replaced, not written into
    assert stat.S_IMODE((back / "srv-file").stat().st_mode) == 0o755
    assert (back / "srv-file").stat().st_uid == 0
    assert ((back / "v/exe").stat().st_uid, (back / "v/exe").stat().st_gid) == (77, 78)


def test_what_a_link_leads_to_is_replaced_and_not_the_link(box: Corrald, container: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("new")
    (tmp_path / "links").mkdir()
    for name, target in (("near", "../data/one"), ("far", "/links/near"), ("directory", "/data/sub")):
        (tmp_path / "links" / name).symlink_to(target)
    ok(box, tmp_path / "links", f"{container}:/links")
    ok(box, tmp_path / "f", f"{container}:/links/far")
    ok(box, tmp_path / "f", f"{container}:/links/directory")
    back = tmp_path / "back"
    back.mkdir()
    ok(box, f"{container}:/links", back)
    ok(box, f"{container}:/data", back)
    assert (back / "links/far").is_symlink()
    assert (back / "links/near").is_symlink()
    assert ((back / "data/one").read_text(), (back / "data/sub/f").read_text()) == ("new", "new")
    told = cp(box, tmp_path / "none", f"{container}:/data").stderr
    assert told == f"corral: {tmp_path}/none: No such file or directory\n".encode()


def test_tars_pass_through_pipes(box: Corrald, container: str) -> None:
    data = ok(box, f"{container}:/data", "-")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = tar.getnames()
        assert names[0] == "data"
        assert {"data/one", "data/sub/two", "data/fifo"} <= set(names)
        assert tar.getmember("data/sub/two").uid == 12
    ok(box, "-", f"{container}:/v", stdin=data)
    again = ok(box, f"{container}:/v/data", "-")
    with tarfile.open(fileobj=io.BytesIO(again)) as tar:
        assert tar.getnames() == names
        assert tar.getmember("data/sub/two").uid == 12


def test_what_cannot_be_is_told_in_one_sentence(box: Corrald, living: str, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    for args, words in (
        ((f"{living}:/nope", tmp_path), ": /nope: no such file or directory"),
        ((f"{living}:/data/one/.", tmp_path), "not a directory"),
        ((f"{living}:/data", tmp_path / "file"), "is no directory"),
        ((f"{living}:/data", tmp_path / "no/where"), "does not exist"),
        ((f"{living}:/data/one", f"{tmp_path}/no/"), "does not exist"),
        ((tmp_path / "dir", f"{living}:/data/one"), "is no directory"),
        ((tmp_path / "file", f"{living}:/no/where"), "/no: no such directory"),
        ((tmp_path / "nothing", f"{living}:/"), "nothing"),
        (("nobody:/x", tmp_path), "nobody"),
        ((tmp_path / "file", tmp_path / "dir"), "must be CONTAINER:PATH"),
    ):
        result = cp(box, *args)
        assert result.returncode != 0, args
        assert words in result.stderr.decode(), (args, result.stderr)
        assert "Traceback" not in result.stderr.decode()
    bad = cp(box, "-", f"{living}:/v", stdin=b"this is no tar" * 100)
    assert bad.returncode == 1
    assert "is no tar" in bad.stderr.decode()


def test_an_archive_that_leads_out_is_refused(box: Corrald, living: str) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../out"))
    result = cp(box, "-", f"{living}:/data/sub", stdin=data.getvalue())
    assert result.returncode == 1
    assert "leads out of the directory" in result.stderr.decode()


def test_links_of_the_container_lead_nowhere_on_the_host(box: Corrald, container: str, tmp_path: Path) -> None:
    """A path, a parent and a target that are links to the host's own files."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    script = f"mkdir -p {tmp_path}; ln -sfn {secret} /data/steal; ln -sfn / /data/root; ln -sfn {secret} /data/over"
    if box.corral("exec", container, "sh", "-c", script).returncode:  # it does not run: by cp itself
        tree = tmp_path / "links"
        tree.mkdir()
        for link, leads in (("steal", secret), ("root", "/"), ("over", secret)):
            (tree / link).symlink_to(leads)
        ok(box, f"{tree}/.", f"{container}:/data")
    stolen = cp(box, "-L", f"{container}:/data/steal", tmp_path / "stolen")
    assert stolen.returncode == 1
    assert cp(box, f"{container}:/data/root{secret}", tmp_path / "stolen").returncode == 1
    (tmp_path / "mine").write_text("mine")
    cp(box, tmp_path / "mine", f"{container}:/data/over")
    cp(box, tmp_path / "mine", f"{container}:/data/root{tmp_path}/secret")
    assert secret.read_text() == "of the host"
    assert not (tmp_path / "stolen").exists()


def test_a_container_that_was_never_started_and_one_read_only(box: Corrald, name: str, tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("hello")
    box.corral("create", "--name", name, "busybox", "cat", "/srv/hello", check=True)
    box.corral("cp", f"{tmp_path}/hello", f"{name}:/tmp/hello")
    ok(box, tmp_path / "hello", f"{name}:/etc/hello")
    ok(box, f"{name}:/etc/hello", tmp_path / "again")
    assert (tmp_path / "again").read_text() == "hello"
    other = f"{name}-ro"
    box.corral("run", "-d", "--name", other, "--read-only", "busybox", "sleep", "1000", check=True)
    try:
        for _ in range(2):
            refused = cp(box, tmp_path / "hello", f"{other}:/etc/hello")
            assert refused.returncode == 1
            assert "read-only file system" in refused.stderr.decode()
            box.corral("kill", other)
            box.corral("wait", other)
    finally:
        box.corral("rm", "-f", other)


def test_a_second_copy_does_not_go_through_a_link_that_the_first_has_brought(
    box: Corrald, living: str, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/precious").write_text("of the host")
    script = "mkdir /d; ln -s ../home /d/x"
    box.corral("exec", living, "sh", "-c", script, check=True)
    (tmp_path / "place").mkdir()
    ok(box, f"{living}:/d", tmp_path)
    assert (tmp_path / "d/x").is_symlink()
    box.corral("exec", living, "sh", "-c", "rm /d/x; mkdir /d/x; echo taken > /d/x/precious", check=True)
    refused = cp(box, f"{living}:/d", tmp_path)
    assert refused.returncode == 1
    assert b"d/x is there, and is no directory" in refused.stderr
    assert (tmp_path / "home/precious").read_text() == "of the host"


def test_the_hosts_proc_leads_nowhere(box: Corrald, name: str, tmp_path: Path) -> None:
    """A container that sees the host's processes plants a link through the root of one."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    (tmp_path / "app/sub").mkdir(parents=True)
    (tmp_path / "app/sub/secret").write_text("planted")
    box.corral("run", "-d", "--name", name, "--pid", "host", "busybox", "sleep", "1000", check=True)
    box.corral("exec", name, "sh", "-c", f"mkdir /c; ln -s /proc/1/root{tmp_path} /c/sub", check=True)
    assert cp(box, f"{tmp_path}/app/.", f"{name}:/c").returncode == 1
    assert cp(box, secret, f"{name}:/c/sub").returncode == 1
    assert cp(box, f"{name}:/c/sub/secret", tmp_path / "stolen").returncode == 1
    assert cp(box, "-L", f"{name}:/c/sub", tmp_path / "stolen").returncode == 1
    assert secret.read_text() == "of the host"
    assert not (tmp_path / "stolen").exists()
