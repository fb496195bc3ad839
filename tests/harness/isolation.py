"""Kernel settings and counters of a fake host as the Ansible role and a manager with guests leave them."""

from __future__ import annotations

from orchestrator.host.isolation import WORKQUEUE
from tests.fakes.domains import add_thread
from tests.fakes.root import FakeRoot

CPUS = range(8)


def add_isolation(host: FakeRoot) -> None:
    """Of the host `numa`: CPUs 0-1 for housekeeping, 2-7 for guests."""
    for name in (f"{WORKQUEUE}/cpumask", f"{WORKQUEUE}/writeback/cpumask", "proc/irq/default_smp_affinity"):
        host.add(name, "03")
    host.add("proc/sys/kernel/watchdog_cpumask", "0-1")
    host.add("sys/devices/system/cpu/nohz_full", "2-7")
    host.add("proc/cmdline", "intel_iommu=on isolcpus=2-7 nohz_full=2-7 rcu_nocbs=2-7")
    for name, value in (
        ("kernel/nmi_watchdog", 0),
        ("kernel/timer_migration", 1),
        ("kernel/numa_balancing", 0),
        ("vm/stat_interval", 10),
    ):
        host.add(f"proc/sys/{name}", str(value))
    for name, text in (("nx_huge_pages", "never"), ("halt_poll_ns", "0"), ("min_timer_period_us", "200")):
        host.add(f"sys/module/kvm/parameters/{name}", text)
    host.add("sys/kernel/mm/ksm/run", "0")
    add_thread(host, 1, 1, "systemd", "0-1")
    columns = " ".join(f"CPU{cpu}" for cpu in CPUS)
    host.add("proc/interrupts", f"{columns}\n 24: {'0 ' * 8} PCI-MSIX nic0\nLOC: {'9 ' * 8} Local timer interrupts")
    host.add("proc/softirqs", f"{columns}\nTIMER: {'9 ' * 8}\nNET_RX: {'0 ' * 8}")
    host.add("proc/schedstat", "version 16\n" + "\n".join(f"cpu{cpu} 0 0 0 0 0 0 5 5 100" for cpu in CPUS))
    for folder in host.path.glob("proc/[0-9]*/task/[0-9]*"):
        host.add(f"{folder.relative_to(host.path)}/schedstat", "1000 20 5")
