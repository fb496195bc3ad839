"""`nohype guest ssh` and `nohype guest copy`: against a real manager, and an SSH server in this process as the guest."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.images.description import write_description
from orchestrator.images.store import read_image
from orchestrator.lab.keys import KeyPair, make_key
from tests.harness.api_server import Served, serve
from tests.harness.guests import until
from tests.harness.sftp_server import offer_files
from tests.harness.ssh_server import serve as serve_ssh
from tests.harness.terminal import COMMAND, Terminal, run_on_terminal

pytestmark = pytest.mark.timeout(200)

GOOD = {"name": "web", "memory": "64M", "image": "minimal", "address": "127.0.0.1/8"}


@dataclass(frozen=True)
class Place:
    """A guest with an SSH server.

    Attributes:
        home: of the user in the guest, and of the user of the command.
        port: of the guest's server.
        host: the keys of the server.
    """

    served: Served
    folder: Path
    guest_home: Path
    key: Path
    port: int
    host: KeyPair
    client: KeyPair

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def words(self, command: str, *words: str, port: int | None = None, identity: bool = True) -> list[str]:
        more = ("--identity", str(self.key)) if identity else ()
        return ["--socket", str(self.served.path), "guest", command, "--port", str(port or self.port), *more, *words]

    def run(self, command: str, *words: str, input: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "HOME": str(self.home), "SSH_AUTH_SOCK": str(options.pop("agent", ""))}
        return subprocess.run(
            [*COMMAND, *self.words(command, *words, **options)],  # type: ignore[arg-type]
            input=input, capture_output=True, timeout=100, check=False, env=environment, cwd=self.home,
        )  # fmt: skip


def report(host: KeyPair) -> bytes:
    return f"nohype: ready name=web hostkey=ssh-ed25519:{host.public.split()[1]}\n".encode()


def listen(host: KeyPair, client: KeyPair, prepare: Callable[..., object] = lambda _: None) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    arguments = (listener, host.private.decode(), client.public, prepare)
    threading.Thread(target=serve_quietly, args=arguments, daemon=True).start()
    return listener


def serve_quietly(*arguments: object) -> None:
    try:
        serve_ssh(*arguments)  # type: ignore[arg-type]
    except OSError:
        pass  # the test has ended


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    client, host = make_key(), make_key()
    key, guest_home = tmp_path / "key", tmp_path / "guest"
    key.touch(0o600)
    key.write_bytes(client.private)
    guest_home.mkdir()
    (tmp_path / "home").mkdir()
    with serve(tmp_path) as served, listen(host, client, offer_files(guest_home)) as listener:
        image = read_image(served.world.folder / "images" / "minimal")
        write_description(image.folder, image.model_copy(update={"ready": "notify"}))
        served.client.create(GOOD)
        served.world.hypervisor.write("web", report(host))
        until(lambda: served.client.guest("web")["ssh_host_key"])
        yield Place(served, tmp_path, guest_home, key, listener.getsockname()[1], host, client)


# Commands.


def test_status_and_streams_of_a_command_are_passed_on(place: Place) -> None:
    done = place.run("ssh", "web", "--", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


@pytest.mark.parametrize(("line", "status"), [("true", 0), ("exit 255", 255), ("kill -TERM $$", 143), ("nosuchcommand", 127)])
def test_each_status_is_that_of_the_command(place: Place, line: str, status: int) -> None:
    line = f"sh -c '{line}'" if "kill" in line else line
    assert place.run("ssh", "web", "--", line).returncode == status


def test_several_words_are_quoted_and_one_is_a_line(place: Place) -> None:
    assert place.run("ssh", "web", "--", "printf", "%s|", "a b", "$HOME", "it's", "-x").stdout == b"a b|$HOME|it's|-x|"
    assert place.run("ssh", "web", "--", "echo $((1+1)) | cat").stdout == b"2\n"


def test_binary_input_and_output_pass_unchanged(place: Place) -> None:
    data = os.urandom(3 << 20)
    done = place.run("ssh", "web", "--", "tee /dev/stderr", input=data)
    assert done.returncode == 0
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest() == hashlib.sha256(done.stderr).digest()


def test_command_that_does_not_read_its_input_ends(place: Place) -> None:
    done = place.run("ssh", "web", "--", "head -c 3", input=b"abc" * 1_000_000)
    assert (done.returncode, done.stdout) == (0, b"abc")


@pytest.mark.parametrize(
    ("end", "said"), [("kill", b": guest web is stopped\n"), ("delete", b": guest web was deleted\n"), ("", b"")]
)
def test_lost_connection_tells_what_became_of_the_guest(place: Place, end: str, said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as relay, socket.create_connection(("127.0.0.1", place.port)) as server:
        port = relay.getsockname()[1]
        words = [*COMMAND, *place.words("ssh", "web", "--", "echo begun; cat", port=port)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            client = relay.accept()[0]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=carry, args=(source, target), daemon=True).start()
            assert process.stdin
            assert process.stdout
            assert process.stderr
            process.stdin.write(b"input\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"begun\n"
            if end:
                getattr(place.served.client, end)("web")
            client.shutdown(socket.SHUT_RDWR)
            error = process.stderr.read()
            assert process.wait(60) == 255
    assert error.startswith(b"nohype: connection to guest web ")
    assert said in error


def carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


def test_output_comes_while_input_is_open(place: Place) -> None:
    with subprocess.Popen(
        [*COMMAND, *place.words("ssh", "web", "--", "cat")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        for number in range(3):
            process.stdin.write(b"line %d\n" % number)
            process.stdin.flush()
            assert process.stdout.readline() == b"line %d\n" % number
        process.stdin.close()
        assert process.wait(60) == 0


# Terminals.


def start_session(place: Place, *words: str) -> Terminal:
    return Terminal(*place.words("ssh", "web", *words), size=(100, 30), TERM="vt220")


def test_session_has_a_terminal_that_follows_the_users(place: Place) -> None:
    terminal = start_session(place)
    try:
        terminal.until(b"ready$ ")
        until(lambda: terminal.is_raw)
        terminal.type(b"stty size; echo $TERM\n")
        terminal.until(b"30 100\r\nvt220")
        terminal.resize(123, 45)
        terminal.type(b"until stty size | grep 123; do :; done\n")
        terminal.until(b"45 123\r\n")
        terminal.type(b"sleep 100\n\x03")
        terminal.until(b"^C")
        terminal.type(b"exit 5\n")
        assert terminal.wait() == 5
        assert terminal.mode == terminal.before
    finally:
        terminal.close()


@pytest.mark.parametrize("how", ["escape", "signal", "server"])
def test_terminal_is_restored_however_the_session_ends(place: Place, how: str) -> None:
    terminal = start_session(place)
    try:
        terminal.until(b"ready$ ")
        until(lambda: terminal.is_raw)
        if how == "escape":
            terminal.type(b"echo ~~; sleep 100\r")
            terminal.type(b"~.")
        elif how == "signal":
            terminal.process.send_signal(signal.SIGTERM)
        else:
            terminal.type(b"kill -9 $$\r")
        assert terminal.wait() == {"escape": 255, "signal": 143, "server": 137}[how]
        assert terminal.mode == terminal.before
    finally:
        terminal.close()


def test_command_gets_a_terminal_on_request(place: Place) -> None:
    assert place.run("ssh", "web", "--", "test -t 1").returncode == 1
    assert place.run("ssh", "web", "-t", "--", "test -t 1").returncode == 0


# Whom it trusts.


def test_another_host_key_is_refused(place: Place) -> None:
    with listen(make_key(), place.client) as other:
        done = place.run("ssh", "web", "--", "id", port=other.getsockname()[1])
    assert done.returncode == 255
    assert b"presented the host key ssh-ed25519" in done.stderr
    assert b"do not log in" in done.stderr


def test_guest_without_a_reported_key_is_refused_after_the_timeout(place: Place) -> None:
    place.served.client.restart("web", 1)
    done = place.run("ssh", "web", "--timeout", "1", "--", "id")
    assert done.returncode == 255
    assert b"guest web has not reported an SSH host key on its console" in done.stderr
    assert b"--host-key FILE" in done.stderr


def test_key_that_is_reported_meanwhile_is_used(place: Place) -> None:
    place.served.client.restart("web", 1)
    timer = threading.Timer(1.5, lambda: place.served.world.hypervisor.write("web", report(place.host)))
    timer.start()
    assert place.run("ssh", "web", "--timeout", "60", "--", "echo in").stdout == b"in\n"
    timer.join()


@pytest.mark.parametrize("form", ["{key} comment", "# comment\n\n10.9.0.11 {key}", "{key}"])
def test_key_in_a_file_is_trusted_instead(place: Place, form: str) -> None:
    place.served.client.restart("web", 1)
    file = place.folder / "host.pub"
    file.write_text(form.format(key=place.host.public) + "\n")
    assert place.run("ssh", "web", "--host-key", str(file), "--", "echo in").stdout == b"in\n"
    file.write_text(form.format(key=make_key().public) + "\n")
    assert b"presented the host key" in place.run("ssh", "web", "--host-key", str(file), "--", "id").stderr


@pytest.mark.parametrize("content", ["", "ssh-ed25519 AAAA\n", "-----BEGIN OPENSSH PRIVATE KEY-----\n", "ssh-dss " + "A" * 60])
def test_file_without_a_host_key_is_a_clear_error(place: Place, content: str) -> None:
    file = place.folder / "host.pub"
    file.write_text(content)
    done = place.run("ssh", "web", "--host-key", str(file), "--", "id")
    assert done.returncode == 255
    assert b"contains no SSH public key" in done.stderr


# Keys.


def test_key_without_rights_is_a_clear_error(place: Place) -> None:
    other = place.folder / "other"
    other.touch(0o600)
    other.write_bytes(make_key().private)
    done = place.run("ssh", "web", "--identity", str(other), "--", "id", identity=False)
    assert done.returncode == 255
    assert f"accepts none of the keys {other}".encode() in done.stderr
    assert (
        place.run("ssh", "web", "--identity", str(other), "--identity", str(place.key), "--", "id", identity=False).returncode
        == 0
    )
    assert b"accepts none of the keys" in place.run("ssh", "web", "--user", "nobody", "--", "id").stderr


def test_keys_of_the_home_directory_and_the_agent_are_used(place: Place) -> None:
    done = place.run("ssh", "web", "--", "id", identity=False)
    assert b"no SSH key found" in done.stderr
    (place.home / ".ssh").mkdir()
    default = place.home / ".ssh" / "id_ed25519"
    default.touch(0o600)
    default.write_bytes(place.client.private)
    assert place.run("ssh", "web", "--", "echo in", identity=False).stdout == b"in\n"
    default.unlink()
    socket_name = place.folder / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket_name)], stdout=subprocess.DEVNULL)
    try:
        until(socket_name.exists)
        subprocess.run(["ssh-add", "-q", str(place.key)], check=True, env={**os.environ, "SSH_AUTH_SOCK": str(socket_name)})
        assert place.run("ssh", "web", "--", "echo in", identity=False, agent=socket_name).stdout == b"in\n"
    finally:
        agent.terminate()
        agent.wait()


@pytest.mark.parametrize("kind", ["missing", "garbage", "public", "readable by all", "encrypted"])
def test_key_file_that_cannot_be_used_is_a_clear_error(place: Place, kind: str) -> None:
    file = place.folder / "bad"
    if kind != "missing":
        file.touch(0o600)
        file.write_bytes({"garbage": b"\0\xff" * 100, "public": place.client.public.encode()}.get(kind, place.client.private))
    if kind == "readable by all":
        file.chmod(0o644)
    if kind == "encrypted":
        subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(file)], check=True, stdout=subprocess.DEVNULL)
    done = place.run("ssh", "web", "--identity", str(file), "--", "id", identity=False)
    text = {
        "missing": "cannot read", "garbage": "cannot use the key", "public": "cannot use the key",
        "readable by all": "is readable by all users", "encrypted": "has a passphrase",
    }[kind]  # fmt: skip
    assert done.returncode == 255
    assert done.stderr.decode().startswith("nohype: ")
    assert text in done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_other_types_of_keys_work(place: Place, kind: str) -> None:
    file = place.folder / kind
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(file)], check=True)
    public = " ".join(file.with_name(f"{kind}.pub").read_text().split()[:2])
    with listen(place.host, KeyPair(b"", public)) as listener:
        port = listener.getsockname()[1]
        assert place.run("ssh", "web", "--identity", str(file), "--", "echo in", identity=False, port=port).stdout == b"in\n"


# Guests that do not answer.


@pytest.mark.parametrize("kind", ["closed", "silent", "closes", "http"])
def test_guest_that_does_not_answer_times_out(place: Place, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            kept = []
            try:
                while True:
                    connection, _ = listener.accept()
                    kept.append(connection)
                    if kind == "http":
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    if kind == "closes":
                        connection.close()
            except OSError:
                pass

        if kind == "closed":
            listener.close()
        else:
            threading.Thread(target=answer, daemon=True).start()
        begun = time.monotonic()
        done = place.run("ssh", "web", "--timeout", "2", "--", "id", port=port)
    assert done.returncode == 255
    # Less than 2 s if the machine was slow before.
    assert re.search(rb"gave up after (2|1\.\d|0\.\d|0) s", done.stderr)
    assert f"guest web (root@127.0.0.1 port {port})".encode() in done.stderr
    assert time.monotonic() - begun < 60


def test_guest_that_starts_its_server_later_is_waited_for(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    later: list[socket.socket] = []

    def start() -> None:
        listener = socket.create_server(("127.0.0.1", port))
        later.append(listener)
        serve_quietly(listener, place.host.private.decode(), place.client.public)

    timer = threading.Timer(2, start)
    timer.daemon = True
    timer.start()
    assert place.run("ssh", "web", "--timeout", "60", "--", "echo in", port=port).stdout == b"in\n"
    later[0].close()


@pytest.mark.parametrize("state", ["stopped", "deleted"])
def test_guest_that_does_not_run_is_a_clear_error(place: Place, state: str) -> None:
    (place.served.client.kill if state == "stopped" else place.served.client.delete)("web")
    done = place.run("ssh", "web", "--", "id")
    assert done.returncode == 255
    assert (b"guest web is stopped" if state == "stopped" else b"no guest named web") in done.stderr


def test_guest_without_an_address_is_a_clear_error(place: Place) -> None:
    place.served.client.delete("web")
    place.served.client.create({name: value for name, value in GOOD.items() if name != "address"})
    place.served.world.hypervisor.write("web", report(place.host))
    assert b"guest web was created without an IP address" in place.run("ssh", "web", "--", "id").stderr
    assert place.run("ssh", "web", "--address", "127.0.0.1", "--", "echo in").stdout == b"in\n"


# Through another host.


def test_guest_is_reached_through_a_jump_host(place: Place) -> None:
    jump_key = make_key()
    with listen(jump_key, place.client) as jump:
        port = jump.getsockname()[1]
        words = ("web", "--jump", f"root@127.0.0.1:{port}", "--", "echo in")
        done = place.run("ssh", *words)
        assert done.returncode == 255
        assert f"the host key of [127.0.0.1]:{port} is not in".encode() in done.stderr
        (place.home / ".ssh").mkdir()
        known = place.home / ".ssh" / "known_hosts"
        known.write_text(f"[127.0.0.1]:{port} {jump_key.public}\n")
        assert place.run("ssh", *words).stdout == b"in\n"
        closed = socket.create_server(("127.0.0.1", 0))
        closed_port = closed.getsockname()[1]
        closed.close()
        done = place.run("ssh", *words[:-2], "--timeout", "2", "--", "id", port=closed_port)
        assert b"could not connect to guest web" in done.stderr
        known.write_text(f"[127.0.0.1]:{port} {make_key().public}\n")
        assert b"presented the host key" in place.run("ssh", *words).stderr


@pytest.mark.parametrize("jump", ["", "a b", "host:99999", "user@", "host:x", "a@b@c"])
def test_wrong_jump_host_is_a_usage_error(place: Place, jump: str) -> None:
    done = place.run("ssh", "web", "--jump", jump or "@", "--", "id")
    assert done.returncode == 2
    assert b"use the form USER@HOST" in done.stderr


# Files.


def test_file_is_copied_both_ways(place: Place) -> None:
    data = os.urandom(5 << 20)
    source = place.home / "tool"
    source.write_bytes(data)
    source.chmod(0o750)
    assert place.run("copy", "tool", "web:tool").returncode == 0
    copied = place.guest_home / "tool"
    assert copied.read_bytes() == data
    assert stat.S_IMODE(copied.stat().st_mode) == 0o750
    assert place.run("copy", "web:tool", "back").returncode == 0
    assert (place.home / "back").read_bytes() == data
    assert stat.S_IMODE((place.home / "back").stat().st_mode) == 0o750
    assert sorted(path.name for path in (*place.guest_home.iterdir(), *place.home.iterdir())) == ["back", "tool", "tool"]


def test_empty_file_and_odd_names_are_copied(place: Place) -> None:
    (place.home / "a b:ü").write_bytes(b"")
    assert place.run("copy", "./a b:ü", "web:").returncode == 0
    assert (place.guest_home / "a b:ü").read_bytes() == b""
    assert place.run("copy", "web:a b:ü", ".").returncode == 0


def test_existing_file_is_replaced_and_folder_is_filled(place: Place) -> None:
    (place.home / "new").write_bytes(b"new")
    (place.guest_home / "old").write_bytes(b"old and longer")
    assert place.run("copy", "new", "web:old").returncode == 0
    assert (place.guest_home / "old").read_bytes() == b"new"
    (place.guest_home / "folder").mkdir()
    assert place.run("copy", "new", "web:folder").returncode == 0
    assert (place.guest_home / "folder" / "new").read_bytes() == b"new"
    assert place.run("copy", "web:folder/new", str(place.folder)).returncode == 0
    assert (place.folder / "new").read_bytes() == b"new"


def test_server_without_posix_rename_replaces_files_too(place: Place) -> None:
    (place.home / "new").write_bytes(b"new")
    (place.guest_home / "old").write_bytes(b"old")
    with listen(place.host, place.client, offer_files(place.guest_home, no_posix_rename=True)) as listener:
        assert place.run("copy", "new", "web:old", port=listener.getsockname()[1]).returncode == 0
    assert (place.guest_home / "old").read_bytes() == b"new"


def test_folder_is_copied_both_ways(place: Place) -> None:
    for name in ("tree/a", "tree/sub/b", "tree/sub/deep/c"):
        path = place.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    done = place.run("copy", "tree", "web:")
    assert done.returncode == 1
    assert b"is a directory\n  hint: copy it with --recursive" in done.stderr
    assert place.run("copy", "-r", "tree", "web:").returncode == 0
    assert place.run("copy", "-r", "web:tree", "back").returncode == 0
    for folder in (place.guest_home / "tree", place.home / "back"):
        found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
        assert found == {name.removeprefix("tree/"): name for name in ("tree/a", "tree/sub/b", "tree/sub/deep/c")}


@pytest.mark.parametrize("lie", ["../../evil", "/etc/evil", "sub/evil", "\n/../evil"])
def test_names_from_the_guest_do_not_lead_out_of_the_target(place: Place, lie: str) -> None:
    (place.guest_home / "tree").mkdir()
    (place.guest_home / "tree" / "good").write_text("good")
    with listen(place.host, place.client, offer_files(place.guest_home, lies=(lie,))) as listener:
        done = place.run("copy", "-r", "web:tree", "back", port=listener.getsockname()[1])
    assert done.returncode == 1
    assert b"lists an invalid file name in tree" in done.stderr
    assert not list(place.folder.rglob("*evil*"))


@pytest.mark.parametrize("name", ["link", "pipe"])
def test_special_files_are_refused(place: Place, name: str) -> None:
    tree = place.guest_home / "tree"
    tree.mkdir()
    if name == "link":
        (tree / name).symlink_to("/etc/shadow")
    else:
        os.mkfifo(tree / name)
    done = place.run("copy", "-r", "web:tree", "back")
    assert done.returncode == 1
    assert b"is neither a regular file nor a directory" in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("a", "b"), 2, "exactly one of SRC and DST must be NAME:PATH"),
        (("web:a", "web:b"), 2, "exactly one of SRC and DST must be NAME:PATH"),
        (("nosuchfile", "web:"), 1, "nosuchfile does not exist"),
        (("web:nosuchfile", "."), 1, "cannot copy nosuchfile to . on guest web"),
        (("there", "web:nosuchfolder/x"), 1, "cannot copy there to nosuchfolder/x on guest web"),
        (("there", "web:nosuchfolder/"), 1, "nosuchfolder/ is not a directory"),
        (("web:there", "nosuchfolder/x"), 1, "No such file or directory"),
    ],
)
def test_failed_copy_is_a_clear_error(place: Place, words: tuple[str, str], status: int, message: str) -> None:
    (place.home / "there").write_text("x")
    (place.guest_home / "there").write_text("x")
    done = place.run("copy", *words)
    assert done.returncode == status
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_guest_without_sftp_is_a_clear_error(place: Place) -> None:
    with listen(place.host, place.client) as listener:
        done = place.run("copy", "web:a", ".", port=listener.getsockname()[1])
    assert done.returncode == 1
    assert b"offers no SFTP" in done.stderr


def test_progress_is_shown_on_a_terminal(place: Place) -> None:
    (place.home / "big").write_bytes(os.urandom(2 << 20))
    with run_on_terminal(*place.words("copy", str(place.home / "big"), "web:")) as terminal:
        assert terminal.wait() == 0
        terminal.until(b"'big' 100% of 2.1 MB")


def test_missing_paramiko_is_a_clear_error(place: Place) -> None:
    program = "import sys; sys.modules['paramiko'] = None; from orchestrator.cli.main import main; main()"
    done = subprocess.run(
        [COMMAND[0], "-c", program, *place.words("ssh", "web")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 255
    assert "SSH requires the Python package paramiko\n  hint: run `pip install 'nohype-orchestrator[ssh]'`" in done.stderr
