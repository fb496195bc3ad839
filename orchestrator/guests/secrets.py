"""The files with the secret texts of guests: user data and network configuration.

The ledger has their hashes. A file is written after its claim, and is on the disk before the claim can be used; it is removed
when the guest is deleted, before its disks are wiped and the claim is released. So a manager that is killed between leaves no
file without a claim; a power cut can.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from orchestrator.errors import HostError
from orchestrator.host.sync import sync_path
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.secret import Secret
from orchestrator.model.state import GuestState

_log = logging.getLogger(__name__)

_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_NAME = re.compile(rf"(?P<id>{_ID})\.(?:json|initrd)")
# QEMU's user must reach its guest's initrd, and must not list the folder.
_FOLDER_MODE = 0o711
_FILE_MODE = 0o600
_HINT = "check `df`, `mount` and `lsattr`"


class GuestSecrets:
    """FOLDER/ID.json: the texts of a guest by field; FOLDER/ID.initrd: what a running guest was started with.

    The folder belongs to one ledger, and is next to it: `remove_orphans` removes files of guests that the ledger does not have.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._folder = ledger, Path(f"{ledger.path}.secrets")

    def write(self, uuid: UUID, secrets: Mapping[str, Secret]) -> None:
        """Returns when the file is on the disk. Writes nothing for a guest without secrets. Raises HostError."""
        if not secrets:
            return
        file = self._find(uuid)
        content = json.dumps({name: secret.text for name, secret in secrets.items()}).encode()
        try:
            self._make_folder()
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, _FILE_MODE)
            with os.fdopen(descriptor, "wb") as opened:
                os.fchmod(descriptor, _FILE_MODE)
                opened.write(content)
                opened.flush()
                os.fsync(descriptor)
            sync_path(self._folder)
        except OSError as error:
            raise HostError(f"cannot write {file}", _HINT, error.errno or 0) from None

    def read(self, claim: Claim) -> dict[str, str]:
        """The texts of a claim by field. Raises HostError if its file is missing or has other content than was claimed."""
        secrets = claim.request.secrets
        if not secrets:
            return {}
        file, name = self._find(claim.plan.uuid), claim.plan.name
        hint = "restore the file from a backup, or delete the guest and create it again"
        try:
            texts = json.loads(file.read_bytes())
        except OSError as error:
            raise HostError(f"guest {name}: cannot read its {' and '.join(secrets)} in {file}", hint, error.errno or 0) from None
        except ValueError:
            texts = None
        if (
            not isinstance(texts, dict)
            or texts.keys() != secrets.keys()
            or not all(map(_matches, texts.values(), secrets.values()))
        ):
            raise HostError(f"guest {name}: {file} is damaged: it does not have the hash of the {' and '.join(secrets)}", hint)
        return texts

    def remove(self, uuid: UUID) -> None:
        """No-op without a file."""
        _unlink(self._find(uuid))

    def prepare_initrd(self, uuid: UUID) -> Path:
        """The path of a guest's own initrd, in a folder that exists."""
        try:
            self._make_folder()
        except OSError as error:
            raise HostError(f"cannot create {self._folder}", _HINT, error.errno or 0) from None
        return self._folder / f"{uuid}.initrd"

    def remove_orphans(self) -> None:
        """Removes files that a power cut has restored, or whose claim it has lost: of guests that have no claim or only disks."""
        names = []
        with suppress(FileNotFoundError):
            names = sorted(os.listdir(self._folder))
        # After the files were listed: a guest that is claimed meanwhile has its claim before its file.
        claimed = {str(claim.plan.uuid) for claim in self._ledger.read().claims if claim.state != GuestState.WIPING}
        for name in names:
            match = _NAME.fullmatch(name)
            if match and match["id"] not in claimed:
                _log.warning("removing %s of a guest without a claim", self._folder / name)
                _unlink(self._folder / name)

    def _find(self, uuid: UUID) -> Path:
        return self._folder / f"{uuid}.json"

    def _make_folder(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._folder.chmod(_FOLDER_MODE)  # the mode of mkdir is masked by umask


def _matches(text: object, secret: Secret) -> bool:
    try:
        return isinstance(text, str) and Secret.of(text) == secret
    except ValueError:
        return False


def _unlink(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise HostError(f"cannot remove {file}", _HINT, error.errno or 0) from None
