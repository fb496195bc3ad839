"""Finds Ansible, builds its environment and parses its recap."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from orchestrator.errors import ImageError


def find_ansible() -> Path:
    """Prefers the virtual environment of this program to the PATH."""
    sibling = Path(sys.executable).with_name("ansible-playbook")
    program = sibling if sibling.exists() else shutil.which("ansible-playbook")
    if not program:
        raise ImageError(
            "cannot apply the host role: ansible-playbook is not installed",
            "run `make setup` or `pip install 'nohype-orchestrator[lab]'`",
        )
    return Path(program)


def build_environment(ansible: Path, home: Path) -> dict[str, str]:
    """``ansible`` contains the roles; ``home`` replaces ~/.ansible."""
    # Ansible requires a UTF-8 locale.
    return {"ANSIBLE_CONFIG": str(ansible / "ansible.cfg"), "ANSIBLE_HOME": str(home), "LC_ALL": "C.UTF-8"}


def parse_changed(text: str) -> int:
    """The number of changed tasks in the recap."""
    numbers = re.findall(r"^\S+ +: ok=\d+ +changed=(\d+) ", text, re.MULTILINE)
    if len(numbers) != 1:
        raise ImageError("Ansible exited without a recap", "see its log in the cache folder")
    return int(numbers[0])
