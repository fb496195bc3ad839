"""User data and network configuration: checked before anything is claimed, in bounded work, never repeated in a message."""

from __future__ import annotations

import sys
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import pytest

from orchestrator.errors import RequestError
from orchestrator.images.user_data import check_network_config, check_user_data
from orchestrator.images.yaml_tree import MAX_DEPTH, MAX_NODES, parse_yaml

MARKER = "hunter2"
CONFIG = f"""#cloud-config
# of the team
hostname: web
package_update: yes
packages: [nginx, {{name: curl}}]
users:
  - default
  - &alice {{name: alice, plain_text_passwd: {MARKER}, lock_passwd: false}}
  - {{<<: *alice, name: bob}}
runcmd:
  - [sh, -c, "echo {MARKER}"]
ssh_pwauth: true
growpart: {{mode: auto}}
write_files:
  - path: /etc/secret
    content: |
      {MARKER}
"""


def multipart(*parts: tuple[str, str], charset: str = "us-ascii") -> str:
    message = MIMEMultipart()
    for kind, content in parts:
        message.attach(MIMEText(content, kind.removeprefix("text/"), charset))
    return message.as_string()


GOOD = {
    "cloud-config": CONFIG,
    "empty cloud-config": "#cloud-config\n",
    "empty map": "#cloud-config\n{}\n",
    "Windows lines": CONFIG.replace("\n", "\r\n"),
    "number as text": "#cloud-config\nhostname: 1234\n",
    "script": "#!/bin/sh\necho $(( 1 + 1 ))\n",
    "script with a space": "#! /usr/bin/env python3\nprint()\n",
    "multi-part": multipart(("text/cloud-config", CONFIG), ("text/x-shellscript", "#!/bin/sh\n"), ("text/plain", CONFIG)),
    "base64 parts": multipart(("text/cloud-config", "#cloud-config\nhostname: web\n"), charset="utf-8"),
    "boothook": multipart(("text/cloud-boothook", "#cloud-boothook\nanything")),
    "per boot": multipart(("text/x-shellscript-per-boot", "#!/bin/sh\n")),
}


@pytest.mark.parametrize("name", GOOD)
def test_user_data_is_accepted(name: str) -> None:
    check_user_data(GOOD[name])


NESTED = MIMEMultipart()
NESTED.attach(MIMEMultipart())
BAD = {
    "empty": ("\n", "unknown format of the first line"),
    "plain text": (f"password: {MARKER}", "unknown format"),
    "other case": ("#Cloud-Config\n", "unknown format"),
    "include": (f"#include\nhttps://{MARKER}", "unknown format"),
    "archive": ("#cloud-config-archive\n[]", "unknown format"),
    "template": ("## template: jinja\n#cloud-config\n{}", "unknown format"),
    "gzip": ("\x1f\x8b" + MARKER, "unknown format"),
    "no interpreter": (f"#!\n{MARKER}", "does not name an interpreter"),
    "relative interpreter": (f"#! {MARKER}\n", "does not name an interpreter"),
    "list": (f"#cloud-config\n- {MARKER}", "a cloud-config has the type list, expected map"),
    "text": (f"#cloud-config\n{MARKER}", "a cloud-config has the type str, expected map"),
    "unknown key": (f"#cloud-config\n{MARKER}: 1", "line 2: unknown key"),
    "misspelt key": ("#cloud-config\na: &x\npakages: [vim]", "line 2: unknown key"),
    "near key": ("#cloud-config\npakages: [vim]", "nearest known key is packages"),
    "wrong type": (f"#cloud-config\nruncmd: {MARKER}", "line 2: runcmd has the type str, expected list"),
    "wrong flag": (f"#cloud-config\npackage_update: {MARKER}", "package_update has the type str, expected bool"),
    "null list": ("#cloud-config\nruncmd:\n", "runcmd has the type null, expected list"),
    "merge key": ("#cloud-config\n<<: {runcmd: []}", "merge key"),
    "tab": (f"#cloud-config\nruncmd:\n\t- {MARKER}", "invalid YAML at line 3, column 1"),
    "open bracket": (f"#cloud-config\nruncmd: [{MARKER}", "invalid YAML at line"),
    "unknown anchor": (f"#cloud-config\nruncmd: *{MARKER}", "line 2: an alias refers"),
    "recursive": ("#cloud-config\nruncmd: &a [*a]", "line 2: an alias refers"),
    "tag": (f"#cloud-config\nruncmd: !{MARKER} []", "line 2: a tag is not one of YAML's own"),
    "python": ("#cloud-config\nruncmd: !!python/object/apply:os.system [id]", "tag"),
    "twice": ("#cloud-config\nruncmd: []\nruncmd: []", "line 3: a key is given twice"),
    "twice below": (f"#cloud-config\nchpasswd: {{{MARKER}: 1, {MARKER}: 2}}", "line 2: a key is given twice"),
    "two documents": (f"#cloud-config\nruncmd: []\n---\n{MARKER}: 1", "second YAML document"),
    "map as key": ("#cloud-config\n? {a: b}\n: c", "a key is not a single value"),
    "control character": (f"#cloud-config\npassword: \x07{MARKER}", "a character that YAML does not allow"),
    "deep": ("#cloud-config\nruncmd: " + "[" * 200, f"deeper than {MAX_DEPTH} levels"),
    "very deep": ("#cloud-config\nruncmd: " + "[" * 100_000, "deeper than|invalid YAML"),
    "deep block": ("#cloud-config\nruncmd:\n" + "- " * 50_000, "deeper than"),
    "many": ("#cloud-config\nruncmd: [" + "1," * MAX_NODES + "]", f"more than {MAX_NODES} values"),
    "bomb": ("#cloud-config\nruncmd:\n- &l0 [1,2,3,4,5,6,7,8,9]\n" + "".join(
        f"- &l{level} [{','.join([f'*l{level - 1}'] * 9)}]\n" for level in range(1, 30)), f"more than {MAX_NODES} values"),
    "no parts": ("MIME-Version: 1.0\nContent-Type: text/plain\n\nx", "nested MIME multi-parts, or none"),
    "nested": (NESTED.as_string(), "nested MIME multi-parts"),
    "no boundary": (f"Content-Type: multipart/mixed\n\n{MARKER}", "damaged MIME multi-part"),
    "missing end": (GOOD["multi-part"].rstrip("\n-"), "damaged"),
    "part handler": (multipart(("text/part-handler", MARKER)), "part 1 has the content type text/part-handler"),
    "include part": (multipart(("text/plain", "#!/bin/sh"), ("text/x-include-url", MARKER)), "part 2 has the content type"),
    "unknown part": (multipart((f"text/{MARKER}", "x")), "part 1 has an unknown content type"),
    "bad part": (multipart(("text/cloud-config", f"#cloud-config\n{MARKER}: 1")), "part 1: line 2: unknown key"),
    "bad script part": (multipart(("text/x-shellscript", MARKER)), "part 1: the first line of the script"),
    "many parts": (multipart(*[("text/cloud-boothook", "x")] * 65), "65 parts, at most 64"),
    "bad base64": (
        multipart(("text/cloud-config", "x"), charset="utf-8").replace("eA==", "e\u00e9A=="), "damaged|not text|not support"),
    "not UTF-8": (multipart(("text/x-shellscript", "#!/bin/sh \u00e9"), charset="latin-1"), "not text in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_user_data_is_refused_without_being_repeated(name: str) -> None:
    text, why = BAD[name]
    with pytest.raises(RequestError, match=why) as caught:
        check_user_data(text)
    assert MARKER not in str(caught.value)
    assert str(caught.value).startswith("user_data: ")
    assert len(str(caught.value)) < 500


def count_calls(text: str) -> int:
    """Python function calls that the check of a text makes: a figure that a busy machine does not change."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        check_user_data(text)
    except RequestError:
        pass
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    "text",
    [
        "#cloud-config\n" + "a: b\n" * 50_000,
        "#cloud-config\n" + "".join(f"key{number}: [" for number in range(20_000)),
        "#cloud-config\npassword: " + "1:" * 100_000 + "1",
        "#cloud-config\npassword: |\n" + "  text\n" * 36_000,
        "Content-Type: multipart/mixed; boundary=a\n\n" + "--a\n" * 60_000,
        "Content-Type: multipart/mixed; boundary=a\n\n" + "--a\n\n" + "Content-Type: multipart/mixed; boundary=b\n" * 6_000,
        "Content-Type: text/plain;" + " a=b;" * 50_000 + "\nContent-Type: multipart/mixed; boundary=x\n\n",
    ],
    ids=range(7),
)
def test_largest_text_is_checked_in_bounded_work(text: str) -> None:
    assert len(text) < 300_000
    assert count_calls(text) < 3_000_000


NETWORK = """
version: 2
ethernets:
  nic0:
    match: {macaddress: "02:4e:48:00:00:01"}
    set-name: lan0
    addresses: [10.9.0.11/24, "fd00::1/64"]
    routes: [{to: default, via: 10.9.0.1}]
    nameservers: {addresses: [10.9.0.1]}
    dhcp4: no
    mtu: 9000
vlans:
  lan0.7: {id: 7, link: lan0}
bonds:
  bond0: {interfaces: [a, b], parameters: {mode: 802.3ad}}
"""


@pytest.mark.parametrize("text", [NETWORK, "network:" + NETWORK.replace("\n", "\n  "), '{"version": 2, "ethernets": {}}'])
def test_network_config_is_accepted(text: str) -> None:
    check_network_config(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the text has the type null, expected map"),
        (f"- {MARKER}", "the text has the type list"),
        ("version: 1\nconfig: []", "the version is not 2"),
        ("ethernets: {}", "the version is not 2"),
        (f"network: {{version: 2}}\n{MARKER}: 1", "keys beside network"),
        ("network: 7", "the text has the type int"),
        (f"version: 2\n{MARKER}: {{}}", "line 2: unknown key"),
        ("version: 2\nwifis: {}", "unknown key"),
        (f"version: 2\nethernets: [{MARKER}]", "ethernets has the type list, expected map"),
        (f"version: 2\nethernets: {{{MARKER}: 1}}", "a device of ethernets has the type int"),
        (f"version: 2\nethernets: {{a: {{{MARKER}: 1}}}}", "line 2: unknown key"),
        ("version: 2\nethernets: {a: {addresses: 10.9.0.1/24}}", "addresses has the type str, expected list"),
        ("version: 2\nethernets: {a: {addressz: []}}", "nearest known key is addresses"),
        ("version: 2\nvlans: {a: {id: x}}", "id has the type str, expected int"),
        (f"version: 2\nethernets: {{a: *{MARKER}}}", "an alias refers"),
        (f"version: 2\nethernets: {{{MARKER}", "invalid YAML"),
        ("[" * 1000, "deeper than"),
    ],
)
def test_bad_network_config_is_refused_without_being_repeated(text: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        check_network_config(text)
    assert MARKER not in str(caught.value)
    assert str(caught.value).startswith("network_config: ")


def test_types_of_values_are_those_of_yaml() -> None:
    tree = parse_yaml("a: 1\nb: 'no'\nc: no\nd:\ne: 1.5\nf: [x, {y: z}]\ng: !!str 7\nh: ! x", "text")
    assert [(key.text, value.kind) for key, value in tree.keys] == [
        ("a", "int"), ("b", "str"), ("c", "bool"), ("d", "null"), ("e", "float"), ("f", "list"), ("g", "str"), ("h", "str"),
    ]  # fmt: skip
    inner = tree.find("f")
    assert inner
    assert inner.items[1].find("y")
    assert not tree.find("missing")
