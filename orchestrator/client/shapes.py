"""Types of the responses: for users of the client, and the source of the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from orchestrator.client.added import Added
from orchestrator.client.cache_shapes import Caches as Caches
from orchestrator.client.cache_shapes import CacheShare as CacheShare
from orchestrator.client.disk_shapes import Disk as Disk
from orchestrator.client.disk_shapes import DiskProgress as DiskProgress
from orchestrator.client.exit_shapes import Disengaged as Disengaged
from orchestrator.client.exit_shapes import ExitPolicy as ExitPolicy
from orchestrator.client.exit_shapes import ExitReport as ExitReport
from orchestrator.client.exit_shapes import VcpuExits as VcpuExits
from orchestrator.client.nic_shapes import CounterReading as CounterReading
from orchestrator.client.nic_shapes import EdgeReading as EdgeReading
from orchestrator.client.nic_shapes import FrameCounts as FrameCounts
from orchestrator.client.nic_shapes import HairpinResult as HairpinResult
from orchestrator.client.nic_shapes import InvariantReading as InvariantReading
from orchestrator.client.nic_shapes import ModeView as ModeView
from orchestrator.client.nic_shapes import Nic as Nic
from orchestrator.client.nic_shapes import SwitchCount as SwitchCount
from orchestrator.client.nic_shapes import Traffic as Traffic
from orchestrator.client.nic_shapes import Uplink as Uplink
from orchestrator.client.nic_shapes import VepaReadings as VepaReadings
from orchestrator.client.nic_shapes import Vf as Vf


class Guest(TypedDict):
    """A guest.

    ``cores`` are the CPUs of each physical core, in the kernel's list format; vCPU n runs on the n-th of ``cpus``. ``memory`` and
    ``page_size`` are bytes. ``vf`` is the first of ``nics``, null once they are released, or if it is not a VF. ``waived`` are
    properties that the guest lacks. ``caches`` is null if the request limits none.
    ``progress`` is the work on its disks, null if there is none. ``cpu_features`` are enabled by
    name. ``state`` is as in `state.GuestState`, "planned" for a plan, or "ended" for a guest that should run but does not.
    ``owner`` is the tenant, empty for the host's own guests. ``version`` grows with each change: it is the ETag. ``restart`` is
    when it is restarted, ``restarts`` how often it was. ``id`` is the request id. ``warnings`` come with a plan: resources that
    unmanaged domains may use later, and differences between configuration and host. ``ssh_keys`` is the number of keys that may
    log in; ``user_data`` and ``network_config`` are the first digits of the SHA-256 of a secret text, null without one.
    ``addresses`` are the IP addresses of the request, with prefix lengths, in the order of ``nics``. ``ssh_host_key`` is the key
    that the guest has reported on its console since its start. ``initiator`` is the name with which it logs in to its network
    disk. ``disengaged`` is the end of its boot, null during the boot and for a guest that does not run.
    ``created`` is when it was created (UTC, ISO 8601) and ``creator`` by whom, null for a plan or if not known.
    ``exit_policy`` is that of the request, and ``housekeeping_vcpus`` are the vCPUs that it names.
    """

    name: str
    state: str
    owner: str
    version: int
    restarts: int
    created: Annotated[str | None, Added(None)]
    creator: Annotated[str | None, Added(None)]
    cores: list[str]
    cpus: list[int]
    node: int
    memory: int
    huge_pages: int
    page_size: int
    housekeeping: str
    vf: Vf | None
    nics: list[Nic]
    disks: list[Disk]
    waived: list[str]
    caches: Caches | None
    progress: DiskProgress | None
    image: str
    cmdline: str
    cpu_features: list[str]
    restart: Literal["never", "on-failure"]
    id: str | None
    hostname: str
    ssh_keys: int
    user_data: str | None
    network_config: str | None
    warnings: list[str]
    addresses: list[str]
    ssh_host_key: str | None
    initiator: str | None
    disengaged: Disengaged | None
    exit_policy: ExitPolicy | None
    housekeeping_vcpus: str | None


class Network(TypedDict):
    """A network: its VLAN, the tenant that owns it (empty for the host), and the guests in it that the caller may see."""

    name: str
    vlan: int
    owner: str
    guests: list[str]


class Quarantined(TypedDict):
    """A guest in quarantine, since when (UTC, ISO 8601), and why."""

    name: str
    since: str
    reasons: list[str]


class Event(TypedDict):
    """An event of a guest or of the host; ``took`` is seconds, null if the event has no duration."""

    id: int
    time: str
    kind: str
    subject: str
    who: str
    detail: str
    tenant: str
    took: float | None


class Proof(TypedDict):
    """A measured statement; see docs/promises.md. ``values`` are what it has read, by name; empty for most proofs."""

    name: str
    subject: str
    verdict: Literal["pass", "fail", "not measured"]
    figure: float | None
    unit: str
    evidence: list[str]
    readings: VepaReadings | None
    values: dict[str, bool | int | float | str]


class SignedEvidence(TypedDict):
    """The proofs with what identifies host, software and guests, signed; see docs/evidence.md.

    ``key`` is the SHA-256 of the public key, ``signature`` is in Base64.
    """

    evidence: dict[str, object]
    key: str
    signature: str


class EventChain(TypedDict):
    """The verified hash chain of the event log: ``events`` from ``first`` to ``last``, whose hash is ``hash``.

    ``removed`` is the number of events removed from it. ``faults`` is each place where the chain is broken. ``at`` is the
    hash of the event that was asked for, null if it is not in the log.
    """

    events: int
    first: int
    last: int
    hash: str
    removed: int
    faults: list[str]
    at: str | None


class Core(TypedDict):
    """A physical core."""

    cpus: str
    socket: int
    node: int


class Pool(TypedDict):
    """The huge pages of one size on one node, in pages; the size in bytes."""

    node: int
    page_size: int
    total: int
    free: int


class Function(TypedDict):
    """A virtual function that exists; ``use`` is how the host itself uses it."""

    address: str
    index: int
    driver: str | None
    iommu_group: int | None
    use: str


class Port(TypedDict):
    """A further network interface below a physical function; ``fault`` is why it cannot be an uplink."""

    name: str
    up: bool
    mac: str | None
    fault: str
    representor: bool


class Pf(TypedDict):
    """A physical function, as in `topology.PhysicalFunction`."""

    address: str
    interface: str | None
    device: str
    driver: str | None
    node: int | None
    up: bool
    mac: str | None
    total_vfs: int
    first_vf_offset: int
    vf_stride: int
    vfs: list[Function]
    fault: str
    siblings: list[Port]


class Group(TypedDict):
    """An IOMMU group; ``fault`` is why it could not be read."""

    number: int
    type: str
    devices: list[str]
    fault: str


class Finding(TypedDict):
    """A difference between configuration and host; with an error no guest can be started."""

    severity: Literal["error", "warning"]
    text: str
    hint: str


class Promised(TypedDict):
    """Huge pages of one size that programs have reserved but not used yet, on any node."""

    page_size: int
    count: int


class Namespace(TypedDict):
    """A namespace of an NVMe controller: its number, block device, size and logical block size in bytes."""

    nsid: int
    device: str
    size: int
    block_size: int


class Controller(TypedDict):
    """An NVMe controller. ``fault`` is why guests cannot get it, ``uses`` how the host uses it, ``signatures`` what it holds."""

    address: str
    name: str | None
    serial: str | None
    model: str | None
    node: int | None
    driver: str | None
    iommu_group: int | None
    namespaces: list[Namespace]
    fault: str
    uses: list[str]
    signatures: list[str]


class Interface(TypedDict):
    """An Ethernet interface that could be the uplink of a software edge; null ``kind`` for a physical one."""

    name: str
    up: bool
    mac: str
    master: str | None
    kind: str | None
    node: int | None


class KernelSetting(TypedDict):
    """A setting of the kernel that the manager changes while there are guests."""

    name: str
    value: str


class Survey(TypedDict):
    """What the host has. ``housekeeping`` are the CPUs that guests do not get."""

    cores: list[Core]
    isolated: str
    housekeeping: str
    pools: list[Pool]
    pfs: list[Pf]
    iommu_groups: list[Group]
    topoext: bool
    possible: str
    promised: list[Promised]
    kvm: bool
    vfio: bool
    controllers: list[Controller]
    problems: list[str]
    interfaces: list[Interface]
    kernel_settings: list[KernelSetting]
    findings: list[Finding]


class Version(TypedDict):
    """The manager's version."""

    version: str


class Ready(TypedDict):
    """The line with which the guest reported ready."""

    line: str


class ConsolePart(TypedDict):
    """Output of a guest's console.

    ``uuid`` is the guest's id. ``position`` is after this output: send it as Last-Event-ID to continue. ``output`` is in Base64.
    ``may_have_skipped``: output before this may be missing, because the log was rotated faster than it was read. After the
    ``last`` part nothing follows; its ``problem`` is why, or null if only the output so far was requested.
    """

    uuid: str
    position: str
    output: str
    may_have_skipped: bool
    last: bool
    problem: dict[str, object] | None


class ConsoleTyped(TypedDict):
    """How many bytes of the input the console took; send the rest again later."""

    taken: int


class Answer(TypedDict):
    """The reply on the guest's console."""

    answer: str
