"""`nohype audit`: all proofs, measured now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.client import Client
from orchestrator.model.proof import WEAKER


@click.command()
@click.option(
    "--frames", type=click.IntRange(0, 10_000), default=0, show_default=True, metavar="NUMBER",
    help="Test frames to send between guests for the proof `vepa`; with 0 it is not measured. Operators only.",
)  # fmt: skip
@json_option
@client_option
def audit(*, frames: int, as_json: bool, client: Client) -> int:
    """Measure the isolation of the guests on the live host.

    Each proof measures one property, for example that no other program runs on the cores of a guest. Its verdict is `pass`,
    `fail` or `not measured`. Exit status 1 if a proof fails.
    """
    proofs = client.audit(frames)
    if as_json:
        print_json(proofs)
    else:
        print_proofs(proofs)
    return int(any(proof["verdict"] == "fail" for proof in proofs))


def print_proofs(proofs: Sequence[Mapping[str, Any]]) -> None:
    """Prints one line per proof, then the evidence of each proof that did not pass, and the limits of each that did."""
    rows = [(p["name"], p["subject"], p["verdict"].upper(), _figure(p["figure"]), p["unit"]) for p in proofs]
    print_table([("PROOF", "SUBJECT", "VERDICT", "FIGURE", "UNIT"), *rows])
    for proof in proofs:
        if proof["verdict"] != "pass":
            say(f"\n{proof['name']} ({proof['subject']}): {proof['verdict']}")
            for line in proof["evidence"][:8]:
                say(f"  {line}")
        for line in proof["evidence"] if proof["verdict"] == "pass" else ():
            if line.startswith(WEAKER):
                say(f"\n{proof['name']} ({proof['subject']}): {line}")


def _figure(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:g}"
