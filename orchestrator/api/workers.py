"""Runs blocking calls in threads for the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from orchestrator.api.limits import name_client
from orchestrator.model.access import Identity

_Result = TypeVar("_Result")
# Returns what the thread calls once it is free for other work.
_Job = Callable[[], Callable[[], object]]

IDLE_SECONDS = 1.0


class Threads:
    """Daemon threads that are used again; one without work for ``idle`` seconds ends.

    A new thread costs the event loop 0.3 ms: it waits until the thread runs. Daemons, because asyncio's and AnyIO's pools join
    their threads at exit, so one guest that takes an hour to shut down would keep the manager from stopping.
    """

    def __init__(self, idle: float = IDLE_SECONDS) -> None:
        self._seconds = idle
        self._guard = threading.Lock()
        # The last one is used first, so that the others can end.
        self._idle: list[SimpleQueue[_Job]] = []

    def start(self, name: str, job: _Job) -> None:
        """Calls ``job``, which must not raise, in a thread of this name. Raises RuntimeError if no thread can be started."""
        with self._guard:
            jobs = self._idle.pop() if self._idle else None
        if jobs is None:
            jobs = SimpleQueue()
            threading.Thread(target=self._serve, args=(jobs,), name=name, daemon=True).start()
        jobs.put(job)

    def _serve(self, jobs: SimpleQueue[_Job]) -> None:
        while job := self._wait(jobs):
            report = job()
            del job
            with self._guard:
                self._idle.append(jobs)
            # After that: the event loop finds the thread idle when it gets the result.
            report()
            del report

    def _wait(self, jobs: SimpleQueue[_Job]) -> _Job | None:
        try:
            return jobs.get(timeout=self._seconds)
        except Empty:
            with self._guard:
                if jobs in self._idle:
                    self._idle.remove(jobs)
                    return None
            return jobs.get()  # `start` has just chosen this thread


# Threads that another event loop has started may run on other CPUs (`serving_cpu`).
_THREADS: WeakKeyDictionary[asyncio.AbstractEventLoop, Threads] = WeakKeyDictionary()


class Workers:
    """Runs each call in a thread, at most ``limit`` at a time; further calls wait, and start in the order in which they came."""

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

        def call(future: asyncio.Future[_Result] = future) -> Callable[[], object]:
            threading.current_thread().name = name
            result, failed = None, None
            try:
                result = work(*arguments)
            except BaseException as error:
                failed = error

            def report() -> None:
                try:
                    loop.call_soon_threadsafe(settle, future, result, failed)
                except RuntimeError:
                    pass  # the loop has stopped: the result is not needed

            return report

        name = f"api-{getattr(work, '__name__', 'work')}"
        try:
            (_THREADS.get(loop) or _THREADS.setdefault(loop, Threads())).start(name, call)
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
