"""Changes at a port of an external switch: reflective relay (hairpin), and the translation of a guest's VLAN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from orchestrator.errors import HostError, SwitchError
from orchestrator.host.root import HostRoot
from orchestrator.ledger import UndoRecord
from orchestrator.locks import NamedLocks
from orchestrator.model.edge import EdgeMode
from orchestrator.model.event import utc_now
from orchestrator.model.plan import Plan
from orchestrator.model.switch import PortChannel, Switch, SwitchTie
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments
from orchestrator.switches.base import describe_channel
from orchestrator.switches.drivers import opened

_changing = NamedLocks()
"""By switch. A driver may read a whole table and write it again."""


@dataclass(frozen=True)
class HairpinBefore:
    """Attributes:
    key: file with the SSH key, empty without one.
    before: as `switches.base.Driver.snapshot` returned it.
    on: what was set.
    at: when; so each change has a record of its own, and the newest tells what was set last.
    """

    switch: Switch
    key: str
    port: str
    before: str
    on: bool
    at: str


@register
@dataclass(frozen=True)
class SetHairpin:
    action: ClassVar[str] = "switch-hairpin"
    switch: Switch
    key: str
    port: str
    on: bool
    macs: tuple[str, ...] = ()

    def describe(self) -> str:
        bound = f" for {', '.join(self.macs)}" if self.macs else ""
        return f"set hairpin {'on' if self.on else 'off'} at port {self.port} of switch {self.switch.name}{bound}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        with opened(self.switch, find_key(self.key)) as driver:
            if driver.read([self.port]).ports[0].hairpin == self.on and not self.macs:
                return None
            before = driver.snapshot(self.port)
        return to_arguments(HairpinBefore(self.switch, self.key, self.port, before, self.on, utc_now()))

    def apply(self, host: HostRoot) -> None:
        with _changing(self.switch.name), opened(self.switch, find_key(self.key)) as driver:
            driver.set_hairpin(self.port, on=self.on, macs=self.macs)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        before = parse_arguments(HairpinBefore, arguments)
        with _changing(before.switch.name), opened(before.switch, find_key(context.switch_key or before.key)) as driver:
            driver.restore(before.port, before.before)


@dataclass(frozen=True)
class ChannelBefore:
    """A VLAN that the switch did not translate. Attributes as in HairpinBefore."""

    switch: Switch
    key: str
    port: str
    before: str
    vlan: int


@register
@dataclass(frozen=True)
class TranslateVlan:
    """For a NIC of the edge mode channel. While it is not undone, the VLAN leads into the network of its guest."""

    action: ClassVar[str] = "switch-channel"
    tie: SwitchTie
    channel: PortChannel

    def describe(self) -> str:
        return f"translate {describe_channel(self.channel)} at port {self.tie.port} of switch {self.tie.switch.name}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        tie, key = self.tie, str(self.tie.key or "")
        with _as_host_error(self.describe()), opened(tie.switch, tie.key) as driver:
            return to_arguments(ChannelBefore(tie.switch, key, tie.port, driver.snapshot(tie.port), self.channel.vlan))

    def apply(self, host: HostRoot) -> None:
        with _as_host_error(self.describe()), _changing(self.tie.switch.name), opened(self.tie.switch, self.tie.key) as driver:
            driver.set_channel(self.tie.port, self.channel)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """Raises HostError if the switch cannot be reached: the next guest with this VLAN would be in the network too."""
        before = parse_arguments(ChannelBefore, arguments)
        what = f"end the translation of VLAN {before.vlan} at port {before.port} of switch {before.switch.name}"
        with (
            _as_host_error(what),
            _changing(before.switch.name),
            opened(before.switch, find_key(context.switch_key or before.key)) as driver,
        ):
            driver.remove_channel(before.port, before.vlan, before.before)


def is_translation(record: UndoRecord, switch: str) -> bool:
    """Whether it is of `TranslateVlan` at the switch of this name."""
    return record.action == TranslateVlan.action and parse_arguments(ChannelBefore, record.arguments).switch.name == switch


def has_translated(records: Iterable[UndoRecord], step: TranslateVlan) -> bool:
    """Whether one of the records is of this step."""
    found = [parse_arguments(ChannelBefore, record.arguments) for record in records if record.action == step.action]
    wanted = (step.tie.switch.name, step.tie.port, step.channel.vlan)
    return any((before.switch.name, before.port, before.vlan) == wanted for before in found)


def repeat_translation(step: TranslateVlan, is_wanted: Callable[[], bool]) -> bool:
    """Sets a translation again that its switch has lost; its undo record must exist. Returns whether it was set.

    ``is_wanted`` is called while no translation of the switch is undone: the guest may have ended meanwhile.
    Raises HostError.
    """
    tie = step.tie
    with _as_host_error(step.describe()), _changing(tie.switch.name), opened(tie.switch, tie.key) as driver:
        if not is_wanted():
            return False
        driver.set_channel(tie.port, step.channel)
    return True


def plan_translations(plan: Plan, find_tie: Callable[[str], SwitchTie | None]) -> list[TranslateVlan]:
    """None for an uplink without a configured switch. Raises HostError if the switch is not registered."""
    steps = []
    for nic in plan.nics:
        if nic.edge is EdgeMode.CHANNEL:
            with _as_host_error(f"translate VLAN {nic.vlan} of guest {plan.name}"):
                tie = find_tie(nic.interface)
            if tie:
                steps.append(TranslateVlan(tie, PortChannel(nic.vlan, str(nic.mac), nic.switch_vlan)))
    return steps


@contextmanager
def _as_host_error(what: str) -> Iterator[None]:
    try:
        yield
    except SwitchError as error:
        raise HostError(f"cannot {what}: {error.message}", error.hint) from None


def find_key(path: str) -> Path | None:
    return Path(path) if path else None
