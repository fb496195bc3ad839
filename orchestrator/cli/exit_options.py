"""Options of `guest create` for the end of the boot, and for limits of VM exits after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from orchestrator.cli.seconds import Seconds


def exit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; `take_exit_policy` reads them."""
    options = (
        click.option("--disengage-after", type=Seconds(0, 86_400, min_open=True), metavar="SECONDS",
                     help="The guest's boot is over after this time.  [default: when the guest reports it, or is ready]"),
        click.option("--housekeeping", metavar="VCPUS",
                     help="vCPUs such as 0-1 that do the guest's housekeeping; the others are for its application.  "
                     "[default: all do both]"),
        click.option("--profile", type=click.Choice(["tickless"]),
                     help="The guest's kernel keeps its timer tick, its own work and interrupts on the vCPUs of --housekeeping."),
        click.option("--exit-budget", "budgets", multiple=True, metavar="CLASS:REASON=LIMIT", callback=_parse_budgets,
                     help="Limit VM exits after the boot, per vCPU: application:io=0/s,60/min or housekeeping:all=1000/s. REASON "
                     "is one of KVM's, a class (io, msr, halt, ...), mmio, all, or others; LIMIT any allows it. Repeatable."),
        click.option("--exit-action", type=click.Choice(["report", "pause", "kill"]),
                     help="What happens to a guest beyond these limits.  [default: report]"),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def take_exit_policy(fields: dict[str, Any]) -> None:
    """Replaces the fields of the options by that of the request. Raises click.UsageError."""
    budgets, action = fields.pop("budgets"), fields.pop("exit_action")
    if action and not budgets:
        raise click.UsageError("--exit-action requires --exit-budget")
    fields["exit_policy"] = {**({"action": action} if action else {}), **budgets} if budgets else None


def _parse_budgets(_context: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """By class of vCPU and reason. The manager checks reasons and limits."""
    found: dict[str, dict[str, str]] = {}
    for word in words:
        kind, colon, rule = word.partition(":")
        name, equals, limits = rule.rpartition("=")
        if kind not in ("application", "housekeeping") or not (colon and equals and name):
            raise click.BadParameter(f"{word!r} is not CLASS:REASON=LIMIT with the class application or housekeeping")
        if name in found.get(kind, {}):
            raise click.BadParameter(f"{kind}:{name} is given twice; write its limits as one: {name}=10/s,60/min")
        found.setdefault(kind, {})[name] = limits
    return found
