"""Making it go wrong, and healing it: a plan is played against a running system."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
import psycopg
import redis.asyncio
from redis.exceptions import RedisError

from tests.prove.plan import Fault
from tests.prove.system import Part, System, start_server

LONGEST_STOP = 45.0  # seconds from SIGTERM to the end: 20 of draining, and some

Doing = Callable[[Fault], Awaitable[None]]


class Director:
    """Plays plans.  `done` counts faults by kind; `slow_stops` tells who ignored SIGTERM."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.done: Counter[str] = Counter()
        self.slow_stops: list[str] = []
        self._doings: dict[str, Doing] = {
            "part.killed": self._kill,
            "part.frozen": self._freeze,
            "part.frozen_past_its_lease": self._freeze,
            "part.rolled": self._roll,
            "broker.wiped": self._wipe_broker,
            "broker.restarted": self._restart_broker,
            "broker.frozen": self._freeze_broker,
            "database.restarted": self._restart_database,
            "database.killed": self._kill_database,
            "database.sessions_ended": self._end_sessions,
            "wire.refuses": self._refuse,
            "wire.silent": self._silence,
        }

    async def play(self, plan: Sequence[Fault], tell: Callable[[Fault], None]) -> None:
        """Make everything in the plan happen at its time; return when all is healed."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in plan:
                await asyncio.sleep(max(0.0, began + fault.at - time.monotonic()))
                tell(fault)
                self.done[fault.kind] += 1
                group.create_task(self._do(fault))

    async def _do(self, fault: Fault) -> None:
        doing = self._doings.get(fault.kind, self._spoil_provider)
        await doing(fault)

    # ------------------------------------------------------------------------- parts

    async def _kill(self, fault: Fault) -> None:
        part = self._part(fault)
        part.release()
        part.program.kill()
        await asyncio.sleep(fault.lasts)
        part.start()

    async def _freeze(self, fault: Fault) -> None:
        part = self._part(fault)
        if part.program.has_ended():
            return
        part.program.freeze()
        await asyncio.sleep(fault.lasts)
        if not part.program.has_ended():
            part.program.thaw()

    async def _roll(self, fault: Fault) -> None:
        part = self._part(fault)
        part.release()
        try:
            await asyncio.to_thread(
                part.program.end, signal.SIGTERM, within=LONGEST_STOP
            )
        except subprocess.TimeoutExpired:
            self.slow_stops.append(fault.target)
            part.program.kill()
        await asyncio.sleep(fault.lasts)
        part.start()

    def _part(self, fault: Fault) -> Part:
        return self._system.parts[fault.target]

    # ----------------------------------------------------------------------- servers

    async def _wipe_broker(self, fault: Fault) -> None:
        async with redis.asyncio.Redis.from_url(
            self._system.valkey.url, socket_timeout=2
        ) as broker:
            try:
                await broker.flushall()
            except RedisError:
                self.done["broker.wiped (not reached)"] += 1

    async def _restart_broker(self, fault: Fault) -> None:
        await asyncio.to_thread(self._system.valkey.stop)
        await asyncio.sleep(fault.lasts)
        await start_server(self._system.valkey)

    async def _freeze_broker(self, fault: Fault) -> None:
        pid = self._system.valkey.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(fault.lasts)
        os.kill(pid, signal.SIGCONT)

    async def _restart_database(self, fault: Fault) -> None:
        await asyncio.to_thread(self._system.postgres.stop)
        await asyncio.sleep(fault.lasts)
        await start_server(self._system.postgres)

    async def _kill_database(self, fault: Fault) -> None:
        await asyncio.to_thread(self._system.postgres.kill)
        await asyncio.sleep(fault.lasts)
        await start_server(self._system.postgres)

    async def _end_sessions(self, fault: Fault) -> None:
        await asyncio.to_thread(
            end_sessions, self._system.postgres.url, fault.params["share"]
        )

    # ------------------------------------------------------------------------- wires

    async def _refuse(self, fault: Fault) -> None:
        wire = self._system.wires[fault.target]
        await wire.refuse()
        await asyncio.sleep(fault.lasts)
        await wire.restore()

    async def _silence(self, fault: Fault) -> None:
        wire = self._system.wires[fault.target]
        await wire.fall_silent()
        await asyncio.sleep(fault.lasts)
        await wire.restore()

    # ---------------------------------------------------------------------- provider

    async def _spoil_provider(self, fault: Fault) -> None:
        rules = f"{self._system.sandbox_url}/sandbox/faults"
        rule = {"fault": fault.kind.removeprefix("provider."), **fault.params}
        async with aiohttp.ClientSession(raise_for_status=True) as http:
            async with http.post(rules, json=rule) as answer:
                number = (await answer.json())["id"]
            await asyncio.sleep(fault.lasts)
            await http.delete(f"{rules}/{number}")


def end_sessions(database_url: str, share: float) -> None:
    """End a share of the sessions of our processes, as an operator or a failover would."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'mediagen%%' AND random() < %s",
            [share],
        )
