"""Runs an instruction in a virtual machine, to find out whether KVM works (Documentation/virt/kvm/api.rst, x86)."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import signal
import struct
import time
from pathlib import Path

from orchestrator.errors import HostError

_API_VERSION, _CREATE_VM, _MAP_SIZE, _CREATE_VCPU = 0xAE00, 0xAE01, 0xAE04, 0xAE41
_SET_MEMORY, _RUN = 0x4020AE46, 0xAE80
_GET_REGS, _SET_REGS, _GET_SREGS, _SET_SREGS = 0x8090AE81, 0x4090AE82, 0x8138AE83, 0x4138AE84
_EXIT_REASON_AT, _EXIT_HLT = 8, 5  # struct kvm_run
_PAGE, _START, _VALUE = 4096, 0x1000, 42
_CODE = bytes((0xB0, _VALUE, 0xF4))  # mov al, 42; hlt


def run_instruction(device: Path = Path("/dev/kvm"), *, timeout: float = 5.0) -> None:
    """Creates a virtual machine with one page, and executes `mov al, 42; hlt` in real mode.

    In a process of its own, which is killed after ``timeout`` seconds: where KVM is broken, the vCPU may never return. Raises
    HostError with the step that failed, and what the kernel said.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        try:
            _run(device)
            text = ""
        except OSError as error:
            text = f"{error.filename or device}: {error.strerror or error}"
        except BaseException as error:  # the child must not return into the caller's code
            text = str(error) or type(error).__name__
        os.write(writer, f"\n{text}".encode())
        os._exit(0)
    os.close(writer)
    try:
        answer = _await_answer(reader, timeout)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
    if answer is None:
        raise HostError(f"a virtual CPU of {device} did not execute two instructions within {timeout:g} s")
    if not answer.startswith("\n"):
        raise HostError(f"the process that tried {device} ended without an answer")
    if answer != "\n":
        raise HostError(answer[1:])


def _await_answer(reader: int, timeout: float) -> str | None:
    deadline, parts = time.monotonic() + timeout, b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0]:
            break
        part = os.read(reader, _PAGE)
        if not part:
            return parts.decode(errors="replace")
        parts += part
    return None


def _run(device: Path) -> None:
    kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(kvm, _API_VERSION)
    if version != 12:
        raise ValueError(f"{device} has API version {version}, expected 12")
    machine = _call("KVM_CREATE_VM", kvm, _CREATE_VM, 0)
    memory = mmap.mmap(-1, _PAGE)
    memory.write(_CODE)
    # slot, flags, guest address, size, address in this process
    region = struct.pack("=IIQQQ", 0, 0, _START, _PAGE, _find_address(memory))
    _call("KVM_SET_USER_MEMORY_REGION", machine, _SET_MEMORY, region)
    vcpu = _call("KVM_CREATE_VCPU", machine, _CREATE_VCPU, 0)
    state = mmap.mmap(vcpu, fcntl.ioctl(kvm, _MAP_SIZE))
    segments = bytearray(0x138)
    _call("KVM_GET_SREGS", vcpu, _GET_SREGS, segments)
    segments[0:8] = bytes(8)  # cs.base
    segments[12:14] = bytes(2)  # cs.selector
    _call("KVM_SET_SREGS", vcpu, _SET_SREGS, bytes(segments))
    _call("KVM_SET_REGS", vcpu, _SET_REGS, struct.pack("=18Q", *(0,) * 16, _START, 2))  # rip, rflags
    _call("KVM_RUN", vcpu, _RUN, 0)
    (reason,) = struct.unpack_from("=I", state, _EXIT_REASON_AT)
    if reason != _EXIT_HLT:
        raise ValueError(f"the virtual CPU ended with exit reason {reason}, expected {_EXIT_HLT} (KVM_EXIT_HLT)")
    registers = bytearray(18 * 8)
    _call("KVM_GET_REGS", vcpu, _GET_REGS, registers)
    if registers[0] != _VALUE:
        raise ValueError(f"the virtual CPU has {registers[0]} in its register, expected {_VALUE}")


def _call(name: str, descriptor: int, request: int, argument: int | bytes | bytearray) -> int:
    try:
        if isinstance(argument, bytearray):
            fcntl.ioctl(descriptor, request, argument)  # changes the argument
            return 0
        found = fcntl.ioctl(descriptor, request, argument)
        return found if isinstance(found, int) else 0
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None


def _find_address(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
