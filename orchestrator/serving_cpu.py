"""Keeps the threads that serve requests on one CPU.

Only one thread of the process runs Python at a time, and each system call passes the interpreter's lock on. If the next thread is
on another CPU, that CPU must wake up first: with 64 clients the manager then needs 1.5 times the processor time per claim.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.values import CpuSet

_log = logging.getLogger(__name__)

# The CPUs of the process; empty while `stay_on_one` has no effect.
_all: frozenset[int] = frozenset()


def stay_on_one(cpus: CpuSet) -> None:
    """Confines the calling thread, and the threads that it starts, to one of the CPUs on which it may run.

    The last of them: the first handles most interrupts of a host that was not set up otherwise. No effect if it may run on none.
    """
    global _all
    allowed = frozenset(os.sched_getaffinity(0))
    if usable := allowed & frozenset(cpus):
        _all = allowed
        _confine(frozenset({max(usable)}))


def leave() -> None:
    """Allows all CPUs of the process again: for a thread that computes or writes for long without the interpreter's lock."""
    if _all:
        _confine(_all)


@contextmanager
def left() -> Iterator[None]:
    """`leave` for the block. Also for the start of a program, which inherits the CPUs of its thread (sched_setaffinity(2))."""
    before = frozenset(os.sched_getaffinity(0))
    leave()
    try:
        yield
    finally:
        if _all:
            _confine(before)


def _confine(cpus: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        # It is about speed only. The CPUs of the process may have gone offline, or out of its cpuset.
        _log.warning("cannot run a thread on CPUs %s: %s", CpuSet.of(cpus), error.strerror)
