"""The end-to-end demo: two guests in a lab, every proof about them, and the host compared before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.audit.catalogue import HOST_RESTORED, VEPA
from orchestrator.audit.report import summarize
from orchestrator.audit.restored import Surveys
from orchestrator.audit.uplink import complete_vepa, count_at_switch, watch_switch
from orchestrator.errors import LabError, LabLost, ShellError
from orchestrator.lab import switch
from orchestrator.lab.health import check_emulation
from orchestrator.lab.lab import Lab, execute, keeping_connection
from orchestrator.lab.progress import Timeline
from orchestrator.model.plain import from_plain, to_plain
from orchestrator.model.proof import Proof, Verdict
from orchestrator.waiting import wait_until

FRAMES = 50
_READY_TIMEOUT = 180
_COMMAND_TIMEOUT = 400.0


@dataclass(frozen=True)
class DemoGuest:
    name: str
    address: str  # of its VF, with prefix length


GUESTS = (DemoGuest("guest1", "10.9.0.11/24"), DemoGuest("guest2", "10.9.0.12/24"))


class WrittenReport:
    """Of a demo; a dataclass."""

    def write(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")  # type: ignore[call-overload]
        except OSError as error:
            raise LabError(f"cannot write the report {path}: {error.strerror}", "give --report another file") from None


@dataclass(frozen=True)
class Report(WrittenReport):
    """The content of `report.json`."""

    verdict: str  # "pass" only if every proof passed
    host: dict[str, Any]  # its survey, and how it was emulated
    guests: list[dict[str, Any]]  # as the manager shows them, each with its `ready` line, the first with its ping
    proofs: list[dict[str, object]]
    timings: dict[str, float]  # seconds per stage


def ask(lab: Lab, *words: str, check: bool = True, account: str = "root") -> Any:
    """Runs `nohype ... --json` on the lab host. ``check=False`` ignores its status: 1 if a proof failed."""
    change = [] if account == "root" else ["runuser", "-u", account, "--"]
    done = execute(lab, [*change, "nohype", *words, "--json"], timeout=_COMMAND_TIMEOUT)
    try:
        if check and done.status:
            raise ValueError
        return json.loads(done.stdout)
    except ValueError:
        output = (done.stderr or done.stdout).strip()
        raise LabError(f"`nohype {' '.join(words)}` in lab {lab.name} exited with status {done.status}: {output}") from None


def create_guest(lab: Lab, guest: DemoGuest, *options: str) -> dict[str, Any]:
    """Creates a guest from the image `minimal` and waits until it reports ready."""
    view: dict[str, Any] = ask(
        lab, "guest", "create", guest.name, "--memory", "256M", "--image", "minimal", "--address", guest.address,
        "--wait", str(_READY_TIMEOUT), *options,
    )  # fmt: skip
    return view


def measure(lab: Lab, frames: int = FRAMES, request: Callable[..., Any] = ask) -> tuple[Proof, ...]:
    """The manager of the lab host measures all proofs; `vepa` is completed with the frames counted at the switch port.

    `request` runs the command as `ask` does.
    """
    port = switch.port(lab.name)
    with watch_switch(port.switch, port.interface) as counter:
        proofs = from_plain(tuple[Proof, ...], request(lab, "audit", "--frames", str(frames), check=False))
    counted = count_at_switch(counter)
    return tuple(complete_vepa(proof, counted) if proof.name == VEPA.name else proof for proof in proofs)


def run_demo(lab: Lab, timeline: Timeline, guests: Sequence[DemoGuest] = GUESTS) -> Report:
    """Raises LabLost if the lab is lost or its emulator failed, and LabError if a request to the manager failed."""
    try:
        with keeping_connection(lab) as connected:
            report = _run(connected, timeline, guests)
    except LabLost:
        raise
    except (LabError, ShellError):
        check_emulation(lab)
        raise
    if report.verdict != Verdict.PASS:
        check_emulation(lab)
    return report


def _run(lab: Lab, timeline: Timeline, guests: Sequence[DemoGuest]) -> Report:
    with timeline.stage("survey"):
        before = ask(lab, "survey")
    views = []
    for guest in guests:
        with timeline.stage(f"{guest.name} from request to ready"):
            views.append(create_guest(lab, guest))
    with timeline.stage("ping from guest to guest"):
        target = guests[-1].address.partition("/")[0]
        views[0]["ping"] = ask(lab, "guest", "tell", guests[0].name, f"ping {target} 10 0.2")["answer"].strip()
        timeline.note(views[0]["ping"])
    with timeline.stage("proofs"):
        proofs = measure(lab)
    with timeline.stage("end of the guests"):
        for guest in guests:
            ask(lab, "guest", "delete", guest.name)
        # Removing the VFs resets the NIC; its link comes up again a moment later.
        after = wait_until(lambda: ask(lab, "survey"), lambda survey: survey == before, timeout=20, interval=1)
        proofs = (*proofs, HOST_RESTORED.prove(Surveys(before, after)))
    emulator = lab.state.emulator and lab.state.emulator.model_dump(mode="json")
    host = {"lab": lab.name, "spec": lab.state.spec.name, "accel": lab.state.accel, "emulator": emulator, "survey": before}
    return Report(str(summarize(proofs)), host, views, to_plain(proofs), timeline.timings)
