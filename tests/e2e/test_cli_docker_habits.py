"""What hands that know docker type does what they expect, with the codes and words that scripts look for."""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from support.corrald import Corrald, running
from support.images import Entry, image_config, layer, write_busybox, write_oci_archive
from support.registry import Registry
from support.registry import running as registry_running
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox", "docker-registry", "openssl")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corrald]:
    archive = write_busybox(tmp_path_factory.mktemp("box") / "b.tar", "busybox:latest", Labels={"kind": "box"})
    with running() as daemon:
        daemon.corral("load", "-i", str(archive), check=True)
        yield daemon


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry_running(tmp_path_factory.mktemp("registry"), credentials=("alice", "secret")) as made:
        yield made


def said(box: Corrald, *words: str) -> str:
    return box.corral(*words, check=True).stdout.decode()


def test_images_are_listed_by_template_and_filter(box: Corrald) -> None:
    said(box, "tag", "busybox", "team/app:1")
    assert sorted(said(box, "images", "--format", "{{.Repository}}:{{.Tag}}").split()) == [
        "busybox:latest",
        "team/app:1",
    ]
    short = said(box, "images", "-a", "-q", "busybox").strip()
    assert (
        said(box, "image", "list", "--no-trunc", "--format", "{{.ID}}", "busybox").strip().startswith(f"sha256:{short}")
    )
    assert said(box, "images", "--filter", "reference=team/*", "--format", "{{.Tag}}") == "1\n"
    assert said(box, "images", "-f", "dangling=true", "-q") == ""
    assert len(said(box, "images", "-f", "label=kind=box", "-q").split()) == 2
    assert said(box, "images", "-f", "label=kind=none", "-q") == ""
    [target] = {line.split()[2] for line in said(box, "images", "--digests", "busybox").splitlines()[1:]}
    assert target == said(box, "image", "inspect", "-f", "{{.Target.Digest}}", "busybox").strip()
    table = said(box, "images", "--format", r"table {{.Repository}}\t{{.Size}}", "busybox").splitlines()
    assert [line.split()[0] for line in table] == ["REPOSITORY", "busybox"]
    assert said(box, "ps", "-a", "--format", "{{.Names}}") == ""
    said(box, "tag", "busybox", "team/other:2")
    wanted = ["-f", "reference=team/*:1", "-f", "reference=team/*:2", "--format", "{{.Tag}}"]
    assert said(box, "images", *wanted) == "1\n2\n"
    said(box, "rmi", "team/other:2")
    for words in (["--filter", "size=x"], ["--format", "{{range .}}"], ["--format", "yaml"]):
        wrong = box.corral("images", *words)
        assert wrong.returncode in (1, 2)
        assert b"Traceback" not in wrong.stderr
        assert b"give" in wrong.stderr or b"understood" in wrong.stderr or b"none of" in wrong.stderr


def test_images_are_compared_by_when_they_were_made(box: Corrald, tmp_path: Path) -> None:
    layers = [layer([Entry("f", b"young")])]
    config = json.loads(image_config(layers, Labels={"kind": "young"})) | {"created": "2025-06-01T00:00:00Z"}
    archive = write_oci_archive(tmp_path / "young.tar", "young:1", layers, json.dumps(config).encode())
    said(box, "load", "-i", str(archive))
    form = ["--format", "{{.Repository}}"]
    assert said(box, "images", "-f", "since=busybox", *form) == "young\n"
    assert said(box, "images", "-f", "before=young:1", "-f", "reference=busybox", *form) == "busybox\n"
    assert said(box, "images", "-f", "until=2025-03-01", "-f", "reference=young", *form) == ""
    assert said(box, "images", "-f", "label!=kind=box", *form) == "young\n"
    row = said(box, "images", "--format", "{{.Digest}} {{.CreatedSince}}", "young")
    assert row.startswith("sha256:")
    assert row.endswith(" ago\n")
    for filters in (["label!=kind"], ["label=kind=box", "label=other"], ["until=2025-03-01", "label=kind=young"]):
        said(box, "image", "prune", "-a", *(word for text in filters for word in ("--filter", text)))
    assert said(box, "images", "-q", "young")
    assert "young:1" in said(box, "image", "prune", "-a", "--filter", "label=kind=young", "--filter", "label!=x")
    assert not said(box, "images", "-q", "young")
    assert said(box, "images", "-q", "busybox")


def test_templates_that_were_written_for_docker_find_its_names(box: Corrald) -> None:
    form = '{{index .RepoTags 0}} {{.Os}}/{{.Architecture}} {{index .Config.Labels "kind"}} {{index .RepoDigests 0}}'
    shown = said(box, "image", "inspect", "-f", form, "busybox").split()
    assert shown[0] in ("busybox:latest", "team/app:1")
    assert shown[1].startswith("linux/")
    assert shown[2] == "box"
    assert shown[3] == f"busybox@{said(box, 'image', 'inspect', '-f', '{{.Target.Digest}}', 'busybox').strip()}"
    assert said(box, "image", "inspect", "-f", "{{.RootFS.Type}} {{.Size}}", "busybox").startswith("layers 2")


def test_history_by_template_and_import_by_docker_s_words(box: Corrald, tmp_path: Path) -> None:
    form = "{{.ID}} {{.CreatedBy}} {{.CreatedSince}}"
    [step] = said(box, "history", "--no-trunc", "--format", form, "busybox").splitlines()
    assert step.startswith("sha256:")
    assert "corral tests" in step
    assert step.endswith(" ago")
    (tmp_path / "root.tar").write_bytes(layer([Entry("f", b"content")]))
    assert said(box, "import", "-q", str(tmp_path / "root.tar"), "made:1") == "made:1\n"
    assert box.corral("import", "--as", "a:1", str(tmp_path / "root.tar"), "b:1").returncode == 2
    (tmp_path / "there").mkdir()
    said(box, "image", "mount", "made:1", str(tmp_path / "there"))
    assert (tmp_path / "there/f").read_bytes() == b"content"
    said(box, "image", "umount", str(tmp_path / "there"))
    said(box, "rmi", "made:1")


def test_inspect_shows_what_is_here_and_names_what_is_not(box: Corrald) -> None:
    result = box.corral("image", "inspect", "none:1", "busybox")
    assert result.returncode == 1
    assert [image["familiar_name"] for image in json.loads(result.stdout)] == ["busybox:latest"]
    assert result.stderr.decode().startswith("corral: there is no image 'none:1'")
    nothing = box.corral("image", "inspect", "none:1")
    assert (nothing.returncode, json.loads(nothing.stdout)) == (1, [])


def test_inspect_finds_containers_and_images(box: Corrald) -> None:
    said(box, "create", "--name", "made", "busybox", "true")
    said(box, "tag", "busybox", "made:latest")
    shown = json.loads(said(box, "inspect", "made", "busybox"))
    assert [shown[0]["name"], shown[1]["familiar_name"]] == ["made", "busybox:latest"]
    assert said(box, "inspect", "--type", "image", "-f", "{{.FamiliarName}}", "made") == "made:latest\n"
    assert said(box, "inspect", "-f", "{{.Status}} {{json .Name}}", "made") == 'created "made"\n'
    for words in (["none"], ["--type", "container", "busybox"]):
        missing = box.corral("inspect", *words)
        assert (missing.returncode, json.loads(missing.stdout)) == (1, [])
        assert b"container" in missing.stderr
    said(box, "rm", "made")
    said(box, "rmi", "made")


def test_rmi_says_names_as_they_were_typed_and_by_force_minds_nothing_that_is_not_there(box: Corrald) -> None:
    said(box, "tag", "busybox", "gone:1")
    assert said(box, "rmi", "gone:1") == "Untagged: gone:1\n"
    assert box.corral("rmi", "gone:1").returncode == 1
    forced = box.corral("image", "remove", "-f", "gone:1")
    assert (forced.returncode, b"there is no image" in forced.stderr) == (0, True)
    assert said(box, "image", "prune", "-f").splitlines()[-1].startswith("Total reclaimed space: ")


def test_a_login_without_a_terminal_says_what_to_give(
    box: Corrald, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    for words, stdin, why in (
        ([], b"", b"--password-stdin"),
        (["-u", "alice"], b"secret", b"--password-stdin"),
        (["-u", "alice", "--password-stdin"], b"", b"no password came"),
        (["--password-stdin"], b"secret", b"--username"),
        (["-u", "alice", "-p", "secret", "--password-stdin"], b"secret", b"no --password"),
    ):
        result = box.corral("login", *words, registry.host, stdin=stdin)
        assert result.returncode == 2
        assert why in result.stderr
    given = box.corral("login", "-u", "alice", "-p", "secret", f"http://{registry.host}/v2/", check=True)
    assert given.stdout == b"Login Succeeded\n"
    assert b"others may see" in given.stderr
    again = box.corral("login", registry.host, check=True)
    assert (again.stdout, b"existing credentials" in again.stderr) == (b"Login Succeeded\n", True)
    said(box, "push", "busybox", f"{registry.host}/a")
    said(box, "tag", "busybox", f"{registry.host}/a")
    assert said(box, "pull", f"{registry.host}/a").splitlines()[0] == "Using default tag: latest"
    assert said(box, "logout", f"https://{registry.host}") == f"Removing login credentials for {registry.host}\n"


def test_volumes_of_another_container_and_labels_of_a_file(box: Corrald, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("# comment\na=1\nb=2\n")
    (tmp_path / "bound").mkdir()
    said(
        box,
        "run",
        "--name",
        "first",
        "-v",
        "/data",
        "-v",
        f"{tmp_path}/bound:/b",
        "busybox",
        "touch",
        "/data/x",
        "/b/y",
    )
    out = said(
        box, "run", "--rm", "--name", "second", "--volumes-from", "first", "--label-file", f"{tmp_path}/labels",
        "busybox", "ls", "/data", "/b",
    )  # fmt: skip
    assert {"x", "y"} <= set(out.split())
    refused = box.corral("run", "--rm", "--volumes-from", "first:ro", "busybox", "touch", "/b/z")
    assert b"Read-only file system" in refused.stderr
    said(box, "rm", "-v", "first")


def test_a_limit_of_processes_is_lifted_by_0(box: Corrald) -> None:
    said(box, "run", "-d", "--name", "many", "--pids-limit", "50", "busybox", "sleep", "60")
    limit = ("inspect", "-f", "{{.HostConfig.PidsLimit}}", "many")
    said(box, "update", "--memory", "100m", "many")
    assert said(box, *limit) == "50\n"
    said(box, "update", "--pids-limit", "0", "many")
    assert said(box, *limit) == "-1\n"
    assert json.loads(said(box, "stats", "--no-stream", "--format", "json", "many"))["cgroup"]["pids"]["limit"] <= 0
    said(box, "rm", "-f", "many")


def test_times_without_a_zone_are_of_the_one_here(box: Corrald, monkeypatch: pytest.MonkeyPatch) -> None:
    said(box, "run", "--name", "old", "busybox", "echo", "hello")
    [stamp, _] = said(box, "logs", "-t", "old").split()
    for zone in ("Europe/Berlin", "UTC"):
        monkeypatch.setenv("TZ", zone)
        here = datetime.fromisoformat(stamp).astimezone(ZoneInfo(zone)) - timedelta(minutes=1)
        assert said(box, "logs", "--since", f"{here:%Y-%m-%dT%H:%M:%S}", "old") == "hello\n"
        assert said(box, "logs", "--until", f"{here:%Y-%m-%dT%H:%M}", "old") == ""
        assert said(box, "logs", "--since", stamp, "--until", stamp, "old") == "hello\n"
    wrong = box.corral("logs", "--since", "yesterday", "old")
    assert (wrong.returncode, b"'yesterday' is not understood" in wrong.stderr) == (1, True)
    said(box, "rm", "old")
