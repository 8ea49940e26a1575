"""Verbs on keys and their owners: make, read, change, revoke.  Nothing here commits.

A key is 32 random bytes, told once to whoever makes it.  The table has its SHA-256: a secret
of 256 random bits can neither be guessed nor be found from its hash, so that salt and
stretching would only make every request dearer.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    LargeBinary,
    Row,
    Select,
    Uuid,
    and_,
    bindparam,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import RELAXED
from app.domain.access import Budget, Caller, Limits, Scope
from app.domain.errors import Conflict, NotFound
from app.models.account import APIKey, Owner
from app.services.job_records import table_of

KEYS = table_of(APIKey)
OWNERS = table_of(Owner)

FORM = re.compile(r"mgs_[A-Za-z0-9_-]{43}", re.ASCII)
_VISIBLE = len("mgs_AbCd12")
_USE_NOTED_EVERY = timedelta(minutes=1)

_LIMITS = tuple(Limits.__dataclass_fields__)
_BUDGETS = {name: f"budget_{name}" for name in Budget.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Secret:
    """A key as it is told, once; `str()` and `repr()` do not show it."""

    text: str
    prefix: str
    hash: bytes

    def __repr__(self) -> str:
        return f"Secret({self.prefix}…)"

    @classmethod
    def mint(cls) -> Self:
        """Make a new one."""
        text = f"mgs_{secrets.token_urlsafe(32)}"
        return cls(text, text[:_VISIBLE], digest(text))


def digest(secret: str) -> bytes:
    """Hash a key, as it is stored."""
    return hashlib.sha256(secret.encode()).digest()


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key as it is asked for."""

    id: UUID
    owner: str
    name: str
    scopes: frozenset[Scope]
    expires_at: datetime | None
    limits: Limits
    budget: Budget


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as stored, without its hash; `weight` is its owner's."""

    id: UUID
    owner: str
    name: str
    prefix: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    limits: Limits
    budget: Budget
    weight: int

    @property
    def caller(self) -> Caller:
        """Give whoever bears the key."""
        return Caller(
            owner=self.owner,
            key_id=self.id,
            name=self.name,
            scopes=self.scopes,
            limits=self.limits,
            budget=self.budget,
        )


_is_live = and_(
    KEYS.c.revoked_at.is_(None),
    or_(KEYS.c.expires_at.is_(None), KEYS.c.expires_at > func.clock_timestamp()),
)
_RECORD = select(
    KEYS, func.coalesce(OWNERS.c.weight, 1).label("weight")
).outerjoin_from(KEYS, OWNERS, OWNERS.c.name == KEYS.c.owner)
_FIND_LIVE = _RECORD.where(
    KEYS.c.hash
    == func.any(bindparam("hashes", type_=ARRAY(LargeBinary(), dimensions=1))),
    _is_live,
)
# Rows that somebody else is marking are left to them: nobody waits, nobody deadlocks.
_USED = (
    select(KEYS.c.id)
    .where(
        KEYS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid(), dimensions=1))),
        or_(
            KEYS.c.last_used_at.is_(None),
            KEYS.c.last_used_at < func.now() - literal(_USE_NOTED_EVERY),
        ),
        RELAXED,
    )
    .with_for_update(skip_locked=True)
)
_MARK_USED = update(KEYS).where(KEYS.c.id.in_(_USED)).values(last_used_at=func.now())


async def create(conn: AsyncConnection, key: NewKey, secret: Secret) -> KeyRecord:
    """Make the key with this secret."""
    await conn.execute(
        insert(KEYS).values(
            id=key.id,
            owner=key.owner,
            name=key.name,
            prefix=secret.prefix,
            hash=secret.hash,
            scopes=_words(key.scopes),
            created_at=func.now(),
            expires_at=key.expires_at,
            **_limit_columns({n: getattr(key.limits, n) for n in _LIMITS}),
            **_budget_columns({n: getattr(key.budget, n) for n in _BUDGETS}),
        )
    )
    return await read(conn, key.id)


async def read(conn: AsyncConnection, key_id: UUID) -> KeyRecord:
    """Read the key, live or not; raise `NotFound`."""
    row = (await conn.execute(_RECORD.where(KEYS.c.id == key_id))).one_or_none()
    if row is None:
        raise NotFound("There is no such key.")
    return _record(row)


async def page(
    conn: AsyncConnection, *, owner: str | None, before: UUID | None, limit: int
) -> list[KeyRecord]:
    """List keys, newest first, older than the key `before`; of all owners when None is given."""
    query: Select[Any] = _RECORD.order_by(KEYS.c.id.desc()).limit(limit)
    if owner is not None:
        query = query.where(KEYS.c.owner == owner)
    if before is not None:
        query = query.where(KEYS.c.id < before)
    return [_record(row) for row in await conn.execute(query)]


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to be different about a key: names of fields to their new values.

    `columns` may name `name`, `scopes` and `expires_at`; what is not named stays.
    """

    columns: Mapping[str, Any]
    limits: Mapping[str, Any]
    budget: Mapping[str, Any]


async def change(conn: AsyncConnection, key_id: UUID, changes: Changes) -> KeyRecord:
    """Change a key that is not revoked; raise `NotFound`, `Conflict`.  Safe to repeat."""
    values = dict(changes.columns)
    if "scopes" in values:
        values["scopes"] = _words(values["scopes"])
    values |= _limit_columns(changes.limits) | _budget_columns(changes.budget)
    chosen = select(KEYS.c.revoked_at).where(KEYS.c.id == key_id).with_for_update()
    row = (await conn.execute(chosen)).one_or_none()
    if row is not None and row.revoked_at is not None:
        raise Conflict("The key is revoked, for good: make a new one.")
    if row is not None and values:
        await conn.execute(update(KEYS).where(KEYS.c.id == key_id).values(values))
    return await read(conn, key_id)


async def revoke(conn: AsyncConnection, key_id: UUID) -> KeyRecord | None:
    """End the key's life; None when it had ended before.  Raise `NotFound`."""
    statement = (
        update(KEYS)
        .where(KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None))
        .values(revoked_at=func.now())
    )
    done = await conn.execute(statement)
    record = await read(conn, key_id)
    return record if done.rowcount else None


async def set_weight(conn: AsyncConnection, owner: str, weight: int) -> None:
    """Say how large the owner's share is.  Safe to repeat."""
    statement = upsert(OWNERS).values(name=owner, weight=weight)
    await conn.execute(
        statement.on_conflict_do_update(
            index_elements=[OWNERS.c.name], set_={"weight": weight}
        )
    )


async def find_live(
    conn: AsyncConnection, hashes: Sequence[bytes]
) -> dict[bytes, KeyRecord]:
    """Find the keys with these hashes that are neither revoked nor expired, by hash."""
    rows = await conn.execute(_FIND_LIVE, {"hashes": list(hashes)})
    return {row.hash: _record(row) for row in rows}


async def mark_used(conn: AsyncConnection, key_ids: Sequence[UUID]) -> None:
    """Note that the keys were used just now, unless that was noted a moment ago."""
    await conn.execute(_MARK_USED, {"ids": list(key_ids)})


async def has_live_admin(conn: AsyncConnection) -> bool:
    """Tell whether there is a key with which others can be made."""
    wanted = literal(Scope.ADMIN.value) == func.any(KEYS.c.scopes)
    found = await conn.scalar(select(KEYS.c.id).where(_is_live, wanted).limit(1))
    return found is not None


def _record(row: Row[Any]) -> KeyRecord:
    limits = {name: getattr(row, name) for name in _LIMITS}
    if limits["models"] is not None:
        limits["models"] = frozenset(limits["models"])
    budget = {name: getattr(row, column) for name, column in _BUDGETS.items()}
    return KeyRecord(
        id=row.id,
        owner=row.owner,
        name=row.name,
        prefix=row.prefix,
        scopes=frozenset(Scope(word) for word in row.scopes),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        limits=Limits(**limits),
        budget=Budget(**budget),
        weight=row.weight,
    )


def _words(scopes: frozenset[Scope]) -> list[str]:
    return [scope.value for scope in Scope if scope in scopes]


def _limit_columns(limits: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(limits)
    if values.get("models") is not None:
        values["models"] = sorted(values["models"])
    return values


def _budget_columns(budget: Mapping[str, Any]) -> dict[str, Any]:
    return {_BUDGETS[name]: value for name, value in budget.items()}
