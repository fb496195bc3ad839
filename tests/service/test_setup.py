"""The host role on a small Debian system, with its packages, and back. In a root folder, without systemd."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.host.run import Completed, run
from orchestrator.images import debian
from orchestrator.images.cache import build_cached, cache_folder, hash_inputs
from orchestrator.images.wheels import build_wheelhouse, source_tree
from orchestrator.lab.ansible import build_environment, find_ansible
from tests.harness.large_folder import large_folder

ANSIBLE = source_tree() / "ansible"
PACKAGES = ("apt", "ca-certificates", "dbus", "python3", "systemd-sysv", "udev")
REFUSES_TO_START = "#!/bin/sh\nexit 101\n"
"""policy-rc.d: packages start no services in a root folder."""

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for chroot"),
]


def build_root(suite: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a small installation, whose apt reads the archive of this machine; do not change it."""
    cache = cache_folder()
    monkeypatch.setattr(debian, "SUITE", suite)

    def build(folder: Path) -> None:
        root, settings = folder / "root", debian.read_apt_settings()
        debian.make_root(root, PACKAGES, cache=cache, log=cache / "log" / "test-setup.log", suites=(suite,))
        key = "usr/share/keyrings/debian-archive-keyring.gpg"
        (root / "usr/share/keyrings").mkdir(exist_ok=True)
        shutil.copyfile(Path("/", key), root / key)
        (root / "etc/apt/sources.list").write_text(f"deb [signed-by=/{key}] {settings.uri} {suite} main\n")
        (root / "etc/apt/apt.conf.d/90test").write_text("".join(f"{line}\n" for line in settings.options))
        for name in ("resolv.conf", "hosts"):
            (root / "etc" / name).unlink(missing_ok=True)
            shutil.copyfile(f"/etc/{name}", root / "etc" / name)
        (root / "usr/sbin/policy-rc.d").write_text(REFUSES_TO_START)
        (root / "usr/sbin/policy-rc.d").chmod(0o755)

    key = hash_inputs(suite, PACKAGES, Path(__file__))
    return build_cached(cache, f"test-setup-{suite}", key, build, progress=print, keep=1) / "root"


class Server:
    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        wheels = build_wheelhouse(source_tree(), cache_folder(), progress=print)
        variables = {
            "ansible_connection": "nohype_chroot", "ansible_become": False, "nohype_offline": True,
            "nohype_install_packages": True, "nohype_keep_record": True, "nohype_housekeeping_cpus": "0",
            "nohype_guest_cpus": "1-3", "nohype_hugepages": [384], "nohype_wheelhouse": str(wheels),
        }  # fmt: skip
        self.inventory = folder / "inventory.json"
        self.inventory.write_text(json.dumps({"nohype_hosts": {"hosts": {str(root): variables}}}))

    def play(self, playbook: str, *words: str, check: bool = True) -> Completed:
        # undo.yml reads the mounts. /proc is there for the playbook only.
        mounted = ["unshare", "--mount", "sh", "-c", 'mount -t proc proc "$0" && exec "$@"', self.root / "proc"]
        argv = [find_ansible(), f"--inventory={self.inventory}", *words, ANSIBLE / playbook]
        done = run([*mounted, *argv], env=build_environment(ANSIBLE, self.folder / "home"), timeout=1800, check=False)
        assert done.status == 0 or not check, done.stdout[-4000:] + done.stderr[-1000:]
        return done

    def look(self) -> dict[str, str]:
        """Settings, programs, packages and accounts, with contents."""
        lines = run(
            ["chroot", self.root, "sh", "-c", _LOOK], env={"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C"}, timeout=300
        ).stdout.splitlines()
        return {line.split("  ", 1)[1]: line for line in lines}


# Caches, logs and what dpkg and ldconfig keep for themselves may differ. Of /var/lib, systemd-tmpfiles makes two folders whenever
# a package has a file for it.
_LOOK = r"""
find /etc /opt /usr /srv /root /home -xdev \( -name '*.pyc' -o -name __pycache__ -o -path /root/.ansible \) -prune -o \
  ! -type d ! -path '/etc/*-' ! -path /etc/ld.so.cache ! -path /etc/ssl/certs/\* -type f -exec sha256sum {} +
find /etc /opt /usr/local -xdev \( -type d -o -type l \) ! -name __pycache__ ! -path /etc/ssl/certs/\* -printf '%y%l  %p\n'
dpkg-query --show --showformat='${db:Status-Status} ${Version}  package ${Package}\n'
find /var/lib -maxdepth 1 ! -name machines ! -name portables -printf '%y  %p\n'
"""
_PROFILE = "libvirt-8537a4d2-9a81-59ea-b272-523f3418c21f"


@pytest.fixture(params=["trixie", "bookworm"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    try:
        origin = build_root(request.param, monkeypatch)
    except OrchestratorError as error:
        pytest.skip(f"the root cannot be built: {error.message}")
    with large_folder("setup") as folder:
        root = folder / "root"
        run(["cp", "--archive", "--reflink=auto", origin, root], timeout=600)
        yield Server(root, tmp_path)


def test_a_system_is_configured_and_restored(server: Server) -> None:
    before = server.look()
    server.play("playbooks/host.yml", "--check", "--diff")
    assert server.look() == before, "check mode changes nothing"
    server.play("playbooks/host.yml")
    assert (server.root / "etc/nohype/kernel.cmdline").exists()
    now = server.look()
    assert any("libvirt-daemon-system" in line for line in now.keys() - before.keys())
    assert "changed=0" in server.play("playbooks/host.yml").stdout, "nothing is left to do"
    profiles = server.root / "etc/apparmor.d/libvirt"
    made = [folder for folder in (profiles, profiles.parent) if not folder.exists()]
    profiles.mkdir(parents=True, exist_ok=True)
    for name in (_PROFILE, f"{_PROFILE}.files"):  # of a deleted guest, as libvirt leaves them behind
        (profiles / name).touch()
    edited = server.root / "etc/sysctl.d/60-nohype.conf"
    text = edited.read_text()
    edited.write_text(text + "# of the operator\n")
    done = server.play("undo.yml", check=False)
    assert done.status
    assert "/etc/sysctl.d/60-nohype.conf was changed since" in done.stdout
    edited.write_text(text)
    server.play("undo.yml")
    for folder in made:
        if folder.exists():
            folder.rmdir()  # fails if a profile is left
    left = server.look()
    assert {name: left.get(name) for name in {*left, *before} if left.get(name) != before.get(name)} == {}
    assert "holds no record" in server.play("undo.yml", check=False).stdout
