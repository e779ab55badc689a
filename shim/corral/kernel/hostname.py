"""The NIS domain name of the UTS namespace (the host name has socket.sethostname)."""

import ctypes
import os

from corral.kernel.syscalls import check, libc

_setdomainname = libc("setdomainname", ctypes.c_char_p, ctypes.c_size_t)


def set_domain_name(name: str) -> None:
    """setdomainname(2)."""
    data = os.fsencode(name)
    check(_setdomainname(data, len(data)), "setdomainname", name)
