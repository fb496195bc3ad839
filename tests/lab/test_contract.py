"""Runs the contract tests of the host layer on the real kernel of the lab host, to find differences from the fake."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path

import pytest

from orchestrator.lab import lab as labs
from tests.lab.conftest import LabHost

ROOT = Path(__file__).parents[2]
CARRIED = ("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pytest_timeout.py", "pygments")


def pack() -> bytes:
    """The contract tests, and pytest with its dependencies, which are pure Python."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
        fakes = [f"tests/fakes/{name}.py" for name in ("root", "net", "nvme", "tracing")]
        for name in (*fakes, "tests/contract", "tests/data"):
            archive.add(ROOT / name, name)
        for name in CARRIED:
            spec = importlib.util.find_spec(name.removesuffix(".py"))
            assert spec, name
            assert spec.origin, name
            found = Path(spec.origin)
            archive.add(found if name.endswith(".py") else found.parent, f"site/{name}", filter=_no_caches)
    return data.getvalue()


def _no_caches(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if info.name.endswith("__pycache__") else info


def test_contract_holds_on_the_real_kernel(host: LabHost) -> None:
    """Runs without guests, as it creates and removes VFs."""
    for name in ("guest1", "guest2"):
        host.nohype("guest", "delete", name, check=False)
    pf = host.run("basename $(readlink /sys/class/net/nic0/device)").stdout.strip()
    output = run_inside(host, "tests/contract/test_host_*.py", f"NOHYPE_CONTRACT_PF={pf}")
    assert " passed" in output


@pytest.mark.soak
def test_linux_bridge_translates_vlans_of_guests(host: LabHost) -> None:
    """With the lab host's kernel, which has 8021q: the kernel of the machine that runs the tests may not."""
    output = run_inside(host, "tests/contract/test_bridge_channels.py")
    assert "3 passed" in output


def run_inside(host: LabHost, files: str, variables: str = "") -> str:
    labs.execute(host.lab, "rm -rf /tmp/contract && mkdir /tmp/contract && tar xz -C /tmp/contract", input=pack(), timeout=120)
    environment = f"NOHYPE_CONTRACT_ROOT=/ {variables} PYTHONPATH=/tmp/contract/site:/tmp/contract"
    command = "/opt/nohype/bin/python -m pytest -q -p no:cacheprovider --import-mode=importlib --durations=25"
    done = host.run(f"cd /tmp/contract && {environment} {command} {files}", check=False, timeout=800)
    print(done.stdout[-4000:])
    assert done.status == 0, done.stdout[-6000:]
    return done.stdout
