"""What somebody else has changed on a running guest is found, each thing by itself; threads that could stray stop a start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import HostError
from orchestrator.guests.drift import check_devices, check_pins, check_threads
from orchestrator.host.processes import Thread
from orchestrator.hypervisor.connection import Hypervisor, Pinning, RunningGuest, Vcpu
from orchestrator.model.plan import Plan, VfPlan
from orchestrator.model.topology import VfState
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

PF = PciAddress.parse("0000:41:00.0")
VF = PF.offset(128)
HOUSEKEEPING = CpuSet.parse("0-1")
PLAN = Plan(
    "g1", (CpuSet.parse("2-3"),), 0, Size.parse("2M"), 64, HOUSEKEEPING,
    VfPlan(PF, "nic0", 0, VF, MacAddress("02:4e:48:00:00:01")), "minimal", "",
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


def test_a_guest_as_planned_has_not_drifted() -> None:
    for state in (STATE, replace(STATE, spoof_check=None, trust=None)):
        assert check_pins(PLAN, LIVE.pinning) == ()
        assert check_devices(PLAN, LIVE.pinning, "vfio-pci", state) == ()


@pytest.mark.parametrize(
    ("live", "driver", "said"),
    [
        (replace(LIVE, vcpus=(LIVE.vcpus[0], Vcpu(1, 102, CpuSet.parse("3,5")))), "vfio-pci", "vCPU 1 may run on CPUs 3,5"),
        (replace(LIVE, vcpus=LIVE.vcpus[:1]), "vfio-pci", "1 vCPUs in place of 2"),
        (replace(LIVE, emulator_pin=CpuSet.parse("0-2")), "vfio-pci", "other threads may run on CPUs 0-2"),
        (LIVE, "igbvf", "bound to igbvf"),
        (LIVE, None, "bound to no driver"),
        (replace(LIVE, hostdevs=()), "vfio-pci", "handed to it are none"),
        (replace(LIVE, hostdevs=(VF, PF)), "vfio-pci", f"{VF}, {PF}"),
    ],
)
def test_each_change_is_named(live: RunningGuest, driver: str | None, said: str) -> None:
    (found,) = (*check_pins(PLAN, live.pinning), *check_devices(PLAN, live.pinning, driver, STATE))
    assert said in found


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "nic0 has no VF 0 any more"),
        (replace(STATE, mac=None), "its VF's mac is none, expected 02:4e:48:00:00:01"),
        (replace(STATE, vlan=1), "its VF's vlan is 1, expected 0"),
        (replace(STATE, max_rate=1), "its VF's max rate is 1, expected 0"),
        (replace(STATE, spoof_check=False), "its VF's spoof check is off, expected on"),
        (replace(STATE, trust=True), "its VF's trust is on, expected off"),
        (replace(STATE, link_state="disable"), "its VF's link state is disable, expected auto"),
    ],
)
def test_each_change_of_what_the_pf_enforces_is_named(state: VfState | None, said: str) -> None:
    assert check_devices(PLAN, LIVE.pinning, "vfio-pci", state) == (said,)


class FakeDomain:
    """A domain of libvirt on a host of eight CPUs, that can only say its XML; so QEMU is not asked."""

    def __init__(self, inner: str) -> None:
        self._inner = inner

    def XMLDesc(self) -> str:
        return f"<domain>{self._inner}</domain>"

    def connect(self) -> FakeDomain:
        return self

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
    monkeypatch.setattr(Hypervisor, "_with_domain", lambda _self, _name, _what, use: use(FakeDomain(inner)))
    assert Hypervisor().read_pinning(PLAN.uuid) == expected


def thread(tid: int, cpus: str) -> Thread:
    return Thread(100, tid, f"t{tid}", CpuSet.parse(cpus), 0, False, False, 0.0)


SOUND = (thread(100, "0-1"), thread(101, "2"), thread(102, "3"), thread(103, "2"))


def test_threads_that_keep_to_their_cpus() -> None:
    check_threads(PLAN, LIVE, SOUND)


@pytest.mark.parametrize("stray", [thread(101, "2-3"), thread(102, "2"), thread(103, "4"), thread(100, "0-7")])
def test_a_thread_that_could_stray(stray: Thread) -> None:
    with pytest.raises(HostError, match=rf"thread t{stray.tid} .* may run on CPUs {stray.allowed}"):
        check_threads(PLAN, LIVE, (*(one for one in SOUND if one.tid != stray.tid), stray))
