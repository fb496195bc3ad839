"""Counts the VM exits of all guests by hardware reason, their accesses to emulated devices, and their calls that boot is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.host.exit_trace import begin_counting, end_counting, is_counting
from orchestrator.host.histogram import INSTANCE, begin_counter, end_counter, is_counted
from orchestrator.host.root import HostRoot
from orchestrator.host.thread_counts import COUNTERS
from orchestrator.resources.step import Arguments, UndoContext, register


@register
@dataclass(frozen=True)
class CountExits:
    """Sets triggers in the trace instance `nohype`. They count on while the manager is restarted."""

    action: ClassVar[str] = "exit-trace"

    def describe(self) -> str:
        return "count VM exits by reason"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """Which counters are set. The undo ignores it: it shows `try_steps` whether a step that failed has changed something."""
        counted = {counter.event: is_counted(host, counter) for counter in COUNTERS}
        instance = host.exists(INSTANCE)
        return None if is_counting(host) and all(counted.values()) else {"instance": instance, **counted}

    def apply(self, host: HostRoot) -> None:
        begin_counting(host)
        for counter in COUNTERS:
            begin_counter(host, counter)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op after a reboot."""
        for counter in COUNTERS:
            end_counter(context.host, counter)
        end_counting(context.host)
