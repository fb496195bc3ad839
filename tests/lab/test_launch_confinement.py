"""No thread of a guest's QEMU ever runs on a core that is another guest's: the kernel's scheduler is watched while one starts."""

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
        assert re.search(r"Dropped: 0$", text, re.MULTILINE), "the histogram was too small to hold all"
        seen += [(int(cpu), name.strip(), int(tid)) for cpu, name, tid in _ROW.findall(text)]


def strangers(seen: list[tuple[int, str, int]], guests: list[dict[str, Any]], host: LabHost) -> list[tuple[int, str, int]]:
    """Threads of any QEMU that ran on a guest's core and are not of that guest."""
    found = []
    for guest in guests:
        own = set(map(int, host.run(f"ls /proc/$(cat /run/libvirt/qemu/{guest['name']}.pid)/task").stdout.split()))
        for cpu, name, tid in seen:
            of_qemu = "qemu" in name or "KVM" in name or name.startswith("kvm-")
            if cpu in guest["cpus"] and of_qemu and tid not in own:
                found.append((cpu, name, tid))
    return found


def test_a_guest_that_starts_keeps_to_its_cores(host: LabHost, guests: list[dict[str, Any]]) -> None:
    try:
        with watched(host) as seen:
            made = json.loads(host.nohype(*CREATE).stdout)
        assert any(cpu in made["cpus"] and "KVM" in name for cpu, name, _ in seen), "the newcomer's vCPUs were not seen at all"
        assert strangers(seen, [*guests, made], host) == []
        confined = host.run(f"cat {host.scope('newcomer')}/cpuset.cpus").stdout.strip()
        assert confined == ",".join(("0-1", *made["cores"])), "the kernel itself keeps the guest's threads from other cores"
    finally:
        host.nohype("guest", "delete", "newcomer", check=False)


@pytest.mark.usefixtures("guests")
def test_a_thread_of_qemu_on_anothers_core_is_seen(host: LabHost, guests: list[dict[str, Any]]) -> None:
    """The same, broken on purpose: helper threads of the second guest are let loose on a core of the first."""
    one, two = guests
    refused = host.run(f"virsh emulatorpin {two['name']} {one['cpus'][0]}", check=False)
    assert "cannot set CPU affinity" in refused.stderr, "while it is confined, nobody can"
    with host.unconfined(two):
        with host.changed(f"virsh emulatorpin {two['name']} {one['cpus'][0]}", f"virsh emulatorpin {two['name']} 0-1"):
            with watched(host) as seen:
                # Again and again: the manager's look every 60 s may put the pinning right meanwhile.
                pin = f"virsh emulatorpin {two['name']} {one['cpus'][0]}"
                host.run(f"for _ in 1 2 3; do {pin} && virsh qemu-monitor-command {two['name']} --hmp 'info status'; done")
    assert strangers(seen, [one], host)
