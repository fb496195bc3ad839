"""Files with a secret: who else can read them, and pipes that a program writes the secret to."""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

from orchestrator.errors import RequestError

_PATIENCE = 60.0
"""Seconds for the program at the other end of a pipe, which may have to ask its user for a pass phrase."""


def check_secret(path: Path) -> None:
    """Checks the mode of a file with a secret, as ssh does with its keys (sshkey_perm_ok in OpenSSH's authfile.c).

    Raises:
        RequestError: the file does not exist; or the caller owns it and others have rights on it; or every user can read it; or
            others can write it, who could replace the credentials by their own. That a group can read the file of another user
            is that user's choice.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    # Of a pipe from a password manager the mode says nothing.
    if not stat.S_ISREG(found.st_mode):
        return
    wrong = found.st_mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH)
    if found.st_uid == os.geteuid():
        wrong |= found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if wrong:
        if wrong & stat.S_IROTH:
            what = "every user of this machine can read"
        elif wrong & (stat.S_IWGRP | stat.S_IWOTH):
            what = "others can write"
        else:
            what = "its group can read" if wrong & stat.S_IRGRP else "others than its owner have rights on"
        mode = f"(mode {stat.S_IMODE(found.st_mode):04o})"
        raise RequestError(f"{what} {path} {mode}", f"chmod 600 {path}, and make a new secret if others may have seen it")


def read_secret(path: Path, most: int) -> bytes:
    """Up to so many bytes of a file, or of a pipe, which must be written within a minute.

    Raises:
        RequestError: see ``check_secret``; or it can't be read, is neither file nor pipe, or nothing is written to the pipe.
    """
    check_secret(path)
    try:
        # Not blocking: to open a pipe for reading would wait until a program opens it for writing (fifo(7)).
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISFIFO(mode):
                return _read_pipe(path, descriptor, most)
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise RequestError(f"{path} is neither a file nor a pipe", "name the file that holds the secret")
            return os.read(descriptor, most)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_pipe(path: Path, descriptor: int, most: int) -> bytes:
    content, deadline = b"", time.monotonic() + _PATIENCE
    while len(content) < most:
        try:
            part = os.read(descriptor, most - len(content))
        except BlockingIOError:  # a program has it open, and has not written yet
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise RequestError(
                    f"nothing was written to the pipe {path} within {_PATIENCE:g} s", "check the program at its other end"
                ) from None
            continue
        if not part:
            break
        content += part
    if not content:
        raise RequestError(f"there is nothing in the pipe {path}, and no program writes to it", "start that program first")
    return content


def _unreadable(path: Path, error: OSError) -> RequestError:
    return RequestError(f"cannot read {path}: {error.strerror}", "is the name right, and may you read it?")
