"""External switches through the manager: real bridges in network namespaces, a real ledger, real SSH, the real API."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import Conflict, Forbidden, HostError, NotFound, OrchestratorError, RequestError, SwitchError
from orchestrator.guests.switches import SwitchService
from orchestrator.host.root import HostRoot
from orchestrator.images.cache import cache_folder
from orchestrator.lab.build import build_switch_tools
from orchestrator.lab.keys import make_key
from orchestrator.ledger import Event, Ledger
from orchestrator.model.access import OPERATOR, Identity, Role
from orchestrator.model.edge import EdgeMode
from orchestrator.model.network import Network
from orchestrator.model.proof import Verdict
from orchestrator.model.state import GuestState
from orchestrator.model.switch import (
    PortChannel,
    SshAddress,
    Switch,
    SwitchDriver,
    SwitchSettings,
    SwitchState,
    SwitchTie,
    UplinkPort,
)
from orchestrator.model.switch_request import HairpinRequest, SwitchRequest, SwitchUplinkRequest
from orchestrator.resources.step import UndoContext, run_steps, undo_steps
from orchestrator.resources.switch import plan_translations
from orchestrator.switches import commands
from orchestrator.switches.commands import SshCommands
from orchestrator.switches.drivers import opened
from orchestrator.switches.linux_bridge import LinuxBridge
from tests.harness import openvswitch
from tests.harness.api_server import Served, serve
from tests.harness.bridge import BRIDGE, Cable, SshSwitch, find_programs, plugged, ssh_switch
from tests.unit.test_ledger import make_plan
from tests.unit.test_plan import request as guest_request

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]

PREFIX = f"nhw{os.getpid()}"


@pytest.fixture
def cable() -> Iterator[Cable]:
    with plugged(PREFIX) as cable:
        cable.await_forwarding()
        yield cable


@pytest.fixture
def ssh(tmp_path: Path, cable: Cable) -> Iterator[SshSwitch]:
    with ssh_switch(tmp_path, find_programs(cable)) as switch:
        yield switch


class Manager:
    """A service on the real root, whose uplink is the near end of the cable."""

    def __init__(self, folder: Path, cable: Cable, key: Path | None = None, ties: tuple[UplinkPort, ...] = ()) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite")
        settings = SwitchSettings(str(key or ""), (UplinkPort(cable.near, "sw1", cable.far), *ties))
        self.events: list[Event] = []
        self.ledger.subscribe(self.events.append)
        self.service = SwitchService(HostRoot(), self.ledger, settings)

    @property
    def details(self) -> list[str]:
        return [event.detail for event in self.events if event.kind == "switch-changed"]

    def await_event(self, text: str) -> str:
        until(lambda: any(text in detail for detail in self.details), lambda: self.details)
        return next(detail for detail in self.details if text in detail)


@pytest.fixture
def manager(tmp_path: Path, cable: Cable) -> Iterator[Manager]:
    manager = Manager(tmp_path, cable)
    yield manager
    manager.service.close()
    manager.ledger.close()


def until(true: Callable[[], object], shown: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, shown()
        time.sleep(0.02)


def local(name: str = "sw1", netns: str = PREFIX) -> SwitchRequest:
    return SwitchRequest(name=name, driver=SwitchDriver.LINUX_BRIDGE, bridge=BRIDGE, netns=netns)


def set_hairpin(manager: Manager, port: str, *, on: bool) -> SwitchState:
    return manager.service.set_hairpin(OPERATOR, "sw1", HairpinRequest(port=port, on=on))


def verdicts(manager: Manager) -> dict[str, Verdict]:
    return {check.name: check.verdict for check in manager.service.verify(OPERATOR, "sw1")}


# Registration.


def test_switch_is_registered_shown_and_deleted(manager: Manager, cable: Cable) -> None:
    view = manager.service.add(OPERATOR, local())
    assert view.switch == Switch("sw1", SwitchDriver.LINUX_BRIDGE, BRIDGE, cable.netns)
    assert view.uplinks == (UplinkPort(cable.near, "sw1", cable.far),)
    assert manager.service.list(OPERATOR) == (view,)
    details = manager.service.show(OPERATOR, "sw1")
    assert [port.name for port in details.state.ports] == [cable.far]
    assert [announced.uplink for announced in details.announced] == [cable.near]
    with pytest.raises(Conflict, match="a switch named sw1"):
        manager.service.add(OPERATOR, local())
    manager.service.delete(OPERATOR, "sw1")
    assert manager.service.list(OPERATOR) == ()
    with pytest.raises(NotFound, match="no switch named sw1"):
        manager.service.show(OPERATOR, "sw1")


def test_switch_that_cannot_be_read_is_not_registered(manager: Manager) -> None:
    for request in (local(netns=f"{PREFIX}x"), local().model_copy(update={"bridge": "br9"})):
        with pytest.raises(SwitchError, match="cannot read bridge"):
            manager.service.add(OPERATOR, request)
    assert manager.service.list(OPERATOR) == ()
    assert manager.details == []


def test_registration_outlives_the_manager(manager: Manager, tmp_path: Path, cable: Cable) -> None:
    manager.service.add(OPERATOR, local())
    manager.ledger.close()
    second = Manager(tmp_path, cable)
    assert [view.switch.name for view in second.service.list(OPERATOR)] == ["sw1"]
    second.ledger.close()


@pytest.mark.parametrize("role", [Role.TENANT, Role.VIEWER])
def test_others_than_operators_are_refused(manager: Manager, cable: Cable, role: Role) -> None:
    manager.service.add(OPERATOR, local())
    caller, service = Identity("eve", role, "acme"), manager.service
    for call in (
        lambda: service.list(caller),
        lambda: service.add(caller, local("sw2")),
        lambda: service.show(caller, "sw1"),
        lambda: service.verify(caller, "sw1"),
        lambda: service.set_hairpin(caller, "sw1", HairpinRequest(port=cable.far, on=True)),
        lambda: service.delete(caller, "sw1"),
    ):
        with pytest.raises(Forbidden, match="eve is not an operator"):
            call()
    assert not cable.port.hairpin


@pytest.mark.parametrize(
    "fields",
    [
        {"bridge": "-j"}, {"bridge": "br 0"}, {"bridge": "br0;reboot"}, {"bridge": "b" * 16}, {"bridge": ""},
        {"netns": "../x"}, {"netns": "a/b"}, {"netns": "-n"},
        {"netns": "x", "ssh": {"host": "a", "host_key": make_key().public}}, {"driver": "vendor"},
        {"ssh": {"host": "-oProxyCommand=x", "host_key": make_key().public}},
        {"ssh": {"host": "a b", "host_key": make_key().public}},
        {"ssh": {"host": "a", "host_key": "ssh-rsa AAAA"}}, {"ssh": {"host": "a", "host_key": "ssh-ed25519 AAAA"}},
        {"ssh": {"host": "a"}}, {"ssh": {"host": "a", "host_key": make_key().public, "user": "a;b"}},
        {"ssh": {"host": "a", "host_key": make_key().public, "port": 0}},
        {"ssh": {"host": "a", "host_key": make_key().public, "key": "/etc/shadow"}},
        {"driver": "openvswitch", "netns": "x"},
    ],
)  # fmt: skip
def test_invalid_request_is_refused(fields: dict[str, object]) -> None:
    request = {"name": "sw1", "driver": "linux-bridge", "bridge": "br0", **fields}
    with pytest.raises(ValueError, match="validation error"):
        SwitchRequest.model_validate(request)


# Checks and changes.


def test_port_is_verified_and_each_broken_property_is_found(manager: Manager, cable: Cable) -> None:
    manager.service.add(OPERATOR, local())
    assert verdicts(manager)["hairpin"] is Verdict.FAIL
    set_hairpin(manager, cable.far, on=True)
    assert set(verdicts(manager).values()) == {Verdict.PASS}
    for broken, undo, name in (
        (lambda: cable.change_port(mode=0), lambda: cable.change_port(mode=1), "hairpin"),
        (lambda: cable.change_port(isolated=1), lambda: cable.change_port(isolated=0), "isolated"),
        (lambda: cable.set_link(mtu=1400), lambda: cable.set_link(mtu=1500), "mtu"),
        (lambda: cable.set_link(state="down"), lambda: cable.set_link(state="up"), "forwarding"),
    ):
        broken()
        failed = [check for check in manager.service.verify(OPERATOR, "sw1") if check.verdict is not Verdict.PASS]
        assert [(check.name, check.verdict) for check in failed] == [(name, Verdict.FAIL)]
        assert failed[0].hint
        undo()
        cable.await_forwarding()
    assert set(verdicts(manager).values()) == {Verdict.PASS}


def test_ports_without_uplink_must_be_named(manager: Manager, cable: Cable) -> None:
    manager.service.add(OPERATOR, local("sw2"))
    with pytest.raises(RequestError, match="no uplink is tied to a port of switch sw2"):
        manager.service.verify(OPERATOR, "sw2")
    checks = manager.service.verify(OPERATOR, "sw2", cable.far)
    assert {check.name: check.verdict for check in checks}["mtu"] is Verdict.NOT_MEASURED
    with pytest.raises(SwitchError, match="has no port nowhere"):
        manager.service.verify(OPERATOR, "sw2", "nowhere")


def test_missing_port_of_an_uplink_does_not_hide_the_others(tmp_path: Path, cable: Cable) -> None:
    cable.change_port(mode=1)
    manager = Manager(tmp_path, cable, ties=(UplinkPort("nic9", "sw1", "gone"),))
    manager.service.add(OPERATOR, local())
    checks = manager.service.verify(OPERATOR, "sw1")
    failed = [(check.port, check.name) for check in checks if check.verdict is Verdict.FAIL]
    assert failed == [("gone", "port")]
    assert cable.far in checks[-1].hint
    manager.service.start_watching()
    manager.await_event("switch sw1: port gone: the bridge has no port")
    cable.change_port(mode=0)
    manager.await_event(f"switch sw1: port {cable.far}: hairpin off: frames between guests do not return; port gone: ")
    manager.service.close()
    manager.ledger.close()


def test_hairpin_is_reverted_by_delete(manager: Manager, cable: Cable) -> None:
    manager.service.add(OPERATOR, local())
    state = set_hairpin(manager, cable.far, on=True)
    assert state.ports[0].hairpin
    assert cable.port.hairpin
    assert [record.action for record in manager.ledger.undo_records("switch:sw1")] == ["switch-hairpin"]
    set_hairpin(manager, cable.far, on=True)
    assert len(manager.ledger.undo_records("switch:sw1")) == 1, "nothing was changed"
    assert [event.who for event in manager.events] == ["operator", "operator"]
    manager.service.delete(OPERATOR, "sw1")
    assert not cable.port.hairpin
    assert manager.ledger.undo_records("switch:sw1") == ()


def test_hairpin_of_another_owner_stays(manager: Manager, cable: Cable) -> None:
    cable.change_port(mode=1)
    manager.service.add(OPERATOR, local())
    set_hairpin(manager, cable.far, on=True)
    manager.service.delete(OPERATOR, "sw1")
    assert cable.port.hairpin


def test_change_that_is_interrupted_can_be_reverted(
    manager: Manager, cable: Cable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undo record is on disk before the change: the manager ends right after it."""
    manager.service.add(OPERATOR, local())
    change = LinuxBridge.set_hairpin

    def end_after(bridge: LinuxBridge, port: str, *, on: bool, macs: tuple[str, ...] = ()) -> None:
        change(bridge, port, on=on, macs=macs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LinuxBridge, "set_hairpin", end_after)
        with pytest.raises(KeyboardInterrupt):
            set_hairpin(manager, cable.far, on=True)
    assert cable.port.hairpin
    manager.ledger.close()
    second = Manager(tmp_path, cable)
    second.service.delete(OPERATOR, "sw1")
    second.ledger.close()
    assert not cable.port.hairpin


def test_switch_that_is_gone_is_deleted_only_by_force(tmp_path: Path) -> None:
    with plugged(PREFIX) as cable:
        manager = Manager(tmp_path, cable)
        manager.service.add(OPERATOR, local())
        set_hairpin(manager, cable.far, on=True)
    with pytest.raises(SwitchError, match="was not deleted.*does not exist.*\n.*--force"):
        manager.service.delete(OPERATOR, "sw1")
    assert len(manager.service.list(OPERATOR)) == 1
    manager.service.delete(OPERATOR, "sw1", force=True)
    assert manager.service.list(OPERATOR) == ()
    assert manager.ledger.undo_records("switch:sw1") == ()
    manager.ledger.close()


# Watching.


def test_lost_hairpin_is_reported_once_and_its_return_too(manager: Manager, cable: Cable) -> None:
    manager.service.add(OPERATOR, local())
    set_hairpin(manager, cable.far, on=True)
    manager.service.start_watching()
    until(lambda: manager.service.list(OPERATOR)[0].observed, lambda: manager.details)
    assert manager.service.list(OPERATOR)[0].problem == ""
    before = len(manager.details)
    cable.rejoin()
    manager.await_event(f"port {cable.far}: hairpin off")
    cable.await_forwarding()
    until(lambda: manager.service.list(OPERATOR)[0].problem.count("port ") == 1, lambda: manager.details)
    cable.change_port(mode=1)
    manager.await_event("switch sw1: all checks passed")
    reported = manager.details[before:]
    assert len(reported) == len(set(reported)), reported
    assert {event.who for event in manager.events[-2:]} == {"manager"}


def test_port_that_an_operator_switched_off_is_not_watched(manager: Manager, cable: Cable) -> None:
    """Unless an uplink is tied to it: sw2 has none."""
    manager.service.add(OPERATOR, local("sw2"))
    manager.service.start_watching()
    for on, problem in ((True, ""), (False, "")):
        manager.service.set_hairpin(OPERATOR, "sw2", HairpinRequest(port=cable.far, on=on))
        seen = manager.service.list(OPERATOR)[0].observed
        until(lambda: manager.service.list(OPERATOR)[0].observed not in (None, seen), lambda: manager.details)  # noqa: B023
        assert manager.service.list(OPERATOR)[0].problem == problem
    manager.service.set_hairpin(OPERATOR, "sw2", HairpinRequest(port=cable.far, on=True))
    cable.change_port(mode=0)
    manager.await_event("switch sw2: port")


def test_change_is_reported_sooner_than_a_poll(manager: Manager, cable: Cable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's notification: with polls alone this test would not end."""
    monkeypatch.setattr("orchestrator.guests.switch_watch.POLL_SECONDS", 3600.0)
    cable.change_port(mode=1)
    manager.service.add(OPERATOR, local())
    manager.service.start_watching()
    until(lambda: manager.service.list(OPERATOR)[0].observed, lambda: manager.details)
    cable.change_port(mode=0)
    manager.await_event("hairpin off")


def test_switch_that_disappears_is_reported(manager: Manager, tmp_path: Path) -> None:
    with plugged(f"{PREFIX}b") as other:
        other.change_port(mode=1)
        second = Manager(tmp_path / "second", other)
        second.service.add(OPERATOR, local(netns=other.netns))
        second.service.start_watching()
        until(lambda: second.service.list(OPERATOR)[0].observed, lambda: second.details)
    detail = second.await_event("cannot be read")
    assert f"namespace {other.netns} does not exist" in detail
    second.service.delete(OPERATOR, "sw1", force=True)
    second.service.close()
    second.ledger.close()


def test_threads_end_with_the_service(manager: Manager) -> None:
    manager.service.start_watching()
    manager.service.add(OPERATOR, local())
    until(lambda: manager.service.list(OPERATOR)[0].observed, lambda: manager.details)

    def count() -> int:
        return sum(thread.name == "switch-sw1" for thread in threading.enumerate())

    assert count() == 1
    manager.service.delete(OPERATOR, "sw1")
    until(lambda: count() == 0, count)


def test_switch_that_is_deleted_at_once_is_not_watched(manager: Manager) -> None:
    """Another request deletes it as soon as its registration is reported."""
    manager.service.start_watching()

    def delete(event: Event) -> None:
        if "registered" in event.detail:
            manager.service.delete(OPERATOR, "sw1")

    manager.ledger.subscribe(delete)
    manager.service.add(OPERATOR, local())

    def list_threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "switch-sw1"]

    until(lambda: not list_threads(), list_threads)


# SSH.


def remote(ssh: SshSwitch, **fields: object) -> Switch:
    return Switch("sw1", SwitchDriver.LINUX_BRIDGE, BRIDGE, "", replace(ssh.address, **fields))  # type: ignore[arg-type]


def test_bridge_over_ssh_is_read_like_a_local_one(ssh: SshSwitch, cable: Cable) -> None:
    near = LinuxBridge(BRIDGE, cable.netns)
    with opened(remote(ssh), ssh.key) as far:
        for settings in ({"mode": 1}, {"isolated": 1}, {"mode": 0, "isolated": 0}):
            cable.change_port(**settings)
            ours, theirs = near.read(), far.read()
            assert replace(theirs.ports[0], gaps=(), counters=None) == replace(ours.ports[0], gaps=(), counters=None)
            assert replace(theirs, ports=()) == replace(ours, ports=())
            assert theirs.ports[0].counters
            assert ours.ports[0].counters
        assert "lldpcli" in far.read(neighbours=True).ports[0].gaps[0]


def test_hairpin_is_set_over_ssh_and_reverted(ssh: SshSwitch, cable: Cable, tmp_path: Path) -> None:
    manager = Manager(tmp_path, cable, ssh.key)
    address = ssh.address
    request = SwitchRequest.model_validate(
        {"name": "sw1", "driver": "linux-bridge", "bridge": BRIDGE,
         "ssh": {"host": address.host, "port": address.port, "host_key": address.host_key}}
    )  # fmt: skip
    manager.service.add(OPERATOR, request)
    assert set_hairpin(manager, cable.far, on=True).ports[0].hairpin
    assert cable.port.hairpin
    assert set(verdicts(manager).values()) == {Verdict.PASS}
    manager.service.delete(OPERATOR, "sw1")
    assert not cable.port.hairpin
    manager.ledger.close()


def test_change_is_reverted_with_the_key_of_today(ssh: SshSwitch, cable: Cable, tmp_path: Path) -> None:
    """The undo record names the file that was configured at the time."""
    manager = Manager(tmp_path, cable, ssh.key)
    manager.ledger.add_switch(remote(ssh))
    set_hairpin(manager, cable.far, on=True)
    manager.ledger.close()
    second = Manager(tmp_path, cable, ssh.key.rename(tmp_path / "new_key"))
    second.service.delete(OPERATOR, "sw1")
    second.ledger.close()
    assert not cable.port.hairpin


def test_empty_objects_of_iproute2_are_skipped(ssh: SshSwitch, cable: Cable) -> None:
    script = (ssh.programs / "ip").read_text().removeprefix("#!/bin/sh\nexec ").strip()
    ssh.replace_program("ip", f"{script} | sed '1s/^\\[/[{{}},/'")
    with opened(remote(ssh), ssh.key) as driver:
        assert [port.name for port in driver.read().ports] == [cable.far]


def test_clamped_change_is_an_error(ssh: SshSwitch, cable: Cable) -> None:
    """The switch says yes and does nothing."""
    script = (ssh.programs / "bridge").read_text().removeprefix("#!/bin/sh\n")
    ssh.replace_program("bridge", f'case "$2" in set) exit 0;; esac\n{script}')
    with opened(remote(ssh), ssh.key) as driver, pytest.raises(SwitchError, match="requested hairpin on, switch reports off"):
        driver.set_hairpin(cable.far, on=True)


def test_lost_connection_is_opened_again(ssh: SshSwitch) -> None:
    with opened(remote(ssh), ssh.key) as driver:
        driver.read()
        ssh.transports[0].close()
        driver.read()
    assert len(ssh.transports) == 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(commands, "COMMAND_SECONDS", 0.5)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_unreachable_switch_is_one_error(ssh: SshSwitch, impatient: None, tmp_path: Path) -> None:
    open_key, other_key, garbage = tmp_path / "open", tmp_path / "other", tmp_path / "garbage"
    for path, content in ((open_key, ssh.key.read_bytes()), (other_key, make_key().private), (garbage, b"\xff\xfe\0")):
        path.touch(0o600)
        path.write_bytes(content)
    open_key.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for switch, key, message in (
            (remote(ssh, port=free_port()), ssh.key, "no SSH server responds"),
            (remote(ssh, port=silent.getsockname()[1]), ssh.key, "no SSH server responds"),
            (remote(ssh, host_key=make_key().public), ssh.key, "presented the host key.*\n.*do not log in"),
            (remote(ssh), other_key, "does not accept the key.*\n.*authorized_keys"),
            (remote(ssh), open_key, "only its owner can read.*\n.*chmod 600"),
            (remote(ssh), tmp_path / "none", "cannot read the SSH key.*No such file"),
            (remote(ssh), tmp_path, "not a file"),
            (remote(ssh), garbage, "(?s)key"),
            (remote(ssh), None, "no SSH key is configured"),
        ):
            with opened(switch, key) as driver, pytest.raises(SwitchError, match=message):
                driver.read()


@pytest.mark.parametrize(
    "script",
    [
        "echo not JSON", "echo '[{}]'", "echo '{}'", "echo '[1]'", "echo 'null'", "echo '[{\"ifname\": \"br0\"}]'", "exit 1",
        "yes '[' | head -c 200000", "exec sleep 60", "kill -9 $$", "printf '\\377'",
    ],
)  # fmt: skip
def test_odd_program_of_a_switch_is_one_error(ssh: SshSwitch, impatient: None, script: str) -> None:
    ssh.replace_program("ip", script)
    with opened(remote(ssh), ssh.key) as driver, pytest.raises(SwitchError):
        driver.read()


def test_user_without_root_uses_sudo(ssh: SshSwitch) -> None:
    ssh.replace_program("sudo", 'echo "sudo $*"')
    for user, output in (("admin", "sudo -n echo a b\n"), ("root", "a b\n")):
        runner = SshCommands(replace(ssh.address, user=user), ssh.key)
        assert runner.run(["echo", "a b"]) == output
        runner.close()
    with pytest.raises(SwitchError, match="does not accept the key"):
        SshCommands(replace(ssh.address, user="eve"), ssh.key).run(["true"])


def test_hung_switch_holds_up_no_other(ssh: SshSwitch, cable: Cable, tmp_path: Path) -> None:
    """A read of another switch, and the list, return while one switch does not respond."""
    manager = Manager(tmp_path, cable, ssh.key)
    manager.service.add(OPERATOR, local("sw2"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = SshAddress("127.0.0.1", silent.getsockname()[1], "root", ssh.address.host_key)
        manager.ledger.add_switch(Switch("sw1", SwitchDriver.LINUX_BRIDGE, BRIDGE, "", address))
        errors: list[OrchestratorError] = []

        def read() -> None:
            try:
                manager.service.show(OPERATOR, "sw1")
            except OrchestratorError as error:
                errors.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        connection, _ = silent.accept()
        assert len(manager.service.list(OPERATOR)) == 2
        assert manager.service.show(OPERATOR, "sw2").state.ports
        assert thread.is_alive(), "it still waits"
        connection.close()
        thread.join(60)
    assert [error.code for error in errors] == ["switch"]
    manager.ledger.close()


def test_watched_switch_over_ssh_is_polled(ssh: SshSwitch, cable: Cable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.guests.switch_watch.POLL_SECONDS", 0.05)
    cable.change_port(mode=1)
    manager = Manager(tmp_path, cable, ssh.key)
    manager.ledger.add_switch(remote(ssh))
    manager.service.start_watching()
    until(lambda: manager.service.list(OPERATOR)[0].observed, lambda: manager.details)
    cable.change_port(mode=0)
    manager.await_event("hairpin off")
    ssh.replace_program("ip", "echo broken >&2; exit 1")
    assert "broken" in manager.await_event("cannot be read")
    manager.service.close()
    manager.ledger.close()


# Open vSwitch.


def test_restart_of_open_vswitch_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over SSH, with the real daemons."""
    monkeypatch.setattr("orchestrator.guests.switch_watch.POLL_SECONDS", 0.05)
    try:
        tools = build_switch_tools(cache_folder())
    except OrchestratorError as error:
        pytest.skip(f"the root with Open vSwitch cannot be built: {error.message}")
    with openvswitch.running(tmp_path, tools) as daemons, daemons.plug(f"{PREFIX}o", 1) as wire:
        scripts = {name: f'exec {" ".join(daemons.prefix)} {name} "$@"' for name in ("ovs-vsctl", "ovs-ofctl")}
        with ssh_switch(tmp_path, scripts) as ssh:
            manager = Manager(tmp_path, Cable("", wire.near, wire.far), ssh.key)
            manager.ledger.add_switch(Switch("sw1", SwitchDriver.OPENVSWITCH, openvswitch.BRIDGE, "", ssh.address))
            assert set_hairpin(manager, wire.far, on=True).ports[0].hairpin
            manager.service.start_watching()
            until(lambda: manager.service.list(OPERATOR)[0].observed, lambda: manager.details)
            daemons.kill_vswitchd()
            manager.await_event("cannot be read")
            daemons.start_vswitchd()
            manager.await_event("the relay table has no flows")
            set_hairpin(manager, wire.far, on=True)
            manager.await_event("all checks passed")
            manager.service.delete(OPERATOR, "sw1")
            assert (daemons.driver.read().flows, daemons.driver.read().fail_mode) == (0, "standalone")
            manager.service.close()
            manager.ledger.close()


# API.


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


def test_switch_over_the_api(served: Served, cable: Cable) -> None:
    client = served.client
    assert client.switches() == []
    added = client.add_switch({"name": "sw1", "driver": "linux-bridge", "bridge": BRIDGE, "netns": cable.netns})
    assert "set hairpin" in added["can"]
    assert client.switches() == [added]
    assert client.set_hairpin("sw1", cable.far, on=True)["ports"][0]["hairpin"] is True
    assert client.switch("sw1")["state"]["ports"][0]["name"] == cable.far
    checks = {check["name"]: check["verdict"] for check in client.verify_switch("sw1", cable.far)}
    assert checks["hairpin"] == "pass"
    with pytest.raises(RequestError, match="no uplink is tied"):
        client.verify_switch("sw1")
    with pytest.raises(SwitchError, match="has no port nowhere"):
        client.set_hairpin("sw1", "nowhere", on=True)
    with pytest.raises(SwitchError, match="takes no list"):
        client.set_hairpin("sw1", cable.far, on=True, macs=["02:4e:48:00:00:01"])
    client.delete_switch("sw1")
    with pytest.raises(NotFound):
        client.switch("sw1")
    assert not cable.port.hairpin


# Uplinks that a switch is registered with.


def test_switch_is_registered_with_its_uplinks(manager: Manager, cable: Cable, tmp_path: Path) -> None:
    """For an uplink that the configuration does not tie."""
    request = local("lab").model_copy(update={"uplinks": (SwitchUplinkRequest(uplink="nic7", port=cable.far),)})
    view = manager.service.add(OPERATOR, request)
    assert view.uplinks == (UplinkPort("nic7", "lab", cable.far),)
    tie = manager.service.find_tie("nic7")
    assert tie
    assert (tie.switch.name, tie.port) == ("lab", cable.far)
    assert manager.service.find_tie("nic8") is None
    for name, uplink, port, error, says in (
        ("again", "nic7", cable.far, Conflict, f"uplink nic7 has port {cable.far} of switch lab already"),
        ("again", cable.near, cable.far, Conflict, f"has port {cable.far} of switch sw1 already"),
        ("again", "nic8", "nowhere", SwitchError, "has no port nowhere"),
    ):
        wrong = local(name).model_copy(update={"uplinks": (SwitchUplinkRequest(uplink=uplink, port=port),)})
        with pytest.raises(error, match=says):
            manager.service.add(OPERATOR, wrong)
    assert [view.switch.name for view in manager.service.list(OPERATOR)] == ["lab"]
    as_configured = local("sw1").model_copy(update={"uplinks": (SwitchUplinkRequest(uplink=cable.near, port=cable.far),)})
    assert manager.service.add(OPERATOR, as_configured).uplinks == (UplinkPort(cable.near, "sw1", cable.far),)
    manager.service.delete(OPERATOR, "sw1")
    again = Manager(tmp_path, cable)
    try:
        assert again.service.find_tie("nic7")
    finally:
        again.service.close()
        again.ledger.close()
    manager.service.delete(OPERATOR, "lab")
    assert manager.service.find_tie("nic7") is None


def test_uplink_is_given_to_one_of_two_switches_that_are_registered_at_the_same_time(
    manager: Manager, cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, read, failed = threading.Barrier(2), manager.ledger.switches, []

    def read_together() -> tuple[Switch, ...]:
        found = read()
        with suppress(threading.BrokenBarrierError):
            both.wait(1)
        return found

    def add(name: str) -> None:
        try:
            manager.service.add(
                OPERATOR, local(name).model_copy(update={"uplinks": (SwitchUplinkRequest(uplink="nic7", port=cable.far),)})
            )
        except Conflict as error:
            failed.append(error.message)

    monkeypatch.setattr(manager.ledger, "switches", read_together)
    threads = [threading.Thread(target=add, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(failed) == 1
    assert "uplink nic7 has port" in failed[0]


def test_uplink_has_one_port() -> None:
    fields = {"name": "s", "driver": "linux-bridge", "bridge": "br0"}
    for ends in ((("nic0", "p1"), ("nic0", "p2")), (("nic0", "p1"), ("nic1", "p1"))):
        uplinks = [{"uplink": uplink, "port": port} for uplink, port in ends]
        with pytest.raises(ValueError, match="is given twice"):
            SwitchRequest.model_validate({**fields, "uplinks": uplinks})


# Translation of guests' VLANs as a step.


def test_translation_is_a_step_of_the_guest_that_is_undone(tmp_path: Path) -> None:
    with openvswitch.running(tmp_path, build_switch_tools(cache_folder())) as daemons, daemons.plug(f"nhz{os.getpid()}", 1):
        scripts = {name: f'exec {" ".join(daemons.prefix)} {name} "$@"' for name in ("ovs-vsctl", "ovs-ofctl")}
        folder = tmp_path / "ssh"
        folder.mkdir()
        with ssh_switch(folder, scripts) as server, closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
            switch = Switch("sw1", SwitchDriver.OPENVSWITCH, openvswitch.BRIDGE, ssh=server.address)
            tie = SwitchTie(switch, "p1", server.key)
            nic = replace(make_plan(1).vf, edge=EdgeMode.CHANNEL, vlan=1000, switch_vlan=100, network="blue")
            ledger.create_network(lambda _: Network("blue", 100))
            plan = replace(make_plan(1), nics=(nic,))
            steps = plan_translations(plan, {nic.interface: tie}.get)
            (text,) = run_steps(HostRoot(), ledger, plan.name, steps)
            assert text == f"translate VLAN 1000 to VLAN 100 for {nic.mac} at port p1 of switch sw1"
            (port,) = daemons.driver.read(["p1"]).ports
            assert port.channels == (PortChannel(1000, str(nic.mac), 100),)
            service = SwitchService(HostRoot(), ledger, SwitchSettings(str(server.key)))
            ledger.add_switch(switch)
            ledger.claim(plan, ledger.read().generation, guest_request(name=plan.name))
            with pytest.raises(Conflict, match=f"switch sw1 translates VLANs of guests: {plan.name}"):
                service.delete(OPERATOR, "sw1")
            server.replace_program("ovs-ofctl", "echo 'no such device' >&2; exit 1")
            with pytest.raises(
                HostError, match="cannot end the translation of VLAN 1000 at port p1 of switch sw1: .*no such device"
            ):
                undo_steps(UndoContext(HostRoot()), ledger, plan.name)
            assert ledger.undo_records(plan.name), "the next guest with the VLAN would be in the network"
            server.replace_program("ovs-ofctl", scripts["ovs-ofctl"])
            moved = server.key.rename(tmp_path / "moved")
            undo_steps(UndoContext(HostRoot(), switch_key=str(moved)), ledger, plan.name)  # the configuration names it now
            assert not ledger.undo_records(plan.name)
            assert daemons.driver.read(["p1"]).ports[0].channels == ()
            assert plan_translations(plan, lambda _: None) == []


def test_launch_names_a_switch_that_is_not_registered() -> None:
    plan = replace(make_plan(1), nics=(replace(make_plan(1).vf, edge=EdgeMode.CHANNEL, vlan=1000),))

    def find(uplink: str) -> SwitchTie:
        raise SwitchError(f"the switch sw1 of uplink {uplink} is not registered", "register it")

    with pytest.raises(
        HostError, match="cannot translate VLAN 1000 of guest .*: the switch sw1 of uplink nic0 is not registered"
    ):
        plan_translations(plan, find)


def test_translation_that_a_restart_of_the_switch_has_lost_is_set_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For guests that run: the VLAN of another one would stay in the network."""
    monkeypatch.setattr("orchestrator.guests.switch_watch.POLL_SECONDS", 0.05)
    with openvswitch.running(tmp_path, build_switch_tools(cache_folder())) as daemons, daemons.plug(f"{PREFIX}r", 1) as wire:
        scripts = {name: f'exec {" ".join(daemons.prefix)} {name} "$@"' for name in ("ovs-vsctl", "ovs-ofctl")}
        with ssh_switch(tmp_path, scripts) as server:
            manager = Manager(tmp_path, Cable("nic0", wire.near, wire.far), server.key, (UplinkPort("nic0", "sw1", wire.far),))
            switch = Switch("sw1", SwitchDriver.OPENVSWITCH, openvswitch.BRIDGE, ssh=server.address)
            ledger, tie = manager.ledger, SwitchTie(switch, wire.far, server.key)
            ledger.add_switch(switch)
            ledger.create_network(lambda _: Network("blue", 100))
            channels = {}
            for number, name in ((1, "runs"), (2, "stopped"), (3, "other")):
                base = make_plan(number, name=name)
                nic = replace(
                    base.vf, interface="nic0", edge=EdgeMode.CHANNEL, vlan=999 + number, switch_vlan=100, network="blue"
                )
                plan = replace(base, nics=(nic,))
                ledger.claim(plan, ledger.read().generation, guest_request(name=name))
                if name != "other":  # started before the switch was registered: nothing would end its translation
                    run_steps(HostRoot(), ledger, name, plan_translations(plan, {"nic0": tie}.get))
                ledger.set_state(name, GuestState.RUNNING)
                channels[name] = PortChannel(nic.vlan, str(nic.mac), 100)
            for state in (GuestState.STOPPING, GuestState.STOPPED):
                ledger.set_state("stopped", state)
            manager.service.start_watching()
            manager.await_event(f"VLAN {channels['other'].vlan} of {channels['other'].mac} is not translated")
            daemons.kill_vswitchd()
            daemons.start_vswitchd()
            manager.await_event(f"VLAN {channels['runs'].vlan} of {channels['runs'].mac} is not translated")
            said = manager.await_event("lost translations were set again")
            assert said == (
                f"switch sw1: lost translations were set again: translate VLAN 1000 to VLAN 100 for {channels['runs'].mac}"
                f" at port {wire.far} of switch sw1"
            )
            assert daemons.driver.read([wire.far]).ports[0].channels == (channels["runs"],)
            changed = replace(channels["runs"], switch_vlan=200)
            daemons.driver.set_channel(wire.far, changed)
            manager.await_event("the translation is VLAN 1000 to VLAN 200")
            assert daemons.driver.read([wire.far]).ports[0].channels == (changed,), "another operator may have done that"
            manager.service.close()
            ledger.close()
