"""`nohype audit verify` and `keygen`: the commands that need the package cryptography. They contact no manager."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.cli.seconds import Seconds
from orchestrator.evidence.check import Expected, Summary, check_expected, summarize
from orchestrator.evidence.document import read_file
from orchestrator.evidence.keys import check_signature, create_key, load_public

_file = click.Path(path_type=Path)


@click.command()
@click.argument("file", type=_file)
@click.option("--key", type=_file, required=True, metavar="PUB", help="PEM file with the public key of the host.")
@click.option("--host", metavar="ID", help="Reject evidence of another host.")
@click.option("--boot", metavar="ID", help="Reject evidence of another boot of the host.")
@click.option("--nonce", metavar="WORD", help="Reject evidence that was not made for this word.")
@click.option("--max-age", type=Seconds(min=1, max=1e9), metavar="SECONDS", help="Reject older evidence.")
@click.option("--any-clock", is_flag=True, help="Accept the time of a clock that was not synchronised.")
@json_option
def verify(
    file: Path, *, key: Path, host: str | None, boot: str | None, nonce: str | None, max_age: float | None, any_clock: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Verify signed evidence: signature, host, boot, time.

    Needs no manager and no privileges. Exit status 0: authentic, and every proof passed; 1: authentic, but a proof fails or the
    event log is broken; 8: authentic, no proof fails, but not all were measured. Not accepted: 4 if the file is not evidence, 5
    if the signature does not match, 6 if it is of another host, boot or nonce, 7 if its time is not acceptable.
    """
    signed = read_file(file)
    check_signature(signed, load_public(key))
    check_expected(signed.evidence, Expected(host, boot, nonce, max_age, any_clock), datetime.now(UTC))
    summary = summarize(signed.evidence)
    if as_json:
        print_json({"signature": "valid", "key": signed.key, "proofs": summary.counts, "problems": summary.problems,
                    "host": signed.evidence["host"], "created": signed.evidence["created"]})  # fmt: skip
    else:
        _print(signed.evidence, signed.key, summary)
    return summary.status


@click.command()
@click.argument("file", type=_file)
def keygen(file: Path) -> None:
    """Create a key that signs evidence.

    Writes the private key to FILE, readable by you only, and the public key to FILE.pub.
    """
    public, name = create_key(file)
    click.echo(f"private key {file}, public key {public}, id {name}")


def _print(evidence: Mapping[str, Any], key: str, summary: Summary) -> None:
    host = evidence["host"]
    say(f"signature valid (key {key})")
    say(f"host {host.get('id')} ({host.get('name')}), boot {host.get('boot')}, {evidence['created']}, TPM {host.get('tpm')}")
    bad = [(p["name"], p["subject"], p["verdict"].upper()) for p in evidence["proofs"] if p["verdict"] != "pass"]
    if bad:
        print_table([("PROOF", "SUBJECT", "VERDICT"), *bad])
    for problem in summary.problems:
        say(problem)
    say(f"proofs: {summary}")
