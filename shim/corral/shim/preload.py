"""What a shim will need, loaded before the fork: afterwards nothing is imported, whatever is installed meanwhile.

Imports of a running shim would mix two versions of corral after an upgrade, and cost every shim its own copy.
"""

import gc
import json  # noqa: F401 - corral.oci.json_text may ask for it
import sys

import corral.oci.allotment  # for the shims to come, as the others
import corral.oci.confinement
import corral.oci.copy_up
import corral.oci.hooks
import corral.oci.joining
import corral.oci.labels
import corral.oci.listener
import corral.oci.net_devices
import corral.oci.parts
import corral.oci.passage
import corral.oci.runtime
import corral.oci.seccomp  # noqa: F401 - likewise
from corral.kernel import shared_memory
from corral.oci.rehearsal import Typical, rehearse, rehearse_exec
from corral.shim.warmup import warm_up

_CODECS = ("utf-8", "ascii", "latin-1")
WARM_UP_ROUNDS = 5


def preload(typical: Typical) -> None:
    """Fill the caches that first use would fill, close the import system, and arrange that pages stay shared."""
    for codec in _CODECS:
        "".encode(codec)
    shared_memory.gather_code(lambda: _exercise(1, typical))
    _exercise(WARM_UP_ROUNDS, typical)
    sys.path.clear()
    sys.path_hooks.clear()
    sys.meta_path.clear()
    sys.path_importer_cache.clear()
    gc.collect()
    shared_memory.make_immortal()
    gc.collect()
    shared_memory.release_free_memory()
    shared_memory.fill_holes()
    shared_memory.fill_heap_holes()
    shared_memory.inherit_code_pages()
    shared_memory.collapse_pages()
    gc.freeze()
    shared_memory.learn_what_is_written(lambda: _make_one(typical))


def _make_one(typical: Typical) -> None:
    """What a shim's midwife does, and the init that it becomes."""
    typical.plan()
    rehearse()


def _exercise(rounds: int, typical: Typical) -> None:
    """The shim's part in this process, and init's, which otherwise runs in forks only, where it leaves no trace."""
    warm_up(rounds)
    for _ in range(rounds):
        rehearse()
        rehearse_exec()
        typical.plan()
        typical.read()
