"""Two folders exchange their names in one step, where the system can do that.

Linux has `renameat2` with RENAME_EXCHANGE, macOS `renamex_np` with RENAME_SWAP; Python offers
neither. Some file systems (NFS among them) refuse, and other systems have nothing of the kind.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2
_REFUSALS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange_names(one: Path, other: Path) -> bool:
    """Exchange what two names stand for, at once; False, and nothing done, where that cannot be.

    Raises:
        OSError: as the file system says.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(*paths, ctypes.c_uint(_RENAME_SWAP))
        else:
            here = ctypes.c_int(_AT_FDCWD)
            flag = ctypes.c_uint(_RENAME_EXCHANGE)
            failed = libc.renameat2(here, paths[0], here, paths[1], flag)
    except AttributeError:  # a C library without the call
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _REFUSALS:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
