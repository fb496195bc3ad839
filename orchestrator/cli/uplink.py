"""`nohype uplink`: the edge modes of the host's uplinks, and the probe of the external switch."""

from __future__ import annotations

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.client import Client
from orchestrator.client.shapes import CounterReading
from orchestrator.model.edge import EDGE_SETTINGS


@click.group()
def uplink() -> None:
    """Show and set edge modes, and probe the external switch.

    The edge mode of an uplink decides what sends the frames between guests to the external switch: the NIC (vepa, channel) or,
    weaker, the host's kernel (macvtap-vepa, nft-vepa). It is set here, or by `edge` in [uplinks.NAME] of the configuration.
    """


@uplink.command("list")
@json_option
@client_option
def list_uplinks(*, as_json: bool, client: Client) -> None:
    """List the uplinks, with the edge mode that guests get."""
    found = client.uplinks()
    if as_json:
        print_json(found)
        return
    rows = [(one["name"], one["edge"] or "none", "up" if one["up"] else "down", ",".join(one["guests"]) or "-") for one in found]
    print_table([("UPLINK", "EDGE", "LINK", "GUESTS"), *rows])


@uplink.command()
@click.argument("name")
@json_option
@client_option
def show(name: str, *, as_json: bool, client: Client) -> None:
    """Show edge mode and frames of the uplink NAME.

    The table has the reason for the mode, and the frames of guests' NICs, the uplink and the switch port. `sent` is towards the
    external switch. Its port is read if `switch` and `port` are set in [uplinks.NAME].
    """
    found = client.uplink(name)
    if as_json:
        print_json(found)
        return
    print_table(
        [
            ("uplink", found["name"]), ("link", "up" if found["up"] else "down"), ("configured", found["configured"]),
            *([("set instead", f"{found['override']} (nohype uplink set)")] if found["override"] else []),
            *([("managed by", f"{found['managed_by']}, which may change it")] if found["managed_by"] else []),
            ("edge mode", found["edge"] or "none"), *([("why", found["why"])] if found["why"] else []),
            *((f"mode {mode['mode']}", mode["refused"] or "possible") for mode in found["modes"]),
            *([("now", found["now"])] if found["now"] else []), ("guests", ", ".join(found["guests"]) or "none"),
            *(("not measured", gap) for gap in found.get("gaps", [])),  # absent from earlier managers
            *((f"frames {one['place']} {one['name']}", _format_counts(one)) for one in found.get("counters", ())),
        ]
    )  # fmt: skip


def _format_counts(reading: CounterReading) -> str:
    counts = reading["counts"]
    if counts is None:
        text = reading["gap"]
    else:
        dropped = counts["sent_dropped"] + counts["received_dropped"]
        text = f"{counts['sent']} sent, {counts['received']} received, {dropped} dropped"
    return f"{text} (guest {reading['guest']})" if reading["guest"] else text


@uplink.command("set")
@click.argument("name")
@click.option("--edge", required=True, type=click.Choice([*map(str, EDGE_SETTINGS), "configured"]),
              help="The edge mode; configured: that of the configuration.")  # fmt: skip
@json_option
@client_option
def set_edge(name: str, *, edge: str, as_json: bool, client: Client) -> None:
    """Set the edge mode of the uplink NAME for new guests.

    The manager records it, and it has precedence over the configuration until `--edge configured`. Refused while guests have NICs
    of the uplink, and for a mode that the uplink cannot have. Operators only.
    """
    found = client.set_uplink(name, edge)
    if as_json:
        print_json(found)
    else:
        say(f"{name}: new guests get edge mode {found['edge'] or 'none'}" + (f" ({found['why']})" if found["why"] else ""))


@uplink.command()
@click.argument("name")
@json_option
@client_option
def prove(name: str, *, as_json: bool, client: Client) -> int:
    """Probe whether the switch sends frames back to NAME.

    The manager sends frames between two addresses of its own on the uplink. The switch sends them back if its port has hairpin
    on. Exit status 1 if none comes back. Operators only.
    """
    result = client.prove_uplink(name)
    if as_json:
        print_json(result)
    else:
        say(f"{name}: {result['returned']} of {result['sent']} probe frames came back from the switch")
        if not result["returned"]:
            say(f"  hint: enable hairpin (reflective relay) on the switch port of {name}, and check the cable")
    return int(not result["returned"])
