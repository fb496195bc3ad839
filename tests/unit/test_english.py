"""Messages, docstrings and documents avoid phrases that a reader from another country has to read twice (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BANNED = re.compile(
    r"""\b(?:some|no|any)body(?:'s|\ else)?\b | \bstrangers?\b | \bwhoever\b
    | (?<!there\ )\b(?:is|are|was)\ no\ [a-z] | \bin\ place\ of\b | \bbut\ for\b | \bthe\ hard\ way\b | \bfor\ ever\b
    | \bsay\ so\b | \bsays\ so\b | \bwrite\ it\ like\b | \bof\ no\ use\b | \blooks?\ whether\b | \bsees?\ to\ it\b
    | (?:^|;\ )is\ (?:it|the)\b[^.;]*\? """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("ansible/**/*.yml")]
# The page that names the phrases to avoid.
EXCEPT = {"glossary.md"}


def find_banned(text: str) -> list[str]:
    return [found[0] for found in BANNED.finditer(text)]


def read_texts(source: str) -> list[tuple[int, str]]:
    """String literals of a module with their lines: messages, f-string parts and docstrings."""
    return [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "orchestrator").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_module_has_no_banned_phrase(path: Path) -> None:
    wrong = [f"{path.name}:{line}: {phrase}" for line, text in read_texts(path.read_text()) for phrase in find_banned(text)]
    assert not wrong


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name not in EXCEPT], ids=lambda path: path.name)
def test_document_has_no_banned_phrase(path: Path) -> None:
    assert not find_banned(path.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "guest web runs already: somebody else has started it", "nic0 is no port of a bridge", "no CPU but for 2",
        "may run on CPUs 2-3 in place of 2", "is it running, with [api] in its configuration?",
    ],
)  # fmt: skip
def test_banned_phrase_is_found(text: str) -> None:
    assert find_banned(text)


@pytest.mark.parametrize("text", ["there is no VF left", "the uplink is not a bridge port", "is the uplink up"])
def test_standard_phrase_is_accepted(text: str) -> None:
    assert not find_banned(text)
