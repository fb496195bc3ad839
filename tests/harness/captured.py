"""Hosts that other projects have captured, as data for the doctor: tests/data/captured/NAME.txt.

    python3 -m tests.harness.captured FOLDER > tests/data/captured/NAME.txt

writes one from a tree with `sys` and `proc`; the verdicts and the origin are added by hand. Next to the lines of
tests/fakes/root.py a file has

    expect CHECK = VERDICT; words that the finding has
    cpu 0-3 = vendor | model | microcode | flags       (/proc/cpuinfo)
    core 0,2 = socket 0, node 0                        (the CPUs of one core)

and `\\n` in a text is the end of a line, `\\0` a NUL. What was not captured is not there, as in a container.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from orchestrator.host.link_files import FileNet
from orchestrator.host.processor import read_processors
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet
from tests.fakes.root import FakeRoot, build_host

FOLDER = Path(__file__).parents[1] / "data" / "captured"
_CPUS = "sys/devices/system/cpu"
# What a kernel before 5.3 calls thread_siblings_list is read as core_cpus_list, whose text is the same: so the hosts are of use.
_LISTS = ("core_cpus_list", "thread_siblings_list")
_EXPECT = re.compile(r"expect (\S+) = (pass|fail|not measured)(?:; (.*))?")
_FILES = """
proc/cmdline proc/swaps proc/sys/kernel/osrelease
sys/devices/system/cpu/{online,present,possible,isolated,nohz_full,smt/control}
sys/devices/system/cpu/vulnerabilities/*
sys/devices/cpu_*/cpus
sys/devices/system/node/{has_memory,has_normal_memory} sys/devices/system/node/node*/cpulist
sys/devices/system/node/node*/hugepages/*/{nr,free}_hugepages
sys/devices/system/clocksource/clocksource0/current_clocksource
sys/kernel/mm/ksm/run sys/kernel/mm/transparent_hugepage/enabled
""".split()
_DEVICE = "vendor device class numa_node sriov_totalvfs sriov_numvfs net/*/operstate net/*/carrier".split()
_CLASSES = ("0x02", "0x0108")  # network and NVMe


def load(folder: Path, name: str) -> tuple[FakeRoot, dict[str, tuple[str, str]]]:
    """The host, and what is expected of each check: the verdict and words of the finding."""
    expected: dict[str, tuple[str, str]] = {}
    lines: list[str] = []
    processors: list[str] = []
    for line in (FOLDER / f"{name}.txt").read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if match := _EXPECT.fullmatch(line):
            expected[match[1]] = match[2], match[3] or ""
        elif kind == "cpu":
            processors += _list_processors(rest)
        elif kind == "core":
            lines += _list_core(rest)
        else:
            lines.append(line)
    fake = build_host(folder, "\n".join(line for line in lines if "\\" not in line))
    for line in lines:
        if "\\" in line:
            path, _, text = line.partition(" = ")
            fake.add(path, text.replace("\\n", "\n").replace("\\0", "\0"))
    if processors:
        fake.add("proc/cpuinfo", "\n".join(processors))
    object.__setattr__(fake, "net", FileNet(fake))  # the network of a host is not in files
    return fake, expected


def _list_processors(text: str) -> Iterator[str]:
    cpus, _, rest = text.partition(" = ")
    vendor, model, microcode, flags = (part.strip() for part in rest.split("|"))
    for cpu in CpuSet.parse(cpus):
        fields = {"processor": cpu, "vendor_id": vendor, "model name": model, "microcode": microcode, "flags": flags}
        yield "".join(f"{key}\t: {value}\n" for key, value in fields.items() if value != "")


def _list_core(text: str) -> Iterator[str]:
    match = re.fullmatch(r"(\S+) = socket (\d+)(?:, node (\d+))?", text)
    assert match, f"not a core: {text}"
    for cpu in CpuSet.parse(match[1]):
        folder = f"{_CPUS}/cpu{cpu}"
        yield f"{folder}/topology/{_LISTS[0]} = {match[1]}"
        yield f"{folder}/topology/physical_package_id = {match[2]}"
        if match[3] is not None:
            yield f"{folder}/node{match[3]} -> ../../node/node{match[3]}"


def main(root: Path) -> None:
    host = HostRoot(root)
    for line in (*_write_processors(host), *_write_cores(host), *_write_files(root), *_write_mounts(root), *_write_devices(root)):
        print(line)


def _write_processors(host: HostRoot) -> Iterator[str]:
    kinds: dict[tuple[str, ...], list[int]] = {}
    for one in read_processors(host) if host.exists("proc/cpuinfo") else ():
        kinds.setdefault((one.vendor, one.model, one.microcode, " ".join(sorted(one.flags))), []).append(one.cpu)
    for kind, cpus in kinds.items():
        yield f"cpu {CpuSet.of(cpus)} = {' | '.join(kind)}"


def _write_cores(host: HostRoot) -> Iterator[str]:
    seen: set[str] = set()
    for cpu in CpuSet.parse(host.find(f"{_CPUS}/online") or ""):
        folder = f"{_CPUS}/cpu{cpu}"
        cpus = next((text for name in _LISTS if (text := host.find(f"{folder}/topology/{name}"))), None)
        if cpus is None:
            continue
        socket = host.read(f"{folder}/topology/physical_package_id")
        nodes = [name[4:] for name in host.names(folder) if re.fullmatch(r"node\d+", name)]
        line = f"core {cpus} = socket {socket}" + "".join(f", node {node}" for node in nodes)
        if line not in seen:
            yield line
        seen.add(line)


def _write_files(root: Path) -> Iterator[str]:
    for pattern in _FILES:
        head, brace, rest = pattern.partition("{")
        choices, _, tail = rest.partition("}")
        for choice in choices.split(",") if brace else [""]:
            for path in sorted(root.glob(head + choice + tail)):
                yield _write(root, path)


def _write_mounts(root: Path) -> Iterator[str]:
    """Without what tells of the host's disks and users."""
    for name, wanted in (("mounts", "cgroup|hugetlbfs|resctrl|sysfs"), ("meminfo", "Hugepagesize")):
        if (path := root / "proc" / name).exists():
            lines = [line for line in path.read_text().splitlines() if re.search(rf"\b({wanted})", line)]
            yield f"proc/{name} = " + "\\n".join(lines)


def _write_devices(root: Path) -> Iterator[str]:
    for link in sorted(root.glob("sys/bus/pci/devices/*")):
        if link.is_dir() and (link / "class").read_text().startswith(_CLASSES):
            yield f"{link.relative_to(root)} -> {os.readlink(link)}"
            folder = link.resolve()
            for name in _DEVICE:
                yield from (_write(root, path) for path in sorted(folder.glob(name)) if path.is_file())
            for name in ("driver", "iommu_group"):
                if (folder / name).is_symlink():
                    yield f"{folder.relative_to(root.resolve())}/{name} -> {os.readlink(folder / name)}"


def _write(root: Path, path: Path) -> str:
    text = path.read_text(errors="replace").strip().replace("\n", "\\n").replace("\0", "\\0")
    return f"{path.resolve().relative_to(root.resolve())} = {text}".rstrip()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
