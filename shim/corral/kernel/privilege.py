"""Whose root this process is: the host's, or only that of a user namespace, as in a container or under rootless podman.

The latter has all capabilities, but over what belongs to its user namespace: it makes no device nodes, loads no BPF
programs, and writes to the host's cgroups as the user that it is outside. Source: user_namespaces(7).
"""

import os

_INITIAL_INODE = 0xEFFFFFFD
"""The inode of the host's own user namespace. Source: PROC_USER_INIT_INO of linux/proc_ns.h, since Linux 3.8.

Not its mappings are what tells it: those of another may be the same.
"""


def is_hosts_root() -> bool:
    """Whether the caller is root in the host's own user namespace."""
    try:
        in_hosts = os.stat("/proc/self/ns/user").st_ino == _INITIAL_INODE  # noqa: PTH116 - no pathlib here
    except FileNotFoundError:  # a kernel without CONFIG_USER_NS has but the host's
        in_hosts = True
    return os.geteuid() == 0 and in_hosts
