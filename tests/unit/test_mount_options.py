"""Mount options, sorted by what the kernel wants done with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.kernel import mount
from corral.kernel.overlay import split_lower
from corral.oci.mount_options import Attributes, MountOptions, known, parse
from corral.oci.stage import normal


def test_attributes_propagation_and_data_are_told_apart():
    assert parse(["ro", "nosuid", "mode=755", "rslave", "size=1m"]) == MountOptions(
        attributes=Attributes(set=mount.MOUNT_ATTR_RDONLY | mount.MOUNT_ATTR_NOSUID),
        propagation=mount.MS_SLAVE,
        propagation_recursive=True,
        data=("mode=755", "size=1m"),
    )


def test_the_last_of_two_opposites_wins():
    assert parse(["ro", "rw"]).attributes == Attributes(clear=mount.MOUNT_ATTR_RDONLY)
    assert parse(["rw", "ro"]).attributes == Attributes(set=mount.MOUNT_ATTR_RDONLY)
    assert parse(["noatime", "strictatime"]).attributes.atime == mount.MOUNT_ATTR_STRICTATIME


def test_recursive_attributes_are_apart_from_plain_ones():
    options = parse(["ro", "rro", "rnosuid", "rsuid", "rnoatime"])
    assert options.attributes == Attributes(set=mount.MOUNT_ATTR_RDONLY)
    assert options.recursive == Attributes(
        set=mount.MOUNT_ATTR_RDONLY, clear=mount.MOUNT_ATTR_NOSUID, atime=mount.MOUNT_ATTR_NOATIME
    )


def test_relatime_is_no_recursive_option():
    assert parse(["relatime"]) == MountOptions(attributes=Attributes(atime=0))


@pytest.mark.parametrize(("option", "recursive"), [("bind", False), ("rbind", True)])
def test_bind(option, recursive):
    assert (parse([option]).bind, parse([option]).bind_recursive) == (True, recursive)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["sync"], ("sync",)),
        (["sync", "async"], ()),
        (["async", "sync"], ("sync",)),
        (["lazytime", "dirsync", "nolazytime"], ("dirsync",)),
    ],
)
def test_flags_of_the_file_system(options, flags):
    assert parse(options) == MountOptions(superblock=flags)


def test_ids_of_a_mount():
    assert (parse(["idmap"]).idmap, parse(["idmap"]).idmap_recursive) == (True, False)
    assert (parse(["ridmap"]).idmap, parse(["ridmap"]).idmap_recursive) == (True, True)


def test_what_is_done_instead_of_a_mount():
    assert parse(["remount", "ro"]).remount
    assert parse(["tmpcopyup"]).copy_up


def test_every_option_of_the_specification_is_known():
    """Source: runtime-spec config.md "Linux mount options"."""
    plain = """
        async atime bind defaults dev diratime dirsync exec iversion lazytime loud mand noatime nodev nodiratime noexec
        noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow private relatime remount ro rw shared
        silent slave strictatime suid symfollow sync tmpcopyup unbindable idmap
    """
    recursive = """
        ratime rbind rdev rdiratime rexec rnoatime rnodev rnodiratime rnoexec rnorelatime rnostrictatime rnosuid
        rnosymfollow rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable ridmap
    """
    options = {*plain.split(), *recursive.split()}
    assert options <= known()
    assert all(parse([option]).data == () for option in options)


@pytest.mark.parametrize("option", ["move", "rmove"])
def test_what_is_not_supported_is_refused_by_name(option):
    with pytest.raises(ValueError, match=option):
        parse([option])


def test_what_means_nothing_here_is_passed_over():
    assert parse(["defaults", "async", "nomand", "loud", ""]) == MountOptions()


@given(st.lists(st.text(max_size=12), max_size=8))
def test_any_list_is_sorted_or_refused(options):
    try:
        parsed = parse(options)
    except ValueError:
        return
    assert set(parsed.data) <= set(options)


@pytest.mark.parametrize(
    ("value", "directories"),
    [("/a", ["/a"]), ("/a:/b", ["/a", "/b"]), (r"/a\:b:/c", ["/a:b", "/c"]), (r"/a\\:/b", ["/a\\", "/b"])],
)
def test_layers_are_split_at_bare_colons(value, directories):
    assert split_lower(value) == directories


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/proc", "/proc"),
        ("proc", "/proc"),
        ("//proc//", "/proc"),
        ("/proc/.", "/proc"),
        ("/x/../proc", "/proc"),
        ("/../../proc", "/proc"),
        ("/", "/"),
        ("", "/"),
    ],
)
def test_names_are_compared_in_one_form(path, expected):
    assert normal(path) == expected
