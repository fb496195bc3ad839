"""Patches for two bugs in QEMU's emulation of AMD SVM that lose a lab. Only the lab's own copy of QEMU is patched.

Both bugs were found in Debian's QEMU 11.1.3; the sources have them since 10.2.

``stale-vector``: helper_vmrun (target/i386/tcg, svm_helper.c), event injection, case "external interrupt", stores the vector in
``cs->exception_index`` *and* delivers it immediately by do_interrupt_x86_hardirq(). The index stays set. If the virtual CPU must
leave its loop before the next VMEXIT, cpu_handle_exception() finds the index and delivers the vector a second time, as an
exception, which ignores RFLAGS.IF. A Linux guest that receives its timer interrupt inside its timer interrupt waits indefinitely
for a spinlock that it holds itself. Measured with both CPUs of the machine loaded: 2 of 97,000 deliveries in 200 s were
repetitions; without the store, 0 of 607,000 in 9 min.

``unlocked-interrupt``: helper_write_crN, case 8, calls cpu_interrupt() when a virtual interrupt becomes deliverable. Since 10.2
cpu_interrupt() asserts that the big QEMU lock is held, but helper_write_crN does not hold it: a guest that writes CR8 (OVMF,
Windows) aborts the whole emulated server with SIGABRT. helper_vmrun uses cpu_set_interrupt(), which sets the bit atomically
without the lock. The other callers of cpu_interrupt() that guest code can reach hold the lock: the local APIC by MMIO
(prepare_mmio_access) and by MSR (helper_wrmsr), I/O ports, cpu_check_watchpoint.

A place is found by symbols that QEMU exports for its modules and by the form of the instructions around it; it must be unique.
Otherwise the emulator is used without the patch, with a warning when a lab starts. Once QEMU has fixed a bug,
`nohype lab status --json` shows its patch as not applied, and its row of PATCHES can be deleted; with the last row, this module.
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

Item = TypeVar("Item")


class UnexpectedForm(Exception):
    """The program differs from what a patch expects; the text names the difference."""


@dataclass(frozen=True)
class Place:
    address: int  # virtual
    old: bytes
    new: bytes


@dataclass(frozen=True)
class Patch:
    name: str
    symbol: str
    effect: str  # of the bug, in a lab
    find: Callable[[Program], Place]  # or raises UnexpectedForm


class Program:
    """An x86-64 ELF program. Methods raise UnexpectedForm for a symbol that it does not export."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                elf = ELFFile(file)
                if elf.get_machine_arch() != "x64":
                    raise UnexpectedForm(f"the program is for {elf.get_machine_arch()}, not for x64")
                symbols, text = elf.get_section_by_name(".dynsym"), elf.get_section_by_name(".text")
                if not isinstance(symbols, SymbolTableSection) or text is None:
                    raise UnexpectedForm("section .dynsym or .text is missing")
                self._symbols = {
                    symbol.name: (symbol["st_value"], symbol["st_size"])
                    for symbol in symbols.iter_symbols()
                    if symbol["st_value"]
                }
                self._text, self._base, self._offset = text.data(), text["sh_addr"], text["sh_offset"]
                note = elf.get_section_by_name(".note.gnu.build-id")
                self.build_id = "".join(entry["n_desc"] for entry in note.iter_notes()) if isinstance(note, NoteSection) else ""
        except (ELFError, OSError, ValueError, KeyError) as error:
            raise UnexpectedForm(f"cannot be read as an ELF program: {error}") from None
        self._names = {address: name for name, (address, _) in self._symbols.items()}
        self._decoder = Cs(CS_ARCH_X86, CS_MODE_64)
        self._decoder.detail = True

    def address(self, symbol: str) -> int:
        if symbol not in self._symbols:
            raise UnexpectedForm(f"{symbol} is not exported")
        return int(self._symbols[symbol][0])

    def instructions(self, symbol: str) -> list[CsInsn]:
        start = self.address(symbol) - self._base
        size = int(self._symbols[symbol][1])
        code = self._text[start : start + size] if start >= 0 else b""
        decoded = list(self._decoder.disasm(code, start + self._base))
        if not code or sum(insn.size for insn in decoded) != size:
            raise UnexpectedForm(f"{symbol} cannot be decoded")
        return decoded

    def target(self, instruction: CsInsn) -> int | None:
        """The target of a direct jump or call; None for any other instruction."""
        is_branch = instruction.mnemonic == "call" or instruction.mnemonic.startswith("j")
        operands = instruction.operands
        return int(operands[0].imm) if is_branch and operands and operands[0].type == X86_OP_IMM else None

    def goes_to(self, instruction: CsInsn, symbol: str) -> bool:
        return self.target(instruction) == self.address(symbol)

    def file_offset(self, address: int) -> int:
        return int(self._offset + address - self._base)


def patch_emulator(program: Path, patches: Sequence[Patch] | None = None) -> EmulatorRecord:
    """Applies the patches (PATCHES by default) in place and reads each place back. The file must not be shared."""
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
        place_fields = {"address": f"{place.address:#x}", "old": place.old.hex(), "new": place.new.hex()}
        records.append(record.model_copy(update={"applied": True, **place_fields}))
    return EmulatorRecord(build_id=build_id, patches=tuple(records))


def find_exception_probe(program: Path) -> int:
    """File offset of the call that delivers an exception, for a uprobe that counts repeated deliveries.

    There %esi is the vector, and %edx is not 0 for a software interrupt.
    """
    binary = Program(program)
    handler = binary.instructions("x86_cpu_do_interrupt")
    call = _only("calls of do_interrupt_all", [insn for insn in handler if binary.goes_to(insn, "do_interrupt_all")])
    return binary.file_offset(call.address)


def _find_stale_vector(program: Program) -> Place:
    """The store into cs->exception_index in the block of helper_vmrun that ends with the call of do_interrupt_x86_hardirq."""
    displacement = _exception_index(program)
    code = program.instructions("helper_vmrun")
    call = _only(
        "calls of do_interrupt_x86_hardirq", [insn for insn in code if program.goes_to(insn, "do_interrupt_x86_hardirq")]
    )
    before = _straight_line(code, call)
    env = _only("register with env before that call", [insn.operands[1].reg for insn in before if _sets(insn, X86_REG_RDI)][:1])
    stores = [insn for insn in before if insn.mnemonic == "mov" and _memory(insn, 0) == (env, displacement)]
    store = _only("stores into cs->exception_index before that call", stores)
    # A jump into the block would be another type of event, which requires the store.
    guard = max(
        (insn.address for insn in before if insn.address < store.address and program.target(insn)), default=code[0].address
    )
    if any(guard < (program.target(insn) or 0) <= store.address for insn in code):
        raise UnexpectedForm("another path of helper_vmrun leads to the store into cs->exception_index")
    return Place(store.address, bytes(store.bytes), _NOP * store.size)


def _exception_index(program: Program) -> int:
    """Displacement of cs->exception_index from env (CPUX86State), both as x86_cpu_do_interrupt() uses them."""
    code = program.instructions("x86_cpu_do_interrupt")
    compared = [insn.operands[0].reg for insn in code if insn.mnemonic == "cmp" and _constant(insn) == _EXCP_VMEXIT]
    loads = [
        found for insn in code if insn.mnemonic == "mov" and insn.operands[0].reg in compared and (found := _memory(insn, 1))
    ]
    jump = _only("jumps to do_vmexit", [insn for insn in code if program.goes_to(insn, "do_vmexit")])
    line = _straight_line(code, jump)
    envs = [
        found for insn in line if insn.mnemonic == "lea" and insn.operands[0].reg == X86_REG_RDI and (found := _memory(insn, 1))
    ]
    (_, index), (_, env) = _only("loads of cs->exception_index", loads), _only("computations of env", envs)
    return int(index - env)


def _find_unlocked_interrupt(program: Program) -> Place:
    """The jump or call from helper_write_crN to cpu_interrupt(cs, CPU_INTERRUPT_VIRQ); redirected to cpu_set_interrupt."""
    code = program.instructions("helper_write_crN")
    jump = _only("jumps to cpu_interrupt", [insn for insn in code if program.goes_to(insn, "cpu_interrupt")])
    masks = [_constant(insn) for insn in _straight_line(code, jump) if _sets(insn, X86_REG_ESI)]
    if masks[:1] != [_CPU_INTERRUPT_VIRQ]:
        raise UnexpectedForm("helper_write_crN calls cpu_interrupt with an interrupt other than CPU_INTERRUPT_VIRQ")
    old = bytes(jump.bytes)
    if old[0] not in _NEAR_BRANCHES:
        raise UnexpectedForm(f"helper_write_crN reaches cpu_interrupt by `{jump.mnemonic} {jump.op_str}`")
    distance = program.address("cpu_set_interrupt") - (jump.address + jump.size)
    return Place(jump.address, old, old[:1] + distance.to_bytes(4, "little", signed=True))


PATCHES = (
    Patch("stale-vector", "helper_vmrun", "a guest in the lab may hang", _find_stale_vector),
    Patch("unlocked-interrupt", "helper_write_crN", "a guest that writes CR8 aborts the lab", _find_unlocked_interrupt),
)


def _replace(program: Path, offset: int, place: Place) -> None:
    try:
        with program.open("r+b") as file:
            file.seek(offset)
            if file.read(len(place.old)) != place.old:
                raise ImageError(
                    f"{program} does not contain {place.old.hex()} at offset {offset:#x}, unlike its section headers"
                )
            file.seek(offset)
            file.write(place.new)
            file.flush()
            file.seek(offset)
            if file.read(len(place.new)) != place.new:
                raise ImageError(f"{program} does not contain at offset {offset:#x} what was written there")
    except OSError as error:
        raise ImageError(f"cannot patch the emulator {program}: {error.strerror}") from None


def _straight_line(code: Sequence[CsInsn], end: CsInsn) -> list[CsInsn]:
    """The instructions before ``end``, nearest first, back to a jump, call or return."""
    line: list[CsInsn] = []
    for insn in reversed([insn for insn in code if insn.address < end.address]):
        if insn.mnemonic in ("jmp", "call", "ret"):
            break
        line.append(insn)
    return line


def _sets(instruction: CsInsn, register: int) -> bool:
    """Whether the instruction is `mov register, ...`."""
    first = instruction.operands[0] if instruction.mnemonic == "mov" else None
    return first is not None and first.type == X86_OP_REG and first.reg == register


def _constant(instruction: CsInsn) -> int | None:
    """The second operand if it is a constant, otherwise None."""
    operands = instruction.operands
    return int(operands[1].imm) if len(operands) == 2 and operands[1].type == X86_OP_IMM else None


def _memory(instruction: CsInsn, operand: int) -> tuple[int, int] | None:
    """Base register and displacement of a memory operand without index register; None for any other operand."""
    operands = instruction.operands
    if len(operands) != 2 or operands[operand].type != X86_OP_MEM or operands[operand].mem.index:
        return None
    return operands[operand].mem.base, operands[operand].mem.disp


def _only(what: str, found: Sequence[Item]) -> Item:
    if len(found) != 1:
        raise UnexpectedForm(f"found {len(found)} {what}, expected 1")
    return found[0]
