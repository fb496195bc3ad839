"""The comparison of answers with the tutorial, which `tests/lab/test_tutorial.py` uses, notices what differs."""

from __future__ import annotations

import pytest

from tests.lab.test_tutorial import matches, read_steps


def test_steps_are_commands_with_their_answers() -> None:
    text = "text\n\n    $ make\n    lab# one 2\n    a\n      b\n    lab# two\n\ntext\n\n    not an answer\n"
    assert read_steps(text) == [("one 2", ["a", "b"]), ("two", [])]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("web  running  2-3\n", ["web running 10-11"]),
        ("a\nb\nc\n", ["a", "..."]),
        ("a\n", ["a", "..."]),
        ("", []),
        ("a 72:4e:97:75:40:11\n", ["a 12:4e:1d:03:87:96"]),
    ],
)
def test_answers_may_differ_in_figures(said: str, shown: list[str]) -> None:
    assert matches(said, shown)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("web  stopped  2-3\n", ["web running 2-3"]),
        ("a\nb\n", ["a"]),
        ("", ["a"]),
        ("error\n", []),
        ("vepa host FAIL 0\n", ["...", "vepa host PASS 0", "..."]),
    ],
)
def test_other_answers_are_noticed(said: str, shown: list[str]) -> None:
    assert not matches(said, shown)
