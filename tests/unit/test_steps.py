"""Steps whose things have gone in the meantime: nothing is left to do, and nothing stands in the way of a release."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host.netlink import Link, VfState
from orchestrator.host.root import HostRoot
from orchestrator.steps import vfs
from orchestrator.steps.cores import MoveKernelThread
from orchestrator.values import CpuSet, MacAddress

MAC = MacAddress("02:4e:48:00:00:01")


def give_links(monkeypatch: pytest.MonkeyPatch, *vf_numbers: int) -> list[tuple[object, ...]]:
    """Makes nic0 a PF with these VFs; returns the list that collects what is set."""
    states = tuple(VfState(number, MAC, 0, spoof_check=True, trust=False, link_state="auto") for number in vf_numbers)
    links = (Link("nic0", 2, MAC, up=True, carrier=True, master=None, kind=None, vfs=states),)
    done: list[tuple[object, ...]] = []
    monkeypatch.setattr(vfs, "read_links", lambda: links)
    monkeypatch.setattr(vfs, "set_vf_mac", lambda *words: done.append(words))
    return done


def test_the_address_of_a_vf_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done = give_links(monkeypatch, 0, 1)
    vfs.undo_vf_mac(HostRoot(), {"interface": "nic0", "index": 1, "mac": ""})
    vfs.undo_vf_mac(HostRoot(), {"interface": "nic0", "index": 0, "mac": str(MAC)})
    assert done == [("nic0", 1, None), ("nic0", 0, MAC)]


@pytest.mark.parametrize("interface", ["nic0", "nic9"])
def test_a_vf_that_is_gone_as_after_a_reboot_needs_no_address(monkeypatch: pytest.MonkeyPatch, interface: str) -> None:
    done = give_links(monkeypatch)
    vfs.undo_vf_mac(HostRoot(), {"interface": interface, "index": 0, "mac": ""})
    assert done == []


def test_a_vf_that_is_not_there_gets_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    give_links(monkeypatch, 0)
    with pytest.raises(HostError, match="nic0 has no VF 1"):
        vfs.SetVfMac("nic0", 1, MAC).read_before(HostRoot())
    assert vfs.SetVfMac("nic0", 0, MAC).read_before(HostRoot()) is None


def test_a_thread_that_has_ended_needs_no_moving(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    step = MoveKernelThread(process.pid, "gone", CpuSet.of(os.sched_getaffinity(0)))
    assert step.read_before(HostRoot(tmp_path)) is None
    step.apply(HostRoot(tmp_path))
