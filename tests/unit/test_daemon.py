"""How the daemon's process ends when it cannot start."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import uvicorn

from orchestrator.api.identity import build_identity_map
from orchestrator.api.tickless import TicklessServer
from orchestrator.config import DaemonConfig
from orchestrator.daemon import main as daemon
from orchestrator.errors import Conflict, HostError, LedgerError
from orchestrator.ledger import Claim, Ledger
from tests.harness.crash import in_child
from tests.unit.test_ledger import claim, leave

HOST = '[host]\nhousekeeping = "0-1"\nuplinks = ["nic0"]\n'
UNIT = Path(__file__).parents[2] / "ansible/roles/nohype_host/templates/nohyped.service.j2"


@pytest.fixture(autouse=True)
def _logging_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "set_up_diagnostics", lambda: None)


def test_configuration_error_exits_with_ex_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "nohype.toml"
    file.write_text("[host")
    with pytest.raises(SystemExit) as ended:
        daemon.main(["--config", str(file)])
    assert ended.value.code == os.EX_CONFIG
    assert capsys.readouterr().err.startswith(f"nohyped: configuration {file} is not TOML: ")
    assert f"\nRestartPreventExitStatus={os.EX_CONFIG}\n" in UNIT.read_text()


@pytest.mark.parametrize(
    ("access", "said"),
    [
        ('[access.operators]\nusers = ["no-such-user"]', "access.operators.users: user 'no-such-user' does not exist"),
        ('[access.viewers]\ngroups = ["no-such-group"]', "access.viewers.groups: group 'no-such-group' does not exist"),
        ('[tenants.a]\nusers = ["no-such-user"]', "tenants.a.users: user 'no-such-user' does not exist"),
        ('[tenants.a]\nusers = ["bin"]\n[tenants.b]\nusers = ["2"]', "already has a role"),
    ],
)
def test_callers_that_cannot_be_identified_are_a_configuration_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], access: str, said: str
) -> None:
    """Found before anything is changed. At the next start the file would be the same."""
    file = tmp_path / "nohype.toml"
    file.write_text(f"{HOST}{access}\n")
    with pytest.raises(SystemExit) as ended:
        daemon.main(["--config", str(file)])
    assert ended.value.code == os.EX_CONFIG
    assert said in capsys.readouterr().err


def test_other_errors_exit_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LedgerError("the disk is full")

    file = tmp_path / "nohype.toml"
    file.write_text(HOST)
    monkeypatch.setattr(daemon, "serve", fail)
    with pytest.raises(SystemExit) as ended:
        daemon.main(["--config", str(file)])
    assert ended.value.code == "nohyped: the disk is full"  # which makes Python print it and end with 1


class Stub:
    """Stands for everything that a manager needs except the ledger: takes any arguments, and has any method."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __getattr__(self, _name: str) -> Stub:
        return self

    def __call__(self, *_: object, **__: object) -> Stub:
        return self


class StubServer(Stub):
    """Serves for as long as it takes to claim something."""

    ends = False

    def run(self) -> None:
        (ledger,) = LEDGERS
        claim(ledger, 1)
        if self.ends:
            raise HostError("the loop has failed")


LEDGERS: list[Ledger] = []


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(Ledger):
        def __init__(self, path: Path, *, accept: Callable[[Sequence[Claim]], object], keep: int) -> None:
            super().__init__(path, accept=accept, keep=keep)
            LEDGERS.append(self)

    LEDGERS.clear()
    for name in (
        "acquire", "Listener", "open_listener", "Hypervisor", "GuestService", "Auditor", "Api", "build_metrics", "HairpinWatch",
        "notify_systemd", "start_heartbeat", "start_threads",
    ):  # fmt: skip
        monkeypatch.setattr(daemon, name, Stub())
    monkeypatch.setattr(daemon, "Ledger", Kept)
    monkeypatch.setattr(daemon, "Server", StubServer)


def configure(folder: Path, housekeeping: str) -> DaemonConfig:
    fields = {"housekeeping": housekeeping, "uplinks": ["nic0"]}
    return DaemonConfig.model_validate({"host": fields, "paths": {"ledger": str(folder / "ledger.sqlite")}})


def serve(config: DaemonConfig) -> None:
    daemon.serve(config, build_identity_map(config))


@pytest.mark.usefixtures("stubs")
@pytest.mark.parametrize("fails", [False, True])
def test_after_a_stop_the_ledger_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    monkeypatch.setattr(StubServer, "ends", fails)
    with contextlib.suppress(HostError):
        serve(configure(tmp_path, "0-1"))
    assert {file.name for file in tmp_path.iterdir()} == {"ledger.sqlite", "ledger.sqlite.reserve"}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert len(ledger.read().claims) == 1


@pytest.mark.usefixtures("stubs")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_then_the_ledger_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """uvicorn itself would let the process die of the signal, as systemd sends it, when it has shut down."""

    async def app(*_: object) -> None:
        """Is asked for nothing."""

    def build(*_: object) -> TicklessServer:
        def ready() -> None:
            claim(LEDGERS[0], 1)
            os.kill(os.getpid(), number)

        config = uvicorn.Config(app, lifespan="off", log_config=None, uds=str(tmp_path / "socket"))  # type: ignore[arg-type]
        return TicklessServer(config, ready)

    monkeypatch.setattr(daemon, "Server", build)
    assert in_child(lambda _: serve(configure(tmp_path, "0-1"))) == (0, "")
    assert not (tmp_path / "ledger.sqlite-wal").exists()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert len(ledger.read().claims) == 1


@pytest.mark.usefixtures("stubs")
def test_a_configuration_that_takes_a_guests_cores_touches_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        claim(ledger, 1)
    leave(tmp_path / "ledger.sqlite", "UPDATE guest SET restarts = 1")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if not file.name.endswith("-shm")}
    with pytest.raises(Conflict, match="CPUs 2-3 are owned by guest g1"):
        serve(configure(tmp_path, "0-3"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if not file.name.endswith("-shm")} == before
