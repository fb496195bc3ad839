"""The played manager of fleet_scale.py: for many hosts in one process, what the steps of a guest's job ask of a manager.

    python fleet_scale_played.py FOLDER SURVEY COUNT

It is played: it stores guests in memory, checks nothing and starts nothing. Each host has the socket FOLDER/hNNNN.sock. Steps of
bash, which cannot connect to a Unix socket, use port 8000, with the path /hNNNN/v1/... . When its standard input is closed, it
prints as JSON when each guest was requested and deleted, in seconds of time.time(), and ends.

Steps of bash send commands of scontrol to port 8001, one per connection; the response is one line, with the name and the comment
of the job. Some scontrols that keep running pass the commands on: the controller receives the same requests, and the start of a
scontrol, for which each host of a fleet has CPUs of its own, does not use those of this machine.
"""

import asyncio
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

PORT, SCONTROL_PORT = 8000, 8001
_SCONTROLS = 8
_PROMPT = b"scontrol: "
_INPUTRC = Path("/run/nohype/inputrc")
"""In the line that scontrol reads, the separator of a comment would be the key that undoes the last change (readline(3))."""
Guests = dict[str, dict[str, Any]]
_MISSING = {"title": "not found", "status": 404, "detail": "no such guest", "code": "not-found"}


class Played:
    """All hosts, which are equal; ``survey`` has what a real manager says of one, ``host``, and of a ``guest``."""

    def __init__(self, survey: dict[str, Any], names: list[str]) -> None:
        self._host, self._example = json.dumps(survey["host"]).encode(), survey["guest"]
        self._guests: dict[str, Guests] = {name: {} for name in names}
        self.requested: dict[str, float] = {}
        self.deleted: dict[str, float] = {}

    async def serve(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; ``name`` is empty if the path starts with the host."""
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                length = 0
                while (header := await reader.readline()).strip():
                    key, _, value = header.decode().partition(":")
                    length = int(value) if key.lower() == "content-length" else length
                body = await reader.readexactly(length)
                host = name or path.split("/")[1]
                status, answer = self._answer(host, method, path.removeprefix(f"/{host}"), body)
                kind = "application/problem+json" if status == 404 else "application/json"
                head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(answer)}\r\n\r\n"
                writer.write(head.encode() + answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _answer(self, host: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        guests, name = self._guests[host], path.partition("/v1/guests/")[2].partition("?")[0]
        if path == "/v1/host":
            return 200, self._host
        if path.endswith("/stop"):
            guest = guests[name.removesuffix("/stop")]
            guest["state"] = "stopped"
            return 200, json.dumps(guest).encode()
        if method == "POST":
            fields = json.loads(body)
            cpus = fields.get("placement", {}).get("cpus", "2")
            guest = {**self._example, "name": fields["name"], "id": fields["id"], "cpus": _read_cpus(cpus), "nics": []}
            self.requested.setdefault(fields["name"], time.time())
            guests[fields["name"]] = guest
            return 201, json.dumps(guest).encode()
        if not name:
            return 200, json.dumps(list(guests.values())).encode()
        if name not in guests:
            return 404, json.dumps(_MISSING).encode()
        if method == "DELETE":
            self.deleted[name] = time.time()
            del guests[name]
            return 204, b""
        return 200, json.dumps(guests[name]).encode()


def _read_cpus(text: str) -> list[int]:
    bounds = (part.partition("-") for part in text.split(","))
    return [cpu for first, _, last in bounds for cpu in range(int(first), int(last or first) + 1)]


class Scontrols:
    """They are started by the first command: there must be a controller by then."""

    def __init__(self) -> None:
        self._left = _SCONTROLS
        self._free: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            words = (await self._run(await reader.readline())).split()
            writer.write(b" ".join(word for word in words if word.startswith((b"JobName=", b"Comment="))) + b"\n")
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _run(self, line: bytes) -> bytes:
        if self._free.empty() and self._left:
            self._left -= 1
            process = await _start_scontrol()
        else:
            process = await self._free.get()
        answer = await _ask(process, line)
        self._free.put_nowait(process)
        return answer


async def _start_scontrol() -> asyncio.subprocess.Process:
    pipe, environment = asyncio.subprocess.PIPE, {**os.environ, "INPUTRC": str(_INPUTRC)}
    process = await asyncio.create_subprocess_exec(
        "scontrol", stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=environment
    )
    assert process.stdout
    await process.stdout.readuntil(_PROMPT)
    await _ask(process, b"details\n")
    return process


async def _ask(process: asyncio.subprocess.Process, line: bytes) -> bytes:
    """The output: scontrol repeats the line before it, and prints its prompt after it.

    Raises IncompleteReadError if scontrol has ended.
    """
    assert process.stdin
    assert process.stdout
    process.stdin.write(line)
    output = await process.stdout.readuntil(_PROMPT)
    return output.removeprefix(line).removesuffix(_PROMPT)


async def main(folder: Path, survey: dict[str, Any], count: int) -> None:
    names = [f"h{number:04}" for number in range(1, count + 1)]
    played = Played(survey, names)
    _INPUTRC.write_text('"\\C-_": self-insert\n')
    for name in names:
        path = folder / f"{name}.sock"
        await asyncio.start_unix_server(partial(played.serve, name), path)
        path.chmod(0o666)
    await asyncio.start_server(partial(played.serve, ""), "127.0.0.1", PORT, backlog=4096)
    await asyncio.start_server(Scontrols().serve, "127.0.0.1", SCONTROL_PORT, backlog=4096)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps({"requested": played.requested, "deleted": played.deleted}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])))
