"""A secret of a guest's user data is nowhere on the host but in the two files that root alone can read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

import pytest

from orchestrator.lab import lab as labs
from tests.lab.conftest import LabHost

pytestmark = pytest.mark.soak

NAME = "secretive"
# Not written in one piece here: the commands of this test are in the processes that it looks at.
SECRET = "".join(("mark", "er-of-", "user-", "data"))
STORE = "/var/lib/nohype/images"
LEDGER = "/var/lib/nohype/ledger.sqlite"

# An image that takes user data; its busybox does nothing with them.
MAKE_IMAGE = (
    f"cp -rL {STORE}/minimal /tmp/seeded && cd /tmp/seeded && python3 -c \"import json; text = json.load(open('image.json'));"
    " text['configuration'] = ['cloud-init']; json.dump(text, open('image.json', 'w'))\" && nohype image install /tmp/seeded"
)

# What a user of the host, or a reader of its logs and backups, could see. /proc/PID/mem would be the guest's memory.
PLACES = {
    "libvirt's XML": f"virsh dumpxml --security-info {NAME}; grep -rs '' /run/libvirt /etc/libvirt",
    "arguments and environments": "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ",
    "journal": "journalctl --no-pager --output=export",
    "logs": "find /var/log /run/log -type f ! -path '*/journal/*' -exec cat {} +",
    "ledger": f"cat {LEDGER} {LEDGER}-wal {LEDGER}.reserve",
    "events": "nohype events --json; nohype events",
    "guest as shown": f"nohype guest show {NAME} --json; nohype guest list --json",
    "console": f"nohype guest console {NAME} --no-follow",
    "metrics": "nohype metrics",
}


@pytest.fixture(scope="module")
def guest(host: LabHost) -> Iterator[None]:
    data = f"#cloud-config\nruncmd:\n  - [sh, -c, 'echo {SECRET}']\n"
    with host.changed(MAKE_IMAGE, "rm -rf /tmp/seeded /tmp/data && nohype image delete seeded"):
        labs.execute(host.lab, "umask 077; cat >/tmp/data", input=data.encode())
        host.nohype("guest", "create", NAME, "--memory", "128M", "--image", "seeded", "--user-data", "/tmp/data", "--wait", "200")
        host.run("rm /tmp/data")
        yield
        host.nohype("guest", "delete", NAME, check=False)


def count(host: LabHost, command: str) -> int:
    """Lines with the secret in the output of a command. The pattern is not the secret, so that grep does not find itself."""
    pattern = f"[{SECRET[0]}]{SECRET[1:]}"
    return int(host.run(f"{{ {command}; }} 2>/dev/null | grep -a -c {shlex.quote(pattern)}; true").stdout)


@pytest.mark.usefixtures("guest")
@pytest.mark.parametrize("place", PLACES)
def test_secret_is_not_in(host: LabHost, place: str) -> None:
    assert len(host.run(f"{{ {PLACES[place]}; }} 2>/dev/null | head -c 100; true").stdout) > 0, "nothing was searched"
    assert count(host, PLACES[place]) == 0


@pytest.mark.usefixtures("guest")
def test_secret_is_found_where_root_keeps_it(host: LabHost) -> None:
    """The search works: the file beside the ledger, and the guest's own initrd."""
    uuid = host.run(f"virsh domuuid {NAME}").stdout.strip()
    line = f"grep -rlsa {shlex.quote(f'[{SECRET[0]}]{SECRET[1:]}')} /var/lib /run /tmp /etc | xargs -r stat --format='%a %n'"
    found = sorted(host.run(line).stdout.splitlines())
    assert found == [f"600 {LEDGER}.secrets/{uuid}.initrd", f"600 {LEDGER}.secrets/{uuid}.json"]


@pytest.mark.usefixtures("guest")
def test_secret_is_gone_with_its_guest(host: LabHost) -> None:
    """The last test of the module."""
    host.nohype("guest", "delete", NAME)
    assert count(host, "cat /proc/[0-9]*/cmdline; find /var/lib /run /tmp /etc -type f -size -200M -exec cat {} +") == 0
    assert all(guest["name"] != NAME for guest in json.loads(host.nohype("guest", "list", "--json").stdout))
