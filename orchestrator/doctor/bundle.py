"""Writes the checks as one file that a Python without packages runs: `python3 -m orchestrator.doctor.bundle FILE` (zipapp)."""

from __future__ import annotations

import io
import sys
import zipfile
from modulefinder import ModuleFinder
from pathlib import Path

_PACKAGE = "orchestrator"
# Any Python can read it: the modules need features of 3.11, whose absence would be shown as a traceback.
_START = f"""import sys
if sys.version_info < (3, 11):
    sys.stderr.write("nohype-doctor needs Python 3.11 or later, this is %d.%d\\n" % tuple(sys.version_info[:2]))
    sys.stderr.write("install a later one next to it: apt or dnf install python3.11; then python3.11 %s\\n" % sys.argv[0])
    sys.exit(2)
from {_PACKAGE}.doctor.__main__ import main
sys.exit(main())
"""
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same tree makes the same file


def build_bundle() -> bytes:
    """The modules that the checks import, of this package only."""
    root = Path(__file__).parents[2]
    finder = ModuleFinder(path=[str(root), *(folder for folder in sys.path if "site-packages" not in folder)])
    finder.run_script(str(Path(__file__).with_name("__main__.py")))
    found = {name: getattr(module, "__file__", None) for name, module in finder.modules.items()}
    files = {Path(file) for name, file in found.items() if name.split(".")[0] == _PACKAGE and file}
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, "__main__.py", _START)
        for file in sorted(files | {Path(__file__).with_name("__main__.py")}):
            _add(archive, str(file.relative_to(root)), file.read_text())
    return b"#!/usr/bin/env python3\n" + data.getvalue()


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    archive.writestr(zipfile.ZipInfo(name, _EPOCH), text, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(build_bundle())
    target.chmod(0o755)
    print(target)
