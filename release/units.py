"""The units of the Debian package: the templates of the host role, without the settings that only a host has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

ROLE = Path(__file__).parents[1] / "ansible" / "roles" / "nohype_host"
UNITS = ("nohyped.service", "nohyped.socket")

_OWN = "# From the package nohype. A unit in /etc/systemd/system, such as that of the Ansible role, replaces it."
# What the templates have for a host: its CPUs and uplinks, and the folder where the role installs the manager.
_REPLACED = (
    (r"^# Written by Ansible \(nohype_host\)\.$", _OWN),
    (r"^CPUAffinity=\n", ""),
    (r" nohype-uplink@\.service", ""),
    (r"/opt/nohype/", "/usr/lib/nohype/"),
    (r"^\[Service\]$", "ConditionPathExists=/etc/nohype/nohype.toml\n\n[Service]"),
)


def build_units(role: Path = ROLE) -> Mapping[str, str]:
    """Text by name. Raises ValueError if the templates do not have an expected line any more."""
    settings = {"nohype_uplinks": [], "nohype_housekeeping_cpus": "", "ansible_python_interpreter": sys.executable}
    with TemporaryDirectory() as folder:
        argv = ["ansible", "localhost", "-i", "localhost,", "-c", "local"]
        argv += ["-e", f"@{role}/defaults/main.yml", "-e", json.dumps(settings)]
        for name in UNITS:
            template = f"src={role}/templates/{name}.j2 dest={folder}/{name}"
            _run([*argv, "-m", "ansible.builtin.template", "-a", template], folder)
        texts = {name: (Path(folder) / name).read_text() for name in UNITS}
    for pattern, value in _REPLACED:
        if not any(re.search(pattern, text, re.MULTILINE) for text in texts.values()):
            raise ValueError(f"the templates of the units do not have {pattern!r}: adapt release/units.py")
        texts = {name: re.sub(pattern, value, text, flags=re.MULTILINE) for name, text in texts.items()}
    return texts


def _run(argv: list[str], folder: str) -> None:
    environment = {**os.environ, "ANSIBLE_LOCAL_TEMP": folder, "ANSIBLE_REMOTE_TEMP": f"{folder}/remote", "LC_ALL": "C.UTF-8"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise ValueError(f"cannot write a unit: {done.stdout}{done.stderr}")
