"""Resources that a request prescribes."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orchestrator.model.fields import check_cpus, check_pci_address
from orchestrator.values import CpuSet, PciAddress

_MAX_CONTROLLERS = 256
_Address = Annotated[str, Field(max_length=128), AfterValidator(check_pci_address)]


class Placement(BaseModel):
    """Resources that the caller prescribes, such as a batch scheduler. Used exactly, or refused.

    Attributes:
        cpus: whole physical cores of one NUMA node, in the kernel's list format ("2-3,6-7").
        vf: PCI address, or None for any.
        disks: PCI addresses of the NVMe controllers among which the planner chooses; None for all of the host.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    cpus: Annotated[str, Field(max_length=4096), AfterValidator(check_cpus)]
    vf: _Address | None = None
    disks: Annotated[tuple[_Address, ...], Field(strict=False, max_length=_MAX_CONTROLLERS)] | None = None

    @property
    def cpu_set(self) -> CpuSet:
        return CpuSet.parse(self.cpus)

    @property
    def vf_address(self) -> PciAddress | None:
        return PciAddress.parse(self.vf) if self.vf else None
