"""The modules and filters of the host role, without a server: record and undo, boot loaders, packages, results of checks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from orchestrator.images.wheels import source_tree

ROLE = source_tree() / "ansible/roles/nohype_host"


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROLE / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = load("library/nohype_record.py")
BOOT = load("library/nohype_boot.py")
PACKAGES = load("library/nohype_packages.py")
CHECKS = load("filter_plugins/nohype_checks.py")


WRITING = {"copy": "dest", "file": "path", "lineinfile": "path", "template": "dest"}


def fill(path: str, item: Any) -> str:
    fields = item if isinstance(item, dict) else {}
    path = path.replace("{{ item }}", item if isinstance(item, str) else "*")
    for name, value in fields.items():
        path = path.replace(f"{{{{ item.{name} }}}}", str(value))
    return re.sub(r"\{\{.*?\}\}", "*", path)


def find_written(role: Path = ROLE) -> list[str]:
    """Paths of the role's tasks; a loop's list of texts is filled in, anything else in braces becomes `*`."""
    found = []
    tasks = [task for file in (role / "tasks").glob("*.yml") for task in yaml.safe_load(file.read_text())]
    for task in tasks:
        for name, field in WRITING.items():
            arguments = task.get(f"ansible.builtin.{name}")
            if arguments and "delegate_to" not in task:
                loop = task.get("loop")
                items = loop if isinstance(loop, list) else [None]
                found += [fill(arguments.get("dest") or arguments[field], item) for item in items]
    return found


def test_every_path_that_the_role_writes_is_recorded() -> None:
    variables = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    begun = re.findall(r'"(/etc/[^"]*)"', variables["nohype_recorded_paths"])
    more = [f"{text}nic0.{'link' if 'network' in text else 'service'}" if text[-1] in "-@" else text for text in begun]
    recorded = [*variables["nohype_plain_paths"], *more]
    written = find_written()
    assert len(written) > 40
    for path in written:
        if path in ("*", "/usr/local/bin/*", "/etc/nohype/tls/") or path.startswith("/var/lib/nohype-setup"):
            continue  # folders of nohype_paths, links to programs, certificates
        in_tree = any(path.startswith(f"{tree}/") for tree in variables["nohype_trees"] if tree != "/etc/nohype")
        assert in_tree or any(fnmatch(name, path) for name in recorded), path
    assert {"/usr/local/bin/nohype", "/usr/local/bin/nohyped"} <= set(recorded)


def test_every_path_that_the_fleet_role_writes_is_recorded() -> None:
    role = ROLE.with_name("nohype_fleet")
    variables = yaml.safe_load((role / "vars/main.yml").read_text())
    recorded = [*variables["nohype_fleet_plain_paths"], "/etc/systemd/system/multi-user.target.wants/nohype-vfs@nic0.service"]
    [units] = re.findall(r"'\^\(\.\*\)\$', '(\S+)'\) }}", (role / "tasks/files.yml").read_text())
    recorded.append(units.replace("\\\\1", "node1"))
    written = [path for path in find_written(role) if not path.startswith("*")]
    assert len(written) > 10
    for path in written:
        assert any(fnmatch(name, path) for name in recorded), path


class Server:
    """A root folder with settings, and the record about it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder = folder / "root", folder / "setup"
        for name, text in (("passwd", "root:x:0\n"), ("group", "root:x:0\n"), ("own.conf", "of the package\n")):
            self.write(name, text)
        (self.root / "etc/own.conf").chmod(0o640)
        (self.root / "etc/link").symlink_to("own.conf")

    def write(self, name: str, text: str) -> None:
        file = self.root / "etc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def open(self) -> Any:
        return RECORD.Record(self.folder, self.root)

    def record(self, *paths: str, begin: bool = True, **more: list[str]) -> bool:
        given = {"paths": [f"/etc/{path}" for path in paths], "trees": [], "accounts": [], "packages": [], "begin": begin, **more}
        interrupted: bool = self.open().add(given, dry=False)
        return interrupted

    def seal(self) -> None:
        self.open().seal(dry=False)

    def undo(self) -> tuple[list[str], list[str]]:
        done, left, _used = self.open().undo(dry=False)
        return done, left

    def look(self) -> dict[str, Any]:
        paths = sorted(self.root.rglob("*"))
        return {str(path.relative_to(self.root)): RECORD.read_entry(path) for path in paths}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


EVERY = ("own.conf", "link", "new.conf", "new.d", "new.d/a.conf")


def change(server: Server) -> None:
    """What a role does: a line, a link that replaces another, new files and folders."""
    server.write("own.conf", "of the package\nours\n")
    (server.root / "etc/link").unlink()
    (server.root / "etc/link").symlink_to("/dev/null")
    server.write("new.conf", "ours\n")
    server.write("new.d/a.conf", "ours\n")


def test_undo_restores_contents_modes_links_and_removes_the_rest(server: Server) -> None:
    before = server.look()
    server.record(*EVERY)
    change(server)
    server.seal()
    assert server.look() != before
    done, left = server.undo()
    assert (sorted(done), left) == (sorted(f"/etc/{name}" for name in EVERY), [])
    assert server.look() == before
    assert server.open().compare() == []
    assert server.undo() == ([], []), "it can be run again"


def test_files_that_packages_take_along_were_not_changed_by_others(server: Server) -> None:
    """undo.yml restores, removes packages, and restores the rest."""
    server.record(*EVERY)
    change(server)
    server.seal()
    server.write("new.d/other.conf", "of a package\n")
    _, left = server.undo()
    assert left == ["/etc/new.d is not empty: it holds other.conf"]
    for name in ("own.conf", "new.d/other.conf"):
        (server.root / "etc" / name).unlink()
    assert server.undo() == (["/etc/new.d"], [])


def test_a_second_run_keeps_the_first_originals(server: Server) -> None:
    before = server.look()
    for number in range(3):
        server.record(*EVERY)
        change(server)
        server.write("new.conf", f"ours, {number}\n")
        server.seal()
    server.undo()
    assert server.look() == before


def test_nothing_is_written_in_check_mode(server: Server) -> None:
    server.open().add({"paths": ["/etc/own.conf"], "trees": [], "accounts": [], "packages": [], "begin": True}, dry=True)
    assert not server.folder.exists()
    server.record(*EVERY)
    change(server)
    server.seal()
    now = server.look()
    done, *_ = server.open().undo(dry=True)
    assert len(done) == len(EVERY)
    assert server.look() == now


@pytest.mark.parametrize("name", ["own.conf", "new.conf", "new.d/a.conf"])
def test_a_file_that_was_changed_since_is_left_and_named(server: Server, name: str) -> None:
    server.record(*EVERY)
    change(server)
    server.seal()
    server.write(name, "of the operator\n")
    done, left = server.undo()
    assert f"/etc/{name} was changed since" in "\n".join(left)
    assert f"/etc/{name}" not in done
    assert (server.root / "etc" / name).read_text() == "of the operator\n"


def test_a_folder_with_files_of_others_is_left_and_named(server: Server) -> None:
    server.record(*EVERY)
    change(server)
    server.seal()
    server.write("new.d/other.conf", "of the operator\n")
    _, left = server.undo()
    assert left == ["/etc/new.d is not empty: it holds other.conf"]
    for _ in range(2):  # with the packages removed, and in each further undo
        assert server.open().undo(dry=False) == ([], [], left)
    assert (server.root / "etc/new.d/other.conf").exists()
    (server.root / "etc/new.d/other.conf").unlink()
    assert server.undo() == (["/etc/new.d"], [])


def test_a_change_between_two_runs_is_not_lost(server: Server) -> None:
    """A line of the operator in a file of which the role changes single lines."""
    server.record(*EVERY)
    change(server)
    server.seal()
    server.write("own.conf", "of the package\nours\nof the operator\n")
    server.record(*EVERY)
    server.seal()
    _, left = server.undo()
    assert "/etc/own.conf was changed since: compare it with" in left[0]
    assert "of the operator" in (server.root / "etc/own.conf").read_text()


def test_an_interrupted_run_is_told_and_undone_with_copies(server: Server) -> None:
    before = server.look()
    assert not server.record(*EVERY)
    change(server)
    assert server.record(*EVERY), "the next run knows"
    done, left = server.undo()
    assert (len(done), left) == (len(EVERY), [])
    assert server.look() == before
    assert (server.folder / "kept/etc/own.conf").read_text() == "of the package\nours\n"


def test_only_folders_that_did_not_exist_are_removed_as_a_whole(server: Server) -> None:
    server.write("nohype/key.pem", "of the operator\n")
    trees = {"trees": ["/etc/nohype", "/opt/nohype"]}
    server.record("nohype/nohype.toml", **trees)
    server.write("nohype/nohype.toml", "ours\n")
    (server.root / "opt/nohype/bin").mkdir(parents=True)
    server.seal()
    server.undo()
    assert [path.name for path in (server.root / "etc/nohype").iterdir()] == ["key.pem"]
    assert not (server.root / "opt/nohype").exists()


@pytest.mark.parametrize("other", [False, True])
def test_folders_of_other_paths_go_with_those_above_them(server: Server, other: bool) -> None:  # noqa: FBT001
    """As of nohype_paths: `/srv/nohype/images` on a server without /srv/nohype."""
    (server.root / "srv/data").mkdir(parents=True)
    before = server.look()
    trees = {"trees": ["/srv/data", "/srv/nohype/images", "/srv/nohype/var/ledger"]}
    server.record(**trees)
    for name in ("data/own", "nohype/images/minimal", "nohype/var/ledger/ledger.sqlite"):
        (server.root / "srv" / name).parent.mkdir(parents=True, exist_ok=True)
        (server.root / "srv" / name).write_text("ours\n")
    server.record(**trees)
    server.seal()
    if other:
        (server.root / "srv/nohype/of the operator").write_text("theirs\n")
    server.undo()
    *_, used = server.open().undo(dry=False)
    assert used == (["/srv/nohype is not empty: it holds of the operator"] if other else [])
    left = {"srv/data/own"} | ({"srv/nohype", "srv/nohype/of the operator"} if other else set())
    assert server.look().keys() - before.keys() == left


def test_accounts_that_existed_are_kept(server: Server) -> None:
    server.write("group", "root:x:0\nkvm:x:9\n")
    server.record(accounts=["kvm", "nohype"])
    server.write("group", "root:x:0\nkvm:x:9\nnohype:x:10\n")
    assert RECORD.find_leftover_accounts(server.open()) == {"users": [], "groups": ["nohype"]}
    assert server.open().compare() == ["groups nohype: is new"]


def test_a_device_in_the_place_of_a_file_is_refused(server: Server) -> None:
    os.mkfifo(server.root / "etc/new.conf")
    with pytest.raises(ValueError, match=r"/etc/new.conf is neither a file nor a folder nor a link"):
        server.record("new.conf")


def test_a_record_of_another_version_is_refused(server: Server) -> None:
    server.record("own.conf")
    file = server.folder / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(ValueError, match="another version"):
        server.open()


@pytest.mark.parametrize("name", ["", "images", "my images"])
def test_a_mount_in_a_tree_stops_its_removal(server: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A bind mount has the device number of the file system around it."""
    folder = server.root / "opt/nohype"
    server.record(trees=["/opt/nohype"])
    (folder / name).mkdir(parents=True)
    (folder / name / "disk.img").write_text("of others")
    table = server.root.parent / "mountinfo"
    table.write_text(f"36 28 8:1 /home/x {str(folder / name).replace(' ', chr(92) + '040')} rw - ext4 /dev/sda1 rw\n")
    monkeypatch.setattr(RECORD, "MOUNTS", table)
    _, left = server.undo()
    assert f"holds a mount ({folder / name})" in left[0]
    assert (folder / name / "disk.img").exists()
    table.write_text(f"36 28 8:1 / {folder}-other rw - ext4 /dev/sda1 rw\n")
    assert server.undo() == (["/opt/nohype", "/opt"], [])


def test_a_tree_that_is_a_link_now_is_left_and_the_rest_restored(server: Server) -> None:
    server.record("new.conf", trees=["/opt/a", "/opt/b"])
    server.write("new.conf", "ours\n")
    server.seal()
    (server.root / "opt/b").mkdir(parents=True)
    (server.root / "disk").mkdir()
    (server.root / "opt/a").symlink_to(server.root / "disk")
    done, left = server.undo()
    assert done == ["/etc/new.conf", "/opt/b"]
    assert f"is a link now, to {server.root}/disk" in left[0]
    assert (server.root / "disk").exists()


def test_the_listing_reads_no_large_files_and_no_data_of_others(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opt/large.img", "srv/data"):
        (server.root / name).parent.mkdir(exist_ok=True)
        with (server.root / name).open("wb") as file:
            file.truncate((16 << 20) + 1)
    read, read_entry = [], RECORD.read_entry

    def vanish(path: Path) -> dict[str, Any]:
        read.append(path.name)
        if path.name == "own.conf":
            raise FileNotFoundError(path)
        return dict(read_entry(path))

    monkeypatch.setattr(RECORD, "read_entry", vanish)
    files = RECORD.list_server(server.root)["files"]
    assert not {"large.img", "data"}.intersection(read)
    assert "of 16777217 bytes" in files["opt/large.img"]
    assert not {"srv/data", "etc/own.conf"}.intersection(files), "another one, and one that was removed meanwhile"


VENDOR = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"


def make_root(folder: Path, *files: str, **variables: str) -> Path:
    for name in ("etc", "boot", *files):
        path = folder / name
        (path if name in ("etc", "boot") or name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.parent.exists() and not path.exists():
            path.write_text("")
    for name, value in variables.items():
        file = folder / f"sys/firmware/efi/efivars/{name}-{VENDOR}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\x06\0\0\0" + value.encode("utf-16-le") + b"\0\0")
    return folder


GRUB = ("boot/grub/grub.cfg", "usr/sbin/update-grub")
ENTRIES = ("efi/loader/loader.conf", "usr/bin/kernel-install")


@pytest.mark.parametrize(
    ("files", "variables", "kind"),
    [
        (GRUB, {}, "grub"),
        (GRUB, {"LoaderInfo": "GRUB 2.12"}, "grub"),
        (("boot/grub2/grub.cfg", "usr/sbin/grubby"), {}, "grubby"),
        (ENTRIES, {}, "kernel-install"),
        # GRUB's files are there too, but the firmware starts systemd-boot
        ((*GRUB, *ENTRIES), {"LoaderInfo": "systemd-boot 257"}, "kernel-install"),
        ((*GRUB, *ENTRIES), {}, "grub"),
        (("usr/bin/kernel-install",), {"StubInfo": "systemd-stub 257"}, "kernel-install"),
    ],
)
def test_the_boot_loader_is_found(tmp_path: Path, files: tuple[str, ...], variables: dict[str, str], kind: str) -> None:
    root = make_root(tmp_path, *files, **variables)
    loader = BOOT.find_loader(root)
    assert loader["kind"] == kind
    assert BOOT.find_obstacle(root, loader) == ""


@pytest.mark.parametrize(
    ("files", "variables", "said"),
    [
        ((), {}, "no boot loader was found"),
        (GRUB, {"LoaderInfo": "Limine 8"}, "the boot loader Limine 8 is not known"),
        (GRUB[:1], {}, "neither update-grub nor grubby"),
        (ENTRIES[:1], {}, "has no kernel-install"),
    ],
)
def test_other_boot_loaders_are_refused(tmp_path: Path, files: tuple[str, ...], variables: dict[str, str], said: str) -> None:
    assert said in BOOT.find_loader(make_root(tmp_path, *files, **variables))["problem"]


def test_a_boot_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_root(tmp_path, *GRUB)
    monkeypatch.setattr(os, "access", lambda path, _mode: not str(path).endswith("/boot"))
    assert BOOT.find_obstacle(root, BOOT.find_loader(root)).startswith("/boot cannot be written")


def test_the_command_line_keeps_the_servers_own_words() -> None:
    before = "BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet initrd=\\initrd\n"
    assert BOOT.build_cmdline(before, "isolcpus=2-3 ") == "root=UUID=1 ro quiet isolcpus=2-3\n"


def test_kernels_are_listed_with_their_images(tmp_path: Path) -> None:
    root = make_root(
        tmp_path, "boot/vmlinuz-6.1", "usr/lib/modules/6.1/x", "usr/lib/modules/6.12/vmlinuz", "usr/lib/modules/5.0/x"
    )
    assert BOOT.list_kernels(root) == [("6.1", "/boot/vmlinuz-6.1"), ("6.12", "/usr/lib/modules/6.12/vmlinuz")]


class Module:
    """What a module of Ansible gives its code; commands are noted instead of run."""

    def __init__(self, root: Path, words: str, *, check_mode: bool = False) -> None:
        self.params = {"root": str(root), "words": words, "base": "/etc/nohype/kernel.cmdline.base"}
        self.check_mode, self.commands = check_mode, []  # type: tuple[bool, list[str]]
        self.output = ""

    def run_command(self, argv: list[str], **_more: object) -> tuple[int, str, str]:
        self.commands.append(" ".join(argv))
        return 0, self.output, ""

    def fail_json(self, msg: str) -> None:
        raise RuntimeError(msg)


def test_entries_of_systemd_boot_get_the_words_and_lose_them_again(tmp_path: Path) -> None:
    """The server has no /etc/kernel/cmdline, so kernel-install would take the words of the running kernel."""
    root = make_root(tmp_path, *ENTRIES, "usr/lib/modules/6.12/vmlinuz")
    (root / "proc").mkdir()
    (root / "proc/cmdline").write_text("initrd=\\x root=UUID=1 quiet\n")
    loader, file = BOOT.find_loader(root), root / "etc/kernel/cmdline"
    dry = Module(root, "isolcpus=2-3", check_mode=True)
    assert BOOT.Loader(dry, loader).add()
    assert not file.exists()
    module = Module(root, "isolcpus=2-3")
    assert BOOT.Loader(module, loader).add()
    assert file.read_text() == "root=UUID=1 quiet isolcpus=2-3\n"
    assert not BOOT.Loader(module, loader).add(), "nothing is left to do"
    (root / "proc/cmdline").write_text(file.read_text())
    assert BOOT.Loader(Module(root, "isolcpus=4-7"), loader).add()
    assert file.read_text() == "root=UUID=1 quiet isolcpus=4-7\n", "the words replace those of an earlier run"
    assert BOOT.Loader(module, loader).remove()
    assert file.read_text() == "root=UUID=1 quiet\n"
    assert module.commands == ["kernel-install add 6.12 /usr/lib/modules/6.12/vmlinuz"]
    file.unlink()
    assert BOOT.Loader(module, loader).update() == []


@pytest.mark.parametrize(
    ("former", "commands"),
    [
        ([], []),
        (["isolcpus=4-7", "iommu=pt"], []),
        (["nopti", "isolcpus=4-7"], ["grubby --update-kernel=ALL --remove-args=nopti --args=isolcpus=2-3"]),
    ],
    ids=["none", "replaced or gone", "still there"],
)
def test_grubby_removes_words_that_are_not_wanted_any_more(tmp_path: Path, former: list[str], commands: list[str]) -> None:
    module = Module(tmp_path, "isolcpus=2-3")
    module.params["former"] = former  # type: ignore[assignment]
    module.output = 'args="ro nopti isolcpus=2-3"\n'
    assert BOOT.Loader(module, {"kind": "grubby"}).add() == bool(commands)
    assert module.commands == ["grubby --info=ALL", *commands]


WORDS = "isolcpus=2-3 quiet"


class Entries:
    """A server with systemd-boot, with or without /etc/kernel/cmdline, and its record."""

    def __init__(self, server: Server, text: str | None) -> None:
        self.server, self.file = server, server.root / "etc/kernel/cmdline"
        root = make_root(server.root, *ENTRIES, "proc/cmdline", "usr/lib/modules/6.12/vmlinuz")
        (root / "proc/cmdline").write_text("initrd=\\x root=UUID=1 ro\n")
        self.file.parent.mkdir()
        if text is not None:
            self.file.write_text(text)
        self.loader = BOOT.find_loader(root)

    def give(self, words: str = WORDS) -> None:
        self.server.record("kernel/cmdline", trees=["/etc/nohype"])
        BOOT.Loader(Module(self.server.root, words), self.loader).add()
        self.server.seal()

    def undo(self) -> list[str]:
        BOOT.Loader(Module(self.server.root, WORDS), self.loader).remove()
        return self.server.undo()[1]


@pytest.mark.parametrize("text", [None, "root=UUID=1 ro", "root=UUID=1  ro\n", "root=UUID=1 ro quiet\n"])
def test_undo_restores_the_command_line_of_entries(server: Server, text: str | None) -> None:
    entries = Entries(server, text)
    for words in (WORDS, WORDS, "isolcpus=4-7 quiet"):
        entries.give(words)
    assert entries.undo() == []
    assert (entries.file.read_text() if entries.file.exists() else None) == text


@pytest.mark.parametrize("text", [None, "root=UUID=1 ro\n"])
@pytest.mark.parametrize("again", [True, False])
def test_an_edit_of_the_command_line_of_entries_is_kept(server: Server, text: str | None, again: bool) -> None:  # noqa: FBT001
    entries = Entries(server, text)
    entries.give()
    entries.file.write_text(f"root=UUID=2 {WORDS} console=ttyS0\n")
    if again:
        entries.give("isolcpus=4-7")
        assert entries.file.read_text() == "root=UUID=2 console=ttyS0 isolcpus=4-7\n"
        entries.give(WORDS)
    for _ in range(2):
        assert "/etc/kernel/cmdline was changed since" in entries.undo()[0]
        assert entries.file.read_text() == "root=UUID=2 console=ttyS0\n"


def test_an_empty_command_line_of_entries_gets_the_servers_words_again(server: Server) -> None:
    entries = Entries(server, None)
    entries.give()
    entries.file.write_text("")
    entries.give()
    assert entries.file.read_text() == f"root=UUID=1 ro {WORDS}\n"


def test_a_crash_leaves_the_earlier_command_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries(server, "root=UUID=1 ro\n")
    monkeypatch.setattr(os, "fsync", lambda _file: (_ for _ in ()).throw(OSError("crash")))
    with pytest.raises(OSError, match="crash"):
        BOOT.Loader(Module(server.root, WORDS), entries.loader).write("etc/kernel/cmdline", "root=UUID=1 ro isolcpus=2-3\n")
    assert entries.file.read_text() == "root=UUID=1 ro\n"


def test_a_base_of_an_earlier_version_is_used_unless_the_command_line_was_changed(server: Server) -> None:
    entries = Entries(server, "root=UUID=1 ro isolcpus=2-3 quiet\n")
    base = server.root / "etc/nohype/kernel.cmdline.base"
    base.parent.mkdir()
    base.write_text("root=UUID=1 ro\n")
    entries.give()
    assert entries.file.read_text() == f"root=UUID=1 ro {WORDS}\n"
    base.write_text("root=UUID=1 ro\n")
    entries.file.write_text(f"root=UUID=2 ro {WORDS}\n")
    with pytest.raises(RuntimeError, match="does not tell the words of that run"):
        entries.give()
    assert entries.file.read_text() == f"root=UUID=2 ro {WORDS}\n"


@pytest.mark.parametrize("there", [True, False])
def test_grubs_drop_in_does_not_need_its_file(tmp_path: Path, there: bool) -> None:  # noqa: FBT001
    """grub-mkconfig reads it with `set -e`."""
    words, drop_in = tmp_path / "words", tmp_path / "nohype.cfg"
    if there:
        words.write_text(WORDS)
    drop_in.write_text(BOOT.build_grub(str(words)))
    script = f'set -e; GRUB_CMDLINE_LINUX=ro; . {drop_in}; echo "$GRUB_CMDLINE_LINUX"'
    ended = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == (f"ro {WORDS}" if there else "ro")


def test_changed_settings_of_packages_are_found(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("same.conf", "changed.conf", "old conf"):
        (tmp_path / "etc" / name).write_text("as packaged\n")
    packaged = hashlib.md5(b"as packaged\n", usedforsecurity=False).hexdigest()
    (tmp_path / "etc/changed.conf").write_text("of the operator\n")
    other = "0" * 32
    output = (
        f"plain\n\nnftables\n\n /etc/same.conf {packaged}\n /etc/changed.conf {packaged}\n"
        f"swtpm:amd64\n\n /etc/old conf {other} obsolete\n /etc/gone.conf {other}\n"
    )
    assert PACKAGES.find_changed(output, tmp_path) == {"nftables": ["/etc/changed.conf"], "swtpm": ["/etc/old conf"]}


class Apt:
    """Answers of apt and dpkg; commands that change something are noted."""

    def __init__(self, conffile: Path) -> None:
        self.params, self.check_mode = {"family": "Debian"}, False
        self.conffile = conffile
        self.commands, self.warnings = [], []  # type: tuple[list[str], list[str]]

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def run_command(self, argv: list[str], **_more: object) -> tuple[int, str, str]:
        if argv[0] == "apt-get" and "--simulate" not in argv:
            self.commands.append(" ".join(argv[3:]))
        if argv[0] == "dpkg-query" and "Conffiles" in argv[2]:
            return 0, f"nftables\n\n {self.conffile} {hashlib.md5(b'packaged', usedforsecurity=False).hexdigest()}\nswtpm\n\n", ""
        return 0, "nftables config-files\nswtpm config-files\n" if argv[0] == "dpkg-query" else "", ""


@pytest.mark.parametrize(
    ("text", "commands"),
    [("packaged", ["purge nftables swtpm"]), ("table inet mine {}", ["remove nftables swtpm", "purge swtpm"])],
)
def test_packages_with_changed_settings_are_not_purged(tmp_path: Path, text: str, commands: list[str]) -> None:
    conffile = tmp_path / "nftables.conf"
    conffile.write_text(text)
    apt = Apt(conffile)
    assert PACKAGES.Server(apt).remove(["nftables", "swtpm"]) == []
    assert apt.commands == commands
    assert [str(conffile) in line for line in apt.warnings] == [True] * (len(commands) - 1)


def test_new_packages_are_read_from_apts_plan() -> None:
    plan = "Inst a (1 Debian:13 [amd64])\nInst old [1] (2 Debian:13 [amd64])\nInst b (1:2 x [all])\nConf a (1 x)\n"
    assert PACKAGES.parse_added(plan) == ["a", "b"]


def test_only_packages_that_the_role_installed_are_its_own() -> None:
    """The second run's plan failed, and the operator installed `lvm2` by hand."""
    log = "processing: install: swtpm\nstatus: swtpm: unpacked\nprocessing: install: libtpms0:amd64\nprocessing: upgrade: lvm2\n"
    assert PACKAGES.find_own(["libtpms0:amd64", "lvm2", "swtpm"], log) == ["libtpms0:amd64", "swtpm"]
    assert PACKAGES.find_own(["lvm2"], "") == []


def test_packages_that_others_need_are_found() -> None:
    plan = "Purg ours [1]\nRemv theirs [2]\nPurg theirs:i386 [2]\n"
    assert PACKAGES.find_others(["ours"], plan) == ["theirs"]
    assert PACKAGES.find_others(["ours", "theirs"], plan) == []


def make_check(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "verdict": "fail", "found": "f", "needed": "n", "remedy": "r", "required": True, **more}


@pytest.mark.parametrize(
    ("check", "more", "refused"),
    [
        (make_check("virtualization"), {}, True),
        (make_check("virtualization", verdict="not measured"), {}, False),
        (make_check("isolation"), {}, False),
        (make_check("iommu"), {}, True),
        (make_check("iommu"), {"has_iommu": True}, False),
        (make_check("sr-iov"), {}, True),
        (make_check("sr-iov"), {"uplinks": [{"name": "nic0", "edge": "macvtap-vepa"}]}, False),
        (make_check("sr-iov"), {"uplinks": [{"edge": "macvtap-vepa"}, {"edge": "vepa"}]}, True),
        (make_check("other-programs", found="running: irqbalance"), {}, False),
        (make_check("other-programs", found="running: tuned (throughput)"), {}, True),
        (make_check("other-programs", found="running: tuned"), {"ignored": ["other-programs"]}, False),
    ],
)
def test_what_the_role_cannot_change_is_refused(check: dict[str, Any], more: dict[str, Any], refused: bool) -> None:  # noqa: FBT001
    given = {"ignored": [], "uplinks": [{"name": "nic0"}], "has_iommu": False, **more}
    lines = CHECKS.find_refused({"checks": [check]}, given["ignored"], given["uplinks"], has_iommu=given["has_iommu"])
    assert bool(lines) == refused
    if refused:
        assert lines == [f"{check['name']}: {check['found']}; needed: n; to do: r"]


def test_refused_checks_are_those_of_doctor() -> None:
    from orchestrator.doctor.catalogue import CHECKS as known  # noqa: N811, PLC0415

    assert set(CHECKS.REFUSED) <= {check.name for check in known}


def test_failures_are_those_of_required_checks_and_of_proofs() -> None:
    checks = [make_check("a"), make_check("b", required=False), make_check("c", verdict="not measured"), make_check("d")]
    proofs = [
        {"name": name, "subject": "host", "verdict": verdict, "evidence": ["e"]}
        for name, verdict in (("p", "fail"), ("q", "pass"), ("r", "not measured"))
    ]
    report = {"checks": checks}
    assert CHECKS.find_failed(report, proofs, ["d"]) == ["doctor: a: f; needed: n; to do: r", "audit: p (host): e"]
    assert CHECKS.find_unmeasured(report, proofs, []) == ["doctor: c: f", "audit: r (host): e"]


@pytest.mark.parametrize(
    ("pages", "size", "wrong"),
    [
        ([400, 400], "2M", []),
        ([500], "2M", ["node 0"]),
        ([100, 500], "2M", ["node 1"]),
        ([1], "1G", ["node 0"]),
        ([0, 0, 9], "1G", []),
    ],
)
def test_huge_pages_must_leave_memory(pages: list[int], size: str, wrong: list[str]) -> None:
    meminfo = "".join(f"/sys/node{node}/meminfo:Node {node} MemTotal:      1000000 kB\n" for node in (0, 1))
    found = CHECKS.find_too_large(pages, size, meminfo)
    assert [line.split(":")[0] for line in found] == wrong


OWNERS = yaml.safe_load((ROLE / "vars/main.yml").read_text())["nohype_account_packages"]


@pytest.mark.parametrize(
    ("others", "installed", "removed"),
    [
        (
            [],
            ["installed dnsmasq-base", "installed libvirt-daemon-system", "installed libvirt-dev"],
            ["dnsmasq", "libvirt", "nohype", "tss"],
        ),
        ([], ["installed dnsmasq", "installed libvirt-daemon-system"], ["libvirt", "nohype", "tss"]),
        ([], ["config-files swtpm", "not-installed dnsmasq"], ["dnsmasq", "libvirt", "nohype"]),
        (["virtinst"], ["installed dnsmasq-base", "installed libvirt-daemon-system", "installed tpm-udev"], ["nohype"]),
    ],
    ids=["all packages go", "one was installed later", "settings of one are left", "another package needs them"],
)
def test_accounts_of_packages_that_stay_remain(others: list[str], installed: list[str], removed: list[str]) -> None:
    staying = CHECKS.find_staying(["", *installed], ["dnsmasq-base", "libvirt-daemon-system:amd64", "tpm-udev"], others)
    assert CHECKS.find_removable(["dnsmasq", "libvirt", "nohype", "tss"], OWNERS, staying) == removed


def test_each_account_of_a_package_has_one() -> None:
    assert {*OWNERS, "nohype"} == {*yaml.safe_load((ROLE / "vars/main.yml").read_text())["nohype_accounts"]}
