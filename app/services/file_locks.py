"""Who may rely on a stored file, and who may remove it: advisory locks on its hash.

Files are shared: equal bytes are one file, whatever jobs they belong to.  Whoever records a
file holds its lock shared until the commit; whoever removes one holds it alone, from asking
whether anybody has it until it is gone.  So a file recorded before is never removed, and one
removed before is missed by its recorder, who looks after the commit and stores it again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta

from sqlalchemy import ARRAY, BigInteger, Executable, bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

_numbers = func.unnest(
    bindparam("numbers", type_=ARRAY(BigInteger(), dimensions=1))
).column_valued("number")
_SHARE = select(func.pg_advisory_xact_lock_shared(_numbers))
_LOCK_SHARED = select(
    func.pg_advisory_lock_shared(bindparam("number", type_=BigInteger()))
)
_UNLOCK_SHARED = select(
    func.pg_advisory_unlock_shared(bindparam("number", type_=BigInteger()))
)
_LOCK = select(func.pg_advisory_lock(bindparam("number", type_=BigInteger())))
_UNLOCK = select(func.pg_advisory_unlock(bindparam("number", type_=BigInteger())))
_LIMIT = select(func.set_config("idle_session_timeout", bindparam("limit"), False))
_NO_LIMIT = select(func.set_config("idle_session_timeout", "0", False))
_MILLISECOND = timedelta(milliseconds=1)

# Far longer than a store takes; PostgreSQL ends the session then.
LONGEST_HOLD = timedelta(seconds=60)


async def share(conn: AsyncConnection, keys: Iterable[str]) -> None:
    """Keep the files from being removed until the transaction ends."""
    await conn.execute(_SHARE, {"numbers": _sorted_numbers(keys)})


@asynccontextmanager
async def alone(conn: AsyncConnection, keys: Iterable[str]) -> AsyncIterator[None]:
    """Keep everybody else from recording or removing the files.

    The connection must be in autocommit and stay with the caller: what is removed meanwhile
    is not in the database, and no transaction should wait for it.
    """
    async with _held(conn, keys, _LOCK, _UNLOCK):
        yield


@asynccontextmanager
async def together(conn: AsyncConnection, keys: Iterable[str]) -> AsyncIterator[None]:
    """Keep the files from being removed, while something is done with them in the store.

    Others may record them, and do the same.  The connection is as for `alone`.
    """
    async with _held(conn, keys, _LOCK_SHARED, _UNLOCK_SHARED):
        yield


@asynccontextmanager
async def _held(
    conn: AsyncConnection, keys: Iterable[str], lock: Executable, unlock: Executable
) -> AsyncIterator[None]:
    numbers = _sorted_numbers(keys)
    try:
        # A process that is frozen or cut off in here must not keep others from these for ever.
        await conn.execute(_LIMIT, {"limit": f"{LONGEST_HOLD // _MILLISECOND}ms"})
        for number in numbers:
            await conn.execute(lock, {"number": number})
        yield
        for number in numbers:
            await conn.execute(unlock, {"number": number})
        await conn.execute(_NO_LIMIT)
    except BaseException:
        await conn.invalidate()  # ending the session lets go of all of them
        raise


def _sorted_numbers(keys: Iterable[str]) -> list[int]:
    """Map keys, which hold the file's hash, to PostgreSQL's signed 64 bits; one order for all."""
    digests = {key.partition("/")[2][:16] for key in keys}
    return sorted(
        int.from_bytes(bytes.fromhex(digest), "big", signed=True) for digest in digests
    )
