"""Ranges in Slurm's configuration, as `scontrol show hostnames` expands them."""

from __future__ import annotations

import pytest

from orchestrator.errors import RequestError
from orchestrator.fleet.hostlist import MAX_NAMES, expand


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", "a"),
        ("a,b-n0", "a b-n0"),
        ("h[1-3]", "h1 h2 h3"),
        ("h[08-11]", "h08 h09 h10 h11"),
        ("h[001,3-4,007]-n[0]", "h001-n0 h3-n0 h4-n0 h007-n0"),
        ("rack[1-2]h[1-2],x", "rack1h1 rack1h2 rack2h1 rack2h2 x"),
        ("[17000-17002]", "17000 17001 17002"),
        ("/sys/0000:41:10.[0,2]", "/sys/0000:41:10.0 /sys/0000:41:10.2"),
    ],
)
def test_list_is_expanded(text: str, names: str) -> None:
    assert expand(text) == names.split()


@pytest.mark.parametrize(
    "text", ["h[1-", "h]1[", "h[]", "h[a-b]", "h[3-1]", "h[1-2-3]", "h[[1]]", "h[1-3", "h[1,]", "h[-1]", "h[1 -2]"]
)
def test_invalid_list_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not a list of names"):
        expand(text)


@pytest.mark.parametrize("text", [f"h[0-{MAX_NAMES}]", "h[1-9999999999999]", "h[1-300]x[1-300]", "h[0-65535],x"])
def test_long_list_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        expand(text)
