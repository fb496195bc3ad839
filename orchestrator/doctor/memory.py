"""Checks of memory: huge pages on each node, and nothing that moves or merges pages."""

from __future__ import annotations

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.errors import HostError
from orchestrator.host.hugepages import read_ksm_run
from orchestrator.host.memory import (
    has_settings,
    read_hugetlb_mounts,
    read_memory_errors,
    read_memory_nodes,
    read_swaps,
    read_transparent,
)
from orchestrator.values import Size

_GUEST = Size(1 << 30)
_NO_SETTINGS, _MOUNT = "the kernel's settings of memory are not visible", "check that sysfs is mounted on /sys"


def _check_pages(facts: Facts) -> Finding:
    if not facts.pools:
        return not_measured("the kernel shows no pools of huge pages", "huge pages on the nodes of guest cores", _MOUNT)
    pools = [pool for pool in facts.pools if pool.total]
    needed = "huge pages, reserved at boot, on the nodes of guest cores"
    nodes = _list_guest_nodes(facts)
    words = "default_hugepagesz=2M hugepagesz=2M hugepages=" + ",".join(f"{node}:NUMBER" for node in nodes)
    remedy = f"add `{words}` to the kernel's command line and reboot; {_GUEST.bytes >> 21} pages hold a guest of {_GUEST}"
    if not pools:
        return failed("no huge pages", needed, remedy)
    parts = [f"{pool.total} of {pool.page_size} on node {pool.node}, {pool.free} free" for pool in pools]
    guests = sum(pool.free * pool.page_size.bytes // _GUEST.bytes for pool in pools)
    if missing := [str(node) for node in nodes if node not in {pool.node for pool in pools}]:
        return failed(f"{'; '.join(parts)}; none on node {', '.join(missing)}", needed, remedy)
    return passed(f"{'; '.join(parts)}: room for guests of {_GUEST}: {guests}")


def _list_guest_nodes(facts: Facts) -> list[int]:
    """Nodes with cores for guests and with memory: on the others no guest can be."""
    own = {core.node for core in facts.cores if not core.cpus.meets(facts.housekeeping)} or {core.node for core in facts.cores}
    try:
        filled = read_memory_nodes(facts.host)
    except HostError:
        filled = None  # the check `numa-nodes` tells
    return sorted(own if filled is None else {node for node in own if node in filled} or own)


def _check_nodes(facts: Facts) -> Finding:
    needed = "memory on each node with cores, and a node for each socket"
    nodes, sockets = {core.node for core in facts.cores}, {core.socket for core in facts.cores}
    filled = read_memory_nodes(facts.host)
    text = f"sockets: {len(sockets)}, NUMA nodes with cores: {len(nodes)}"
    if filled is None:
        return not_measured(f"{text}; the kernel does not tell which nodes have memory", needed)
    if empty := [str(node) for node in sorted(nodes) if node not in filled]:
        return failed(
            f"{text}; without memory: node {', '.join(empty)}",
            needed,
            "fill the memory slots of these sockets; until then no guest can get their cores",
        )
    if len(sockets) > len(nodes):
        remedy = "disable `Node Interleaving`, and enable `NUMA`, in the firmware settings; remove numa=off from the command line"
        return failed(f"{text}: memory of all sockets is mixed", needed, remedy)
    return passed(f"{text}, each with memory")


def _check_errors(facts: Facts) -> Finding:
    needed = "memory with error correction (ECC), without uncorrected errors"
    found = read_memory_errors(facts.host)
    if not found:
        remedy = "check with `dmidecode --type memory` that the modules have ECC, and load the EDAC driver of the processor"
        return not_measured("no memory controller reports errors (EDAC)", needed, remedy)
    if bad := [f"{one.controller}: {one.uncorrected}" for one in found if one.uncorrected]:
        return failed(f"uncorrected errors since boot: {', '.join(bad)}", needed, "replace the modules that dmesg names")
    return passed(f"{len(found)} memory controllers report errors; corrected since boot: {sum(one.corrected for one in found)}")


def _check_mounts(facts: Facts) -> Finding:
    found = read_hugetlb_mounts(facts.host)
    needed = "a mount of hugetlbfs for each size of pages, which libvirt uses"
    if not found:
        if not facts.shows_all_processes:  # a container has mounts of its own
            return not_measured("hugetlbfs is not mounted here", needed, "run the command on the server itself, as root")
        return failed("hugetlbfs is not mounted", needed, "run `systemctl start dev-hugepages.mount`")
    sizes = {mount.page_size for mount in found}
    text = "hugetlbfs is mounted on " + ", ".join(
        mount.folder + (f" ({mount.page_size})" if mount.page_size else "") for mount in found
    )
    missing = sorted({pool.page_size for pool in facts.pools if pool.total} - sizes)
    if missing and None in sizes:
        return not_measured(f"{text}; the kernel does not tell the size of its pages", needed)
    if missing:
        size = missing[0]
        remedy = f"run `mkdir -p /dev/hugepages-{size} && mount -t hugetlbfs -o pagesize={size} hugetlbfs /dev/hugepages-{size}`"
        return failed(f"{text}; not for pages of {', '.join(map(str, missing))}", needed, f"{remedy}, and add it to /etc/fstab")
    return passed(text)


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
    Check(
        "numa-nodes",
        _M,
        "each node with cores has memory",
        "nodes, sockets and has_memory in sysfs",
        _check_nodes,
        required=False,
    ),
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
    Check(
        "memory-errors",
        _M,
        "memory errors are corrected and reported",
        "counters of memory controllers (EDAC)",
        _check_errors,
        required=False,
    ),
)
