"""The edge mode of a PF: whether its embedded switch turns frames between VFs around inside the NIC (VEB) or sends all out.

Two ways: `hwmode` where the driver has it, and for igb, which has none, the loopback bit of the chip. igb sets that bit again at
each reset of the PF (igb_vmm_control(): link down and up, another number of VFs), so it must be checked again after one.

Sources: IEEE 802.1Qbg; Linux drivers/net/ethernet/intel/igb e1000_regs.h, e1000_hw.h, igb_vmdq_set_loopback_pf();
Intel 82576 data sheet 8.13.8 (DTXSWC), I350 data sheet (TXSWC).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from errno import EINVAL, ENODEV, EOPNOTSUPP, EPERM

from orchestrator.errors import HostError
from orchestrator.host.pci import function_path
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import PhysicalFunction


class EdgeMode(StrEnum):
    """Where frames between two VFs of one PF are switched; the names are those of bridge(8) `hwmode`."""

    VEB = "veb"
    """In the NIC."""
    VEPA = "vepa"
    """In the network, by a switch port with reflective relay (hairpin)."""


@dataclass(frozen=True)
class _Register:
    """The register of a chip that holds the loopback enable bit; offset in bytes within BAR 0."""

    name: str
    offset: int


_LOOPBACK = 1 << 31  # E1000_DTXSWC_VMDQ_LOOPBACK_EN, the same bit in both registers
_ALL_ONES = 0xFFFF_FFFF
_DTXSWC = _Register("DTXSWC", 0x3500)
_TXSWC = _Register("TXSWC", 0x5ACC)
_82576 = ("10c9", "10e6", "10e7", "10e8", "150a", "150d", "1518", "1526")
# 1546 is the four-port I350-DA4, which only Intel's own igb knows. I354 and I210 have no SR-IOV capability.
_I350 = ("1521", "1522", "1523", "1524", "1546")
_REGISTERS = {f"8086:{device}": _DTXSWC for device in _82576} | {f"8086:{device}": _TXSWC for device in _I350}
_MAP_HINTS = {
    # pci_mmap_resource(): a region that a driver has claimed is not given to user space, with IO_STRICT_DEVMEM.
    EINVAL: "boot the kernel with iomem=relaxed: this one keeps user space away from registers in use (IO_STRICT_DEVMEM)",
    EPERM: "run as root; with Secure Boot the kernel's lockdown forbids it to root too",
}
_NO_WAY = "neither its driver (hwmode) nor its chip is known to do VEPA; a port VLAN for each VF keeps their frames apart instead"


def read_edge_mode(host: HostRoot, pf: PhysicalFunction) -> EdgeMode | None:
    """The PF's edge mode as the device or its driver tells it, None where neither can.

    Raises:
        HostError: the register cannot be mapped (EINVAL: iomem=relaxed is missing) or does not answer (ENODEV).
    """
    if register := _REGISTERS.get(pf.device):
        return EdgeMode.VEB if _read(host, pf, register) & _LOOPBACK else EdgeMode.VEPA
    mode = host.net.read_hwmode(pf.interface) if pf.interface else None
    return EdgeMode(mode) if mode else None


def set_edge_mode(host: HostRoot, pf: PhysicalFunction, mode: EdgeMode) -> None:
    """Sets the PF's edge mode, and reads back. Nothing happens if it is so already.

    Raises:
        HostError: neither driver nor chip can (EOPNOTSUPP), the register cannot be mapped (EINVAL) or does not answer (ENODEV),
            or it reads back differently, with both values.
    """
    if register := _REGISTERS.get(pf.device):
        _set_loopback(host, pf, register, mode)
    elif pf.interface is None:
        raise HostError(f"cannot put PF {pf.address} into {mode} mode: it has no interface", _NO_WAY, EOPNOTSUPP)
    else:
        try:
            host.net.set_hwmode(pf.interface, mode)
        except HostError as error:
            hint = _NO_WAY if error.errno == EOPNOTSUPP else error.hint
            raise HostError(f"cannot put PF {pf.address} ({pf.interface}) into {mode} mode", hint, error.errno) from error


def describe_edge(host: HostRoot, pf: PhysicalFunction) -> str:
    """What was read to tell the edge mode, in one line of evidence.

    Raises:
        HostError: as `read_edge_mode`.
    """
    if register := _REGISTERS.get(pf.device):
        value = _read(host, pf, register)
        state = "set: veb" if value & _LOOPBACK else "clear: vepa"
        return f"PF {pf.address} {register.name} (BAR0+{register.offset:#06x}) is {value:#010x}, loopback bit 31 {state}"
    mode = read_edge_mode(host, pf)
    return f"PF {pf.address} ({pf.interface or 'no interface'}, {pf.driver or 'no driver'}) hwmode {mode or 'unknown'}"


def _set_loopback(host: HostRoot, pf: PhysicalFunction, register: _Register, mode: EdgeMode) -> None:
    before = _read(host, pf, register)
    # The lower bits are the driver's anti-spoofing masks, one bit a VF: they stay.
    wanted = before | _LOOPBACK if mode is EdgeMode.VEB else before & ~_LOOPBACK
    if wanted == before:
        return
    try:
        host.write32(_resource(pf), register.offset, wanted)
    except HostError as error:
        raise _map_error(pf, register, error) from None
    actual = _read(host, pf, register)
    if (actual ^ wanted) & _LOOPBACK:
        raise HostError(
            f"register {register.name} of PF {pf.address} was to be {wanted:#010x} ({mode}), but is {actual:#010x}",
            "the driver reset the PF meanwhile, or the device does not have this bit; try again",
        )


def _read(host: HostRoot, pf: PhysicalFunction, register: _Register) -> int:
    try:
        value = host.read32(_resource(pf), register.offset)
    except HostError as error:
        raise _map_error(pf, register, error) from None
    if value == _ALL_ONES:
        # What a PCI read gives when nobody answers: memory decoding off, power state D3, or the card fell off the bus.
        what = f"cannot read register {register.name} of PF {pf.address}: all ones"
        raise HostError(what, "set the PF's interface up first", ENODEV)
    return value


def _resource(pf: PhysicalFunction) -> str:
    return f"{function_path(pf.address)}/resource0"


def _map_error(pf: PhysicalFunction, register: _Register, error: HostError) -> HostError:
    what = f"cannot reach register {register.name} of PF {pf.address} (/{_resource(pf)})"
    return HostError(what, _MAP_HINTS.get(error.errno, error.hint), error.errno)
