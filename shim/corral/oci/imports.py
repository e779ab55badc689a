"""Closing Python's import system.

Once a process has entered a container's root, a module it imports would be read from there: the image's code would run
as the runtime (as glibc's NSS libraries did in CVE-2019-14271). So before that everything needed is loaded, and nothing
can be loaded any more.
"""

import sys
from typing import NoReturn


class _Closed:
    """A finder that refuses, so that no other is asked and no warning about an empty meta_path is tried."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> NoReturn:
        raise ImportError(f"{name} can't be imported: this process is inside a container")


def close_imports() -> None:
    """From here on every import of a module that is not loaded yet fails. Codecs are found by import, so they too."""
    sys.meta_path[:] = [_Closed]
    sys.path_hooks.clear()
    sys.path.clear()
    sys.path_importer_cache.clear()
