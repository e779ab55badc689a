"""What a shim will need, loaded before the fork: afterwards nothing is imported, whatever is installed meanwhile.

Imports of a running shim would mix two versions of corral after an upgrade, and cost every shim its own copy.
"""

import sys

import corral.oci.runtime  # noqa: F401 - for the shims to come
from corral.oci.spec import Spec
from corral.shim import logs

_CODECS = ("utf-8", "ascii", "latin-1")
_SPEC: dict[str, object] = {"ociVersion": "1.2.0", "process": {"cwd": "/", "args": ["true"]}}


def preload() -> None:
    """Fill the caches that first use would fill, and close the import system."""
    for codec in _CODECS:
        "".encode(codec)
    Spec.from_json(_SPEC)
    logs.timestamp(0)
    sys.path.clear()
    sys.path_hooks.clear()
    sys.meta_path.clear()
    sys.path_importer_cache.clear()
