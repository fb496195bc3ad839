"""`nohype web`: the page of the host for a browser on this machine."""

from __future__ import annotations

import click

from orchestrator.cli.connection import client_option
from orchestrator.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.web.server import WebServer


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, metavar="PORT", help="Port on 127.0.0.1.  [default: any free port]"
)
@client_option
def web(*, port: int, client: Client) -> None:
    """Serve a web page of the host on this machine.

    The command runs until it is interrupted. It prints an address that can be opened once, within ten minutes. The page shows
    guests, cores, devices, VM exits, proofs, drift, quarantine and events, has the consoles, and can start and stop guests. The
    manager receives its requests as yours.

    \b
    From another machine:
      ssh -t -L 8080:127.0.0.1:8080 HOST nohype web --port 8080
    """
    client.version()  # raises if the manager cannot be reached
    try:
        server = WebServer(client, port)
    except OSError as error:
        hint = "choose a --port above 1023, or run as root" if isinstance(error, PermissionError) else "choose another --port"
        raise OrchestratorError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}", hint) from None
    with server:
        click.echo(server.address)
        click.echo("open this address once; it is a password until then. Ctrl-C ends the server", err=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            raise click.Abort from None
