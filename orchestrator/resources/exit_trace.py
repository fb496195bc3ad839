"""Counts the VM exits of all guests by hardware reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.host.exit_trace import begin_counting, end_counting, is_counting
from orchestrator.host.root import HostRoot
from orchestrator.resources.step import Arguments, UndoContext, register


@register
@dataclass(frozen=True)
class CountExits:
    """Sets a trigger in the trace instance `nohype`. It counts on while the manager is restarted."""

    action: ClassVar[str] = "exit-trace"

    def describe(self) -> str:
        return "count VM exits by reason"

    def read_before(self, host: HostRoot) -> Arguments | None:
        return None if is_counting(host) else {}

    def apply(self, host: HostRoot) -> None:
        begin_counting(host)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op after a reboot."""
        end_counting(context.host)
