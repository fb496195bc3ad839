"""Writes docs/future-processors.md: which hardware removes the VM exits and the limits of proofs that remain.

    .venv/bin/python benchmarks/future_processors.py [--check]

Input: remaining_exits.json (measured figures) and future_processors.toml (facts with sources). `--check` writes nothing and exits
with status 1 if the document is not up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.audit.catalogue import PROOFS
from orchestrator.model.exit_names import SVM

FOLDER = Path(__file__).parent
DOCUMENT = FOLDER.parent / "docs" / "future-processors.md"
FIGURES, FACTS = FOLDER / "remaining_exits.json", FOLDER / "future_processors.toml"

_HEAD = """# What future processors would need

The last line of the NoHype slides (ISCA 2010) is "Assess needs for future processors". This page does so from the VM exits that
remain after a guest's boot, and from the limits of the [proofs](promises.md). `benchmarks/future_processors.py` writes it from
measured figures and a table of facts.

**Measured** figures are of the {where}, {measured}. Reasons have KVM's names for AMD; on Intel they are `MSR_WRITE`,
`EXTERNAL_INTERRUPT` or `PREEMPTION_TIMER`, `INTERRUPT_WINDOW` and `HLT`. Figures marked *reckoned* leave out the exits that a
feature removes according to its documentation, because emulated processors do not have the feature. They assume that all `msr`
and `interrupt` exits of these guests are of their timers."""

_PROPOSALS = """Both start from dedicated cores, static memory and devices behind an IOMMU, as this program does. No
processor on sale has either."""


def main() -> int:
    parser = argparse.ArgumentParser(description="writes docs/future-processors.md")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the document is not up to date")
    options = parser.parse_args()
    text = build(json.loads(FIGURES.read_text()), tomllib.loads(FACTS.read_text()))
    if options.check:
        return 0 if DOCUMENT.is_file() and DOCUMENT.read_text() == text else 1
    DOCUMENT.write_text(text)
    return 0


def build(figures: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The document. Raises ValueError for an unknown reason, feature or proof."""
    features = {feature["name"]: feature for feature in facts["feature"]}
    _check(figures, facts, features)
    parts = [
        _HEAD.format(**figures),
        "## Remaining VM exits\n\n" + _build_exits(figures, features),
        "## Figures with these features\n\n" + _build_combinations(figures, facts["combination"], features),
        "## Features\n\n" + _build_features(features.values()),
        "## Proofs with limits\n\n" + _build_proofs(facts["proof"]),
        "## Proposals\n\n" + _build_proposals(facts["proposal"]),
        _PROPOSALS,
    ]
    return "\n\n".join(parts) + "\n"


def _check(figures: Mapping[str, Any], facts: Mapping[str, Any], features: Mapping[str, Any]) -> None:
    used = {reason for vcpu in figures["vcpus"] for reason in vcpu["exits"]}
    removed = {reason for feature in features.values() for reason in feature["removes"]}
    named = {name for combination in facts["combination"] for name in combination["features"]}
    proofs = {proof["name"] for proof in facts["proof"]}
    for what, unknown in (
        ("reasons", (used | removed) - SVM), ("features", named - features.keys()),
        ("proofs", proofs - {row.name for row in PROOFS}),
    ):  # fmt: skip
        if unknown:
            raise ValueError(f"unknown {what}: {', '.join(sorted(unknown))}")


def _build_exits(figures: Mapping[str, Any], features: Mapping[str, Any]) -> str:
    reasons = list(dict.fromkeys(reason for vcpu in figures["vcpus"] for reason in vcpu["exits"]))
    names = [vcpu["name"] for vcpu in figures["vcpus"]]
    rows = []
    for reason in reasons:
        removers = [name for name, feature in features.items() if reason in feature["removes"]]
        counts = [str(vcpu["exits"].get(reason, 0)) for vcpu in figures["vcpus"]]
        rows.append([f"`{reason}`", *counts, "; ".join(removers) or "nothing known"])
    rows.append(["all, per second", *(f"{_rate(vcpu['exits'], figures):.1f}" for vcpu in figures["vcpus"]), ""])
    return f"In {figures['seconds']} s, measured:\n\n" + _build_table(["reason", *names, "removed by"], rows)


def _build_combinations(figures: Mapping[str, Any], combinations: Iterable[Any], features: Mapping[str, Any]) -> str:
    """``with`` of a vCPU has measured counts by the name of a combination."""
    heads = ["exits per second", *(vcpu["name"] for vcpu in figures["vcpus"])]
    rows = [["measured, without any", *(f"{_rate(vcpu['exits'], figures):.1f}" for vcpu in figures["vcpus"])]]
    for combination in combinations:
        removed = {reason for name in combination["features"] for reason in features[name]["removes"]}
        cells = []
        for vcpu in figures["vcpus"]:
            measured = vcpu.get("with", {}).get(combination["name"])
            counts = measured or {reason: count for reason, count in vcpu["exits"].items() if reason not in removed}
            cells.append(f"{_rate(counts, figures):.1f}" + ("" if measured else " *reckoned*"))
        rows.append([combination["name"], *cells])
    return _build_table(heads, rows)


def _rate(counts: Mapping[str, int], figures: Mapping[str, Any]) -> float:
    return float(sum(counts.values()) / figures["seconds"])


def _build_features(features: Iterable[Any]) -> str:
    heads = ["feature", "effect", "today", "a host check looks for", "sources"]
    return _build_table(heads, [[f["name"], f["how"], f["today"], f["check"], "; ".join(f["sources"])] for f in features])


def _build_proofs(proofs: Iterable[Any]) -> str:
    heads = ["proof", "limit", "hardware that removes it", "today", "a host check looks for", "the proof becomes"]
    fields = ("limit", "hardware", "today", "check", "becomes")
    return _build_table(heads, [[f"`{proof['name']}`", *(proof[field] for field in fields)] for proof in proofs])


def _build_proposals(proposals: Iterable[Any]) -> str:
    heads = ["proposal", "what it changes", "a NoHype host with it"]
    return _build_table(heads, [[f"[{p['name']}]({p['source']})", p["changes"], p["becomes"]] for p in proposals])


def _build_table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
