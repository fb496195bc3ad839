"""No thread of a guest's QEMU runs on another guest's core: traces the kernel's scheduler while a guest starts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab.conftest import LabHost

_EVENT = "/sys/kernel/tracing/events/sched/sched_switch"
_HIST = "hist:keys=common_cpu,next_comm,next_pid:size=16384"
_ROW = re.compile(r"common_cpu: +(\d+), next_comm: (.{16}).*next_pid: +(\d+) ")
CREATE = ("guest", "create", "newcomer", "--memory", "128M", "--image", "minimal", "--wait", "180", "--json")


@contextmanager
def watched(host: LabHost) -> Iterator[list[tuple[int, str, int]]]:
    """Collects each (CPU, name, thread id) that ran in the block, counted by the kernel (Documentation/trace/histogram.rst)."""
    seen: list[tuple[int, str, int]] = []
    with host.changed(f"echo '{_HIST}' > {_EVENT}/trigger", f"echo '!{_HIST}' > {_EVENT}/trigger"):
        yield seen
        text = host.run(f"cat {_EVENT}/hist").stdout
        assert re.search(r"Dropped: 0$", text, re.MULTILINE), "the histogram was too small"
        seen += [(int(cpu), name.strip(), int(tid)) for cpu, name, tid in _ROW.findall(text)]


def find_intruders(seen: list[tuple[int, str, int]], guests: list[dict[str, Any]], host: LabHost) -> list[tuple[int, str, int]]:
    """Threads of any QEMU that ran on a core of another guest."""
    found = []
    for guest in guests:
        own = set(map(int, host.run(f"ls /proc/$(cat /run/libvirt/qemu/{guest['name']}.pid)/task").stdout.split()))
        for cpu, name, tid in seen:
            of_qemu = "qemu" in name or "KVM" in name or name.startswith("kvm-")
            if cpu in guest["cpus"] and of_qemu and tid not in own:
                found.append((cpu, name, tid))
    return found


def test_starting_guest_runs_only_on_its_cores(host: LabHost, guests: list[dict[str, Any]]) -> None:
    try:
        with watched(host) as seen:
            made = json.loads(host.nohype(*CREATE).stdout)
        assert any(cpu in made["cpus"] and "KVM" in name for cpu, name, _ in seen), "the newcomer's vCPUs were not seen at all"
        assert find_intruders(seen, [*guests, made], host) == []
        confined = host.run(f"cat {host.scope('newcomer')}/cpuset.cpus").stdout.strip()
        assert confined == ",".join(("0-1", *made["cores"])), "the kernel confines the guest's threads"
    finally:
        host.nohype("guest", "delete", "newcomer", check=False)


@pytest.mark.usefixtures("guests")
def test_qemu_thread_on_another_guests_core_is_detected(host: LabHost, guests: list[dict[str, Any]]) -> None:
    """Broken on purpose: helper threads of the second guest are moved to a core of the first."""
    one, two = guests
    refused = host.run(f"virsh emulatorpin {two['name']} {one['cpus'][0]}", check=False)
    assert "cannot set CPU affinity" in refused.stderr, "a confined thread cannot be moved there"
    with host.unconfined(two):
        with host.changed(f"virsh emulatorpin {two['name']} {one['cpus'][0]}", f"virsh emulatorpin {two['name']} 0-1"):
            with watched(host) as seen:
                # Several times: the manager's check every 60 s may restore the pinning.
                pin = f"virsh emulatorpin {two['name']} {one['cpus'][0]}"
                host.run(f"for _ in 1 2 3; do {pin} && virsh qemu-monitor-command {two['name']} --hmp 'info status'; done")
    assert find_intruders(seen, [one], host)
