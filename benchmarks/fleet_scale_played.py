"""The played manager of fleet_scale.py: for many hosts in one process, what the steps of a guest's job ask of a manager.

    python fleet_scale_played.py FOLDER HOST_JSON COUNT

It is played: it stores guests in memory, checks nothing and starts nothing. Each host has the socket FOLDER/hNNNN.sock. Steps of
bash, which cannot connect to a Unix socket, use port 8000, with the path /hNNNN/v1/... . When it ends, it prints as JSON when
each guest was requested and deleted, in seconds of time.time().
"""

import asyncio
import json
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

PORT = 8000
Guests = dict[str, dict[str, Any]]
_MISSING = {"title": "not found", "status": 404, "detail": "no such guest", "code": "not-found"}


class Played:
    """All hosts, which are equal; ``host`` is the survey of one, as JSON."""

    def __init__(self, host: bytes, names: list[str]) -> None:
        self._host = host
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
            guest = {
                "name": fields["name"],
                "id": fields["id"],
                "state": "running",
                "version": 1,
                "nics": [],
                "cpus": _read_cpus(cpus),
            }
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


async def main(folder: Path, host: bytes, count: int) -> None:
    names = [f"h{number:04}" for number in range(1, count + 1)]
    played, over = Played(host, names), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    for name in names:
        path = folder / f"{name}.sock"
        await asyncio.start_unix_server(partial(played.serve, name), path)
        path.chmod(0o666)
    await asyncio.start_server(partial(played.serve, ""), "127.0.0.1", PORT, backlog=4096)
    print("ready", flush=True)
    await over.wait()
    print(json.dumps({"requested": played.requested, "deleted": played.deleted}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3])))
