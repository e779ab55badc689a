"""The session keyring."""

import ctypes
import errno

from corral.kernel.syscalls import check, syscall

_keyctl = syscall("keyctl", ctypes.c_int, ctypes.c_char_p)
_keyctl_id = syscall("keyctl", ctypes.c_int, ctypes.c_int, ctypes.c_int)
_GET_KEYRING_ID, _JOIN_SESSION_KEYRING = 0, 1
_SPEC_SESSION_KEYRING = -3


def join_new_session() -> None:
    """Leave the inherited session keyring for a new, empty, nameless one, so that no key of the host is in reach.

    A kernel without keyrings has nothing to leave.
    """
    if _keyctl(_JOIN_SESSION_KEYRING, None) < 0 and ctypes.get_errno() != errno.ENOSYS:
        check(-1, "keyctl KEYCTL_JOIN_SESSION_KEYRING")


def session_serial() -> int:
    """The serial number of the caller's session keyring."""
    return check(_keyctl_id(_GET_KEYRING_ID, _SPEC_SESSION_KEYRING, 0), "keyctl KEYCTL_GET_KEYRING_ID")
