"""Counts the VM exits of all guests by hardware reason, and their calls that boot is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.host.disengagement import begin_listening, end_listening, is_listening
from orchestrator.host.exit_trace import begin_counting, end_counting, is_counting
from orchestrator.host.root import HostRoot
from orchestrator.resources.step import Arguments, UndoContext, register


@register
@dataclass(frozen=True)
class CountExits:
    """Sets triggers in the trace instance `nohype`. They count on while the manager is restarted."""

    action: ClassVar[str] = "exit-trace"

    def describe(self) -> str:
        return "count VM exits by reason"

    def read_before(self, host: HostRoot) -> Arguments | None:
        return None if is_counting(host) and is_listening(host) else {}

    def apply(self, host: HostRoot) -> None:
        begin_counting(host)
        begin_listening(host)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op after a reboot."""
        end_listening(context.host)
        end_counting(context.host)
