"""A served manager on a fake host with guests in several states, for pictures and for tests of what people see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from orchestrator.api.backend import MeasureProofs
from orchestrator.host.exit_trace import EXITS
from orchestrator.model.proof import Proof, Verdict
from tests.fakes import tracing
from tests.fakes.server import IMAGE, Server
from tests.harness.api_server import Served, serve
from tests.harness.crash import World

GUESTS = ("web", "db", "batch", "idle")
HOSTILE = "</title><script>alert(1)</script>"
"""What a guest prints, and a proof quotes."""
_NPF, _MSR, _HLT = 0x400, 0x7C, 0x78  # arch/x86/include/uapi/asm/svm.h


def audit(_frames: int, *, host_only: bool = False, finding: str = f"thread 77 {HOSTILE} ran on CPU 8") -> tuple[Proof, ...]:
    """Of the guests ``web`` (all pass), ``db`` (one was not measured) and ``batch`` (one fails, with this finding)."""
    host = Proof("core-isolated", "host", Verdict.PASS, 0, "", ("nothing found",))
    if host_only:
        return (host,)
    passed = (Proof(name, "web", Verdict.PASS, 0, "", ("nothing found",)) for name in ("core-exclusive", "memory-locked"))
    return (
        *passed,
        Proof("core-exclusive", "db", Verdict.PASS, 0, "", ("nothing found",)),
        Proof("vepa", "db", Verdict.NOT_MEASURED, None, "frames", ("no frames were sent",)),
        Proof("core-exclusive", "batch", Verdict.FAIL, 1, "threads", (finding,)),
        host,
    )


@contextmanager
def serve_example(
    folder: Path, server: Server | None = None, guests: int = 0, settings: Mapping[str, object] | None = None,
    audit: MeasureProofs = audit,
) -> Iterator[Served]:  # fmt: skip
    """``guests``: further ones, of one core each. ``idle`` is stopped, and ``batch`` is suspended behind the manager's back."""
    world = World(folder / "world", server or Server(cores=16, nodes=2, vfs=7, pages=2048, disks=3))
    with serve(folder, settings, world=world, audit=audit) as served:
        for number, name in enumerate((*GUESTS, *(f"guest{number}" for number in range(guests)))):
            disks = [{"serial": "disk0"}] if name == "db" else []
            cores = number + 1 if name in GUESTS else 1
            served.client.create({"name": name, "image": IMAGE, "memory": "64M", "cores": cores, "disks": disks})
        served.client.kill("idle")
        world.hypervisor.suspend("batch")
        served.manager.reconciler.detect_drift()
        served.client.audit(0)
        set_activity(served, 0)
        yield served


def set_activity(served: Served, seconds: float) -> None:
    """As the kernel shows it after the vCPUs have run for so long: 1 ms/s of waiting, 12 exits/s."""
    host, counts = served.world.host, {}
    for guest in served.world.hypervisor.read_guests()[0]:
        for vcpu in guest.vcpus:
            times = f"{int(seconds * 0.9e9)} {int(seconds * 1e6)} {int(seconds * 10)}"
            host.add(f"proc/{guest.pid}/task/{vcpu.tid}/schedstat", times)
            counts |= {(vcpu.tid, _MSR): int(seconds * 10), (vcpu.tid, _HLT): int(seconds * 2), (vcpu.tid, _NPF): 100}
    host.add("sys/module/kvm_amd/parameters/avic", "N")
    tracing.show_hist(host, EXITS.folder, counts, 0)
