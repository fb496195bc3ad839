"""The pytest fixture `nohype_lab`: an emulated server during a test session (docs/ci.md).

pytest loads this module wherever the package is installed, so it imports the lab only when the fixture is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from orchestrator.lab.server import LabServer


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nohype", "emulated server of NoHype (fixture nohype_lab)")
    group.addoption("--nohype-lab", metavar="NAME", help="use the lab NAME, which is up (`nohype lab up NAME`), and leave it up")
    parser.addini("nohype_lab_spec", "hardware of the server: name of a shipped spec, or TOML file beside this one", default="")
    parser.addini("nohype_lab_packages", "additional Debian packages on the server", type="args")
    parser.addini("nohype_lab_accel", "auto, tcg or kvm", default="auto")


@pytest.fixture(scope="session")
def nohype_lab(request: pytest.FixtureRequest) -> Iterator[LabServer]:
    """An emulated server with IOMMU, SR-IOV NIC and nested virtualization, which all tests of the session share."""
    with ExitStack() as stack:
        server = _enter(stack, request.config)
        if isinstance(server, str):  # not within `except`, whose error pytest would print as well, with its traceback
            pytest.fail(f"nohype_lab: {server}", pytrace=False)
        yield server


def _enter(stack: ExitStack, config: pytest.Config) -> LabServer | str:
    """The server, or why there is none."""
    try:
        from orchestrator.errors import OrchestratorError
        from orchestrator.lab.lab import keeping_connection
        from orchestrator.lab.server import LabServer
    except ModuleNotFoundError as error:
        return f"the Python package {error.name} is not installed: pip install 'nohype-orchestrator[lab]'"
    try:
        return LabServer(stack.enter_context(keeping_connection(stack.enter_context(_open(config)))))
    except (OrchestratorError, ValueError) as error:
        return str(error)


@contextmanager
def _open(config: pytest.Config) -> Iterator[Any]:
    from orchestrator.lab.accel import AccelChoice
    from orchestrator.lab.job import Server, job_lab
    from orchestrator.lab.lab import find_lab
    from orchestrator.lab.progress import Event, Kind, Timeline
    from orchestrator.lab.spec import DEFAULT_SPEC, load_spec

    if name := config.getoption("--nohype-lab"):
        yield find_lab(name)
        return
    folder = config.inipath.parent if config.inipath else config.rootpath
    spec = load_spec(config.getini("nohype_lab_spec") or DEFAULT_SPEC, folder)
    server = Server(spec, AccelChoice(config.getini("nohype_lab_accel")), tuple(config.getini("nohype_lab_packages")))
    capture = config.pluginmanager.getplugin("capturemanager")
    uncaptured: Callable[[], AbstractContextManager[None]] = capture.global_and_fixture_disabled

    def show(event: Event) -> None:
        """The first start takes minutes."""
        if event.kind in (Kind.END, Kind.FAILED):
            with uncaptured():
                print(f"\nnohype_lab: {event.stage} ({event.seconds:.1f} s)", end="", file=sys.stderr, flush=True)

    with job_lab(server, Timeline(show)) as lab:
        yield lab
