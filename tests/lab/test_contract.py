"""Runs the contract tests of the host layer on the real kernel of the lab host, to find differences from the fake."""

from __future__ import annotations

import importlib.util
import io
import shutil
import tarfile
from pathlib import Path

import pytest

from orchestrator.host.run import run
from orchestrator.images.cache import cache_folder
from orchestrator.images.wheels import source_tree
from orchestrator.lab import lab as labs
from orchestrator.lab.build import build_host
from orchestrator.lab.spec import LabSpec
from tests.lab.conftest import LabHost

ROOT = Path(__file__).parents[2]
CARRIED = ("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pytest_timeout.py", "pygments")


def pack(folder: Path, spec: LabSpec) -> bytes:
    """The contract tests, and pytest with its dependencies, which are pure Python. Compiled: the lab takes long for that."""
    fakes = [f"tests/fakes/{name}.py" for name in ("root", "net", "nvme", "tracing", "domains", "resctrl")]
    harness = [f"tests/harness/{name}.py" for name in ("edge_network", "netns", "tpm")]
    for name in (*fakes, *harness):
        copy(ROOT / name, folder / name)
    for name in ("tests/contract", "tests/data"):
        copy(ROOT / name, folder / name)
    for name in CARRIED:
        spec_of = importlib.util.find_spec(name.removesuffix(".py"))
        assert spec_of, name
        assert spec_of.origin, name
        found = Path(spec_of.origin)
        copy(found if name.endswith(".py") else found.parent, folder / "site" / name)
    compile_for(build_host(spec, source_tree(), cache_folder(), progress=print), folder)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
        archive.add(folder, ".")
    return data.getvalue()


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def compile_for(root: Path, folder: Path) -> None:
    """By the Python of the lab host, whose files are in ``root``, with its own loader and libraries."""
    loader = [root / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", root / "usr/lib/x86_64-linux-gnu"]
    words = ["-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", folder]
    run([*loader, root / "usr/bin/python3", *words], env={"PYTHONHOME": str(root / "usr")}, timeout=300)
    assert list(folder.rglob("*.pyc"))


def test_contract_holds_on_the_real_kernel(host: LabHost, tmp_path: Path) -> None:
    """Runs without guests, as it creates and removes VFs."""
    for name in ("guest1", "guest2"):
        host.nohype("guest", "delete", name, check=False)
    pf = host.run("basename $(readlink /sys/class/net/nic0/device)").stdout.strip()
    output = run_inside(host, tmp_path, "tests/contract/test_host_*.py", f"NOHYPE_CONTRACT_PF={pf}")
    assert " passed" in output


@pytest.mark.soak
def test_linux_bridge_translates_vlans_of_guests(host: LabHost, tmp_path: Path) -> None:
    """With the lab host's kernel, which has 8021q: the kernel of the machine that runs the tests may not."""
    output = run_inside(host, tmp_path, "tests/contract/test_bridge_channels.py")
    assert "3 passed" in output


def run_inside(host: LabHost, folder: Path, files: str, variables: str = "") -> str:
    packed = pack(folder, host.lab.state.spec)
    labs.execute(host.lab, "rm -rf /tmp/contract && mkdir /tmp/contract && tar xz -C /tmp/contract", input=packed, timeout=120)
    environment = f"NOHYPE_CONTRACT_ROOT=/ {variables} PYTHONPATH=/tmp/contract/site:/tmp/contract"
    # Without pytest's own assertions, for which it would compile the tests again.
    options = "-q -p no:cacheprovider --import-mode=importlib --assert=plain --showlocals --durations=25"
    command = f"/opt/nohype/bin/python -m pytest {options}"
    done = host.run(f"cd /tmp/contract && {environment} {command} {files}", check=False, timeout=800)
    print(done.stdout[-4000:])
    assert done.status == 0, done.stdout[-6000:]
    return done.stdout
