"""Installing builds, and taking them out of the store."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import Conflict, ImageError, LedgerError, NotFound
from orchestrator.images.description import hash_content
from orchestrator.images.install import ReadUsers, Users, collect, delete_image, find_unused, install_image
from orchestrator.images.store import find_build, find_image, image_names, read_content_hash
from orchestrator.images.store_lock import keeping_builds
from orchestrator.images.verify import verify
from orchestrator.model.plan import ImageRef
from tests.harness.images import list_store, make_build


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def install(store: Path, kernel: str, name: str = "one") -> ImageRef:
    built = store.parent / f"built-{name}-{kernel}"
    if not built.exists():
        make_build(built, kernel)
    return ImageRef(name, install_image(built, store, name).hash)


def nobody() -> Users:
    return ()


def unknown() -> Users:
    raise LedgerError("cannot read the ledger", "run as root")


def test_earlier_build_is_found_after_a_newer_one_was_installed(store: Path) -> None:
    first, second = install(store, "first"), install(store, "second")
    assert first.hash != second.hash
    assert find_build(store, first).kernel.read_text() == "first"
    assert find_build(store, first).name == "one"
    assert find_build(store, second).kernel.read_text() == find_image(store, "one").kernel.read_text() == "second"


def test_build_is_found_after_its_name_was_deleted_or_damaged(store: Path) -> None:
    ref = install(store, "first")
    (store / "one").unlink()
    assert find_build(store, ref).kernel.read_text() == "first"
    (store / "one").symlink_to(".builds/nothing")
    assert find_build(store, ref).kernel.read_text() == "first"
    with pytest.raises(ImageError, match="guest image one is damaged: missing image.json"):
        find_image(store, "one")


def test_guest_without_a_hash_gets_the_current_build(store: Path) -> None:
    install(store, "first"), install(store, "second")
    assert find_build(store, ImageRef("one")).kernel.read_text() == "second"


def test_build_that_is_gone_is_refused(store: Path) -> None:
    ref = install(store, "first")
    install(store, "second")
    collect(store, nobody)
    with pytest.raises(Conflict, match=f"build [0-9a-f]{{12}}, expected {ref.hash[:12]}"):
        find_build(store, ref)
    with pytest.raises(NotFound, match="image other, which the guest was created with, does not exist") as caught:
        find_build(store, ImageRef("other", ref.hash))
    assert str(store) not in str(caught.value)
    assert "one" not in str(caught.value)


def test_equal_content_is_one_build(store: Path) -> None:
    one, two = install(store, "same"), install(store, "same", "two")
    assert one.hash == two.hash == install(store, "same").hash
    assert list_store(store) == {"one": "same", "two": "same", ".builds": "1"}
    assert find_build(store, two).name == "two"


def test_each_difference_makes_another_build(store: Path, tmp_path: Path) -> None:
    made = [
        make_build(tmp_path / "0"),
        make_build(tmp_path / "1", kernel="other"),
        make_build(tmp_path / "2", cmdline="other"),
        make_build(tmp_path / "3", disk=b"x"),
        make_build(tmp_path / "4", disk=b"y"),
    ]
    assert len({install_image(folder, store, "one").hash for folder in made}) == len(made)
    again = make_build(tmp_path / "5", hash="another hash of inputs")
    assert install_image(again, store, "two").hash == install_image(made[0], store, "one").hash


def test_installed_files_are_readable_by_all_and_independent_of_the_source(store: Path, tmp_path: Path) -> None:
    built = make_build(tmp_path / "built", disk=b"data")
    for file in built.iterdir():
        file.chmod(0o600)
    built.chmod(0o700)
    old = os.umask(0o077)
    try:
        image = install_image(built, store, "one")
    finally:
        os.umask(old)
    shutil.rmtree(built)
    assert {stat.S_IMODE(file.stat().st_mode) for file in image.folder.iterdir()} == {0o644}
    assert stat.S_IMODE(image.folder.stat().st_mode) == stat.S_IMODE(image.folder.parent.stat().st_mode) == 0o755
    assert image.files["disk.raw"].size == 4


def test_unused_builds_are_those_without_name_and_guest(store: Path) -> None:
    first, second, third = (install(store, text) for text in ("first", "second", "third"))
    assert find_unused(store, [("web", first)]) == (second.hash,)
    assert set(find_unused(store, [])) == {first.hash, second.hash}
    assert collect(store, lambda: [("web", first), ("any", ImageRef("one"))]) == (second.hash,)
    assert find_build(store, first).kernel.read_text() == "first"
    assert collect(store, nobody) == (first.hash,)
    assert list_store(store) == {"one": "third", ".builds": "1"}
    assert find_build(store, third).kernel.read_text() == "third"


def test_nothing_is_removed_if_the_guests_are_unknown(store: Path) -> None:
    install(store, "first"), install(store, "second")
    for change in (lambda: collect(store, unknown), lambda: delete_image(store, "one", unknown)):
        with pytest.raises(LedgerError):
            change()
    assert list_store(store) == {"one": "second", ".builds": "2"}


@pytest.mark.parametrize("change", [collect, lambda store, users: delete_image(store, "one", users)])
def test_guests_are_read_while_no_build_can_be_claimed(store: Path, change: Callable[[Path, ReadUsers], tuple[str, ...]]) -> None:
    """A claim that was written before is seen; later ones do not find the build."""
    ref = install(store, "first")
    install(store, "second")
    seen = []

    def read_users() -> Users:
        with pytest.raises(ImageError, match="is locked"), keeping_builds(store, timeout=0):
            pass
        seen.append(find_build(store, ref).hash)
        return [("web", replace(ref, name="other"))]

    assert ref.hash not in change(store, read_users)
    assert seen == [ref.hash]


def test_image_that_guests_use_is_not_deleted(store: Path) -> None:
    first, _ = install(store, "first"), install(store, "second")
    for ref in (first, ImageRef("one")):
        with pytest.raises(Conflict, match="guests use the image one: db, web\n"):
            delete_image(store, "one", lambda ref=ref: [("web", ref), ("db", ref), ("web", ref)])  # type: ignore[misc]
    assert list_store(store) == {"one": "second", ".builds": "2"}


def test_deleted_image_is_gone_with_its_builds(store: Path) -> None:
    install(store, "first"), install(store, "second")
    other = install(store, "other", "two")
    assert len(delete_image(store, "one", lambda: [("web", other)])) == 2
    assert list_store(store) == {"two": "other", ".builds": "1"}
    with pytest.raises(NotFound, match="available: two"):
        delete_image(store, "one", nobody)


def test_build_with_another_name_stays_when_one_is_deleted(store: Path) -> None:
    install(store, "same"), install(store, "same", "two")
    assert delete_image(store, "one", lambda: [("web", ImageRef("two", "x"))]) == ()
    assert list_store(store) == {"two": "same", ".builds": "1"}


def test_damaged_image_can_be_deleted_and_installed_again(store: Path) -> None:
    ref = install(store, "first")
    for damage in ("delete", "install"):
        (store / "one/image.json").write_text("{")
        if damage == "delete":
            assert delete_image(store, "one", nobody) == (ref.hash,)
        assert install(store, "first") == ref
        assert find_image(store, "one").kernel.read_text() == "first"
        assert list_store(store) == {"one": "first", ".builds": "1"}


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "vmlinuz"),
        lambda folder: (folder / "initrd").unlink(),
        lambda folder: (folder / "initrd").write_bytes(b""),
        lambda folder: (folder / "extra").write_text("x"),
        lambda folder: (folder / "image.json").write_text((folder / "image.json").read_text().replace("quiet", "debug")),
    ],
    ids=["content", "missing", "empty", "extra", "description"],
)
def test_installing_again_repairs_a_damaged_build(store: Path, damage: Callable[[Path], object]) -> None:
    ref = install(store, "first")
    damage((store / "one").resolve())
    assert install(store, "first") == ref
    assert not any(result.problem for result in verify(find_image(store, "one")))
    assert list_store(store) == {"one": "first", ".builds": "1"}


# --- a store of an earlier version ---


def test_folder_of_an_earlier_version_is_an_image(store: Path) -> None:
    make_build(store / "one", "old")
    assert find_image(store, "one").name == "one"
    assert find_build(store, ImageRef("one", "abc")).kernel.read_text() == "old"
    assert find_unused(store, []) == collect(store, nobody) == ()


def test_folder_of_an_earlier_version_becomes_a_build_when_a_newer_one_is_installed(store: Path) -> None:
    make_build(store / "one", "old")
    new = install(store, "new")
    assert list_store(store) == {"one": "new", ".builds": "2"}
    assert find_build(store, ImageRef("one", "abc")).kernel.read_text() == "old"
    assert find_build(store, new).kernel.read_text() == "new"
    assert collect(store, lambda: [("web", ImageRef("one", "abc"))]) == ()
    assert collect(store, nobody) == ("abc",)


@pytest.mark.parametrize("odd", ["../../x", ".", "..", ".hidden", "a/b", "x" * 300, " ", "-"])
def test_hash_of_an_earlier_version_never_leaves_the_store(store: Path, odd: str) -> None:
    make_build(store / "one", "old", hash=odd)
    install(store, "new")
    assert list_store(store) == {"one": "new", ".builds": "2"}
    assert find_build(store, ImageRef("one", odd)).kernel.read_text() == "old"
    assert collect(store, lambda: [("web", ImageRef("one", odd))]) == ()
    assert len(collect(store, nobody)) == 1
    assert sorted(path.name for path in store.parent.iterdir()) == ["built-one-new", "store"]


def test_damaged_folder_of_an_earlier_version_is_replaced_or_deleted(store: Path) -> None:
    for change in (lambda: install(store, "new"), lambda: delete_image(store, "one", nobody)):
        make_build(store / "one")
        (store / "one/vmlinuz").unlink()
        change()
        assert list_store(store) in ({"one": "new", ".builds": "1"}, {})
        shutil.rmtree(store)


def test_replacement_of_a_folder_is_completed_after_a_kill_between_its_two_renames(store: Path) -> None:
    ref = install(store, "new", "two")
    (store / ".tmp-killed").mkdir()
    (store / ".tmp-killed/restore-one").symlink_to(f".builds/{ref.hash}")
    collect(store, nobody)
    assert list_store(store) == {"one": "new", "two": "new", ".builds": "1"}


def test_leftover_link_replaces_no_image_and_is_not_followed_elsewhere(store: Path, tmp_path: Path) -> None:
    install(store, "current")
    ref = install(store, "other", "two")
    make_build(tmp_path / "elsewhere")
    leftover = store / ".tmp-killed"
    leftover.mkdir()
    (leftover / "restore-one").symlink_to(f".builds/{ref.hash}")
    (leftover / "restore-three").symlink_to("../elsewhere")
    (leftover / "restore-four").symlink_to(".builds/..")
    (leftover / "link").symlink_to(f".builds/{ref.hash}")
    (store / ".tmp-link").symlink_to(tmp_path / "elsewhere")
    collect(store, nobody)
    assert list_store(store) == {"one": "current", "two": "other", ".builds": "2"}
    assert (tmp_path / "elsewhere/vmlinuz").exists()


# --- bad input ---


@pytest.mark.parametrize("name", ["", ".", "..", ".builds", "a/b", "../x", "A", "-a", "a" * 41, "a\n", "ä"])
def test_invalid_name_is_refused(store: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="invalid image name"):
        install_image(make_build(tmp_path / "built"), store, name)
    assert not store.exists()


def test_file_that_differs_from_its_description_is_refused(store: Path, tmp_path: Path) -> None:
    built = make_build(tmp_path / "built", disk=b"content")
    for wrong in (b"short", b"contenT", b"content\0", b""):
        (built / "disk.raw").write_bytes(wrong)
        with pytest.raises(ImageError, match="disk.raw is not the file that image.json describes: expected 7 bytes"):
            install_image(built, store, "one")
    assert list_store(store) == {}


def test_copy_of_an_installed_build_is_checked_and_keeps_its_hash(store: Path, tmp_path: Path) -> None:
    image = install_image(make_build(tmp_path / "built", disk=b"content"), store, "one")
    copy = Path(shutil.copytree(image.folder, tmp_path / "copy"))
    assert install_image(copy, tmp_path / "other", "one").hash == image.hash
    (copy / "initrd").write_text("changed")
    with pytest.raises(ImageError, match="initrd"):
        install_image(copy, tmp_path / "other", "one")


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "device"])
@pytest.mark.parametrize("file", ["vmlinuz", "disk.raw", "extra", "image.json"])
def test_what_is_not_a_regular_file_is_refused(store: Path, tmp_path: Path, kind: str, file: str) -> None:
    built = make_build(tmp_path / "built", disk=b"content")
    path = built / file
    path.unlink(missing_ok=True)
    match kind:
        case "symlink":
            path.symlink_to("/etc/hostname")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            if os.geteuid():
                pytest.skip("needs root")
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    with pytest.raises(ImageError, match=f"{file} is not a regular file"):
        install_image(built, store, "one")
    assert not store.exists() or list_store(store) == {}


@pytest.mark.parametrize("file", ["vmlinuz", "initrd", "disk.raw"])
@pytest.mark.parametrize("size", [0, 1, 100])
def test_file_of_another_size_is_found_when_the_image_is_looked_up(store: Path, tmp_path: Path, file: str, size: int) -> None:
    install_image(make_build(tmp_path / "built", disk=b"content"), store, "one")
    os.truncate(store / "one" / file, size)
    with pytest.raises(ImageError, match=f"guest image one is damaged: {file} has {size} bytes, expected"):
        find_image(store, "one")


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_entry_that_is_no_image_is_not_replaced(store: Path, tmp_path: Path, kind: str) -> None:
    store.mkdir()
    if kind == "file":
        (store / "one").write_text("precious")
    else:
        (store / "one").symlink_to(tmp_path if kind == "link" else "nowhere")
    with pytest.raises(ImageError, match="neither a folder nor a link to a build"):
        install(store, "new")
    assert os.path.lexists(store / "one")
    assert not (store / ".builds").exists()


def test_link_that_this_program_did_not_make_is_read_but_only_the_link_is_deleted(store: Path, tmp_path: Path) -> None:
    store.mkdir()
    (store / "one").symlink_to(make_build(tmp_path / "elsewhere", "mine"))
    assert image_names(store) == ("one",)
    assert find_image(store, "one").kernel.read_text() == "mine"
    delete_image(store, "one", nobody)
    assert image_names(store) == ()
    assert (tmp_path / "elsewhere/vmlinuz").read_text() == "mine"


def test_build_folder_that_was_replaced_by_a_link_is_installed_again(store: Path, tmp_path: Path) -> None:
    ref = install(store, "first")
    folder = store / ".builds" / ref.hash
    moved = folder.rename(tmp_path / "moved")
    folder.symlink_to(moved)
    with pytest.raises(ImageError, match="is damaged: the folder of its build is a link"):
        find_image(store, "one")
    assert install(store, "first") == ref
    assert not folder.is_symlink()
    assert find_image(store, "one").kernel.read_text() == "first"
    assert (moved / "vmlinuz").exists()


@pytest.mark.parametrize("path", ["file", "file/store"])
def test_store_that_cannot_be_made_is_an_error_with_a_hint(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match="cannot install the guest image one in") as caught:
        install_image(make_build(tmp_path / "built"), tmp_path / path, "one")
    assert caught.value.hint


def test_collect_without_a_store_does_nothing(tmp_path: Path) -> None:
    assert collect(tmp_path / "none", unknown) == ()
    assert not (tmp_path / "none").exists()


def test_build_with_fields_of_a_later_version_is_intact(store: Path, tmp_path: Path) -> None:
    """The hash covers the text of the file, not the fields that this version knows."""
    ref = install(store, "first")
    file = store / "one/image.json"
    fields = {**json.loads(file.read_text()), "later": {"field": 1}}
    later = hash_content(fields)
    file.write_text(json.dumps({**fields, "hash": later}))
    assert later != ref.hash
    assert read_content_hash(store / "one") == later == find_image(store, "one").hash
