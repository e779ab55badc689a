"""The specification of a bundle, with what its create adds."""

from dataclasses import replace

from corral.oci.spec import Spec
from corral.oci.usual import spec_of
from corral.shim import records
from corral.shim.errors import ShimError
from corral.shim.oom import with_ordinary_score
from corral.shim.requests import Create


def read_spec(request: Create, directory: int) -> Spec:
    """Raises ShimError, OSError, ValueError."""
    spec = spec_of(records.read_text(directory, "config.json"))
    if spec.process is None:
        raise ShimError("invalid_argument", "process: config.json has none")
    program = with_ordinary_score(spec.process)
    return replace(spec, process=replace(program, env=(*program.env, *request.secret_env)))
