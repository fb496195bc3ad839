"""Interrupts: where they go, where they can be sent, and which the kernel keeps for itself."""

from __future__ import annotations

from errno import EINVAL, EIO, ENOENT, EPERM

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cpus import read_online
from orchestrator.host.irqs import MANAGED, Irq, read_irqs, set_irq_affinity
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import PhysicalFunction
from orchestrator.values import CpuSet
from tests.fakes.root import FakeRoot


def nic_irq(host: HostRoot, pf: PhysicalFunction) -> Irq:
    """One of the PF's own interrupts; a NIC's can be moved."""
    return next(irq for irq in read_irqs(host) if pf.interface and irq.name.startswith(pf.interface))


def read_irq(host: HostRoot, number: int) -> Irq:
    """The interrupt as it is now."""
    return next(irq for irq in read_irqs(host) if irq.number == number)


def is_managed(host: HostRoot, irq: Irq) -> bool:
    """Whether the kernel refuses even what is there already."""
    try:
        set_irq_affinity(host, irq.number, irq.affinity)
    except HostError as error:
        return error.errno in MANAGED
    return False


def test_interrupts_come_in_order_and_go_to_possible_cpus(host: HostRoot) -> None:
    irqs = read_irqs(host)
    possible = CpuSet.parse(host.read("sys/devices/system/cpu/possible"))
    assert [irq.number for irq in irqs] == sorted({irq.number for irq in irqs})
    assert all(irq.affinity and irq.affinity <= possible for irq in irqs)
    assert any(irq.name for irq in irqs)
    # Not "within affinity": one that was sent elsewhere moves only when it next fires.
    assert all(irq.effective <= possible for irq in irqs)


def test_an_interrupt_is_sent_to_one_cpu(host: HostRoot, pf: PhysicalFunction) -> None:
    before = nic_irq(host, pf)
    target = CpuSet.of([max(read_online(host))])
    assert before.affinity != target
    set_irq_affinity(host, before.number, target)
    try:
        assert read_irq(host, before.number).affinity == target
    finally:
        set_irq_affinity(host, before.number, before.affinity)
    assert read_irq(host, before.number).affinity == before.affinity


def test_a_managed_interrupt_is_refused_and_stays(host: HostRoot) -> None:
    managed = next(irq for irq in read_irqs(host) if irq.name and is_managed(host, irq))
    with pytest.raises(HostError, match=f"interrupt {managed.number} to CPUs 0.*\n.*managed_irq") as caught:
        set_irq_affinity(host, managed.number, CpuSet.of([0]))
    assert caught.value.errno in MANAGED
    assert read_irq(host, managed.number).affinity == managed.affinity


@pytest.mark.parametrize("number", [EIO, EPERM])
def test_kernels_before_and_after_6_12_name_managed_interrupts_differently(fake: FakeRoot, number: int) -> None:
    fake.write_errors["proc/irq/39/smp_affinity_list"] = number
    with pytest.raises(HostError, match="managed_irq") as caught:
        set_irq_affinity(fake, 39, CpuSet.of([0]))
    assert caught.value.errno == number
    assert number in MANAGED


def test_no_cpu_that_is_online_is_an_error(host: HostRoot, pf: PhysicalFunction) -> None:
    before = nic_irq(host, pf)
    offline = CpuSet.of([max(read_online(host)) + 1])
    with pytest.raises(HostError, match=str(offline)) as caught:
        set_irq_affinity(host, before.number, offline)
    # Above nr_cpu_ids the list cannot even be parsed: EINVAL up to 5.x, and EOVERFLOW or ERANGE from bitmap_parselist() since.
    assert caught.value.errno == EINVAL or not isinstance(host, FakeRoot)
    assert read_irq(host, before.number).affinity == before.affinity


def test_no_such_interrupt(host: HostRoot) -> None:
    with pytest.raises(HostError, match="interrupt 9999") as caught:
        set_irq_affinity(host, 9999, CpuSet.of([0]))
    assert caught.value.errno == ENOENT


def test_an_interrupt_that_went_away_is_left_out(fake: FakeRoot) -> None:
    (fake.path / "proc/irq/39/smp_affinity_list").unlink()
    assert 39 not in [irq.number for irq in read_irqs(fake)]


def test_other_cpus_than_asked_for_are_an_error_with_both_sets(fake: FakeRoot) -> None:
    class Stubborn(FakeRoot):
        def write(self, name: str, value: str) -> None:
            """Takes the write, and does something else."""

    with pytest.raises(HostError, match="39: requested CPUs 7, kernel set 0-1"):
        set_irq_affinity(Stubborn(fake.path), 39, CpuSet.of([7]))
