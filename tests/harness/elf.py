"""A small x86-64 ELF shared object with functions of given code: what the search for places to patch reads, and no more."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

BASE = 0x401000
OFFSET = 0x1000
Code = Sequence[bytes | tuple[str, str]]
"""Instructions: bytes, or a jump to a symbol as ("jmp", symbol), ("call", symbol) or ("jne", symbol)."""

_OPCODES = {"call": b"\xe8", "jmp": b"\xe9", "jne": b"\x0f\x85"}


def write_elf(path: Path, functions: Mapping[str, Code], *, build_id: bytes = b"\xab" * 20, machine: int = 62) -> dict[str, int]:
    """Writes the file.

    Args:
        functions: code by symbol, laid one after the other from BASE.
        machine: e_machine; 62 is x86-64.

    Returns:
        The address of each symbol.
    """
    addresses, at = {}, BASE
    for name, code in functions.items():
        addresses[name] = at
        at += sum(len(_encode(one, 0, {})) for one in code)
    text = b""
    for code in functions.values():
        for one in code:
            text += _encode(one, BASE + len(text), addresses)
    names, symbols = b"\0", bytes(24)
    ends = [*list(addresses.values())[1:], BASE + len(text)]
    for (name, address), end in zip(addresses.items(), ends, strict=True):
        symbols += struct.pack("<IBBHQQ", len(names), 0x12, 0, 1, address, end - address)
        names += name.encode() + b"\0"
    note = struct.pack("<III4s", 4, len(build_id), 3, b"GNU\0") + build_id
    _write(path, text, symbols, names, note, machine)
    return addresses


def _encode(one: bytes | tuple[str, str], at: int, addresses: Mapping[str, int]) -> bytes:
    if isinstance(one, bytes):
        return one
    opcode = _OPCODES[one[0]]
    distance = addresses.get(one[1], 0) - (at + len(opcode) + 4) if addresses else 0
    return opcode + struct.pack("<i", distance)


def _write(path: Path, text: bytes, symbols: bytes, names: bytes, note: bytes, machine: int) -> None:
    titles = b"\0.text\0.dynsym\0.dynstr\0.note.gnu.build-id\0.shstrtab\0"
    parts = [(b".text", 1, 6, BASE, text, 0, 0), (b".dynsym", 11, 2, 0, symbols, 3, 24), (b".dynstr", 3, 2, 0, names, 0, 0),
             (b".note.gnu.build-id", 7, 2, 0, note, 0, 0), (b".shstrtab", 3, 0, 0, titles, 0, 0)]  # fmt: skip
    body, headers = b"", bytes(64)
    for title, kind, flags, address, data, link, size in parts:
        fields = titles.index(title), kind, flags, address, OFFSET + len(body), len(data), link, 1 if kind == 11 else 0, 4, size
        headers += struct.pack("<IIQQQQIIQQ", *fields)
        body += data + bytes(-len(data) % 16)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, OFFSET + len(body), 0, 64, 0, 0, 64, len(parts) + 1, len(parts))
    path.write_bytes(head + bytes(OFFSET - len(head)) + body + headers)
