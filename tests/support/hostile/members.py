"""Archives whose own members, tables and names lie."""

import gzip
import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from support.hostile.case import MAX_BYTES, ArchiveCase
from support.hostile.documents import GOOD, INDEX, MANIFEST, TAR, described, dumped, image
from support.hostile.sizes import base256
from support.images import digest
from support.tars import END, archive, header, member, packed

CONFIG_NAME = f"{digest(GOOD)[7:]}.json"


def docker(table: object, files: Mapping[str, bytes] | None = None) -> bytes:
    """A docker-archive with that table."""
    files = {CONFIG_NAME: GOOD, "layer.tar": TAR} if files is None else files
    return packed({**files, "manifest.json": table if isinstance(table, bytes) else dumped(table)})


def _entry(**fields: object) -> list[dict[str, object]]:
    return [{"Config": CONFIG_NAME, "RepoTags": ["bad:1"], "Layers": ["layer.tar"], **fields}]


def _docker(**fields: object) -> Callable[[Path], bytes]:
    return lambda _canary: docker(_entry(**fields))


def _raw(*members: bytes) -> Callable[[Path], bytes]:
    return lambda _canary: archive(*members)


def _linked(name: str, kind: bytes, target: Callable[[Path], str]) -> Callable[[Path], bytes]:
    """A docker-archive in which `name` is a link."""

    def build(canary: Path) -> bytes:
        buffer = io.BytesIO()
        files = {CONFIG_NAME: GOOD, "layer.tar": TAR, "manifest.json": dumped(_entry())}
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for each, data in files.items():
                info = tarfile.TarInfo(each)
                if each == name:
                    info.type, info.linkname = kind, target(canary)
                else:
                    info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    return build


def layout(index: object, blobs: Mapping[str, bytes] | None = None, **more: bytes) -> bytes:
    """An OCI layout with that index; blobs by the digest that they are said to have."""
    files = {f"blobs/sha256/{name[7:]}": data for name, data in (blobs or {}).items()}
    return packed({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', **files, **more, "index.json": dumped(index)})


def _named(name: str, key: str = "io.containerd.image.name") -> Callable[[Path], bytes]:
    def build(_canary: Path) -> bytes:
        made = image([described(TAR, "application/vnd.oci.image.layer.v1.tar")], [TAR])
        entry = described(made.target, MANIFEST, annotations={key: name})
        blobs = {**made.blobs, digest(made.target): made.target}
        return layout({"schemaVersion": 2, "manifests": [entry]}, blobs)

    return build


def _other_content(which: str) -> Callable[[Path], bytes]:
    """A layout in which the manifest, config or layer is not what its name says."""

    def build(_canary: Path) -> bytes:
        made = image([described(TAR, "application/vnd.oci.image.layer.v1.tar")], [TAR])
        names = {"manifest": digest(made.target), "config": digest(GOOD), "layer": digest(TAR)}
        blobs = {**made.blobs, digest(made.target): made.target}
        blobs[names[which]] = blobs[names[which]] + b" "
        return layout({"schemaVersion": 2, "manifests": [described(made.target, MANIFEST)]}, blobs)

    return build


def _many_files(_canary: Path) -> bytes:
    return archive(member(b"manifest.json", b"[]"), header(b"d", kind=b"5") * 100_001)


def _bomb(_canary: Path) -> bytes:
    return gzip.compress(archive(member(b"manifest.json", b"[]"), member(b"layer.tar", bytes(4 * MAX_BYTES))), 9)


def _bomb_ahead(_canary: Path) -> bytes:
    """Before there is a name that tells what the archive is."""
    return gzip.compress(archive(member(b"blobs", bytes(4 * MAX_BYTES)), member(b"manifest.json", b"[]")), 9)


def _cut(part: float) -> Callable[[Path], bytes]:
    def build(_canary: Path) -> bytes:
        data = docker(_entry())
        return data[: int(len(data.rstrip(b"\0")) * part)]

    return build


_TAGS = ("UPPER", "a b:1", "x:", "../x:1", "x:\x1b]0;owned\x07", "x@sha256:0", "a" * 300, "/", "")
_DIGEST_OF_NOTHING = "0" * 64

ARCHIVES: tuple[ArchiveCase, ...] = (
    ArchiveCase(
        "a member climbs",
        lambda c: archive(member(b"manifest.json", b"[]"), member(b"../" * 20 + str(c)[1:].encode() + b"/owned", b"x")),
        "climbs",
    ),
    ArchiveCase("a member is absolute", lambda c: docker(_entry(), {CONFIG_NAME: GOOD, f"{c}/owned": b"x"}), "lacks"),
    ArchiveCase(
        "the table's layer climbs", _docker(Layers=["../../../../etc/passwd"]), "lacks '../../../../etc/passwd'"
    ),
    ArchiveCase("the table's layer is absolute", lambda c: docker(_entry(Layers=[f"{c}/kept"])), "lacks"),
    ArchiveCase("the table's config climbs", _docker(Config="../../../../etc/passwd"), "lacks"),
    ArchiveCase("the table's config is its table", _docker(Config="manifest.json"), "is not a JSON object"),
    ArchiveCase("the table's layer is its table", _docker(Layers=["manifest.json"]), "cut off"),
    ArchiveCase("the layer is a link out", _linked("layer.tar", b"2", lambda c: f"{c}/kept"), "lacks"),
    ArchiveCase(
        "the layer is a climbing link", _linked("layer.tar", b"2", lambda c: "../" * 20 + str(c)[1:] + "/kept"), "lacks"
    ),
    ArchiveCase("the layer is a hard link out", _linked("layer.tar", b"1", lambda c: f"{c}/kept"), "lacks"),
    ArchiveCase("the layer is a link to itself", _linked("layer.tar", b"2", lambda _: "layer.tar"), "lacks"),
    ArchiveCase("the config is a link out", _linked(CONFIG_NAME, b"2", lambda c: f"{c}/kept"), "lacks"),
    ArchiveCase("the table is a link out", _linked("manifest.json", b"2", lambda _: "/etc/passwd"), "no manifest.json"),
    ArchiveCase(
        "the table is a device", _raw(member(b"manifest.json", kind=b"3"), member(b"layer.tar", TAR)), "no manifest"
    ),
    ArchiveCase("the table's config is a number", _docker(Config=1), "Config is not a string"),
    ArchiveCase("the table is cut off", lambda _: docker(b"[{"), "is not JSON"),
    ArchiveCase("the table is an object", lambda _: docker({"Config": "x"}), "is not a list"),
    ArchiveCase("the table is empty", lambda _: docker([]), "lists no image"),
    ArchiveCase("the table holds a number", lambda _: docker([7]), "is not an object"),
    ArchiveCase("the table has 100,000 layers", _docker(Layers=["layer.tar"] * 100_000), "its config tells of 1"),
    ArchiveCase("the table has 100,001 layers", _docker(Layers=["layer.tar"] * 100_001), "more than 100000"),
    ArchiveCase("the table has 2,000 images", lambda _: docker(_entry() * 2000), "at most 1000"),
    ArchiveCase("the table has 100,000 levels", lambda _: docker(b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
    ArchiveCase("the table has five mebibytes", lambda _: docker(b"[" + b" " * (5 << 20) + b"]"), "at most 4194304"),
    ArchiveCase(
        "the table has a layer twice as key",
        lambda _: docker(dumped(_entry()).replace(b'"Layers"', b'"Layers": [], "Layers"')),
        "'Layers' twice",
    ),
    ArchiveCase("the table has half a character", lambda _: docker(b'[{"Config":"\\ud800"}]'), "is not JSON"),
    *(ArchiveCase(f"a tag {tag[:20]!r}", _docker(RepoTags=[tag]), "image name") for tag in _TAGS),
    ArchiveCase("a tag that is a number", _docker(RepoTags=[7]), "not a list of strings"),
    ArchiveCase("a config with another name", _docker(Config=f"{_DIGEST_OF_NOTHING}.json"), "lacks"),
    ArchiveCase(
        "a config that is not what its name says",
        lambda _: docker(_entry(), {CONFIG_NAME: GOOD + b" ", "layer.tar": TAR}),
        "has the digest",
    ),
    ArchiveCase("a layout's name climbs", _named("../../x:1"), "image name"),
    ArchiveCase("a layout's name steers the terminal", _named("x/\x1b[2J:1"), "image name"),
    ArchiveCase("a layout's reference climbs", _named("../../x:1", "org.opencontainers.image.ref.name"), "image name"),
    ArchiveCase(
        "a layout of version 2",
        lambda _: packed({"oci-layout": b'{"imageLayoutVersion":"2.0"}', "index.json": b"{}"}),
        "version '2.0'",
    ),
    ArchiveCase(
        "a layout without an index",
        lambda _: packed({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "blobs/sha256/x": b""}),
        "no manifest.json",
    ),
    ArchiveCase("an index that is a list", lambda _: layout([]), "not a JSON object"),
    ArchiveCase("an index of nothing", lambda _: layout({"schemaVersion": 2, "manifests": []}), "lists no image"),
    ArchiveCase(
        "an index of what is not there",
        lambda _: layout({"schemaVersion": 2, "manifests": [described(b"x", INDEX)]}),
        "lacks blob",
    ),
    ArchiveCase("a manifest with other content", _other_content("manifest"), "has other content"),
    ArchiveCase("a config with other content", _other_content("config"), "has other content"),
    ArchiveCase("a layer with other content", _other_content("layer"), "has other content"),
    ArchiveCase("a blob whose name climbs", _raw(member(b"blobs/sha256/../../x", b"x")), "climbs"),
    ArchiveCase("100,001 members", _many_files, "more than 100000 files"),
    ArchiveCase("a gzip bomb of an archive", _bomb, "more than"),
    ArchiveCase("a bomb ahead of the first name", _bomb_ahead, ""),
    ArchiveCase("a member of an exbibyte", _raw(header(b"manifest.json", size=base256(1 << 60))), "cut off"),
    ArchiveCase(
        "a member with a negative size", _raw(header(b"manifest.json", size=base256(-5))), "size is not a number"
    ),
    ArchiveCase("an archive cut in its table", _cut(0.99), "cut off"),
    ArchiveCase("an archive cut in a layer", _cut(0.5), "cut off"),
    ArchiveCase(
        "an archive without an end mark", lambda _: docker(_entry())[: -len(END) * 10].rstrip(b"\0"), "cut off"
    ),
    ArchiveCase("an archive that is no archive", lambda _: b"this is none" * 200, "not a tar archive"),
)
assert len({case.name for case in ARCHIVES}) == len(ARCHIVES)
