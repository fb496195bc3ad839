"""Creates VFs before a guest is claimed on one: the kernel reports VF addresses only after the creation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from orchestrator.errors import Conflict, HostError, NoRoom
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import find_vf
from orchestrator.ledger import Claim
from orchestrator.model.plan import Allocated, Plan, Policy
from orchestrator.model.request import GuestRequest
from orchestrator.model.topology import Topology
from orchestrator.planning.inputs import NO_SITE, Site
from orchestrator.planning.nic import find_unknown
from orchestrator.planning.planner import plan_guest
from orchestrator.values import PciAddress

_ATTEMPTS = 3
"""Maximum number of VF creations per PF and claim: the end of the last guest may remove the VFs again."""


class VfsNeeded(Conflict):
    """The guest has room once an uplink's VFs are created."""

    def __init__(self, name: str, pf: PciAddress, interface: str) -> None:
        where = f"the addresses of the VFs of {interface} ({pf}) are unknown until they are created"
        super().__init__(f"guest {name!r} cannot be planned yet: {where}", "create the guest: this creates the VFs")
        self.name, self.pf, self.interface = name, pf, interface


def plan_known(request: GuestRequest, topology: Topology, allocated: Allocated, policy: Policy, site: Site = NO_SITE) -> Plan:
    """Raises VfsNeeded if the only obstacle is an uplink whose VF addresses are not known yet; otherwise as ``plan_guest``."""
    try:
        return plan_guest(request, topology, allocated, policy, site)
    except NoRoom:
        unknown = {pf.address: replace(pf, first_vf_offset=1, vf_stride=1) for pf in find_unknown(topology, policy)}
        if not unknown or any(nic.vf for nic in request.wanted_nics):
            raise
        # Checks the other resources with assumed addresses; this plan is not used.
        assumed = replace(topology, pfs=tuple(unknown.get(pf.address, pf) for pf in topology.pfs))
        vf = next(vf for vf in plan_guest(request, assumed, allocated, policy, site).vfs if vf.pf in unknown)
        raise VfsNeeded(request.name, vf.pf, vf.interface) from None


def check_created(host: HostRoot, plan: Plan) -> None:
    """Raises VfsNeeded if a VF of the plan does not exist at its planned address."""
    for vf in plan.vfs:
        if find_vf(host, vf.pf, vf.index) != vf.address:
            raise VfsNeeded(plan.name, vf.pf, vf.interface)


def claim_with_vfs(
    claim: Callable[[], Claim], create_vfs: Callable[[PciAddress, str], tuple[str, ...]], release: Callable[[], None]
) -> tuple[Claim, tuple[str, ...]]:
    """Calls ``claim``, and creates VFs first if it raises VfsNeeded. Returns the claim, and the changes to the host.

    Args:
        create_vfs: ``HostSetup.create_vfs``.
        release: ``HostSetup.release``.

    Raises:
        HostError: VFs could not be created, or disappeared several times; or what ``claim`` raises.
    """
    changed: list[str] = []
    attempts: Counter[PciAddress] = Counter()
    try:
        while True:
            try:
                return claim(), tuple(changed)
            except VfsNeeded as needed:
                if attempts[needed.pf] == _ATTEMPTS:
                    message = f"the VFs for guest {needed.name} were removed {_ATTEMPTS} times before they were claimed"
                    raise HostError(message, "try again") from None
                pf, interface = needed.pf, needed.interface
            attempts[pf] += 1
            changed += create_vfs(pf, interface)
    except BaseException:
        if attempts:
            release()  # no-op while there are claims
        raise
