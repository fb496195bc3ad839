"""The part of tracefs that the product uses: trace instances with the tracepoint kvm:kvm_exit and its histogram."""

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
_NO_TRIGGER = (
    "# Available triggers:\n# traceon traceoff snapshot stacktrace enable_event disable_event enable_hist disable_hist hist"
)
_FIELDS = ("common_pid", "exit_reason", "vcpu_id", "isa", "guest_rip", "info1", "info2", "intr_info", "error_code")


def add_tracing(fake: FakeRoot) -> None:
    fake.add(f"{TRACING}/{EXIT}/format", FORMAT)
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
        fake.add(f"{name}/{EXIT}/trigger", _NO_TRIGGER)
        fake.add(f"{name}/{EXIT}/hist")


def remove_instance(fake: FakeRoot, name: str) -> None:
    if not fake.exists(name):
        raise OSError(errno.ENOENT, "")
    shutil.rmtree(fake.path / name)


def write_trigger(fake: FakeRoot, path: str, value: str) -> None:
    """kernel/trace/trace_events_hist.c, event_hist_trigger_parse(): a second trigger with the same keys is refused."""
    removed, _, text = value.strip().rpartition("!")
    match = re.fullmatch(r"hist:keys=([a-z_,]+)(?::size=(\d+))?", text)
    if not match or not set(match[1].split(",")) <= set(_FIELDS) or match[1].count(",") > 2:
        raise OSError(errno.EINVAL, "")
    is_set = not fake.text(path).startswith("#")
    if bool(value.startswith("!")) is not is_set:
        raise OSError(errno.EEXIST if is_set else errno.ENOENT, "")
    if value.startswith("!"):
        fake.add(path, _NO_TRIGGER)
        fake.add(f"{path.rpartition('/')[0]}/hist")
        return
    line = f"hist:keys={match[1]}:vals=hitcount:sort=hitcount:size={match[2] or 2048} [active]"
    fake.add(path, line)
    show_hist(fake, path.rpartition("/")[0], {}, 0)


def show_hist(fake: FakeRoot, event: str, counts: dict[tuple[int, int], int], dropped: int) -> None:
    """``counts``: (thread id, exit reason) → exits, in the order of the kernel: lowest count first."""
    lines = ["# event histogram", "#", f"# trigger info: {fake.text(f'{event}/trigger')}", "#", ""]
    lines += [
        f"{{ common_pid: {tid:>10}, exit_reason: {reason:>10} }} hitcount: {count:>10}"
        for (tid, reason), count in sorted(counts.items(), key=lambda item: item[1])
    ]
    hits = sum(counts.values()) + dropped
    lines += ["", "Totals:", f"    Hits: {hits}", f"    Entries: {len(counts)}", f"    Dropped: {dropped}"]
    fake.add(f"{event}/hist", "\n".join(lines))
