"""Runs blocking calls in threads for the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from orchestrator.api.limits import name_client
from orchestrator.model.access import Identity

_Result = TypeVar("_Result")


class Workers:
    """Runs each call in a new thread, at most ``limit`` at a time; further calls wait.

    A thread takes 0.1 ms to start. Threads are daemons: asyncio's and AnyIO's pools join theirs at exit, so one guest that takes
    an hour to shut down would keep the manager from stopping.
    """

    def __init__(self, limit: int) -> None:
        self._turns = asyncio.Semaphore(limit)

    async def run(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        """Calls ``work`` in a thread; raises what it raises. After a cancellation, a started call continues and counts."""
        await self._turns.acquire()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()

        def settle(future: asyncio.Future[_Result], result: _Result | None, error: BaseException | None) -> None:
            self._turns.release()
            if future.cancelled():
                return
            if error:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def call(future: asyncio.Future[_Result] = future) -> None:
            result, failed = None, None
            try:
                result = work(*arguments)
            except BaseException as error:
                failed = error
            try:
                loop.call_soon_threadsafe(settle, future, result, failed)
            except RuntimeError:
                pass  # the loop has stopped: the result is not needed

        try:
            threading.Thread(target=call, name=f"api-{getattr(work, '__name__', 'work')}", daemon=True).start()
        except BaseException:
            self._turns.release()
            raise
        try:
            return await future
        finally:
            del future  # an error refers to this frame, and the future to the error: a cycle that would keep the request


class WorkersPerClient:
    """Separate workers per client, at most ``limit`` calls of one client at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Entries without calls are garbage-collected.
        self._workers: WeakValueDictionary[str, Workers] = WeakValueDictionary()

    async def run(self, caller: Identity, work: Callable[..., _Result], *arguments: object) -> _Result:
        workers = self._workers.setdefault(name_client(caller), Workers(self._limit))
        return await workers.run(work, *arguments)

    def __len__(self) -> int:
        """The number of clients with calls in progress."""
        return len(self._workers)
