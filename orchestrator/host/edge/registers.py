"""VEPA by the loopback bit of the chip, for PFs of the driver igb, which has no `hwmode`.

igb sets this bit again at each reset of the PF (igb_vmm_control(): link down and up, another number of VFs), so the mode must be
checked again after a reset. Sources: IEEE 802.1Qbg; igb's e1000_regs.h, e1000_hw.h, igb_vmdq_set_loopback_pf(); Intel 82576 data
sheet 8.13.8 (DTXSWC), I350 data sheet (TXSWC).
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, ENODEV, EPERM

from orchestrator.errors import HostError
from orchestrator.host.pci import function_path
from orchestrator.host.root import HostRoot
from orchestrator.model.edge import EdgeMode
from orchestrator.model.topology import PhysicalFunction


@dataclass(frozen=True)
class _Register:
    name: str
    offset: int  # bytes within BAR 0


_LOOPBACK = 1 << 31  # E1000_DTXSWC_VMDQ_LOOPBACK_EN, the same bit in both registers
_ALL_ONES = 0xFFFF_FFFF
_DTXSWC = _Register("DTXSWC", 0x3500)
_TXSWC = _Register("TXSWC", 0x5ACC)
_82576 = ("10c9", "10e6", "10e7", "10e8", "150a", "150d", "1518", "1526")
# Only Intel's out-of-tree igb supports 1546, the four-port I350-DA4. I354 and I210 have no SR-IOV capability.
_I350 = ("1521", "1522", "1523", "1524", "1546")
_REGISTERS = {f"8086:{device}": _DTXSWC for device in _82576} | {f"8086:{device}": _TXSWC for device in _I350}
_MAP_HINTS = {
    # pci_mmap_resource(): with IO_STRICT_DEVMEM, user space cannot map a region that a driver has claimed.
    EINVAL: "boot with iomem=relaxed: the kernel denies access to registers in use (IO_STRICT_DEVMEM)",
    EPERM: "run as root; with Secure Boot, kernel lockdown denies access to root as well",
}


def serves(pf: PhysicalFunction) -> bool:
    return pf.device in _REGISTERS


def may_have_vepa(_pf: PhysicalFunction) -> bool:
    return True


def read_mode(host: HostRoot, pf: PhysicalFunction) -> EdgeMode | None:
    return EdgeMode.VEB if _read(host, pf, _REGISTERS[pf.device]) & _LOOPBACK else EdgeMode.VEPA


def set_mode(host: HostRoot, pf: PhysicalFunction, mode: EdgeMode) -> None:
    register = _REGISTERS[pf.device]
    before = _read(host, pf, register)
    # The lower bits are the driver's anti-spoofing masks, one bit per VF: they must not change.
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
            f"register {register.name} of PF {pf.address} is {actual:#010x}, expected {wanted:#010x} ({mode})",
            "retry: the driver reset the PF meanwhile, or the device does not have this bit",
        )


def describe(host: HostRoot, pf: PhysicalFunction) -> str:
    register = _REGISTERS[pf.device]
    value = _read(host, pf, register)
    state = "set: veb" if value & _LOOPBACK else "clear: vepa"
    return f"PF {pf.address} {register.name} (BAR0+{register.offset:#06x}) is {value:#010x}, loopback bit 31 {state}"


def _read(host: HostRoot, pf: PhysicalFunction, register: _Register) -> int:
    try:
        value = host.read32(_resource(pf), register.offset)
    except HostError as error:
        raise _map_error(pf, register, error) from None
    if value == _ALL_ONES:
        # A PCI read without a response: memory decoding is off, the power state is D3, or the card is gone.
        what = f"cannot read register {register.name} of PF {pf.address}: the value is all ones"
        raise HostError(what, "set the PF's interface up", ENODEV)
    return value


def _resource(pf: PhysicalFunction) -> str:
    return f"{function_path(pf.address)}/resource0"


def _map_error(pf: PhysicalFunction, register: _Register, error: HostError) -> HostError:
    what = f"cannot access register {register.name} of PF {pf.address} (/{_resource(pf)})"
    return HostError(what, _MAP_HINTS.get(error.errno, error.hint), error.errno)
