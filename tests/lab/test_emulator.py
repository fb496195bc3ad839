"""The bugs that the emulator's patches fix, tried in the lab's own KVM."""

from __future__ import annotations

import struct

import pytest

from orchestrator.errors import LabLost
from orchestrator.lab.health import check_guests
from tests.lab.conftest import LabHost

EXIT = 0x2A
"""Written to isa-debug-exit, which makes QEMU exit with the status 2 * value + 1 (QEMU, hw/misc/debugexit.c)."""


def build_boot_sector(writes: int) -> bytes:
    """A boot sector that writes CR8 with interrupts off, while the BIOS's timer interrupt is pending, and then exits.

    The loop must take longer than 55 ms, the period of that timer. CR8 is written in 16-bit code by LOCK MOV CR0 (AMD64
    Architecture Programmer's Manual, volume 3, MOV CRn: AltMovCr8).
    """
    code = b"\xfa"  # cli
    code += b"\x66\xb9" + struct.pack("<I", writes)  # mov ecx, writes
    code += b"\x66\x31\xc0"  # xor eax, eax
    loop = b"\xf0\x0f\x22\xc0" + b"\x66\x49"  # lock mov cr0, eax; dec ecx
    code += loop + b"\x75" + struct.pack("<b", -(len(loop) + 2))  # jnz to the loop
    code += b"\xba\xf4\x00" + b"\xb0" + bytes([EXIT]) + b"\xee"  # mov dx, 0xf4; mov al, EXIT; out dx, al
    code += b"\xf4\xeb\xfd"  # hlt, in a loop
    return code.ljust(510, b"\0") + b"\x55\xaa"


def put(host: LabHost, path: str, data: bytes) -> None:
    escaped = "".join(f"\\x{byte:02x}" for byte in data)
    host.run(f"printf '{escaped}' > {path}")


def test_the_emulator_was_patched(host: LabHost) -> None:
    assert host.lab.state.emulator is not None
    assert host.lab.state.emulator.warning() == ""


@pytest.mark.soak
def test_guest_that_writes_cr8_does_not_abort_the_lab(host: LabHost) -> None:
    words = "-accel kvm -cpu host -M pc -m 16M -nodefaults -no-user-config -display none -device isa-debug-exit,iobase=0xf4"
    put(host, "/root/cr8", build_boot_sector(2_000_000))
    try:
        done = host.run(f"timeout 120 qemu-system-x86_64 {words} -drive file=/root/cr8,format=raw,if=ide", check=False)
    finally:
        host.run("rm /root/cr8")
    assert done.status == 2 * EXIT + 1, done.stderr


SPIN = b"\xfa\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"
"""A boot sector: interrupts off, and a jump to itself."""
SPIN_XML = """<domain type="kvm"><name>spin</name><memory unit="MiB">16</memory><vcpu cpuset="0-1">1</vcpu>
<os><type arch="x86_64" machine="pc">hvm</type></os><devices><disk type="file" device="disk"><driver name="qemu" type="raw"/>
<source file="/var/tmp/spin"/><target dev="hda" bus="ide"/></disk></devices></domain>"""


@pytest.mark.soak
def test_guest_that_spins_with_interrupts_off_is_named(host: LabHost) -> None:
    put(host, "/var/tmp/spin", SPIN)
    put(host, "/var/tmp/spin.xml", SPIN_XML.encode())
    host.run("virsh -q -c qemu:///system create /var/tmp/spin.xml")
    try:
        with pytest.raises(LabLost, match="guest spin, vCPU 0: spins at RIP 0x"):
            check_guests(host.lab)
    finally:
        host.run("virsh -q -c qemu:///system destroy spin; rm -f /var/tmp/spin /var/tmp/spin.xml")
    check_guests(host.lab)
