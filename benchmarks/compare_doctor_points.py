"""Points of compare_doctor.py: which item of which program asks the same as which check of `nohype doctor`. Pure.

An item of a program belongs to the first point with a matching pattern. The doctor agrees with a failure if one of the point's
checks fails and names the setting, or is not measured. Where the doctor asks for something else on purpose, the point has a
reason, and a pattern of the failures that the reason explains: the doctor misses any other failure of the point.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LIBVIRT, TUNED, FIRECRACKER = "virt-host-validate", "tuned-adm verify", "Firecracker"
PROGRAMS = (LIBVIRT, TUNED, FIRECRACKER)

VULNERABILITIES = ("meltdown", "spectre_v2", "l1tf", "spec_store_bypass")


@dataclass(frozen=True)
class Reading:
    """What a program reports of one item; ``text`` has its values."""

    program: str
    item: str
    failed: bool
    text: str


@dataclass(frozen=True)
class Point:
    """``checks``: names of checks, each with the words that its finding must contain to be about this point."""

    name: str
    items: str
    checks: tuple[tuple[str, str], ...] = ()
    differs: str = ""  # failures that the doctor does not share, and
    reason: str = ""  # why


@dataclass(frozen=True)
class Row:
    point: str
    verdicts: Mapping[str, str]  # by program: pass, FAIL or -
    doctor: str  # pass, FAIL, not measured or -
    missed: tuple[Reading, ...] = ()
    reasons: tuple[str, ...] = field(default=())


def _setting(name: str, items: str, differs: str = "", reason: str = "") -> Point:
    return Point(name, items, (("isolation", name),), differs, reason)


_AS_TEXT = "the CPUs are compared as sets, not as text"
_ALL = "."
POINTS: tuple[Point, ...] = (
    Point("virtualization of the processor", "hardware virtualization", (("virtualization", ""),)),
    Point("KVM works", "/dev/kvm", (("kvm-runs", ""),)),
    Point(
        "devices of software edges", "/dev/vhost-net|/dev/net/tun", (("software-edge", ""),),
        _ALL, "guests with VFs do not use them",
    ),
    Point("control groups", "cgroup '", (("cgroups", ""),)),
    Point(
        "IOMMU", "IOMMU", (("iommu", ""),),
        "No ACPI IVRS table", "the kernel's groups and units are read, not a table of the firmware",
    ),
    Point("encrypted guests", "secure guest", (), _ALL, "NoHype does not use them"),
    _setting("isolcpus", r"\bisolcpus\b", r"arg 'isolcpus=", _AS_TEXT),
    Point(
        "nohz_full", r"\bnohz_full\b", (("isolation", "nohz_full"), ("kernel-options", "nohz_full")),
        r"arg 'nohz_full=", _AS_TEXT,
    ),
    _setting("rcu_nocbs", r"\brcu_nocbs\b", r"arg 'rcu_nocbs=", _AS_TEXT),
    _setting("CPUAffinity", "cpu_affinity"),
    _setting("nmi_watchdog", r"kernel\.nmi_watchdog"),
    _setting("numa_balancing", r"kernel\.numa_balancing"),
    _setting("stat_interval", r"vm\.stat_interval"),
    _setting("timer_migration", r"kernel\.timer_migration", "= '1'", "timers of idle guest CPUs must move to other CPUs"),
    _setting("nx_huge_pages", "nx_huge_pages"),
    Point(
        "KVM's parameters", r"(realtime-virtual-host|cpu-partitioning)/script\.sh",
        (("kvm-parameters", ""), ("isolation", "nx_huge_pages")),
    ),
    Point(
        "work on guest CPUs", r"realtime/script\.sh|'irqaffinity|workqueue/|'sched|'ps_|banned_cpus", (),
        _ALL, "the manager moves it while guests run; `nohype audit` measures it",
    ),
    Point(
        "merging of pages", "ksm/run|^KSM", (("page-merging", ""),),
        "run' = ''", "it is 0 (tuned cuts zeros off): KSM does not run",
    ),
    Point(
        "transparent huge pages", "transparent_hugepages", (("transparent-huge-pages", ""),),
        "= 'madvise'", "guests have pages of the pools; only `always` makes a thread scan all processes",
    ),
    Point("swap", r"vm\.swappiness|^swap", (("swap", ""),), "swappiness", "without swap it has no effect"),
    Point(
        "frequency", "governor|energy_perf|min_perf_pct|intel_pstate", (("frequency", ""),),
        "intel_pstate", "the governors in use are read, not a driver's parameter",
    ),
    Point("idle states", "latency|cstate", (("idle-states", ""),)),
    Point(
        "clock source", "'tsc['=]", (("clock-source", ""),),
        "cmdline", "the clock source in use is read, not the parameter",
    ),
    Point("SMT", "^SMT", (("smt-siblings", ""),), _ALL, "all threads of a core belong to one guest"),
    *(Point(name, f"^{name}", (("vulnerabilities", name),)) for name in VULNERABILITIES),
    Point(
        "real-time threads", "sched_rt_runtime_us|skew_tick|hung_task|nosoftlockup", (),
        _ALL, "vCPUs are not real-time threads; watchdogs run on housekeeping CPUs",
    ),
    Point("idle tick", "'nohz['=]", (), _ALL, "it is the kernel's default"),
    Point(
        "the host's own throughput", "dirty_|busy_(read|poll)|tcp_fastopen|non_isolcpus|channels|read_?ahead", (),
        _ALL, "guests use neither the host's network nor its page cache",
    ),
    Point("memory errors", "ignore_ce", (("memory-errors", ""),), _ALL, "corrected errors are counted, not ignored"),
)  # fmt: skip


def compare(readings: Iterable[Reading], doctor: Mapping[str, Mapping[str, Any]]) -> tuple[Row, ...]:
    """``doctor``: the document's checks by name. The last row has items that belong to no point: their failures are missed."""
    known: dict[str, list[Reading]] = {point.name: [] for point in POINTS}
    unknown: list[Reading] = []
    for reading in readings:
        point = next((point for point in POINTS if re.search(point.items, reading.item)), None)
        (known[point.name] if point else unknown).append(reading)
    rows = [_judge(point, known[point.name], doctor) for point in POINTS]
    if unknown:
        rows.append(Row("items of no point", _verdicts(unknown), "-", tuple(reading for reading in unknown if reading.failed)))
    return tuple(rows)


def _judge(point: Point, readings: Sequence[Reading], doctor: Mapping[str, Mapping[str, Any]]) -> Row:
    failures = [reading for reading in readings if reading.failed]
    verdict = _read_doctor(point, doctor)
    excused = [reading for reading in failures if point.differs and re.search(point.differs, reading.text)]
    missed = [] if verdict in ("FAIL", "not measured") else [reading for reading in failures if reading not in excused]
    reasons = (point.reason,) if excused and verdict in ("pass", "-") else ()
    return Row(point.name, _verdicts(readings), verdict, tuple(missed), reasons)


def _verdicts(readings: Sequence[Reading]) -> dict[str, str]:
    verdicts = dict.fromkeys(PROGRAMS, "-")
    for reading in readings:
        if verdicts[reading.program] != "FAIL":
            verdicts[reading.program] = "FAIL" if reading.failed else "pass"
    return verdicts


def _read_doctor(point: Point, doctor: Mapping[str, Mapping[str, Any]]) -> str:
    """The worst verdict of the point's checks. A failure that names other settings only says nothing against this one."""
    found = set()
    for name, words in point.checks:
        check = doctor[name]
        if check["verdict"] == "fail" and not re.search(rf"\b{re.escape(words)}", check["found"]):
            found.add("pass")
        else:
            found.add("FAIL" if check["verdict"] == "fail" else check["verdict"])
    return next((verdict for verdict in ("FAIL", "not measured", "pass") if verdict in found), "-")


def parse_libvirt(output: str) -> list[Reading]:
    """A warning counts as a failure: the program warns of a missing IOMMU, which guests of NoHype need."""
    pattern = re.compile(
        r"^\s*QEMU: (?:Checking (?:if|for) )?(?P<item>.*?)\s*: (?P<verdict>PASS|FAIL|WARN|NOTE)\b(?P<why>.*)$", re.MULTILINE
    )
    return [
        Reading(LIBVIRT, found["item"], found["verdict"] in ("FAIL", "WARN"), f"{found['verdict']}{found['why']}")
        for found in pattern.finditer(output)
    ]


def parse_tuned(output: str) -> list[Reading]:
    """Lines of tuned's log, each item once. A script's own line is taken, with its status, and not the summary of all scripts."""
    readings = {}
    for line in output.splitlines():
        if found := re.match(r"verify: (?P<verdict>passed|failed): (?P<item>(?!'\[).*)", line):
            item = found["item"]
            readings[item] = Reading(TUNED, item, found["verdict"] == "failed", item)
        elif found := re.match(r"script '(?P<item>[^']+)' returned error code: (?P<status>\d+)", line):
            readings[line] = Reading(TUNED, found["item"], found["status"] != "0", f"exit status {found['status']}")
    return list(readings.values())
