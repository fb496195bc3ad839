"""Which program emulates labs, what was patched in it, and what its end means."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

PROGRAM = "usr/bin/qemu-system-x86_64"
_RECORD = "emulator.json"


class PatchRecord(BaseModel):
    """What became of one patch.

    Attributes:
        name: row of ``patches.PATCHES``.
        symbol: function that contains the place.
        effect: what happens in a lab without the patch.
        applied: whether the place was replaced.
        address: virtual address of the place in the program; None if it was not found.
        old, new: the bytes there, hexadecimal; None likewise.
        reason: why the patch was not applied; empty if it was.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    symbol: str
    effect: str
    applied: bool
    address: str | None = None
    old: str | None = None
    new: str | None = None
    reason: str = ""

    def describe(self) -> str:
        """What was done, for a user."""
        if not self.applied:
            return f"not applied: {self.reason}"
        return f"applied in {self.symbol} at {self.address}: {self.old} is {self.new}"


class EmulatorRecord(BaseModel):
    """The program that emulates labs: its GNU build id (hexadecimal, empty if it has none) and what became of each patch."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    build_id: str
    patches: tuple[PatchRecord, ...]

    def warning(self) -> str:
        """One line about the patches that are not applied; empty if all are."""
        missing = [f"{patch.name} ({patch.reason}; without it {patch.effect})" for patch in self.patches if not patch.applied]
        return f"warning: the emulator is used without the patch {', '.join(missing)}" if missing else ""


def write_record(tools: Path, record: EmulatorRecord) -> None:
    """Keeps the record beside the tools root, where ``read_record`` finds it."""
    (tools.parent / _RECORD).write_text(record.model_dump_json(indent=2) + "\n")


def read_record(tools: Path) -> EmulatorRecord | None:
    """The record of a tools root; None for a root that was not made by ``build_tools``."""
    try:
        return EmulatorRecord.model_validate_json((tools.parent / _RECORD).read_text())
    except (OSError, ValidationError):
        return None


def describe_end(status: int, log: Sequence[str]) -> str:
    """Says why QEMU ended by itself.

    Args:
        status: as ``Popen.returncode`` has it: negative for a signal.
        log: the last lines that QEMU printed.
    """
    if status == 0:  # with -no-reboot QEMU ends so when the machine powers off, reboots or panics
        return "QEMU ended: the lab host powered off, rebooted or panicked"
    if status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        return f"QEMU ended: it got {signal.Signals(-status).name}, from a user or from the kernel for want of memory"
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    words = "; ".join(log[-3:]) or "it printed nothing"
    return f"the emulator failed: QEMU ended {how}, which says nothing about the lab host; its last words: {words}"
