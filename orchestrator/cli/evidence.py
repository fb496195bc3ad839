"""`nohype audit verify`, `keygen` and `tpm-key`: the commands that need the package cryptography. They contact no manager."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.cli.seconds import Seconds
from orchestrator.evidence.check import NOT_MEASURED, Expected, Summary, check_expected, summarize
from orchestrator.evidence.document import read_file
from orchestrator.evidence.keys import check_signature, create_key, load_public, write_new
from orchestrator.evidence.tpm import CheckedQuote, check_quote, find_tpm_key, has_quote, load_tpm_key

_file = click.Path(path_type=Path)


def _parse_pcrs(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> dict[int, str]:
    found: dict[int, str] = {}
    for text in texts:
        if not (match := re.fullmatch(r"(\d{1,2})=([0-9a-fA-F]{64})", text, re.ASCII)):
            raise click.BadParameter(f"{text!r} is not NUMBER=HEX with 64 hexadecimal digits")
        number, value = int(match[1]), match[2].lower()
        if found.setdefault(number, value) != value:
            raise click.BadParameter(f"register {number} has two values")
    return found


@click.command()
@click.argument("file", type=_file)
@click.option("--key", type=_file, required=True, metavar="PUB", help="PEM file with the public key of the host.")
@click.option(
    "--tpm-key", type=_file, metavar="PUB", help="PEM file with the attestation key of the host's TPM: verify its quote."
)
@click.option(
    "--pcr", "pcrs", multiple=True, callback=_parse_pcrs, metavar="NUMBER=HEX",
    help="Reject a quote with another value of this register (SHA-256). Requires --tpm-key.",
)  # fmt: skip
@click.option("--host", metavar="ID", help="Reject evidence of another host.")
@click.option("--boot", metavar="ID", help="Reject evidence of another boot of the host.")
@click.option("--nonce", metavar="WORD", help="Reject evidence that was not made for this word.")
@click.option("--max-age", type=Seconds(min=1, max=1e9), metavar="SECONDS", help="Reject older evidence.")
@click.option("--any-clock", is_flag=True, help="Accept the time of a clock that was not synchronised.")
@json_option
def verify(
    file: Path, *, key: Path, tpm_key: Path | None, pcrs: Mapping[int, str], host: str | None, boot: str | None,
    nonce: str | None, max_age: float | None, any_clock: bool, as_json: bool,
) -> int:  # fmt: skip
    """Verify signed evidence: signature, host, boot, time.

    Needs no manager and no privileges. Exit status 0: authentic, and every proof passed; 1: authentic, but a proof fails or the
    event log is broken; 8: authentic, no proof fails, but not all were measured, or the quote of its TPM was not verified. Not
    accepted: 4 if the file is not evidence, 5 if the signature or that of the TPM does not match, 6 if it is of another host,
    boot or nonce, or has no quote with the registers that you expect, 7 if its time is not acceptable.
    """
    if pcrs and not tpm_key:
        raise click.UsageError("--pcr requires --tpm-key PUB")
    signed = read_file(file)
    check_signature(signed, load_public(key))
    quote = check_quote(signed.evidence, load_tpm_key(tpm_key), pcrs) if tpm_key else None
    check_expected(signed.evidence, Expected(host, boot, nonce, max_age, any_clock), datetime.now(UTC))
    summary = summarize(signed.evidence)
    if as_json:
        print_json({"signature": "valid", "key": signed.key, "tpm": _describe_tpm(signed.evidence, quote),
                    "proofs": summary.counts, "problems": summary.problems,
                    "host": signed.evidence["host"], "created": signed.evidence["created"]})  # fmt: skip
    else:
        _print(signed.evidence, signed.key, summary, quote)
    return NOT_MEASURED if not summary.status and has_quote(signed.evidence) and not quote else summary.status


@click.command()
@click.argument("file", type=_file)
def keygen(file: Path) -> None:
    """Create a key that signs evidence.

    Writes the private key to FILE, readable by you only, and the public key to FILE.pub.
    """
    public, name = create_key(file)
    click.echo(f"private key {file}, public key {public}, id {name}")


@click.command("tpm-key")
@click.argument("evidence", type=_file)
@click.argument("file", type=_file)
def tpm_key(evidence: Path, file: Path) -> None:
    """Write the attestation key that EVIDENCE names to FILE.

    The key identifies the TPM of the host. Trust it only if you have made the evidence on the host itself.
    """
    write_new(file, find_tpm_key(read_file(evidence).evidence), 0o644)
    click.echo(f"attestation key {file}")


def _describe_tpm(evidence: Mapping[str, Any], quote: CheckedQuote | None) -> str:
    if quote:
        return f"quote valid (key {quote.key}), {len(quote.pcrs)} registers, {quote.resets} resets"
    # Not the text of the file: it could say that a quote is valid.
    return "quote not verified: give --tpm-key" if has_quote(evidence) else "not measured"


def _print(evidence: Mapping[str, Any], key: str, summary: Summary, quote: CheckedQuote | None) -> None:
    host = evidence["host"]
    say(f"signature valid (key {key})")
    say(_join_lines(f"host {host.get('id')} ({host.get('name')}), boot {host.get('boot')}, {evidence['created']}"))
    say(f"TPM {_describe_tpm(evidence, quote)}")
    bad = [(p["name"], p["subject"], p["verdict"].upper()) for p in evidence["proofs"] if p["verdict"] != "pass"]
    if bad:
        print_table([("PROOF", "SUBJECT", "VERDICT"), *bad])
    for problem in summary.problems:
        say(_join_lines(problem))
    say(f"proofs: {summary}")


def _join_lines(text: str) -> str:
    """A line feed in a text of the file could begin a line that only `verify` may print."""
    return text.replace("\n", r"\n")
