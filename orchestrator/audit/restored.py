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
    before, after = surveys.before, surveys.after
    parts = {**before, **after}
    changed = [
        f"{part}: before {before.get(part)}, after {after.get(part)}" for part in parts if before.get(part) != after.get(part)
    ]
    return count_findings(changed, [f"surveys before and after are compared: {', '.join(parts)}"])
