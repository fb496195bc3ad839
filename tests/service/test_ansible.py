"""The playbooks as Ansible reads them. The host role is applied for real by the lab's build, and again by its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.host.run import run
from orchestrator.images.wheels import source_tree
from orchestrator.lab.build import find_ansible

ANSIBLE = source_tree() / "ansible"


@pytest.mark.parametrize("playbook", sorted(path.stem for path in (ANSIBLE / "playbooks").glob("*.yml")))
def test_syntax(playbook: str, tmp_path: Path) -> None:
    env = {"ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"), "ANSIBLE_HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    argv = [find_ansible(), "--syntax-check", "--inventory=localhost,", ANSIBLE / f"playbooks/{playbook}.yml"]
    run(argv, env=env)


def test_role_refuses_to_guess(tmp_path: Path) -> None:
    env = {"ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"), "ANSIBLE_HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    argv = [find_ansible(), "--connection=local", "--inventory=localhost,", ANSIBLE / "playbooks/lab.yml"]
    done = run(argv, env=env, check=False)
    assert done.status
    assert "Set nohype_housekeeping_cpus" in done.stdout
    assert "changed=0" in done.stdout
