"""`nohype audit`: all proofs, measured now; and what to do with signed evidence of them."""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from orchestrator.canonical import canonicalize
from orchestrator.cli.connection import connect
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.cli.wait_line import show_wait
from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.evidence.diff import compare
from orchestrator.evidence.document import parse_file, read_file
from orchestrator.evidence.page import build_page
from orchestrator.model.proof import WEAKER

_file = click.Path(path_type=Path)
# In a module of their own, which needs the package cryptography.
_WITH_KEYS = {
    "verify": "Verify signed evidence: signature, host, boot, time.",
    "keygen": "Create a key that signs evidence.",
    "tpm-key": "Write the attestation key that EVIDENCE names to FILE.",
}


class _AuditGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_WITH_KEYS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _WITH_KEYS:
            return super().get_command(ctx, cmd_name)
        try:
            command: click.Command = getattr(importlib.import_module("orchestrator.cli.evidence"), cmd_name.replace("-", "_"))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("cryptography"):
                raise
            hint = "run `pip install 'nohype-orchestrator[verify]'`"
            message = f"`nohype audit {cmd_name}` requires the Python package cryptography"
            raise OrchestratorError(message, hint) from None
        return command


@click.group(cls=_AuditGroup, invoke_without_command=True)
@click.option(
    "--frames", type=click.IntRange(0, 10_000), default=0, show_default=True, metavar="NUMBER",
    help="Test frames to send between guests for the proof `vepa`; with 0 it is not measured. Operators only.",
)  # fmt: skip
@click.option("--host", "host_only", is_flag=True, help="Only the proofs of the host: no guest has to run.")
@click.option("--sign", type=_file, metavar="FILE", help="Write evidence to FILE, signed with the key of the host.")
@click.option(
    "--nonce", default="", metavar="WORD", help="Word that --sign repeats in the evidence: who chose it knows that it is new."
)
@click.option("--html", type=_file, metavar="FILE", help="Write a page for people to FILE.")
@json_option
@click.option("--socket", type=_file, help="As `nohype --socket`.", hidden=True)
@click.pass_context
def audit(
    ctx: click.Context, /, *, frames: int, host_only: bool, sign: Path | None, nonce: str, html: Path | None, as_json: bool,
    socket: Path | None,
) -> int:  # fmt: skip
    """Measure the isolation of the guests on the live host.

    Each proof measures one property, for example that no other program runs on the cores of a guest. Its verdict is `pass`,
    `fail` or `not measured`. Exit status 1 if a proof fails.

    With --host, only properties of the host are measured. What that leaves out is printed.
    """
    if ctx.invoked_subcommand:
        _refuse_options(ctx)
        return 0
    if nonce and not sign:
        raise click.UsageError("--nonce requires --sign FILE")
    if host_only and sign:
        raise click.UsageError("--host cannot be combined with --sign: evidence has all proofs")
    client = connect(ctx, socket)
    evidence: Mapping[str, Any] = {}
    key = ""
    if sign:
        with show_wait("measuring"):
            data = _encode(client.evidence(frames, nonce))
        signed = parse_file(data, "the response of the manager")
        evidence, key = signed.evidence, signed.key
        _write(sign, data)
    with show_wait("measuring"):
        proofs: Sequence[Mapping[str, Any]] = evidence["proofs"] if sign else client.audit(frames, host_only=host_only)
    if html:
        _write(html, build_page(evidence or {"proofs": proofs}, key).encode(errors="replace"))
    if as_json:
        print_json(proofs)
    else:
        print_proofs(proofs)
        if host_only:
            say("\nproofs of guests: not measured (--host)")
    return int(any(proof["verdict"] == "fail" for proof in proofs))


@audit.command()
@click.argument("first", type=_file)
@click.argument("second", type=_file)
@click.option("--no-values", is_flag=True, help="Leave out what proofs have read, and the length of the event log.")
@json_option
def diff(first: Path, second: Path, *, no_values: bool, as_json: bool) -> int:
    """Show what differs between two files of evidence.

    Compares host, software, guests, proofs and what each proof has read. Does not verify signatures. Exit status 1 if anything
    differs. What proofs read, such as rates, differs between any two audits of a host that works; with --no-values only a
    change of host, software, guests or verdicts counts.
    """
    differences = compare(read_file(first).evidence, read_file(second).evidence, values=not no_values)
    if as_json:
        print_json([{"where": place, "first": old, "second": new} for place, old, new in differences])
    else:
        for place, old, new in differences:
            say(f"{place}: {old} -> {new}")
    return int(bool(differences))


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


def _refuse_options(ctx: click.Context) -> None:
    typed = [param for param in ctx.command.params if ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE]
    given = [param.opts[-1] for param in typed]
    if given:
        raise click.UsageError(f"{', '.join(given)}: not allowed with `nohype audit {ctx.invoked_subcommand}`")


def _encode(signed: Mapping[str, Any]) -> bytes:
    """The file that the manager has signed. Any program may be listening at its address."""
    try:
        return canonicalize(dict(signed)) + b"\n"
    except ValueError as error:
        raise OrchestratorError(f"the response of the manager is not evidence: it has {error}") from None


def _write(path: Path, data: bytes) -> None:
    """Replaces a file as a whole. Devices, pipes and links, such as /dev/stdout, are written to."""
    hint = "check the path and the space on its disk"
    try:
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            path.write_bytes(data)
            return
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}", hint) from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RequestError(f"cannot write {path}: {error.strerror}", hint) from None
