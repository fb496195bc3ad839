"""What benchmarks/peers.py computes from readings of the lab host, and when it fails."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from orchestrator.errors import LabLost
from orchestrator.host.activity import Activity
from orchestrator.host.processes import Mapping
from orchestrator.ssh import ShellTimeout
from orchestrator.values import PciAddress

FOLDER = Path(__file__).parents[2] / "benchmarks"
TEMPLATES = sorted((FOLDER / "peers").glob("*.xml"))
PHASE = {
    "seconds": 10.0,
    "exits": {"0": {"msr": 300, "hlt": 200}, "1": {"msr": 5}},
    "interrupts": {"LOC Local timer": 40},
    "switches": 20,
}
RUN = {
    "ready": 20.0, "uptime": 12.0, "boot": {"0": {"io": 1000, "msr": 10}, "1": {"io": 30}}, "idle": PHASE, "busy": PHASE,
    "memory": 50_000_000, "date": "2026-11-26T23:00:00+00:00", "commit": "0123456789ab", "load": 3.0, "machine_cpus": 2,
    "accelerator": "tcg", "host": {"kernel": "6.12.0", "qemu": "10.0.13", "libvirt": "11.3.0"},
}  # fmt: skip


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def make_runs(report: Any, rounds: int = 3) -> list[dict[str, Any]]:
    return [{**copy.deepcopy(RUN), "peer": peer} for _ in range(rounds) for peer in report.PEERS]


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_template_is_filled_and_names_its_sources(load: Any, file: Path) -> None:
    inside, text = load("peers_inside"), file.read_text()
    image = SimpleNamespace(kernel="/i/vmlinuz", choose_initrd=lambda has_disk: "/i/initrd", cmdline="quiet")
    values = {"name": "peers-test", "memory": "262144", "cmdline": "nohz_full=1"}
    domain = ET.fromstring(inside.fill(text, values, image, PciAddress.parse("0000:41:10.2")))
    assert domain.findtext("os/cmdline") == "quiet nohype.name=peers-test nohz_full=1"
    assert domain.find("devices/serial/log") is not None
    assert text.startswith("<!--\n")
    assert "Sources" in text
    assert "$" not in ET.tostring(domain, encoding="unicode")
    for address in domain.iterfind(".//source/address"):
        assert (address.get("bus"), address.get("slot"), address.get("function")) == ("0x41", "0x10", "0x2")


def test_every_peer_has_a_template(load: Any) -> None:
    report = load("peers_report")
    assert {file.stem for file in TEMPLATES} == set(report.PEERS) - {report.OURS}


def test_template_with_an_unknown_name_is_refused(load: Any) -> None:
    image = SimpleNamespace(kernel="", choose_initrd=lambda has_disk: "", cmdline="")
    with pytest.raises(KeyError):
        load("peers_inside").fill("<domain>$other</domain>", {"name": "peers-test", "cmdline": ""}, image, None)


def make_reading(inside: Any, time: float, exits: dict[int, dict[str, int]], slices: int | None, own: int, timer: int) -> Any:
    activity = Activity({"LOC": timer, "24": 7}, {"TIMER": 1}, slices, {"LOC": "Local timer interrupts", "24": "nic0"})
    return inside.Reading(time, exits, activity, {0: own, 1: 0}, {0: time, 1: time / 2})


def test_window_counts_what_changed_without_the_vcpus(load: Any) -> None:
    inside = load("peers_inside")
    before = make_reading(inside, 100.0, {0: {"msr": 10, "io": 5}, 1: {}}, 1000, 400, 50)
    after = make_reading(inside, 110.0, {0: {"msr": 60, "io": 5}, 1: {"hlt": 2}}, 1130, 500, 80)
    found = inside.compare(before, after)
    assert found["exits"] == {0: {"msr": 50}, 1: {"hlt": 2}}
    assert found["interrupts"] == {"LOC Local timer interrupts": 30}
    assert found["switches"] == 30
    assert found["ran"] == {0: 1.0, 1: 0.5}


def test_window_without_counts_of_time_slices_is_refused(load: Any) -> None:
    inside = load("peers_inside")
    reading = make_reading(inside, 1.0, {0: {}, 1: {}}, None, 0, 0)
    with pytest.raises(SystemExit, match="time slices"):
        inside.compare(reading, replace(reading, time=2.0))


def make_mapping(size: int, resident: int, *flags: str) -> Mapping:
    return Mapping(0, size, "", 0, 4096, resident, 0, frozenset(flags), "default", ())


@pytest.mark.parametrize("flags", [(), ("ht",)])
def test_memory_is_counted_without_the_guests(load: Any, flags: tuple[str, ...]) -> None:
    inside = load("peers_inside")
    guest = make_mapping(inside.MEMORY, inside.MEMORY // 2, *flags)
    assert inside.measure_memory([make_mapping(1 << 20, 4096), guest, make_mapping(1 << 21, 8192)]) == 12288


@pytest.mark.parametrize("sizes", [[1 << 20], [256 << 20, 256 << 20]])
def test_memory_is_refused_without_one_mapping_of_the_guest(load: Any, sizes: list[int]) -> None:
    with pytest.raises(SystemExit, match="cannot find the guest's memory"):
        load("peers_inside").measure_memory([make_mapping(size, 0) for size in sizes])


def test_entries_of_the_histogram_are_parsed(load: Any) -> None:
    line = "{ common_pid:       1234, exit_reason:        124 } hitcount:         17"
    assert load("peers_inside").ENTRY.findall(line) == [("1234", "124", "17")]


def test_each_peer_is_first_once(load: Any) -> None:
    peers = load("peers")
    orders = [peers.rotate(peers.PEERS, number) for number in range(len(peers.PEERS))]
    assert {order[0] for order in orders} == set(peers.PEERS)
    assert all(sorted(order) == sorted(peers.PEERS) for order in orders)


def test_a_round_that_was_cut_is_completed_first(load: Any) -> None:
    peers, report = load("peers"), load("peers_report")
    runs = make_runs(report, rounds=2)
    assert peers.list_orders([], 2) == [peers.rotate(peers.PEERS, 0), peers.rotate(peers.PEERS, 1)]
    assert peers.list_orders(runs, 1) == [peers.rotate(peers.PEERS, 2)]
    assert peers.list_orders(runs[:-2], 1) == [["kubevirt", "nohype"], peers.rotate(peers.PEERS, 2)]


def test_table_has_median_and_range(load: Any) -> None:
    report = load("peers_report")
    runs = make_runs(report)
    for number, run in enumerate(run for run in runs if run["peer"] == "nova"):
        run["boot"]["0"]["io"] = (1000, 4000, 2000)[number]
    text = report.write_tables(runs)
    row = next(line for line in text.splitlines() if line.startswith("| exits from start to ready |"))
    assert row == "| exits from start to ready | 1,040 | 2,040 (1,040 to 4,040) | 1,040 | 1,040 |"
    assert "| `io` | 1,030 | 2,030 | 1,030 | 1,030 |" in text
    assert "| exits/s of the application vCPU, busy | 0.50 | 0.50 | 0.50 | 0.50 |" in text
    assert "3 rounds" in text
    assert report.find_missing(runs) == []


def test_reason_of_some_rounds_counts_as_zero_in_others(load: Any) -> None:
    report = load("peers_report")
    runs = make_runs(report)
    runs[0]["boot"]["0"]["cpuid"] = 90
    assert report.list_reasons(runs, report.read_boot)["cpuid"] == {runs[0]["peer"]: 0}


@pytest.mark.parametrize("path", [("memory",), ("ready",), ("idle", "switches"), ("busy", "exits", "1"), ("boot", "1")])
def test_a_missing_figure_is_named_and_fails_the_run(
    load: Any, path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, file = load("peers_report"), tmp_path / "results.jsonl"
    runs = make_runs(report)
    place: Any = runs[5]
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    file.write_text("".join(json.dumps(run) + "\n" for run in runs))
    monkeypatch.setattr("sys.argv", ["peers.py", "--rounds", "0", "--results", str(file)])
    assert load("peers").main() == 1
    assert f"missing: {runs[5]['peer']}: " in capsys.readouterr().err


def test_a_complete_run_passes_and_writes_the_table(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, file, table = load("peers_report"), tmp_path / "results.jsonl", tmp_path / "table.md"
    file.write_text("".join(json.dumps(run) + "\n" for run in make_runs(report)))
    monkeypatch.setattr("sys.argv", ["peers.py", "--rounds", "0", "--results", str(file), "--table", str(table)])
    assert load("peers").main() == 0
    assert "missing" not in table.read_text()


def test_a_peer_with_fewer_rounds_is_named(load: Any) -> None:
    report = load("peers_report")
    assert report.find_missing(make_runs(report)[:-1]) == ["nohype: 2 of 3 rounds"]
    assert len(report.find_missing([])) == len(report.PEERS)


LAB = SimpleNamespace(state=SimpleNamespace(accel="tcg"))


def test_a_guest_is_saved_before_the_round_fails(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, file = load("peers"), tmp_path / "results.jsonl"

    def run(_lab: Any, _order: Any, _options: Any, _limit: float, stream: Any) -> int:
        for kind, piece in (
            ("stdout", b'\n{"peer": "no'),
            ("stderr", b"guest nova "),
            ("stdout", b'va"}\n\n{"pe'),
            ("stderr", b"ended\n"),
        ):
            stream(kind, piece)
        return 1

    monkeypatch.setattr(peers, "run_inside", run)
    with pytest.raises(SystemExit, match="guest nova ended"):
        peers.measure(LAB, list(peers.PEERS), SimpleNamespace(idle=1.0, busy=1.0, results=file))
    (result,) = peers.read_results(file)
    assert (result["peer"], result["accelerator"]) == ("nova", "tcg")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ShellTimeout])
def test_a_round_that_is_cut_is_cleaned_up(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    peers, orders = load("peers"), []

    def run(_lab: Any, order: list[str], *_: Any) -> int:
        orders.append(order)
        if order:
            raise error("cut")
        raise LabLost("the lab is gone, too")

    monkeypatch.setattr(peers, "run_inside", run)
    with pytest.raises(error, match="cut"):
        peers.measure(LAB, list(peers.PEERS), SimpleNamespace(idle=1.0, busy=1.0, results=tmp_path / "results.jsonl"))
    assert orders == [list(peers.PEERS), []]
