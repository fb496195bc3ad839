"""memory-static: guest memory is huge pages of a pool on the cores' NUMA node, not movable, swappable or mergeable. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping as MappingType
from dataclasses import dataclass

from orchestrator.host.processes import Mapping, Maps
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import Measurement, Verdict, not_measured
from orchestrator.model.topology import PagePool, Topology
from orchestrator.values import CpuSet

# mm/mlock.c, mlock_fixup(): VM_SPECIAL mappings (device and vDSO pages: io, pf, mm, de) and pool pages never get VM_LOCKED. None
# of them can be swapped. Droppable pages (dp: state of the vDSO's getrandom, Linux 6.11) hold nothing that is the guest's.
_NEVER_LOCKED = {"ht", "io", "pf", "mm", "de", "dp"}
_NAMED = 5


@dataclass(frozen=True)
class _Finding:
    """``size`` is in bytes."""

    size: int
    text: str


def prove_memory_static(guest: RunningGuest, maps: Maps, topology: Topology, ksm_run: str | None) -> Measurement:
    """The figure is in kB. ``ksm_run`` is None without KSM."""
    pool = [mapping for mapping in maps.mappings if mapping.huge]
    huge = sum(mapping.huge for mapping in pool)
    rest = [mapping for mapping in maps.mappings if not mapping.huge]
    missing = _check_huge(guest, huge)
    off_node = _check_nodes(guest, pool, topology)
    unlocked = _check_locked(rest)
    mergeable = _check_merging(maps.mappings, ksm_run)
    findings = [finding.text for finding in (*missing, *off_node, *unlocked, *mergeable)]
    # A page that is not huge may also be unlocked and mergeable: count it once. A page on another node is huge, so add it.
    wrong = max(_bytes(missing), _bytes(unlocked), _bytes(mergeable)) + _bytes(off_node)
    exempt = [mapping for mapping in rest if mapping.resident and mapping.flags & _NEVER_LOCKED]
    evidence = (
        f"{huge >> 10} of {guest.memory.kib} kB are pool pages: {_describe_pages(pool)} (/proc/{guest.pid}/smaps)",
        *(f"{_name(mapping)}: {_describe_nodes(mapping)}, policy {mapping.policy} (numa_maps)" for mapping in pool),
        f"VmLck {maps.locked >> 10} kB; {len(rest)} other mappings with {_resident(rest) >> 10} kB resident, of which"
        f" {_bytes(unlocked) >> 10} kB are not locked",
        f"{len(exempt)} of them are never locked or swapped by the kernel: device pages, vDSO ({_resident(exempt) >> 10} kB)",
        f"/sys/kernel/mm/ksm/run is {ksm_run}; {len([m for m in maps.mappings if 'mg' in m.flags])} mappings are mergeable",
    )
    return Measurement(Verdict.FAIL if findings else Verdict.PASS, wrong >> 10, (*findings, *evidence))


def prove_pool_accounting(pools: tuple[PagePool, ...], maps: MappingType[str, Maps]) -> Measurement:
    """The pool pages in use are exactly the guests' pages; the figure is in pages. ``maps`` are of QEMU, by guest name."""
    if not pools:
        return not_measured("the host has no huge page pool")
    mapped: Counter[tuple[int, int]] = Counter()
    owners: dict[tuple[int, int], list[str]] = {}
    for name, of_guest in maps.items():
        pages: Counter[tuple[int, int]] = Counter()
        for mapping in of_guest.mappings:
            if mapping.huge:
                pages.update({(node, mapping.page_size): count for node, count in mapping.nodes})
        for key, count in pages.items():
            owners.setdefault(key, []).append(f"{name} {count}")
        mapped += pages
    findings, evidence, wrong = [], [], 0
    known = {(pool.node, pool.page_size.bytes): pool for pool in pools}
    for key in sorted(known.keys() | mapped.keys()):
        pool = known.get(key)
        total, free = (pool.total, pool.free) if pool else (0, 0)
        text = (
            f"node {key[0]}, {key[1] >> 10} kB pages: {total} in the pool, {free} free, {mapped[key]} mapped by guests"
            f" ({', '.join(owners.get(key, ['none']))})"
        )
        difference = total - free - mapped[key]
        if difference:
            what = "in use but not by any guest" if difference > 0 else "mapped but not counted as in use"
            findings.append(f"{text}: {abs(difference)} {what}")
            wrong += abs(difference)
        else:
            evidence.append(text)
    return Measurement(Verdict.FAIL if findings else Verdict.PASS, wrong, (*findings, *evidence))


def _check_huge(guest: RunningGuest, huge: int) -> list[_Finding]:
    missing = guest.memory.bytes - huge
    if not missing:
        return []
    if missing < 0:
        return [_Finding(-missing, f"{-missing >> 10} kB of pool are mapped beyond guest memory")]
    return [_Finding(missing, f"{missing >> 10} kB of {guest.memory.kib} kB of guest memory are not huge pages of a pool")]


def _check_nodes(guest: RunningGuest, pool: list[Mapping], topology: Topology) -> list[_Finding]:
    """Pages must be on the node of the cores, by a policy that allows no other node."""
    cpus = CpuSet.of(cpu for vcpu in guest.vcpus for cpu in vcpu.pin)
    nodes = {core.node for core in topology.cores if core.cpus & cpus}
    if len(nodes) != 1:
        return [_Finding(guest.memory.bytes, f"cores {cpus} span nodes {sorted(nodes)}")]
    (node,) = nodes
    findings = []
    if guest.node != node:
        bound = f"libvirt binds the memory to node {guest.node}, the cores {cpus} are on node {node}"
        findings.append(_Finding(guest.memory.bytes, bound))
    for mapping in pool:
        placed = sum(count for _, count in mapping.nodes) * mapping.page_size
        away = sum(count for where, count in mapping.nodes if where != node) * mapping.page_size
        if away:
            findings.append(
                _Finding(away, f"{away >> 10} kB are not on node {node} of the guest's cores: {_describe_nodes(mapping)}")
            )
        if placed != mapping.huge:
            findings.append(_Finding(abs(mapping.huge - placed), f"numa_maps places {placed >> 10} of {mapping.huge >> 10} kB"))
        if mapping.policy not in (f"bind:{node}", f"bind=static:{node}"):
            findings.append(_Finding(mapping.huge, f"policy {mapping.policy!r} does not keep {_name(mapping)} on node {node}"))
    return findings


def _check_locked(rest: list[Mapping]) -> list[_Finding]:
    unlocked = [
        mapping for mapping in rest if mapping.resident and "lo" not in mapping.flags and not mapping.flags & _NEVER_LOCKED
    ]
    # An unlocked QEMU has hundreds of them: name the largest.
    unlocked.sort(key=lambda mapping: mapping.resident, reverse=True)
    findings = [
        _Finding(mapping.resident, f"{mapping.resident >> 10} kB are not locked: {_name(mapping)}")
        for mapping in unlocked[:_NAMED]
    ]
    if others := unlocked[_NAMED:]:
        size = _resident(others)
        findings.append(_Finding(size, f"{size >> 10} kB are not locked: {len(others)} smaller mappings"))
    return findings


def _check_merging(mappings: tuple[Mapping, ...], ksm_run: str | None) -> list[_Finding]:
    findings = [
        _Finding(mapping.resident + mapping.huge, f"KSM may merge pages of {_name(mapping)} (VmFlags mg)")
        for mapping in mappings
        if "mg" in mapping.flags
    ]
    # 0: stopped; 2: stopped, and merged pages are unmerged (Documentation/admin-guide/mm/ksm.rst)
    if ksm_run not in (None, "0", "2"):
        findings.append(
            _Finding(_resident(list(mappings)), f"the kernel merges equal pages: /sys/kernel/mm/ksm/run is {ksm_run}")
        )
    return findings


def _name(mapping: Mapping) -> str:
    return mapping.path or f"anonymous memory at {mapping.start:x}"


def _describe_pages(pool: list[Mapping]) -> str:
    pages: Counter[int] = Counter()
    for mapping in pool:
        pages[mapping.page_size] += mapping.huge // mapping.page_size
    return ", ".join(f"{count} of {size >> 10} kB" for size, count in pages.items()) or "none"


def _describe_nodes(mapping: Mapping) -> str:
    return ", ".join(f"{count} pages on node {node}" for node, count in mapping.nodes) or "on no node"


def _resident(mappings: list[Mapping]) -> int:
    return sum(mapping.resident for mapping in mappings)


def _bytes(findings: list[_Finding]) -> int:
    return sum(finding.size for finding in findings)
