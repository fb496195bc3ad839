"""The manager does not load what it does not need: it runs for years on a host whose memory is the guests'. See `host.netlink`,
`api.fastapi_import`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = "import sys, orchestrator.daemon.main; print(*(name for name, module in sys.modules.items() if module))"


def run(program: str) -> list[str]:
    """What a Python of its own prints: ours has loaded much else."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


@pytest.fixture(scope="module")
def loaded() -> list[str]:
    return run(LOADED)


def test_of_pyroute2_only_what_interfaces_need(loaded: list[str]) -> None:
    parts = {name.split(".")[1] for name in loaded if name.startswith("pyroute2.")}
    assert "iproute" in parts
    assert not parts & {"ndb", "ipdb", "plan9", "conntrack", "ipset", "nslink"}


def test_no_first_version_of_pydantic() -> None:
    """FastAPI imports it when it looks at the first route, for the OpenAPI document."""
    program = (
        "import sys; from orchestrator.api.app import ROUTES; from orchestrator.api.openapi import build_document\n"
        "build_document(ROUTES); print(*(name for name, module in sys.modules.items() if module))"
    )
    found = run(program)
    assert "fastapi.applications" in found
    assert not [name for name in found if name.startswith("pydantic.v1")]


def test_pyroute2_as_a_whole_is_there_for_others() -> None:
    program = (
        "from orchestrator.host.netlink import sockets as netlink; import pyroute2, pyroute2.netns as ns\n"
        "from pyroute2 import NDB, NetlinkError\n"
        "print(pyroute2.IPRoute is netlink.IPRoute, NetlinkError is netlink.NetlinkError, ns is netlink.namespaces)"
    )
    assert run(program) == ["True"] * 3


def test_what_only_some_requests_need_is_not_loaded(loaded: list[str]) -> None:
    """Parsers of user data for cloud-init; the client of the interface, of which the manager uses the shapes; FastAPI, which
    describes the interface.
    """
    assert "orchestrator.client.shapes" in loaded
    assert "orchestrator.images.configuration" in loaded
    assert not set(loaded) & {
        "uvicorn.main",
        "unittest",
        "yaml",
        "email.policy",
        "orchestrator.images.user_data",
        "orchestrator.client.client",
        "fastapi",
        "lxml",
        "opentelemetry",
        "paramiko",
        "rich",
    }


def test_cryptography_only_when_evidence_is_signed(loaded: list[str]) -> None:
    assert "orchestrator.daemon.evidence" in loaded
    assert not [name for name in loaded if name.startswith("cryptography")]
