"""Additional packages of an image: names, and how apt is told of the root file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import RequestError
from orchestrator.host.run import run
from orchestrator.images.added_packages import build_configuration, check_package_names
from orchestrator.images.apt import AptSettings


def test_names_are_sorted_and_unique() -> None:
    assert check_package_names(["make", "g++", "libc6.1", "g++"]) == ("g++", "libc6.1", "make")


OTHERS = [
    "",
    "a",
    "-y",
    "--yes",
    "libc6-",
    "Make",
    "make jq",
    "make/trixie",
    "make=1",
    "make:i386",
    "jq\n",
    "../jq",
    "./jq.deb",
    "jq*",
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_words_of_apt_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is not the name of a Debian package"):
        check_package_names(["make", name])


def test_apt_works_on_the_root_with_the_settings_of_this_machine(tmp_path: Path) -> None:
    settings = AptSettings("http://one.invalid/", ('Acquire::http::Proxy "http://proxy.invalid";',))
    (tmp_path / "empty").mkdir()
    (tmp_path / "apt.conf").write_text(build_configuration(settings, tmp_path / "root", tmp_path))
    dump = run(["apt-config", "dump"], env={"APT_CONFIG": str(tmp_path / "apt.conf")}).stdout
    for line in (
        f'DPkg::Chroot-Directory "{tmp_path}/root";', 'Acquire::http::Proxy "http://proxy.invalid";',
        f'Dir::State::Status "{tmp_path}/root/var/lib/dpkg/status";', 'APT::Install-Recommends "0";',
    ):  # fmt: skip
        assert line.lower() in dump.lower()
