"""Metrics of the fleet in Prometheus' text format, from what the controller knows. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from orchestrator.fleet.job import Job
from orchestrator.fleet.use import NodeUse

_USED, _FREE = "used", "free"


class Metric(NamedTuple):
    """A gauge. ``labels`` are the names of its labels."""

    name: str
    labels: tuple[str, ...]
    help: str


UP = Metric("nohype_fleet_up", (), "Whether the controller of the fleet responded.")
METRICS = (
    UP,
    Metric("nohype_fleet_guests", ("state",), "Guests by the state of their job; ended ones for an hour."),
    Metric("nohype_fleet_nodes", ("state",), "Nodes by Slurm's state."),
    Metric("nohype_fleet_node_responds", ("node",), "Whether slurmd of the node responds."),
    Metric("nohype_fleet_node_guests", ("node",), "Guests that have resources of the node."),
    Metric("nohype_fleet_cores", ("node", "state"), "Whole cores of guests, by use."),
    Metric("nohype_fleet_memory_bytes", ("node", "state"), "Huge pages of guests, by use."),
    Metric("nohype_fleet_vfs", ("node", "state"), "VFs, by use."),
    Metric("nohype_fleet_nvme", ("node", "state"), "NVMe controllers, by use; those that are being wiped are free."),
)
Sample = tuple[str, tuple[str, ...], int]
"""Name, values of the labels, value."""


def write_metrics(uses: Sequence[NodeUse], jobs: Iterable[Job]) -> str:
    """The text, with a line break at its end."""
    samples = list(_list_samples(uses, jobs))
    return "".join(_write(metric, samples) for metric in METRICS)


def write_down() -> str:
    """The text if the controller does not respond."""
    return _write(UP, [(UP.name, (), 0)])


def _list_samples(uses: Sequence[NodeUse], jobs: Iterable[Job]) -> Iterator[Sample]:
    yield UP.name, (), 1
    for state, count in sorted(Counter(job.state for job in jobs).items()):
        yield "nohype_fleet_guests", (state.lower(),), count
    for state, count in sorted(Counter(use.node.state.rstrip("*") for use in uses).items()):
        yield "nohype_fleet_nodes", (state.lower(),), count
    for use in uses:
        node = use.node
        yield "nohype_fleet_node_responds", (node.name,), int(node.responds)
        yield "nohype_fleet_node_guests", (node.name,), len(use.places)
        for name, used, total in (
            ("nohype_fleet_cores", use.cores, node.cores),
            ("nohype_fleet_memory_bytes", use.memory << 20, node.memory << 20),
            ("nohype_fleet_vfs", use.vfs, node.vfs),
            ("nohype_fleet_nvme", use.disks, node.disks),
        ):
            yield name, (node.name, _USED), used
            yield name, (node.name, _FREE), total - used


def _write(metric: Metric, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} gauge"]
    for name, values, value in samples:
        if name == metric.name:
            labels = ",".join(f'{label}="{_escape(text)}"' for label, text in zip(metric.labels, values, strict=True))
            lines.append(f"{name}{f'{{{labels}}}' if labels else ''} {value}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
