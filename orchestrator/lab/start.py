"""Builds what is missing, chooses the accelerator, and starts a lab."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchestrator.host.root import HostRoot
from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.recipe import recipes_folder
from orchestrator.lab.accel import AccelChoice, Probe, choose_accel
from orchestrator.lab.build import build_lab, build_tools
from orchestrator.lab.control import LabParts, attached, check_name_available, up
from orchestrator.lab.lab import Lab
from orchestrator.lab.progress import Timeline
from orchestrator.lab.spec import LabImage, LabSpec


def build_parts(spec: LabSpec, timeline: Timeline, packages: Sequence[str] = ()) -> tuple[Path, LabImage]:
    """The tools root with QEMU, and the lab's image, as of `build_lab`."""
    tools = _build_tools(timeline)
    return tools, _build_image(spec, timeline, packages)


def start_lab(name: str, spec: LabSpec, accel: AccelChoice, timeline: Timeline, *, switch_of: str = "") -> Lab:
    """Raises Conflict before a build if the lab is up or is being started. ``switch_of`` as of `control.up`."""
    check_name_available(name)
    return up(name, _prepare(spec, accel, timeline), timeline, switch_of=switch_of)


@contextmanager
def attached_lab(
    name: str, spec: LabSpec, accel: AccelChoice, timeline: Timeline, *, packages: Sequence[str] = (), switch_of: str = ""
) -> Iterator[Lab]:
    """A lab during the block, as of `control.attached`. ``packages`` are additional Debian packages of its image."""
    check_name_available(name)
    with attached(name, _prepare(spec, accel, timeline, packages), timeline, switch_of=switch_of) as lab:
        yield lab


def _prepare(spec: LabSpec, accel: AccelChoice, timeline: Timeline, packages: Sequence[str] = ()) -> LabParts:
    tools = _build_tools(timeline)
    with timeline.stage("guest image minimal"):
        guest = build_image(recipes_folder(), "minimal", cache_folder(), progress=timeline.note)
    # Before the long build of the image, so that --accel kvm without KVM fails early.
    chosen = choose_accel(HostRoot(), accel, Probe(tools, guest / "vmlinuz", guest / "initrd"), timeline)
    return LabParts(spec, _build_image(spec, timeline, packages), tools, chosen)


def _build_tools(timeline: Timeline) -> Path:
    with timeline.stage("emulator's tools"):
        return build_tools(cache_folder(), progress=timeline.note)


def _build_image(spec: LabSpec, timeline: Timeline, packages: Sequence[str] = ()) -> LabImage:
    with timeline.stage(f"image of the lab {spec.name}"):
        return build_lab(spec, cache_folder(), progress=timeline.note, packages=packages)
