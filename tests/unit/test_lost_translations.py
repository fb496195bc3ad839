"""A translation that another program removes again and again is reported once, until it is seen in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.guests.translations import LostTranslations
from orchestrator.ledger import Ledger
from orchestrator.model.edge import EdgeMode
from orchestrator.model.state import GuestState
from orchestrator.model.switch import PortChannel, Switch, SwitchDriver, SwitchPort, SwitchState, SwitchTie
from orchestrator.resources.step import to_arguments
from orchestrator.resources.switch import ChannelBefore, TranslateVlan
from tests.unit.test_ledger import make_plan
from tests.unit.test_plan import request as guest_request

SWITCH = Switch("sw1", SwitchDriver.LINUX_BRIDGE, "br0")
PORT = SwitchPort("swp1", True, True, False, "forwarding", None, None, (), None, (), (), None)


def test_what_a_program_removes_again_and_again_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[str] = []  # of each attempt: why it failed
    said: list[str] = []

    def repeat(_step: object, is_wanted: object) -> bool:
        if reason := results.pop(0):
            raise HostError(reason)
        return True

    monkeypatch.setattr("orchestrator.guests.translations.repeat_translation", repeat)
    base = make_plan(1, name="web")
    plan = replace(base, nics=(replace(base.vf, interface="nic0", edge=EdgeMode.CHANNEL, vlan=1000),))
    ledger = Ledger(tmp_path / "ledger")
    ledger.claim(plan, ledger.read().generation, guest_request(name="web"))
    before = ChannelBefore(SWITCH, "", "swp1", "off", 1000)
    ledger.add_undo_record("web", TranslateVlan.action, to_arguments(before))
    ledger.set_state("web", GuestState.RUNNING)
    lost = SwitchState((PORT,), True, False, None, None, None)
    whole = replace(lost, ports=(replace(PORT, channels=(PortChannel(1000, "", 0),)),))
    translations = LostTranslations(ledger, {"nic0": SwitchTie(SWITCH, "swp1", None)}.get, said.append)

    def observe(state: SwitchState, *attempts: str) -> list[str]:
        results[:] = attempts
        said.clear()
        for _ in range(max(1, len(attempts))):
            translations.restore("sw1", state)
        assert results == []
        return ["cannot" if "cannot be set again: " in text else "set" for text in said]

    assert observe(lost, "", "", "") == ["set"]
    assert observe(whole) == []
    assert observe(lost, "", "refused", "refused", "no route", "") == ["set", "cannot", "cannot", "set"]
    ledger.close()
