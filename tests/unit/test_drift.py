"""What somebody else has changed on a running guest is found, each thing by itself; threads that could stray stop a start."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import libvirt
import pytest

from orchestrator.errors import HostError
from orchestrator.host.processes import Thread
from orchestrator.hypervisor.connection import Hypervisor, Pinning, RunningGuest, Vcpu
from orchestrator.model.plan import ImageRef, NicPlan, Plan
from orchestrator.model.topology import VfState
from orchestrator.resources.cores import check_confinement, diff_pinning, diff_vcpus
from orchestrator.resources.nic import VfStates, diff_devices
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

PF = PciAddress.parse("0000:41:00.0")
VF = PF.offset(128)
HOUSEKEEPING = CpuSet.parse("0-1")
PLAN = Plan(
    "g1", (CpuSet.parse("2-3"),), 0, Size.parse("2M"), 64,
    (NicPlan(PF, "nic0", 0, VF, MacAddress("02:4e:48:00:00:01")),), ImageRef("minimal"), "",
)  # fmt: skip
LIVE = RunningGuest(
    "g1",
    100,
    (Vcpu(0, 101, CpuSet.parse("2")), Vcpu(1, 102, CpuSet.parse("3"))),
    HOUSEKEEPING,
    0,
    PLAN.memory,
    (VF,),
    (),
    PLAN.uuid,
)


STATE = VfState(0, PLAN.vf.mac)


def diff(
    running: RunningGuest = LIVE, driver: str | None = "vfio-pci", states: VfStates | None = None, plan: Plan = PLAN
) -> tuple[str, ...]:
    """All differences; the VFs all have this driver."""
    drivers = dict.fromkeys((nic.address for nic in plan.nics), driver)
    bounds = running.pinning
    devices = diff_devices(plan, bounds, drivers, {PF: [STATE]} if states is None else states)
    return (*diff_pinning(plan, HOUSEKEEPING, bounds), *diff_vcpus(plan, bounds), *devices)


@pytest.mark.parametrize("state", [STATE, replace(STATE, spoof_check=None, trust=None)])
def test_guest_as_planned_has_not_drifted(state: VfState) -> None:
    assert diff(states={PF: [state]}) == ()


@pytest.mark.parametrize(
    ("running", "driver", "expected"),
    [
        (replace(LIVE, vcpus=(LIVE.vcpus[0], Vcpu(1, 102, CpuSet.parse("3,5")))), "vfio-pci", "vCPU 1: affinity 3,5, expected 3"),
        (replace(LIVE, vcpus=LIVE.vcpus[:1]), "vfio-pci", "1 vCPUs, expected 2"),
        (replace(LIVE, emulator_pin=CpuSet.parse("0-2")), "vfio-pci", "emulator threads: affinity 0-2, expected 0-1"),
        (LIVE, "igbvf", f"VF {VF}: driver igbvf, expected vfio-pci"),
        (LIVE, None, f"VF {VF}: driver none, expected vfio-pci"),
        (replace(LIVE, hostdevs=()), "vfio-pci", f"devices passed through: none, expected {VF}"),
        (replace(LIVE, hostdevs=(VF, PF)), "vfio-pci", f"devices passed through: {VF}, {PF}, expected {VF}"),
    ],
)
def test_each_change_is_reported(running: RunningGuest, driver: str | None, expected: str) -> None:
    assert diff(running, driver) == (expected,)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({PF: []}, "nic0 has no VF 0"),
        ({}, "nic0 has no VF 0"),
        ({PF: "no such device"}, f"VF {VF}: settings cannot be read from PF {PF}: no such device"),
        ({PF: [replace(STATE, mac=None)]}, f"VF {VF}: mac is none"),
        ({PF: [replace(STATE, vlan=1)]}, f"VF {VF}: vlan is 1"),
        ({PF: [replace(STATE, max_rate=1)]}, f"VF {VF}: max rate is 1"),
        ({PF: [replace(STATE, spoof_check=False)]}, f"VF {VF}: spoof check is off"),
        ({PF: [replace(STATE, trust=True)]}, f"VF {VF}: trust is on"),
        ({PF: [replace(STATE, link_state="disable")]}, f"VF {VF}: link state is disable"),
    ],
)
def test_each_changed_vf_setting_is_reported(states: VfStates, expected: str) -> None:
    (found,) = diff(states=states)
    assert found.startswith(expected)


def test_vf_of_a_network_keeps_its_vlan_and_rate() -> None:
    plan = replace(PLAN, nics=(replace(PLAN.nics[0], network="blue", vlan=100, rate=50),))
    assert diff(states={PF: [replace(STATE, vlan=100, max_rate=50)]}, plan=plan) == ()
    assert diff(states={PF: [STATE]}, plan=plan) == (f"VF {VF}: vlan is 0, expected 100", f"VF {VF}: max rate is 0, expected 50")


def test_each_nic_is_compared() -> None:
    second = NicPlan(PF, "nic0", 1, PF.offset(130), MacAddress("02:4e:48:00:00:02"))
    plan = replace(PLAN, nics=(*PLAN.nics, second))
    states: VfStates = {PF: [STATE, VfState(1, second.mac)]}
    assert diff(replace(LIVE, hostdevs=(second.address, VF)), states=states, plan=plan) == (), "in any order"
    assert diff(states=states, plan=plan) == (f"devices passed through: {VF}, expected {VF}, {second.address}",)
    (found,) = diff(replace(LIVE, hostdevs=(VF, second.address)), states={PF: [STATE, VfState(1, None)]}, plan=plan)
    assert found.startswith(f"VF {second.address}: mac is none")
    running = replace(LIVE, hostdevs=(VF, second.address))
    drivers = {VF: "vfio-pci", second.address: "igbvf"}
    assert diff_devices(plan, running.pinning, drivers, states) == (f"VF {second.address}: driver igbvf, expected vfio-pci",)


class FakeDomain:
    """A domain of libvirt on a host of eight CPUs, that can only say its XML; so QEMU is not asked."""

    def __init__(self, inner: str) -> None:
        self._inner = inner

    def XMLDesc(self) -> str:
        return f"<domain>{self._inner}</domain>"

    def connect(self) -> FakeDomain:
        return self

    def state(self) -> tuple[int, int]:
        return libvirt.VIR_DOMAIN_PAUSED, 0

    def getCPUMap(self) -> tuple[int, list[bool], int]:
        return 8, [True] * 8, 8


ADDRESS = "<address domain='0x0000' bus='0x41' slot='0x10' function='0x0'/>"
PINS = "<vcpupin vcpu='1' cpuset='3'/><vcpupin vcpu='0' cpuset='2'/>"
HOSTDEV = f"<devices><hostdev type='pci'><source>{ADDRESS}</source></hostdev></devices>"


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (
            f"<vcpu>2</vcpu><cputune>{PINS}<emulatorpin cpuset='0-1'/></cputune>{HOSTDEV}",
            Pinning((CpuSet.parse("2"), CpuSet.parse("3")), HOUSEKEEPING, (VF,)),
        ),
        (
            f"<vcpu current='3'>4</vcpu><cputune>{PINS}</cputune>",
            Pinning((CpuSet.parse("2"), CpuSet.parse("3"), CpuSet.parse("0-7")), CpuSet.parse("0-7"), ()),
        ),
    ],
    ids=["pinned", "partly"],
)
def test_bounds_as_libvirt_says_them(inner: str, expected: Pinning, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = SimpleNamespace(isAlive=lambda: True, lookupByUUIDString=lambda _uuid: FakeDomain(inner))
    monkeypatch.setattr(libvirt, "open", lambda _uri: connection)
    assert Hypervisor().read_pinning(PLAN.uuid) == replace(expected, paused=True)


def thread(tid: int, cpus: str) -> Thread:
    return Thread(100, tid, f"t{tid}", CpuSet.parse(cpus), 0, False, False, 0.0)


SOUND = (thread(100, "0-1"), thread(101, "2"), thread(102, "3"), thread(103, "2"))


def test_threads_that_keep_to_their_cpus() -> None:
    check_confinement(PLAN, HOUSEKEEPING, LIVE, SOUND)


@pytest.mark.parametrize("stray", [thread(101, "2-3"), thread(102, "2"), thread(103, "4"), thread(100, "0-7")])
def test_a_thread_that_could_stray(stray: Thread) -> None:
    with pytest.raises(HostError, match=rf"thread t{stray.tid} .* affinity {stray.allowed}, allowed"):
        check_confinement(PLAN, HOUSEKEEPING, LIVE, (*(one for one in SOUND if one.tid != stray.tid), stray))
