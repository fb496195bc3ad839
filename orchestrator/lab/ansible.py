"""Ansible as a program: where it is, what it wants of its environment, and what it says at its end."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from orchestrator.errors import ImageError


def find_ansible() -> Path:
    """ansible-playbook of the virtual environment that we run in, else of the PATH."""
    beside = Path(sys.executable).with_name("ansible-playbook")
    found = beside if beside.exists() else shutil.which("ansible-playbook")
    if not found:
        raise ImageError(
            "ansible-playbook is not there, so the host role cannot be applied",
            "`make setup` installs it; or pip install nohype-orchestrator[lab]",
        )
    return Path(found)


def build_environment(ansible: Path, home: Path) -> dict[str, str]:
    """The variables that a run of it is to have.

    Args:
        ansible: our folder of roles and playbooks.
        home: folder for what it keeps, in place of ~/.ansible.
    """
    # It insists on a UTF-8 locale.
    return {"ANSIBLE_CONFIG": str(ansible / "ansible.cfg"), "ANSIBLE_HOME": str(home), "LC_ALL": "C.UTF-8"}


def parse_changed(text: str) -> int:
    """The number of changed tasks in Ansible's recap."""
    found = re.findall(r"^\S+ +: ok=\d+ +changed=(\d+) ", text, re.MULTILINE)
    if len(found) != 1:
        raise ImageError("Ansible ended without a recap, so it is not known what it did", "see its log in the cache folder")
    return int(found[0])
