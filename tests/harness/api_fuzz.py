"""schemathesis over the whole interface, on the real TLS port, as operator, tenant and stranger.

Nothing may break, all answers must be as the OpenAPI document says, and nobody may see or touch what is not theirs.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from orchestrator.api.identity import hash_token
from orchestrator.client.client import Client
from orchestrator.errors import OrchestratorError
from tests.harness.api_server import PROOF, Authority, Served, serve

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
TOKENS = {"operator": "operator-token", "acme": "acme-token", "bolt": "bolt-token"}
ROLES = ("acme", "stranger", "operator")
SECRET = "id-that-only-bolt-knows"
_SHORT = 0.05
_RENEW_EVERY = 20


@dataclass
class Outcome:
    """What a run has shown.

    Attributes:
        answers: how often each status came, by role.
        operations: how often each operation was asked for.
        faults: what must not be.
    """

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass
class Target:
    """A served manager with two tenants' guests, and how to ask it."""

    served: Served
    ca: Path
    document: dict[str, Any]

    def client(self, role: str) -> Client:
        """A client that acts in a role."""
        return Client(self.served.url, token=TOKENS[role], ca=self.ca)


@contextlib.contextmanager
def serve_target(folder: Path) -> Iterator[Target]:
    """A manager to be fuzzed, with no limit on rates."""
    authority = Authority(folder)
    certificate, key = authority.issue("manager", addresses=("127.0.0.1",))
    tokens: dict[str, Any] = {name: {"hash": f"sha256:{hash_token(token).hex()}"} for name, token in TOKENS.items()}
    for name, role in tokens.items():
        role.update({"role": "operator"} if name == "operator" else {"role": "tenant", "tenant": name})
    settings = {
        "api": {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key)},
        "tenants": {"acme": {}, "bolt": {}}, "tokens": tokens, "limits": {"rate": 1e6, "burst": 1_000_000},
    }  # fmt: skip
    with serve(
        folder,
        settings,
        audit=lambda _, **_more: (PROOF,),
        metrics=lambda: (b"nohype_up 1\n", "text/plain; version=0.0.4; charset=utf-8"),
    ) as served:
        document = requests.get(
            f"{served.url}/v1/openapi.json", headers={"Authorization": f"Bearer {TOKENS['operator']}"}, verify=str(authority.file)
        ).json()  # fmt: skip
        # They do not end, and have tests of their own.
        del document["paths"]["/v1/events/stream"], document["paths"]["/v1/guests/{name}/console"]["get"]
        yield Target(served, authority.file, document)


def fuzz(target: Target, cases: int, seed: int) -> Outcome:
    """Sends so many requests in each role, and looks after each what came back, and at the end what became of bolt's guests."""
    outcome = Outcome()
    bolt = target.client("bolt")
    bolt.create({"name": "bolt1", "memory": "64M", "image": "minimal", "id": SECRET})
    bolt.create({"name": "bolt2", "memory": "64M", "image": "minimal"})
    bolt.stop("bolt2", 1)
    before = bolt.guests()
    for number, role in enumerate(ROLES):
        _fuzz_as(target, role, cases, seed + number, outcome, ['"owner":"bolt"', *(guest["vf"]["mac"] for guest in before)])
        if role != "operator" and bolt.guests() != before:
            outcome.faults.append(f"{role} changed bolt's guests: {before} became {bolt.guests()}")
    if target.client("operator").version() == "":
        outcome.faults.append("the manager does not answer any more")
    return outcome


def _fuzz_as(target: Target, role: str, cases: int, seed: int, outcome: Outcome, secrets: list[str]) -> None:
    schema = schemathesis.openapi.from_dict(target.document)
    operations = [result.ok() for result in schema.get_all_operations()]
    session = requests.Session()
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    strategies = []
    for operation in operations:
        # What takes nothing can't be asked wrongly.
        takes = {"parameters", "requestBody"} & set(target.document["paths"][operation.path][operation.method])
        strategies += [operation.as_strategy(generation_mode=mode) for mode in (modes if takes else modes[:1])]
    rng, count = random.Random(seed), 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @hypothesis.given(st.one_of(strategies))
    def ask(case: Case) -> None:
        nonlocal count
        count += 1
        _aim(case, rng)
        headers = {"Authorization": f"Bearer {TOKENS.get(role, 'guessed')}"}
        response = case.call(base_url=target.served.url, session=session, headers=headers, verify=str(target.ca))
        _look(case, response, role, outcome, secrets)
        if count % _RENEW_EVERY == 0:
            _renew(target, role)

    _renew(target, role)
    ask()
    _renew(target, role)


def _aim(case: Case, rng: random.Random) -> None:
    """Made-up names hit nothing: half of the requests get real ones. Nobody waits for an hour."""
    names = ["bolt1", "bolt2", "acme1", "acme1", "acme2", "acme3", "acme4"]
    if case.path_parameters and "name" in case.path_parameters and rng.random() < 0.6:
        case.path_parameters["name"] = rng.choice(names)
        if case.operation.path.startswith("/v1/guests") and rng.random() < 0.2:
            case.headers = {**(case.headers or {}), "If-Match": rng.choice(['"1"', '"999"', "*"])}
    if isinstance(case.body, dict):
        if "memory" in case.body and rng.random() < 0.8:
            good = {
                "name": rng.choice(names),
                "memory": "64M",
                "image": "minimal",
                "address": None,
                "page_size": None,
                "placement": None,
                "restart": "never",
            }
            # Made-up optional fields, such as disks that no host has, would make nearly all requests fail.
            case.body = {
                **(case.body if rng.random() < 0.5 else {}),
                **good,
                "cores": rng.choice([1, 1, 1, 99]),
                "id": rng.choice([SECRET, None, None, "a"]),
                "cmdline": "",
            }
        if isinstance(case.body.get("timeout"), int | float) and case.body["timeout"] > _SHORT:
            case.body["timeout"] = _SHORT
    if isinstance(case.query, dict) and "timeout" in case.query:
        with contextlib.suppress(TypeError, ValueError):
            case.query["timeout"] = min(float(case.query["timeout"]), _SHORT)
    if case.operation.path.endswith("/ready") and not (case.query or {}).get("timeout"):
        case.query = {**(case.query or {}), "timeout": _SHORT}
    if case.operation.path.endswith("/tell") and isinstance(case.body, dict):
        case.body.setdefault("timeout", _SHORT)


def _look(case: Case, response: Any, role: str, outcome: Outcome, secrets: list[str]) -> None:
    operation = f"{case.operation.method.upper()} {case.operation.path}"
    outcome.answers[role, response.status_code] += 1
    outcome.operations[operation] += 1
    faults = []
    if role == "stranger" and response.status_code not in (400, 401):
        faults.append("a stranger got an answer")
    if role != "operator" and any(secret in response.text for secret in secrets):
        faults.append("a secret was told")
    try:
        case.validate_response(response, checks=CHECKS)
    except AssertionError as failure:
        faults.append(str(failure)[:400])
    except BaseExceptionGroup as failures:
        faults += [str(one)[:400] for one in failures.exceptions]
    for fault in faults:
        outcome.faults.append(f"{role}: {fault}: {case.as_curl_command()[:400]}: {response.status_code} {response.text[:300]}")


def _renew(target: Target, role: str) -> None:
    """Makes room, so that not all is refused, and a guest that can be changed."""
    if role in TOKENS:
        client = target.client(role)
        for guest in client.guests():
            if not guest["name"].startswith("bolt"):
                with contextlib.suppress(OrchestratorError):
                    client.delete(guest["name"])
        client.create({"name": "acme1", "memory": "64M", "image": "minimal"})
