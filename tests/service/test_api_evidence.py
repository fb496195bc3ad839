"""Signed evidence and the event chain over the socket of a manager."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli.main import nohype
from orchestrator.errors import HostError, NotFound, OrchestratorError, RequestError
from orchestrator.evidence import keys
from orchestrator.evidence.document import parse_file
from orchestrator.ledger import Ledger
from orchestrator.model.event import ChainReport
from tests.harness.api_server import Served, serve
from tests.harness.evidence import KEY, make_evidence


class Records:
    """The manager's records on a real ledger, without a host to measure."""

    ledger: Ledger
    key: Path | None = None

    def verify_events(self, at: int | None = None) -> ChainReport:
        return self.ledger.event_chain(at)

    def sign(self, frames: int, nonce: str) -> bytes:
        if self.key is None:
            raise HostError("cannot read the signing key /etc/nohype/audit.key", "create a key")
        chain = self.ledger.event_chain()
        events = {"events": chain.events, "last": chain.last, "hash": chain.hash, "faults": list(chain.faults)}
        return keys.sign(make_evidence(nonce=nonce, events=events), keys.load_private(self.key))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    records = Records()
    keys.create_key(tmp_path / "audit.key")
    records.key = tmp_path / "audit.key"
    return records


@pytest.fixture
def served(tmp_path: Path, records: Records) -> Iterator[Served]:
    with serve(tmp_path, records=records) as manager:
        records.ledger = manager.ledger
        for number in range(5):
            manager.ledger.append_event("started", "web", str(number), tenant="acme")
        yield manager


def run(served: Served, *words: str) -> Result:
    return CliRunner().invoke(nohype, ["--socket", str(served.path), *words], standalone_mode=False)


@pytest.mark.parametrize("option", ["--sign", "--html"])
def test_only_a_file_is_replaced(served: Served, tmp_path: Path, option: str) -> None:
    """As root, a page for /dev/stdout or /dev/null must not take the place of the device."""
    link, folder = tmp_path / "null", tmp_path / "folder"
    link.symlink_to("/dev/null")
    folder.mkdir()
    assert run(served, "audit", option, str(link)).exception is None
    assert link.readlink() == Path("/dev/null")
    before = sorted(tmp_path.iterdir())
    for path in ("/", "", ".", str(folder), str(folder / "absent" / "x"), str(link / "x")):
        error = run(served, "audit", option, path).exception
        assert isinstance(error, RequestError), (path, error)
        assert "cannot write" in error.message
    assert sorted(tmp_path.iterdir()) == before


def test_signed_evidence_is_written_and_verified(served: Served, tmp_path: Path) -> None:
    file, page = tmp_path / "evidence", tmp_path / "page.html"
    result = run(served, "audit", "--sign", str(file), "--nonce", "abc-1", "--html", str(page))
    assert result.exception is None
    assert result.return_value == 0
    signed = parse_file(file.read_bytes(), "file")
    keys.check_signature(signed, keys.load_public(tmp_path / "audit.key.pub"))
    assert signed.evidence["nonce"] == "abc-1"
    assert signed.key in page.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "no temporary file is left"


def test_live_audit_as_a_page_is_not_signed(served: Served, tmp_path: Path) -> None:
    assert run(served, "audit", "--html", str(tmp_path / "page.html")).return_value == 1
    assert "Not signed." in (tmp_path / "page.html").read_text()


def test_evidence_without_a_key_is_one_error(served: Served, records: Records, tmp_path: Path) -> None:
    records.key = None
    error = run(served, "audit", "--sign", str(tmp_path / "evidence")).exception
    assert isinstance(error, HostError)
    assert error.message == "cannot read the signing key /etc/nohype/audit.key"
    assert not (tmp_path / "evidence").exists()


def test_file_that_cannot_be_written_is_one_error(served: Served, tmp_path: Path) -> None:
    error = run(served, "audit", "--sign", str(tmp_path / "none" / "evidence")).exception
    assert isinstance(error, RequestError)
    assert "cannot write" in error.message


@pytest.mark.parametrize("answer", ['{"evidence":{"a":NaN}', '{"evidence":{"proofs":[]}', '{"evidence":{"a":9007199254740993}'])
def test_response_that_is_not_evidence_is_one_error(tmp_path: Path, answer: str) -> None:
    class Odd(Records):
        def sign(self, frames: int, nonce: str) -> bytes:
            return f'{answer},"key":"","signature":""}}'.encode()

    with serve(tmp_path, records=Odd()) as manager:
        error = run(manager, "audit", "--sign", str(tmp_path / "evidence")).exception
    assert isinstance(error, OrchestratorError)
    assert "is not evidence" in error.message or "invalid" in error.message
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("nonce", ["a b", "ä", "x" * 129, "<"])
def test_nonce_is_checked(served: Served, nonce: str) -> None:
    with pytest.raises(RequestError, match="nonce"):
        served.client.evidence(nonce=nonce)


def test_manager_without_records_says_so(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        for ask in (served.client.evidence, served.client.event_chain):
            with pytest.raises(NotFound, match="signs no evidence"):
                ask()


def tamper(served: Served, statement: str) -> None:
    with closing(sqlite3.connect(served.ledger.path)) as other, other:
        other.execute("DROP TRIGGER event_no_update")
        other.execute("DROP TRIGGER event_no_delete")
        other.execute(statement)


def test_intact_event_log_is_verified(served: Served) -> None:
    chain = served.client.event_chain(2)
    assert (chain["events"], chain["last"], chain["faults"]) == (5, 5, [])
    assert chain["at"] == served.ledger.event_chain(2).at
    result = run(served, "events", "--verify")
    assert (result.return_value, result.output.startswith("event log intact: 5 events up to 5, hash ")) == (0, True)


def test_changed_event_is_reported(served: Served) -> None:
    tamper(served, "UPDATE event SET detail = 'forged' WHERE id = 3")
    result = run(served, "events", "--verify")
    assert result.return_value == 1
    assert "event 3 (" in result.output
    assert "event log broken: 5 events" in result.output
    assert json.loads(run(served, "events", "--verify", "--json").output)["faults"]


def test_log_that_was_forged_as_a_whole_differs_from_signed_evidence(served: Served, tmp_path: Path) -> None:
    """Only a head that is kept elsewhere finds it: the forger has computed all hashes again."""
    file = tmp_path / "evidence"
    run(served, "audit", "--sign", str(file))
    against = ("events", "--verify", "--against", str(file))
    served.ledger.append_event("stopped", "web", "")
    assert run(served, *against).return_value == 0
    tamper(served, "DELETE FROM event")
    with closing(sqlite3.connect(served.ledger.path)) as other, other:
        other.execute("DELETE FROM sqlite_sequence WHERE name = 'event'")
    forge(served.ledger.path, 6)
    assert run(served, "events", "--verify").return_value == 0
    result = run(served, *against)
    assert (result.return_value, "event 5, the newest of" in result.output) == (1, True)
    assert "has another hash" in result.output


def forge(path: Path, count: int) -> None:
    from orchestrator.ledger.chain import START, link
    from orchestrator.model.event import Event

    former = START
    with closing(sqlite3.connect(path)) as other, other:
        for number in range(1, count + 1):
            event = Event(number, "t", "started", "web", "forged", "manager", "", None)
            former = link(former, 0, event)
            row: tuple[Any, ...] = (number, "t", "started", "web", "forged", "manager", "", None, 0, former)
            columns = "id, time, kind, subject, detail, who, tenant, took, removed, hash"
            other.execute(f"INSERT INTO event ({columns}) VALUES ({', '.join('?' * 10)})", row)


@pytest.mark.parametrize("words", [["--follow"], ["--after", "1"], ["--guest", "web"]])
def test_verify_excludes_the_selection_of_events(served: Served, words: list[str]) -> None:
    assert "--verify excludes" in str(getattr(run(served, "events", "--verify", *words).exception, "message", ""))


def test_evidence_of_an_unreadable_file_is_refused(served: Served, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(keys.sign(make_evidence(), KEY)[:-5])
    assert getattr(run(served, "events", "--verify", "--against", str(tmp_path / "x")).exception, "status", None) == 4
