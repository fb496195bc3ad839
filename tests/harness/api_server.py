"""The real interface on real sockets: real manager and ledger, fake host and hypervisor; certificates that live for an hour."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from orchestrator.api.accept import Listener
from orchestrator.api.app import Api
from orchestrator.api.backend import MeasureProofs, Records
from orchestrator.api.console_feed import ConsoleFeed
from orchestrator.api.event_stream import EventStream
from orchestrator.api.identity import build_identity_map
from orchestrator.api.server import Server, open_port, open_socket
from orchestrator.client.client import Client
from orchestrator.config import DaemonConfig
from orchestrator.guests.service import GuestService
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Policy
from orchestrator.model.proof import Proof, Verdict
from orchestrator.values import CpuSet
from tests.harness.crash import World

PROOF = Proof("core-smt", "guest1", Verdict.FAIL, 1, "CPUs shared on a core", ("CPU 3 is shared",))
ANY = CpuSet()
FAULT = 13
"""So many frames make the audit meet a fault of ours."""


def audit(frames: int, *, host_only: bool = False) -> tuple[Proof, ...]:
    return (PROOF,) if frames != FAULT else (PROOF,) * (1 // 0)


def open_to_all(path: Path) -> None:
    """Lets each user connect to the socket, in place of the group nohype, which a test machine need not have.

    A process changes to the folder before it becomes another user: the folders above are those of all runs of pytest, and each
    run closes them to others again.
    """
    path.chmod(0o666)
    path.parent.chmod(0o711)


@dataclass
class Served:
    """A manager that is served.

    Attributes:
        path: its Unix socket.
        url: its TLS port, empty without one.
    """

    world: World
    manager: GuestService
    ledger: Ledger
    server: Server
    stream: EventStream
    path: Path
    url: str
    consoles: ConsoleFeed

    @property
    def readers(self) -> int:
        """Readers of consoles."""
        return self.consoles.readers

    @property
    def client(self) -> Client:
        """Root's, over the Unix socket."""
        return Client(self.path)


@contextmanager
def serve(
    folder: Path,
    settings: Mapping[str, object] | None = None,
    metrics: Callable[[], tuple[bytes, str]] | None = None,
    world: World | None = None,
    audit: MeasureProofs = audit,
    cpus: CpuSet = ANY,
    records: Records | None = None,
    policy: Policy | None = None,
) -> Iterator[Served]:
    """Serves until the block ends. Settings: sections of the configuration file; cpus: of the server, of which it uses one.

    ``policy``: None for that of the world.
    """
    world = world or World(folder / "world")
    config = DaemonConfig.model_validate({"host": {"housekeeping": "0-1", "uplinks": ["nic0"]}, **(settings or {})})
    manager, ledger = world.open_manager(policy)
    manager.reconciler.recover()
    path = folder / "manager.sock"
    listeners = [Listener(open_socket(path))]
    if config.api:
        listeners.append(open_port(config.api))
    up = threading.Event()
    api = Api(
        manager, audit, build_identity_map(config), config.limits, metrics, records, has_page=bool(config.api and config.api.page)
    )
    server = Server(api, listeners, ready=up.set, cpus=cpus)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert up.wait(60)
    url = f"https://127.0.0.1:{listeners[1].socket.getsockname()[1]}" if config.api else ""
    try:
        yield Served(world, manager, ledger, server, api.stream, path, url, api.consoles)
    finally:
        server.should_exit = True
        thread.join(60)
        manager.close()
        world.hypervisor.wait_for_callbacks(30)
        ledger.close()
        assert not thread.is_alive()


class Authority:
    """A throw-away CA.

    Args:
        folder: where its files are put.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            _begin(self._subject, self._subject, self._key.public_key())
            .add_extension(constraints, critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        addresses: tuple[str, ...] = (),
        uri: str = "",
        hours: int = 1,
        pass_phrase: bytes = b"",
        title: x509.ObjectIdentifier = NameOID.COMMON_NAME,
    ) -> tuple[Path, Path]:
        """A certificate for a common name, valid for so long from now on; returns the files of certificate and key.

        Args:
            title: the kind of name, instead of a common name.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(title, name)])
        others: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        others += [x509.UniformResourceIdentifier(uri)] if uri else []
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = _begin(subject, self._subject, key.public_key(), hours).add_extension(issuer, critical=False)
        if others:
            builder = builder.add_extension(x509.SubjectAlternativeName(others), critical=False)
        files = self._folder / f"{self._name}-{name}.pem", self._folder / f"{self._name}-{name}.key"
        files[0].write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        files[1].touch(0o600)
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(pass_phrase) if pass_phrase else serialization.NoEncryption(),
            )
        )  # fmt: skip
        return files


def build_unverified_context() -> ssl.SSLContext:
    """For a client that accepts any certificate of the manager."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def send(path: Path, request: bytes, *, then_close: bool = False) -> bytes:
    """Sends bytes as they are, and returns all that comes back."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError):  # it may be refused before all of it is read
            connection.sendall(request)
        if then_close:
            return b""
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # the answer comes before the reset
            while part := connection.recv(65536):
                answer += part
        return answer


def _begin(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, hours: int = 1) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(hours=hours))
    )
