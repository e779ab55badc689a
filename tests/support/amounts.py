"""How much of something a test takes. CI, which runs all of them on few processors, takes less of what only adds up."""

import os


def amount(whole: int, *, in_ci: int) -> int:
    """`whole`, or what shows the same with less certainty."""
    return in_ci if os.environ.get("CI") == "true" else whole
