"""Admin commands of an NVMe controller, by ioctl(2) on its character device (include/uapi/linux/nvme_ioctl.h).

Fields of Identify Controller and Format NVM: NVM Express base specification 2.0. Fields of Identify Namespace: NVM command set
specification 1.0.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from errno import ENODEV, EOPNOTSUPP

from orchestrator.errors import HostError
from orchestrator.host.pci import function_path
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import NvmeController

# struct nvme_passthru_cmd: opcode, flags, rsvd1, nsid, cdw2, cdw3, metadata, addr, metadata_len, data_len, cdw10 to cdw15,
# timeout_ms, result.
_COMMAND = struct.Struct("=BBHIIIQQII6III")
# _IOWR('N', 0x41, struct nvme_admin_cmd): asm-generic/ioctl.h.
ADMIN_COMMAND = 3 << 30 | _COMMAND.size << 16 | ord("N") << 8 | 0x41

IDENTIFY, FORMAT = 0x06, 0x80  # opcodes
_NAMESPACE, _CONTROLLER, _ACTIVE, _ALLOCATED = 0x00, 0x01, 0x02, 0x10  # CNS values of Identify
_IDENTIFY_SIZE = 4096
_OACS_FORMAT, _OACS_NAMESPACES = 1 << 1, 1 << 3
_USER_DATA_ERASE = 1  # SES of Format NVM
_SECOND = 1000
_IDENTIFY_TIMEOUT = 30 * _SECOND
_FORMAT_TIMEOUT = 600 * _SECOND  # as nvme-cli; a large disk needs minutes


@dataclass(frozen=True)
class Abilities:
    """What a controller can do, from Identify Controller."""

    format: bool
    namespace_management: bool


def read_abilities(host: HostRoot, controller: NvmeController) -> Abilities:
    data = _identify(host, controller, 0, _CONTROLLER)
    (oacs,) = struct.unpack_from("<H", data, 256)
    return Abilities(bool(oacs & _OACS_FORMAT), bool(oacs & _OACS_NAMESPACES))


def read_namespace_ids(host: HostRoot, controller: NvmeController) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The active and the inactive namespaces. Inactive ones exist only on a controller with namespace management.

    A guest can make a namespace inactive: its data stays, and the host cannot erase it.
    """
    active = _parse_ids(_identify(host, controller, 0, _ACTIVE))
    if not read_abilities(host, controller).namespace_management:
        return active, ()
    allocated = _parse_ids(_identify(host, controller, 0, _ALLOCATED))
    return active, tuple(sorted(set(allocated) - set(active)))


def find_lba_format(host: HostRoot, controller: NvmeController, nsid: int, block_size: int) -> int | None:
    """The index of the LBA format with this block size and without metadata, None if the namespace does not have one."""
    data = _identify(host, controller, nsid, _NAMESPACE)
    for index in range(data[25] + 1):  # NLBAF counts from 0
        metadata, exponent = struct.unpack_from("<HB", data, 128 + 4 * index)
        if not metadata and exponent and 1 << exponent == block_size:
            return index
    return None


def format_namespace(host: HostRoot, controller: NvmeController, nsid: int, lba_format: int) -> None:
    """Erases all user data of the namespace, according to the controller. The contents are not defined afterwards.

    The command can also erase the other namespaces of the controller (FNA). It cannot be interrupted, and takes up to 10 minutes.
    """
    # LBAF: the lower 4 bits, and from version 2.0 on the upper 2 bits (LBAFU).
    word = lba_format & 0xF | _USER_DATA_ERASE << 9 | (lba_format >> 4 & 3) << 12
    _execute(host, controller, FORMAT, nsid, word, _FORMAT_TIMEOUT, what=f"format namespace {nsid}")


def _identify(host: HostRoot, controller: NvmeController, nsid: int, cns: int) -> bytearray:
    data = bytearray(_IDENTIFY_SIZE)
    _execute(host, controller, IDENTIFY, nsid, cns, _IDENTIFY_TIMEOUT, data, what="identify")
    return data


def _parse_ids(data: bytearray) -> tuple[int, ...]:
    return tuple(nsid for (nsid,) in struct.iter_unpack("<I", data) if nsid)


def _execute(
    host: HostRoot, controller: NvmeController, opcode: int, nsid: int, word: int, timeout: int, data: bytearray | None = None,
    *, what: str,
) -> None:  # fmt: skip
    name = controller.name
    number = host.find(f"{function_path(controller.address)}/nvme/{name}/dev") if name else None
    if name is None or number is None:
        what = f"cannot {what} of NVMe controller {controller.address}: the driver nvme does not show it"
        raise HostError(what, "check the kernel log with dmesg", ENODEV)
    size = len(data) if data else 0
    address = ctypes.addressof((ctypes.c_char * size).from_buffer(data)) if data else 0
    command = bytearray(_COMMAND.pack(opcode, 0, 0, nsid, 0, 0, 0, address, 0, size, word, 0, 0, 0, 0, 0, timeout, 0))
    descriptor = host.open_device(name, number, os.O_RDWR)
    try:
        status = host.ioctl(descriptor, ADMIN_COMMAND, command, data)
    except HostError as error:
        hint = "check the kernel log with dmesg"
        raise HostError(f"NVMe controller {controller.address} ({name}): cannot {what}", hint, error.errno) from None
    finally:
        os.close(descriptor)
    if status:
        # A positive result is the status field of the completion: status code, status code type, do not retry.
        what = f"NVMe controller {controller.address} ({name}): cannot {what}: status {status:#x}"
        raise HostError(what, f"`nvme error-log /dev/{name}` shows details", EOPNOTSUPP if status & 0x7FF == 1 else 0)
