"""Reads files and pipes with a secret: checks the mode of files, and limits the time for pipes."""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

from orchestrator.errors import RequestError

# Seconds. The program at the other end of a pipe may have to ask its user for a passphrase.
PIPE_TIMEOUT = 60.0


def check_secret(path: Path) -> None:
    """Checks the mode of a file with a secret, as ssh does with its keys (sshkey_perm_ok in OpenSSH's authfile.c).

    Raises RequestError if the caller owns the file and other users have any permission, or if every user can read it, or if other
    users can write it. A file of another user may be readable by a group: that user has chosen so.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    # The mode of a pipe from a password manager is not meaningful.
    if not stat.S_ISREG(status.st_mode):
        return
    wrong = status.st_mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid == os.geteuid():
        wrong |= status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if wrong:
        if wrong & stat.S_IROTH:
            problem = "is readable by all users"
        elif wrong & (stat.S_IWGRP | stat.S_IWOTH):
            problem = "is writable by other users"
        else:
            problem = "is readable by its group" if wrong & stat.S_IRGRP else "gives other users permissions"
        mode = f"(mode {stat.S_IMODE(status.st_mode):04o})"
        raise RequestError(f"{path} {problem} {mode}", f"run `chmod 600 {path}`, then issue a new secret")


def read_secret(path: Path, most: int) -> bytes:
    """The first ``most`` bytes of a file or pipe. Raises RequestError, also if nothing is written to the pipe within 60 s."""
    check_secret(path)
    try:
        # Not blocking: to open a pipe for reading would wait until a program opens it for writing (fifo(7)).
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISFIFO(mode):
                return _read_pipe(path, descriptor, most)
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise RequestError(f"{path} is neither a file nor a pipe", "give the file with the secret")
            return os.read(descriptor, most)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_pipe(path: Path, descriptor: int, most: int) -> bytes:
    content, deadline = b"", time.monotonic() + PIPE_TIMEOUT
    while len(content) < most:
        try:
            part = os.read(descriptor, most - len(content))
        except BlockingIOError:  # a program has it open, and has not written yet
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise RequestError(
                    f"pipe {path}: nothing was written within {PIPE_TIMEOUT:g} s", "check the program at its other end"
                ) from None
            continue
        if not part:
            break
        content += part
    if not content:
        raise RequestError(f"pipe {path} is empty, and no program writes to it", "start that program first")
    return content


def _unreadable(path: Path, error: OSError) -> RequestError:
    return RequestError(f"cannot read {path}: {error.strerror}", "check the path and its permissions")
