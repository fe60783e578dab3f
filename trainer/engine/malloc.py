"""Where the memory of a processor's tensors comes from: the C library's malloc."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""From glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Has this process keep what it frees, for its next step.

    Where glibc gives the memory of a large tensor back to the system at once, the next step's tensors are pages
    that the system must find and clear first: up to a third of a step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        assert libc.mallopt(parameter, value) == 1, "glibc knows both since 2.0"
