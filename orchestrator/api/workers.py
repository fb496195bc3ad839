"""Blocking work, done in threads for the event loop."""

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
    """Runs blocking calls, each in a thread of its own.

    A thread takes 0.1 ms to start, and none is left when nothing is asked. They are daemons: asyncio's and AnyIO's pools join
    theirs when the interpreter ends, so one guest that takes an hour to shut down would keep the manager from ending.

    Args:
        limit: how many calls run at a time; the others wait for their turn.
    """

    def __init__(self, limit: int) -> None:
        self._turns = asyncio.Semaphore(limit)

    async def run(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        """Calls ``work`` in a thread; what it raises is raised here. If we are cancelled, a call that has begun goes on to its
        end, and keeps its turn.
        """
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
                pass  # the loop has ended, and nobody waits for this any more

        try:
            threading.Thread(target=call, name=f"api-{getattr(work, '__name__', 'work')}", daemon=True).start()
        except BaseException:
            self._turns.release()
            raise
        try:
            return await future
        finally:
            del future  # an error holds this frame, and the future the error: a circle that would keep the whole request


class WorkersPerClient:
    """Workers for each client: none has to wait because of what others ask for.

    Args:
        limit: how many calls of one client run at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Those that nothing runs in, and that no call waits for, go away by themselves.
        self._workers: WeakValueDictionary[str, Workers] = WeakValueDictionary()

    async def run(self, caller: Identity, work: Callable[..., _Result], *arguments: object) -> _Result:
        """As ``Workers.run``, on behalf of a client."""
        workers = self._workers.setdefault(name_client(caller), Workers(self._limit))
        return await workers.run(work, *arguments)
