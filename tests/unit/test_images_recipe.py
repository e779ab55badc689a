"""A layer's blob is told by its unpacked tree and a recipe, byte for byte."""

import gzip
import hashlib
import io
import os
import random
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest
import zstandard
from support.images import Entry, layer, symlink

from corral.images.layers import recipe
from corral.images.layers.compression import Compression
from corral.images.layers.errors import BadLayer

RANDOM = random.Random(7)
BIG = RANDOM.randbytes(300_000)
TEXT = b"".join(b"line %d of the text\n" % RANDOM.randrange(10_000) for _ in range(30_000))
ENTRIES = [
    Entry("etc/big", BIG),
    Entry("text", TEXT),
    Entry("small", b"x"),
    Entry("empty"),
    symlink("link", "etc/big"),
    Entry(f"{'long/' * 40}name", b"y" * 1000),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """As the layer is unpacked."""
    root = tmp_path / "tree"
    for entry in ENTRIES:
        path = root / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.link:
            path.symlink_to(entry.link)
        else:
            path.write_bytes(entry.data)
    return root


def write(blob: bytes, tree: Path, tmp_path: Path) -> Path | None:
    """The recipe, if there is one."""
    (tmp_path / "blob").write_bytes(blob)
    target = tmp_path / "recipe"
    target.unlink(missing_ok=True)
    root = os.open(tree, os.O_PATH | os.O_DIRECTORY)
    try:
        return target if recipe.write(tmp_path / "blob", root, target, {"digest": "x"}) else None
    finally:
        os.close(root)


def remade(target: Path, tree: Path) -> bytes:
    root = os.open(tree, os.O_PATH | os.O_DIRECTORY)
    try:
        return b"".join(recipe.remade(target, root))
    finally:
        os.close(root)


def test_a_plain_tar_is_made_again(tree: Path, tmp_path: Path) -> None:
    tar = layer(ENTRIES)
    target = write(tar, tree, tmp_path)
    assert target is not None
    assert target.stat().st_size < 2000
    assert recipe.read_facts(target)["digest"] == "x"
    assert remade(target, tree) == tar


@pytest.mark.parametrize("level", range(1, 10))
def test_what_zlib_compressed_is_made_again(tree: Path, tmp_path: Path, level: int) -> None:
    blob = gzip.compress(layer(ENTRIES), level, mtime=1234567890)
    target = write(blob, tree, tmp_path)
    assert target is not None
    assert target.stat().st_size < len(blob) / 20
    assert hashlib.sha256(remade(target, tree)).digest() == hashlib.sha256(blob).digest()


def test_a_gzip_header_with_a_name_is_kept(tree: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with gzip.GzipFile("layer.tar", "wb", 9, buffer, mtime=5) as file:
        file.write(layer(ENTRIES))
    target = write(buffer.getvalue(), tree, tmp_path)
    assert target is not None
    assert remade(target, tree) == buffer.getvalue()


@pytest.mark.parametrize("how", ["zstd", "fixed Huffman codes", "filtered"])
def test_what_nothing_here_compresses_alike_has_no_recipe(tree: Path, tmp_path: Path, how: str) -> None:
    tar = layer(ENTRIES)
    if how == "zstd":
        blob = zstandard.compress(tar)
    else:
        strategy = zlib.Z_FIXED if how.startswith("fixed") else zlib.Z_RLE
        encoder = zlib.compressobj(6, zlib.DEFLATED, 31, 8, strategy)
        blob = encoder.compress(tar) + encoder.flush()
    assert write(blob, tree, tmp_path) is None


def test_what_the_tree_has_otherwise_is_in_the_recipe(tree: Path, tmp_path: Path) -> None:
    """A second entry of the name came later, a link took the place, a file is gone, or was changed in the middle."""
    entries = [Entry("text", b"an earlier one" * 100), Entry("link", b"a file before" * 100), *ENTRIES]
    tar = layer(entries)
    (tree / "etc/big").write_bytes(BIG[:200_000] + b"changed" + BIG[200_007:])
    (tree / "text").unlink()
    target = write(tar, tree, tmp_path)
    assert target is not None
    (tree / "etc/big").write_bytes(BIG[:200_000])  # of what differed nothing is taken
    assert remade(target, tree) == tar


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_made_again(tree: Path, tmp_path: Path, form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        archive.add(tree, ".")
    target = write(buffer.getvalue() + b"behind the end" * 50, tree, tmp_path)
    assert target is not None
    assert remade(target, tree) == buffer.getvalue() + b"behind the end" * 50


def test_a_sparse_file_is_kept_as_it_was_stored(tree: Path, tmp_path: Path) -> None:
    with (tree / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end" * 1000)
    subprocess.run(["tar", "-S", "-C", tree, "-cf", tmp_path / "s.tar", "."], check=True)
    tar = (tmp_path / "s.tar").read_bytes()
    target = write(tar, tree, tmp_path)
    assert target is not None
    assert remade(target, tree) == tar


def test_links_of_the_layer_are_not_followed(tree: Path, tmp_path: Path) -> None:
    """Whatever has the name now, nothing outside of the layer comes into a blob."""
    secret = tmp_path / "secret"
    secret.write_bytes(BIG)
    target = write(layer(ENTRIES), tree, tmp_path)
    assert target is not None
    (tree / "etc/big").unlink()
    (tree / "etc/big").symlink_to(secret)
    with pytest.raises(BadLayer, match="has lost its file 'etc/big'"):
        remade(target, tree)


def test_a_damaged_recipe_is_refused_in_a_sentence(tree: Path, tmp_path: Path) -> None:
    target = write(layer(ENTRIES), tree, tmp_path)
    assert target is not None
    whole = target.read_bytes()
    target.write_bytes(b"{}\n" + whole.partition(b"\n")[2])
    with pytest.raises(BadLayer, match="is not understood"):
        remade(target, tree)
    target.write_bytes(whole[:-200])
    with pytest.raises(BadLayer):
        remade(target, tree)


def test_the_way_of_compression_survives_as_json() -> None:
    import json

    way = recipe.Way(Compression.GZIP, b"\x1f\x8b\x08", 9, 8)
    assert recipe.Way.from_json(json.dumps(way.to_json()).encode()) == way
