"""`nohype lab`: builds an emulated server, starts it, runs commands in it and stops it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import click

from orchestrator.cli.folder import Folder
from orchestrator.cli.interrupts import handling_failures, raising_interrupted
from orchestrator.cli.output import format_size, json_option, print_json, print_table
from orchestrator.cli.progress import show_progress
from orchestrator.cli.seconds import Seconds
from orchestrator.errors import Conflict, NotFound
from orchestrator.images.added_packages import check_package_names
from orchestrator.lab import control
from orchestrator.lab import lab as labs
from orchestrator.lab.accel import AccelChoice
from orchestrator.lab.job import FOLDER, Files, Server, job_lab, run_job
from orchestrator.lab.paths import LabDir, list_folders, read_tail
from orchestrator.lab.spec import DEFAULT_SPEC, load_spec, parse_lab_name, shipped_specs
from orchestrator.lab.start import build_parts, start_lab

spec_option = click.option(
    "--spec", "spec_name", default=DEFAULT_SPEC, show_default=True, metavar="NAME|FILE",
    help=f"Hardware of the server: {', '.join(shipped_specs())}, or a TOML file.",
)  # fmt: skip
name_option = click.option(
    "--lab", "name", envvar="NOHYPE_LAB", metavar="NAME", help="Name of the lab; optional if there is only one."
)
accel_option = click.option(
    "--accel", type=click.Choice([str(choice) for choice in AccelChoice]), default=str(AccelChoice.AUTO), show_default=True,
    help="tcg: emulation; kvm: nested virtualization; auto: kvm if a kernel boots under it, otherwise tcg.",
)  # fmt: skip
package_option = click.option(
    "--package", "packages", multiple=True, metavar="NAME", help="Debian package to install, with its dependencies; repeatable."
)
_folder = Folder(file_okay=True)  # the job refuses a file


@click.group()
def lab() -> None:
    """Build and run the nested lab.

    A lab is an emulated server with IOMMU, SR-IOV NIC and nested virtualization, and an external switch. Requires root.
    """


@lab.command()
@spec_option
@package_option
def build(*, spec_name: str, packages: tuple[str, ...]) -> None:
    """Build the emulator and the disk image of a lab.

    Uses the cache if nothing has changed. Images with --package are for `nohype lab run`.
    """
    spec, names = load_spec(spec_name), check_package_names(packages)
    with show_progress() as timeline:
        tools, image = build_parts(spec, timeline, names)
    click.echo(f"lab {spec.name}: root {image.root}, emulator from {tools}")


@lab.command()
@click.argument("name", required=False)
@spec_option
@accel_option
@click.option("--switch", "switch_of", metavar="LAB", help="Join the switch of another lab, as a second host behind it.")
@json_option
def up(name: str | None, *, spec_name: str, accel: str, switch_of: str | None, as_json: bool) -> None:
    """Start a lab and wait until it is ready.

    NAME is the name of the spec by default. Builds what is missing first, which takes several minutes. The lab's switch is
    registered at the manager in the lab.
    """
    spec = load_spec(spec_name)
    name = parse_lab_name(name or spec.name)
    with show_progress() as timeline:
        started = start_lab(name, spec, AccelChoice(accel), timeline, switch_of=parse_lab_name(switch_of) if switch_of else "")
    if as_json:
        print_json(_as_dict(labs.read_status(name)))
    else:
        seconds = sum(started.state.timings.values())
        click.echo(f"lab {name} is up after {seconds:.0f} s; run commands in it with: nohype lab exec --lab {name} -- COMMAND")


@lab.command()
@click.argument("name", required=False)
@json_option
def status(name: str | None, *, as_json: bool) -> None:
    """Show the lab NAME, or list all labs."""
    if name and as_json:
        print_json(_as_dict(labs.read_status(name)))
        return
    if name:
        _print_status(labs.read_status(name))
        return
    statuses = [labs.read_status(folder.name) for folder in list_folders()]
    if as_json:
        print_json([_as_dict(status) for status in statuses])
    elif statuses:
        print_table([("LAB", "CONDITION", "SPEC", "CPUS", "MEMORY", "ACCEL", "SSH PORT", "SINCE"), *map(_row, statuses)])
    else:
        click.echo("no labs")


@lab.command("exec", context_settings={"allow_interspersed_args": False})
@name_option
@click.option("--timeout", type=Seconds(min=0, min_open=True), metavar="SECONDS", help="Stop the command after this long.")
@click.option("--stdin", "with_stdin", is_flag=True, help="Pass standard input to the command.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(name: str | None, *, timeout: float | None, with_stdin: bool, command: tuple[str, ...]) -> int:
    """Run COMMAND on the lab host, as root.

    A single argument is passed to the shell as a line; several arguments are passed as words. Exits with the status of the
    command, or with 3 if the lab is lost.
    """
    lab = labs.find_lab(_resolve_lab_name(name))
    input = _input(with_stdin=with_stdin)
    return labs.execute(lab, _as_line(command), timeout=timeout, input=input, stream=_print_stream).status


@lab.command("run", context_settings={"allow_interspersed_args": False})
@spec_option
@accel_option
@package_option
@click.option("--copy", "folder", type=_folder, metavar="DIR",
              help=f"Run the command in a copy of DIR ({FOLDER}), and copy changed and new files back.")  # fmt: skip
@click.option("--output", type=_folder, metavar="DIR", help="Copy changed and new files to this directory instead.")
@click.option("--timeout", type=Seconds(min=0, min_open=True), default=3600, show_default=True, metavar="SECONDS",
              help="Stop the command after this long.")  # fmt: skip
@click.option("--stdin", "with_stdin", is_flag=True, help="Pass standard input to the command.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(*, spec_name: str, accel: str, packages: tuple[str, ...], folder: Path | None, output: Path | None, timeout: float,
        with_stdin: bool, command: tuple[str, ...]) -> int:  # fmt: skip
    """Run COMMAND in a new lab, and remove the lab.

    A single argument is passed to the shell as a line; several arguments are passed as words. Progress is printed on standard
    error.

    Exit status: that of the command; 124 if it was stopped after the timeout, 125 if `nohype` failed, 3 if the lab was lost,
    128 + n after signal n. Files are copied back after any command, but not after a signal. The lab is removed in each case,
    also if this program is killed.
    """
    if output and not folder:
        raise click.UsageError("--output requires --copy")
    with handling_failures():
        server = Server(load_spec(spec_name), AccelChoice(accel), packages)
        files = Files(folder, output or folder) if folder else None
        line, input = _as_line(command), _input(with_stdin=with_stdin)
        with show_progress() as timeline, raising_interrupted():
            start = job_lab(server, timeline)
            return run_job(start, line, timeline, files=files, timeout=timeout, input=input, stream=_print_stream)


@lab.command()
@name_option
def ssh(*, name: str | None) -> None:
    """Log in to the lab host with the ssh program of this machine."""
    words = labs.build_ssh(labs.find_lab(_resolve_lab_name(name)))
    try:
        os.execvp(words[0], words)
    except FileNotFoundError:
        raise NotFound("ssh is not installed", "use `nohype lab exec`, or install openssh-client") from None


@lab.command()
@name_option
@click.option("--lines", "-n", type=click.IntRange(min=1), default=25, show_default=True, metavar="NUMBER",
              help="Number of lines, from the end.")  # fmt: skip
@click.option("--follow", "-f", is_flag=True, help="Keep printing until interrupted.")
def console(*, name: str | None, lines: int, follow: bool) -> None:
    """Show the serial console of the lab host."""
    folder = LabDir(parse_lab_name(_resolve_lab_name(name)))
    if not folder.path.exists():
        labs.read_status(folder.name)  # raises the error
    size = folder.console.stat().st_size if folder.console.exists() else 0
    click.echo("\n".join(read_tail(folder.console, lines)))
    while follow and folder.console.exists():
        with folder.console.open("rb") as file:
            file.seek(size)
            data = file.read()
        size += len(data)
        click.echo(data.decode(errors="replace").replace("\r", ""), nl=False)
        time.sleep(0.3)


@lab.command()
@click.argument("name", required=False, envvar="NOHYPE_LAB")
@click.option("--timeout", type=Seconds(min=0), default=30, show_default=True, metavar="SECONDS",
              help="Kill the lab if it has not stopped after this long.")  # fmt: skip
def down(name: str | None, *, timeout: float) -> None:
    """Stop a lab and remove it, with all changes made in it."""
    name = _resolve_lab_name(name)
    click.echo(f"lab {name} is down" if control.down(name, timeout=timeout) else f"no lab named {name}")


def _resolve_lab_name(name: str | None) -> str:
    """The given name, otherwise the name of the only lab. An empty name is invalid: a variable of a script may be not set."""
    if name is not None:
        return parse_lab_name(name)
    names = [folder.name for folder in list_folders()]
    if len(names) == 1:
        return names[0]
    if not names:
        raise NotFound("no lab exists", "start one with `nohype lab up`")
    raise Conflict(f"several labs exist: {', '.join(names)}", "select one with NAME or --lab NAME")


def _as_line(command: tuple[str, ...]) -> str:
    return command[0] if len(command) == 1 else shlex.join(command)


def _input(*, with_stdin: bool) -> bytes | IO[bytes]:
    return sys.stdin.buffer if with_stdin and sys.stdin else b""  # None: it is closed


def _print_stream(name: str, data: bytes) -> None:
    stream = sys.stdout if name == "stdout" else sys.stderr
    if stream is None:  # closed
        return
    stream.buffer.write(data)
    stream.buffer.flush()


def _as_dict(status: labs.LabStatus) -> dict[str, Any]:
    fields = {**asdict(status), "state": None}
    if status.state:
        fields["state"] = status.state.model_dump(mode="json")
    return fields


def _row(status: labs.LabStatus) -> tuple[object, ...]:
    state = status.state
    if state is None:
        return status.name, status.condition, *["-"] * 6
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.started))
    memory = format_size(state.spec.size.bytes)
    return status.name, status.condition, state.spec.name, state.spec.cpus, memory, state.accel, state.port, since


def _print_status(status: labs.LabStatus) -> None:
    rows: list[tuple[str, object]] = [("lab", status.name), ("condition", status.condition)]
    if state := status.state:
        spec = state.spec
        pages = ", ".join(f"{count} of {size}" for size, count in spec.page_pools.items())
        shape = f"{spec.sockets} x {spec.cores} x {spec.threads} (sockets, cores, threads), NUMA nodes: {spec.nodes}"
        rows += [
            ("spec", f"{spec.name}: {shape}"),
            ("memory", f"{spec.memory}, huge pages: {pages}"),
            ("devices", f"virtual functions: {spec.vfs}, NVMe disks: {', '.join(spec.disks) or 'none'}"),
            ("accelerator", f"{state.accel}: {state.accel_reason}"),
            *(
                ("emulator patch", f"{patch.name}: {patch.describe()}")
                for patch in (state.emulator.patches if state.emulator else ())
            ),
            ("processes", f"keeper {state.pid}, QEMU {state.qemu}"),
            ("SSH", f"root@127.0.0.1 port {state.port}"),
            *([("switch", f"{state.switch}, port {state.switch_port}")] if state.switch_port else []),
            ("since", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.started))),
            *((f"  {stage}", f"{seconds:.1f} s") for stage, seconds in state.timings.items()),
        ]
        if state.ended:
            rows.append(("ended", state.ended))
    if status.memory is not None:
        rows.append(("resident", f"{status.memory / (1 << 30):.1f}G of this machine's memory"))
    print_table(rows)
    for line in status.tail:
        click.echo(f"    {line}")
