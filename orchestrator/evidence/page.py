"""Evidence as one HTML page: no scripts and nothing from elsewhere, readable on paper and in the dark. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

# No part of the page may load or run anything, whatever a guest's name contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --line: #bbb; --pass: #0a6b2d; --fail: #b00020; --gap: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --pass: #6fd08c; --fail: #ff8a80; --gap: #ffc46b; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
td, code { overflow-wrap: anywhere; } ul { margin: .2rem 0; padding-left: 1.1rem; }
.pass { color: var(--pass); } .fail { color: var(--fail); } .gap { color: var(--gap); }
.verdict { font-weight: 600; white-space: nowrap; }
.unit { font-size: .85em; opacity: .8; } details { margin: .2rem 0; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } tr { break-inside: avoid; }
  details::details-content { display: block; content-visibility: visible; height: auto; } }
"""
_CLASSES = {"pass": "pass", "fail": "fail", "not measured": "gap"}
_LINES_SHOWN = 8
_LIMIT = "weaker, because "
"""As ``model.proof.WEAKER``: this module reads files of other versions too."""


def build_page(evidence: Mapping[str, Any], key: str = "") -> str:
    """``evidence``: of a signed file, or only its `proofs`. ``key``: the id of the key that signed it; empty if none did."""
    proofs = evidence["proofs"]
    counts = Counter(proof["verdict"] for proof in proofs)
    verdicts = ", ".join(f'<span class="{_CLASSES[name]} verdict">{counts[name]} {name}</span>' for name in _CLASSES)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>NoHype audit</title>',
        f"<style>{_STYLE}</style></head><body><h1>NoHype audit</h1>",
        f"<p>{verdicts}</p>",
        "<h2>Proofs</h2>",
        _build_table(("Proof", "Subject", "Verdict", "Figure", "Evidence"), (_build_row(proof) for proof in proofs)),
        _build_facts(evidence, key),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _build_facts(evidence: Mapping[str, Any], key: str) -> str:
    if "host" not in evidence:
        return "<p>Not signed.</p>"
    signed = f"signed with key {key}; this page is a copy: verify the file of evidence" if key else "not signed"
    rows = [("signature", signed), ("created", evidence["created"]), ("nonce", evidence["nonce"] or "none")]
    for part in ("host", "clock", "software", "events"):
        rows += _flatten(part, evidence[part])
    rows += [("not read", gap) for gap in evidence.get("gaps", ())]
    tables = ["<h2>Host</h2>", _build_table(("Fact", "Value"), (_build_cells(*row) for row in rows))]
    for guest in evidence["guests"]:
        name = escape(str(guest.get("name")))
        facts = [row for field, value in guest.items() if field != "name" for row in _flatten(field, value)]
        tables += [f"<h2>Guest {name}</h2>", _build_table(("Fact", "Value"), (_build_cells(*row) for row in facts))]
    return "\n".join(tables)


def _flatten(name: str, value: object) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for field, item in value.items() for row in _flatten(f"{name} {field}", item)]
    if isinstance(value, list):
        return [(name, str(item)) for item in value] or [(name, "none")]
    return [(name, "not measured" if value is None else str(value).lower() if isinstance(value, bool) else str(value))]


def _build_row(proof: Mapping[str, Any]) -> str:
    figure = proof.get("figure")
    shown = "-" if figure is None else f"{figure:g}" if isinstance(figure, int | float) else str(figure)
    verdict = proof["verdict"]
    return (
        f"<td>{escape(proof['name'])}</td><td>{escape(proof['subject'])}</td>"
        f'<td class="verdict {_CLASSES.get(verdict, "gap")}">{escape(verdict)}</td>'
        f'<td>{escape(shown)} <span class="unit">{escape(proof["unit"])}</span></td><td>{_build_lines(proof)}</td>'
    )


def _build_lines(proof: Mapping[str, Any]) -> str:
    """Limits of a pass are always shown, and what did not pass; the rest is folded, except on paper."""
    lines = [*map(str, proof["evidence"]), *(f"{name} = {value}" for name, value in proof.get("values", {}).items())]
    first = [line for line in lines if line.startswith(_LIMIT)] if proof["verdict"] == "pass" else lines[:_LINES_SHOWN]
    shown = frozenset(first)
    rest = [line for line in lines if line not in shown]
    folded = f"<details><summary>{len(rest)} lines</summary>{_build_list(rest)}</details>" if rest else ""
    return _build_list(first) + folded


def _build_list(lines: Iterable[str]) -> str:
    shown = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{shown}</ul>" if shown else ""


def _build_cells(*texts: str) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _build_table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
