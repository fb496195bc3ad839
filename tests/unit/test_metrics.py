"""The Prometheus page: every declared metric is produced as declared; a failed source affects only its own metrics."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.errors import HypervisorError, NotFound
from orchestrator.host.survey import read_topology
from orchestrator.ledger import Event
from orchestrator.metrics.collect import Metrics, Sources
from orchestrator.metrics.counters import Counters
from orchestrator.metrics.declare import METRICS, Kind, Metric
from orchestrator.model.cache import CachePlan, CacheShare
from orchestrator.model.disengagement import Phase
from orchestrator.model.exit_reasons import ExitReport, VcpuExits
from orchestrator.model.exits import ReadCounters
from orchestrator.model.plan import DiskPlan, ImageRef, NicPlan, Plan, Policy
from orchestrator.model.proof import Proof, Verdict
from orchestrator.model.topology import NvmeController, Topology
from orchestrator.model.uplink import CounterPlace, CounterReading, FrameCounts, ReturnCounts
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size
from tests.fakes.root import load_host

ALERTS = Path(__file__).parents[2] / "docs" / "prometheus-alerts.yml"
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
POLICY = Policy(CpuSet.parse("0-1"), ("nic0",), Size.parse("2M"), None, ((Size.parse("2M"), 16),))
COUNTERS = {"exits": 100, "halt_exits": 60, "io_exits": 5, "mmio_exits": 0}


@dataclass
class FakeGuest:
    plan: Plan
    state: str = "running"
    restarted: int = 0


def build_guest(name: str, cpus: str, index: int, topology: Topology, *, state: str = "running", pages: int = 64) -> FakeGuest:
    pf = topology.pfs[0]
    node = next(core.node for core in topology.cores if core.cpus <= CpuSet.parse(cpus))
    vf = NicPlan(pf.address, "nic0", index, pf.vf_address(index), MacAddress.parse(f"02:4e:48:00:00:0{index}"))
    plan = Plan(
        name, (CpuSet.parse(cpus),), node, Size.parse("2M"), pages, (vf,), ImageRef("minimal"), "", uuid=UUID(int=index + 1)
    )
    return FakeGuest(plan, state, restarted=index)


def with_caches(guest: FakeGuest) -> FakeGuest:
    return replace(guest, plan=replace(guest.plan, caches=CachePlan(3, (CacheShare(0, 0xF00),))))


@pytest.fixture
def topology(tmp_path: Path) -> Topology:
    return read_topology(load_host(tmp_path, "numa"))


class Fake:
    """The sources: their values, how often they are read, and which of them fail."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.now = 1000.0
        self.generation = 7
        self.surveys = self.exit_reads = 0
        self.counters = Counters(lambda: self.now)
        self.guests: list[FakeGuest] = []
        self.exits: dict[str, tuple[Mapping[str, int], ...]] = {}
        self.broken: set[str] = set()
        self.metrics = Metrics(
            Sources(
                lambda: self.read("guests", self.guests), lambda: self.read("generation", self.generation),
                self.survey, self.read_exits, self.exit_reports, self.read_frames, lambda: {"nic0": True, "nic1": False},
                lambda: {"nic0": ReturnCounts(9, 7)}, self.read_cache_use, self.read_vcpu_times,
            ),
            POLICY, self.counters,
        )  # fmt: skip

    def read_cache_use(self, guest: str) -> dict[str, int]:
        assert guest == "web"  # the only running one
        return {"llc_occupancy": 1 << 20, "mbm_total_bytes": 700, "mbm_local_bytes": 600, "unknown": 1}

    def read_vcpu_times(self) -> list[tuple[str, int, float, float]]:
        return self.read("vCPU times", [("web", 0, 12.5, 0.25), ("web", 1, 0.5, 0.0)])

    def read_frames(self) -> dict[str, list[CounterReading]]:
        counts = FrameCounts(5, 4, 500, 400, 1, 0)
        readings = [
            CounterReading(CounterPlace.GUEST, "nh-1", "guest1", counts),
            CounterReading(CounterPlace.UPLINK, "nic0", "", counts),
            CounterReading(CounterPlace.SWITCH, "swp1", "", None, "not measured: the switch does not respond"),
        ]
        return {"nic0": self.read("frames", readings)}

    def read(self, what: str, value: Any) -> Any:
        if what in self.broken:
            raise HypervisorError(f"{what} does not respond")
        return value

    def survey(self) -> Topology:
        self.surveys += 1
        return self.read("survey", self.topology)

    def read_exits(self, uuid: UUID) -> tuple[Mapping[str, int], ...]:
        self.read("exits", None)
        self.exit_reads += 1
        name = next(guest.plan.name for guest in self.guests if guest.plan.uuid == uuid)
        if name not in self.exits:
            raise NotFound(f"guest {name} is not running")
        return self.exits[name]

    def exit_reports(self, read_counters: ReadCounters) -> list[tuple[str, Phase, ExitReport]]:
        self.read("exit reasons", None)
        for guest in self.guests:
            if guest.state == "running" and guest.plan.name in self.exits:
                with suppress(HypervisorError):
                    read_counters(guest.plan.uuid)
        vcpus = (VcpuExits(500, {"msr": 418, "hlt": 82}, 0), VcpuExits(9, None, None))
        boot = ExitReport((VcpuExits(7, {"msr": 7}, 0),), "")
        return [("web", Phase.BOOT, boot), ("web", Phase.RUN, ExitReport(vcpus, "")), ("odd", Phase.BOOT, ExitReport((), "gone"))]

    def page(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Samples by name, then by labels."""
        text = self.metrics.render()[0].decode()
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return found

    def figure(self, name: str, **labels: str) -> float:
        return self.page()[name][tuple(sorted(labels.items()))]


def make_event(kind: str, took: float | None) -> Event:
    return Event(1, "2026-01-01T00:00:00+00:00", kind, "web", "", "root", "", took)


@pytest.fixture
def fake(topology: Topology) -> Fake:
    fake = Fake(topology)
    fake.guests = [
        with_caches(build_guest("web", "2-3", 0, topology)),
        build_guest("db", "4-5", 1, topology, state="quarantined"),
        build_guest("off", "6-7", 2, topology, state="stopped"),
    ]
    fake.exits = {"web": (COUNTERS, COUNTERS)}
    fake.counters.observe_event(make_event("claimed", 0.003))
    fake.counters.observe_event(make_event("failed", 4.0))
    fake.counters.observe_audit([Proof("vepa", "host", Verdict.NOT_MEASURED, None, "frames", ())])
    fake.counters.count_undo_failure()
    return fake


def series(metric: Metric) -> set[str]:
    ends = {"_bucket", "_count", "_sum"} if metric.kind is Kind.HISTOGRAM else {""}
    return {metric.name + end for end in ends}


def test_produced_metrics_are_the_declared_ones(fake: Fake) -> None:
    families = {
        (family.name, family.type): family for family in text_string_to_metric_families(fake.metrics.render()[0].decode())
    }
    produced = fake.page()
    assert set(produced) == {name for metric in METRICS for name in series(metric)}
    for metric in METRICS:
        assert families[metric.name.removesuffix("_total"), str(metric.kind)].documentation == metric.help
        for name in series(metric):
            for labels in produced[name]:
                assert {key for key, _ in labels} - {"le"} == set(metric.labels), name


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_declarations_keep_to_the_conventions(metric: Metric) -> None:
    """https://prometheus.io/docs/practices/naming/"""
    assert re.fullmatch(r"nohype_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert not metric.unit or metric.name.removesuffix("_total").endswith(f"_{metric.unit}")
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_guests_and_their_restarts(fake: Fake) -> None:
    assert fake.figure("nohype_guests", state="running") == 1
    assert fake.figure("nohype_guests", state="deleting") == 0
    assert fake.figure("nohype_guest_restarts_total", guest="off") == 2


def test_disks_are_counted_by_their_guests_state(fake: Fake) -> None:
    def controller(number: int, **changes: Any) -> NvmeController:
        address = PciAddress(0, 0x50 + number, 0, 0)
        return replace(NvmeController(address, f"nvme{number}", f"s{number}", "", 0, "nvme", number), **changes)

    disks = [
        controller(0, driver="vfio-pci", serial=None),
        controller(1),
        controller(2, fault="its state is dead"),
        controller(3),
    ]
    fake.topology = replace(fake.topology, controllers=tuple(disks))
    size = Size.parse("1G")
    owned = {"web": DiskPlan(size, "s0", disks[0].address), "db": DiskPlan(size, "s1", disks[1].address)}
    fake.guests = [
        replace(guest, plan=replace(guest.plan, disks=(owned[guest.plan.name],) if guest.plan.name in owned else ()))
        for guest in fake.guests
    ]
    others = (DiskPlan(Size(0), target="nvme-tcp://10.9.0.1:4420/nqn.2026-11.example:web"), DiskPlan(size, file="/a"))
    fake.guests[2] = replace(fake.guests[2], plan=replace(fake.guests[2].plan, disks=others), state="wiping")
    found = {labels: count for labels, count in fake.page()["nohype_disks"].items() if count}
    expected = {("nvme", "claimed"): 1, ("nvme", "quarantined"): 1, ("nvme", "free"): 1, ("nvme", "unusable"): 1}
    expected |= {("emulated", "wiping"): 1, ("network", "wiping"): 1}
    assert {(dict(labels)["kind"], dict(labels)["state"]): count for labels, count in found.items()} == expected


def test_wipes_are_counted(fake: Fake) -> None:
    fake.counters.count_wipe(1 << 30, is_clean=True)
    fake.counters.count_wipe(1 << 20, is_clean=False)
    assert fake.figure("nohype_disk_wipes_total", outcome="ok") == 1
    assert fake.figure("nohype_disk_wipes_total", outcome="failed") == 1
    assert fake.figure("nohype_disk_wiped_bytes_total") == 1 << 30


def test_each_core_is_counted_once(fake: Fake) -> None:
    cores = fake.page()["nohype_cores"]
    assert sum(cores.values()) == len(fake.topology.cores)
    assert {labels: count for labels, count in cores.items() if count} == {
        (("node", "0"), ("state", "housekeeping")): 1,
        (("node", "0"), ("state", "claimed")): 1,
        (("node", "1"), ("state", "quarantined")): 1,
        (("node", "1"), ("state", "claimed")): 1,
    }


def test_core_that_is_not_isolated_is_unusable(topology: Topology) -> None:
    fake = Fake(replace(topology, isolated=CpuSet.parse("2-3")))
    assert fake.figure("nohype_cores", node="0", state="free") == 1
    assert fake.figure("nohype_cores", node="1", state="unusable") == 2


def test_each_page_is_counted_once(fake: Fake) -> None:
    pools = tuple(replace(pool, total=256, free=256 - 64 - 10) for pool in fake.topology.pools)
    fake.topology = replace(fake.topology, pools=pools)
    pages = {
        state: fake.figure("nohype_huge_pages", node="0", size="2M", state=state) for state in ("claimed", "free", "foreign")
    }
    # Of the pages in use 64 are the guest's and 10 foreign; 16 are the host's own share.
    assert pages == {"claimed": 64, "foreign": 10, "free": 256 - 64 - 10 - 16}
    assert fake.figure("nohype_huge_pages", node="0", size="2M", state="housekeeping") == 16
    assert fake.figure("nohype_huge_pages", node="1", size="2M", state="quarantined") == 64


def test_each_vf_is_counted_once(fake: Fake) -> None:
    vfs = fake.page()["nohype_vfs"]
    assert sum(vfs.values()) == POLICY.count_vfs(fake.topology.pfs[0])
    assert fake.figure("nohype_vfs", uplink="nic0", state="claimed") == 2
    assert fake.figure("nohype_vfs", uplink="nic0", state="quarantined") == 1


def test_exits_of_all_vcpus_by_class(fake: Fake) -> None:
    assert fake.figure("nohype_guest_exits_total", **{"guest": "web", "class": "halt"}) == 120
    assert fake.figure("nohype_guest_exits_total", **{"guest": "web", "class": "other"}) == 70


def test_time_of_each_vcpu(fake: Fake) -> None:
    assert fake.figure("nohype_guest_vcpu_seconds_total", guest="web", vcpu="0") == 12.5
    assert fake.figure("nohype_guest_vcpu_wait_seconds_total", guest="web", vcpu="0") == 0.25
    assert fake.figure("nohype_guest_vcpu_seconds_total", guest="web", vcpu="1") == 0.5


def test_counter_that_the_kernel_lacks_has_no_sample(fake: Fake) -> None:
    fake.exits = {"web": ({"halt_exits": 3},)}
    assert {dict(labels)["class"] for labels in fake.page()["nohype_guest_exits_total"]} == {"halt"}


def test_counters_of_a_guest_are_read_once_per_scrape(fake: Fake) -> None:
    fake.page()
    assert fake.exit_reads == 1
    fake.exits = {"web": ({"halt_exits": 3},)}
    assert fake.figure("nohype_guest_exits_total", **{"guest": "web", "class": "halt"}) == 3, "read again in the next scrape"
    fake.broken = {"exit reasons"}
    assert fake.figure("nohype_guest_exits_total", **{"guest": "web", "class": "halt"}) == 3
    assert fake.exit_reads == 3


def test_guest_that_ends_during_a_scrape_is_not_a_failure(fake: Fake) -> None:
    fake.exits = {}
    assert "nohype_guest_exits_total" not in fake.page()
    assert fake.figure("nohype_scrape_failures_total", source="exits") == 0


def test_frames_are_counted_by_place_and_direction_and_unmeasured_places_have_no_samples(fake: Fake) -> None:
    labels = {"uplink": "nic0", "place": "guest", "interface": "nh-1", "guest": "guest1"}
    assert fake.figure("nohype_frames_total", **labels, direction="sent") == 5
    assert fake.figure("nohype_frame_bytes_total", **labels, direction="received") == 400
    assert fake.figure("nohype_frames_dropped_total", **labels, direction="sent") == 1
    assert {dict(found)["place"] for found in fake.page()["nohype_frames_total"]} == {"guest", "uplink"}
    assert [fake.figure("nohype_hairpin_lost", uplink=uplink) for uplink in ("nic0", "nic1")] == [1, 0]
    assert [fake.figure("nohype_returning_frames_total", uplink="nic0", count=one) for one in ("must-return", "returned")] == [
        9,
        7,
    ]


def test_not_measured_is_a_verdict(fake: Fake) -> None:
    assert fake.figure("nohype_proofs", proof="vepa", verdict="not measured") == 1
    assert fake.figure("nohype_proofs", proof="vepa", verdict="pass") == 0


def test_the_age_of_the_audit(fake: Fake, topology: Topology) -> None:
    fake.now += 60
    assert fake.figure("nohype_audit_age_seconds") == 60
    assert Fake(topology).figure("nohype_audit_age_seconds") == math.inf


@pytest.mark.parametrize(
    ("broken", "source", "lost"),
    [
        ("survey", "survey", {"nohype_cores", "nohype_disks", "nohype_huge_pages", "nohype_vfs"}),
        ("exits", "exits", {"nohype_guest_exits_total"}),
        (
            "frames",
            "frames",
            {
                "nohype_frames_total",
                "nohype_frame_bytes_total",
                "nohype_frames_dropped_total",
                "nohype_hairpin_lost",
                "nohype_returning_frames_total",
            },
        ),
        ("vCPU times", "vCPU times", {"nohype_guest_vcpu_seconds_total", "nohype_guest_vcpu_wait_seconds_total"}),
    ],
)
def test_a_source_that_fails_takes_nothing_else_along(fake: Fake, broken: str, source: str, lost: set[str]) -> None:
    whole = set(fake.page())
    fake.broken = {broken}
    fake.guests[2] = replace(fake.guests[2], state="deleting")
    assert whole - set(fake.page()) == lost
    assert fake.figure("nohype_scrape_failures_total", source=source) == 2
    fake.broken = set()
    assert set(fake.page()) == whole


def test_page_is_rendered_although_every_source_fails(fake: Fake) -> None:
    fake.broken = {"guests", "generation", "survey", "exits", "frames", "vCPU times"}
    assert sum(fake.page()["nohype_scrape_failures_total"].values()) == 7
    assert fake.figure("nohype_undo_failures_total") == 1


def test_the_host_is_not_surveyed_for_each_scrape(fake: Fake) -> None:
    fake.page(), fake.page()
    assert fake.surveys == 1
    fake.guests[0] = replace(fake.guests[0], state="stopped")
    fake.page(), fake.page()
    assert fake.surveys == 2, "the resources of a stopped guest are not in use"
    del fake.guests[0]
    fake.page(), fake.page()
    assert fake.surveys == 3
    fake.now += 61
    fake.page()
    assert fake.surveys == 4


@pytest.mark.parametrize(("seconds", "first"), [(0.001, "0.001"), (0.0011, "0.0025"), (5.0, "+Inf")])
def test_observation_is_in_the_first_bucket_with_room(fake: Fake, seconds: float, first: str) -> None:
    fake.counters = Counters()
    fake.metrics = Metrics(Sources(list, int, fake.survey, fake.read_exits, lambda _: []), POLICY, fake.counters)
    fake.counters.observe_refusal("refused", seconds)
    buckets = {dict(labels)["le"]: count for labels, count in fake.page()["nohype_claim_seconds_bucket"].items()
               if dict(labels)["outcome"] == "refused"}  # fmt: skip
    assert min((float(bound) for bound, count in buckets.items() if count)) == float(first)
    assert buckets["+Inf"] == 1


def test_two_managers_in_one_process_do_not_share_counters(topology: Topology) -> None:
    one, other = Fake(topology), Fake(topology)
    one.counters.count_undo_failure()
    assert other.figure("nohype_undo_failures_total") == 0


@pytest.mark.parametrize(
    ("kind", "took", "series"),
    [
        ("claimed", 0.01, ("nohype_claim_seconds_count", "ok")),
        ("refused", 0.01, ("nohype_claim_seconds_count", "refused")),
        ("started", 3.0, ("nohype_start_seconds_count", "ok")),
        ("failed", 3.0, ("nohype_start_seconds_count", "failed")),
        ("started", None, None),
        ("stopped", 3.0, None),
    ],
)
def test_logged_events_are_counted(topology: Topology, kind: str, took: float | None, series: tuple[str, str] | None) -> None:
    fake = Fake(topology)
    fake.counters.observe_event(make_event(kind, took))
    page = fake.page()
    counted = {
        (name, dict(labels)["outcome"])
        for name in ("nohype_claim_seconds_count", "nohype_start_seconds_count")
        for labels, count in page[name].items()
        if count
    }
    assert counted == ({series} if series else set())


def test_refusals_that_are_not_logged_are_counted(topology: Topology) -> None:
    fake = Fake(topology)
    fake.counters.observe_refusal("refused", 0.001)
    fake.counters.observe_refusal("plan-failed", 0.001)
    assert fake.figure("nohype_claim_seconds_count", outcome="refused") == 1
    assert fake.figure("nohype_claim_seconds_count", outcome="failed") == 1


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def read_alerts() -> dict[str, str]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def test_dashboard_and_alerts_use_only_declared_metrics() -> None:
    known = {name for metric in METRICS for name in series(metric)}
    asked = {name for query in (*queries(), *read_alerts().values()) for name in re.findall(r"\bnohype_\w+", query)}
    assert asked <= known


def test_alerts_name_only_labels_that_their_metrics_have() -> None:
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        (metric,) = (metric for metric in METRICS if metric.name in rule["expr"])
        used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert used <= {*metric.labels, "instance"}, rule["alert"]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_dashboard_shows_every_metric(metric: Metric) -> None:
    assert any(name in query for query in queries() for name in series(metric))


def test_the_labels_of_dashboard_and_alerts_exist() -> None:
    labels = {metric.name: {*metric.labels, "le", "instance", "job"} for metric in METRICS}
    for query in (*queries(), *read_alerts().values()):
        names = [metric.name for metric in METRICS if re.search(rf"\b{metric.name}(_bucket|_sum|_count)?\b", query)]
        allowed = set[str]().union(*(labels[name] for name in names))
        grouped = {word.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for word in group.split(",")}
        matched = {name for group in re.findall(r"\{([^}]*)\}", query) for name in re.findall(r"(\w+)\s*(?:=|!)", group)}
        assert grouped | matched <= allowed, query


def test_dashboard_is_valid_for_grafana() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= board.keys()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["description"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_observations_from_many_threads_are_all_counted(fake: Fake) -> None:
    from concurrent.futures import ThreadPoolExecutor

    fake.counters = Counters()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2000):
            pool.submit(fake.counters.observe_event, make_event("claimed", 0.002))
    (_, buckets, total), *_ = fake.counters.histograms("nohype_claim_seconds")
    assert buckets[-1][1] == 2000
    assert total == pytest.approx(4.0)


def test_exits_are_counted_by_vcpu_and_reason(fake: Fake) -> None:
    assert fake.figure("nohype_guest_exit_reasons_total", guest="web", vcpu="0", reason="msr", phase="run") == 418
    assert fake.figure("nohype_guest_exit_reasons_total", guest="web", vcpu="0", reason="msr", phase="boot") == 7
    assert len(fake.page()["nohype_guest_exit_reasons_total"]) == 3, "a vCPU without reasons has no samples"
