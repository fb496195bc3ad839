"""External switches: registration, reading, verification, and reflective relay at their ports. For operators."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from orchestrator.config import DaemonConfig
from orchestrator.errors import Conflict, Forbidden, LedgerError, NotFound, OrchestratorError, RequestError, SwitchError
from orchestrator.guests.duplicates import Duplicates, list_addresses
from orchestrator.guests.host_setup import HOST
from orchestrator.guests.switch_watch import Observation, SwitchWatch
from orchestrator.guests.translations import LostTranslations
from orchestrator.host.ports import read_mtu
from orchestrator.host.root import HostRoot
from orchestrator.ledger import Claim, EventKind, Ledger
from orchestrator.locks import NamedLocks
from orchestrator.model.access import MANAGER, Identity, Role
from orchestrator.model.edge import EdgeMode
from orchestrator.model.state import GuestState
from orchestrator.model.switch import (
    PortChannel,
    PortNeeds,
    Switch,
    SwitchCheck,
    SwitchDetails,
    SwitchPort,
    SwitchSettings,
    SwitchState,
    SwitchTie,
    SwitchView,
    UplinkNeighbour,
    UplinkPort,
)
from orchestrator.model.switch_request import HairpinRequest, SwitchRequest
from orchestrator.model.uplink import CounterPlace, CounterReading, FrameCounts
from orchestrator.resources.step import UndoContext, run_steps, undo_steps
from orchestrator.resources.switch import SetHairpin, find_key, is_translation
from orchestrator.switches.commands import LocalCommands
from orchestrator.switches.drivers import list_capabilities, opened
from orchestrator.switches.lldp import find_neighbour
from orchestrator.switches.verify import check_ports

_log = logging.getLogger(__name__)

_ALL = ""
"""Of a lock: no switch has this name."""


class SwitchService:
    """Methods with ``caller`` raise Forbidden for others than operators, NotFound for an unknown switch, and SwitchError.

    A call waits only for its own switch: each has its lock, and every command has a time limit.
    """

    def __init__(self, host: HostRoot, ledger: Ledger, settings: SwitchSettings) -> None:
        self._host, self._ledger, self._settings = host, ledger, settings
        self._locks = NamedLocks()
        self._translations = LostTranslations(ledger, self.find_tie, lambda text: self._note(text, MANAGER.name))
        self._watch = SwitchWatch(
            find_key(settings.key), self._list_watched, self._read_mtus, self._report, self._inspect, self._find_needs,
            self._translations.restore,
        )  # fmt: skip
        self._duplicates = Duplicates(lambda text: self._note(text, MANAGER.name, EventKind.DUPLICATE_ADDRESS))

    def list(self, caller: Identity) -> tuple[SwitchView, ...]:
        """Contacts no switch."""
        _check_operator(caller)
        return tuple(map(self._view, self._ledger.switches()))

    def add(self, caller: Identity, request: SwitchRequest) -> SwitchView:
        """Raises SwitchError if the switch cannot be reached or has no such bridge, and Conflict if the name is taken."""
        _check_operator(caller)
        switch = request.build()
        with self._locks(switch.name):
            self._read(switch, tuple(one.port for one in switch.uplinks) or None)
            with self._locks(_ALL):
                self._check_uplinks(switch)
                self._ledger.add_switch(switch)
            self._watch.add(switch)  # with the lock: a switch of this name may be deleted and registered again at any time
        self._note(f"switch {switch.name}: registered ({_describe(switch)})", caller.name)
        return self._view(switch)

    def show(self, caller: Identity, name: str) -> SwitchDetails:
        switch = self._find(caller, name)
        state = self._read(switch, neighbours=True)
        ties = self._list_ties(name)
        return SwitchDetails(self._view(switch), state, tuple(_read_announced(tie.uplink) for tie in ties))

    def verify(self, caller: Identity, name: str, port: str | None = None) -> tuple[SwitchCheck, ...]:
        """Checks one port; None for all ports that uplinks are tied to. Raises RequestError if there are none."""
        switch = self._find(caller, name)
        if port:
            return check_ports(name, self._read(switch, (port,)), self._read_mtus(name), None, self._find_needs(name))
        ports = tuple(tie.port for tie in self._list_ties(name))
        if not ports:
            hint = (
                f"name a port, or set `switch` and `port` in [uplinks.NAME] and restart the manager; `nohype switch show {name}`"
            )
            raise RequestError(f"no uplink is tied to a port of switch {name}", hint)
        return check_ports(name, self._read(switch), self._read_mtus(name), ports, self._find_needs(name))

    def set_hairpin(self, caller: Identity, name: str, request: HairpinRequest) -> SwitchState:
        """Returns the port as it is then. `delete` reverts the change."""
        switch = self._find(caller, name)
        step = SetHairpin(switch, self._settings.key, request.port, request.on, request.macs)
        with self._locks(name):
            self._find(caller, name)
            changed = run_steps(self._host, self._ledger, _owner(name), [step])
            state = self._read(switch, (request.port,))
        for text in changed:
            self._note(text, caller.name)
        return state

    def delete(self, caller: Identity, name: str, *, force: bool = False) -> None:
        """Reverts the manager's changes, then forgets the switch. ``force``: forgets them too if that fails.

        Raises Conflict if it translates VLANs of guests, unless ``force``: their translations end with the guests.
        """
        self._find(caller, name)
        if (guests := self._list_translated(name)) and not force:
            hint = "stop these guests first, or use --force"
            raise Conflict(f"switch {name} translates VLANs of guests: {', '.join(guests)}", hint)
        with self._locks(name):
            self._find(caller, name)
            try:
                undo_steps(UndoContext(self._host, switch_key=self._settings.key), self._ledger, _owner(name))
            except OrchestratorError as error:
                if not force:
                    hint = "repeat it when the switch can be reached, or use --force to leave its ports as they are"
                    raise SwitchError(f"switch {name} was not deleted: {error.message}", hint) from None
                for record in self._ledger.undo_records(_owner(name)):
                    self._ledger.drop_undo_record(record.id)
            self._ledger.delete_switch(name)
            self._watch.remove(name)
        self._note(f"switch {name}: deleted", caller.name)

    def find_tie(self, uplink: str) -> SwitchTie | None:
        """None if no switch is configured for the uplink. Raises SwitchError if it is not registered."""
        known = self._ledger.switches()
        tie = next((tie for tie in list_ties(self._settings, known) if tie.uplink == uplink), None)
        if tie is None:
            return None
        found = next((switch for switch in known if switch.name == tie.switch), None)
        if found is None:
            hint = "register it with `nohype switch add`"
            raise SwitchError(f"the switch {tie.switch} of uplink {uplink} is not registered", hint)
        return SwitchTie(found, tie.port, find_key(self._settings.key))

    def count_port(self, uplink: str) -> CounterReading | None:
        """The counters of the uplink's switch port, read now; None if no switch is configured."""
        try:
            if (tie := self.find_tie(uplink)) is None:
                return None
            (port,) = self._read(tie.switch, (tie.port,)).ports
            return _count(port)
        except SwitchError as error:
            return CounterReading(CounterPlace.SWITCH, self._find_port(uplink), "", None, f"not measured: {error.message}")

    def last_count(self, uplink: str) -> CounterReading | None:
        """As ``count_port``, of the last watch; contacts no switch."""
        tie = next((tie for tie in self._all_ties() if tie.uplink == uplink), None)
        state = self._watch.find_state(tie.switch) if tie else None
        return next((_count(port) for port in state.ports if tie and port.name == tie.port), None) if state else None

    def start_watching(self) -> None:
        """One thread per switch, until ``close``. A switch that does not respond holds up no other."""
        for switch in self._ledger.switches():
            self._watch.add(switch)
        self._watch.start()

    def close(self) -> None:
        self._watch.close()

    def _find(self, caller: Identity, name: str) -> Switch:
        _check_operator(caller)
        for switch in self._ledger.switches():
            if switch.name == name:
                return switch
        raise NotFound(f"there is no switch named {name}", "`nohype switch list` shows all")

    def _read(self, switch: Switch, ports: tuple[str, ...] | None = None, *, neighbours: bool = False) -> SwitchState:
        with opened(switch, find_key(self._settings.key)) as driver:
            return driver.read(ports, neighbours=neighbours)

    def _view(self, switch: Switch) -> SwitchView:
        seen = self._watch.find(switch.name)
        problem, time = (seen.problem, seen.time) if seen else ("", None)
        return SwitchView(switch, list_capabilities(switch), self._list_ties(switch.name), problem, time)

    def _check_uplinks(self, switch: Switch) -> None:
        for one in switch.uplinks:
            tie = next((tie for tie in self._all_ties() if tie.uplink == one.uplink), None)
            if tie and tie != UplinkPort(one.uplink, switch.name, one.port):
                hint = "delete that switch first, or remove the port from [uplinks.NAME]"
                raise Conflict(f"uplink {one.uplink} has port {tie.port} of switch {tie.switch} already", hint)

    def _list_translated(self, name: str) -> tuple[str, ...]:
        names = [claim.plan.name for claim in self._ledger.read().claims]
        return tuple(guest for guest in names if any(is_translation(one, name) for one in self._ledger.undo_records(guest)))

    def _list_ties(self, name: str) -> tuple[UplinkPort, ...]:
        return tuple(tie for tie in self._all_ties() if tie.switch == name)

    def _all_ties(self) -> tuple[UplinkPort, ...]:
        return list_ties(self._settings, self._ledger.switches())

    def _find_port(self, uplink: str) -> str:
        return next((tie.port for tie in self._all_ties() if tie.uplink == uplink), "")

    def _list_watched(self, name: str) -> tuple[str, ...]:
        """The ports of uplinks, and those at which the manager has set hairpin."""
        last = {str(record.arguments.get("port")): record for record in reversed(self._ledger.undo_records(_owner(name)))}
        changed = [port for port, record in last.items() if record.arguments.get("on")]
        return tuple(dict.fromkeys([*(tie.port for tie in self._list_ties(name)), *changed]))

    def _read_mtus(self, name: str) -> dict[str, int]:
        found = {tie.port: read_mtu(self._host, tie.uplink) for tie in self._list_ties(name)}
        return {port: mtu for port, mtu in found.items() if mtu is not None}

    def _find_needs(self, name: str) -> dict[str, PortNeeds]:
        claims, own = self._ledger.read().claims, self._settings.channels
        return {tie.port: find_needs(claims, tie.uplink, is_channel=tie.uplink in own) for tie in self._list_ties(name)}

    def _report(self, name: str, observation: Observation) -> None:
        self._note(f"switch {name}: {observation.problem or 'all checks passed'}", MANAGER.name)

    def _inspect(self, name: str, state: SwitchState) -> None:
        self._duplicates.inspect(name, state, list_addresses(self._ledger.read().claims, self._list_ties(name)))

    def _note(self, detail: str, who: str, kind: EventKind = EventKind.SWITCH_CHANGED) -> None:
        try:
            self._ledger.append_event(kind, HOST, detail, who=who)
        except LedgerError as error:
            _log.error("%s (%s)", detail, error)


def list_ties(settings: SwitchSettings, known: Iterable[Switch]) -> tuple[UplinkPort, ...]:
    """Those of the configuration, then those of registered switches for other uplinks. An uplink has one port."""
    ties = {tie.uplink: tie for tie in settings.uplinks}
    for switch in known:
        for one in switch.uplinks:
            ties.setdefault(one.uplink, UplinkPort(one.uplink, switch.name, one.port))
    return tuple(ties.values())


def find_needs(claims: Iterable[Claim], uplink: str, *, is_channel: bool) -> PortNeeds:
    """``is_channel``: new guests of the uplink get the edge mode channel."""
    found = [(claim.state, nic) for claim in claims for nic in claim.plan.nics if nic.interface == uplink]
    own = [(state, PortChannel(nic.vlan, str(nic.mac), nic.switch_vlan)) for state, nic in found if nic.edge is EdgeMode.CHANNEL]
    relay = len(own) < len(found) or not found and not is_channel
    running = tuple(one for state, one in own if state == GuestState.RUNNING)
    tagged = (nic.vlan for state, nic in found if state == GuestState.RUNNING and nic.edge is not EdgeMode.CHANNEL and nic.vlan)
    return PortNeeds(relay, running, tuple(one for _, one in own), frozenset(tagged))


def build_settings(config: DaemonConfig) -> SwitchSettings:
    ties = [UplinkPort(name, found.switch, found.port) for name, found in config.uplinks.items() if found.switch and found.port]
    channels = frozenset(name for name, found in config.uplinks.items() if found.mode is EdgeMode.CHANNEL)
    return SwitchSettings(config.switches.ssh_key or "", tuple(ties), channels)


def _owner(name: str) -> str:
    """Of the undo records: not a valid name of a guest."""
    return f"switch:{name}"


def _check_operator(caller: Identity) -> None:
    if caller.role is not Role.OPERATOR:
        raise Forbidden(f"{caller.name} is not an operator and may not use external switches", "ask the operator of the host")


def _read_announced(uplink: str) -> UplinkNeighbour:
    try:
        found = find_neighbour(LocalCommands(), uplink)
    except SwitchError as error:
        return UplinkNeighbour(uplink, None, f"not measured, because {error.message}")
    return UplinkNeighbour(uplink, found, "" if found else "no neighbour announces itself by LLDP")


def _count(port: SwitchPort) -> CounterReading:
    found = port.counters
    if found is None:
        return CounterReading(CounterPlace.SWITCH, port.name, "", None, "not measured: the switch reports no counters")
    # What the switch receives, the host has sent.
    counts = FrameCounts(found.rx_packets, found.tx_packets, found.rx_bytes, found.tx_bytes, found.rx_dropped, found.tx_dropped)
    return CounterReading(CounterPlace.SWITCH, port.name, "", counts)


def _describe(switch: Switch) -> str:
    where = f"on {switch.ssh}" if switch.ssh else f"network namespace {switch.netns}" if switch.netns else "on this host"
    return f"{switch.driver}, bridge {switch.bridge}, {where}"
