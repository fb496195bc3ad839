"""The catalogue of proofs: the documents list the same proofs, and facts that cannot be read are `not measured`."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.audit.catalogue import HOST_RESTORED, PROOFS, ComparisonRow, GuestRow, HostRow, Row
from orchestrator.audit.facts import Lazy
from orchestrator.audit.restored import Surveys
from orchestrator.errors import HostError
from orchestrator.model.proof import Measurement, Verdict

ROOT = Path(__file__).parents[2]


def read_section(heading: str) -> str:
    """A section of docs/promises.md."""
    return (ROOT / "docs" / "promises.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def read_table(text: str) -> list[tuple[str, str, str]]:
    """Proof, scope and unit of each row of a Markdown table whose first column is a proof."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| `")]
    return [(name.strip("`"), scope, unit) for name, scope, _, unit, *_ in rows]


def list_rows(*kinds: type[Row]) -> list[tuple[str, str, str]]:
    return [(row.name, row.scope, row.unit) for row in PROOFS if isinstance(row, kinds)]


def test_promises_list_the_proofs_of_the_audit_in_order() -> None:
    assert read_table(read_section("Proofs of the audit")) == list_rows(HostRow, GuestRow)


def test_promises_list_the_proofs_of_the_demo() -> None:
    assert read_table(read_section("Proof of the demo")) == list_rows(ComparisonRow)


def test_readme_shows_every_proof_in_order() -> None:
    shown = (ROOT / "README.md").read_text().partition("    PROOF            SUBJECT")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [(line.split()[0], "host" if line.split()[1] == "host" else "guest", line.split(maxsplit=4)[4]) for line in shown]
    assert rows == list_rows(Row)


def test_each_proof_of_a_scope_has_its_own_name() -> None:
    assert len({(row.name, row.scope) for row in PROOFS}) == len(PROOFS)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HostError("cannot read /proc/stat"), "cannot read /proc/stat"),
        (ValueError("odd text"), "what was read could not be parsed: ValueError: odd text"),
    ],
)
def test_proof_without_its_facts_is_not_measured(error: Exception, reason: str) -> None:
    def fail(_: Surveys) -> Measurement:
        raise error

    proof = ComparisonRow("some-proof", "findings", fail).prove(Surveys({}, {}))
    assert (proof.verdict, proof.figure, proof.evidence) == (Verdict.NOT_MEASURED, None, (reason,))


def test_fact_is_read_once_and_later() -> None:
    done = []
    fact = Lazy(lambda: done.append(1) or len(done))
    assert done == []
    assert (fact(), fact()) == (1, 1)


def test_error_of_a_fact_is_raised_to_each_proof() -> None:
    done = []

    def read() -> int:
        done.append(1)
        raise HostError("cannot read")

    fact = Lazy(read)
    fact.read()
    for _ in range(2):
        with pytest.raises(HostError, match="cannot read"):
            fact()
    assert done == [1]


BEFORE = {"isolated": "2-7", "pfs": [{"address": "0000:41:00.0", "vfs": []}], "pools": [{"node": 0, "free": 256}]}


def test_unchanged_host_is_restored() -> None:
    assert HOST_RESTORED.prove(Surveys(BEFORE, dict(BEFORE))).verdict == Verdict.PASS


def test_each_part_that_differs_is_named() -> None:
    after = {**BEFORE, "pfs": [{"address": "0000:41:00.0", "vfs": [1]}], "pools": [], "new": 1}
    proof = HOST_RESTORED.prove(Surveys(BEFORE, after))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 3)
    assert [line.partition(":")[0] for line in proof.evidence[:3]] == ["pfs", "pools", "new"]


def test_numbers_of_nvme_controllers_may_change_but_not_their_contents() -> None:
    def survey(number: int, *signatures: str) -> dict[str, object]:
        space = {"nsid": 1, "device": f"nvme{number}n1", "size": 1 << 30, "block_size": 512}
        texts = [f"nvme{number}n1 contains {text}" for text in signatures]
        disk = {"serial": "S5GX", "name": f"nvme{number}", "namespaces": [space], "uses": [], "signatures": texts}
        return {"controllers": [disk]}

    def compare(after: dict[str, object]) -> Verdict:
        return HOST_RESTORED.prove(Surveys(survey(0, "swap at offset 0xff6"), after)).verdict

    assert compare(survey(1, "swap at offset 0xff6")) == Verdict.PASS
    assert compare(survey(0)) == Verdict.FAIL
    assert compare(survey(0, "ext4 at offset 0x438")) == Verdict.FAIL
