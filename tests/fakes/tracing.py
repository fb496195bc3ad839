"""The part of tracefs that the product uses: trace instances with tracepoints of KVM and the scheduler, and histograms."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fakes.root import FakeRoot

FORMAT = (Path(__file__).parents[1] / "data" / "kvm_exit_format.txt").read_text()
TRACING = "sys/kernel/tracing"
INSTANCES = f"{TRACING}/instances"
EXIT = "events/kvm/kvm_exit"
CALL = "events/kvm/kvm_hypercall"
MMIO = "events/kvm/kvm_mmio"
SWITCH = "events/sched/sched_switch"
_NO_TRIGGER = (
    "# Available triggers:\n# traceon traceoff snapshot stacktrace enable_event disable_event enable_hist disable_hist hist"
)
_FIELDS = {
    EXIT: ("common_pid", "exit_reason", "vcpu_id", "isa", "guest_rip", "info1", "info2", "intr_info", "error_code"),
    CALL: ("common_pid", "nr", "a0", "a1", "a2", "a3"),
    MMIO: ("common_pid", "type", "len", "gpa", "val"),
    SWITCH: (
        "common_pid",
        "common_cpu",
        "prev_comm",
        "prev_pid",
        "prev_prio",
        "prev_state",
        "next_comm",
        "next_pid",
        "next_prio",
    ),
}


def add_tracing(fake: FakeRoot) -> None:
    fake.add(f"{TRACING}/{EXIT}/format", FORMAT)
    for event in (CALL, MMIO, SWITCH):
        fake.add(f"{TRACING}/{event}/format", f"name: {event.rpartition('/')[2]}\n")
    (fake.path / INSTANCES).mkdir(parents=True)


def make_instance(fake: FakeRoot, name: str) -> None:
    """kernel/trace/trace.c, instance_mkdir(): the instance has the files of all events. Other folders cannot be made."""
    if name.rpartition("/")[0] != INSTANCES:
        raise OSError(errno.EPERM, "")
    if fake.exists(name):
        raise OSError(errno.EEXIST, "")
    (fake.path / name).mkdir()
    if fake.exists(f"{TRACING}/{EXIT}"):
        fake.add(f"{name}/{EXIT}/format", FORMAT)
        for event in _FIELDS:
            fake.add(f"{name}/{event}/trigger", _NO_TRIGGER)
            fake.add(f"{name}/{event}/hist")


def remove_instance(fake: FakeRoot, name: str) -> None:
    if not fake.exists(name):
        raise OSError(errno.ENOENT, "")
    shutil.rmtree(fake.path / name)


def write_trigger(fake: FakeRoot, path: str, value: str) -> None:
    """kernel/trace/trace_events_hist.c, event_hist_trigger_parse(): a second trigger with the same keys is refused."""
    event = path.rpartition("/")[0]
    fields = next(fields for name, fields in _FIELDS.items() if event.endswith(name))
    text = value.strip().removeprefix("!")
    match = re.fullmatch(r"hist:keys=([a-z_,]+)(?::size=(\d+))?( if (?:[a-zA-Z0-9_]+ [!=]= \d+(?: && )?)+)?", text)
    if not match or not set(match[1].split(",")) <= set(fields) or match[1].count(",") > 2:
        raise OSError(errno.EINVAL, "")
    is_set = not fake.text(path).startswith("#")
    if bool(value.startswith("!")) is not is_set:
        raise OSError(errno.EEXIST if is_set else errno.ENOENT, "")
    if value.startswith("!"):
        fake.add(path, _NO_TRIGGER)
        fake.add(f"{event}/hist")
        return
    fake.add(path, f"hist:keys={match[1]}:vals=hitcount:sort=hitcount:size={match[2] or 2048}{match[3] or ''} [active]")
    _show(fake, event, [], 0)


def show_hist(fake: FakeRoot, event: str, counts: dict[tuple[int, int], int], dropped: int) -> None:
    """``counts``: (thread id, exit reason) → exits, in the order of the kernel: lowest count first."""
    keys = [(f"common_pid: {tid:>10}, exit_reason: {reason:>10}", count) for (tid, reason), count in counts.items()]
    _show(fake, event, keys, dropped)


def show_calls(fake: FakeRoot, counts: dict[int, int], dropped: int = 0, event: str = CALL) -> None:
    """``counts``: thread id → calls of a guest that its boot is over, or another event."""
    keys = [(f"common_pid: {tid:>10}", count) for tid, count in counts.items()]
    _show(fake, f"{INSTANCES}/nohype/{event}", keys, dropped)


def show_switches(fake: FakeRoot, counts: dict[tuple[str, int, int], int], dropped: int = 0) -> None:
    """``counts``: (name, CPU, thread id) → switches to the thread."""
    keys = [
        (f"next_comm: {name:<50}, common_cpu: {cpu:>10}, next_pid: {tid:>10}", count)
        for (name, cpu, tid), count in counts.items()
    ]
    _show(fake, f"{INSTANCES}/nohype/{SWITCH}", keys, dropped)


def _show(fake: FakeRoot, event: str, counts: list[tuple[str, int]], dropped: int) -> None:
    lines = ["# event histogram", "#", f"# trigger info: {fake.text(f'{event}/trigger')}", "#", ""]
    lines += [f"{{ {key} }} hitcount: {count:>10}" for key, count in sorted(counts, key=lambda item: item[1])]
    hits = sum(count for _, count in counts) + dropped
    lines += ["", "Totals:", f"    Hits: {hits}", f"    Entries: {len(counts)}", f"    Dropped: {dropped}"]
    fake.add(f"{event}/hist", "\n".join(lines))
