"""Compares the settings that NICs enforce for their VFs with those that the claims require."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.host_view import VfSettings
from orchestrator.model.plan import VfPlan
from orchestrator.model.state import GuestState
from orchestrator.model.topology import PhysicalFunction, Topology, VfState, VirtualFunction
from orchestrator.values import PciAddress

MAX_AGE = 5.0
"""Seconds for which a reading is used again while no guest changes: some NICs take milliseconds per VF."""

_Owner = tuple[Claim, VfPlan]


class VfReader:
    """Not for several threads."""

    def __init__(self, host: HostRoot, ledger: Ledger) -> None:
        self._host, self._ledger = host, ledger
        self._read_at, self._based_on = 0.0, (object(), object())
        self._found: tuple[VfSettings, ...] = ()

    def read(self, topology: Topology) -> tuple[VfSettings, ...]:
        """All VFs of the host. A guest that changes during the reading is not compared."""
        claims, now = self._ledger.read().claims, time.monotonic()
        based_on = (claims, topology.pfs)
        if self._based_on == based_on and self._read_at > now - MAX_AGE:
            return self._found
        states = {pf.address: self._read_states(pf) for pf in topology.pfs if pf.vfs}
        after = {claim.plan.uuid: claim.version for claim in self._ledger.read().claims}
        steady = [claim for claim in claims if after.get(claim.plan.uuid) == claim.version]
        self._found = tuple(compare(topology, states, claims, steady))
        self._based_on, self._read_at = based_on, now
        return self._found

    def _read_states(self, pf: PhysicalFunction) -> dict[int, VfState] | str:
        if not pf.interface:
            return "its PF has no interface"
        try:
            return {state.index: state for state in self._host.net.read_vfs(pf.interface)}
        except HostError as error:
            return error.message


def compare(
    topology: Topology, states: dict[PciAddress, dict[int, VfState] | str], claims: Sequence[Claim], steady: Sequence[Claim]
) -> Iterator[VfSettings]:
    """``states``: by PF, or why they cannot be read. ``steady``: claims that have not changed while they were read."""
    owners = {vf.address: (claim, vf) for claim in claims for vf in claim.plan.vfs}
    for pf in topology.pfs:
        found = states.get(pf.address, "not read")
        for vf in pf.vfs:
            owner = owners.get(vf.address)
            name = owner[0].plan.name if owner else ""
            state = found if isinstance(found, str) else found.get(vf.index, f"{pf.interface} does not report it")
            if isinstance(state, str):
                yield VfSettings(vf.address, name, why=state)
                continue
            wanted = _find_wanted(vf, state, owner, steady)
            yield VfSettings(
                vf.address, name, state.mac, state.vlan, state.min_rate, state.max_rate, state.spoof_check, state.trust,
                state.link_state, tuple(state.diff(wanted).values()) if wanted else (),
            )  # fmt: skip


def _find_wanted(vf: VirtualFunction, state: VfState, owner: _Owner | None, steady: Sequence[Claim]) -> VfState | None:
    """The settings that the VF must have; None if nothing is required of them now."""
    if owner is None:
        return None if vf.use else state.with_defaults(state.mac)
    claim, planned = owner
    if claim in steady and claim.state == GuestState.RUNNING:
        return state.with_defaults(planned.mac, planned.vlan, planned.rate)
    return state.with_defaults(state.mac) if claim in steady and claim.state == GuestState.STOPPED else None
