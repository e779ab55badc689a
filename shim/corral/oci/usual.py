"""config.json with the seccomp profile that nearly every one has: most of its text, known without being read.

What is looked for is the whole member as corral itself writes it. It is cut out of the document, and has to be missing
in the place where it belongs. Any other profile, or one that was written in another way, is read as everything is.
"""

import json
from functools import cache

from corral.oci import defaults
from corral.oci.decode import encode
from corral.oci.json_text import loads
from corral.oci.spec import Seccomp, Spec

_NO_PROFILE = '"seccomp":null'


def spec_of(text: str) -> Spec:
    """The specification in a document. Raises ValueError, that of JSON or of Spec.from_json()."""
    member, profile = usual_profile()
    head, found, tail = text.partition(member)
    if found:
        document = loads(f"{head}{_NO_PROFILE}{tail}")
        if _lacks_its_profile(document):
            return Spec.from_json(document, seccomp=profile)
    return Spec.from_json(loads(text))


@cache
def usual_profile() -> tuple[str, Seccomp]:
    """The member of a container with the default capabilities, and what it says."""
    profile = defaults.seccomp(defaults.CAPABILITIES)
    return f'"seccomp":{json.dumps(encode(profile), separators=(",", ":"))}', profile


def _lacks_its_profile(document: object) -> bool:
    linux = document.get("linux") if isinstance(document, dict) else None
    return isinstance(linux, dict) and linux.get("seccomp", "") is None
