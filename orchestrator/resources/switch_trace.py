"""Counts the switches to threads on guest CPUs, with their names: the audit names threads that have ended since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.host.root import HostRoot
from orchestrator.host.switch_trace import begin_switches, end_switches, is_counting
from orchestrator.resources.step import Arguments, UndoContext, register
from orchestrator.values import CpuSet


@register
@dataclass(frozen=True)
class CountSwitches:
    """Sets a trigger in the trace instance of ``CountExits``. It counts on while the manager is restarted."""

    housekeeping: CpuSet
    action: ClassVar[str] = "switch-trace"

    def describe(self) -> str:
        return "count thread switches on guest CPUs"

    def read_before(self, host: HostRoot) -> Arguments | None:
        return None if is_counting(host, self.housekeeping) else {}

    def apply(self, host: HostRoot) -> None:
        begin_switches(host, self.housekeeping)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op after a reboot."""
        end_switches(context.host)
