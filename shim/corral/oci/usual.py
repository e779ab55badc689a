"""config.json with the seccomp profile that nearly every one has: most of its text, known without being read.

What is looked for is the whole member as corral itself writes it. A number takes its place in the document, and has to
be found where the profile belongs, and could not be there otherwise. Any other profile, or one that was written in
another way, is read as everything is.
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
        document = loads(f'{head}"seccomp":{_MARK}{tail}')
        if _unmark(document):
            return Spec.from_json(document, seccomp=profile)
    return Spec.from_json(loads(text))


@cache
def usual_profile() -> tuple[str, Seccomp]:
    """The member of a container with the default capabilities, and what it says."""
    profile = defaults.seccomp(defaults.CAPABILITIES)
    return f'"seccomp":{json.dumps(encode(profile), separators=(",", ":"))}', profile


def _unmark(document: object) -> bool:
    """Leave the profile out, if it was the mark."""
    linux = document.get("linux") if isinstance(document, dict) else None
    if not isinstance(linux, dict) or linux.get("seccomp") != _MARK or not isinstance(linux["seccomp"], int):
        return False
    linux["seccomp"] = None
    return True
