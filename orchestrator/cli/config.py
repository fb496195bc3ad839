"""`nohype config`: looks at the manager's configuration before the manager does. Works without one."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.api.identity import build_directory
from orchestrator.api.tls import build_context
from orchestrator.config import DEFAULT_CONFIG, read_config
from orchestrator.host import netlink
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology
from orchestrator.planning.host_check import Severity, build_policy, check_host


@click.group()
def config() -> None:
    """Check the manager's configuration file."""


@config.command()
@click.argument("path", metavar="[FILE]", type=click.Path(path_type=Path), default=DEFAULT_CONFIG)
@click.option("--host", "compare", is_flag=True, help="Compare [host] with this server, too.")
@click.pass_context
def check(ctx: click.Context, path: Path, *, compare: bool) -> None:
    """Find what `nohyped` would refuse in its configuration.

    Looks at each section and field of FILE (left out: /etc/nohype/nohype.toml), whether the users and groups that are named
    exist, and whether TLS can use the files of [api]. With --host it also reads what this server has: CPUs that do not exist or
    are offline, uplinks, huge pages, KVM, IOMMU. An error there means that no guest can be started; a warning does not. Exit
    status 0 without errors, 1 with. Run it as root, who alone can read the key.
    """
    found = read_config(path)
    build_directory(found)
    if found.api:
        build_context(found.api)
    findings = check_host(build_policy(found.host), read_topology(HostRoot(net=netlink))) if compare else ()
    for finding in findings:
        click.echo(str(finding))
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    if errors:
        click.echo(f"the configuration {path} does not fit this host: {errors} errors")
        ctx.exit(1)
    click.echo(f"the configuration {path} is good")
