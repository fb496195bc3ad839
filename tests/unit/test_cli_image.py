"""`nohype image` on a store, with the ledger of a manager."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator.cli import image_users
from orchestrator.cli.main import main, nohype
from orchestrator.images.description import Provenance, RamRoot
from orchestrator.images.install import install_image
from orchestrator.ledger import Ledger
from orchestrator.model.plan import ImageRef, NicPlan, Plan
from orchestrator.model.request import GuestRequest
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size
from tests.harness.images import list_store, make_build

PF = PciAddress.parse("0000:41:00.0")
PLAN = Plan(
    "web", (CpuSet.parse("2-3"),), 0, Size.parse("2M"), 64, (NicPlan(PF, "nic0", 0, PF, MacAddress("02:4e:48:00:00:01")),),
    ImageRef("one"), "",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef" * 4


class Host:
    """A store, and the configuration of a manager with a ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.config, self.ledger = (
            folder,
            folder / "store",
            folder / "nohype.toml",
            folder / "ledger.sqlite",
        )
        self.config.write_text(f'[host]\nhousekeeping = "0"\nuplinks = ["nic0"]\n[paths]\nledger = "{self.ledger}"\n')
        self.builds = 0

    def install(self, kernel: str = "kernel", name: str = "one", **fields: Any) -> str:
        self.builds += 1
        return install_image(make_build(self.folder / f"built{self.builds}", kernel, **fields), self.store, name).hash

    def claim(self, guest: str, ref: ImageRef) -> None:
        with Ledger(self.ledger) as ledger:
            number = len(ledger.read().claims) + 1
            vf = replace(PLAN.vf, index=number, address=PF.offset(number), mac=MacAddress(f"02:4e:48:00:00:{number:02x}"))
            plan = replace(PLAN, name=guest, image=ref, nics=(vf,), cores=(CpuSet.of((2 * number, 2 * number + 1)),))
            ledger.claim(
                plan.claimed(number, ref), ledger.read().generation, GuestRequest(name=guest, memory="128M", image="one")
            )

    def run(self, *words: str, status: int = 0) -> Any:
        """The output of `nohype image WORDS`; JSON if --json is one of them."""
        known = ["--config", str(self.config)] if words[0] not in ("list", "verify") else []
        done = CliRunner().invoke(nohype, ["image", *words, "--store", str(self.store), *known])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == status, done.output
        return json.loads(done.stdout) if "--json" in words else done.output


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_list_shows_good_images_next_to_a_damaged_one(host: Host) -> None:
    build = host.install(disk=b"x", ready="ssh")
    host.install(name="two")
    (host.store / "two").unlink()
    (host.store / "two").symlink_to(".builds/none")
    output = host.run("list", status=1)
    assert "one   6.12    direct  yes   ssh    " + build[:12] in output
    assert "guest image two is damaged: missing image.json" in output
    (host.store / "two").unlink()
    (found,) = host.run("list", "--json")
    assert (found["name"], found["hash"], found["memory"], found["console"]) == ("one", build, 96 << 20, "nohype-1")
    assert "provenance" not in found


def test_show_says_how_it_boots_what_it_needs_and_who_uses_it(host: Host) -> None:
    old = host.install("old")
    made = Provenance(recipe="debian", packages={"systemd": "257.8-1"}, lock=SHA, tools={"mke2fs": "1.47.2"})
    build = host.install(
        disk=b"x" * (3 << 19), ready="cloud-init", configuration=("credentials", "cloud-init"), provenance=made,
        network_root=("nvme-tcp",),
    )  # fmt: skip
    host.claim("web", ImageRef("one", build))
    host.claim("db", ImageRef("one", old))
    host.claim("other", ImageRef("two", "abc"))
    output = host.run("show", "one")
    for line in (
        f"build          {build}",
        "boot           direct: kernel and initrd of the build",
        "memory         at least 96M",
        "disk           1.5M, ext4 on the whole disk",
        "ready          the end of cloud-init",
        "configuration  credentials, cloud-init",
        "network root   nvme-tcp",
        "recipe         debian",
        f"lock file      SHA-256 {SHA}",
        "packages       1 (names and versions: --json)",
        "tools          mke2fs 1.47.2",
        f"guests         db (build {old[:12]}), web",
    ):
        assert f"  {line}\n" in output
    shown = host.run("show", "one", "--json")
    assert shown["guests"] == [
        {"name": "db", "hash": old, "current": False},
        {"name": "web", "hash": build, "current": True},
    ]
    assert shown["provenance"]["packages"] == {"systemd": "257.8-1"}
    assert set(shown["files"]) == {"vmlinuz", "initrd", "disk.raw"}


def test_show_prints_the_memory_rule_of_a_root_in_ram(host: Host) -> None:
    folder = make_build(host.folder / "built", ram_root=RamRoot(packed=1 << 20, unpacked=(5 << 20) + 1))
    (folder / "ram-initrd").write_text("root")
    install_image(folder, host.store, "one")
    line = "RAM root       5.1M unpacked, 1M packed; a guest without a disk needs at least "
    assert line in host.run("show", "one")
    assert host.run("show", "one", "--json")["ram_memory"] == RamRoot(packed=1 << 20, unpacked=(5 << 20) + 1).min_memory.bytes


def test_show_of_an_image_that_boots_from_its_disk_names_no_kernel(host: Host) -> None:
    host.install(disk=b"x", boot="firmware", kernel_version="", cmdline="", console=None)
    output = host.run("show", "one")
    assert "boot           firmware: SeaBIOS from the guest's own disk\n" in output
    assert "kernel         in the disk\n" in output
    assert host.run("show", "one", "--json")["kernel"] is None


def test_verify_reports_each_file_and_fails_if_one_has_changed(host: Host) -> None:
    host.install()
    assert host.run("verify", "one").splitlines()[1:] == ["image.json  ok", "initrd      ok", "vmlinuz     ok"]
    (host.store / "one/initrd").write_text("INITRD")
    assert "initrd      changed: its SHA-256 is" in host.run("verify", "one", status=1)
    assert host.run("verify", "one", "--json", status=1)["verified"] is False


def test_gc_keeps_what_guests_use(host: Host) -> None:
    first, second, _ = host.install("first"), host.install("second"), host.install("third")
    host.claim("web", ImageRef("one", first))
    assert host.run("gc", "--dry-run", "--json") == {"dry_run": True, "removed": [second]}
    assert host.run("gc") == f"removed build {second}\n"
    assert host.run("gc") == "no unused builds\n"
    assert list_store(host.store) == {"one": "third", ".builds": "2"}


def test_gc_reads_a_ledger_that_a_manager_has_open(host: Host) -> None:
    first, _ = host.install("first"), host.install("second")
    with Ledger(host.ledger):
        host.claim("web", ImageRef("one", first))
        assert host.run("gc", "--json")["removed"] == []
        assert host.run("show", "one", "--json")["guests"][0]["name"] == "web"


def test_delete_names_the_guests(host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build = host.install()
    host.claim("web", ImageRef("one", build))
    words = ["delete", "one", "--store", str(host.store), "--config", str(host.config)]
    assert run_main(monkeypatch, *words) == 1
    assert "nohype: guests use the image one: web\n  hint: delete these guests first" in capsys.readouterr().err
    with Ledger(host.ledger) as ledger:
        ledger.release("web")
    assert host.run("delete", "one", "--json") == {"name": "one", "removed": [build]}
    assert list_store(host.store) == {".builds": "0"}


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nohype", "image", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def break_config(host: Host) -> None:
    host.config.write_text("[host")


def lose_config(host: Host) -> None:
    host.config.unlink()


def break_ledger(host: Host) -> None:
    host.ledger.write_text("no database, " * 1000)


def damage_claim(host: Host) -> None:
    with sqlite3.connect(host.ledger) as db:
        db.execute("UPDATE guest SET plan = '{'")


@pytest.mark.parametrize("damage", [break_config, lose_config, break_ledger, damage_claim])
def test_nothing_is_removed_if_the_guests_cannot_be_read(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Callable[[Host], None]
) -> None:
    first, _ = host.install("first"), host.install("second")
    host.claim("web", ImageRef("one", first))
    damage(host)
    options = ["--store", str(host.store), "--config", str(host.config)]
    for words in (["gc"], ["gc", "--dry-run"], ["delete", "one"]):
        assert run_main(monkeypatch, *words, *options) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert list_store(host.store) == {"one": "second", ".builds": "2"}
    assert "guests         unknown: " in host.run("show", "one")
    assert host.run("show", "one", "--json")["guests"] is None
    # an installation succeeds, and keeps the earlier builds
    assert "earlier builds are kept: " in host.run("install", str(make_build(host.folder / "third", "third")), "--name", "one")
    assert list_store(host.store) == {"one": "third", ".builds": "3"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_ledger_in_a_folder_of_root_is_not_taken_for_missing(host: Host) -> None:
    """A user who may not search the folder cannot know whether there are guests."""
    closed = host.folder / "closed"
    closed.mkdir(mode=0o700)
    host.config.write_text(host.config.read_text().replace(str(host.ledger), str(closed / "ledger.sqlite")))
    host.folder.chmod(0o711)
    # The folders above are closed to other users by each run of pytest.
    script = (
        "import os, sys; from pathlib import Path; from orchestrator.cli.image_users import read_users\n"
        "os.chdir(sys.argv[1]); os.setuid(65534); read_users(Path(sys.argv[2]))"
    )
    words = [sys.executable, "-c", script, host.config.parent, host.config.name]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "RequestError: cannot read" in done.stderr
    assert "Permission denied" in done.stderr


def test_ledger_at_another_place_than_that_of_the_running_manager_is_not_believed(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, _ = host.install("first"), host.install("second")
    lock = tmp_path / "host.lock"
    monkeypatch.setattr(image_users, "HOST_LOCK", lock)
    lock.write_text(f"{os.getpid()}\n")
    assert "a manager runs" in str(
        CliRunner().invoke(nohype, ["image", "gc", "--store", str(host.store), "--config", str(host.config)]).exception
    )
    ended = subprocess.Popen(["sleep", "100"])
    ended.send_signal(signal.SIGKILL)
    ended.wait()
    lock.write_text(f"{ended.pid}\n")
    assert host.run("gc", "--json")["removed"] == [first]


def test_installing_twice_says_so_and_removes_unused_builds(host: Host) -> None:
    old = host.install("old")
    folder = make_build(host.folder / "one", "new")
    assert f"removed unused builds: {old[:12]}\n" in host.run("install", str(folder))
    assert f"guest image one is already installed: kernel 6.12, in {host.store}/one" in host.run("install", str(folder))
    assert host.run("install", str(folder), "--name", "two", "--json")["name"] == "two"
    assert list_store(host.store) == {"one": "new", "two": "new", ".builds": "1"}
