"""The OpenAPI document says all that is answered."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.app import ROUTES
from orchestrator.api.openapi import build_document, build_schema
from orchestrator.client import client, shapes
from orchestrator.client.problems import STATUS


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_document(ROUTES)


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["operationId"]: one for path in document["paths"].values() for one in path.values()}


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    assert set(operations(document)) == {route.name for route in ROUTES if route.documented}
    assert all(path.startswith("/v1/") for path in document["paths"])
    assert json.loads(json.dumps(document)) == document


def test_every_code_is_described_where_it_may_come(document: dict[str, Any]) -> None:
    everywhere = set()
    for name, operation in operations(document).items():
        described = {
            code for status in operation["responses"].values() for code in re.findall(r"`([a-z-]+)`", status["description"])
        }
        assert {"bad-request", "unauthorized", "forbidden", "too-many", "internal"} <= described, name
        for status, response in operation["responses"].items():
            assert all(int(status) == STATUS[code] for code in re.findall(r"`([a-z-]+)`", response["description"]))
        everywhere |= described
    # A method that is not allowed belongs to no operation.
    assert everywhere == set(STATUS) - {"method"}
    assert set(document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]) == set(STATUS)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    named = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document))) <= named


def test_the_client_knows_every_path(document: dict[str, Any]) -> None:
    source = "".join(path.read_text() for path in Path(client.__file__).parent.glob("*.py"))
    for path in document["paths"]:
        last = path.rsplit("/", 1)[1]
        assert (last in source) or last == "{name}", path


def test_schemas_of_types() -> None:
    named: dict[str, Any] = {}
    assert build_schema(list[shapes.Event], named) == {"type": "array", "items": {"$ref": "#/components/schemas/Event"}}
    assert named["Event"]["properties"]["took"] == {"anyOf": [{"type": "number"}, {"type": "null"}]}
    assert named["Event"]["additionalProperties"] is False
    assert build_schema(dict[str, int], named) == {"type": "object", "additionalProperties": {"type": "integer"}}
