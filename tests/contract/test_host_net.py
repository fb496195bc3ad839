"""What a PF enforces for its VFs, and how it switches between them: on the fake host, and with a real PF on a real one."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from errno import EINVAL, ENODEV, EOPNOTSUPP, EPERM

import pytest

from orchestrator.errors import HostError
from orchestrator.host.edge import describe_edge, read_edge_mode, set_edge_mode
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import find_vf, set_numvfs
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan
from orchestrator.model.topology import PhysicalFunction, VfState
from orchestrator.resources.nic import ConfigureVf
from orchestrator.resources.nic_settings import read_vf_state
from orchestrator.resources.step import UndoContext
from orchestrator.values import MacAddress
from tests.contract.conftest import await_link, make_two_vfs
from tests.fakes.root import DEVICES, FakeRoot

MAC = MacAddress.parse("02:4e:48:00:00:01")
HOSTS_MAC = MacAddress.parse("02:00:00:00:00:77")


@pytest.fixture
def nic(host: HostRoot, pf: PhysicalFunction) -> str:
    """The interface of a PF with two VFs that have the settings of new ones."""
    make_two_vfs(host, pf)
    assert pf.interface
    return pf.interface


def read_vf(host: HostRoot, nic: str, index: int) -> VfState:
    """What the PF enforces for the VF now."""
    found = read_vf_state(host, nic, index)
    assert found
    return found


def reset_vf(host: HostRoot, nic: str, index: int, mac: MacAddress | None) -> None:
    """Makes the PF enforce for the VF what igb does for a new one, with this address."""
    refused = host.net.enforce_vf(nic, VfState(index, mac))
    assert not refused


def set_vf(host: HostRoot, nic: str, index: int) -> VfState:
    """Changes everything that is enforced for a VF; returns how it should be now."""
    wanted = VfState(index, MAC, vlan=7, qos=2, max_rate=100, spoof_check=False, trust=True)
    if isinstance(host, FakeRoot):
        host.fake_net.set_vf(nic, index, mac=MAC, vlan=7, qos=2, max_rate=100, spoof_check=False, trust=True)
        return wanted
    for words in (f"mac {MAC}", "vlan 7 qos 2", "max_tx_rate 100", "spoofchk off", "trust on"):
        subprocess.run(["ip", "link", "set", nic, "vf", str(index), *words.split()], check=True)
    return wanted


def test_a_new_vf_is_neutral(host: HostRoot, pf: PhysicalFunction, nic: str) -> None:
    set_numvfs(host, pf.address, 0)
    set_numvfs(host, pf.address, 2)
    await_link(host)
    for index in (0, 1):
        assert read_vf(host, nic, index) == VfState(index) == VfState(index).with_defaults()


def test_a_vf_gets_its_address_and_loses_it(host: HostRoot, nic: str) -> None:
    for mac in (MAC, MacAddress.parse("02:4e:48:00:00:99"), None):
        reset_vf(host, nic, 1, mac)
        assert read_vf(host, nic, 1).mac == mac
    assert read_vf(host, nic, 0).mac is None


def test_a_vf_is_brought_back_to_neutral(host: HostRoot, nic: str) -> None:
    wanted = set_vf(host, nic, 1)
    assert read_vf(host, nic, 1) == wanted
    for mac in (MAC, None, None):
        reset_vf(host, nic, 1, mac)
        assert read_vf(host, nic, 1) == VfState(1, mac)


def test_only_the_one_vf_is_brought_back(host: HostRoot, nic: str) -> None:
    reset_vf(host, nic, 0, MAC)
    reset_vf(host, nic, 1, None)
    assert read_vf(host, nic, 0).mac == MAC


def test_what_the_driver_does_not_tell_stays_unknown() -> None:
    assert VfState(3, MAC, vlan=7, spoof_check=None, trust=None).with_defaults() == VfState(3, spoof_check=None, trust=None)


def test_new_vfs_have_nothing_of_the_old_ones(host: HostRoot, pf: PhysicalFunction, nic: str) -> None:
    set_vf(host, nic, 1)
    set_numvfs(host, pf.address, 0)
    assert read_vf_state(host, nic, 1) is None
    set_numvfs(host, pf.address, 2)
    assert read_vf(host, nic, 1) == VfState(1)


def test_a_reset_of_the_function_leaves_what_the_pf_enforces(host: HostRoot, pf: PhysicalFunction, nic: str) -> None:
    wanted = set_vf(host, nic, 1)
    host.write(f"{DEVICES}/{pf.vf_address(1)}/reset", "1")
    assert read_vf(host, nic, 1) == wanted
    with pytest.raises(HostError) as caught:
        host.write(f"{DEVICES}/{pf.vf_address(1)}/reset", "2")
    assert caught.value.errno == EINVAL


def test_no_such_vf(host: HostRoot, nic: str) -> None:
    with pytest.raises(HostError, match=f"VF 2 of {nic}.*\n.*has no VF 2") as caught:
        reset_vf(host, nic, 2, MAC)
    assert caught.value.errno == EINVAL
    assert read_vf_state(host, nic, 2) is None


def test_no_such_interface(host: HostRoot) -> None:
    for call in (
        lambda: reset_vf(host, "nowhere", 0, MAC),
        lambda: host.net.read_hwmode("nowhere"),
        lambda: host.net.set_hwmode("nowhere", "vepa"),
    ):
        with pytest.raises(HostError, match="interface nowhere does not exist") as caught:
            call()
        assert caught.value.errno == ENODEV


def test_what_is_no_pf_has_no_vfs(host: HostRoot) -> None:
    with pytest.raises(HostError, match="lo has no VF 0") as caught:
        reset_vf(host, "lo", 0, MAC)
    assert caught.value.errno == EINVAL


def test_a_driver_without_hwmode_says_so(host: HostRoot, pf: PhysicalFunction) -> None:
    unknown = PhysicalFunction(**vars(pf) | {"device": "ffff:0001", "interface": "lo"})
    assert read_edge_mode(host, unknown) is None
    assert "(lo, igb) hwmode unknown" in describe_edge(host, unknown)
    with pytest.raises(HostError, match=rf"cannot set edge mode vepa on PF {pf.address} \(lo\)") as caught:
        set_edge_mode(host, unknown, EdgeMode.VEPA)
    assert caught.value.errno in (EOPNOTSUPP, EPERM)


def test_a_driver_with_hwmode_is_set_and_read(fake: FakeRoot, pf: PhysicalFunction, nic: str) -> None:
    fake.fake_net.give_hwmode(nic, "veb")
    with_hwmode = PhysicalFunction(**vars(pf) | {"device": "ffff:0001"})
    for mode in (EdgeMode.VEPA, EdgeMode.VEB):
        set_edge_mode(fake, with_hwmode, mode)
        assert read_edge_mode(fake, with_hwmode) is mode
        assert read_edge_mode(FakeRoot(fake.path), with_hwmode) is mode


def plan_vf(host: HostRoot, pf: PhysicalFunction, index: int) -> NicPlan:
    """The VF, if there is one, with an address for a guest."""
    return NicPlan(pf.address, pf.interface or "", index, find_vf(host, pf.address, index) or pf.vf_address(index), MAC)


def test_the_step_gives_an_address_and_takes_it_back(host: HostRoot, pf: PhysicalFunction, nic: str) -> None:
    step = ConfigureVf(plan_vf(host, pf, 0))
    before = step.read_before(host)
    assert before
    step.apply(host)
    assert step.read_before(host) == before, "its own address is none to come back to"
    for _ in range(2):
        ConfigureVf.undo(UndoContext(host), before)
        assert read_vf(host, nic, 0) == VfState(0)


def test_a_guest_gets_nothing_that_was_set_for_its_vf_and_it_is_put_back(host: HostRoot, pf: PhysicalFunction, nic: str) -> None:
    was = replace(set_vf(host, nic, 0), mac=HOSTS_MAC)
    refused = host.net.enforce_vf(nic, was)
    assert not refused
    step = ConfigureVf(plan_vf(host, pf, 0))
    before = step.read_before(host)
    assert before
    step.apply(host)
    assert read_vf(host, nic, 0) == VfState(0, MAC)
    ConfigureVf.undo(UndoContext(host), before)
    assert read_vf(host, nic, 0) == was


def test_a_vf_that_is_gone_as_after_a_reboot_needs_nothing_put_back(host: HostRoot, pf: PhysicalFunction, nic: str) -> None:
    assert ConfigureVf.undo(UndoContext(host), {"pf": str(pf.address), "interface": nic, "index": 2, "mac": ""}) == ""
    assert ConfigureVf.undo(UndoContext(host), {"pf": "0000:ff:1f.7", "interface": nic, "index": 0, "mac": ""}) == ""


def test_an_undo_record_of_an_earlier_version_is_understood(host: HostRoot, nic: str) -> None:
    """It has no PF, and of what was before the address alone."""
    set_vf(host, nic, 0)
    ConfigureVf.undo(UndoContext(host), {"interface": nic, "index": 0, "mac": str(HOSTS_MAC)})
    assert read_vf(host, nic, 0) == VfState(0, HOSTS_MAC)
    assert ConfigureVf.undo(UndoContext(host), {"interface": nic, "index": 2, "mac": ""}) == ""


def test_an_interface_that_is_not_found_is_not_taken_for_clean(host: HostRoot) -> None:
    with pytest.raises(HostError, match="cannot restore VF 0 of nowhere"):
        ConfigureVf.undo(UndoContext(host), {"interface": "nowhere", "index": 0, "mac": ""})


def test_a_vf_that_is_not_there_gets_no_address(host: HostRoot, pf: PhysicalFunction, nic: str) -> None:
    with pytest.raises(HostError, match=f"VF 2 of PF {pf.address} does not exist"):
        ConfigureVf(plan_vf(host, pf, 2)).read_before(host)


def test_a_fake_network_outlives_its_process(fake: FakeRoot, nic: str) -> None:
    wanted = set_vf(fake, nic, 1)
    assert read_vf(FakeRoot(fake.path), nic, 1) == wanted
