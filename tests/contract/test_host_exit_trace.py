"""VM exits counted by the kernel in a trace instance."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from orchestrator.errors import HostError
from orchestrator.host.exit_trace import (
    begin_counting,
    end_counting,
    is_counting,
    make_room,
    name_reason,
    parse_reasons,
    read_counts,
    read_reasons,
)
from orchestrator.host.histogram import INSTANCE
from orchestrator.host.root import HostRoot
from orchestrator.resources.exit_trace import CountExits
from orchestrator.resources.step import UndoContext
from tests.fakes import tracing
from tests.fakes.root import FakeRoot

EXIT = f"{INSTANCE}/events/kvm/kvm_exit"


@pytest.fixture
def traced(host: HostRoot) -> Iterator[HostRoot]:
    """A host that counts no exits, before and after."""
    if not host.exists("sys/kernel/tracing/events/kvm/kvm_exit"):
        pytest.skip("the module kvm is not loaded, or tracefs is not mounted")
    yield host
    end_counting(host)


def test_counting_begins_and_ends(traced: HostRoot) -> None:
    assert not is_counting(traced)
    begin_counting(traced)
    assert is_counting(traced)
    counts = read_counts(traced)
    assert counts.dropped == 0
    end_counting(traced)
    assert not traced.exists(INSTANCE)
    end_counting(traced)


def test_begin_is_repeatable(traced: HostRoot) -> None:
    for _ in range(2):
        begin_counting(traced)
    assert is_counting(traced)


def test_instance_without_trigger_is_completed(traced: HostRoot) -> None:
    """As a manager leaves it that is killed between the two."""
    traced.make_folder(INSTANCE)
    assert not is_counting(traced)
    begin_counting(traced)
    assert is_counting(traced)


def test_step_has_an_undo_only_if_it_changes_something(traced: HostRoot) -> None:
    step = CountExits()
    before = step.read_before(traced)
    assert before is not None
    step.apply(traced)
    assert step.read_before(traced) is None
    for arguments in (before, {}):  # the second as of an earlier version
        CountExits.undo(UndoContext(traced), arguments)
        assert not traced.exists(INSTANCE)


def test_trigger_with_an_unknown_field_is_refused(traced: HostRoot) -> None:
    begin_counting(traced)
    with pytest.raises(HostError) as caught:
        traced.write(f"{EXIT}/trigger", "hist:keys=common_pid,nonsense")
    assert caught.value.errno == errno.EINVAL
    assert is_counting(traced)


def test_folders_elsewhere_are_refused(traced: HostRoot) -> None:
    with pytest.raises(HostError):
        traced.make_folder("sys/kernel/tracing/nohype")


def test_reasons_have_kvms_names(traced: HostRoot) -> None:
    vmx, svm = parse_reasons(traced.read("sys/kernel/tracing/events/kvm/kvm_exit/format"))
    assert (vmx[12], vmx[30], vmx[48], svm[0x78], svm[0x7B], svm[0x400]) == (
        "HLT",
        "IO_INSTRUCTION",
        "EPT_VIOLATION",
        "hlt",
        "io",
        "npf",
    )
    assert svm[0x40 + 14] == "PF excp"
    assert svm[0xFFFF_FFFF] == "invalid_guest_state"
    assert read_reasons(traced) in (vmx, svm)


def test_reason_without_a_name_is_shown_as_a_number() -> None:
    assert name_reason(0x555, {}) == "reason 0x555"
    assert name_reason(0x8000_0021, {0x21: "INVALID_STATE"}) == "INVALID_STATE (failed entry)"


def test_vendor_decides_the_names(fake: FakeRoot) -> None:
    assert read_reasons(fake)[12] == "HLT"
    fake.add("sys/module/kvm_amd/parameters/avic", "N")
    assert read_reasons(fake)[0x78] == "hlt"


def test_counts_are_read_per_thread(fake: FakeRoot) -> None:
    fake.add("sys/module/kvm_amd/parameters/avic", "N")
    begin_counting(fake)
    tracing.show_hist(fake, EXIT, {(71, 0x7C): 418, (71, 0x60): 233, (72, 0x78): 5, (72, 0x555): 1}, 3)
    counts = read_counts(fake)
    assert counts.threads == {71: {"msr": 418, "interrupt": 233}, 72: {"hlt": 5, "reason 0x555": 1}}
    assert counts.dropped == 3


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.EPERM, "locked down"), (errno.EACCES, "cannot create"), (errno.ENOSPC, "cannot create")],
)  # fmt: skip
def test_instance_that_is_refused_says_why(fake: FakeRoot, number: int, text: str) -> None:
    fake.write_errors[INSTANCE] = number
    with pytest.raises(HostError, match=text) as caught:
        begin_counting(fake)
    assert caught.value.errno == number


@pytest.mark.parametrize("missing", ["kvm", "tracefs"])
def test_what_is_missing_is_named_and_nothing_is_left(fake: FakeRoot, missing: str) -> None:
    if missing == "kvm":
        (fake.path / "sys/kernel/tracing/events/kvm/kvm_exit/format").unlink()
        (fake.path / "sys/kernel/tracing/events/kvm/kvm_exit").rmdir()
    else:
        (fake.path / "sys/kernel/tracing/instances").rmdir()
    with pytest.raises(HostError, match="tracepoint kvm:kvm_exit" if missing == "kvm" else "not mounted"):
        begin_counting(fake)
    assert not fake.exists(INSTANCE)


def test_trigger_that_is_refused_leaves_nothing(fake: FakeRoot) -> None:
    fake.write_errors[f"{EXIT}/trigger"] = errno.EINVAL
    with pytest.raises(HostError, match="CONFIG_HIST_TRIGGERS"):
        begin_counting(fake)
    assert not fake.exists(INSTANCE)


@pytest.mark.parametrize("text", ["", "format: something else", 'print fmt: __print_symbolic(REC->exit_reason, { 1, "a" }), 1'])
def test_other_formats_are_refused(text: str) -> None:
    with pytest.raises(HostError, match="tables of exit reasons"):
        parse_reasons(text)


def test_histogram_that_cannot_be_read_is_an_error(fake: FakeRoot) -> None:
    begin_counting(fake)
    fake.add(f"{EXIT}/hist", "nothing of the kind")
    with pytest.raises(HostError, match="no totals"):
        read_counts(fake)


@pytest.mark.parametrize(("ended", "running", "anew"), [(410, 10, True), (399, 10, False), (400, 410, False), (0, 819, False)])
def test_full_histogram_begins_anew_if_most_threads_have_ended(fake: FakeRoot, ended: int, running: int, anew: bool) -> None:
    begin_counting(fake)
    counts = {(tid, reason): 1 for tid in range(1000, 1000 + ended + running) for reason in range(0x500, 0x514)}
    for tid in range(1000, 1000 + running):
        fake.add(f"proc/{tid}/comm", "CPU 0/KVM")
    tracing.show_hist(fake, EXIT, counts, 0)
    make_room(fake)
    assert (read_counts(fake).threads == {}) is anew
    assert is_counting(fake)


def test_room_is_made_in_the_kernels_histogram(traced: HostRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_counting(traced)
    monkeypatch.setattr("orchestrator.host.exit_trace.HISTOGRAM_SIZE", 0)
    make_room(traced)
    assert is_counting(traced)
    assert read_counts(traced).dropped == 0
