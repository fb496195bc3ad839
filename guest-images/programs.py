"""Writes the small programs of the guest images, each a static executable of one page: `python3 programs.py NAME FILE`.

They are assembled here, so that a build needs no compiler, and the same source gives the same bytes.

disengage   tells the host that the guest's boot is over: one hypercall, which KVM refuses and counts
exits       to try limits of VM exits, causes exits of one kind until it is killed: `exits cpuid|io|hypercall|mmio|msr|npf|timer`
"""

import struct
import sys
from pathlib import Path

CALL_NUMBER, BOOT_IS_OVER, UNKNOWN_CALL = 0x4E48, 1, 0x4E49

_BASE = 0x400000
_HEADERS = 64 + 56  # of the file, and of its only segment
_EXIT, _OPEN, _MMAP, _PREAD, _NANOSLEEP, _IOPL = 60, 2, 9, 17, 35, 172  # arch/x86/entry/syscalls/syscall_64.tbl
_UNUSED_ADDRESS = 0xFD000000  # of guest memory: in the PCI hole below 4 GB, where no device is
_FIRMWARE_ADDRESS = 0xFFFFF000  # the last page of the firmware, which the guest cannot write
_APIC_BASE = 0x1B  # an MSR that KVM does not let guests read without an exit
_SYSCALL = b"\x0f\x05"

# With the distance of a label in 4 bytes. `lea` loads its address into rdi.
_OPCODES = {"je": b"\x0f\x84", "jne": b"\x0f\x85", "js": b"\x0f\x88", "jmp": b"\xe9", "lea": b"\x48\x8d\x3d"}

Code = list[bytes | str | tuple[str, str]]
"""Instructions; a label `name:`; one of ``_OPCODES`` with its label."""


def set_eax(value: int) -> bytes:
    return b"\xb8" + struct.pack("<I", value)


def exit_with(status: int) -> bytes:
    return set_eax(_EXIT) + b"\xbf" + struct.pack("<I", status) + _SYSCALL


def hypercall(number: int, prefix: str) -> Code:
    """With the instruction of the CPU's vendor: KVM replaces that of the other, in a page that may be read-only."""
    compare = b"\x81\xfe"  # cmp esi, imm32
    return [
        b"\x31\xc0\x0f\xa2\x89\xde",  # cpuid leaf 0; the vendor's first four letters into esi
        set_eax(number),
        b"\xbb" + struct.pack("<I", BOOT_IS_OVER),  # first argument, in rbx (Documentation/virt/kvm/x86/hypercalls.rst)
        compare + b"Auth", ("je", f"{prefix}amd"),
        compare + b"Hygo", ("je", f"{prefix}amd"),
        b"\x0f\x01\xc1", ("jmp", f"{prefix}done"),  # vmcall
        f"{prefix}amd:", b"\x0f\x01\xd9",  # vmmcall
        f"{prefix}done:",
    ]  # fmt: skip


def disengage() -> Code:
    return [*hypercall(CALL_NUMBER, ""), exit_with(0)]


def map_memory(kind: str, flags: int, protection: int, address: int) -> Code:
    """open("/dev/mem", flags); mmap(0, 4096, protection, MAP_SHARED, fd, address): the address of the page in rax."""
    code = b"\x31\xff\xbe\0\x10\0\0\xba" + struct.pack("<I", protection)
    code += b"\x41\xba\x01\0\0\0\x41\xb9" + struct.pack("<I", address)
    return [f"{kind}:", *open_file("memory", flags), code, set_eax(_MMAP) + _SYSCALL + b"\x48\x85\xc0", ("js", "failed")]


def open_file(path: str, flags: int) -> Code:
    """The descriptor in r8."""
    code = b"\xbe" + struct.pack("<I", flags) + set_eax(_OPEN) + _SYSCALL + b"\x85\xc0\x41\x89\xc0"
    return [("lea", path), code, ("js", "failed")]


def exits() -> Code:
    # argc; the first two letters of argv[1] into ax
    code: Code = [b"\x83\x3c\x24\x02", ("jne", "usage"), b"\x48\x8b\x7c\x24\x10\x66\x8b\x07"]
    for name in ("cpuid", "io", "hypercall", "mmio", "msr", "npf", "timer"):
        code += [b"\x66\x3d" + name[:2].encode(), ("je", name)]
    code += ["usage:", exit_with(2), "failed:", exit_with(1)]
    code += ["cpuid:", b"\x31\xc0\x0f\xa2", ("jmp", "cpuid")]
    # out 0x80: the port that BIOSes write their progress to
    code += ["io:", set_eax(_IOPL) + b"\xbf\x03\0\0\0" + _SYSCALL + b"\x85\xc0", ("jne", "failed")]
    code += ["out:", b"\xe6\x80", ("jmp", "out")]
    code += ["hypercall:", *hypercall(UNKNOWN_CALL, "loop-"), ("jmp", "hypercall")]
    code += [*map_memory("mmio", 0, 1, _UNUSED_ADDRESS), "load:", b"\x8b\x18", ("jmp", "load")]
    # A store to memory that is mapped read-only for the guest (EPT violation on Intel); `mmio` is a load where nothing is mapped.
    code += [*map_memory("npf", 2, 3, _FIRMWARE_ADDRESS), "store:", b"\x89\x18", ("jmp", "store")]
    # pread(fd, stack, 8, number of the MSR), by the kernel's module `msr`
    code += ["msr:", *open_file("registers", 0), b"\x6a\0"]
    code += ["read:", b"\x44\x89\xc7\x48\x89\xe6\xba\x08\0\0\0\x41\xba" + struct.pack("<I", _APIC_BASE)]
    code += [set_eax(_PREAD) + _SYSCALL + b"\x85\xc0", ("js", "failed"), ("jmp", "read")]
    # nanosleep of 1 ns: the kernel programs its timer, sleeps, and is interrupted
    code += ["timer:", b"\x6a\x01\x6a\x00"]
    code += ["sleep:", set_eax(_NANOSLEEP) + b"\x48\x89\xe7\x31\xf6" + _SYSCALL, ("jmp", "sleep")]
    return [*code, "memory:", b"/dev/mem\0", "registers:", b"/dev/cpu/0/msr\0"]


def assemble(code: Code) -> bytes:
    places, at = {}, 0
    for part in code:
        if isinstance(part, str):
            places[part.removesuffix(":")] = at
        else:
            at += len(part) if isinstance(part, bytes) else len(_OPCODES[part[0]]) + 4
    text = b""
    for part in code:
        if isinstance(part, bytes):
            text += part
        elif isinstance(part, tuple):
            text += _OPCODES[part[0]]
            text += struct.pack("<i", places[part[1]] - len(text) - 4)  # counted from the end of the instruction
    return text


def build(name: str) -> bytes:
    """An ELF executable with one segment: the headers and the code (elf(5))."""
    text = assemble({"disengage": disengage, "exits": exits}[name]())
    size = _HEADERS + len(text)
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQ", 2, 62, 1, _BASE + _HEADERS, 64, 0)
    head += struct.pack("<IHHHHHH", 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 4096)  # PT_LOAD, readable and executable
    return head + segment + text


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(build(sys.argv[1]))
