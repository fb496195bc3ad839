"""The fixture `nohype_lab` in a pytest of its own: it costs nothing unused, and its failures are one message."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = "orchestrator.lab.pytest_plugin"
ROOT = Path(__file__).parents[2]


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", MODULE, *words, "."]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text("def test_it(nohype_lab):\n    assert nohype_lab\n")
    return tmp_path


def test_plugin_is_an_entry_point() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.entry_points"]["pytest11"].strip() == f"{MODULE} = {MODULE}"


def test_unused_plugin_loads_nothing_else() -> None:
    program = f"import pytest, sys; before = set(sys.modules); import {MODULE}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()) == {"orchestrator", "orchestrator.lab", MODULE}


def test_fixture_is_listed_with_its_meaning(project: Path) -> None:
    done = run_pytest(project, "--fixtures")
    assert "nohype_lab [session scope]" in done.stdout
    assert "An emulated server with IOMMU" in done.stdout


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ("nohype_lab_spec = nonsense", (), "no lab spec named 'nonsense'"),
        ("nohype_lab_packages = make -y", (), "'-y' is not the name of a Debian package"),
        ("nohype_lab_accel = quick", (), "'quick' is not a valid AccelChoice"),
        ("", ("--nohype-lab", "no-such-lab"), "no lab named no-such-lab"),
    ],
)
def test_server_that_cannot_start_is_one_message(project: Path, settings: str, words: tuple[str, ...], message: str) -> None:
    (project / "pytest.ini").write_text(f"[pytest]\n{settings}\n")
    done = run_pytest(project, *words)
    assert done.returncode == 1
    assert f"nohype_lab: {message}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "pytest_plugin.py" not in done.stdout
    assert "exception occurred" not in done.stdout


def test_missing_package_is_one_message(project: Path) -> None:
    (project / "conftest.py").write_text("import sys\nsys.modules['paramiko'] = None\n")
    done = run_pytest(project)
    assert done.returncode == 1
    assert "nohype_lab: the Python package paramiko is not installed" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "exception occurred" not in done.stdout


@pytest.mark.parametrize("name", ["server.toml", "./server.toml"])
def test_file_of_the_hardware_is_beside_the_configuration(project: Path, name: str) -> None:
    """pytest runs in a folder below it."""
    (project / "pytest.ini").write_text(f"[pytest]\nnohype_lab_spec = {name}\n")
    (project / "server.toml").write_text("nonsense = 1\n")
    (project / "below").mkdir()
    (project / "test_it.py").rename(project / "below" / "test_it.py")
    done = run_pytest(project / "below")
    assert f"nohype_lab: invalid lab spec {project}/server.toml" in done.stdout
