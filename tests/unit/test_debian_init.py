"""Functions of /init of the Debian images. Runs them with sh, and busybox's applets as programs of this machine."""

from __future__ import annotations

import pytest

from tests.unit.test_network_root_init import run


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("2-3", "2 3"),
        ("1", "1"),
        ("1,3-5,8-9", "1 3 4 5 8 9"),
        ("2-127", " ".join(map(str, range(2, 128)))),
        # what the kernel writes without nohz_full= (drivers/base/cpu.c)
        ("", ""),
        ("(null)", ""),
        ("  (null)", ""),
    ],
)
def test_cpus_of_a_list_of_the_kernel(text: str, cpus: str) -> None:
    done = run('list_cpus "$LIST"', LIST=text)
    assert done.stdout.split() == cpus.split()
    assert not done.stderr
