"""What changed between two files of evidence, and the page for people."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.main import nohype
from orchestrator.evidence import keys
from orchestrator.evidence.diff import compare
from orchestrator.evidence.page import build_page
from orchestrator.model.proof import WEAKER
from tests.harness.evidence import KEY, make_evidence


def differ(change: Callable[[dict[str, Any]], object]) -> list[tuple[str, str, str]]:
    other = make_evidence()
    change(other)
    return list(compare(make_evidence(), other))


def test_two_audits_of_one_state_do_not_differ() -> None:
    assert differ(lambda e: e.update(created="2027-01-01T00:00:00+00:00", nonce="other")) == []


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda e: e["host"].update(boot="b-2"), ("host boot", "b-1", "b-2")),
        (lambda e: e["clock"].update(synchronised=False), ("clock synchronised", "true", "false")),
        (lambda e: e["software"]["kernel"].update(release="6.13"), ("software kernel release", "6.12", "6.13")),
        (lambda e: e["software"].pop("qemu"), ("software qemu", "10.0.2", "-")),
        (lambda e: e["events"].update(last=10), ("events last", "9", "10")),
        (lambda e: e["guests"][0]["qemu"].update(sha256="99"), ("guest web qemu sha256", "11", "99")),
        (lambda e: e["guests"].append({"name": "db"}), ("guest db", "-", "present")),
        (lambda e: e["guests"].pop(), ("guest web", "present", "-")),
        (lambda e: e["proofs"][0].update(verdict="fail"), ("proof core-smt web verdict", "pass", "fail")),
        (lambda e: e["proofs"][0].update(figure=None), ("proof core-smt web figure", "0", "null")),
        (lambda e: e["proofs"][1]["values"].update(rate=99), ("proof exits web values rate", "27.25", "99")),
        (lambda e: e["proofs"][1]["values"].update(new=True), ("proof exits web values new", "-", "true")),
        (lambda e: e["proofs"].pop(), ("proof vepa host", "present", "-")),
        (lambda e: e["proofs"][0]["evidence"].append("more"), ("proof core-smt web evidence", "-", "more")),
        (lambda e: e["proofs"][0]["evidence"].clear(), ("proof core-smt web evidence", "read 8 threads", "-")),
        (lambda e: e["proofs"][0].update(figure=False), ("proof core-smt web figure", "0", "false")),
    ],
)
def test_each_change_is_named(change: Callable[[dict[str, Any]], object], difference: tuple[str, str, str]) -> None:
    assert differ(change) == [difference]


@pytest.mark.parametrize(
    ("change", "places"),
    [
        (lambda e: e["events"].update(last=10, hash="ff", events=10), []),
        (lambda e: e["proofs"][1]["values"].update(rate=99), []),
        (lambda e: e["proofs"][0].update(figure=7, evidence=["more"], readings=[1]), []),
        (lambda e: e["events"]["faults"].append("event 3 was changed"), ["events faults"]),
        (lambda e: e["proofs"][0].update(verdict="fail", figure=1), ["proof core-smt web verdict"]),
        (lambda e: e["proofs"].pop(), ["proof vepa host"]),
        (lambda e: e["software"].pop("qemu"), ["software qemu"]),
    ],
)  # fmt: skip
def test_without_values_only_states_and_verdicts_count(change: Callable[[dict[str, Any]], object], places: list[str]) -> None:
    other = make_evidence()
    change(other)
    assert [place for place, _, _ in compare(make_evidence(), other, values=False)] == places


def test_many_lines_are_compared_at_once() -> None:
    """Comparing each line with each other one takes hours, for the page too."""
    first, second = make_evidence(), make_evidence()
    for evidence, word in ((first, "a"), (second, "b")):
        evidence["proofs"][0]["evidence"] = [f"{WEAKER}{word}{number}" for number in range(100_000)]
    assert len(compare(first, second)) == 200_000
    assert build_page(first).count("<li>") > 100_000


def test_order_of_proofs_is_no_difference() -> None:
    assert differ(lambda e: e["proofs"].reverse()) == []


def test_command_shows_differences(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(keys.sign(make_evidence(), KEY))
    second.write_bytes(keys.sign(make_evidence(verdicts=("pass", "fail", "pass")), KEY))
    for files, status, lines in (((first, first), 0, []), ((first, second), 1, ["proof exits web verdict: pass -> fail"])):
        result = CliRunner().invoke(nohype, ["audit", "diff", *map(str, files)], standalone_mode=False)
        assert (result.return_value, result.output.splitlines()) == (status, lines)
        result = CliRunner().invoke(nohype, ["audit", "diff", "--no-values", *map(str, files)], standalone_mode=False)
        assert (result.return_value, result.output.splitlines()) == (status, lines)
    result = CliRunner().invoke(nohype, ["audit", "diff", "--json", str(first), str(second)], standalone_mode=False)
    assert json.loads(result.output) == [{"where": "proof exits web verdict", "first": "pass", "second": "fail"}]


# The page


class Page(HTMLParser):
    """Collects elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_has_every_proof_and_fact() -> None:
    page = Page(build_page(make_evidence(verdicts=("pass", "fail", "not measured")), "k" * 64))
    for wanted in ("core-smt", "27.25", "no frames were sent", "1 not measured", "aa" * 16, "server-1", "k" * 64, "web", "6.12"):
        assert wanted in page.text, wanted


def test_limit_of_a_pass_is_not_folded() -> None:
    evidence = make_evidence()
    evidence["proofs"][0]["evidence"] = ["read", f"{WEAKER}of a reason"]
    assert f"<ul><li>{WEAKER}of a reason</li></ul><details>" in build_page(evidence)


def test_page_of_proofs_alone_says_that_it_is_not_signed() -> None:
    assert "Not signed." in Page(build_page({"proofs": make_evidence()["proofs"]})).text


ALLOWED = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "table", "thead", "tbody", "tr", "th", "td",
           "ul", "li", "details", "summary"}  # fmt: skip


@given(st.text() | st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><script>", "&lt;"]))
def test_page_contains_nothing_that_runs_whatever_was_read(text: str) -> None:
    evidence = copy.deepcopy(make_evidence())
    evidence["host"]["name"] = evidence["nonce"] = text
    evidence["guests"][0] |= {"name": text, text: text}
    for proof in evidence["proofs"]:
        proof |= {"name": text, "subject": text, "unit": text, "evidence": [text, text], "values": {text: text}}
    page = Page(build_page(evidence, text))
    assert set(page.elements) <= ALLOWED
    assert {name for name, _ in page.attributes} <= {"lang", "charset", "http-equiv", "content", "name", "class", "scope"}
    assert page.elements.count("style") == 1
    assert page.elements.count("h2") == 3
