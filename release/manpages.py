"""Writes the man pages, one for each command of `nohype`, nohyped(8) and nohype.toml(5): `python -m release.manpages FOLDER`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from orchestrator import __version__
from release.commands import Command, read_commands
from release.pages import EXIT_STATUS
from release.settings import Section, read_sections

_FILES = (
    ("/etc/nohype/nohype.toml", "Configuration of the manager, nohype.toml(5)."),
    ("/run/nohype/nohyped.sock", "Unix socket of the manager."),
    ("/var/lib/nohype", "Ledger and image store."),
    ("/var/log/nohype/guests", "Console logs of guests."),
)
# groff_char(7)
_ESCAPES = str.maketrans({"\\": "\\e", "-": "\\-", "'": "\\(aq", '"': "\\(dq", "^": "\\(ha", "~": "\\(ti"})


def read_date() -> int:
    """Seconds since the epoch, of SOURCE_DATE_EPOCH or of the last commit: the same sources give the same files.

    https://reproducible-builds.org/specs/source-date-epoch/
    """
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    argv = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(argv, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit("no commit whose time the files could have: set SOURCE_DATE_EPOCH, or run this in a git checkout")
    return int(done.stdout)


def build_manpages(date: int) -> Mapping[str, str]:
    """The text of each page by its file name; ``date`` is in seconds since the epoch."""
    nohype, nohyped = read_commands()
    pages = {"nohype.1": _build_main(nohype), "nohyped.8": _build_daemon(nohyped), "nohype.toml.5": _build_file(read_sections())}
    for command in nohype.commands:
        pages[f"{'-'.join(command.words)}.1"] = _build_command(command)
    day = datetime.fromtimestamp(date, UTC).date().isoformat()
    return {name: _join([_heading(name, day), *blocks]) for name, blocks in sorted(pages.items())}


def _heading(name: str, day: str) -> str:
    title, _, section = name.rpartition(".")
    return f'.TH "{escape(title.upper())}" "{section}" "{day}" "nohype {__version__}" "NoHype"\n.nh\n.ad l'


def _build_main(nohype: Command) -> Iterator[str]:
    yield from _build_start(nohype, "run guests with dedicated cores, memory and NIC functions")
    yield ".SH COMMANDS"
    for one in nohype.commands:
        yield f".TP\n\\fB{escape('-'.join(one.words))}\\fR(1)\n{_text(one.summary)}"
    yield from _build_end([f"nohype-{one.words[-1]}(1)" for one in nohype.commands] + ["nohype.toml(5)", "nohyped(8)"])


def _build_command(command: Command) -> Iterator[str]:
    yield from _build_start(command, _lower(command.summary))
    if command.commands:
        yield ".SH COMMANDS"
    for one in command.walk():
        if one is not command:
            yield f".SS {escape(' '.join(one.words[1:]))}\n{_usage(one)}"
            yield from (_paragraph(text) for text in one.paragraphs)
            yield from _options(one)
    yield from _build_end(["nohype(1)", "nohyped(8)"])


def _build_daemon(nohyped: Command) -> Iterator[str]:
    yield from _build_start(nohyped, "system manager of NoHype")
    yield ".SH SIGNALS"
    yield ".TP\n\\fBSIGTERM\\fR, \\fBSIGINT\\fR\nThe manager finishes the changes in progress and exits. Guests keep running."
    yield from _build_end(["nohype(1)", "nohype.toml(5)"], status=(("0", "stopped by a signal"), ("1", "cannot start or serve"),
                                                                   ("78", "the configuration is invalid")))  # fmt: skip


def _build_file(sections: Sequence[Section]) -> Iterator[str]:
    yield ".SH NAME\nnohype.toml \\- configuration of the NoHype manager"
    yield ".SH SYNOPSIS\n/etc/nohype/nohype.toml"
    yield ".SH DESCRIPTION"
    yield _text(
        "The manager reads this TOML file when it starts. `nohype config check` checks it; `nohype config check --host` compares"
        ' it with the server. NAME in a title is a name of your choice. Sizes are strings such as "256M".'
    )
    for section in sections:
        yield f".SH [{escape(section.title)}]"
        if section.text:
            yield _text(section.text)
        for one in section.settings:
            notes = one.kind + ("; required" if one.required else f"; default {one.default}" if one.default else "")
            yield f".TP\n\\fB{escape(one.name)}\\fR\n{_text(one.text)} ({escape(notes)})"
    yield '.SH EXAMPLES\n.nf\n[host]\nhousekeeping = "0\\-1"\nuplinks = ["nic0"]\n.fi'
    yield from _see_also(["nohype-config(1)", "nohyped(8)"])


def _build_start(command: Command, purpose: str) -> Iterator[str]:
    yield f".SH NAME\n{escape('-'.join(command.words))} \\- {escape(purpose.removesuffix('.'))}"
    yield f".SH SYNOPSIS\n{_usage(command)}"
    yield ".SH DESCRIPTION"
    first, *more = command.paragraphs
    yield _text(first)
    yield from (_paragraph(text) for text in more)
    if any(_options(command)):
        yield ".SH OPTIONS"
        yield from _options(command)


def _build_end(others: Iterable[str], status: Sequence[tuple[str, str]] = EXIT_STATUS) -> Iterator[str]:
    yield ".SH EXIT STATUS"
    yield from (f".TP\n\\fB{code}\\fR\n{_text(meaning[0].upper() + meaning[1:])}." for code, meaning in status)
    yield ".SH FILES"
    yield from (f".TP\n\\fI{escape(path)}\\fR\n{_text(text)}" for path, text in _FILES)
    yield from _see_also(others)


def _see_also(others: Iterable[str]) -> Iterator[str]:
    names = (re.sub(r"^(.*)(\(\d\))$", lambda found: f"\\fB{escape(found[1])}\\fR{found[2]}", name) for name in others)
    yield ".SH SEE ALSO\n" + ",\n".join(names)


def _usage(command: Command) -> str:
    return f"\\fB{escape(command.name)}\\fR {escape(command.usage)}"


def _options(command: Command) -> Iterator[str]:
    for name, text in command.options:
        if not name.endswith("--help"):
            words = re.sub(r"(--?[a-z][\w-]*)", lambda found: f"\\fB{found[1]}\\fR", name).replace("-", "\\-")
            yield f".TP\n{words}\n{_text(text)}"


def _paragraph(text: str) -> str:
    return f".PP\n.nf\n{_text(text)}\n.fi" if "\n" in text else f".PP\n{_text(text)}"


def _text(text: str) -> str:
    """Escaped; words in backticks are bold. A line must not start with a control character (groff(7))."""
    lines = (re.sub(r"`([^`]+)`", r"\\fB\1\\fR", escape(line)) for line in text.split("\n"))
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


def escape(text: str) -> str:
    return text.translate(_ESCAPES)


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _join(blocks: Iterable[str]) -> str:
    return "\n".join(blocks) + "\n"


def write_manpages(folder: Path, date: int) -> list[Path]:
    """Below ``folder``, in man1, man5 and man8."""
    paths = []
    for name, text in build_manpages(date).items():
        path = folder / f"man{name[-1]}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        paths.append(path)
    return paths


if __name__ == "__main__":
    write_manpages(Path(sys.argv[1]), read_date())
