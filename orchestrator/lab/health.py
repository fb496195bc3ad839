"""Checks the emulator. If it has failed, the lab is lost: that is neither a pass nor a failure of guests, proofs or tests."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.errors import LabError
from orchestrator.lab.lab import Lab, build_lost, execute, format_lines
from orchestrator.lab.paths import LabDir
from orchestrator.lab.qmp import ask_human

# Prints the CPUs on which no process could run within 30 s. In the root control group, since the groups below it are confined to
# the housekeeping CPUs; in the background, since a process on a stopped CPU cannot even be killed.
_STUCK_CPUS = """echo 0 > /sys/fs/cgroup/cgroup.procs
folder=$(mktemp -d)
for cpu in $(seq 0 %d); do setsid taskset -c $cpu touch $folder/$cpu < /dev/null > /dev/null 2>&1 & done
for second in $(seq 30); do [ "$(ls $folder | wc -l)" = %d ] && break; sleep 1; done
for cpu in $(seq 0 %d); do [ -e $folder/$cpu ] || echo $cpu; done
rm -r $folder"""

# Prints the registers of all vCPUs of each guest, several times. Under emulation one round takes some seconds.
_SAMPLES = 5
_READ_REGISTERS = f"""for sample in $(seq {_SAMPLES}); do
  for id in $(timeout 20 virsh -q -c qemu:///system list --id); do
    echo "sample $sample guest $(timeout 20 virsh -q -c qemu:///system domname $id)"
    timeout 20 virsh -q -c qemu:///system qemu-monitor-command $id --hmp "info registers -a"
  done
  sleep 3
done"""
_SAMPLE = re.compile(r"^sample (\d+) guest (.*)$")
_CPU = re.compile(r"^CPU#(\d+)")
_PLACE = re.compile(r"\b[RE]IP=([0-9a-f]+) [RE]?FL=([0-9a-f]+)\b.*\bHLT=(\d)")
_INTERRUPTS_ON = 1 << 9  # RFLAGS.IF
_LOOP = 64  # bytes; a loop that waits for a spinlock has few instructions


@dataclass(frozen=True)
class Reading:
    rip: int
    flags: int
    halted: bool


def check_emulation(lab: Lab) -> None:
    """Raises LabLost if a CPU of the lab host or a vCPU of a guest has stopped, or if the lab does not respond."""
    check_cpus(lab)
    check_guests(lab)


def check_cpus(lab: Lab) -> None:
    """Raises LabLost if a CPU of the lab host runs no processes any more (QEMU before 10.2 can lose an interrupt)."""
    cpus = lab.state.spec.cpus
    done = execute(lab, _STUCK_CPUS % (cpus - 1, cpus, cpus - 1), timeout=120)
    stuck = [int(word) for word in done.stdout.split()]
    if stuck:
        seen = "".join(_read_monitor(lab.folder, f"info lapic {cpu}") for cpu in stuck)
        why = f"CPUs {', '.join(map(str, stuck))} stopped executing{format_lines(seen.splitlines())}"
        raise build_lost(lab.folder, lab.state, why)


def check_guests(lab: Lab) -> None:
    """Raises LabLost if a vCPU spins at one place with interrupts off, as after a timer interrupt that was delivered twice.

    Call it only after a guest has failed: a bug in the guest's kernel can look the same.
    """
    done = execute(lab, _READ_REGISTERS, timeout=400)
    hung = find_hung(parse_registers(done.stdout))
    if hung:
        raise build_lost(lab.folder, lab.state, f"a guest hangs in the emulator{format_lines(hung)}")


def parse_registers(text: str) -> dict[tuple[str, int], tuple[Reading, ...]]:
    """Readings per guest and vCPU from the output of `info registers -a` (QEMU, target/i386/cpu-dump.c)."""
    readings: dict[tuple[str, int], tuple[Reading, ...]] = {}
    guest, vcpu = "", 0
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            guest = match[2]
        elif match := _CPU.match(line):
            vcpu = int(match[1])
        elif match := _PLACE.search(line):
            reading = Reading(int(match[1], 16), int(match[2], 16), match[3] == "1")
            readings[guest, vcpu] = (*readings.get((guest, vcpu), ()), reading)
    return readings


def find_hung(readings: dict[tuple[str, int], tuple[Reading, ...]]) -> list[str]:
    """One line per vCPU that runs with interrupts off at one place in all samples."""
    hung = []
    for (guest, vcpu), samples in readings.items():
        places = [reading.rip for reading in samples]
        masked = all(not reading.flags & _INTERRUPTS_ON and not reading.halted for reading in samples)
        if len(samples) >= _SAMPLES and masked and max(places) - min(places) <= _LOOP:
            where = f"spins at RIP {places[-1]:#x} with interrupts off"
            hung.append(f"guest {guest}, vCPU {vcpu}: {where} ({len(samples)} of {len(samples)} samples)")
    return hung


def _read_monitor(folder: LabDir, line: str) -> str:
    with suppress(LabError):
        return ask_human(folder.qmp, line, timeout=3)
    return ""
