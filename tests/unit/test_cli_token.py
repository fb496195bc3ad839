"""`nohype token`."""

from __future__ import annotations

import json
import textwrap
import tomllib

import pytest
from click.testing import CliRunner

from orchestrator.api.identity import Peer, build_identity_map, identify
from orchestrator.cli.main import nohype
from orchestrator.config import DaemonConfig
from orchestrator.errors import RequestError


def test_what_it_prints_is_a_token_and_its_configuration() -> None:
    printed = CliRunner().invoke(nohype, ["token", "new", "ci", "--role", "tenant", "--tenant", "acme"]).output
    secret = next(line.strip() for line in printed.splitlines() if line.strip().startswith("nohype_"))
    settings = tomllib.loads(textwrap.dedent(printed[printed.index("    [tokens.") :]))
    host = {"housekeeping": "0", "uplinks": ["nic0"]}
    known = build_identity_map(DaemonConfig.model_validate({"host": host, "tenants": {"acme": {}}, **settings}))
    assert identify(known, Peer(address="192.0.2.1"), f"Bearer {secret}").tenant == "acme"


def test_two_tokens_differ_and_are_long() -> None:
    run = CliRunner().invoke
    made = [json.loads(run(nohype, ["token", "new", "ci", "--role", "viewer", "--json"]).output) for _ in range(2)]
    assert made[0]["token"] != made[1]["token"]
    assert len(made[0]["token"]) >= 50


@pytest.mark.parametrize("words", [["--role", "tenant"], ["--role", "viewer", "--tenant", "acme"]])
def test_role_and_tenant_belong_together(words: list[str]) -> None:
    result = CliRunner().invoke(nohype, ["token", "new", "ci", *words], standalone_mode=False)
    assert isinstance(result.exception, RequestError)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CI", "--role", "viewer"], "'CI' is not a token name"),
        (["ci", "--role", "tenant", "--tenant", "A_B"], "'A_B' is not a tenant"),
    ],
)
def test_an_error_names_the_kind_of_the_wrong_name(words: list[str], message: str) -> None:
    result = CliRunner().invoke(nohype, ["token", "new", *words], standalone_mode=False)
    assert isinstance(result.exception, RequestError)
    assert message in result.exception.message
