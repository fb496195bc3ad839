"""Settings of all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.harness.end_leftovers import watch_this_process

# Neither a deadline per example nor one for their generation: both fail tests when the machine is slow.
settings.register_profile("nohype", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nohype")

MEMORY = "/dev/shm"


def has_room(folder: str) -> bool:
    """Whether 1 GiB is free, and programs may be run there: in many containers /dev/shm is small or `noexec`."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    found = os.statvfs(folder)
    return not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize >= 1 << 30


def pytest_configure(config: pytest.Config) -> None:
    # A fake host is 500 small files, which take a disk 20 times as long as memory.
    if not config.option.basetemp and has_room(MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)
    # A shell starts background jobs with SIGINT ignored, and what the tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup(1)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    watch_this_process()
