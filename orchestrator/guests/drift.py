"""Whether a running guest is still where its plan says, and the one repair that cannot hurt it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.errors import HostError
from orchestrator.host.pci import VFIO
from orchestrator.host.processes import Thread
from orchestrator.hypervisor.connection import Hypervisor, Pinning, RunningGuest
from orchestrator.model.plan import Plan
from orchestrator.model.topology import VfState
from orchestrator.values import CpuSet, PciAddress


def check_threads(plan: Plan, live: RunningGuest, threads: tuple[Thread, ...]) -> None:
    """Looks where the threads of a guest's QEMU may run. Pure.

    Raises:
        HostError: a vCPU may run elsewhere than on its CPU, or another thread beyond the guest's and housekeeping.
    """
    own, vcpus = CpuSet.of(plan.cpus), {vcpu.tid: plan.cpus[vcpu.index] for vcpu in live.vcpus}
    for thread in threads:
        may = CpuSet.of([vcpus[thread.tid]]) if thread.tid in vcpus else own | plan.housekeeping
        if not thread.allowed <= may:
            what = f"thread {thread.name} ({thread.tid}) of guest {plan.name}"
            raise HostError(
                f"{what} may run on CPUs {thread.allowed}, but must keep to {may}",
                "something else sets affinities: a tuning daemon?",
            )


def check_pins(plan: Plan, live: Pinning) -> tuple[str, ...]:
    """What ``repair_pins`` would put right on a running guest, a sentence each. Pure.

    Args:
        live: what libvirt holds the guest to.
    """
    found = [
        f"vCPU {index} may run on CPUs {pin} in place of {cpu}"
        for index, (pin, cpu) in enumerate(zip(live.pins, plan.cpus, strict=False))
        if tuple(pin) != (cpu,)
    ]
    if live.emulator_pin != plan.housekeeping:
        found.append(f"QEMU's other threads may run on CPUs {live.emulator_pin} in place of {plan.housekeeping}")
    return tuple(found)


VfStates = Mapping[PciAddress, Sequence[VfState] | str]
"""PF → what it enforces for its VFs, or why that cannot be read."""


def find_state(states: VfStates, plan: Plan) -> VfState | str | None:
    """Of a guest's VF; None if the PF has no such VF. Pure."""
    found = states.get(plan.vf.pf, ())
    return found if isinstance(found, str) else next((vf for vf in found if vf.index == plan.vf.index), None)


def check_devices(plan: Plan, live: Pinning, driver: str | None, vf: VfState | str | None) -> tuple[str, ...]:
    """What else somebody has changed on a running guest, a sentence each. Pure.

    Args:
        live: what libvirt has given the guest.
        driver: driver of its VF.
        vf: what the PF enforces for its VF, None if it has no such VF, or why it cannot be read.
    """
    found = []
    if len(live.pins) != len(plan.cpus):
        found.append(f"it has {len(live.pins)} vCPUs in place of {len(plan.cpus)}")
    if driver != VFIO:
        found.append(f"its VF {plan.vf.address} is bound to {driver or 'no driver'} in place of {VFIO}")
    if live.hostdevs != (plan.vf.address,):
        devices = ", ".join(map(str, live.hostdevs)) or "none"
        found.append(f"the devices handed to it are {devices} in place of {plan.vf.address}")
    return (*found, *check_vf(plan, vf))


def check_vf(plan: Plan, vf: VfState | str | None) -> tuple[str, ...]:
    """What the PF enforces for a guest's VF, where that is not as it was made. Pure."""
    if isinstance(vf, str):
        return (f"what its PF {plan.vf.pf} enforces for its VF cannot be read: {vf}",)
    if vf is None:
        return (f"{plan.vf.interface} has no VF {plan.vf.index} any more",)
    return tuple(f"its VF's {difference}" for difference in vf.diff(vf.with_defaults(plan.vf.mac)).values())


def repair_pins(hypervisor: Hypervisor, plan: Plan, live: Pinning) -> None:
    """Pins a running guest's threads as its plan says: the one change to a running guest that cannot hurt it."""
    for index, (pin, cpu) in enumerate(zip(live.pins, plan.cpus, strict=False)):
        if tuple(pin) != (cpu,):
            hypervisor.pin(plan.uuid, index, CpuSet.of([cpu]))
    if live.emulator_pin != plan.housekeeping:
        hypervisor.pin_emulator(plan.uuid, plan.housekeeping)
