"""The tar reader, against tarfile and GNU tar, and against what they would never write."""

import io
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.requirements import needs
from support.tars import END, archive, header, member, packed, pax, pax_record

from corral.images.layers.errors import BadLayer, Truncated
from corral.images.layers.stream import ByteStream, prefetched
from corral.images.layers.tar import Entry, Kind, TarReader, parse_pax, pax_time_ns


def pieces(data: bytes, size: int = 1000) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def read(data: bytes, *, needs_end: bool = True, size: int = 1000) -> list[tuple[Entry, bytes]]:
    reader = TarReader(ByteStream(pieces(data, size)), needs_end=needs_end)
    return [(entry, b"".join(map(bytes, reader.payload()))) for entry in reader]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [1, 511, 512, 513, 100_000])
def test_every_dialect_in_pieces_of_any_size(form: int, size: int) -> None:
    files = {"a": b"", "dir/b": b"x" * 511, "c": b"y" * 512, "d" * 90 + "/" + "e" * 90: b"z" * 5000}
    found = read(packed(files, form), size=size)
    assert {entry.name.decode(): data for entry, data in found} == files


@given(
    name=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=300),
    data=st.binary(max_size=2000),
    uid=st.integers(0, 2**32 - 2),
    mtime=st.integers(0, 2**43).map(lambda n: n / 1024),  # exact, and not so small that tarfile writes an exponent
    mode=st.integers(0, 0o7777),
)
@example(name="n" * 300, data=b"", uid=2**31, mtime=1.5, mode=0o4755)
def test_what_tarfile_writes_is_read_as_it_was_meant(name: str, data: bytes, uid: int, mtime: float, mode: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.uid, info.mtime, info.mode = len(data), uid, mtime, mode
        tar.addfile(info, io.BytesIO(data))
    [(entry, found)] = read(buffer.getvalue())
    if entry.kind is Kind.FILE:
        assert found == data
    assert entry.name.rstrip(b"/") == name.encode().rstrip(b"/")
    assert (entry.uid, entry.mode) == (uid, mode)
    assert abs(entry.mtime_ns - mtime * 1e9) < 1e6


def test_every_kind_of_entry() -> None:
    members = archive(
        member(b"d/", kind=b"5"), member(b"s", kind=b"2", link=b"to"), member(b"h", kind=b"1", link=b"d/x"),
        member(b"c", kind=b"3", device=(5, 1)), member(b"b", kind=b"4", device=(8, 300)), member(b"f", kind=b"6"),
        member(b"old/", kind=b"\0"), member(b"seven", b"1", kind=b"7"), member(b"nul", b"2", kind=b"\0"),
    )  # fmt: skip
    kinds = [entry.kind for entry, _ in read(members)]
    assert kinds == [
        Kind.DIRECTORY, Kind.SYMLINK, Kind.HARDLINK, Kind.CHARACTER, Kind.BLOCK, Kind.FIFO,
        Kind.DIRECTORY, Kind.FILE, Kind.FILE,
    ]  # fmt: skip
    assert read(members)[4][0].device == (8, 300)


def test_pax_records_overrule_the_header() -> None:
    records = {
        b"path": "näme".encode() * 60, b"linkpath": b"l" * 200, b"uid": b"3000000", b"mtime": b"1.000000001",
        b"size": b"3", b"SCHILY.xattr.user.k": b"v\0=\n", b"comment": b"no matter",
    }  # fmt: skip
    [(entry, data)] = read(archive(pax(records), member(b"short", b"abc", size=b"00000000000\0")))
    assert entry.name == "näme".encode() * 60
    assert (entry.uid, entry.mtime_ns, data) == (3_000_000, 1_000_000_001, b"abc")
    assert entry.xattrs == {b"user.k": b"v\0=\n"}


def test_global_headers_and_volume_labels_are_passed_over() -> None:
    data = archive(member(b"pax_global_header", pax_record(b"path", b"evil"), kind=b"g"), member(b"l", kind=b"V"),
                   member(b"file", b"x"))  # fmt: skip
    assert [entry.name for entry, _ in read(data)] == [b"file"]


def test_gnu_long_names() -> None:
    data = archive(member(b"@", b"n" * 1000 + b"\0", kind=b"L"), member(b"@", b"t" * 900, kind=b"K"),
                   member(b"cut", kind=b"2", link=b"cut"))  # fmt: skip
    [(entry, _)] = read(data)
    assert (entry.name, entry.link) == (b"n" * 1000, b"t" * 900)


def test_numbers_in_base_256() -> None:
    big = b"\x80" + (3 << 30).to_bytes(11, "big")
    reader = TarReader(ByteStream(iter([header(b"big", size=big)])))
    assert next(iter(reader)).size == 3 << 30


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"this is not an archive" * 100, "not a tar archive"),
        (archive(header(b"x", checksum=1)), "checksum is wrong"),
        (archive(member(b"x", kind=b"Z")), "of a type that images do not have"),
        (archive(header(b"x", size=b"9999999999\0\0")), "size is not a number"),
        (archive(header(b"x", size=b"\xff" * 12)), "size"),
        (archive(member(b"x", uid=b"\x80\0\0\0\xff\xff\xff\xff")), "cannot exist"),
        (archive(member(b"x", kind=b"3", device=(5000, 0))), "cannot exist"),
        (archive(pax({b"path": b"a\0b"}), member(b"x")), "NUL byte"),
        (archive(pax({b"size": b"-1"}), member(b"x")), "number"),
        (archive(pax({b"size": b"9" * 20}), member(b"x")), "impossible size"),
        (archive(pax({b"mtime": b"soon"}), member(b"x")), "number"),
        (archive(member(b"p", b"13 path=x\n", kind=b"x"), member(b"x")), "malformed"),
        (archive(member(b"p", b"9 pathx\n", kind=b"x"), member(b"x")), "malformed"),
        (archive(member(b"p", b"-9 a=b\n", kind=b"x"), member(b"x")), "malformed"),
        (archive(member(b"p", b"99999999999999999999999 a=b\n", kind=b"x"), member(b"x")), "malformed"),
        (archive(header(b"p", size=1 << 30, kind=b"x")), "at most"),
        (archive(header(b"p", size=1 << 30, kind=b"L")), "at most"),
        (archive(pax({b"path": b"d/" * 4000}), member(b"x")), "longer than"),
        (archive(pax({b"SCHILY.xattr.user.x": b"v" * 70000}), member(b"x")), "extended attribute"),
        (archive(member(b"\x1b[31mred", kind=b"Z")), r"\x1b[31mred"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadLayer) as caught:
        read(data)
    assert why in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1023, 1024, 1500])
def test_a_cut_archive_is_truncated_wherever_it_was_cut(cut: int) -> None:
    whole = member(b"file", b"x" * 900) + END
    with pytest.raises(Truncated, match="cut off"):
        read(whole[:cut])


def test_the_end_mark_may_be_missing_only_where_a_digest_proves_the_whole() -> None:
    assert len(read(member(b"file"), needs_end=False)) == 1
    with pytest.raises(Truncated):
        read(member(b"file"))


def test_an_empty_stream_is_truncated() -> None:
    with pytest.raises(Truncated):
        read(b"")


@given(st.binary(max_size=3000))
@example(member(b"p", pax_record(b"GNU.sparse.size", b"9"), kind=b"x") + member(b"x", b"1"))
def test_any_bytes_are_an_archive_or_refused(data: bytes) -> None:
    with suppress(BadLayer):
        read(data, needs_end=False)


@given(st.binary(max_size=600))
def test_any_pax_header_is_read_or_refused(data: bytes) -> None:
    with suppress(BadLayer):
        parse_pax(data)


def test_times_before_the_epoch_and_after_all_time_become_the_epoch() -> None:
    assert pax_time_ns(b"-1.5") == -1_500_000_000
    for value in (b"-1.5", b"99999999999999"):
        [(entry, _)] = read(archive(pax({b"mtime": value}), member(b"x")))
        assert entry.mtime_ns == 0


@needs("tar")
@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=posix", "--sparse-version=0.0"],
                                     ["--format=posix", "--sparse-version=0.1"],
                                     ["--format=posix", "--sparse-version=1.0"]])  # fmt: skip
def test_sparse_files_as_gnu_tar_writes_them(tmp_path: Path, options: list[str]) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        for position in range(0, 6_000_000, 100_000):
            file.seek(position)
            file.write(b"data")
        file.truncate(10_000_000)
    subprocess.run(["tar", "-S", *options, "-C", tmp_path, "-cf", tmp_path / "t", "sparse"], check=True)
    [(entry, data)] = read((tmp_path / "t").read_bytes())
    assert entry.name == b"sparse"
    assert entry.size == 10_000_000
    assert entry.extents is not None
    whole = bytearray(entry.size)
    position = 0
    for offset, length in entry.extents:
        whole[offset : offset + length] = data[position : position + length]
        position += length
    assert bytes(whole) == (tmp_path / "sparse").read_bytes()


@pytest.mark.parametrize("sparse_map", [b"5,1,0,1", b"0,100", b"0", b"x,1", b"0,1,0,1", b"0,99999999999999999999"])
def test_a_lying_map_of_a_sparse_file_is_refused(sparse_map: bytes) -> None:
    records = {b"GNU.sparse.size": b"10", b"GNU.sparse.map": sparse_map}
    with pytest.raises(BadLayer, match="map"):
        read(archive(pax(records), member(b"x", b"ab")))


def test_what_goes_wrong_in_the_thread_that_works_ahead_is_raised() -> None:
    def broken() -> Iterator[bytes]:
        yield b"x"
        raise BadLayer("broken")

    ahead = prefetched(broken())
    assert next(ahead) == b"x"
    with pytest.raises(BadLayer, match="broken"):
        next(ahead)


def test_a_reader_that_gives_up_ends_the_thread_that_works_ahead() -> None:
    import threading

    before = threading.active_count()
    ahead = prefetched(iter([b"x"] * 1000), depth=2)
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
