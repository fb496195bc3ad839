"""VFs are created before a guest is claimed on them."""

from __future__ import annotations

import pytest

from orchestrator.errors import HostError
from orchestrator.guests.vf_creation import VfsNeeded, claim_with_vfs
from orchestrator.values import PciAddress

PFS = [PciAddress.parse(f"0000:{bus}:00.0") for bus in (10, 20, 30, 40, 50)]


def test_claim_on_several_uplinks_creates_the_vfs_of_each() -> None:
    created: list[PciAddress] = []

    def claim() -> object:
        for number, pf in enumerate(PFS):
            if pf not in created:
                raise VfsNeeded("web", pf, f"nic{number}")
        return "claim"

    def create(pf: PciAddress, interface: str) -> tuple[str, ...]:
        created.append(pf)
        return (interface,)

    claimed, changed = claim_with_vfs(claim, create, lambda: None)  # type: ignore[arg-type]
    assert (claimed, changed, created) == ("claim", ("nic0", "nic1", "nic2", "nic3", "nic4"), PFS)


def test_vfs_that_disappear_each_time_are_an_error() -> None:
    released, created = [], []

    def claim() -> object:
        raise VfsNeeded("web", PFS[0], "nic0")

    def create(pf: PciAddress, interface: str) -> tuple[str, ...]:
        created.append(pf)
        return (interface,)

    with pytest.raises(HostError, match="removed 3 times"):
        claim_with_vfs(claim, create, lambda: released.append(1))  # type: ignore[arg-type]
    assert (len(created), released) == (3, [1])
