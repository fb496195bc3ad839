"""Checks of memory: huge pages on each node, and nothing that moves or merges pages."""

from __future__ import annotations

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.host.hugepages import read_ksm_run
from orchestrator.host.memory import has_settings, read_hugetlb_mounts, read_swaps, read_transparent
from orchestrator.values import Size

_GUEST = Size(1 << 30)
_NO_SETTINGS, _MOUNT = "the kernel's settings of memory are not visible", "check that sysfs is mounted on /sys"


def _check_pages(facts: Facts) -> Finding:
    pools = [pool for pool in facts.topology.pools if pool.total]
    needed = "huge pages, reserved at boot, on the nodes of guest cores"
    nodes = sorted({core.node for core in facts.topology.cores})
    words = "default_hugepagesz=2M hugepagesz=2M hugepages=" + ",".join(f"{node}:NUMBER" for node in nodes)
    remedy = f"add `{words}` to the kernel's command line and reboot; {_GUEST.bytes >> 21} pages hold a guest of {_GUEST}"
    if not pools:
        return failed("no huge pages", needed, remedy)
    parts = [f"{pool.total} of {pool.page_size} on node {pool.node}, {pool.free} free" for pool in pools]
    guests = sum(pool.free * pool.page_size.bytes // _GUEST.bytes for pool in pools)
    if missing := [str(node) for node in nodes if node not in {pool.node for pool in pools}]:
        return failed(f"{'; '.join(parts)}; none on node {', '.join(missing)}", needed, remedy)
    return passed(f"{'; '.join(parts)}: room for guests of {_GUEST}: {guests}")


def _check_mounts(facts: Facts) -> Finding:
    found = read_hugetlb_mounts(facts.host)
    if not found:
        return failed(
            "hugetlbfs is not mounted", "a mount of hugetlbfs, which libvirt uses", "run `systemctl start dev-hugepages.mount`"
        )
    return passed(f"hugetlbfs is mounted on {', '.join(found)}")


def _check_swap(facts: Facts) -> Finding:
    if found := read_swaps(facts.host):
        remedy = "run `swapoff -a`, and remove the swap entries from /etc/fstab"
        return failed(f"swap on {', '.join(found)}", "no swap: QEMU's own memory must stay in place", remedy)
    return passed("no swap")


def _check_merging(facts: Facts) -> Finding:
    state = read_ksm_run(facts.host)
    if state is None and not has_settings(facts.host):
        return not_measured(_NO_SETTINGS, "pages of guests that are not shared", _MOUNT)
    if state == "1":
        remedy = "stop ksmtuned, and run `echo 2 > /sys/kernel/mm/ksm/run`"
        return failed("KSM merges pages", "pages of guests that are not shared", remedy)
    return passed("KSM does not run" if state is not None else "the kernel has no KSM")


def _check_transparent(facts: Facts) -> Finding:
    mode = read_transparent(facts.host)
    if not mode and not has_settings(facts.host):
        return not_measured(_NO_SETTINGS, "madvise or never", _MOUNT)
    if mode == "always":
        remedy = "add `transparent_hugepage=never` to the kernel's command line"
        return failed("transparent huge pages: always", "madvise or never: khugepaged scans the memory of all processes", remedy)
    return passed(f"transparent huge pages: {mode or 'not in the kernel'}")


_M = Principle.MEMORY
CHECKS = (
    Check("huge-pages", _M, "each NUMA node has huge pages", "pools of huge pages of all nodes", _check_pages),
    Check("huge-page-mount", _M, "hugetlbfs is mounted", "mounts", _check_mounts),
    Check("swap", _M, "the server does not swap", "swap areas", _check_swap),
    Check("page-merging", _M, "no pages are merged", "state of KSM", _check_merging),
    Check(
        "transparent-huge-pages",
        _M,
        "no thread collapses pages",
        "mode of transparent huge pages",
        _check_transparent,
        required=False,
    ),
)
