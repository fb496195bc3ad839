"""Runs a program whose writes are not forced to the disk: fsync(2) and its kind do nothing in it and in its children.

dpkg requests some 3,000 syncs while it installs a root, --force-unsafe-io or not, and each waits for a disk that others use too.
A build that is interrupted is thrown away, so it gains nothing from them. Started as a script; imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Sequence

# uapi/linux: prctl.h, seccomp.h, bpf_common.h, audit.h; numbers of x86-64's syscalls.
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _RETURN_0 = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with errno 0
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_X86_64 = 0xC000003E
_SYNCS = {"fsync": 74, "fdatasync": 75, "sync": 162, "sync_file_range": 277, "syncfs": 306}


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def build_filter(numbers: Sequence[int]) -> bytes:
    """The BPF program that returns 0 for these syscalls of x86-64, and allows all others."""
    count = len(numbers)
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 0, count + 1, _X86_64),
        (_LOAD, 0, 0, _NUMBER),
        *((_JUMP_IF_EQUAL, count - index, 0, number) for index, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _RETURN_0),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def main() -> None:
    """Without effect where the kernel installs no filter: for a user without CAP_SYS_ADMIN, or built without seccomp."""
    code = build_filter(tuple(_SYNCS.values()))
    program = _Program(len(code) // 8, code)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error.strerror}")


if __name__ == "__main__":
    main()
