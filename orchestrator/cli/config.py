"""`nohype config`: checks the manager's configuration."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.api.identity import build_identity_map
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
@click.option("--host", "compare", is_flag=True, help="Also compare the section [host] with this server.")
@click.pass_context
def check(ctx: click.Context, path: Path, *, compare: bool) -> None:
    """Check a configuration file as `nohyped` does when it starts.

    FILE is /etc/nohype/nohype.toml by default. The command checks every section and field, whether the users and groups exist,
    and whether TLS can use the files of [api]. With --host it also checks this server: missing or offline CPUs, uplinks, huge
    pages, KVM, IOMMU. After an error there no guest can be started; a warning does not prevent it. Exit status 1 if there are
    errors. Run it as root: only root can read the key.
    """
    settings = read_config(path)
    build_identity_map(settings)
    if settings.api:
        build_context(settings.api)
    findings = check_host(build_policy(settings), read_topology(HostRoot(net=netlink))) if compare else ()
    for finding in findings:
        click.echo(str(finding))
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    if errors:
        click.echo(f"configuration {path}: {errors} errors on this host")
        ctx.exit(1)
    click.echo(f"configuration {path} is valid")
