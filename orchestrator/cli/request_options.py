"""The options with which a guest is requested, from one manager or from the fleet, and the request that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from orchestrator.cli.boot import boot_options, take_boot
from orchestrator.cli.configuration import configuration_options
from orchestrator.cli.disks import accept_option, disk_option
from orchestrator.cli.exit_options import exit_options, take_exit_policy
from orchestrator.cli.nics import nic_option


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options: tuple[Callable[..., Any], ...] = (
        click.option("--cores", type=click.IntRange(1, 1024), metavar="NUMBER",
                     help="Whole physical cores; each SMT thread becomes a vCPU.  [default: 1, or the cores of --cpus]"),
        click.option("--memory", required=True, metavar="SIZE",
                     help="Memory, a multiple of the huge page size, such as 256M or 1G."),
        click.option("--image", metavar="NAME", help="Guest image in the host's store (`nohype image list` there)."),
        boot_options,
        click.option("--address", metavar="IP/LENGTH",
                     help="IP address of the guest's network interface, such as 10.9.0.11/24."),
        click.option("--cmdline", default="", metavar="WORDS", help="Extra arguments for the guest's kernel command line."),
        click.option("--page-size", metavar="SIZE", help="Huge page size, 2M or 1G.  [default: page_size of the manager]"),
        click.option("--cache-ways", type=click.IntRange(1, 64), metavar="NUMBER",
                     help="Ways of each last-level cache of its cores that no other guest or program fills."),
        click.option("--bandwidth", metavar="LIMIT",
                     help="Limit of memory bandwidth for each L3 cache of its cores: 40%, or 4000MB/s on AMD."),
        click.option("--cpus", metavar="LIST",
                     help="Use exactly these CPUs: whole cores of one NUMA node, such as 2-3,6-7."),
        click.option("--vf", metavar="PCI-ADDRESS",
                     help="Use exactly this virtual function, such as 0000:41:10.0; requires --cpus."),
        nic_option,
        configuration_options,
        disk_option,
        accept_option,
        click.option("--restart", type=click.Choice(["never", "on-failure"]),
                     help="Restart the guest after a failure; a guest that powers off stays off.  [default: never]"),
        click.option("--remove", is_flag=True, default=None,
                     help="Delete the guest when it powers off or ends otherwise without a failure. "
                          "Without it the guest keeps its resources."),
        exit_options,
        click.option("--id", metavar="ID",
                     help="Request id of your choice: the same request with the same id creates only one guest."),
    )  # fmt: skip
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def build_request(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `GuestRequest` from what `request_options` pass. Raises click.UsageError if they contradict each other."""
    take_boot(fields)
    take_exit_policy(fields)
    cpus, vf, nics = fields.pop("cpus"), fields.pop("vf"), fields.pop("nics")
    if vf and not cpus:
        raise click.UsageError("--vf requires --cpus")
    if nics and (vf or fields["address"]):
        raise click.UsageError("--nic cannot be combined with --address or --vf: give them as keys of --nic")
    lists = {"nics": nics, **{key: fields.pop(key) for key in ("disks", "accept")}}
    placement = {"cpus": cpus, **({"vf": vf} if vf else {})} if cpus else None
    wanted = {**fields, "placement": placement, **{key: list(values) or None for key, values in lists.items()}}
    return {"name": name, **{key: value for key, value in wanted.items() if value is not None}}
