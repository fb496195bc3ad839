"""The host at one moment: who has what of it, what runs, and what needs attention."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model.claim import Quarantined
from orchestrator.model.guest_view import GuestView
from orchestrator.model.proof import Verdict
from orchestrator.model.topology import Topology
from orchestrator.model.uplink import Uplink
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size


@dataclass(frozen=True)
class CoreUse:
    """A physical core with its use (`planning.capacity`) and the guest that owns it, empty without one."""

    cpus: CpuSet
    socket: int
    node: int
    use: str
    guest: str


@dataclass(frozen=True)
class UnmanagedGuest:
    """A running virtual machine that the manager did not create.

    Attributes:
        kind: "domain" of libvirt, or "program".
        name: of the domain or program.
        pid: of its process, None if not known.
        cpus: where its threads may run; or, of threads that may run on all CPUs, where they last ran.
        confined: none of its threads may run on all CPUs.
        why: what was not read, and why; empty if all was.
    """

    kind: str
    name: str
    pid: int | None
    cpus: CpuSet
    confined: bool
    why: str


@dataclass(frozen=True)
class PageUse:
    """Huge pages of one node, size and use."""

    node: int
    page_size: Size
    use: str
    count: int


@dataclass(frozen=True)
class DiskUse:
    """An NVMe controller with its use (`planning.disk`) and the guest that owns it, empty without one.

    Attributes:
        why: why guests cannot have it, empty if they can.
    """

    address: PciAddress
    node: int | None
    use: str
    guest: str
    why: str


@dataclass(frozen=True)
class VcpuActivity:
    """A vCPU's thread since it began. Two readings give rates.

    Attributes:
        cpu: the CPU that it is planned on.
        ran, waited: seconds that it ran, and that it was ready to run while its CPU did something else; None if not measured.
        exits: VM exits by reason since the kernel counts them; None if not counted. An earlier thread of the same id is included.
    """

    cpu: int
    ran: float | None
    waited: float | None
    exits: dict[str, int] | None


@dataclass(frozen=True)
class OtherThread:
    """A thread that is not a vCPU of the guest, and has run on a CPU of the guest's cores.

    Attributes:
        pid, unit: its process, and the systemd unit or control group of that; None and empty if it has ended.
        count: how often the scheduler switched to it on this CPU since the kernel counts that.
    """

    cpu: int
    tid: int
    pid: int | None
    name: str
    unit: str
    count: int


@dataclass(frozen=True)
class GuestActivity:
    """Of a running guest.

    Attributes:
        others: threads of others on its cores; None if not measured.
        why: what was not measured and why, empty if all was.
    """

    guest: str
    vcpus: tuple[VcpuActivity, ...]
    others: tuple[OtherThread, ...] | None
    why: str


@dataclass(frozen=True)
class VfSettings:
    """What a NIC enforces for a VF; what its driver does not report is None.

    Attributes:
        guest: the guest that owns the VF, empty without one.
        min_rate, max_rate: Mbit/s, 0 for none.
        differences: from the claim of its guest, or from the defaults if no running guest owns it; one text each.
        why: why the settings cannot be read, empty if they can.
    """

    address: PciAddress
    guest: str
    mac: MacAddress | None = None
    vlan: int | None = None
    min_rate: int | None = None
    max_rate: int | None = None
    spoof_check: bool | None = None
    trust: bool | None = None
    link_state: str | None = None
    differences: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class LastProof:
    """The last measurement of a proof.

    Attributes:
        finding: the first of its evidence.
        outdated: the guest has changed since the audit began: the verdict is about its past.
        age: seconds since the audit ended.
    """

    name: str
    subject: str
    verdict: Verdict
    figure: float | None
    unit: str
    finding: str
    outdated: bool
    age: float


@dataclass(frozen=True)
class LastAudit:
    """The last measurement of each proof since the manager started, and how many seconds ago the last audit ended."""

    age: float
    proofs: tuple[LastProof, ...]


@dataclass(frozen=True)
class Drift:
    """What differs from the claim of a guest (or "host"), as of the last check; ``since`` is UTC in ISO 8601."""

    subject: str
    since: str
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """What needs a person, since when (UTC in ISO 8601, empty if not known), and the command or setting to use."""

    since: str
    text: str
    command: str


@dataclass(frozen=True)
class Light:
    """The last verdicts about a guest (or "host") in a few words; PASS only if all passed and none is outdated."""

    subject: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class HostView:
    """All parts are of one moment, except those of the survey, of the uplinks and of the settings of VFs.

    Attributes:
        time: UTC in ISO 8601.
        clock: seconds of a clock that never jumps, when ``activity`` was read.
        survey_age: seconds since the survey was read; its free huge pages are current.
        unmanaged: as of the survey; ``unmanaged_why`` says which are not known and why, empty if all are.
        lost: uplinks on which frames between guests do not return from the external switch.
        audit: None if none was run since the manager started.
        emulated_disks: the manager offers them.
    """

    time: str
    clock: float
    guests: tuple[GuestView, ...]
    topology: Topology
    survey_age: float
    cores: tuple[CoreUse, ...]
    unmanaged: tuple[UnmanagedGuest, ...]
    unmanaged_why: str
    pages: tuple[PageUse, ...]
    disks: tuple[DiskUse, ...]
    emulated_disks: bool
    uplinks: tuple[Uplink, ...]
    vfs: tuple[VfSettings, ...]
    lost: tuple[str, ...]
    activity: tuple[GuestActivity, ...]
    audit: LastAudit | None
    drift: tuple[Drift, ...]
    quarantine: tuple[Quarantined, ...]
    attention: tuple[Attention, ...]
    lights: tuple[Light, ...]
