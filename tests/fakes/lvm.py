"""LVM of a fake host: a program for each command that the product calls, with one volume group and its volumes in a JSON file.

It refuses what LVM refuses: a name that exists, a full group, the removal of an active volume. The contents are files.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest  # a command must start fast

EXTENT = 1 << 20
_COMMANDS = ("vgs", "lvs", "lvcreate", "lvchange", "lvremove", "lvmconfig")
_GROUP_ID = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-gggggg"
_BLOCK = "sys/class/block"


@dataclass(frozen=True)
class FakeLvm:
    """``state``: the file with group and volumes, in a folder with the volumes' contents."""

    state: Path

    def read(self) -> dict[str, object]:
        return dict(json.loads(self.state.read_text()))

    def change(self, **fields: object) -> None:
        self.state.write_text(json.dumps({**self.read(), **fields}))

    def volumes(self) -> dict[str, dict[str, object]]:
        """By name."""
        found = self.read()["volumes"]
        assert isinstance(found, dict)
        return found

    def contents(self, name: str) -> Path:
        return self.state.parent / str(self.volumes()[name]["uuid"])

    def calls(self) -> list[str]:
        """The commands for groups and volumes, with their arguments."""
        return (self.state.parent / "calls").read_text().splitlines()

    def add(self, name: str, *, tags: str = "", size: int = EXTENT) -> None:
        """A volume that was created by another program."""
        uuid = f"other-{name}"
        (self.state.parent / uuid).write_bytes(b"data of others".ljust(size, b"\0"))
        self.change(volumes={**self.volumes(), name: {"uuid": uuid, "size": size, "tags": tags, "active": None}})


def install_lvm(patch: pytest.MonkeyPatch, folder: Path, root: Path, *, group: str = "vg0", extents: int = 8) -> FakeLvm:
    """Puts the programs in front of PATH. Former extents contain data, so a new volume does."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for command in _COMMANDS:
        (programs / command).write_text(
            f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {command} {folder / "state"} {root} "$@"\n'
        )
        (programs / command).chmod(0o755)
    patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (folder / "state").write_text(json.dumps({"group": group, "extents": extents, "volumes": {}, "vg": {}, "copies": 1}))
    return FakeLvm(folder / "state")


def _main(command: str, state: Path, root: Path, words: list[str]) -> int:
    lvm = FakeLvm(state)
    if command == "lvmconfig":
        print(f"devices {{\n\t{lvm.read().get('settings', '')}\n}}")
        return 0
    with (state.parent / "calls").open("a") as file:
        file.write(" ".join([command, *words]) + "\n")
    options = {name: words[at + 1] for at, name in enumerate(words[:-1]) if name.startswith("--")}
    chosen = dict(part.split("=", 1) for part in options.get("--select", "").split(" && ") if part)
    if command == "vgs":
        rows = [row for row in [_describe(lvm)] * int(str(lvm.read()["copies"])) if _matches(row, chosen)]
        print(json.dumps({"report": [{"vg": rows}]}))
    elif command == "lvs":
        print(json.dumps({"report": [{"lv": [row for row in _list(lvm) if _matches(row, chosen)]}]}))
    elif command == "lvcreate":
        return _create(lvm, options["--name"], int(options["--size"].removesuffix("b")), options["--addtag"], words[-1])
    else:
        for row in [row for row in _list(lvm) if _matches(row, chosen)]:
            if command == "lvremove":
                return _remove(lvm, row["lv_name"])
            _activate(lvm, root, row["lv_name"], options["--activate"] == "y")
    return 0


def _free(lvm: FakeLvm) -> int:
    return int(str(lvm.read()["extents"])) - sum(int(str(one["size"])) // EXTENT for one in lvm.volumes().values())


def _describe(lvm: FakeLvm) -> dict[str, str]:
    usual = {"vg_missing_pv_count": "0", "vg_exported": "", "vg_permissions": "writeable", "vg_shared": ""}
    ids = {"vg_name": str(lvm.read()["group"]), "vg_uuid": _GROUP_ID, "vg_extent_size": str(EXTENT)}
    changed = lvm.read()["vg"]
    assert isinstance(changed, dict)
    return {**usual, **ids, "vg_free_count": str(_free(lvm)), **changed}


def _list(lvm: FakeLvm) -> list[dict[str, str]]:
    ids = {"vg_name": str(lvm.read()["group"]), "vg_uuid": _GROUP_ID}
    return [
        {**ids, "lv_name": name, "lv_uuid": str(one["uuid"]), "lv_size": str(one["size"]), "lv_tags": str(one["tags"])}
        for name, one in lvm.volumes().items()
    ]


def _matches(row: dict[str, str], chosen: dict[str, str]) -> bool:
    return all(value in row[name].split(",") for name, value in chosen.items())


def _create(lvm: FakeLvm, name: str, size: int, tag: str, group: str) -> int:
    if name in lvm.volumes():
        return _refuse(f'Logical Volume "{name}" already exists in volume group "{group}"')
    if (needed := -(-size // EXTENT)) > _free(lvm):
        return _refuse(f'Volume group "{group}" has insufficient free space ({_free(lvm)} extents): {needed} required.')
    uuid = f"uuid-{len(list(lvm.state.parent.iterdir()))}"
    (lvm.state.parent / uuid).write_bytes(b"data of a former volume".ljust(needed * EXTENT, b"\xa5"))
    fields = {"uuid": uuid, "size": needed * EXTENT, "tags": tag, "active": None}
    lvm.change(volumes={**lvm.volumes(), name: fields})
    return 0


def _remove(lvm: FakeLvm, name: str) -> int:
    volumes = lvm.volumes()
    if volumes[name]["active"] is not None:
        return _refuse(f"Logical volume {name} in use.")
    del volumes[name]
    lvm.change(volumes=volumes)
    return 0


def _activate(lvm: FakeLvm, root: Path, name: str, active: bool) -> None:
    volumes = lvm.volumes()
    one = volumes[name]
    link = root / "dev" / str(lvm.read()["group"]) / name
    if active and one["active"] is None:
        one["active"] = device = f"dm-{3 + list(volumes).index(name)}"
        number = device.removeprefix("dm-")
        ids = f"LVM-{_GROUP_ID}{one['uuid']}".replace("-", "")
        texts = {"dm/uuid": ids.replace("LVM", "LVM-", 1), "dm/name": name, "dev": f"254:{number}", "ro": "0"}
        for file, text in {**texts, "size": str(int(str(one["size"])) // 512), "queue/logical_block_size": "512"}.items():
            path = root / _BLOCK / device / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        link.parent.mkdir(parents=True, exist_ok=True)
        (root / "dev" / device).symlink_to(lvm.contents(name))
        link.symlink_to(f"../{device}")
    elif not active and one["active"] is not None:
        for path in sorted((root / _BLOCK / str(one["active"])).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (root / _BLOCK / str(one["active"])).rmdir()
        (root / "dev" / str(one["active"])).unlink()
        link.unlink()
        one["active"] = None
    lvm.change(volumes=volumes)


def _refuse(text: str) -> int:
    print(f"  {text}", file=sys.stderr)
    return 5


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
