"""host-restored: after its last guest the host is in the same state as before its first guest. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.model.proof import Measurement, count_findings


@dataclass(frozen=True)
class Surveys:
    """Surveys of one host as JSON values: before its first guest, and after its last."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]


def prove_host_restored(surveys: Surveys) -> Measurement:
    before, after = _without_names(surveys.before), _without_names(surveys.after)
    parts = {**before, **after}
    changed = [
        f"{part}: before {before.get(part)}, after {after.get(part)}" for part in parts if before.get(part) != after.get(part)
    ]
    return count_findings(changed, [f"surveys before and after are compared: {', '.join(parts)}"])


def _without_names(survey: Mapping[str, Any]) -> Mapping[str, Any]:
    """The kernel numbers NVMe controllers in the order in which they are bound, and so differently after a guest had one. Other
    programs create and remove virtual interfaces.
    """
    if "interfaces" in survey:
        physical = [interface for interface in survey["interfaces"] if interface["kind"] is None]
        survey = {**survey, "interfaces": physical}
    if "controllers" not in survey:
        return survey
    controllers = []
    for disk in survey["controllers"]:
        devices = [namespace["device"] for namespace in disk["namespaces"]]
        texts = {key: [_replace(text, devices) for text in disk[key]] for key in ("uses", "signatures")}
        namespaces = [{**namespace, "device": None} for namespace in disk["namespaces"]]
        controllers.append({**disk, "name": None, "namespaces": namespaces, **texts})
    return {**survey, "controllers": controllers}


def _replace(text: str, devices: list[str]) -> str:
    for device in devices:
        text = text.replace(device, "the disk")
    return text
