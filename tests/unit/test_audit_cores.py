"""core-exclusive, core-smt, manager-core: they pass on a sound lab host, and fail for each way in which it can be unsound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.audit.cores import find_ambiguous_threads, prove_core_exclusive, prove_core_smt, prove_manager_core
from orchestrator.host.irqs import Irq
from orchestrator.host.processes import Thread
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import WEAKER, Measurement, Verdict
from orchestrator.model.topology import Core, Topology
from orchestrator.values import CpuSet
from tests.harness.audit_data import GUEST1, GUEST2, GUESTS, HOUSEKEEPING, MANAGERS, TOPOLOGY, load_last_runs, load_threads

Change = Callable[[Thread], Thread]
RUNS = load_last_runs()
GUEST1_START = 2706.02


def change(name: str, **values: object) -> tuple[Thread, ...]:
    """The host's threads, with all of one name (or the vCPUs of guest1) changed."""
    found = [thread for thread in load_threads() if thread.name == name or (name == "vCPU 0" and thread.tid == 4955)]
    assert found, f"no thread {name} in the data"
    return tuple(replace(thread, **values) if thread in found else thread for thread in load_threads())  # type: ignore[arg-type]


def exclusive(threads: tuple[Thread, ...], guest: RunningGuest = GUEST1, runs: dict[int, float | None] = RUNS) -> Measurement:
    return prove_core_exclusive(guest, threads, TOPOLOGY, runs)


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_sound_host_passes(guest: RunningGuest) -> None:
    proof = exclusive(load_threads(), guest)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence


def test_evidence_names_the_kernels_own_threads_and_what_was_excused() -> None:
    evidence = "\n".join(exclusive(load_threads(), GUEST2).evidence)
    assert "200 threads of 163 processes" in evidence
    assert "per-CPU kernel threads, unmovable: cpuhp 2, idle_inject 2, ksoftirqd 2, kworker 7, migration 2" in evidence
    assert "last ran here before the guest started: kswapd1" in evidence
    assert "since confined to other CPUs: kvm-nx-lpage-re" in evidence


@pytest.mark.parametrize("allowed", ["2", "0-7", "1-3", "3,7"])
def test_thread_that_may_run_on_a_guest_core_fails(allowed: str) -> None:
    proof = exclusive(change("virtlogd", allowed=CpuSet.parse(allowed)))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert "virtlogd (491) may run on CPU" in proof.evidence[0]


def test_busy_process_on_an_idle_smt_sibling_fails() -> None:
    """The sibling of a pinned CPU is the guest's too, though no vCPU of it runs there."""
    one_vcpu = replace(GUEST1, vcpus=GUEST1.vcpus[:1])
    threads = tuple(thread for thread in change("virtlogd", allowed=CpuSet.parse("3"), last_cpu=3) if thread.tid != 4956)
    assert exclusive(threads, one_vcpu).verdict == Verdict.FAIL


def test_movable_kernel_thread_fails() -> None:
    proof = exclusive(change("kcompactd0", allowed=CpuSet.parse("0-3")))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)


def test_unbound_worker_fails_since_the_workqueue_cpumask_moves_it() -> None:
    threads = load_threads()
    worker = next(thread for thread in threads if thread.name.startswith("kworker/u"))
    assert worker.pinned_by_kernel
    assert exclusive(change(worker.name, allowed=CpuSet.parse("0-7"))).verdict == Verdict.FAIL


def test_rescuer_passes_until_it_ran_on_a_guest_core() -> None:
    name = "kworker/R-rcu_gp"
    assert next(thread for thread in load_threads() if thread.name == name).allowed == CpuSet.parse("0-7")
    threads = change(name, last_cpu=2)
    assert name in [thread.name for thread in find_ambiguous_threads(GUESTS, threads, TOPOLOGY)]
    tid = next(thread.tid for thread in threads if thread.name == name)
    assert exclusive(threads).verdict == Verdict.PASS, "it ran there when the host booted, long before the guest"
    assert exclusive(threads, runs={**RUNS, tid: GUEST1_START + 1}).verdict == Verdict.FAIL
    assert exclusive(threads, runs={**RUNS, tid: None}).verdict == Verdict.FAIL


def test_confined_thread_that_last_ran_on_the_core_after_the_start_fails() -> None:
    threads = change("virtlogd", last_cpu=3)
    assert exclusive(threads, runs={**RUNS, 491: GUEST1_START - 1}).verdict == Verdict.PASS
    proof = exclusive(threads, runs={**RUNS, 491: GUEST1_START + 7.5})
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert "last ran on CPU 3, no later than 7.5 s after the guest started" in proof.evidence[0]
    assert exclusive(threads, runs={}).verdict == Verdict.FAIL, "a time that is not known is no excuse"


@pytest.mark.parametrize(("seconds", "verdict"), [(20, Verdict.PASS), (61, Verdict.FAIL)])
def test_helper_of_the_guests_own_qemu_is_excused_while_it_is_set_up(seconds: int, verdict: Verdict) -> None:
    helper = next(thread for thread in load_threads() if thread.name == "kvm-nx-lpage-re" and thread.pid == GUEST1.pid)
    assert (helper.last_cpu, helper.allowed) == (2, HOUSEKEEPING)
    assert exclusive(load_threads(), runs={**RUNS, helper.tid: GUEST1_START + seconds}).verdict == verdict


def test_helper_that_was_not_moved_fails() -> None:
    """As QEMU and kernel 6.12 leave it: born in vcpu0's cgroup, on the guest's core."""
    threads = change("kvm-nx-lpage-re", allowed=CpuSet.parse("2"))
    assert "kvm-nx-lpage-re (4958 of process 4944) may run on CPU 2" in exclusive(threads).evidence[0]


def test_vcpu_thread_with_a_wider_affinity_than_its_pin_fails() -> None:
    proof = exclusive(change("vCPU 0", allowed=CpuSet.parse("2-3")))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert "may run on 2-3, expected 2" in proof.evidence[0]


def test_vcpu_thread_that_ran_elsewhere_fails() -> None:
    assert exclusive(change("vCPU 0", last_cpu=1)).verdict == Verdict.FAIL


def test_unpinned_vcpu_fails() -> None:
    vcpus = tuple(replace(vcpu, pin=CpuSet.parse("0-7")) for vcpu in GUEST1.vcpus)
    proof = exclusive(load_threads(), replace(GUEST1, vcpus=vcpus))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 2)


def test_two_vcpus_on_one_cpu_fail() -> None:
    vcpus = tuple(replace(vcpu, pin=CpuSet.parse("2")) for vcpu in GUEST1.vcpus)
    threads = tuple(
        replace(thread, allowed=CpuSet.parse("2"), last_cpu=2) if thread.tid == 4956 else thread for thread in load_threads()
    )
    assert exclusive(threads, replace(GUEST1, vcpus=vcpus)).verdict == Verdict.FAIL


def test_vcpu_of_another_guest_on_the_core_fails() -> None:
    assert exclusive(change("CPU 0/KVM", allowed=CpuSet.parse("2"), last_cpu=2)).figure == 1


def test_guest_that_ended_meanwhile_is_not_measured() -> None:
    threads = tuple(thread for thread in load_threads() if thread.pid != GUEST1.pid)
    assert exclusive(threads).verdict == Verdict.NOT_MEASURED


def test_smt_passes_on_sound_host() -> None:
    for guest in GUESTS:
        proof = prove_core_smt(guest, GUESTS, load_threads(), TOPOLOGY, HOUSEKEEPING)
        assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)


def repin(guest: RunningGuest, *cpus: int) -> RunningGuest:
    vcpus = tuple(replace(vcpu, pin=CpuSet.of((cpu,))) for vcpu, cpu in zip(guest.vcpus, cpus, strict=False))
    return replace(guest, vcpus=vcpus)


@pytest.mark.parametrize("tid", [4977, 4967])
def test_smt_sibling_that_another_guest_may_use_fails(tid: int) -> None:
    """Its vCPU, or QEMU's helper threads for it."""
    moved = tuple(replace(thread, allowed=CpuSet.parse("3")) if thread.tid == tid else thread for thread in load_threads())
    proof = prove_core_smt(
        repin(GUEST1, 2), GUESTS, tuple(thread for thread in moved if thread.tid != 4956), TOPOLOGY, HOUSEKEEPING
    )
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert "core 2-3: 1 threads of guest guest2 may run on CPU 3" in proof.evidence


def test_smt_sibling_for_housekeeping_fails() -> None:
    guest = repin(GUEST1, 1)
    assert prove_core_smt(guest, (guest,), load_threads(), TOPOLOGY, CpuSet.parse("0")).verdict == Verdict.FAIL


@pytest.mark.parametrize("vcpus", ["unpinned", "ended"])
def test_smt_without_cores_or_threads_is_not_measured(vcpus: str) -> None:
    unpinned = replace(GUEST1, vcpus=tuple(replace(vcpu, pin=CpuSet.parse("0-7")) for vcpu in GUEST1.vcpus))
    guest, threads = (unpinned, load_threads()) if vcpus == "unpinned" else (GUEST1, load_threads()[:100])
    assert prove_core_smt(guest, (guest,), threads, TOPOLOGY, HOUSEKEEPING).verdict == Verdict.NOT_MEASURED


def test_smt_says_when_there_are_no_siblings() -> None:
    single = replace(TOPOLOGY, cores=tuple(Core(CpuSet.of((cpu,)), 0, 0) for cpu in range(8)))
    proof = prove_core_smt(GUEST1, GUESTS, load_threads(), single, HOUSEKEEPING)
    assert proof.verdict == Verdict.PASS
    assert "no sibling to share" in proof.evidence[0]


def manager(
    threads: tuple[Thread, ...],
    managers: dict[str, tuple[int, ...]] = MANAGERS,
    guests: tuple[RunningGuest, ...] = GUESTS,
    housekeeping: CpuSet = HOUSEKEEPING,
    topology: Topology = TOPOLOGY,
) -> Measurement:
    return prove_manager_core(managers, guests, threads, topology, housekeeping, RUNS)


def test_manager_passes_on_sound_host() -> None:
    proof = manager(load_threads())
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert "nohyped.service: 1 threads of process 4935" in proof.evidence
    assert "virtqemud.service: not running" in proof.evidence


@pytest.mark.parametrize("name", ["rpc-libvirtd", "virtlogd", "IO mon_iothread", "kvm-pit/4944"])
def test_stray_thread_fails(name: str) -> None:
    proof = manager(change(name, allowed=CpuSet.parse("6")))
    assert proof.verdict == Verdict.FAIL
    assert name in proof.evidence[0]


def test_manager_itself_off_housekeeping_fails() -> None:
    threads = tuple(
        replace(thread, allowed=CpuSet.parse("0-7"), last_cpu=6) if thread.pid == 4935 else thread for thread in load_threads()
    )
    assert manager(threads).figure == 1


def test_manager_thread_that_ran_elsewhere_fails() -> None:
    assert manager(change("virtlogd", last_cpu=6)).verdict == Verdict.FAIL


def test_manager_that_does_not_run_is_not_measured() -> None:
    assert manager(load_threads(), {**MANAGERS, "nohyped.service": ()}).verdict == Verdict.NOT_MEASURED


def test_housekeeping_that_is_a_guests_core_fails() -> None:
    assert manager(load_threads(), housekeeping=CpuSet.parse("0-2")).verdict == Verdict.FAIL


def test_interrupts_that_may_reach_the_core_limit_the_proof() -> None:
    def irq(number: int, name: str, affinity: str, effective: str = "", problem: str = "") -> Irq:
        return Irq(number, name, CpuSet.parse(affinity), CpuSet.parse(effective), problem)

    irqs = (
        irq(7, "nic1-TxRx-63", "0-7", "2"), irq(8, "nvme0q3", "3"), irq(9, "moved", "0-1", "0"), irq(10, "", "0-7", "2"),
        irq(11, "elsewhere", "0-7", "0"), irq(12, "odd", "", "", "cannot read /proc/irq/12/smp_affinity_list"),
    )  # fmt: skip
    proof = prove_core_exclusive(GUEST1, load_threads(), TOPOLOGY, RUNS, irqs)
    assert proof.verdict == Verdict.PASS
    unread, near = (line for line in proof.evidence if line.startswith(WEAKER))
    assert "2 interrupts may be sent to CPUs 2-3" in near
    assert near.endswith("7 (nic1-TxRx-63), 8 (nvme0q3)")
    assert "interrupt 12 (odd): cannot read" in unread
