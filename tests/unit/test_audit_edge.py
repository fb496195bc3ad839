"""The proof vepa for guests on software edges: each way in which the host could switch a frame itself makes it fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from uuid import UUID

import pytest

from orchestrator.audit.edge import read_taps
from orchestrator.audit.facts import Facts, Source
from orchestrator.audit.isolation import prove_devices_minimal
from orchestrator.audit.nic import prove_device_isolated
from orchestrator.audit.uplink import SIZE, SwitchCount, prove_vepa
from orchestrator.errors import SwitchError
from orchestrator.host.edge import Tap, macvtap, nft
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor.guests import EmulatedNic, RunningGuest
from orchestrator.model.edge import EdgeMode
from orchestrator.model.exits import ExitPolicy
from orchestrator.model.plan import NicPlan
from orchestrator.model.proof import WEAKER, Measurement, Verdict
from orchestrator.model.switch import SshAddress, Switch, SwitchDriver, SwitchTie
from orchestrator.model.uplink import EdgeReading, Traffic, VepaReadings
from orchestrator.values import CpuSet, MacAddress, PciAddress
from tests.fakes.root import FakeRoot
from tests.fakes.server import Server, build_server
from tests.harness.audit_data import GUEST1, GUEST2, load_threads

EDGE = EdgeReading("nh-1", "macvtap-vepa", "nh-1 on nic0: macvtap in mode vepa", (), "nic0")
SWITCH = SwitchCount("labexp", 20, 20)
TRAFFIC = Traffic("guest1", "guest2", SIZE, 20, 20, 0, {}, 0, True, True, 40, 40)
READS = f"{WEAKER}the host's kernel forwards and can read every frame, on housekeeping CPUs"
MAC = MacAddress.parse("02:4e:48:00:00:01")
NIC = EmulatedNic("nh-1", str(MAC))


def judge(traffic: Traffic | None = TRAFFIC, switch: SwitchCount | None = SWITCH, edge: EdgeReading = EDGE) -> Measurement:
    return prove_vepa(VepaReadings((edge,), traffic), switch)


def test_software_edge_passes_and_says_what_is_weaker() -> None:
    proof = judge()
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert READS in proof.evidence
    assert "uplinks of software edges: 40 of these frames out, 40 in" in proof.evidence


@pytest.mark.parametrize("ends", [(True, False), (False, True)])
def test_guest_with_a_vf_at_the_other_end_passes(ends: tuple[bool, bool]) -> None:
    assert judge(replace(TRAFFIC, source_edge=ends[0], target_edge=ends[1], uplink_out=20, uplink_in=20)).verdict == Verdict.PASS


@pytest.mark.parametrize(
    "traffic",
    [
        pytest.param(replace(TRAFFIC, uplink_out=0), id="switched in the kernel: a capture shows the frames coming in only"),
        pytest.param(replace(TRAFFIC, uplink_out=0, uplink_in=0), id="another way"),
        pytest.param(replace(TRAFFIC, uplink_out=39), id="one frame switched in the host"),
        pytest.param(replace(TRAFFIC, uplink_out=80, uplink_in=80), id="doubled"),
        pytest.param(replace(TRAFFIC, in_host={"br0": 1}), id="on another interface"),
    ],
)
def test_frame_that_did_not_pass_the_uplink_fails(traffic: Traffic) -> None:
    assert judge(traffic).verdict == Verdict.FAIL


def test_changed_edge_fails_without_any_traffic() -> None:
    proof = judge(None, None, replace(EDGE, findings=("nh-1: mode is bridge, expected vepa",)))
    assert proof.verdict == Verdict.FAIL
    assert proof.evidence[0] == "nh-1: mode is bridge, expected vepa"


@pytest.fixture
def host(tmp_path: Path) -> FakeRoot:
    fake = build_server(tmp_path, Server(cores=4))
    macvtap.create(fake, Tap("nh-1", MAC, "nic0"))
    return fake


def test_edge_of_a_guest_is_read_from_the_kernel(host: FakeRoot) -> None:
    (edge,) = read_taps(host, [replace(GUEST1, nics=(NIC,))])
    assert edge == EdgeReading("nh-1", "macvtap-vepa", f"nh-1 on nic0: macvtap in mode vepa, address {MAC}", (), "nic0")
    assert read_taps(host, [GUEST1, replace(GUEST1, nics=(EmulatedNic("vnet0", str(MAC)),))]) == ()


def test_nft_edge_is_read_from_its_rules(host: FakeRoot) -> None:
    host.fake_net.set_promiscuous("nic1", on=True)
    nft.create(host, Tap("nh-2", MAC, "nic1"))
    guest = replace(GUEST1, nics=(EmulatedNic("nh-2", str(MAC)),))
    (edge,) = read_taps(host, [guest])
    assert edge == EdgeReading("nh-2", "nft-vepa", f"nh-2 on nic1: tun with rules of nftables, address {MAC}", (), "nic1")
    assert judge(edge=edge).verdict == Verdict.PASS
    host.fake_net.set_promiscuous("nic1", on=False)
    (edge,) = read_taps(host, [guest])
    assert edge.findings == ("nic1: promiscuous mode is off, expected on",)
    host.fake_net.delete_table("nohype-nh-2")
    (edge,) = read_taps(host, [guest])
    assert ("missing or were changed" in edge.findings[0], edge.uplink) == (True, "")
    assert judge(edge=edge).verdict == Verdict.FAIL


def test_other_interfaces_on_the_uplink_are_named(host: FakeRoot) -> None:
    for name in ("stray", "nh-2"):
        host.fake_net.create_macvtap(name, "nic0", MacAddress.parse("02:4e:48:00:00:77"))
    host.fake_net.change_tap("stray", mode="bridge")
    host.fake_net.create_macvtap("elsewhere", "nic1", MacAddress.parse("02:4e:48:00:00:78"))
    (edge,) = read_taps(host, [replace(GUEST1, nics=(NIC,))])
    says = "; nic0 also carries interfaces that are not of guests: nh-2 (macvtap vepa), stray (macvtap bridge)"
    assert edge.text.endswith(says)
    assert edge.findings == ()
    guests = replace(GUEST1, nics=(NIC, EmulatedNic("nh-2", "02:4e:48:00:00:77")))
    assert {reading.text.rpartition(": ")[2] for reading in read_taps(host, [guests])} == {"stray (macvtap bridge)"}


@pytest.mark.parametrize("change", ["mode", "rules", "address"])
def test_change_of_an_edge_is_a_finding(host: FakeRoot, change: str) -> None:
    mac = "02:4e:48:00:00:99" if change == "address" else str(MAC)
    if change == "mode":
        host.fake_net.change_tap("nh-1", mode="bridge")
    if change == "rules":
        host.fake_net.delete_table("nohype-nh-1")
    (edge,) = read_taps(host, [replace(GUEST1, nics=(EmulatedNic("nh-1", mac),))])
    assert edge.findings
    assert judge(edge=edge).verdict == Verdict.FAIL


@pytest.mark.parametrize("first", ["nh-1", "nh-2", ""])
def test_frames_are_expected_on_the_uplink_of_the_first_nic(host: FakeRoot, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """The names of taps have another order than the NICs; empty: the first NIC is a VF."""
    macvtap.create(host, Tap("nh-2", MacAddress("02:4e:48:00:00:02"), "nic0"))
    taps = {name: NicPlan(None, "nic0", None, None, MAC, EdgeMode.MACVTAP_VEPA, tap=name) for name in ("nh-1", "nh-2")}
    vf = NicPlan(PciAddress.parse("0000:41:00.0"), "nic0", 0, GUEST1.hostdevs[0], MAC)
    both = (NIC, EmulatedNic("nh-2", "02:4e:48:00:00:02"))
    guests = tuple(replace(guest, nics=both) for guest in (GUEST1, GUEST2))
    order = (taps.pop(first) if first else vf, *taps.values())
    seen: list[Sequence[EdgeReading]] = []

    def measure(*arguments: object, outside: frozenset[str]) -> Traffic:
        assert not outside
        seen.append(arguments[-1])  # type: ignore[arg-type]
        return TRAFFIC

    monkeypatch.setattr("orchestrator.audit.traffic.measure_traffic", measure)
    monkeypatch.setattr("orchestrator.audit.traffic.find_guest_address", lambda _host, guest: IPv4Address(guest.pid))
    source = Source(
        host, Guests(guests), lambda: read_topology(host), lambda *_: "", CpuSet.parse("0"), ExitPolicy(1, 1), window=0,
        nics=lambda: {guest.uuid: order for guest in guests},
    )  # type: ignore[arg-type]  # fmt: skip
    traffic = Facts(source, 20).vepa().traffic
    assert [edge.interface for edge in seen[0]] == [first] * 2 if first else seen == [[]]
    assert traffic == replace(TRAFFIC, source_edge=bool(first), target_edge=bool(first))


def _unregistered(uplink: str) -> SwitchTie:
    raise SwitchError(f"the switch sw1 of uplink {uplink} is not registered")


def _unreachable(_uplink: str) -> SwitchTie:
    address = SshAddress("127.0.0.1", 1, "root", "ssh-ed25519 AAAA")
    return SwitchTie(Switch("sw1", SwitchDriver.LINUX_BRIDGE, "br0", ssh=address), "swp1", None)


@pytest.mark.parametrize(
    ("find", "uplinks", "reason"),
    [
        (lambda _: None, "nic0 nic0", "no switch is configured for uplink nic0: set switch and port in [uplinks.NAME]"),
        (_unregistered, "nic0 nic0", "the switch sw1 of uplink nic0 is not registered"),
        (_unregistered, "nic0 nic1", "the guests have different uplinks (nic0, nic1)"),
        (_unregistered, "", "the manager did not create both guests: their uplink is not known"),
        (_unreachable, "nic0 nic0", "no SSH key is configured for external switches"),
    ],
)
def test_without_a_count_at_the_switch_the_proof_is_not_measured(
    host: FakeRoot, monkeypatch: pytest.MonkeyPatch, find: Callable[[str], SwitchTie | None], uplinks: str, reason: str
) -> None:
    def measure(*_arguments: object, outside: frozenset[str], during: AbstractContextManager[None] | None = None) -> Traffic:
        with during or nullcontext():
            return TRAFFIC

    monkeypatch.setattr("orchestrator.audit.traffic.measure_traffic", measure)
    monkeypatch.setattr("orchestrator.audit.traffic.find_guest_address", lambda _host, guest: IPv4Address(guest.pid))
    guests = (GUEST1, GUEST2)
    nics = {
        guest.uuid: (NicPlan(PciAddress.parse("0000:41:00.0"), uplink, 0, guest.hostdevs[0], MAC),)
        for guest, uplink in zip(guests, uplinks.split(), strict=False)
    }
    source = Source(
        host, Guests(guests), lambda: read_topology(host), lambda *_: "", CpuSet.parse("0"), ExitPolicy(1, 1), window=0,
        nics=lambda: nics, find_tie=find,
    )  # type: ignore[arg-type]  # fmt: skip
    readings = Facts(source, 20).vepa()
    assert (readings.switch, readings.switch_gap) == (None, reason)
    assert prove_vepa(readings, None).verdict != Verdict.PASS


@dataclass(frozen=True)
class Guests:
    """libvirt, as far as these tests use it."""

    guests: tuple[RunningGuest, ...]

    def read_guests(self) -> tuple[tuple[RunningGuest, ...], dict[str, str]]:
        return self.guests, {}

    def read_exits(self, _uuid: UUID) -> tuple[dict[str, int], ...]:
        return ()


def test_missing_tap_is_not_measured(host: FakeRoot) -> None:
    host.fake_net.delete_link("nh-1")
    (edge,) = read_taps(host, [replace(GUEST1, nics=(NIC,))])
    assert (edge.mode, edge.text) == (None, "nh-1 does not exist")
    assert judge(None, None, edge).verdict == Verdict.NOT_MEASURED


def test_nic_of_a_software_edge_is_an_allowed_device() -> None:
    threads = tuple(thread for thread in load_threads() if not thread.name.startswith("kvm-pit"))
    models = ("virtio-net-pci", "virtio-net-device")
    guest = replace(GUEST1, devices=(*GUEST1.devices, *models), nics=(NIC,))
    proof = prove_devices_minimal(guest, threads)
    assert proof.verdict == Verdict.PASS
    assert sum("can read every frame" in line for line in proof.evidence) == 2
    for more in models:
        assert prove_devices_minimal(replace(guest, devices=(*guest.devices, more)), threads).verdict == Verdict.FAIL
    foreign = replace(guest, nics=(EmulatedNic("vnet0", str(MAC)),))
    assert prove_devices_minimal(foreign, threads).verdict == Verdict.FAIL


def test_host_without_iommu_is_named() -> None:
    proof = prove_device_isolated(GUEST1, (), None, None, iommu=False)
    assert proof.verdict == Verdict.NOT_MEASURED
    assert "can access the memory of every guest" in proof.evidence[0]
    assert WEAKER not in prove_device_isolated(GUEST1, (), None, None).evidence[0]
