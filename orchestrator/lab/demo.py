"""The whole story in one lab: two guests are asked for, and every claim about them is measured."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.audit.traffic import count_at_switch, watch_switch
from orchestrator.audit.vepa import VEPA, complete_vepa
from orchestrator.errors import LabError, LabLost, ShellError
from orchestrator.lab import switch
from orchestrator.lab.health import check_emulation
from orchestrator.lab.lab import Lab, execute
from orchestrator.lab.progress import Timeline
from orchestrator.model.plain import to_plain
from orchestrator.model.proof import Proof, Verdict, proof_from_json

FRAMES = 50
_READY = 180
_COMMAND = 400.0


@dataclass(frozen=True)
class DemoGuest:
    """A guest of the demonstration: its name, and the address it gives its network function."""

    name: str
    address: str


GUESTS = (DemoGuest("guest1", "10.9.0.11/24"), DemoGuest("guest2", "10.9.0.12/24"))


@dataclass(frozen=True)
class Report:
    """What `report.json` holds.

    Attributes:
        verdict: ``pass`` only if every proof passed.
        host: the survey of the host, and how it was emulated.
        guests: each guest as the manager shows it, with its `ready` line and its ping.
        timings: seconds of each stage.
    """

    verdict: str
    host: dict[str, Any]
    guests: list[dict[str, Any]]
    proofs: list[dict[str, object]]
    timings: dict[str, float]

    def write(self, path: Path) -> None:
        """Writes the report as JSON.

        Raises:
            LabError: the file can't be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise LabError(f"cannot write the report {path}: {error.strerror}", "give --report another file") from None


def ask(lab: Lab, *words: str, check: bool = True) -> Any:
    """Runs `nohype ... --json` in the lab host and reads the answer.

    Args:
        check: whether a status other than 0 is an error; an audit with a failed proof ends with 1 and is an answer all the same.

    Raises:
        LabLost: the lab went away.
        LabError: the command failed; with what it said.
    """
    done = execute(lab, ["nohype", *words, "--json"], timeout=_COMMAND)
    try:
        if check and done.status:
            raise ValueError
        return json.loads(done.stdout)
    except ValueError:
        said = (done.stderr or done.stdout).strip()
        raise LabError(f"`nohype {' '.join(words)}` failed in the lab {lab.name} with status {done.status}: {said}") from None


def create_guest(lab: Lab, guest: DemoGuest, *options: str) -> dict[str, Any]:
    """Has the manager make a guest of the image `minimal`, and waits until the guest itself says that it is ready."""
    made: dict[str, Any] = ask(
        lab, "guest", "create", guest.name, "--memory", "256M", "--image", "minimal", "--address", guest.address,
        "--wait", str(_READY), *options,
    )  # fmt: skip
    return made


def measure(lab: Lab, frames: int = FRAMES) -> tuple[Proof, ...]:
    """All proofs: measured by the host's own manager, and for `vepa` completed with what crossed the external switch's port."""
    port = switch.port(lab.name)
    with watch_switch(port.interface, port.netns) as counter:
        proofs = [proof_from_json(fields) for fields in ask(lab, "audit", "--frames", str(frames), check=False)]
    counted = count_at_switch(counter)
    return tuple(complete_vepa(proof, counted) if proof.name == VEPA else proof for proof in proofs)


def tell_story(lab: Lab, timeline: Timeline, guests: Sequence[DemoGuest] = GUESTS) -> Report:
    """Makes the guests, lets the first ping the last, measures all proofs, ends the guests, looks whether the host is as before.

    Raises:
        LabLost: the lab went away, or its emulator has failed: that says nothing about any proof.
        LabError: a request to the manager failed.
    """
    try:
        report = _tell(lab, timeline, guests)
    except LabLost:
        raise
    except (LabError, ShellError):
        check_emulation(lab)
        raise
    if report.verdict != Verdict.PASS:
        check_emulation(lab)
    return report


def _tell(lab: Lab, timeline: Timeline, guests: Sequence[DemoGuest]) -> Report:
    with timeline.stage("survey"):
        before = ask(lab, "survey")
    shown = []
    for guest in guests:
        with timeline.stage(f"{guest.name} from request to ready"):
            shown.append(create_guest(lab, guest))
    with timeline.stage("ping from guest to guest"):
        target = guests[-1].address.partition("/")[0]
        shown[0]["ping"] = ask(lab, "guest", "tell", guests[0].name, f"ping {target} 10 0.2")["answer"].strip()
        timeline.note(shown[0]["ping"])
    with timeline.stage("proofs"):
        proofs = measure(lab)
    with timeline.stage("end of the guests"):
        for guest in guests:
            ask(lab, "guest", "delete", guest.name)
        proofs = (*proofs, prove_restored(before, _survey_when_settled(lab, before)))
    verdict = Verdict.PASS if all(proof.verdict == Verdict.PASS for proof in proofs) else Verdict.FAIL
    emulator = lab.state.emulator and lab.state.emulator.model_dump(mode="json")
    host = {"lab": lab.name, "spec": lab.state.spec.name, "accel": lab.state.accel, "emulator": emulator, "survey": before}
    return Report(str(verdict), host, shown, to_plain(proofs), timeline.timings)


def prove_restored(before: dict[str, Any], after: dict[str, Any]) -> Proof:
    """`host-restored`: after its last guest the host is as it was before its first."""
    wrong = [f"{part}: before {before[part]}, after {after.get(part)}" for part in before if before[part] != after.get(part)]
    verdict = Verdict.FAIL if wrong else Verdict.PASS
    evidence = (*wrong, f"surveys before and after are compared: {', '.join(before)}")
    return Proof("host-restored", "host", verdict, len(wrong), "parts of the survey that differ", evidence)


def _survey_when_settled(lab: Lab, before: dict[str, Any]) -> dict[str, Any]:
    """Taking the VFs away resets the NIC; its link needs a moment to be back."""
    deadline = time.monotonic() + 20
    while True:
        after: dict[str, Any] = ask(lab, "survey")
        if after == before or time.monotonic() > deadline:
            return after
        time.sleep(1)
