"""Inputs of the lab's image. The lab tests cover the builds themselves."""

from __future__ import annotations

import re

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.wheels import build_download, hash_sources, read_requirements, source_tree
from orchestrator.lab.ansible import parse_changed
from orchestrator.lab.build import read_packages, role_variables
from orchestrator.lab.spec import load_spec

DEFAULTS = source_tree() / "ansible/roles/nohype_host/defaults/main.yml"


def test_role_variables_match_the_spec() -> None:
    variables = role_variables(load_spec("numa"))
    assert variables["nohype_housekeeping_cpus"] == "0-1"
    assert variables["nohype_guest_cpus"] == "2-7"
    assert variables["nohype_hugepages"] == [256, 256]
    assert "hugepagesz=1G hugepages=1 " in str(variables["nohype_extra_cmdline"])
    assert "1G" not in str(role_variables(load_spec("small"))["nohype_extra_cmdline"])
    assert role_variables(load_spec("small"))["nohype_housekeeping_cpus"] == "0"


def test_role_variables_exist_in_the_roles() -> None:
    known = set(re.findall(r"^(nohype_\w+):", DEFAULTS.read_text(), re.MULTILINE))
    of_lab = source_tree() / "ansible/roles/nohype_lab/defaults/main.yml"
    known |= set(re.findall(r"^(nohype_\w+):", of_lab.read_text(), re.MULTILINE))
    assert set(role_variables(load_spec("numa"))) <= known


def test_packages_are_read_without_comments() -> None:
    packages = read_packages(source_tree())
    assert "qemu-system-x86" in packages
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", package) for package in packages)


def test_libvirt_comes_from_debian() -> None:
    requirements = read_requirements(source_tree())
    assert any(line.startswith("pydantic") for line in requirements)
    assert not any(line.startswith("libvirt") for line in requirements)
    assert "python3-libvirt" in read_packages(source_tree())


def test_wheels_match_the_python_of_the_image() -> None:
    words = build_download(["one>=1"], source_tree() / "wheels", "3.13")
    wanted = {"--python-version=3.13", "--platform=manylinux2014_x86_64", "--platform=manylinux_2_28_x86_64", "one>=1"}
    assert wanted <= set(words)
    assert "--platform=manylinux_2_42_x86_64" not in words, "newer than the C library of Debian 13"
    older = build_download(["one>=1"], source_tree() / "wheels", "3.11")
    assert "--python-version=3.11" in older
    assert "--platform=manylinux_2_37_x86_64" not in older, "newer than the C library of Debian 12"


def test_hash_of_sources_is_stable() -> None:
    assert hash_sources(source_tree()) == hash_sources(source_tree())


def test_ansible_recap_is_parsed() -> None:
    line = "/cache/.lab/root    : ok=44   changed=35   unreachable=0    failed=0    skipped=9    rescued=0    ignored=0\n"
    assert parse_changed(f"PLAY RECAP ****\n{line}") == 35
    with pytest.raises(ImageError):
        parse_changed("PLAY RECAP ****\n")
