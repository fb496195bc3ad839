"""Whether the emulator still does its work. If it does not, the lab is lost, which says nothing about guests, proofs or tests."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.errors import LabError
from orchestrator.lab.lab import Lab, build_lost, execute, show_lines
from orchestrator.lab.paths import LabDir
from orchestrator.lab.qmp import ask_human

# Prints the CPUs on which a process does not get to run within 30 s. In the root control group, since those below keep to the
# housekeeping CPUs; in the background, since a process on a CPU that has stopped cannot even be killed.
_STUCK_CPUS = """echo 0 > /sys/fs/cgroup/cgroup.procs
folder=$(mktemp -d)
for cpu in $(seq 0 %d); do setsid taskset -c $cpu touch $folder/$cpu < /dev/null > /dev/null 2>&1 & done
for second in $(seq 30); do [ "$(ls $folder | wc -l)" = %d ] && break; sleep 1; done
for cpu in $(seq 0 %d); do [ -e $folder/$cpu ] || echo $cpu; done
rm -r $folder"""

# Prints the registers of all vCPUs of each guest, again and again. Under emulation one round takes some seconds by itself.
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
_LOOP = 64
"""Bytes. A loop that waits for a spinlock is a few instructions long."""


@dataclass(frozen=True)
class Reading:
    """Where a vCPU was: instruction pointer, flags, and whether it was halted."""

    rip: int
    flags: int
    halted: bool


def check_emulation(lab: Lab) -> None:
    """Looks whether each CPU of the lab host runs processes, and whether a guest hangs as only the emulator makes it hang.

    Raises:
        LabLost: a CPU of the lab host or a vCPU of a guest has stopped, or the lab is gone; with what the monitor says.
    """
    check_cpus(lab)
    check_guests(lab)


def check_cpus(lab: Lab) -> None:
    """Looks whether each CPU of the lab host still runs processes; one that does not makes anything fail.

    The emulator can stop a CPU by losing an interrupt (QEMU before 10.2).

    Raises:
        LabLost: as for ``check_emulation``.
    """
    cpus = lab.state.spec.cpus
    done = execute(lab, _STUCK_CPUS % (cpus - 1, cpus, cpus - 1), timeout=120)
    stuck = [int(word) for word in done.stdout.split()]
    if stuck:
        seen = "".join(_read_monitor(lab.folder, f"info lapic {cpu}") for cpu in stuck)
        why = f"its CPUs {', '.join(map(str, stuck))} do not run any more{show_lines(seen.splitlines())}"
        raise build_lost(lab.folder, lab.state, why)


def check_guests(lab: Lab) -> None:
    """Looks whether a vCPU of a guest spins at one place with interrupts off, as after a timer interrupt delivered twice.

    For use when a guest has not done what it should: a fault of the guest's own kernel can look the same.

    Raises:
        LabLost: as for ``check_emulation``.
    """
    done = execute(lab, _READ_REGISTERS, timeout=400)
    hung = find_hung(parse_registers(done.stdout))
    if hung:
        raise build_lost(lab.folder, lab.state, f"a guest hangs in the emulator{show_lines(hung)}")


def parse_registers(text: str) -> dict[tuple[str, int], tuple[Reading, ...]]:
    """Readings of each vCPU, by guest and vCPU, out of what `info registers -a` prints (QEMU, target/i386/cpu-dump.c)."""
    found: dict[tuple[str, int], tuple[Reading, ...]] = {}
    guest, vcpu = "", 0
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            guest = match[2]
        elif match := _CPU.match(line):
            vcpu = int(match[1])
        elif match := _PLACE.search(line):
            reading = Reading(int(match[1], 16), int(match[2], 16), match[3] == "1")
            found[guest, vcpu] = (*found.get((guest, vcpu), ()), reading)
    return found


def find_hung(readings: dict[tuple[str, int], tuple[Reading, ...]]) -> list[str]:
    """A line for each vCPU that was seen at one place, running, with interrupts off, in each of all samples."""
    hung = []
    for (guest, vcpu), seen in readings.items():
        places = [reading.rip for reading in seen]
        deaf = all(not reading.flags & _INTERRUPTS_ON and not reading.halted for reading in seen)
        if len(seen) >= _SAMPLES and deaf and max(places) - min(places) <= _LOOP:
            where = f"spins at RIP {places[-1]:#x} with interrupts off"
            hung.append(f"guest {guest}, vCPU {vcpu}: {where} ({len(seen)} of {len(seen)} samples)")
    return hung


def _read_monitor(folder: LabDir, line: str) -> str:
    with suppress(LabError):
        return ask_human(folder.qmp, line, timeout=3)
    return ""
