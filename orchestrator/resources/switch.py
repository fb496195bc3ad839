"""Sets reflective relay (hairpin) at a port of an external switch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from orchestrator.host.root import HostRoot
from orchestrator.model.event import utc_now
from orchestrator.model.switch import Switch
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments
from orchestrator.switches.drivers import opened


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
        with opened(self.switch, find_key(self.key)) as driver:
            driver.set_hairpin(self.port, on=self.on, macs=self.macs)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        before = parse_arguments(HairpinBefore, arguments)
        with opened(before.switch, find_key(context.switch_key or before.key)) as driver:
            driver.restore(before.port, before.before)


def find_key(path: str) -> Path | None:
    return Path(path) if path else None
