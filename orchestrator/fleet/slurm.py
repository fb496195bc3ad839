"""Slurm's commands, run without a shell, and the parsing of their output. Tested with Slurm 22.05."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.errors import CommandError, NotFound, OrchestratorError
from orchestrator.host.run import run
from orchestrator.values import NAME, CpuSet

Value = TypeVar("Value")
MIN_VERSION = (22, 5)
PARTITION = "guests"
QUERY_SECONDS = 30.0
SUBMIT_SECONDS = 60.0
_RETRY_SECONDS = 1.0
_VERSION = re.compile(r"slurm\S* (\d+)\.(\d+)")
_ALLOCATION = re.compile(r"^\s*Nodes=(\S+) CPU_IDs=(\S+) Mem=(\d+) GRES=(\S*)", re.MULTILINE)
_VF = re.compile(r"(?:^|,)vf(?::[^:(,]+)?:\d+\(IDX:([0-9,-]+)\)")
_SUBMITTED = re.compile(r"(\d+)(?:;\S*)?")
_SHAPE = re.compile(r"(\d+):(\d+):(\d+)")
_VFS = re.compile(r"(?:^|,)vf:(\d+)")
_UNREACHABLE = re.compile("unable to contact slurm controller|connection refused|socket timed out|timed out after", re.IGNORECASE)
_QUEUE_FIELDS, _NODE_FIELDS = "%i|%T|%N|%j|%r|%k", "%N|%T|%z|%m|%G|%f|%E"
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
)
"""States of a job whose guest has ended."""


class Unreachable(CommandError):
    """The controller does not respond."""


@dataclass(frozen=True)
class Job:
    """A guest of the fleet.

    Attributes:
        node: empty while it waits.
        guest_id: the caller's own id of the guest, which outlives the job's number.
        note: what the job script reported, such as why the guest could not be started.
    """

    number: int
    state: str
    node: str
    name: str
    reason: str
    guest_id: str
    note: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def is_ending(self) -> bool:
        """Also while the Epilog runs."""
        return self.has_ended or self.state == "COMPLETING"


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave a job on a node. ``cpus`` are abstract ids, ``vfs`` indexes, ``memory`` is in MiB."""

    node: str
    cpus: CpuSet
    vfs: CpuSet
    memory: int
    name: str
    guest_id: str


@dataclass(frozen=True)
class NodeState:
    """A node as the controller knows it. ``reason`` is why it is drained or down; memory is in MiB."""

    name: str
    state: str
    cores: int
    threads: int
    memory: int
    vfs: int
    features: tuple[str, ...]
    reason: str

    @property
    def responds(self) -> bool:
        """Slurm marks a node that does not respond with * (sinfo(1), node state codes)."""
        return not self.state.endswith("*") and not self.state.startswith("DOWN")


def check_version() -> None:
    """Raises OrchestratorError if Slurm is not installed, or is older than the version that was tested."""
    text = _run(["sinfo", "--version"]).strip()
    match = _VERSION.match(text)
    if not match or (int(match[1]), int(match[2])) < MIN_VERSION:
        raise OrchestratorError(f"{text!r} is installed; the fleet requires Slurm 22.05 or later", "install a newer Slurm")


def read_jobs(name: str = "") -> tuple[Job, ...]:
    """All jobs that the controller remembers, or those of one guest, oldest first."""
    words = ["squeue", "--noheader", "--states=all", f"--partition={PARTITION}", f"--format={_QUEUE_FIELDS}"]
    return tuple(sorted(parse_jobs(_run([*words, *([f"--name={name}"] if name else [])])), key=lambda job: job.number))


def read_job(number: int) -> Job | None:
    """None if the controller does not know the job. Unlike `read_jobs`, the controller does not send all its jobs."""
    words = ["squeue", "--noheader", "--states=all", f"--jobs={number}", f"--format={_QUEUE_FIELDS}"]
    try:
        return next(parse_jobs(_run(words)), None)
    except NotFound:
        return None


def parse_jobs(text: str) -> Iterator[Job]:
    for line in text.splitlines():
        number, state, node, name, reason, comment = (*line.split("|", 5), *[""] * 5)[:6]
        if number.isdigit():
            guest_id, _, note = _clean(comment).partition(" ")
            yield Job(int(number), state, node, name, _clean(reason), guest_id, note)


def read_allocation(number: int) -> Allocation:
    """What a running job has. Raises NotFound if the controller does not know the job, or has not allocated anything."""
    return parse_allocation(number, _run(["scontrol", "show", "job", "--details", str(number)]))


def read_all_jobs() -> tuple[str, ...]:
    """What the controller knows of each job, with details, as text."""
    text = _run(["scontrol", "show", "job", "--details"])
    return tuple(part for part in re.split(r"^(?=JobId=)", text, flags=re.MULTILINE) if part.startswith("JobId="))


def parse_allocation(number: int, text: str) -> Allocation:
    found = _ALLOCATION.findall(text)
    name = re.search(rf"\bJobName=({NAME})(?:\s|$)", text)
    comment = re.search(r"^\s*Comment=(\S+)", text, re.MULTILINE)
    if len(found) != 1 or not name or not comment:
        hint = "submit guests with `nohype fleet submit`; run `scontrol show job --details` to see the job"
        raise NotFound(f"job {number} is not a guest of the fleet with resources on one node", hint)
    node, cpus, memory, gres = found[0]
    vfs = ",".join(_VF.findall(gres))
    return Allocation(node, CpuSet.parse(cpus), CpuSet.parse(vfs), int(memory), name[1], comment[1])


def read_nodes() -> tuple[NodeState, ...]:
    text = _run(["sinfo", "--Node", "--noheader", f"--partition={PARTITION}", f"--format={_NODE_FIELDS}"])
    return tuple(parse_nodes(text))


def parse_nodes(text: str) -> Iterator[NodeState]:
    for line in text.splitlines():
        name, state, shape, memory, gres, features, reason = (*line.split("|", 6), *[""] * 6)[:7]
        if match := _SHAPE.fullmatch(shape):
            vfs = _VFS.search(gres)
            cores = int(match[1]) * int(match[2])
            yield NodeState(
                name, state.upper(), cores, int(match[3]), int(memory.rstrip("+")), int(vfs[1]) if vfs else 0,
                tuple(filter(None, _clean(features).split(","))), _clean(reason),
            )  # fmt: skip


def submit_job(options: Sequence[str], script: str) -> int:
    """Returns the job's number. The acknowledgement is not durable: a controller that is killed within 5 s forgets the job."""
    text = _run(["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sbatch", "--parsable", *options], script, SUBMIT_SECONDS)
    match = _SUBMITTED.fullmatch(text.strip())
    if not match:
        raise CommandError(f"sbatch printed {text.strip()!r} instead of the number of a job")
    return int(match[1])


def cancel_job(number: int) -> None:
    _run(["scancel", str(number)])


def write_note(number: int, guest_id: str, note: str) -> None:
    """Shown with the job as long as the controller remembers it."""
    text = " ".join(note.split())[:400]
    _run(["scontrol", "update", f"JobId={number}", f"Comment={guest_id} {text}"])


def update_node(name: str, *settings: str) -> None:
    _run(["scontrol", "update", f"NodeName={name}", *settings])


def retry(call: Callable[[], Value], seconds: float) -> Value:
    """Repeats a call for this long while the controller does not respond. Raises Unreachable."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Unreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_SECONDS)


def _run(words: Sequence[str], text: str = "", seconds: float = QUERY_SECONDS) -> str:
    try:
        done = run(words, timeout=seconds, input=text, check=False)
    except CommandError as error:
        if "is not installed" in error.message:
            raise CommandError(f"Slurm's command {words[0]} is not installed", "install the package slurm-client") from None
        raise Unreachable(error.message, "check `systemctl status slurmctld` on the controller") from None
    if done.status == 0:
        return done.stdout
    reason = " ".join(done.stderr.split()) or f"exit status {done.status}"
    if done.status == 127 or "No such file or directory" in reason and "env:" in reason:
        raise CommandError("Slurm's command sbatch is not installed", "install the package slurm-client")
    if _UNREACHABLE.search(reason):
        raise Unreachable(
            f"Slurm's controller does not respond: {reason}", "check `systemctl status slurmctld` on the controller"
        )
    command = next(word for word in words if word.startswith("s"))
    if "Invalid job id" in reason:
        raise NotFound(f"{command}: {reason}", "run `nohype fleet list`")
    raise CommandError(f"{command}: {reason}", "check `scontrol ping`, `sinfo -R` and the log of slurmctld")


def _clean(text: str) -> str:
    return "" if text in ("(null)", "None", "none", "N/A") else text
