"""What had happened on a guest's cores when the guest was started: the audit subtracts it from what it reads. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Switches:
    """How often the scheduler switched to a thread, which may have ended since."""

    tid: int
    name: str  # characters that cannot be printed are "?"
    count: int


@dataclass(frozen=True)
class CoreStart:
    """Counters of a guest's CPUs, summed over them, right after its vCPUs were let run.

    Attributes:
        boot: id of the host's boot; the counters begin anew with each.
        pid: of QEMU; with ``started`` it identifies one run of the guest.
        started: when QEMU was started, in seconds after boot.
        time: when the counters were read, in seconds after boot.
        at_launch: False if they were read later, by a manager that has adopted the guest.
        slices: time slices of all threads; None on a kernel that does not count them.
        switches: None if the kernel could not count them; ``why`` has the reason.
    """

    boot: str
    pid: int
    started: float
    time: float
    at_launch: bool
    interrupts: dict[str, int]
    softirqs: dict[str, int]
    slices: int | None
    switches: tuple[Switches, ...] | None
    why: str = ""

    @property
    def run(self) -> tuple[str, int, float]:
        """Identifies one run of the guest: boot, process, and the start of the process."""
        return self.boot, self.pid, self.started
