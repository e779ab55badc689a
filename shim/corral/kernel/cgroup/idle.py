"""A cgroup that runs when nobody else wants to, and its share of CPU time beside that.

    idle 0 --> 1   the kernel forgets the shares, and refuses new ones
    idle 1 --> 0   it has the shares of who never asked for any

So shares are written while it is not idle, and before it becomes so they are written as they are: undone in reverse,
both come back.

Source: kernel/sched/fair.c sched_group_set_idle(); cgroup-v2.rst "cpu.idle".
"""

from corral.kernel.cgroup import files
from corral.kernel.cgroup.steps import Step, Write, invalid

IDLE = "cpu.idle"


def plan(directory: str, weight_name: str, *, idle: int | None, weight: int | None, fresh: bool = False) -> list[Step]:
    """The writes for both; weight is the content of the file of that name. fresh: the cgroup was just made.

    Raises OSError(EINVAL) for a weight alone of a cgroup that is idle.
    """
    if idle is None and weight is None:
        return []
    idle_path, weight_path = f"{directory}/{IDLE}", f"{directory}/{weight_name}"
    is_idle = not fresh and files.read_number(idle_path, 0) != 0
    if is_idle and idle is None:
        raise invalid(weight_path, "an idle cgroup has no CPU shares that could be changed: set idle to 0 with them")
    steps: list[Step] = []
    if idle == 0 or (is_idle and weight is not None):
        steps.append(Write(idle_path, "0"))
    if weight is None and idle and not is_idle:
        weight = files.read_number(weight_path, 0) or None  # 0: without the controller, as the next write will tell
    if weight is not None:
        steps.append(Write(weight_path, str(weight)))
    if idle:
        steps.append(Write(idle_path, str(idle)))
    return steps
