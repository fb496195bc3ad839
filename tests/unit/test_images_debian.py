"""The command line of mmdebstrap."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.images.apt import AptSettings
from orchestrator.images.debian import build_mmdebstrap, build_offline_mmdebstrap, read_extracted


def test_command_line() -> None:
    settings = AptSettings("http://one.invalid/debian/", ('Acquire::http::Proxy "http://p.invalid";',))
    words = build_mmdebstrap(settings, Path("/target"), ["a", "b"], Path("/cache of debs"), variant="essential")
    assert words[0] == "mmdebstrap"
    assert "--include=a,b" in words
    assert '--aptopt=Acquire::http::Proxy "http://p.invalid";' in words
    assert words[-3:-1] == ["trixie", "/target"]
    assert words[-1].endswith("] http://one.invalid/debian/ trixie main")
    assert any("'/cache of debs'" in word for word in words if word.startswith("--setup-hook"))


def test_last_suite_is_preferred() -> None:
    settings = AptSettings("http://one.invalid/", ())
    suites = ("trixie", "trixie-backports")
    words = build_mmdebstrap(settings, Path("/target"), ["a"], Path("/debs"), variant="extract", suites=suites)
    assert '--aptopt=APT::Default-Release "trixie-backports";' in words
    assert words[-4:-2] == ["trixie", "/target"]
    assert [word.split("] ")[1] for word in words[-2:]] == [f"http://one.invalid/ {suite} main" for suite in suites]


@pytest.mark.parametrize("security", ["", "http://two.invalid/security/"])
def test_updates_have_the_rank_of_their_suite(security: str) -> None:
    """Default-Release would give trixie the priority 990, and its updates 500 (apt_preferences(5))."""
    settings = AptSettings("http://one.invalid/", (), security)
    words = build_mmdebstrap(settings, Path("/target"), ["a"], Path("/debs"), variant="apt", updates=True)
    assert not any("Default-Release" in word for word in words)
    sources = [word.split("] ")[1] for word in words[words.index("/target") + 1 :]]
    expected = ["http://one.invalid/ trixie main", "http://one.invalid/ trixie-updates main"]
    assert sources == expected + ([f"{security} trixie-security main"] if security else [])


def test_archive_and_proxy_do_not_stay_in_the_root() -> None:
    words = build_mmdebstrap(AptSettings("http://one.invalid/", ()), Path("/target"), ["a"], Path("/debs"), variant="essential")
    last = [word for word in words if word.startswith("--customize-hook")][-1]
    assert "etc/apt/sources.list" in last
    assert "99mmdebstrap" in last


def test_build_from_kept_packages_names_no_archive() -> None:
    words = build_offline_mmdebstrap(Path("/target"), ["a", "b"], Path("/kept debs"), variant="apt")
    assert words[-3:] == ["trixie", "/target", "deb [trusted=yes] copy:/kept%20debs ./"]
    assert "--include=a,b" in words
    assert not [word for word in words if "http" in word or "keyring" in word or "Default-Release" in word]


def test_extracted_packages_are_read_from_apts_plan(tmp_path: Path) -> None:
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/extracted").write_text("""\
Reading package lists...
Inst base-files (13.8+deb13u1 Debian:13.8/stable [amd64]) []
Conf base-files (13.8+deb13u1 Debian:13.8/stable [amd64])
Inst libaudit1 (1:4.0.2-2+deb13u1 Debian:13.8/stable [amd64])
Inst linux-image-6.12.117+deb13-amd64 [6.12.116-1] (6.12.117-1 Debian:13.8/stable [amd64])
0 upgraded, 57 newly installed, 0 to remove and 0 not upgraded.
""")
    assert read_extracted(tmp_path) == {
        "base-files": "13.8+deb13u1", "libaudit1": "1:4.0.2-2+deb13u1", "linux-image-6.12.117+deb13-amd64": "6.12.117-1",
    }  # fmt: skip
