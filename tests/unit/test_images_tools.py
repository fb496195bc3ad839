"""The small programs of guest images."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.host.thread_counts import BOOT_IS_OVER, CALL_NUMBER
from orchestrator.images.recipe import read_recipe, recipe_names, recipes_folder
from orchestrator.images.tools import DISENGAGE, build_tools

VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build_tools(recipes_folder(), ["disengage", "exits"], tmp_path)
    return tmp_path


def test_programs_are_static_executables(built: Path) -> None:
    for name in ("disengage", "exits"):
        data = (built / name).read_bytes()
        assert data[:4] == b"\x7fELF"
        kind, machine, _, entry, table = struct.unpack_from("<HHIQQ", data, 16)
        assert (kind, machine, table) == (2, 62, 64)
        segment, flags, offset, address, _, size, memory = struct.unpack_from("<IIQQQQQ", data, table)
        assert (segment, flags, offset, size, memory) == (1, 5, 0, len(data), len(data))
        assert address < entry < address + size
        assert (built / name).stat().st_mode & 0o777 == 0o755


def test_same_source_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    build_tools(recipes_folder(), ["disengage"], again)
    assert (again / "disengage").read_bytes() == (built / "disengage").read_bytes()


def test_call_is_the_one_that_the_host_listens_for(built: Path) -> None:
    data = (built / "disengage").read_bytes()
    assert b"\xb8" + struct.pack("<I", CALL_NUMBER) + b"\xbb" + struct.pack("<I", BOOT_IS_OVER) in data
    assert (data.count(VMCALL), data.count(VMMCALL)) == (1, 1)


@pytest.mark.parametrize("words", [(), ("nonsense",), ("cpuid", "io")])
def test_exits_refuses_other_words(built: Path, words: tuple[str, ...]) -> None:
    assert subprocess.run([built / "exits", *words], check=False).returncode == 2


def test_init_offers_the_kinds_of_the_program(built: Path) -> None:
    """Not run: they need root, and would write to this machine's ports and memory."""
    init = (recipes_folder() / "minimal/init").read_text()
    (kinds,) = re.findall(r"usage: exits (\S+) SECONDS", init)
    assert kinds.split("|") == ["cpuid", "io", "hypercall", "mmio", "msr", "npf", "timer"]
    assert f"        {' | '.join(kinds.split('|'))}) is_number" in init
    data = (built / "exits").read_bytes()
    for kind in kinds.split("|"):
        assert data.count(b"\x66\x3d" + kind[:2].encode()) == 1, "the program compares the first two letters (cmp ax, imm16)"


def test_each_image_with_a_call_makes_it() -> None:
    """The recipes of Debian start the program by a unit, minimal in its init."""
    for name in recipe_names(recipes_folder()):
        recipe = read_recipe(recipes_folder(), name)
        if DISENGAGE in recipe.tools:
            started = "nohype-disengage.service" in getattr(recipe, "enable", ())
            assert started or "\ndisengage\n" in (recipes_folder() / name / recipe.init).read_text()


def test_recipes_of_ones_own_need_no_copy_of_the_source(built: Path, tmp_path: Path) -> None:
    """As those of `benchmarks/tenant_cycles.py`."""
    (recipes := tmp_path / "recipes").mkdir()
    build_tools(recipes, ["disengage"], recipes)
    assert (recipes / "disengage").read_bytes() == (built / "disengage").read_bytes()


def test_source_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "programs.py").write_text("raise SystemExit('no')")
    with pytest.raises(ImageError, match=r"programs\.py cannot write disengage"):
        build_tools(tmp_path, ["disengage"], tmp_path)
