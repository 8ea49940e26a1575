"""Equal bytes are one file: deleting one job never takes another one's picture away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.services import file_locks
from app.services.media_store import StoredFile
from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.served import Api, working
from tests.support.waiting import wait_for_async

KEY = f"ab/{'ab' * 32}.png"
OTHER = f"cd/{'cd' * 32}.png"


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Sandbox:
    return shared_sandbox


@pytest.fixture
async def api(shared: Api, sandbox: Sandbox) -> Api:
    return await emptied(shared, sandbox)


@pytest.fixture
def database_url(shared: Api) -> str:
    """The API's database, so that `jobs` are its jobs."""
    return shared.settings.database_url.get_secret_value()


async def test_a_file_deleted_while_another_job_records_it_is_stored_again(
    api: Api,
) -> None:
    """The new job finds the file there; the old one is deleted before the new one settles."""
    async with working(api.settings) as worker:
        old = await api.finished((await api.generate("a quiet harbour")).job_id)
        put = worker.base.store.put
        deleted = asyncio.Event()

        async def put_then_lose(
            stream: AsyncIterator[bytes], **options: Any
        ) -> StoredFile:
            stored = await put(stream, **options)
            if not deleted.is_set():
                deleted.set()
                gone = await api.client.delete(f"/api/v1/jobs/{old.job_id}")
                assert gone.status_code == 204
            return stored

        worker.base.store.put = put_then_lose  # type: ignore[method-assign]
        again = await api.client.post(f"/api/v1/jobs/{old.job_id}/retry")
        assert again.status_code == 202
        new = await api.finished(again.json()["job_id"])

        async def is_there() -> bool:
            picture = await api.client.get(new.outputs[0].url)
            return picture.status_code == 200

        assert deleted.is_set()
        assert [one.sha256 for one in new.outputs] == [
            one.sha256 for one in old.outputs
        ]
        await wait_for_async(is_there, within=5, what="the picture is back")


async def test_a_file_being_removed_cannot_be_recorded(engine: AsyncEngine) -> None:
    async with engine.connect() as plain, engine.connect() as recorder:
        remover = await plain.execution_options(isolation_level="AUTOCOMMIT")
        async with file_locks.alone(remover, [KEY]):
            async with recorder.begin():
                await file_locks.share(recorder, [OTHER])
            recording = asyncio.ensure_future(file_locks.share(recorder, [OTHER, KEY]))
            done, _ = await asyncio.wait((recording,), timeout=0.2)
            assert not done
        await asyncio.wait_for(recording, 5)
        await recorder.rollback()


async def test_recorders_do_not_wait_for_each_other(engine: AsyncEngine) -> None:
    async with engine.begin() as one, engine.begin() as two:
        await file_locks.share(one, [KEY, OTHER])
        await asyncio.wait_for(file_locks.share(two, [OTHER, KEY]), 5)


async def test_a_failed_removal_lets_go_of_the_file(engine: AsyncEngine) -> None:
    with pytest.raises(OSError):
        async with engine.connect() as plain:
            conn = await plain.execution_options(isolation_level="AUTOCOMMIT")
            async with file_locks.alone(conn, [KEY]):
                raise OSError("the disk is gone")
    async with engine.connect() as conn:
        held = await conn.scalar(
            text(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database"
                " = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
        )
    assert held == 0
