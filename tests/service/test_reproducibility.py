"""The commands of docs/reproducibility.md, run in their order: against a served manager where that needs no real server."""

from __future__ import annotations

import csv
import json
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli.main import nohype
from orchestrator.errors import NotFound
from orchestrator.evidence import keys
from orchestrator.host.exit_trace import EXITS
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.event import ChainReport
from tests.fakes import tracing
from tests.fakes.server import Server, make_image
from tests.harness.api_server import Served, serve
from tests.harness.crash import World
from tests.harness.evidence import make_evidence
from tests.harness.guests import until

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/reproducibility.md"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f author"
ELSEWHERE = {
    "image build": "tests/lab/test_lab_image.py", "image verify": "tests/unit/test_cli_image.py",
    "image show": "tests/unit/test_cli_image.py", "guest ssh": "tests/service/test_cli_ssh.py",
    "guest copy": "tests/service/test_cli_ssh.py", "lab run": "tests/service/test_lab_job.py",
    "exits run --watch": "tests/unit/test_cli_exits.py",
}  # fmt: skip
"""Beginnings of commands that are not run here: they need a build, a booted guest or a lab, or do not end by themselves."""


class Records:
    """Signs evidence that differs from the last one in readings only, as that of two audits of one run does."""

    ledger: Ledger
    key: Path
    signed = 0

    def verify_events(self, at: int | None = None) -> ChainReport:
        return self.ledger.event_chain(at)

    def sign(self, frames: int, nonce: str) -> bytes:
        self.signed += 1
        evidence = make_evidence(nonce=nonce)
        evidence["proofs"][1] |= {"figure": self.signed, "values": {"rate": self.signed}}
        return keys.sign(evidence, keys.load_private(self.key))


def read_commands() -> list[list[str]]:
    """Words after `nohype`, with redirections."""
    text = GUIDE.read_text().replace("\\\n", " ")
    found = re.findall(r"^ {4}(?:sudo )?(?:\S*/)?nohype (.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in found]


def is_elsewhere(words: list[str]) -> bool:
    return any(shlex.join(words).startswith(start) for start in ELSEWHERE)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """In the author's folder, with a key for SSH, and the guide's image on the host."""
    for folder in ("experiment", "mine", "theirs", "home/.ssh"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home/.ssh/id_ed25519.pub").write_text(KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    records = Records()
    records.key = tmp_path / "audit.key"
    keys.create_key(records.key)
    world = World(tmp_path / "world", Server(cores=8, nodes=2, vfs=7, pages=1024))
    make_image(world.folder / "images", "debian", configuration=["credentials"], disengages=False)
    with serve(tmp_path, world=world, records=records) as served:
        records.ledger = served.ledger
        yield served


def boot(served: Served) -> None:
    """What the guest of the guide does: it makes exits, reports ready, and makes more."""
    until(lambda: _find_vcpus(served))
    tids = _find_vcpus(served)
    served.world.host.add("sys/module/kvm_amd/parameters/avic", "N")
    tracing.show_hist(served.world.host, EXITS.folder, {(tids[0], 0x7C): 400}, 0)
    served.world.hypervisor.write("run", b"nohype: ready name=run\r\n")
    until(lambda: served.manager.guest(OPERATOR, "run").disengaged)
    tracing.show_hist(served.world.host, EXITS.folder, {(tids[0], 0x7C): 407, (tids[1], 0x78): 5}, 0)


def _find_vcpus(served: Served) -> list[int]:
    try:
        if served.manager.guest(OPERATOR, "run").state == "running":
            return [vcpu.tid for vcpu in served.world.hypervisor.read_guest("run").vcpus]
    except NotFound:
        pass
    return []


def run(served: Served, words: list[str]) -> int:
    """As a shell: `~` is the home folder, and a redirection writes a file. Returns the exit status."""
    words = [str(Path(word).expanduser()) if word.startswith("~") else word for word in words]
    command, files = (words[: words.index(">")], words[words.index(">") + 1 :]) if ">" in words else (words, [])
    result = CliRunner().invoke(nohype, ["--socket", str(served.path), *command])
    for file in files:
        Path(file).write_text(result.stdout)
    assert not result.stderr, shlex.join(command)
    Path("last").write_text(result.stdout)
    return result.exit_code


def test_commands_of_the_guide_do_what_it_says(served: Served) -> None:
    plan = served.client.plan({"name": "run", "image": "debian", "memory": "1G", "placement": {"cpus": "4-7"}})
    address, statuses = plan["nics"][0]["address"] or "", dict[str, int]()
    booting = threading.Thread(target=boot, args=(served,))
    for words in read_commands():
        text = shlex.join(words)
        if is_elsewhere(words):
            continue
        words = [address if word == "0000:41:10.0" else word for word in words]
        if words[:2] == ["guest", "create"] and "--plan" not in words:
            booting.start()
        if words[0] == "exits":
            booting.join(60)  # the guest makes its last exits after the wait for it has ended
        for file in {"mine/after.json", "theirs/after.json"} & {*words}:
            Path(file).write_bytes(Path("experiment/after.json").read_bytes())
        statuses[text] = run(served, words)
        if "diff --no-values" in text:
            assert Path("last").read_text() == "", "the first diff, of one run, must print nothing"
    assert set(statuses.values()) == {0}, statuses
    shown = json.loads(Path("experiment/guest.json").read_text())
    assert (shown["cores"], shown["vf"]["address"], shown["id"]) == (["4-5", "6-7"], address, "experiment-1-run-1")
    rows = list(csv.DictReader(Path("experiment/exits.csv").read_text().splitlines()))
    assert {(row["vcpu"], row["reason"], row["count"]) for row in rows} == {("0", "msr", "7"), ("1", "hlt", "5")}
    assert "started" in {event["kind"] for event in json.loads(Path("experiment/events.json").read_text())}
    for name in ("before", "after"):
        assert json.loads(Path(f"experiment/{name}.json").read_text())["evidence"]["nonce"] == "experiment-1-run-1"


def test_diff_lists_readings_without_the_option(served: Served) -> None:
    for name in ("before", "after"):
        assert run(served, ["audit", "--sign", f"{name}.json"]) == 0
    assert run(served, ["audit", "diff", "--no-values", "before.json", "after.json"]) == 0
    assert Path("last").read_text() == ""
    run(served, ["audit", "diff", "before.json", "after.json"])
    assert "rate" in Path("last").read_text()


def test_commands_that_are_not_run_here_have_their_tests() -> None:
    commands = [shlex.join(words) for words in read_commands()]
    assert len(commands) > 15
    for start, file in ELSEWHERE.items():
        assert any(command.startswith(start) for command in commands), f"{start} is not in the guide"
        assert start.split()[-1].strip("-") in (ROOT / file).read_text(), file
