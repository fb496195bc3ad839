"""Filters that read the results of `nohype doctor --json` and `nohype audit --json`: what stops a playbook, in one line each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Checks whose failure the role cannot change; it sets what the others are about: isolation, huge pages, libvirt ...
REFUSED = (
    "virtualization", "kvm-runs", "cores", "smt-siblings", "iommu", "iommu-overrides", "sr-iov", "kernel", "kernel-options",
    "cgroups", "disk-space", "other-guests", "other-programs",
)  # fmt: skip
SOFTWARE_EDGES = ("bridge-vepa", "macvtap-vepa")
_KIB = {"2M": 2 << 10, "1G": 1 << 20}
# Of a node's memory; the rest holds the kernel, and on one node the manager.
_SHARE = 0.9


def find_refused(
    report: Mapping[str, Any], ignored: Sequence[str], uplinks: Sequence[Mapping[str, Any]], *, has_iommu: bool
) -> list[str]:
    """Why a server cannot become a NoHype host. ``has_iommu``: the firmware describes one, which the role switches on."""
    solved = {"iommu"} if has_iommu else set()
    if all(uplink.get("edge") in SOFTWARE_EDGES for uplink in uplinks):
        solved.add("sr-iov")
    lines = []
    for check in report["checks"]:
        name, found = check["name"], check["found"]
        if check["verdict"] != "fail" or name not in REFUSED or name in {*ignored, *solved}:
            continue
        # The role keeps irqbalance off guest CPUs.
        if name == "other-programs" and not re.search("tuned|ksmtuned|numad", found):
            continue
        lines.append(_describe(check))
    return lines


def _describe(check: Mapping[str, Any]) -> str:
    return f"{check['name']}: {check['found']}; needed: {check['needed']}; to do: {check['remedy']}"


def find_failed(report: Mapping[str, Any], proofs: Sequence[Mapping[str, Any]], ignored: Sequence[str]) -> list[str]:
    """Required checks and proofs that failed."""
    checks = [check for check in report["checks"] if check["verdict"] == "fail" and check["required"]]
    lines = [f"doctor: {_describe(check)}" for check in checks if check["name"] not in ignored]
    return lines + [
        f"audit: {proof['name']} ({proof['subject']}): {'; '.join(proof['evidence'][:3])}"
        for proof in proofs
        if proof["verdict"] == "fail"
    ]


def find_unmeasured(report: Mapping[str, Any], proofs: Sequence[Mapping[str, Any]], ignored: Sequence[str]) -> list[str]:
    lines = [
        f"doctor: {check['name']}: {check['found']}"
        for check in report["checks"]
        if check["verdict"] == "not measured" and check["required"] and check["name"] not in ignored
    ]
    return lines + [
        f"audit: {proof['name']} ({proof['subject']}): {'; '.join(proof['evidence'][:1])}"
        for proof in proofs
        if proof["verdict"] == "not measured"
    ]


def find_too_large(pages: Sequence[int | str], size: str, meminfo: str) -> list[str]:
    """NUMA nodes whose memory the huge pages would fill; ``meminfo``: lines `Node 0 MemTotal: 123 kB`."""
    total = {int(node): int(kib) for node, kib in re.findall(r"Node (\d+) MemTotal: +(\d+) kB", meminfo)}
    return [
        f"node {node}: {int(number)} pages of {size} are {int(number) * _KIB[size] >> 10} MB, the node has {total[node] >> 10} MB"
        for node, number in enumerate(pages)
        if node in total and int(number) * _KIB[size] > total[node] * _SHARE
    ]


def find_staying(lines: Sequence[str], recorded: Sequence[str], others: Sequence[str]) -> list[str]:
    """Packages that undo.yml leaves; all of them if ``others`` need some. ``lines``: dpkg's or rpm's `STATUS NAME`."""
    removed = set() if others else {name.split(":")[0] for name in recorded}
    present = {name for status, name in (line.split(" ", 1) for line in lines if " " in line) if status != "not-installed"}
    return sorted(present - removed)


def find_removable(accounts: Sequence[str], owners: Mapping[str, str], staying: Sequence[str]) -> list[str]:
    """Accounts that no staying package needs. ``owners``: regular expressions of the packages' names, by account."""
    return [
        account for account in accounts if account not in owners or not any(re.match(owners[account], name) for name in staying)
    ]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "nohype_refused": find_refused,
            "nohype_failed": find_failed,
            "nohype_unmeasured": find_unmeasured,
            "nohype_too_large": find_too_large,
            "nohype_staying": find_staying,
            "nohype_removable": find_removable,
        }
