"""Slurm's commands, run without a shell, and the parsing of their output. Tested with Slurm 22.05 and 24.11."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from orchestrator import waiting
from orchestrator.errors import CommandError, Forbidden, NotFound, OrchestratorError
from orchestrator.fleet.apart import parse_slots
from orchestrator.fleet.gres import NVME, VF, count_gres, parse_indexes
from orchestrator.fleet.job import ENDED, Job, find_note
from orchestrator.fleet.journal import Entry, build_comment, parse_comment
from orchestrator.host.run import run
from orchestrator.values import NAME, CpuSet, Size

Value = TypeVar("Value")
MIN_VERSION = (22, 5)
PARTITION = "guests"
QUERY_SECONDS = 30.0
SUBMIT_SECONDS = 60.0
CONTROLLER_SECONDS = 60.0
"""Time for a controller that restarts."""
JOB_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Where sbatch is searched, and PATH of the job script, whatever the caller has."""
SAVE_SECONDS = 6.0
"""The controller saves its state at intervals of some 5 s; a change that is older survives SIGKILL (measured)."""
_RETRY_SECONDS = 1.0
_VERSION = re.compile(r"slurm\S* (\d+)\.(\d+)")
_ALLOCATION = re.compile(r"^\s*Nodes=(\S+) CPU_IDs=(\S+) Mem=(\d+) GRES=(\S*)", re.MULTILINE)
_SUBMITTED, _SHAPE = re.compile(r"(\d+)(?:;\S*)?"), re.compile(r"(\d+):(\d+):(\d+)")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
# "unexpected message" is what `scontrol release` prints
_UNREACHABLE = re.compile("(?i)unable to contact slurm controller|connection refused|timed out|unexpected message received")
_QUEUE_FIELDS, _NODE_FIELDS = "%i|%T|%N|%j|%a|%Q|%V|%S|%e|%r|%k", "%N|%T|%z|%m|%G|%f|%u|%H|%E"
_IN_USE = ("ALLOCATED", "COMPLETING", "IDLE", "MIXED", "PLANNED")  # MIXED-: a guest that waits will be started there
_NAME_WIDTH, _USE_FIELDS = 80, "JobID:20,NumTasks:20,MinMemory:20,tres-per-node:1000"
_CHECK_FIELDS = f"NodeList:{_NAME_WIDTH},Comment:1024"
_ENVIRONMENT = {"TZ": "UTC0", "SLURM_TIME_FORMAT": "standard"}
CHECK_PASSED, CHECK_FAILED = "check passed", "check failed: "
"""Comments of nodes, from the health check of their hosts."""


class Unreachable(CommandError):
    """The controller does not respond."""


@dataclass(frozen=True)
class Use:
    """What a job that has not ended has or waits for. ``cores`` are whole cores, ``memory`` is in MiB."""

    number: int
    cores: int
    memory: int
    vfs: int


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave a job on a node. ``cpus`` are abstract ids, ``vfs`` indexes, ``memory`` is in MiB, ``disks`` a number."""

    node: str
    cpus: CpuSet
    vfs: CpuSet
    memory: int
    name: str
    guest_id: str
    entries: tuple[Entry, ...] = ()
    disks: int = 0


@dataclass(frozen=True)
class NodeState:
    """A node as the controller knows it; memory is in MiB.

    Attributes:
        reason: why it is drained or down, ``by`` whom and ``since`` when (UTC, ISO 8601).
        check: what the last health check of the host found; None if it passed, or was not run.
        slots: those that groups of guests can request, see `apart`.
        disks: NVMe controllers.
    """

    name: str
    state: str
    cores: int
    threads: int
    memory: int
    vfs: int
    features: tuple[str, ...]
    reason: str
    by: str = ""
    since: str = ""
    check: str | None = None
    slots: tuple[int, ...] = ()
    disks: int = 0

    @property
    def is_drained(self) -> bool:
        """No guest is started on it; guests that run there keep running."""
        return self.state.startswith("DRAIN")

    @property
    def is_silent(self) -> bool:
        """Its slurmd does not respond: Slurm marks this with * (sinfo(1), node state codes)."""
        return self.state.endswith("*")

    @property
    def responds(self) -> bool:
        return not self.is_silent and not self.state.startswith("DOWN")

    @property
    def explanation(self) -> str:
        """Why no guest is started there, and what its check found."""
        return "; ".join(filter(None, (self.reason, f"{CHECK_FAILED}{self.check}" if self.check else "")))


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
        number, state, node, name, tenant, priority, *times, reason, comment = (*line.split("|", 10), *[""] * 10)[:11]
        if number.isdigit():
            guest_id, entries = parse_comment(_clean(comment))
            note = find_note(state, node, entries)
            submitted, started, ended = map(_read_time, times)
            yield Job(
                int(number), state, node, name, _clean(reason), guest_id, note, submitted, started if node else "",
                ended if state in ENDED else "", entries, _clean(tenant), priority == "0",
            )  # fmt: skip


def read_tenant_uses(tenant: str) -> tuple[Use, ...]:
    """What the guests of a tenant that have not ended have, or wait for."""
    words = ["squeue", "--noheader", f"--partition={PARTITION}", f"--account={tenant}", f"--Format={_USE_FIELDS}"]
    return tuple(parse_uses(_run(words)))


def parse_uses(text: str) -> Iterator[Use]:
    """From columns of fixed width."""
    for line in text.splitlines():
        number, cores, memory, gres = line[:20].strip(), line[20:40].strip(), line[40:60].strip(), line[60:].strip()
        if number.isdigit():
            yield Use(int(number), int(cores), Size.parse(memory).bytes >> 20, count_gres(VF, gres))


def read_allocation(number: int) -> Allocation:
    """Raises NotFound if the controller does not know the job, or has not given it a place, CommandError if it is not a guest."""
    return parse_allocation(number, _run(["scontrol", "show", "job", "--details", str(number)]))


def read_all_jobs() -> tuple[str, ...]:
    """What the controller knows of each job, with details, as text."""
    text = _run(["scontrol", "show", "job", "--details"])
    return tuple(part for part in re.split(r"^(?=JobId=)", text, flags=re.MULTILINE) if part.startswith("JobId="))


def parse_allocation(number: int, text: str) -> Allocation:
    found = _ALLOCATION.findall(text)
    name = re.search(rf"\bJobName=({NAME})(?:\s|$)", text)
    comment = re.search(r"^\s*Comment=(\S.*)", text, re.MULTILINE)
    if not found:
        raise NotFound(f"job {number} does not have a place on a host", "run `nohype fleet list`")
    if len(found) > 1 or not name or not comment:
        raise CommandError(f"job {number} is not a guest of the fleet with resources on one node", "use `nohype fleet submit`")
    node, cpus, memory, gres = found[0]
    guest_id, entries = parse_comment(comment[1].rstrip(" "))
    return Allocation(
        node, CpuSet.parse(cpus), parse_indexes(VF, gres), int(memory), name[1], guest_id, entries, count_gres(NVME, gres)
    )


def read_nodes(name: str = "") -> tuple[NodeState, ...]:
    words = ["sinfo", "--Node", "--noheader", f"--partition={PARTITION}", *([f"--nodes={name}"] if name else [])]
    comments = parse_comments(_run([*words, f"--Format={_CHECK_FIELDS}"]))
    nodes = parse_nodes(_run([*words, f"--format={_NODE_FIELDS}"]))
    return tuple(replace(node, check=_read_check(comments.get(node.name, ""))) for node in nodes)


def parse_nodes(text: str) -> Iterator[NodeState]:
    for line in text.splitlines():
        name, state, shape, memory, gres, features, by, since, reason = (*line.split("|", 8), *[""] * 8)[:9]
        if match := _SHAPE.fullmatch(shape):
            cores = int(match[1]) * int(match[2])
            if state.upper().startswith(_IN_USE):
                by = since = reason = ""  # those of a former drain or loss
            yield NodeState(
                name, state.upper().rstrip("-"), cores, int(match[3]), int(memory.rstrip("+")), count_gres(VF, gres),
                tuple(filter(None, _clean(features).split(","))), _clean(reason), _clean(by), _read_time(since),
                slots=parse_slots(gres), disks=count_gres(NVME, gres),
            )  # fmt: skip


def parse_comments(text: str) -> dict[str, str]:
    """Comments by node, from columns of fixed width."""
    return {line[:_NAME_WIDTH].rstrip(): _clean(line[_NAME_WIDTH:].rstrip()) for line in text.splitlines()}


def _read_check(comment: str) -> str | None:
    return comment.removeprefix(CHECK_FAILED) if comment.startswith(CHECK_FAILED) else None


def submit_job(options: Sequence[str], script: str) -> int:
    """Returns the job's number. Times in ``options`` are UTC.

    The acknowledgement is not durable: a controller that is killed within 5 s forgets the job.
    """
    # sbatch passes all variables on to the job, and some variables are options of sbatch.
    variables = {"PATH": JOB_PATH, "TZ": "UTC0"}
    text = _run(["sbatch", "--parsable", *options], script, SUBMIT_SECONDS, variables=variables)
    match = _SUBMITTED.fullmatch(text.strip())
    if not match:
        raise CommandError(f"sbatch printed {text.strip()!r} instead of the number of a job")
    return int(match[1])


def release_jobs(numbers: Iterable[int]) -> None:
    """Has jobs started that were submitted with --hold. Raises CommandError if one could not be released; the others are."""
    _run(["scontrol", "--quiet"], "".join(f"release {number}\n" for number in numbers))  # a list of them fails with 22.05


def cancel_jobs(numbers: Iterable[int]) -> None:
    _run(["scancel", *map(str, numbers)])


def write_entries(number: int, guest_id: str, entries: Sequence[Entry]) -> None:
    """Shown with the job as long as the controller remembers it. Raises CommandError if the job has ended."""
    _run(["scontrol", "update", f"JobId={number}", f"Comment={build_comment(guest_id, entries)}"])


def write_comment(node: str, text: str) -> None:
    """Shown with the node until the next one; the controller is asked to store it only if it is another one."""
    words = ["sinfo", "--noheader", f"--nodes={node}", f"--Format={_CHECK_FIELDS}"]
    if parse_comments(_run(words)).get(node) != text:
        update_node(node, f"Comment={text}")


def update_node(name: str, *settings: str) -> None:
    _run(["scontrol", "update", f"NodeName={name}", *settings])


def read_script(number: int) -> str:
    """The script of a job, also after its end. Raises NotFound if the controller does not know the job any more."""
    return _run(["scontrol", "write", "batch_script", str(number), "-"], needs_output=True)  # an error leaves its status at 0


def retry(call: Callable[[], Value], seconds: float) -> Value:
    """Repeats a call for this long while the controller does not respond. Raises Unreachable."""
    return waiting.retry(call, (Unreachable,), timeout=seconds, interval=_RETRY_SECONDS)


def _run(
    words: Sequence[str], text: str = "", seconds: float = QUERY_SECONDS, *, needs_output: bool = False,
    variables: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """``variables``: all that the command has; None for those of the caller."""
    try:
        done = run(words, timeout=seconds, input=text, check=False, env=variables or _ENVIRONMENT, inherits=variables is None)
    except CommandError as error:
        if "is not installed" in error.message:
            raise CommandError(f"Slurm's command {words[0]} is not installed", "install the package slurm-client") from None
        raise Unreachable(error.message, "check `systemctl status slurmctld` on the controller") from None
    if done.status == 0 and (done.stdout or not needs_output):
        return done.stdout
    reason = " ".join(done.stderr.split()) or f"exit status {done.status}"
    if _UNREACHABLE.search(reason):
        raise Unreachable(
            f"Slurm's controller does not respond: {reason}", "check `systemctl status slurmctld` on the controller"
        )
    if "Invalid user id" in reason:
        raise Forbidden(f"{words[0]}: {reason}", "run the command as root, or as the account SlurmUser of the controller")
    if "Invalid job id" in reason:
        raise NotFound(f"{words[0]}: {reason}", "run `nohype fleet list`")
    raise CommandError(f"{words[0]}: {reason}", "check `scontrol ping`, `sinfo -R` and the log of slurmctld")


def _clean(text: str) -> str:
    return "" if text in ("(null)", "None", "none", "N/A", "Unknown") else text


def _read_time(text: str) -> str:
    """UTC, ISO 8601; empty if Slurm does not know the time."""
    return f"{text}Z" if _TIME.fullmatch(text) else ""
