"""The patches of the lab's emulator: each place is found by its form and must be unique; otherwise nothing is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.lab import patches
from orchestrator.lab.emulator import EmulatorRecord, read_record, write_record
from orchestrator.lab.patches import Patch, Place, Program, UnexpectedForm, find_exception_probe, patch_emulator
from tests.harness.elf import BASE, OFFSET, Code, write_elf

RET = b"\xc3"
STORE = b"\x89\xb3\x50\xc2\xff\xff"  # mov [rbx-0x3db0], esi
OTHER_STORE = b"\x89\xb3\x54\xc2\xff\xff"  # mov [rbx-0x3dac], esi
ENV_TO_RDI = b"\x48\x89\xdf"  # mov rdi, rbx
VIRQ = b"\xbe\x00\x01\x00\x00"  # mov esi, 0x100
HANDLER: Code = (
    b"\x8b\xb5\xc0\x02\x00\x00",  # mov esi, [rbp+0x2c0]
    b"\x48\x89\xc3",  # mov rbx, rax
    b"\x81\xfe\x00\x01\x00\x00",  # cmp esi, 0x100
    b"\x75\x0c",  # jne over the next two
    b"\x48\x8d\xb8\x70\x40\x00\x00",  # lea rdi, [rax+0x4070]
    ("jmp", "do_vmexit"),
    ("call", "do_interrupt_all"),
    RET,
)
VMRUN: Code = (("call", "x86_ldl_phys"), b"\x85\xc0", ("jne", "end"), STORE, OTHER_STORE, ENV_TO_RDI,
               ("call", "do_interrupt_x86_hardirq"), RET)  # fmt: skip
CR8: Code = (b"\x5b", RET, VIRQ, b"\x5b", ("jmp", "cpu_interrupt"), RET)
FUNCTIONS: dict[str, Code] = {
    "helper_vmrun": VMRUN, "end": (RET,), "x86_cpu_do_interrupt": HANDLER, "helper_write_crN": CR8,
    **{name: (RET,) for name in ("do_vmexit", "do_interrupt_all", "do_interrupt_x86_hardirq", "x86_ldl_phys")},
    "cpu_interrupt": (RET,), "cpu_set_interrupt": (RET,),
}  # fmt: skip


def build(folder: Path, **changed: Code | None) -> Path:
    """A program like QEMU; functions are replaced, or omitted with None."""
    path = folder / "qemu-system-x86_64"
    write_elf(path, {name: code for name, code in {**FUNCTIONS, **changed}.items() if code is not None})
    return path


def replaced(code: Code, old: bytes | tuple[str, str], *new: bytes | tuple[str, str]) -> Code:
    at = list(code).index(old)
    return (*code[:at], *new, *code[at + 1 :])


def test_both_places_are_found_replaced_and_recorded(tmp_path: Path) -> None:
    path = build(tmp_path)
    before = path.read_bytes()
    record = patch_emulator(path)
    vmrun, cr8 = record.patches
    assert (record.build_id, record.warning()) == ("ab" * 20, "")
    assert (vmrun.name, vmrun.applied, vmrun.old, vmrun.new) == ("stale-vector", True, STORE.hex(), "90" * 6)
    after = path.read_bytes()
    at = int(vmrun.address or "", 16) - BASE + OFFSET
    assert after[at : at + 6] == b"\x90" * 6
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 7, "6 bytes of the store, 1 of the distance"
    code = Program(path).instructions("helper_write_crN")
    assert [Program(path).goes_to(one, "cpu_set_interrupt") for one in code if one.mnemonic == "jmp"] == [True]
    assert (cr8.name, cr8.applied, cr8.reason) == ("unlocked-interrupt", True, "")


def test_exception_probe_is_found(tmp_path: Path) -> None:
    path = build(tmp_path)
    at = find_exception_probe(path)
    assert path.read_bytes()[at] == 0xE8


@pytest.mark.parametrize(
    ("changed", "name", "reason"),
    [
        ({"helper_vmrun": replaced(VMRUN, STORE)}, "stale-vector", "found 0 stores into cs->exception_index"),
        ({"helper_vmrun": replaced(VMRUN, STORE, STORE, STORE)}, "stale-vector", "found 2 stores"),
        ({"helper_vmrun": (*VMRUN[:-1], ("call", "do_interrupt_x86_hardirq"), RET)}, "stale-vector", "found 2 calls of"),
        ({"helper_vmrun": (b"\x75\x0d", *VMRUN)}, "stale-vector", "another path of helper_vmrun leads to the store"),
        ({"helper_vmrun": None}, "stale-vector", "helper_vmrun is not exported"),
        ({"helper_vmrun": (*VMRUN, b"\x06")}, "stale-vector", "helper_vmrun cannot be decoded"),
        ({"x86_cpu_do_interrupt": replaced(HANDLER, ("jmp", "do_vmexit"), b"\x90" * 5)}, "stale-vector", "0 jumps to do_vmexit"),
        ({"x86_cpu_do_interrupt": replaced(HANDLER, b"\x81\xfe\x00\x01\x00\x00", b"\x90" * 6)}, "stale-vector", "0 loads of"),
        ({"helper_write_crN": replaced(CR8, VIRQ, b"\xbe\x02\x00\x00\x00")}, "unlocked-interrupt", "an interrupt other than"),
        ({"helper_write_crN": replaced(CR8, VIRQ)}, "unlocked-interrupt", "an interrupt other than"),
        ({"helper_write_crN": (*CR8, *CR8)}, "unlocked-interrupt", "found 2 jumps to cpu_interrupt"),
        ({"helper_write_crN": (VIRQ, ("jne", "cpu_interrupt"), RET)}, "unlocked-interrupt", "by `jne "),
        ({"helper_write_crN": (RET,)}, "unlocked-interrupt", "found 0 jumps"),
        ({"cpu_set_interrupt": None}, "unlocked-interrupt", "cpu_set_interrupt is not exported"),
    ],
)  # fmt: skip
def test_unexpected_form_is_not_patched_and_reported(
    tmp_path: Path, changed: dict[str, Code | None], name: str, reason: str
) -> None:
    path = build(tmp_path, **changed)
    record = patch_emulator(path)
    left = {patch.name: patch for patch in record.patches if not patch.applied}
    assert list(left) == [name], "the other patch is applied all the same"
    assert reason in left[name].reason
    assert left[name].old is None
    assert name in record.warning()
    assert left[name].effect in record.warning()
    assert "\n" not in record.warning()


def test_patched_program_is_not_patched_again(tmp_path: Path) -> None:
    path = build(tmp_path)
    patch_emulator(path)
    before = path.read_bytes()
    assert [patch.applied for patch in patch_emulator(path).patches] == [False, False]
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x01\x01" + bytes(9)])
def test_other_file_is_not_changed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "qemu"
    path.write_bytes(content)
    assert [patch.applied for patch in patch_emulator(path).patches] == [False, False]
    assert path.read_bytes() == content


def test_program_for_another_architecture_is_not_patched(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    write_elf(path, FUNCTIONS, machine=183)
    assert all("AArch64" in patch.reason for patch in patch_emulator(path).patches)


def test_place_with_other_bytes_is_an_error(tmp_path: Path) -> None:
    path = build(tmp_path)
    wrong = Patch("wrong", "helper_vmrun", "", lambda program: Place(BASE, b"\xff\xff", b"\x90\x90"))
    with pytest.raises(ImageError, match="does not contain ffff"):
        patch_emulator(path, [wrong])


def test_record_is_stored_next_to_the_root(tmp_path: Path) -> None:
    tools = tmp_path / "root"
    tools.mkdir()
    record = patch_emulator(build(tmp_path))
    write_record(tools, record)
    assert read_record(tools) == record
    assert read_record(tmp_path / "elsewhere" / "root") is None
    assert isinstance(EmulatorRecord.model_validate_json(record.model_dump_json()), EmulatorRecord)


def test_patch_names_are_unique() -> None:
    assert len({patch.name for patch in patches.PATCHES}) == len(patches.PATCHES)
    with pytest.raises(UnexpectedForm, match="cannot be read"):
        Program(Path("/nonexistent"))
