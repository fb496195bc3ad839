"""Guests whose frames the host's kernel forwards, where the uplink has no VFs."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace

import pytest

from orchestrator.api.routes.guests import show_guest
from orchestrator.errors import Forbidden, HostError, NoRoom, NotFound
from orchestrator.guests.service import GuestService
from orchestrator.host.root import Chain
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR, Role
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan
from orchestrator.model.uplink import HairpinResult
from orchestrator.model.waiver import Waiver
from orchestrator.values import CpuSet
from tests.fakes.root import DEVICES
from tests.harness.crash import World
from tests.harness.guests import ask, create, kinds, open_manager

ACCEPT = {"accept": ["software-edge"]}


def make_plain(world: World, *addresses: str) -> None:
    """Turns PFs into NICs without SR-IOV."""
    for address in addresses:
        (world.host.path / DEVICES / address / "sriov_totalvfs").unlink()


@pytest.fixture
def world(world: World) -> World:
    """Neither of the two NICs has VFs."""
    make_plain(world, "0000:10:00.0", "0000:14:00.0")
    return world


def left_over(world: World) -> list[str]:
    """Taps and tables of nftables."""
    return world.host.fake_net.list_made()


def details(manager: GuestService, kind: str) -> list[str]:
    return [event.detail for event in manager.events(OPERATOR) if event.kind == kind]


def test_software_edge_is_refused_unless_it_is_accepted_by_name(world: World, manager: GuestService) -> None:
    with pytest.raises(NoRoom) as caught:
        create(manager)
    (first, *_) = caught.value.reasons
    assert first.startswith("uplink nic0: there is no SR-IOV capable network interface of this name")
    assert "edge mode macvtap-vepa is possible" in first
    assert "can read every frame" in first
    assert "add --accept software-edge" in first
    assert left_over(world) == []


@pytest.mark.parametrize("by_host", [True, False])
def test_guest_on_a_software_edge_runs_and_leaves_nothing(world: World, by_host: bool) -> None:
    manager = open_manager(world, replace(world.server.policy, accept=(Waiver.SOFTWARE_EDGE,) if by_host else ()))
    request = {} if by_host else ACCEPT
    plan, warnings = ask(manager, **request)
    assert "there is no SR-IOV capable network interface" in warnings[0]
    assert "can read every frame" in warnings[0]
    plan = create(manager, **request)
    (nic,) = plan.nics
    assert nic == NicPlan(None, "nic0", None, None, nic.mac, EdgeMode.MACVTAP_VEPA, tap=f"nh-{str(nic.mac).replace(':', '')}")
    view = show_guest(manager.guest(OPERATOR, "web"), CpuSet())
    assert (view["waived"], view["vf"], view["nics"][0]["tap"]) == (["software-edge"], None, nic.tap)
    assert f"{nic.tap} (macvtap-vepa); weaker: software-edge" in details(manager, "claimed")[0]
    assert [one.interface for one in world.hypervisor.read_guest("web").nics] == [nic.tap]
    (tap,) = [link for link in world.host.net.read_links() if link.kind == "macvtap"]
    assert (tap.name, tap.parent, tap.mode, tap.mac, tap.up, tap.all_multicast) == (nic.tap, "nic0", "vepa", nic.mac, True, True)
    manager.delete(OPERATOR, "web")
    assert left_over(world) == []
    assert world.host.violations() == []


def test_accepting_a_software_edge_does_not_take_vfs_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = World(tmp_path_factory.mktemp("both") / "world")
    make_plain(world, "0000:14:00.0")
    manager = open_manager(world)
    plan = create(manager, **ACCEPT)
    assert (plan.vf.interface, plan.vf.edge, plan.waived) == ("nic0", EdgeMode.VEPA, ())
    other = create(manager, name="other", nics=[{}, {"uplink": "nic1"}], **ACCEPT)
    assert [nic.edge for nic in other.nics] == [EdgeMode.VEPA, EdgeMode.MACVTAP_VEPA]
    manager.delete(OPERATOR, "web")
    manager.delete(OPERATOR, "other")
    assert left_over(world) == []
    assert world.host.violations() == []


def test_host_without_iommu_needs_another_waiver(world: World, manager: GuestService) -> None:
    shutil.rmtree(world.host.path / "sys/kernel/iommu_groups")
    with pytest.raises(NoRoom, match="--accept no-iommu") as caught:
        create(manager, **ACCEPT)
    assert "memory of every guest" in caught.value.reasons[0]
    assert "--accept software-edge" not in caught.value.reasons[0]
    plan = create(manager, accept=["software-edge", "no-iommu"])
    assert plan.waived == (Waiver.SOFTWARE_EDGE, Waiver.NO_IOMMU)
    manager.delete(OPERATOR, "web")
    assert left_over(world) == []


def test_no_guest_starts_without_hairpin(world: World, manager: GuestService) -> None:
    world.host.fake_net.hairpin = False
    with pytest.raises(HostError, match="0 of 5 probe frames") as caught:
        create(manager, **ACCEPT)
    assert "enable hairpin" in caught.value.hint
    assert (manager.guests(OPERATOR), left_over(world)) == ((), [])
    world.host.fake_net.hairpin = True
    create(manager, **ACCEPT)


def test_silent_switch_holds_up_no_other_uplink(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Surveys and the preparation of other uplinks need the lock."""
    was_free = []

    def try_lock() -> None:
        with manager.host_setup.lock.try_acquire() as is_free:
            was_free.append(is_free)

    def probe(uplink: str) -> HairpinResult:
        other = threading.Thread(target=try_lock)
        other.start()
        other.join()
        return HairpinResult(uplink, 1, 1)

    monkeypatch.setattr(world.host.fake_net, "probe_hairpin", probe)
    create(manager, **ACCEPT)
    assert was_free == [True]


def test_hairpin_is_probed_before_the_first_guest_of_an_uplink(world: World, manager: GuestService) -> None:
    create(manager, **ACCEPT)
    create(manager, name="two", **ACCEPT)
    assert world.host.fake_net.probes == ["nic0"]
    create(manager, name="three", nics=[{"uplink": "nic1"}], **ACCEPT)
    assert world.host.fake_net.probes == ["nic0", "nic1"]
    for name in ("web", "two", "three"):
        manager.delete(OPERATOR, name)
    create(manager, **ACCEPT)
    assert world.host.fake_net.probes == ["nic0", "nic1", "nic0"]


def test_stopped_guest_has_no_tap_and_gets_the_same_one_again(world: World, manager: GuestService) -> None:
    plan = create(manager, **ACCEPT)
    manager.stop(OPERATOR, "web", 5)
    assert left_over(world) == []
    manager.start(OPERATOR, "web")
    assert [one.interface for one in world.hypervisor.read_guest("web").nics] == [plan.vf.tap]
    assert world.host.violations() == []


def test_restarted_manager_adopts_and_cleans_up(world: World, manager: GuestService) -> None:
    create(manager, **ACCEPT)
    manager.close()
    again = open_manager(world)
    world.hypervisor.watch_ends(again.reconciler.on_guest_ended)
    again.reconciler.detect_drift()
    assert "drifted" not in kinds(again)
    again.delete(OPERATOR, "web")
    assert left_over(world) == []


def spoil_mode(world: World, tap: str) -> None:
    world.host.fake_net.change_tap(tap, mode="bridge")


def spoil_rules(world: World, tap: str) -> None:
    world.host.fake_net.delete_table(f"nohype-{tap}")


def change_rules(world: World, tap: str) -> None:
    world.host.fake_net.replace_table(f"nohype-{tap}", Chain("egress", "egress", tap, []))


def set_down(world: World, tap: str) -> None:
    world.host.fake_net.change_tap(tap, up=False)


@pytest.mark.parametrize("by", ["round", "link change", "rules"])
@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (spoil_mode, "mode is bridge, expected vepa"),
        (spoil_rules, "missing or were changed"),
        (change_rules, "missing or were"),
        (set_down, "state is down, expected up"),
    ],
)
def test_changed_edge_is_reported_and_restored(world: World, manager: GuestService, spoil: object, finding: str, by: str) -> None:
    assert not manager.reconciler.has_taps
    tap = create(manager, **ACCEPT).vf.tap
    assert manager.reconciler.has_taps
    assert manager.reconciler.has_guest_on(tap)
    assert manager.reconciler.has_guest_on("nic0")
    assert not manager.reconciler.has_guest_on("nic1")
    checks = {"round": manager.reconciler.detect_drift, "rules": manager.reconciler.check_taps}
    check = checks.get(by, manager.reconciler.on_link_change)
    check()
    assert "drifted" not in kinds(manager)
    spoil(world, tap)  # type: ignore[operator]
    check()
    (detail,) = details(manager, "drifted")
    assert finding in detail
    assert "(restored)" in detail
    check()
    manager.reconciler.detect_drift()
    assert world.host.fake_net.read_links()[-1].mode == "vepa"
    assert [detail for detail in details(manager, "drifted") if "expected" in detail or "missing" in detail] == [detail]


def test_change_while_the_guest_is_busy_is_restored_afterwards(world: World, manager: GuestService) -> None:
    """The kernel announces it once."""
    tap, held, done = create(manager, **ACCEPT).vf.tap, threading.Event(), threading.Event()

    def hold() -> None:
        with manager.transitions.guest_locks("web"):
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    spoil_mode(world, tap)
    manager.reconciler.check_taps()
    assert manager.reconciler.taps_due
    done.set()
    other.join()
    manager.reconciler.check_taps()
    assert not manager.reconciler.taps_due
    assert "(restored)" in details(manager, "drifted")[-1]


@pytest.mark.parametrize("moment", ["set_reception", "restore_macvtap", "replace_table"])
def test_change_during_a_restoration_is_restored_and_reported(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """As a firewall that is restarted meanwhile: before the restoration reads the tap, before the rules are set, after it."""
    tap, net = create(manager, **ACCEPT).vf.tap, world.host.fake_net
    owner = manager.host_setup if moment == "set_reception" else net
    function, calls = getattr(owner, moment), []

    def change(*words: object, **more: object) -> None:
        function(*words, **more)
        calls.append(moment)
        if len(calls) == 1:
            spoil_rules(world, tap)

    monkeypatch.setattr(owner, moment, change)
    spoil_mode(world, tap)
    manager.reconciler.on_link_change()
    manager.reconciler.check_taps()
    assert calls
    assert world.host.fake_net.read_table(f"nohype-{tap}")
    text = "; ".join(details(manager, "drifted"))
    assert "mode is bridge, expected vepa (restored)" in text
    assert "missing or were changed (restored)" in text or moment == "restore_macvtap"


@pytest.mark.parametrize("by", [{"mac": "02:4e:48:00:00:99"}, {"parent": "nic1"}, {"kind": "dummy"}])
def test_change_that_cannot_be_restored_is_tried_once_per_round(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch, by: dict[str, str]
) -> None:
    """Each attempt is itself a link change, which the kernel reports."""
    tap, net, tried = create(manager, **ACCEPT).vf.tap, world.host.fake_net, []
    load = net.replace_table
    monkeypatch.setattr(net, "replace_table", lambda *words, **more: (tried.append(words), load(*words, **more)))
    net.change_tap(tap, **by)
    for _ in range(3):
        manager.reconciler.on_link_change()
    assert len(details(manager, "drifted")) == 1
    assert len(tried) == (0 if "kind" in by else 1), "an interface of another kind is not changed"
    if "kind" not in by:
        spoil_mode(world, tap)
        manager.reconciler.on_link_change()
        assert "mode is bridge, expected vepa (restored)" in details(manager, "drifted")[-1]


def test_taps_that_cannot_be_read_hide_no_other_drift(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager, **ACCEPT)

    def fail(table: str) -> None:
        raise HostError(f"cannot read table {table} of nftables: `nft` is not installed")

    monkeypatch.setattr(world.host.fake_net, "read_table", fail)
    monkeypatch.setattr("orchestrator.guests.drift.find_offline", lambda *_: "2")
    manager.reconciler.detect_drift()
    (detail,) = details(manager, "drifted")
    assert "CPUs 2 are offline" in detail
    assert "`nft` is not installed" in detail


def test_interrupted_start_is_completed_on_restored_rules(world: World, manager: GuestService, ledger: Ledger) -> None:
    """Another program removed them while no manager ran: the guest would stay in the state `starting`."""
    tap = create(manager, **ACCEPT).vf.tap
    (claim,) = ledger.read().claims
    spoil_rules(world, tap)
    manager.transitions.core_manager(claim).confine_and_resume()
    manager.reconciler.detect_drift()
    assert "drifted" not in kinds(manager)
    world.host.fake_net.change_tap(tap, parent="nic1")
    with pytest.raises(HostError, match="uplink is nic1, expected nic0"):
        manager.transitions.core_manager(claim).confine_and_resume()


def test_tap_that_is_gone_is_reported(world: World, manager: GuestService) -> None:
    tap = create(manager, **ACCEPT).vf.tap
    world.host.fake_net.release_tap(tap)
    world.host.fake_net.delete_link(tap)
    manager.reconciler.detect_drift()
    (detail,) = details(manager, "drifted")
    assert f"{tap} does not exist" in detail
    manager.delete(OPERATOR, "web")
    assert left_over(world) == []


def test_interface_of_another_program_is_left_alone(world: World, manager: GuestService) -> None:
    plan, _ = ask(manager, name="web", **ACCEPT)
    (nic,) = plan.nics
    world.host.fake_net.create_macvtap(nic.tap, "nic1", nic.mac)
    with pytest.raises(HostError, match=f"{nic.tap}: an interface of this name exists"):
        create(manager, **ACCEPT)
    assert [link.parent for link in world.host.net.read_links() if link.kind == "macvtap"] == ["nic1"]


def test_failed_rules_leave_nothing(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise HostError("cannot load table: `nft` is not installed", "install nftables")

    monkeypatch.setattr(world.host.fake_net, "replace_table", refuse)
    with pytest.raises(HostError, match="`nft` is not installed"):
        create(manager, **ACCEPT)
    assert (manager.guests(OPERATOR), left_over(world)) == ((), [])


def test_uplink_without_carrier_is_refused(world: World, manager: GuestService) -> None:
    for number, address in enumerate(("0000:10:00.0", "0000:14:00.0")):
        world.host.add(f"{DEVICES}/{address}/net/nic{number}/operstate", "down")
    with pytest.raises(NoRoom, match="nic0 is down or has no carrier"):
        create(manager, **ACCEPT)


def test_configured_mode_is_used_or_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = World(tmp_path_factory.mktemp("set") / "world")
    software = (("nic0", EdgeMode.MACVTAP_VEPA), ("nic1", EdgeMode.VEPA))
    manager = open_manager(world, replace(world.server.policy, edges=software))
    with pytest.raises(NoRoom, match="configured for nic0.*--accept software-edge"):
        create(manager, nics=[{"uplink": "nic0"}])
    assert create(manager, nics=[{"uplink": "nic0"}], **ACCEPT).vf.edge is EdgeMode.MACVTAP_VEPA
    assert create(manager, name="vf", nics=[{"uplink": "nic1"}], **ACCEPT).vf.edge is EdgeMode.VEPA
    with pytest.raises(NoRoom, match="edge mode macvtap-vepa has no VFs, but VF 0000:10:10.0 is requested"):
        create(manager, name="no", nics=[{"uplink": "nic0", "vf": "0000:10:10.0"}], **ACCEPT)


def test_uplinks_are_shown_with_their_modes(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = World(tmp_path_factory.mktemp("shown") / "world")
    make_plain(world, "0000:14:00.0")
    manager = open_manager(world)
    create(manager, **ACCEPT)
    create(manager, name="soft", nics=[{"uplink": "nic1"}], **ACCEPT)
    hard, soft = manager.uplinks(OPERATOR)
    assert (hard.name, hard.edge, hard.why, hard.guests, hard.configured) == ("nic0", "vepa", "", ("web",), "auto")
    assert "loopback bit 31 clear: vepa" in hard.now
    assert (soft.name, soft.edge, soft.guests, soft.now) == ("nic1", "macvtap-vepa", ("soft",), "")
    assert "there is no SR-IOV capable network interface" in soft.why
    assert [(mode.mode, bool(mode.refused)) for mode in soft.modes] == [
        ("vepa", True),
        ("channel", True),
        ("macvtap-vepa", False),
        ("nft-vepa", False),
    ]
    assert replace(manager.uplink(OPERATOR, "nic1"), counters=()) == soft
    with pytest.raises(NotFound, match="eth9 is not an uplink"):
        manager.uplink(OPERATOR, "eth9")


@pytest.mark.parametrize("hairpin", [True, False])
def test_uplink_is_proved_on_request(world: World, manager: GuestService, hairpin: bool) -> None:
    world.host.fake_net.hairpin = hairpin
    assert bool(manager.prove_uplink(OPERATOR, "nic1").returned) == hairpin
    with pytest.raises(NotFound):
        manager.prove_uplink(OPERATOR, "lo")
    viewer = replace(OPERATOR, role=Role.VIEWER)
    with pytest.raises(Forbidden):
        manager.prove_uplink(viewer, "nic1")
    assert manager.uplinks(viewer)


class Killed(BaseException):
    """The manager is killed."""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("change", ["macvtap nh-", "table nohype-nh-", "tap nh-", "hypervisor start"])
def test_killed_manager_cleans_up_after_its_start(world: World, manager: GuestService, moment: str, change: str) -> None:
    again = kill_and_restart(world, manager, moment, change)
    assert (again.guests(OPERATOR), left_over(world)) == ((), [])
    assert world.host.violations() == []


def kill_and_restart(world: World, manager: GuestService, moment: str, change: str) -> GuestService:
    """Kills the manager at this change while it creates a guest."""
    dead: list[str] = []

    def kill(now: str, what: str) -> None:
        if dead or (now == moment and what.startswith(change)):
            dead.append(what)  # a killed manager changes nothing more
            raise Killed

    before = world.host.watch
    object.__setattr__(world.host, "watch", kill)
    with pytest.raises(Killed):
        create(manager, **ACCEPT)
    object.__setattr__(world.host, "watch", before)
    manager.close()
    return open_manager(world, manager.host_setup.policy)
