"""What the checks read, each thing once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from orchestrator.errors import HostError
from orchestrator.host.cpus import check_cmdline, read_present, survey_cores
from orchestrator.host.hugepages import survey_pools
from orchestrator.host.isolation import Division
from orchestrator.host.kvm import run_instruction
from orchestrator.host.processes import Thread, survey_threads
from orchestrator.host.processor import Processor, read_processors
from orchestrator.host.root import HostRoot
from orchestrator.host.run import Completed, run
from orchestrator.host.survey import read_topology
from orchestrator.model.topology import Core, PagePool, Topology
from orchestrator.values import CpuSet


def _execute(words: Sequence[str]) -> Completed:
    # virsh translates what it prints.
    return run(words, timeout=30, check=False, env={"LC_ALL": "C"})


@dataclass
class Facts:
    """``housekeeping``: CPUs that guests do not get; the first core if it is None. The functions raise OrchestratorError."""

    host: HostRoot
    chosen: CpuSet | None = None
    run_instruction: Callable[[], None] = run_instruction
    execute: Callable[[Sequence[str]], Completed] = field(default=_execute)
    silence: str = ""  # why libvirt cannot be asked again

    @cached_property
    def topology(self) -> Topology:
        return read_topology(self.host)

    # Cores, pools and command line are read without the rest of the survey, which a server without a PCI bus does not have.
    @cached_property
    def cores(self) -> tuple[Core, ...]:
        found, problems = survey_cores(self.host)
        if not found:
            raise HostError("no CPU of the server could be read", "; ".join(problem.message for problem in problems))
        return found

    @cached_property
    def pools(self) -> tuple[PagePool, ...]:
        return survey_pools(self.host)[0]

    @cached_property
    def cmdline(self) -> str:
        return check_cmdline(self.host)

    @cached_property
    def processors(self) -> tuple[Processor, ...]:
        found = read_processors(self.host)
        if not found:
            raise HostError("/proc/cpuinfo has no flags", "run this on a server with x86-64 processors")
        return found

    @cached_property
    def flags(self) -> frozenset[str]:
        """Features that all CPUs have."""
        return frozenset.intersection(*(processor.flags for processor in self.processors))

    @cached_property
    def threads(self) -> tuple[Thread, ...]:
        return survey_threads(self.host)[0]

    @property
    def shows_all_processes(self) -> bool:
        """Containers, and a /proc that hides the processes of others, show no kernel threads, which each host has."""
        return any(thread.kernel for thread in self.threads)

    def is_online(self, cpu: int) -> bool:
        return any(cpu in core.cpus for core in self.cores)

    def find_programs(self, *names: str) -> tuple[str, ...]:
        """Which of these programs run: by the names of their processes, of which the kernel keeps 15 characters."""
        running = {thread.name for thread in self.threads if thread.tid == thread.pid and not thread.kernel}
        return tuple(name for name in names if name[:15] in running)

    @property
    def housekeeping(self) -> CpuSet:
        if not self.chosen:
            return self.cores[0].cpus
        return CpuSet.of(cpu for core in self.cores if core.cpus.meets(self.chosen) for cpu in core.cpus.ids)

    @property
    def division(self) -> Division:
        every = read_present(self.host) or CpuSet.of(cpu for core in self.cores for cpu in core.cpus.ids)
        return Division(self.housekeeping, every - self.housekeeping, CpuSet())
