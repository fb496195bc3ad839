"""Evidence that the lab host has signed is verified here, without the host."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator.cli.main import nohype
from tests.lab.conftest import LabHost

KEY = "/etc/nohype/audit.key"


def verify(*words: str | Path) -> int | None:
    """The exit status."""
    result = CliRunner().invoke(nohype, ["audit", "verify", *map(str, words)], standalone_mode=False)
    status = getattr(result.exception, "status", result.return_value)
    return None if status is None else int(status)


def test_evidence_signed_on_the_host_is_verified_here(host: LabHost, guests: list[dict[str, Any]], tmp_path: Path) -> None:
    refused = host.nohype("audit", "--sign", "/tmp/evidence", check=False)
    assert f"cannot read the signing key {KEY}" in refused.stderr
    with host.changed(f"nohype audit keygen {KEY}", f"rm -f {KEY} {KEY}.pub /tmp/evidence /tmp/page.html"):
        words = ("--sign", "/tmp/evidence", "--nonce", "lab-1", "--frames", "20", "--html", "/tmp/page.html")
        done = host.nohype("audit", *words, check=False)
        data, public, page = (host.run(f"cat {name}").stdout for name in ("/tmp/evidence", f"{KEY}.pub", "/tmp/page.html"))
        intact = host.nohype("events", "--verify", "--against", "/tmp/evidence")
    assert done.status == 0, done.stdout
    file, key = tmp_path / "evidence", tmp_path / "key.pub"
    file.write_text(data)
    key.write_text(public)
    evidence = json.loads(data)["evidence"]
    boot = host.run("cat /proc/sys/kernel/random/boot_id").stdout.strip()
    assert verify(file, "--key", key) == 7, "the clock of the lab is not synchronised"
    # The manager counts at the lab's switch, if that answers in time.
    bad = {proof["name"]: proof["verdict"] for proof in evidence["proofs"] if proof["verdict"] != "pass"}
    assert bad in ({}, {"vepa": "not measured"})
    assert verify(file, "--key", key, "--any-clock", "--nonce", "lab-1", "--boot", boot) == 8, "its quote was not verified"
    tpm = tmp_path / "tpm.pub"
    CliRunner().invoke(nohype, ["audit", "tpm-key", str(file), str(tpm)], catch_exceptions=False)
    pcrs = evidence["host"]["tpm"]["pcrs"]
    words = (file, "--key", key, "--any-clock", "--nonce", "lab-1", "--boot", boot, "--tpm-key", tpm)
    assert verify(*words, "--pcr", f"4={pcrs['4']}") == (8 if bad else 0)
    assert verify(*words, "--pcr", f"4={'ab' * 32}") == 6
    assert verify(file, "--key", key, "--any-clock", "--boot", "other") == 6
    file.write_text(data.replace('"verdict":"pass"', '"verdict":"fail"', 1))
    assert verify(file, "--key", key, "--any-clock") == 5
    assert {guest["name"] for guest in evidence["guests"]} == {guest["name"] for guest in guests}
    qemu = host.run("sha256sum $(command -v qemu-system-x86_64)").stdout.split()[0]
    assert {guest["qemu"]["sha256"] for guest in evidence["guests"]} == {qemu}
    kernel = evidence["guests"][0]["files"]["kernel"]
    assert host.run(f"sha256sum {shlex.quote(kernel['path'])}").stdout.split()[0] == kernel["sha256"]
    assert len(evidence["software"]["kernel"]["build_id"]) == 40
    assert evidence["gaps"] == []
    assert evidence["events"]["faults"] == []
    assert "event log intact" in intact.stdout
    assert "<title>NoHype audit</title>" in page


@pytest.mark.soak
def test_credential_of_systemd_signs(host: LabHost, tmp_path: Path) -> None:
    """systemd-creds(1): the key is encrypted with a key of the host, and only the manager's unit gets it."""
    store = "/etc/credstore.encrypted/nohype-audit-key"
    create = (
        f"mkdir -p /etc/credstore.encrypted && nohype audit keygen /run/k && "
        f"systemd-creds encrypt --name=nohype-audit-key /run/k {store} && rm /run/k && systemctl restart nohyped"
    )
    with host.changed(create, f"rm -f {store} /run/k /run/k.pub /tmp/evidence; systemctl restart nohyped"):
        host.nohype("audit", "--sign", "/tmp/evidence", check=False)
        data, public = (host.run(f"cat {name}").stdout for name in ("/tmp/evidence", "/run/k.pub"))
    (tmp_path / "evidence").write_text(data)
    (tmp_path / "key").write_text(public)
    assert verify(tmp_path / "evidence", "--key", tmp_path / "key", "--any-clock") in (0, 1, 8)
