"""Kernel settings that keep unbound work, new interrupts and watchdogs off guest cores while there are guests."""

from __future__ import annotations

from dataclasses import dataclass
from errno import ENOENT
from typing import ClassVar

from orchestrator.errors import HostError
from orchestrator.host.cpus import parse_cpus
from orchestrator.host.isolation import Division, Notation, Owner, Without, read_settings, write_cpus, write_text
from orchestrator.host.partitions import add_exclusive, exclusive_file, require_exclusive
from orchestrator.host.root import HostRoot
from orchestrator.host.tuned import find_tuned
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments
from orchestrator.values import CpuSet


@dataclass(frozen=True)
class CpusBefore:
    """A setting and its text before the change, and the CPUs that were written. They detect a later change by another program."""

    file: str
    notation: Notation
    text: str
    written: CpuSet


@register
@dataclass(frozen=True)
class SetCpus:
    """Writes CPUs to a file of the kernel."""

    action: ClassVar[str] = "kernel-cpus"
    file: str
    notation: Notation
    cpus: CpuSet

    def describe(self) -> str:
        return f"set /{self.file} to CPUs {self.cpus}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        text = host.find(self.file)
        if text is None or self.notation.parse_file(self.file, text) == self.cpus:
            return None
        return to_arguments(CpusBefore(self.file, self.notation, text, self.cpus))

    def apply(self, host: HostRoot) -> None:
        write_cpus(host, self.file, self.notation, self.cpus)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> str | None:
        """Leaves the value that another program has set in the meantime, or a reboot."""
        host, before = context.host, parse_arguments(CpusBefore, arguments)
        text = host.find(before.file)
        if text is None or text == before.text:
            return None
        actual = before.notation.parse_file(before.file, text)
        if actual != before.written:
            wanted = before.notation.parse_file(before.file, before.text)
            return None if actual == wanted else f"/{before.file} is {text}, set by another program: it was {before.text}"
        write_text(host, before.file, before.text or "\n")
        if (text := host.read(before.file)) != before.text:
            raise HostError(f"/{before.file}: requested {before.text}, kernel set {text}")
        return None


@dataclass(frozen=True)
class CpusAdded:
    file: str
    cpus: CpuSet


@register
@dataclass(frozen=True)
class AddExclusive:
    """Adds CPUs to those that a control group has exclusively. The group may end with its last guest, and be made anew empty."""

    action: ClassVar[str] = "exclusive-cpus"
    cgroup: str
    cpus: CpuSet

    def describe(self) -> str:
        return f"give control group /{self.cgroup} the CPUs {self.cpus} exclusively"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """Raises HostError if the kernel is too old."""
        missing = self.cpus - require_exclusive(host, self.cgroup)
        return to_arguments(CpusAdded(exclusive_file(self.cgroup), missing)) if missing else None

    def apply(self, host: HostRoot) -> None:
        add_exclusive(host, self.cgroup, self.cpus)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """Leaves all CPUs that the manager has not added."""
        host, added = context.host, parse_arguments(CpusAdded, arguments)
        text = host.find(added.file)
        if text is None or not (now := parse_cpus(added.file, text)).meets(added.cpus):
            return
        write_text(host, added.file, str(now - added.cpus) or "\n")
        if (left := parse_cpus(added.file, host.read(added.file))).meets(added.cpus):
            raise HostError(f"/{added.file}: requested CPUs {now - added.cpus}, kernel set {left}")


@dataclass(frozen=True)
class Isolation:
    steps: tuple[SetCpus, ...]
    left: tuple[str, ...]  # one sentence per setting that is left as it is


def plan_isolation_settings(host: HostRoot, division: Division) -> Isolation:
    """The changes of the manager's settings that keep the kernel off the guest CPUs. Writes nothing.

    A setting that already has no guest CPU stays, whatever other CPUs it has.
    """
    steps: list[SetCpus] = []
    left: list[str] = []
    tuned = None
    try:
        tuned = find_tuned(host)
    except HostError as error:
        # Whether tuned would set the values back is unknown: they are set, and the audit names each that does not stay.
        left.append(f"profile of tuned: {error.message}")
    for reading in read_settings(host, Owner.MANAGER):
        setting, rule = reading.setting, reading.setting.wanted
        if reading.problem:
            left.append(f"{setting.name}: {reading.problem}")
        if reading.text is None or not isinstance(rule, Without):
            continue
        try:
            wanted = reading.is_wanted(division)
        except HostError as error:
            left.append(error.message)
            continue
        if wanted:
            continue
        if tuned and tuned.sets(setting):
            left.append(f"{setting.name} is {reading.text}: {tuned} sets it, so the manager does not")
            continue
        steps.append(SetCpus(setting.file, rule.notation, division.housekeeping))
    return Isolation(tuple(steps), tuple(left))


def describe_failure(step: SetCpus, error: HostError) -> str | None:
    """One sentence for a change that failed; None if its file has gone."""
    if error.errno == ENOENT:
        return None
    return f"/{step.file}: {error.message}" + (f" ({error.hint})" if error.hint else "")
