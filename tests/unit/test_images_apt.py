"""The source of packages: this machine's apt, or Debian's archives."""

from __future__ import annotations

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.apt import (
    DEFAULT_ARCHIVE,
    DEFAULT_SECURITY,
    parse_apt_options,
    parse_apt_settings,
    parse_archive_uri,
    parse_security_uri,
)

TARGETS = """\
Some Vendor vendor main stable http://vendor.invalid/
Debian Debian main bookworm http://one.invalid/debian/
Debian Debian main bookworm-updates http://one.invalid/debian/
Debian Debian-Security main bookworm-security http://one.invalid/debian-security/
Debian Backports main bookworm-backports http://one.invalid/debian/
"""


def test_archive_of_another_release_is_accepted() -> None:
    assert parse_archive_uri(TARGETS) == "http://one.invalid/debian/"


def test_archive_with_the_suite_is_preferred() -> None:
    assert parse_archive_uri(TARGETS + "Debian Debian main trixie https://two.invalid/debian/\n") == "https://two.invalid/debian/"


def test_local_mirror_lists_are_kept_as_they_are() -> None:
    line = "Debian Debian main trixie mirror+file:/etc/apt/mirrors/debian.list"
    assert parse_archive_uri(line) == "mirror+file:/etc/apt/mirrors/debian.list"


OTHERS = [
    "Debian Debian contrib trixie http://one.invalid/",
    "Debian Debian-Security main trixie-security http://one.invalid/",
    "Debian Debian main trixie-backports http://one.invalid/",
    "Ubuntu Ubuntu main noble http://one.invalid/ubuntu/\nUbuntu Ubuntu universe noble http://one.invalid/ubuntu/",
]


@pytest.mark.parametrize("targets", OTHERS)
def test_other_distributions_get_the_archives_of_debian(targets: str) -> None:
    dump = 'Acquire::http::Proxy "http://proxy.invalid:3142";\n'
    settings = parse_apt_settings(targets, dump)
    assert (settings.uri, settings.security) == (DEFAULT_ARCHIVE, DEFAULT_SECURITY)
    assert settings.options == ('Acquire::http::Proxy "http://proxy.invalid:3142";',)


@pytest.mark.parametrize("targets", ["", "\n"])
def test_missing_lists_are_an_error_with_a_hint(targets: str) -> None:
    """A Debian machine without lists may have a mirror of its own, so Debian's is not tried."""
    with pytest.raises(ImageError, match="apt has no package lists") as error:
        parse_apt_settings(targets, "")
    assert "apt-get update" in error.value.hint


def test_archive_of_this_machine_is_preferred() -> None:
    settings = parse_apt_settings(OTHERS[3] + "\n" + TARGETS, "")
    assert (settings.uri, settings.security) == ("http://one.invalid/debian/", "http://one.invalid/debian-security/")


def test_only_download_options_are_used() -> None:
    dump = """\
Acquire "";
Acquire::http::Proxy "http://proxy.invalid:3142";
Acquire::http::Proxy::one.invalid "DIRECT";
Acquire::https::CaInfo "/etc/ssl/private-ca.pem";
Acquire::https "";
Acquire::Retries "3";
Acquire::Languages "none";
APT::Install-Recommends "1";
"""
    assert parse_apt_options(dump) == (
        'Acquire::http::Proxy "http://proxy.invalid:3142";',
        'Acquire::http::Proxy::one.invalid "DIRECT";',
        'Acquire::https::CaInfo "/etc/ssl/private-ca.pem";',
        'Acquire::Retries "3";',
    )


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (TARGETS, "http://one.invalid/debian-security/"),
        ("Debian Debian main trixie http://one.invalid/", ""),
        ("Debian Debian-Security contrib trixie-security http://one.invalid/", ""),
        ("", ""),
    ],
)
def test_security_archive_of_any_release_is_found(targets: str, found: str) -> None:
    assert parse_security_uri(targets) == found
