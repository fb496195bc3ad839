"""Drivers whose VFs are not igb's: what was read before is put back as far as the driver can, and what it can't is said."""

from __future__ import annotations

from dataclasses import replace
from errno import EADDRNOTAVAIL, EINVAL, EOPNOTSUPP, EPERM

import pytest

from orchestrator.errors import HostError
from orchestrator.host.sriov import set_numvfs
from orchestrator.model.plan import NicPlan
from orchestrator.model.topology import PhysicalFunction, VfState
from orchestrator.resources.nic import ConfigureVf
from orchestrator.resources.step import UndoContext
from orchestrator.values import MacAddress
from tests.fakes.net import Driver
from tests.fakes.root import DEVICES, FakeRoot

NIC = "nic0"
MAC, HOSTS = MacAddress.parse("02:4e:48:00:00:01"), MacAddress.parse("02:00:00:00:00:77")


def refusing(errno: int, *names: str) -> Driver:
    """A driver that does not do these attributes."""
    return lambda name, _value: errno if name in names else {}


def refusing_zeros(errno: int) -> Driver:
    return lambda name, value: errno if name == "mac" and value is None else {}


def making_one_up(name: str, value: object) -> int | dict[str, object]:
    """Takes zeros as a request for an address of its own choice."""
    return {"mac": HOSTS} if name == "mac" and value is None else {}


def make_vfs(fake: FakeRoot, pf: PhysicalFunction, new: VfState) -> ConfigureVf:
    """Two VFs, as the driver makes them; the step that gives the first to a guest."""
    fake.fake_net.new_vf = new
    set_numvfs(fake, pf.address, 0)
    set_numvfs(fake, pf.address, 2)
    return ConfigureVf(NicPlan(pf.address, NIC, 0, pf.vf_address(0), MAC))


@pytest.mark.parametrize(
    "new",
    [
        VfState(0, spoof_check=False),
        VfState(0, HOSTS),
        VfState(0, HOSTS, vlan=77, qos=3, max_rate=100, spoof_check=False, trust=True, link_state="enable"),
        VfState(0, spoof_check=None, trust=None),
        VfState(0, link_state="disable"),
    ],
)
def test_what_was_read_before_is_put_back(fake: FakeRoot, pf: PhysicalFunction, new: VfState) -> None:
    """mlx5 makes VFs without spoof check, others with an address of their own; the host's administrator may have set more."""
    step = make_vfs(fake, pf, new)
    before = step.read_before(fake)
    assert before
    assert step.apply(fake) == ""
    assert fake.fake_net.vfs(NIC)[0] == new.with_defaults(MAC)
    for _ in range(2):
        assert ConfigureVf.undo(UndoContext(fake), before) == ""
        assert fake.fake_net.vfs(NIC)[0] == new


def test_vlan_and_rate_of_a_guest_are_set_and_taken_back(fake: FakeRoot, pf: PhysicalFunction) -> None:
    step = make_vfs(fake, pf, VfState(0, vlan=7, max_rate=10))
    step = replace(step, vf=replace(step.vf, vlan=100, rate=50))
    before = step.read_before(fake)
    assert before
    assert "port VLAN 100, at most 50 Mbit/s" in step.describe()
    assert step.apply(fake) == ""
    assert fake.fake_net.vfs(NIC)[0] == VfState(0, MAC, vlan=100, max_rate=50)
    assert ConfigureVf.undo(UndoContext(fake), before) == ""
    assert fake.fake_net.vfs(NIC)[0] == VfState(0, vlan=7, max_rate=10)


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"vlan": 100}, "vlan", "cannot set port VLAN 100 on VF 0 of nic0"),
        ({"rate": 50}, "max_rate", "cannot limit VF 0 of nic0 to 50 Mbit/s"),
    ],
)
@pytest.mark.parametrize("errno", [EOPNOTSUPP, EINVAL, 0])
def test_a_vlan_or_rate_that_the_driver_cannot_set_is_refused(
    fake: FakeRoot, pf: PhysicalFunction, changes: dict[str, int], name: str, says: str, errno: int
) -> None:
    """EINVAL: a rate above the speed of the link (igb_ndo_set_vf_bw()). 0: the driver says that it has set it, and has not."""
    step = make_vfs(fake, pf, VfState(0))
    step = replace(step, vf=replace(step.vf, **changes))
    fake.fake_net.drivers[NIC] = (
        refusing(errno, name) if errno else lambda asked, _value: {"vlan": 0, "max_rate": 0} if asked == name else {}
    )
    with pytest.raises(HostError, match=says) as caught:
        step.apply(fake)
    assert caught.value.errno == errno
    assert caught.value.hint


@pytest.mark.parametrize("errno", [EINVAL, EOPNOTSUPP, EADDRNOTAVAIL, EPERM, 0])
def test_a_driver_that_takes_no_zeros_gets_a_random_address(fake: FakeRoot, pf: PhysicalFunction, errno: int) -> None:
    step = make_vfs(fake, pf, VfState(0))

    def keeping(name: str, value: object) -> int | dict[str, object]:
        """Says that it has taken zeros, and has not."""
        return {"mac": fake.fake_net.vfs(NIC)[0].mac} if name == "mac" and value is None else {}

    fake.fake_net.drivers[NIC] = refusing_zeros(errno) if errno else keeping
    before = step.read_before(fake)
    assert before
    step.apply(fake)
    said = ConfigureVf.undo(UndoContext(fake), before)
    mac = fake.fake_net.vfs(NIC)[0].mac
    assert mac
    assert f"random address {mac}" in said
    assert int(mac.text[:2], 16) & 3 == 2, "locally administered, unicast"
    assert not mac.text.startswith("02:4e:48"), "no guest's"
    assert f"has the address {mac}" in ConfigureVf.undo(UndoContext(fake), before), "a second time does no harm"
    following = replace(step, vf=replace(step.vf, mac=MacAddress.parse("02:4e:48:00:00:02")))
    again = following.read_before(fake)
    assert again
    following.apply(fake)
    now = fake.fake_net.vfs(NIC)[0].mac
    ConfigureVf.undo(UndoContext(fake), again)
    assert now == following.vf.mac
    assert str(fake.fake_net.vfs(NIC)[0].mac) == again["mac"], "its own address by now"


def test_a_driver_that_makes_up_an_address_keeps_it(fake: FakeRoot, pf: PhysicalFunction) -> None:
    step = make_vfs(fake, pf, VfState(0))
    fake.fake_net.drivers[NIC] = making_one_up
    before = step.read_before(fake)
    assert before
    step.apply(fake)
    assert f"has the address {HOSTS}: its driver refused zeros" in ConfigureVf.undo(UndoContext(fake), before)
    assert fake.fake_net.vfs(NIC)[0].mac == HOSTS


def test_a_vf_that_keeps_a_guests_address_is_not_clean(fake: FakeRoot, pf: PhysicalFunction) -> None:
    step = make_vfs(fake, pf, VfState(0))
    before = step.read_before(fake)
    assert before
    step.apply(fake)
    fake.fake_net.drivers[NIC] = refusing(EINVAL, "mac")
    with pytest.raises(HostError, match="mac") as caught:
        ConfigureVf.undo(UndoContext(fake), before)
    assert caught.value.errno == EINVAL
    fake.fake_net.drivers.clear()
    assert ConfigureVf.undo(UndoContext(fake), before) == "", "once it can, it is cleaned"


@pytest.mark.parametrize(
    ("name", "value"), [("vlan", 77), ("max_rate", 100), ("trust", True), ("spoof_check", False), ("link_state", "enable")]
)
def test_a_refusal_to_put_one_attribute_back_is_said_and_keeps_no_address(
    fake: FakeRoot, pf: PhysicalFunction, name: str, value: object
) -> None:
    step = make_vfs(fake, pf, replace(VfState(0), **{name: value}))
    before = step.read_before(fake)
    assert before
    step.apply(fake)
    fake.fake_net.drivers[NIC] = refusing(EOPNOTSUPP, name)
    assert name in ConfigureVf.undo(UndoContext(fake), before)
    assert fake.fake_net.vfs(NIC)[0] == VfState(0), "nothing of the guest is left"


@pytest.mark.parametrize(
    ("new", "errno", "name"),
    [
        (VfState(0, spoof_check=False), EOPNOTSUPP, "spoof_check"),
        (VfState(0, max_rate=100), EINVAL, "max_rate"),
        (VfState(0, link_state="enable"), EOPNOTSUPP, "link_state"),
    ],
)
def test_what_a_guest_can_do_without_is_said_when_it_starts(
    fake: FakeRoot, pf: PhysicalFunction, new: VfState, errno: int, name: str
) -> None:
    step = make_vfs(fake, pf, new)
    fake.fake_net.drivers[NIC] = refusing(errno, name)
    assert step.read_before(fake)
    assert name in str(step.apply(fake))
    assert fake.fake_net.vfs(NIC)[0] == replace(new, mac=MAC)


@pytest.mark.parametrize(
    ("new", "errno", "name"),
    [
        (VfState(0), EINVAL, "mac"),
        (VfState(0, vlan=77), EOPNOTSUPP, "vlan"),
        (VfState(0, trust=True), EOPNOTSUPP, "trust"),
        (VfState(0, spoof_check=False), EINVAL, "spoof_check"),
    ],
)
def test_what_a_guest_cannot_do_without_ends_its_start(
    fake: FakeRoot, pf: PhysicalFunction, new: VfState, errno: int, name: str
) -> None:
    step = make_vfs(fake, pf, new)
    fake.fake_net.drivers[NIC] = refusing(errno, name)
    before = step.read_before(fake)
    assert before
    with pytest.raises(HostError, match=name):
        step.apply(fake)
    fake.fake_net.drivers.clear()
    ConfigureVf.undo(UndoContext(fake), before)
    assert fake.fake_net.vfs(NIC)[0] == new


def test_a_driver_that_tells_nothing_of_its_vfs_serves_no_guest(fake: FakeRoot, pf: PhysicalFunction) -> None:
    step = make_vfs(fake, pf, VfState(0))
    fake.fake_net.make_vfs(NIC, 0)
    with pytest.raises(HostError, match="cannot read the settings of VF . from nic0"):
        step.read_before(fake)


def test_a_renamed_interface_is_found_by_its_pf(fake: FakeRoot, pf: PhysicalFunction) -> None:
    """Between plan and start, and between start and undo; the undo record names the old one."""
    step = make_vfs(fake, pf, VfState(0))
    rename(fake, pf, NIC, "nic0np0")
    before = step.read_before(fake)
    assert before
    step.apply(fake)
    assert fake.fake_net.vfs("nic0np0")[0].mac == MAC
    rename(fake, pf, "nic0np0", "ens7f0")
    ConfigureVf.undo(UndoContext(fake), before)
    assert fake.fake_net.vfs("ens7f0")[0] == VfState(0)


def test_a_pf_in_another_network_namespace_is_not_taken_for_clean(fake: FakeRoot, pf: PhysicalFunction) -> None:
    step = make_vfs(fake, pf, VfState(0))
    before = step.read_before(fake)
    assert before
    step.apply(fake)
    folder = fake.path / DEVICES / str(pf.address) / "net" / NIC
    folder.rename(fake.path / "elsewhere")
    for work in (lambda: ConfigureVf.undo(UndoContext(fake), before), lambda: step.read_before(fake), lambda: step.apply(fake)):
        with pytest.raises(HostError, match="another network namespace"):
            work()
    (fake.path / "elsewhere").rename(folder)
    ConfigureVf.undo(UndoContext(fake), before)
    assert fake.fake_net.vfs(NIC)[0] == VfState(0)


def rename(fake: FakeRoot, pf: PhysicalFunction, old: str, new: str) -> None:
    """What udev does, or `ip link set OLD name NEW`."""
    for folder in (fake.path / DEVICES / str(pf.address) / "net", fake.path / ".state" / "net"):
        (folder / old).rename(folder / new)
