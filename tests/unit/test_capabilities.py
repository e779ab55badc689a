"""Capability names and sets."""

from pathlib import Path

from corral.kernel import capabilities
from corral.oci import defaults
from corral.oci.program import capability_sets
from corral.oci.spec import Capabilities

EVERY = tuple(f"CAP_{name}" for name in capabilities.NAMES)


def test_names_and_numbers():
    assert capabilities.mask_of(["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]) == 1 | 1 << 21 | 1 << 40
    assert capabilities.names_of(1 | 1 << 21) == ["CAP_CHOWN", "CAP_SYS_ADMIN"]
    assert capabilities.names_of(capabilities.mask_of(EVERY)) == list(EVERY)


def test_bits_without_a_name_are_left_out():
    assert capabilities.names_of(1 << 60) == []


def test_unknown_names_are_told_and_left_out():
    assert capabilities.mask_of(["CAP_FLY", "CAP_KILL"]) == capabilities.mask_of(["CAP_KILL"])
    assert capabilities.unknown(["CAP_FLY", "CAP_KILL", "CAP_FLY", ""]) == ["", "CAP_FLY"]


def test_all_of_this_kernels_have_a_name():
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert last < len(capabilities.NAMES)


def test_own_sets_are_those_of_proc():
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if "Cap" in line)
    assert capabilities.effective() == int(status["CapEff"], 16)
    assert capabilities.permitted() == int(status["CapPrm"], 16)
    assert capabilities.bounding() == int(status["CapBnd"], 16)


def test_dockers_default_mask():
    assert capabilities.mask_of(defaults.CAPABILITIES) == 0xA80425FB


def test_sets_are_cut_to_what_is_held_and_to_one_another():
    every = Capabilities(*[EVERY] * 5)
    sets = capability_sets(every, 0b111)
    assert (sets.bounding, sets.effective, sets.permitted, sets.ambient) == (7, 7, 7, 7)
    half = Capabilities(bounding=EVERY, effective=EVERY, permitted=("CAP_CHOWN",), inheritable=(), ambient=EVERY)
    sets = capability_sets(half, 0b111)
    assert (sets.effective, sets.ambient) == (1, 0)


def test_none_at_all():
    assert capability_sets(None, 0b111) == capability_sets(Capabilities(), 0b111)
