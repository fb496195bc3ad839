"""What to set in the firmware: its words differ between the two makers of processors, and a little between servers. Pure."""

from __future__ import annotations

from orchestrator.doctor.facts import Facts
from orchestrator.errors import OrchestratorError
from orchestrator.host.cmdline import find_words_against_iommu

_INTEL = "GenuineIntel"
_VIRTUALIZATION = {_INTEL: "`Intel Virtualization Technology` (VT-x, VMX)", "": "`SVM Mode` (AMD-V, Secure Virtual Machine)"}
_IOMMU = {_INTEL: "`VT-d` (Intel VT for Directed I/O)", "": "`IOMMU` (AMD-Vi, often below AMD CBS or NBIO)"}
SRIOV = "enable `SR-IOV Support`, `Above 4G Decoding` and `ARI Support` in the firmware settings, and SR-IOV in those of the card"


def enable_virtualization(facts: Facts) -> str:
    if _is_virtual(facts):
        return "enable nested virtualization for this virtual server on its host"
    return f"enable {_choose(facts, _VIRTUALIZATION)} in the firmware settings"


def enable_iommu(facts: Facts) -> str:
    if _is_virtual(facts):
        return "give this virtual server an IOMMU with interrupt remapping, on its host"
    try:
        words = find_words_against_iommu(facts.cmdline)
    except OrchestratorError:
        words = []
    rest = f", and remove {', '.join(words)} from the kernel's command line" if words else ""
    if not rest and _is_intel(facts) is not False:
        rest = ", and add `intel_iommu=on` to the kernel's command line" + ("" if _is_intel(facts) else " on Intel")
    return f"enable {_choose(facts, _IOMMU)} in the firmware settings{rest}"


def _choose(facts: Facts, words: dict[str, str]) -> str:
    intel = _is_intel(facts)
    if intel is None:
        return f"{words['']} on AMD, {words[_INTEL]} on Intel,"
    return words[_INTEL] if intel else words[""]


def _is_virtual(facts: Facts) -> bool:
    try:
        return "hypervisor" in facts.flags
    except OrchestratorError:
        return False


def _is_intel(facts: Facts) -> bool | None:
    """None if the processors cannot be read."""
    try:
        return facts.processors[0].vendor == _INTEL
    except OrchestratorError:
        return None
