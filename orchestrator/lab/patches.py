"""Two faults of QEMU's emulation of AMD SVM that lose a lab, and the patches that the lab's own copy of QEMU gets against them.

Both were found in Debian's QEMU 11.1.3, and are in the sources since 10.2.

``stale-vector``: helper_vmrun (target/i386/tcg, svm_helper.c), event injection, case "external interrupt", stores the vector in
``cs->exception_index`` *and* delivers it at once by do_interrupt_x86_hardirq(). The index stays. When the virtual CPU is asked to
leave its loop before the next VMEXIT, cpu_handle_exception() finds the index and delivers the vector a second time, as an
exception, which ignores RFLAGS.IF. A Linux guest that gets its timer interrupt inside its timer interrupt waits for ever for a
spinlock that it holds itself. Measured with both CPUs of the machine loaded: 2 of 97,000 deliveries were second ones in 200 s;
without the store 0 of 607,000 in 9 min.

``unlocked-interrupt``: helper_write_crN, case 8, calls cpu_interrupt() where a virtual interrupt becomes deliverable. Since 10.2
cpu_interrupt() asserts that the big QEMU lock is held, and helper_write_crN does not hold it: a guest that writes CR8 (OVMF,
Windows) ends the whole emulated server with SIGABRT. helper_vmrun does the same by cpu_set_interrupt(), which sets the bit
atomically and needs no lock. The other callers of cpu_interrupt() that code of a guest can reach hold the lock: the local APIC by
MMIO (prepare_mmio_access) and by MSR (helper_wrmsr), I/O ports, cpu_check_watchpoint.

A place is found by symbols that QEMU exports for its modules and by the form of the instructions around it, and it must be the
only one. Where it is not found so, the emulator is used as it is, and the user is warned when a lab starts. When a QEMU has a
fault repaired, `nohype lab status --json` shows that patch as not applied, and its row of PATCHES can be deleted; with the last
row, this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from capstone import CS_ARCH_X86, CS_MODE_64, Cs, CsInsn
from capstone.x86 import X86_OP_IMM, X86_OP_MEM, X86_OP_REG, X86_REG_ESI, X86_REG_RDI
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection, SymbolTableSection

from orchestrator.errors import ImageError
from orchestrator.lab.emulator import EmulatorRecord, PatchRecord

_EXCP_VMEXIT = 0x100  # target/i386/cpu.h
_CPU_INTERRUPT_VIRQ = 0x100  # CPU_INTERRUPT_TGT_INT_0, include/hw/core/cpu.h
_NOP = b"\x90"
_NEAR_BRANCHES = (0xE8, 0xE9)  # call and jmp with a distance of 32 bits

Found = TypeVar("Found")


class UnexpectedForm(Exception):
    """The program does not look as a patch expects; the text says what differs."""


@dataclass(frozen=True)
class Place:
    """Bytes of the program that are replaced; the address is virtual."""

    address: int
    old: bytes
    new: bytes


@dataclass(frozen=True)
class Patch:
    """One row: where the fault is, what it does, and how its place is found.

    Attributes:
        effect: what happens in a lab without the patch.
        find: gives the place, or raises UnexpectedForm.
    """

    name: str
    symbol: str
    effect: str
    find: Callable[[Program], Place]


class Program:
    """An x86-64 ELF program, as far as a patch needs to see it.

    Raises:
        UnexpectedForm: the file is not such a program, or has no dynamic symbols.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                elf = ELFFile(file)
                if elf.get_machine_arch() != "x64":
                    raise UnexpectedForm(f"it is a program for {elf.get_machine_arch()}, not for x64")
                symbols, text = elf.get_section_by_name(".dynsym"), elf.get_section_by_name(".text")
                if not isinstance(symbols, SymbolTableSection) or text is None:
                    raise UnexpectedForm("it has no section .dynsym or .text")
                self._symbols = {one.name: (one["st_value"], one["st_size"]) for one in symbols.iter_symbols() if one["st_value"]}
                self._text, self._base, self._offset = text.data(), text["sh_addr"], text["sh_offset"]
                note = elf.get_section_by_name(".note.gnu.build-id")
                self.build_id = "".join(one["n_desc"] for one in note.iter_notes()) if isinstance(note, NoteSection) else ""
        except (ELFError, OSError, ValueError, KeyError) as error:
            raise UnexpectedForm(f"it cannot be read as an ELF program: {error}") from None
        self._names = {address: name for name, (address, _) in self._symbols.items()}
        self._decoder = Cs(CS_ARCH_X86, CS_MODE_64)
        self._decoder.detail = True

    def address(self, symbol: str) -> int:
        """Where a symbol is; UnexpectedForm if the program does not export it."""
        if symbol not in self._symbols:
            raise UnexpectedForm(f"it does not export {symbol}")
        return int(self._symbols[symbol][0])

    def instructions(self, symbol: str) -> list[CsInsn]:
        """All instructions of a function; UnexpectedForm if it is not exported or does not decode to its end."""
        start = self.address(symbol) - self._base
        size = int(self._symbols[symbol][1])
        code = self._text[start : start + size] if start >= 0 else b""
        decoded = list(self._decoder.disasm(code, start + self._base))
        if not code or sum(one.size for one in decoded) != size:
            raise UnexpectedForm(f"{symbol} cannot be decoded")
        return decoded

    def target(self, instruction: CsInsn) -> int | None:
        """Where a direct jump or call leads; None for any other instruction."""
        is_branch = instruction.mnemonic == "call" or instruction.mnemonic.startswith("j")
        operands = instruction.operands
        return int(operands[0].imm) if is_branch and operands and operands[0].type == X86_OP_IMM else None

    def goes_to(self, instruction: CsInsn, symbol: str) -> bool:
        """Whether a direct jump or call leads to the symbol."""
        return self.target(instruction) == self.address(symbol)

    def file_offset(self, address: int) -> int:
        """Where an address of .text is in the file."""
        return int(self._offset + address - self._base)


def patch_emulator(program: Path, patches: Sequence[Patch] | None = None) -> EmulatorRecord:
    """Applies the patches to a program file of our own, in place, and reads each place back.

    Args:
        program: the file; it must not be shared with anything else.
        patches: rows; PATCHES unless given.

    Raises:
        ImageError: the file cannot be written, or does not hold what was written.
    """
    records, build_id = [], ""
    for patch in PATCHES if patches is None else patches:
        record = PatchRecord(name=patch.name, symbol=patch.symbol, effect=patch.effect, applied=False)
        try:
            binary = Program(program)
            build_id = binary.build_id
            place = patch.find(binary)
        except UnexpectedForm as error:
            records.append(record.model_copy(update={"reason": str(error)}))
            continue
        _replace(program, binary.file_offset(place.address), place)
        found = {"address": f"{place.address:#x}", "old": place.old.hex(), "new": place.new.hex()}
        records.append(record.model_copy(update={"applied": True, **found}))
    return EmulatorRecord(build_id=build_id, patches=tuple(records))


def find_exception_probe(program: Path) -> int:
    """File offset of the call by which the emulator delivers an exception: for a uprobe that counts second deliveries.

    There %esi is the vector and %edx is not 0 for a software interrupt.

    Raises:
        UnexpectedForm: the place is not found, or there are several.
    """
    binary = Program(program)
    handler = binary.instructions("x86_cpu_do_interrupt")
    call = _only("calls of do_interrupt_all", [one for one in handler if binary.goes_to(one, "do_interrupt_all")])
    return binary.file_offset(call.address)


def _find_stale_vector(program: Program) -> Place:
    """The store into cs->exception_index in the block of helper_vmrun that ends with the call of do_interrupt_x86_hardirq."""
    displacement = _exception_index(program)
    code = program.instructions("helper_vmrun")
    call = _only("calls of do_interrupt_x86_hardirq", [one for one in code if program.goes_to(one, "do_interrupt_x86_hardirq")])
    before = _straight_line(code, call)
    env = _only("register with env before that call", [one.operands[1].reg for one in before if _sets(one, X86_REG_RDI)][:1])
    stores = [one for one in before if one.mnemonic == "mov" and _memory(one, 0) == (env, displacement)]
    store = _only("stores into cs->exception_index before that call", stores)
    # A jump into the block would be another type of event, which needs the store.
    guard = max((one.address for one in before if one.address < store.address and program.target(one)), default=code[0].address)
    if any(guard < (program.target(one) or 0) <= store.address for one in code):
        raise UnexpectedForm("another path of helper_vmrun leads to the store into cs->exception_index")
    return Place(store.address, bytes(store.bytes), _NOP * store.size)


def _exception_index(program: Program) -> int:
    """Displacement of cs->exception_index from env (CPUX86State), both as x86_cpu_do_interrupt() uses them."""
    code = program.instructions("x86_cpu_do_interrupt")
    compared = [one.operands[0].reg for one in code if one.mnemonic == "cmp" and _constant(one) == _EXCP_VMEXIT]
    loads = [found for one in code if one.mnemonic == "mov" and one.operands[0].reg in compared and (found := _memory(one, 1))]
    jump = _only("jumps to do_vmexit", [one for one in code if program.goes_to(one, "do_vmexit")])
    line = _straight_line(code, jump)
    envs = [found for one in line if one.mnemonic == "lea" and one.operands[0].reg == X86_REG_RDI and (found := _memory(one, 1))]
    (_, index), (_, env) = _only("loads of cs->exception_index", loads), _only("computations of env", envs)
    return int(index - env)


def _find_unlocked_interrupt(program: Program) -> Place:
    """The one jump or call from helper_write_crN to cpu_interrupt(cs, CPU_INTERRUPT_VIRQ); it is led to cpu_set_interrupt."""
    code = program.instructions("helper_write_crN")
    jump = _only("jumps to cpu_interrupt", [one for one in code if program.goes_to(one, "cpu_interrupt")])
    masks = [_constant(one) for one in _straight_line(code, jump) if _sets(one, X86_REG_ESI)]
    if masks[:1] != [_CPU_INTERRUPT_VIRQ]:
        raise UnexpectedForm("helper_write_crN calls cpu_interrupt with another interrupt than CPU_INTERRUPT_VIRQ")
    old = bytes(jump.bytes)
    if old[0] not in _NEAR_BRANCHES:
        raise UnexpectedForm(f"helper_write_crN reaches cpu_interrupt by `{jump.mnemonic} {jump.op_str}`")
    distance = program.address("cpu_set_interrupt") - (jump.address + jump.size)
    return Place(jump.address, old, old[:1] + distance.to_bytes(4, "little", signed=True))


PATCHES = (
    Patch("stale-vector", "helper_vmrun", "a guest in the lab may hang", _find_stale_vector),
    Patch("unlocked-interrupt", "helper_write_crN", "a guest that writes CR8 ends the lab", _find_unlocked_interrupt),
)


def _replace(program: Path, offset: int, place: Place) -> None:
    try:
        with program.open("r+b") as file:
            file.seek(offset)
            if file.read(len(place.old)) != place.old:
                raise ImageError(f"{program} does not hold {place.old.hex()} at offset {offset:#x}, as its section headers say")
            file.seek(offset)
            file.write(place.new)
            file.flush()
            file.seek(offset)
            if file.read(len(place.new)) != place.new:
                raise ImageError(f"{program} does not hold at offset {offset:#x} what was written there")
    except OSError as error:
        raise ImageError(f"cannot patch the emulator {program}: {error.strerror}") from None


def _straight_line(code: Sequence[CsInsn], end: CsInsn) -> list[CsInsn]:
    """The instructions before ``end``, nearest first, up to one after which the next is not reached directly."""
    line: list[CsInsn] = []
    for one in reversed([one for one in code if one.address < end.address]):
        if one.mnemonic in ("jmp", "call", "ret"):
            break
        line.append(one)
    return line


def _sets(instruction: CsInsn, register: int) -> bool:
    """Whether it is `mov register, ...`."""
    first = instruction.operands[0] if instruction.mnemonic == "mov" else None
    return first is not None and first.type == X86_OP_REG and first.reg == register


def _constant(instruction: CsInsn) -> int | None:
    """The second operand, if it is a constant."""
    operands = instruction.operands
    return int(operands[1].imm) if len(operands) == 2 and operands[1].type == X86_OP_IMM else None


def _memory(instruction: CsInsn, operand: int) -> tuple[int, int] | None:
    """Base register and displacement of an operand in memory that has no index register; None for any other operand."""
    operands = instruction.operands
    if len(operands) != 2 or operands[operand].type != X86_OP_MEM or operands[operand].mem.index:
        return None
    return operands[operand].mem.base, operands[operand].mem.disp


def _only(what: str, found: Sequence[Found]) -> Found:
    if len(found) != 1:
        raise UnexpectedForm(f"there are {len(found)} {what}, 1 was expected")
    return found[0]
