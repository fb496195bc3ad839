"""`nohype switch`: the external switches that return frames to the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.names import complete_switch
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.client import Client
from orchestrator.client import switch_shapes as shapes

_DRIVERS = ("linux-bridge", "openvswitch")


@click.group()
def switch() -> None:
    """Register, verify and set external switches.

    Frames between guests leave the host, and the external switch returns them (hairpin, reflective relay). The manager can read a
    switch, check the port of each uplink, set hairpin there, and report when the port changes. Operators only.
    """


@switch.command()
@click.argument("name")
@click.option("--driver", type=click.Choice(_DRIVERS), default=_DRIVERS[0], show_default=True, help="Kind of the switch.")
@click.option("--bridge", required=True, metavar="BRIDGE", help="Name of the bridge on the switch.")
@click.option("--netns", metavar="NAME", help="Network namespace of a bridge on the manager's host.")
@click.option(
    "--host", metavar="HOST", help="Address of a switch that is reached over SSH; without it the switch is on the manager's host."
)
@click.option("--ssh-port", type=click.IntRange(1, 65535), metavar="PORT", help="Port of its SSH server.  [default: 22]")
@click.option("--user", metavar="USER", help="User to log in as; others than root need sudo.  [default: root]")
@click.option("--host-key", metavar="KEY", help="Public host key of the switch: 'ssh-ed25519 AAAA...'. No other key is accepted.")
@click.option("--uplink", "uplinks", multiple=True, metavar="UPLINK=PORT",
              help="An uplink of the host and its port of the switch, unless the configuration has it; repeatable.")  # fmt: skip
@json_option
@client_option
def add(
    name: str, *, driver: str, bridge: str, netns: str | None, host: str | None, ssh_port: int | None, user: str | None,
    host_key: str | None, uplinks: tuple[str, ...], as_json: bool, client: Client,
) -> None:  # fmt: skip
    """Register a switch as NAME.

    The manager connects first: a switch that it cannot read is not registered. Over SSH it logs in with the key that its
    configuration names ([switches] ssh_key).
    """
    request: dict[str, Any] = {"name": name, "driver": driver, "bridge": bridge}
    if netns:
        request["netns"] = netns
    if uplinks:
        request["uplinks"] = [_parse_uplink(text) for text in uplinks]
    given = {"port": ssh_port, "user": user, "host_key": host_key}
    if host:
        if not host_key:
            raise click.UsageError("--host requires --host-key 'ssh-ed25519 AAAA...'")
        request["ssh"] = {"host": host, **{key: value for key, value in given.items() if value is not None}}
    elif any(value is not None for value in given.values()):
        raise click.UsageError("--ssh-port, --user and --host-key require --host")
    added = client.add_switch(request)
    if as_json:
        print_json(added)
    else:
        say(f"switch {name} registered; it can: {', '.join(added['can']) or 'be read'}")


@switch.command("list")
@json_option
@client_option
def list_switches(*, as_json: bool, client: Client) -> None:
    """List the switches, with the last observed problem of each."""
    views = client.switches()
    if as_json:
        print_json(views)
    elif views:
        print_table([("SWITCH", "DRIVER", "BRIDGE", "WHERE", "UPLINKS", "STATE"), *map(_row, views)])
    else:
        say("no switches")


@switch.command()
@click.argument("name", shell_complete=complete_switch)
@json_option
@client_option
def show(name: str, *, as_json: bool, client: Client) -> None:
    """Read the switch NAME, with all its ports."""
    found = client.switch(name)
    if as_json:
        print_json(found)
        return
    state = found["state"]
    print_table([("SWITCH", "DRIVER", "BRIDGE", "WHERE", "UPLINKS", "STATE"), _row(found["view"])])
    say(f"can: {', '.join(found['view']['can']) or 'be read'}")
    settings = {key: state[key] for key in ("vlan_filtering", "stp", "fail_mode", "flows", "other_flows")}
    say("settings: " + ", ".join(f"{key} {_show(value)}" for key, value in settings.items() if value is not None) + "\n")
    heading = ("PORT", "LINK", "HAIRPIN", "STATE", "ISOLATED", "MTU", "VLANS", "IN", "OUT", "ADDRESSES")
    print_table([heading, *map(_port_row, state["ports"])])
    for line in _list_notes(found):
        say(line)


@switch.command()
@click.argument("name", shell_complete=complete_switch)
@click.argument("port", required=False)
@json_option
@client_option
@click.pass_context
def verify(ctx: click.Context, name: str, port: str | None, *, as_json: bool, client: Client) -> None:
    """Check PORT of the switch NAME, or the ports of all uplinks.

    Exit status 0 if no check failed.
    """
    checks = client.verify_switch(name, port)
    failed = [check for check in checks if check["verdict"] == "fail"]
    if as_json:
        print_json(checks)
    else:
        rows = [(check["port"], check["name"], check["verdict"], check["text"]) for check in checks]
        print_table([("PORT", "CHECK", "VERDICT", "FOUND"), *rows])
        for check in failed:
            say(f"port {check['port']}, {check['name']}: {check['hint']}")
    if failed:
        ctx.exit(1)


@switch.command()
@click.argument("name", shell_complete=complete_switch)
@click.argument("port")
@click.argument("state", type=click.Choice(["on", "off"]))
@click.option("--mac", "macs", multiple=True, metavar="MAC", help="An address behind the port (Open vSwitch); repeatable.")
@json_option
@client_option
def hairpin(name: str, port: str, state: str, *, macs: tuple[str, ...], as_json: bool, client: Client) -> None:
    """Set hairpin (reflective relay) at PORT of the switch NAME.

    With Open vSwitch and --mac, these addresses are accepted from this port only, and frames between them are counted per pair.
    `nohype switch delete` reverts the change.
    """
    after = client.set_hairpin(name, port, on=state == "on", macs=macs)
    if as_json:
        print_json(after)
    else:
        say(f"hairpin {state} at port {port} of switch {name}")


@switch.command()
@click.argument("name", shell_complete=complete_switch)
@click.option("--force", is_flag=True,
              help="Forget the switch even if its ports cannot be restored, or it translates VLANs of guests.")  # fmt: skip
@json_option
@client_option
def delete(name: str, *, force: bool, as_json: bool, client: Client) -> None:
    """Forget the switch NAME.

    The manager first reverts its own changes there.
    """
    client.delete_switch(name, force=force)
    if as_json:
        print_json({"name": name, "state": "deleted"})
    else:
        say(f"switch {name} deleted")


def _parse_uplink(text: str) -> dict[str, str]:
    uplink, separator, port = text.partition("=")
    if not (uplink and separator and port):
        raise click.UsageError(f"--uplink {text!r}: use the form UPLINK=PORT, such as eth1=swp1")
    return {"uplink": uplink, "port": port}


def _row(view: shapes.SwitchView) -> tuple[object, ...]:
    switch = view["switch"]
    ssh = switch["ssh"]
    where = (
        f"{ssh['user']}@{ssh['host']}:{ssh['port']}"
        if ssh
        else f"namespace {switch['netns']}"
        if switch["netns"]
        else "this host"
    )
    ties = ", ".join(f"{tie['uplink']}={tie['port']}" for tie in view["uplinks"]) or "-"
    state = view["problem"] or ("ok" if view["observed"] else "not observed yet")
    return switch["name"], switch["driver"], switch["bridge"], where, ties, state


def _port_row(port: shapes.SwitchPort) -> tuple[object, ...]:
    link = "up" if port["carrier"] else "no carrier" if port["up"] else "down"
    vlans = ",".join(f"{vlan['id']}{'*' if vlan['pvid'] else ''}" for vlan in port["vlans"]) or "-"
    counters = port["counters"]
    counts = (counters["rx_packets"], counters["tx_packets"]) if counters else ("-", "-")
    hairpin = "on" if port["hairpin"] else "off"
    facts = (_show(port["isolated"]), _show(port["mtu"]), vlans)
    return port["name"], link, hairpin, port["state"], *facts, *counts, len(port["fdb"])


def _list_notes(found: shapes.SwitchDetails) -> Iterator[str]:
    for port in found["state"]["ports"]:
        for pair in port["pairs"]:
            yield f"port {port['name']}: {pair['frames']} frames from {pair['source']} to {pair['target']} were reflected"
        for channel in port.get("channels", []):  # absent from earlier managers
            to = f"VLAN {channel['switch_vlan']}" if channel["switch_vlan"] else "untagged frames"
            yield f"port {port['name']}: VLAN {channel['vlan']} of {channel['mac'] or 'a guest'} is translated to {to}"
        if neighbour := port["neighbour"]:
            yield f"port {port['name']}: neighbour {_describe(neighbour)}"
        yield from (f"port {port['name']}: {gap}" for gap in port["gaps"])
    for announced in found["announced"]:
        neighbour = announced["neighbour"]
        yield f"uplink {announced['uplink']}: neighbour {_describe(neighbour) if neighbour else announced['gap']}"


def _describe(neighbour: shapes.Neighbour) -> str:
    claim = f", claims: {neighbour['evb']}" if neighbour["evb"] else ""
    return f"{neighbour['system']}, port {neighbour['port']}{claim}"


def _show(value: object) -> object:
    return "-" if value is None else ("no", "yes")[value] if isinstance(value, bool) else value
