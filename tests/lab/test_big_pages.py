"""A guest of 1 GB pages. The first of the lab's tests, by its name: a GB in one piece is found while the lab is young."""

from __future__ import annotations

import json

import pytest

from orchestrator.proof import Verdict
from tests.lab.conftest import LabHost

GIB_PAGE = ("--memory", "1G", "--page-size", "1G", "--image", "minimal")


def test_a_guest_of_1_gb_pages(host: LabHost) -> None:
    """The kernel makes the pool, QEMU takes the page by the mount that the host role has made, and it comes back."""
    pool = "/sys/devices/system/node/node1/hugepages/hugepages-1048576kB"
    # What the boot has left in memory is moved out of the way first.
    tidy = "sync; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory"
    take = f"{tidy}; echo 1 > {pool}/nr_hugepages; grep -q 1 {pool}/free_hugepages"
    with host.changed(f"for _ in 1 2 3 4 5; do {take} && break; sleep 1; done", f"echo 0 > {pool}/nr_hugepages"):
        if host.run(f"cat {pool}/free_hugepages").stdout != "1\n":
            pytest.skip("not measured: the kernel of this lab finds no GB in one piece")
        try:
            made = json.loads(host.nohype("guest", "create", "big", *GIB_PAGE, "--wait", "180", "--json").stdout)
            assert (made["page_size"], made["huge_pages"], made["node"]) == (1 << 30, 1, 1)
            assert host.run(f"cat {pool}/free_hugepages").stdout == "0\n"
            assert host.proofs()["memory-static", "big"].verdict is Verdict.PASS
            refused = host.nohype("guest", "create", "more", *GIB_PAGE, check=False)
            assert "0 of 1 huge pages of 1G are free, 1 are wanted" in refused.stderr
        finally:
            host.nohype("guest", "delete", "big", check=False)
        assert host.run(f"cat {pool}/free_hugepages").stdout == "1\n"
