"""VFs are made before a guest is claimed on one: only the kernel tells where they are, and only once they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.errors import Conflict, HostError, NoRoom
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import find_vf
from orchestrator.ledger import Claim
from orchestrator.model.plan import Allocated, Plan, Policy
from orchestrator.model.request import GuestRequest
from orchestrator.model.topology import Topology
from orchestrator.planning.nic import find_unknown
from orchestrator.planning.planner import plan_guest
from orchestrator.values import PciAddress

_ATTEMPTS = 3
"""Times that VFs are made for a claim: the end of the last guest may take them away again meanwhile."""


class VfsNeeded(Conflict):
    """There is room for a guest, once an uplink's VFs are made."""

    def __init__(self, name: str, pf: PciAddress, interface: str) -> None:
        where = f"where the VFs of {interface} ({pf}) will be is not known before they are made"
        super().__init__(f"guest {name!r} cannot be planned yet: {where}", "creating a guest makes them")
        self.name, self.pf, self.interface = name, pf, interface


def plan_known(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """As ``plan_guest``.

    Raises:
        VfsNeeded: there is no room only because an uplink does not tell where its VFs will be.
    """
    try:
        return plan_guest(request, topology, taken, policy)
    except NoRoom:
        unknown = {pf.address: replace(pf, first_vf_offset=1, vf_stride=1) for pf in find_unknown(topology, policy)}
        if not unknown or any(nic.vf for nic in request.wanted_nics):
            raise
        # To see whether all else has room; this plan is not used.
        supposed = replace(topology, pfs=tuple(unknown.get(pf.address, pf) for pf in topology.pfs))
        nic = next(nic for nic in plan_guest(request, supposed, taken, policy).nics if nic.pf in unknown)
        raise VfsNeeded(request.name, nic.pf, nic.interface) from None


def check_made(host: HostRoot, plan: Plan) -> None:
    """Looks whether the VF of a plan exists where the plan says.

    Raises:
        VfsNeeded: it does not.
    """
    for nic in plan.nics:
        if find_vf(host, nic.pf, nic.index) != nic.address:
            raise VfsNeeded(plan.name, nic.pf, nic.interface)


def claim_with_vfs(
    claim: Callable[[], Claim], make_vfs: Callable[[PciAddress, str], tuple[str, ...]], give_back: Callable[[], None]
) -> tuple[Claim, tuple[str, ...]]:
    """Claims, and makes VFs first where that is needed.

    Args:
        claim: plans and claims; raises VfsNeeded.
        make_vfs: ``HostSetup.make_vfs``.
        give_back: undoes what serves all guests, if there is none.

    Returns:
        The claim, and what was changed on the host for it.

    Raises:
        HostError: VFs could not be made; or what ``claim`` raises.
    """
    made: list[str] = []
    tried = 0
    try:
        while True:
            try:
                return claim(), tuple(made)
            except VfsNeeded as needed:
                if tried == _ATTEMPTS:
                    what = f"VFs that guest {needed.name} was to have went {_ATTEMPTS} times meanwhile"
                    raise HostError(what, "try again") from None
                pf, interface = needed.pf, needed.interface
            tried += 1
            made += make_vfs(pf, interface)
    except BaseException:
        if tried:
            give_back()  # does nothing while there are claims
        raise
