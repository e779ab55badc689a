"""config.json with the seccomp profile and the mounts that nearly every one has: most of its text, known without being
read.

What is looked for is the whole member as corral itself writes it, and of the mounts how it begins. A number takes its
place in the document, and has to be found where that belongs, and could not be there otherwise. With any other profile,
or one that was written in another way, all is read as everything is, and so are other mounts.
"""

import json
from functools import cache

from corral.oci import defaults
from corral.oci.decode import encode
from corral.oci.json_text import loads
from corral.oci.spec import Seccomp, Spec

_MARK = -7_316_254_809_131
"""A string may be spelled in many ways in JSON, an integer in one."""


def spec_of(text: str) -> Spec:
    """The specification in a document. Raises ValueError, that of JSON or of Spec.from_json()."""
    member, profile = usual_profile()
    head, found, tail = text.partition(member)
    if found and str(_MARK) not in head and str(_MARK) not in tail:
        before, mounts, after = head.partition(_usual_mounts())
        short = f'{before}"mounts":[{_MARK}{after}' if mounts else head
        document = loads(f'{short}"seccomp":{_MARK}{tail}')
        if _fill_in(document, profile, with_mounts=bool(mounts)):
            return Spec.from_json(document)
    return Spec.from_json(loads(text))


@cache
def usual_profile() -> tuple[str, Seccomp]:
    """The member of a container with the default capabilities, and what it says."""
    profile = defaults.seccomp(defaults.CAPABILITIES)
    return f'"seccomp":{json.dumps(encode(profile), separators=(",", ":"))}', profile


@cache
def _usual_mounts() -> str:
    """How the mounts of a container begin."""
    return f'"mounts":{json.dumps(encode(defaults.MOUNTS), separators=(",", ":"))}'.removesuffix("]")


def _fill_in(document: object, profile: Seccomp, *, with_mounts: bool) -> bool:
    """Put what is known in its place, if the marks are there."""
    linux = document.get("linux") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(linux, dict) or not _is_mark(linux.get("seccomp")):
        return False
    linux["seccomp"] = profile
    if with_mounts:
        mounts = document.get("mounts")
        if not isinstance(mounts, list) or not mounts or not _is_mark(mounts[0]):
            return False
        mounts[:1] = defaults.MOUNTS
    return True


def _is_mark(value: object) -> bool:
    return isinstance(value, int) and value == _MARK
