"""Network disks to which this host itself is connected."""

from __future__ import annotations

from orchestrator.host.root import HostRoot

# drivers/nvme/host/sysfs.c, nvme_dev_attrs[]: each controller has the NQN of its subsystem, and its transport ("pcie", "tcp").
_NVME = "sys/class/nvme"
# drivers/scsi/scsi_transport_iscsi.c, iscsi_session_attrs[].
_ISCSI = "sys/class/iscsi_session"


def read_connected_targets(host: HostRoot) -> frozenset[str]:
    """The names of NVMe subsystems over a network, and of iSCSI targets in lower case. Raises HostError if one cannot be read."""
    remote = [one for one in _list(host, _NVME) if host.find(f"{_NVME}/{one}/transport") not in (None, "pcie")]
    # None: the connection has ended meanwhile.
    nvme = [host.find(f"{_NVME}/{one}/subsysnqn") for one in remote]
    iscsi = [host.find(f"{_ISCSI}/{one}/targetname") for one in _list(host, _ISCSI)]
    return frozenset(filter(None, (*nvme, *(name and name.lower() for name in iscsi))))  # RFC 7143 4.2.7.1: without case


def _list(host: HostRoot, folder: str) -> tuple[str, ...]:
    """A class has no folder before its module is loaded."""
    return tuple(host.names(folder)) if host.exists(folder) else ()
