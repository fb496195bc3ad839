"""Runs the contract tests of the host layer on the real kernel of the lab host, to find differences from the fake."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path

from orchestrator.lab import lab as labs
from tests.lab.conftest import LabHost

ROOT = Path(__file__).parents[2]
CARRIED = ("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pytest_timeout.py", "pygments")


def pack() -> bytes:
    """The contract tests, and pytest with its dependencies, which are pure Python."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
        fakes = [f"tests/fakes/{name}.py" for name in ("root", "net", "nvme", "tracing")]
        harness = [f"tests/harness/{name}.py" for name in ("edge_network", "netns")]
        for name in (*fakes, *harness, "tests/contract", "tests/data"):
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
    labs.execute(host.lab, "rm -rf /tmp/contract && mkdir /tmp/contract && tar xz -C /tmp/contract", input=pack(), timeout=120)
    environment = f"NOHYPE_CONTRACT_ROOT=/ NOHYPE_CONTRACT_PF={pf} PYTHONPATH=/tmp/contract/site:/tmp/contract"
    command = "/opt/nohype/bin/python -m pytest -q -p no:cacheprovider --import-mode=importlib --durations=25"
    done = host.run(f"cd /tmp/contract && {environment} {command} tests/contract/test_host_*.py", check=False, timeout=800)
    print(done.stdout[-4000:])
    assert done.status == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
