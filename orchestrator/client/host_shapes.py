"""Types of the response with the whole host."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from orchestrator.client.added import Added
from orchestrator.client.shapes import Guest, Quarantined, Survey, Uplink


class CoreUse(TypedDict):
    """A physical core; ``guest`` is the guest that owns it, empty without one.

    ``use`` is "free", "claimed", "quarantined", "housekeeping", or "unusable" if the core is not isolated.
    """

    cpus: str
    socket: int
    node: int
    use: str
    guest: str


class UnmanagedGuest(TypedDict):
    """A running virtual machine that the manager did not create: a "domain" of libvirt, or of another "program".

    ``pid`` is null if not known. ``cpus`` are those where its threads may run, or, of threads that may run on all CPUs, where
    they last ran; ``confined``: there are no such threads. ``why`` says what was not read and why, and is empty if all was.
    """

    kind: str
    name: str
    pid: int | None
    cpus: str
    confined: bool
    why: str


class PageUse(TypedDict):
    """Huge pages of one node, size (bytes) and use.

    ``use`` is "free", "claimed", "quarantined", "housekeeping", or "foreign" for the pages of other programs.
    """

    node: int
    page_size: int
    use: str
    count: int


class DiskUse(TypedDict):
    """An NVMe controller; ``guest`` is the guest that owns it, empty without one.

    ``use`` is "free", "claimed", "wiping", "quarantined", or "unusable" if guests cannot have it: ``why``, otherwise empty.
    ``node`` is null if the firmware does not report it.
    """

    address: str
    node: int | None
    use: str
    guest: str
    why: str


class VcpuActivity(TypedDict):
    """A vCPU's thread since it began; two readings give rates.

    ``cpu`` is the CPU that it is planned on. ``ran`` and ``waited`` are the seconds that it ran, and that it was ready to run
    while its CPU did something else, null if not measured. ``exits`` are its VM exits by reason since the kernel counts them,
    null if not counted; those of an earlier thread with the same id are included.
    """

    cpu: int
    ran: float | None
    waited: float | None
    exits: dict[str, int] | None


class OtherThread(TypedDict):
    """A thread that is not a vCPU of the guest, and has run on a CPU of the guest's cores.

    ``count`` is how often the scheduler switched to it on this CPU since the kernel counts that. ``pid`` is its process and
    ``unit`` the systemd unit or control group of that, null and empty if the thread has ended.
    """

    cpu: int
    tid: int
    pid: int | None
    name: str
    unit: str
    count: int


class GuestActivity(TypedDict):
    """The vCPUs of a running guest, and the other threads on its cores, null if not measured.

    ``why`` says what was not measured and why, and is empty if all was.
    """

    guest: str
    vcpus: list[VcpuActivity]
    others: Annotated[list[OtherThread] | None, Added(None)]
    why: str


class VfSettings(TypedDict):
    """What a NIC enforces for a VF; null for what its driver does not report.

    ``guest`` is the guest that owns the VF, empty without one. Rates are in Mbit/s, 0 for none. ``differences`` are those from
    the claim of a running guest, or from the defaults for a VF that none uses. ``why`` says why the settings cannot be read,
    and is empty if they can. Read at most 5 s ago.
    """

    address: str
    guest: str
    mac: str | None
    vlan: int | None
    min_rate: int | None
    max_rate: int | None
    spoof_check: bool | None
    trust: bool | None
    link_state: str | None
    differences: list[str]
    why: str


class LastProof(TypedDict):
    """The last measurement of a proof. ``finding`` is the first of its evidence; ``age`` is the seconds since its audit ended.

    ``outdated``: the guest has changed since the audit began, so that the verdict is about its past.
    """

    name: str
    subject: str
    verdict: Literal["pass", "fail", "not measured"]
    figure: float | None
    unit: str
    finding: str
    outdated: bool
    age: float


class LastAudit(TypedDict):
    """The last measurement of each proof since the manager started.

    ``age`` is the seconds since the last audit ended; it may have been one of the host only.
    """

    age: float
    proofs: list[LastProof]


class Drift(TypedDict):
    """What differs from the claim of a guest (or "host"), as of the last check, since when (UTC, ISO 8601)."""

    subject: str
    since: str
    findings: list[str]


class Attention(TypedDict):
    """What needs a person, since when (UTC, ISO 8601; empty if not known), and the command or setting to use."""

    since: str
    text: str
    command: str


class Light(TypedDict):
    """The last verdicts about a guest (or "host") in a few words; "pass" only if all passed and none is outdated."""

    subject: str
    verdict: Literal["pass", "fail", "not measured"]
    text: str


class Host(TypedDict):
    """The host at one moment. ``attention`` has the oldest first.

    ``clock`` is the time of ``activity`` in seconds of a clock that never jumps: rates are differences of two readings.
    ``survey_age`` is the seconds since the survey was read; its free huge pages are current. ``unmanaged`` is as old as the
    survey; ``unmanaged_why`` says which virtual machines are not known and why, and is empty if all are. ``lost`` are uplinks
    on which frames between guests do not return from the external switch. ``audit`` is null if none was run since the manager
    started. ``emulated_disks``: the manager offers them.
    """

    time: str
    clock: float
    guests: list[Guest]
    survey: Survey
    survey_age: float
    cores: list[CoreUse]
    unmanaged: Annotated[list[UnmanagedGuest] | None, Added(None)]
    unmanaged_why: Annotated[str, Added("")]
    pages: list[PageUse]
    disks: Annotated[list[DiskUse], Added([])]
    emulated_disks: Annotated[bool, Added(False)]  # noqa: FBT003
    uplinks: list[Uplink]
    vfs: Annotated[list[VfSettings], Added([])]
    lost: list[str]
    activity: list[GuestActivity]
    audit: LastAudit | None
    drift: list[Drift]
    quarantine: list[Quarantined]
    attention: Annotated[list[Attention], Added([])]
    lights: Annotated[list[Light], Added([])]
