"""disk-isolated and disk-clean: a guest's disks belong to it alone, and held nothing when it got them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.host.pci import VFIO
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.disk import DiskCheck
from orchestrator.model.proof import WEAKER, Measurement, Verdict, count_findings, not_measured
from orchestrator.model.target import parse_target
from orchestrator.model.topology import IommuGroup
from orchestrator.model.waiver import Waiver
from orchestrator.values import PciAddress


@dataclass(frozen=True)
class DiskState:
    """An NVMe controller that is passed through, as the host's kernel reports it."""

    address: PciAddress
    driver: str | None
    group: IommuGroup | None
    blocks: tuple[str, ...]  # block devices of the host that are namespaces of the controller
    vfio_file: str | None  # the VFIO file of the controller that the guest's QEMU has open


_NO_DISK = count_findings((), ("the guest has no disk: its root file system is in memory",))
_REMOTE = "the guest connects to it over its VF, the host does not; which other machines do is up to its server"


def prove_disk_isolated(guest: RunningGuest, disks: tuple[DiskState, ...], connected: frozenset[str]) -> Measurement:
    """The host has no path to the guest's disks.

    Args:
        connected: names of the targets to which the host itself is connected.
    """
    if not disks and not guest.disks and not guest.targets:
        return _NO_DISK
    findings = [f"{disk.address}: {finding}" for disk in disks for finding in _check(disk)]
    evidence = [
        f"{disk.address}: driver {disk.driver}, alone in IOMMU group {disk.group.number if disk.group else 'none'},"
        f" no block device on the host, QEMU has {disk.vfio_file} open"
        for disk in disks
        if not _check(disk)
    ]
    evidence += [f"{WEAKER}disk {disk}: {Waiver.EMULATED_DISK.reason}" for disk in guest.disks]
    findings += [f"{target}: the host is connected to it too" for target in guest.targets if _find_name(target) in connected]
    if guest.targets and not findings:
        remote = [f"{target}: {_REMOTE}" for target in guest.targets]
        return Measurement(Verdict.NOT_MEASURED, None, (*remote, *evidence))
    return count_findings(findings, evidence)


def prove_disk_clean(
    guest: RunningGuest, controllers: tuple[PciAddress, ...], checks: tuple[DiskCheck, ...] | None
) -> Measurement:
    """Every byte of each disk was read as zero before the guest got it.

    Args:
        controllers: NVMe controllers that are passed through.
        checks: None for an unmanaged guest.
    """
    if not controllers and not guest.disks and not guest.targets:
        return _NO_DISK
    if checks is None:
        return not_measured("the manager did not create this guest, and the contents of its disks are its own now")
    owned = {str(address): next((one for one in checks if one.address == address), None) for address in controllers}
    owned |= {file: next((one for one in checks if one.disk == file), None) for file in guest.disks}
    findings = [f"disk {name}: {finding}" for name, check in owned.items() if (finding := _check_record(check))]
    evidence = [_describe(name, check) for name, check in owned.items() if check and not _check_record(check)]
    if owned:
        evidence.append(f"{WEAKER}the manager recorded this before the guest started: the guest may have written since")
    if guest.targets and not findings:
        remote = [f"{target}: the host does not reach it, so it was not read before the guest got it" for target in guest.targets]
        return Measurement(Verdict.NOT_MEASURED, None, (*remote, *evidence))
    return count_findings(findings, evidence)


def _find_name(target: str) -> str:
    """The name of the target without address and LUN. A guest that was started outside the manager can have any text there."""
    try:
        return parse_target(target).name
    except ValueError:
        return target


def _check(disk: DiskState) -> list[str]:
    findings = []
    if disk.driver != VFIO:
        findings.append(f"its driver is {disk.driver or 'none'}, expected {VFIO}")
    if disk.vfio_file is None:
        findings.append("QEMU does not hold the controller's VFIO file")
    if disk.group is None:
        findings.append("it is in no IOMMU group")
    elif disk.group.devices != (disk.address,):
        others = ", ".join(str(member) for member in disk.group.devices if member != disk.address)
        findings.append(f"it shares IOMMU group {disk.group.number} with {others or 'unknown devices'}")
    if disk.blocks:
        findings.append(f"the host has block devices of it: {', '.join(disk.blocks)}")
    return findings


def _check_record(check: DiskCheck | None) -> str:
    if check is None:
        return "it was not verified before the guest got it"
    if check.read != check.size or not check.size:
        return f"{check.read} of {check.size} bytes were read"
    return ""


def _describe(name: str, check: DiskCheck) -> str:
    written = f"; then image {check.image[:12]} was written and read back" if check.image else ""
    return f"disk {check.disk} ({name}): {check.read} bytes read as zero at {check.time} (method {check.method}){written}"
