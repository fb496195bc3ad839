"""The program that emulates labs: its patches, and why it exited."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

PROGRAM = "usr/bin/qemu-system-x86_64"
_RECORD = "emulator.json"


class PatchRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str  # row of patches.PATCHES
    symbol: str  # function that contains the patched place
    effect: str  # what happens in a lab without the patch
    applied: bool
    address: str | None = None  # virtual; None if the place was not found
    old: str | None = None  # bytes, hexadecimal
    new: str | None = None
    reason: str = ""  # why the patch was not applied

    def describe(self) -> str:
        if not self.applied:
            return f"not applied: {self.reason}"
        return f"applied in {self.symbol} at {self.address}: {self.old} replaced by {self.new}"


class EmulatorRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    build_id: str  # GNU build id, hexadecimal; empty if the program has none
    patches: tuple[PatchRecord, ...]

    def warning(self) -> str:
        """One line about the patches that are not applied; empty if all are applied."""
        missing = [f"{patch.name} ({patch.reason}; without it {patch.effect})" for patch in self.patches if not patch.applied]
        return f"warning: emulator patches not applied: {', '.join(missing)}" if missing else ""


def write_record(tools: Path, record: EmulatorRecord) -> None:
    (tools.parent / _RECORD).write_text(record.model_dump_json(indent=2) + "\n")


def read_record(tools: Path) -> EmulatorRecord | None:
    """None for a root that ``build_tools`` did not build."""
    try:
        return EmulatorRecord.model_validate_json((tools.parent / _RECORD).read_text())
    except (OSError, ValidationError):
        return None


def describe_end(status: int, log: Sequence[str]) -> str:
    """Why QEMU exited. ``status`` is as in ``Popen.returncode``: negative for a signal."""
    if status == 0:  # -no-reboot: QEMU exits when the machine powers off, reboots or panics
        return "QEMU exited: the lab host powered off, rebooted or panicked"
    if status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        return f"QEMU was killed by {signal.Signals(-status).name}, sent by a user or by the kernel when out of memory"
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    output = "; ".join(log[-3:]) or "none"
    return f"the emulator failed, not the lab host: QEMU {how}; last output: {output}"
