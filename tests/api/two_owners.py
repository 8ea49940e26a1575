"""What one owner has, and how another one asks every route for it.

A recipe is a list of requests with `<job>` and the like in the place of ids.  Each is sent with
the ids of what alice has, and with ids nobody has: the answers must be the same.  A new route
needs one line in `RECIPES`; what stands in its path is filled in by itself (`PLACES`).
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any
from uuid import UUID, uuid4

from PIL import Image
from sqlalchemy import func, insert

from app.api.deps import write_cursor
from app.api.views import etag_of
from app.domain.events import Generated, Refused, Started, Stored
from app.domain.generation import GenerationRequest, RefusalKind
from app.runtime import Runtime
from app.services.job_records import UPLOADS, StoredOutput
from app.services.media_store import StoredFile
from tests.api.keyed import People
from tests.support.hooks import Hooks
from tests.support.jobs import FAILURE, JobTable, new_job

PROMPT = "the secret garden behind the wall"
HOOK = "https://garden.example/webhook"
NOTE = "a note nobody else may read"
KEY = "the-idempotency-key-of-the-garden"
HANDLE = "prediction-of-the-garden"
BODY = {"prompt": PROMPT, "webhook_url": HOOK, "metadata": {"note": NOTE}}

EDITOR = "black-forest-labs/flux-dev"  # takes `image`
_UPLOADED = {"image": "upload:<upload>"}

Values = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a route, and what anybody but the owner hears."""

    status: int
    query: Values = field(default_factory=dict)
    headers: Values = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None


HIDDEN = (Ask(404),)
FORBIDDEN = (Ask(403),)
OPEN = (Ask(200),)

# What a name in a path stands for.
PLACES: Values = {
    "{job_id}": "<job>",
    "{key}": "<file>",
    "{key_id}": "<key>",
    "{upload_id}": "<upload>",
    "{attempt_id}": "<attempt>",
    "{endpoint_id}": "<endpoint>",
    "{delivery_id}": "<delivery>",
}

# Paths below the JSON API's prefix, where they have it.
RECIPES: Mapping[str, tuple[Ask, ...]] = {
    "GET /status/{job_id}": (
        Ask(404),
        Ask(404, {"wait": "0.2"}),
        Ask(404, headers={"If-None-Match": "<etag>"}),
        Ask(404, {"wait": "0.2"}, headers={"If-None-Match": "*"}),
    ),
    "GET /jobs": (
        Ask(200),
        Ask(200, {"cursor": "<cursor>"}),
        Ask(200, {"q": "<prompt>"}),
        Ask(200, {"model": "<model>"}),
        Ask(200, {"status": "completed", "cursor": "<cursor>"}),
        Ask(403, {"owner": "<owner>"}),
        Ask(403, {"owner": "<owner>", "cursor": "<cursor>"}),
    ),
    "POST /generate": (
        Ask(202, headers={"Idempotency-Key": "<once>"}, json=BODY),
        Ask(422, json={"prompt": "a", "retry_of": "<job>"}),
        Ask(422, json={"prompt": "a", "owner": "<owner>"}),
        Ask(422, json=BODY | {"model": EDITOR, "parameters": _UPLOADED}),
        Ask(
            200,
            {"dry_run": "true"},
            json=BODY | {"model": EDITOR, "parameters": _UPLOADED},
        ),
        Ask(200, {"dry_run": "true"}, json={"prompt": "<prompt>"}),
    ),
    "POST /jobs/{job_id}/cancel": HIDDEN,
    "POST /jobs/{job_id}/retry": (
        Ask(404),
        Ask(404, headers={"Idempotency-Key": "<once>"}),
    ),
    "DELETE /jobs/{job_id}": HIDDEN,
    "GET /media/{key}": (
        Ask(404),
        Ask(404, headers={"Range": "bytes=0-3"}),
        Ask(404, headers={"If-None-Match": "*"}),
        Ask(404, {"expires": "9999999999", "signature": "<signature>"}),
    ),
    "HEAD /media/{key}": (Ask(404), Ask(404, headers={"If-None-Match": "*"})),
    "POST /callbacks/replicate/{attempt_id}": (
        Ask(401, {"token": "<token>"}, content=b"{}"),
    ),
    "GET /models": OPEN,
    "GET /health": FORBIDDEN,
    "GET /metrics": FORBIDDEN,
    "GET /health/live": OPEN,
    "GET /health/ready": OPEN,
    "POST /keys": (
        Ask(403, json={"name": "mine", "owner": "<owner>", "scopes": ["admin"]}),
    ),
    "GET /keys": (Ask(403), Ask(403, {"owner": "<owner>"})),
    "GET /keys/{key_id}": FORBIDDEN,
    "PATCH /keys/{key_id}": (Ask(403, json={"name": "mine"}),),
    "DELETE /keys/{key_id}": FORBIDDEN,
    "GET /audit": FORBIDDEN,
    "GET /usage": (
        Ask(200),
        Ask(200, {"by": "day,model,key"}),
        Ask(403, {"by": "owner"}),
        Ask(403, {"owner": "<owner>"}),
    ),
    "POST /uploads": (
        Ask(422, headers={"Content-Type": "image/png"}, content=b"no picture"),
    ),
    "POST /webhooks": (
        Ask(422, json={"url": "http://10.0.0.1/", "description": "<endpoint>"}),
        Ask(422, json={"url": HOOK, "owner": "<owner>"}),
    ),
    "GET /webhooks": (Ask(200), Ask(200, {"cursor": "<cursor>"})),
    "GET /webhooks/secret": OPEN,
    "GET /webhooks/deliveries": (
        Ask(200),
        Ask(200, {"endpoint_id": "<endpoint>"}),
        Ask(200, {"job_id": "<job>"}),
        Ask(200, {"state": "pending"}),
        Ask(200, {"cursor": "<cursor>"}),
        Ask(200, {"cursor": "<delivery cursor>"}),
    ),
    "GET /webhooks/deliveries/{delivery_id}": HIDDEN,
    "POST /webhooks/deliveries/{delivery_id}/redeliver": HIDDEN,
    "GET /webhooks/{endpoint_id}": HIDDEN,
    "GET /webhooks/{endpoint_id}/secret": HIDDEN,
    "POST /webhooks/{endpoint_id}/rotate": HIDDEN,
    "POST /webhooks/{endpoint_id}/test": HIDDEN,
    "POST /webhooks/{endpoint_id}/redeliver": (
        Ask(404, json={"since": "2026-01-01T00:00:00Z", "all": True}),
    ),
    "PATCH /webhooks/{endpoint_id}": (
        Ask(404, json={"enabled": False}),
        Ask(404, json={"url": HOOK, "enabled": True}),
    ),
    "DELETE /webhooks/{endpoint_id}": HIDDEN,
    "GET /uploads/{upload_id}": HIDDEN,
    "DELETE /uploads/{upload_id}": HIDDEN,
}


@dataclass(frozen=True, slots=True)
class Belongings:
    """What alice has: one job in every state, files, an upload, keys, an endpoint.

    `marks` give it away.
    """

    jobs: Mapping[str, UUID]
    files: tuple[str, ...]
    upload: UUID
    attempt: UUID
    token: str
    key: UUID
    signature: str
    endpoint: UUID
    delivery: UUID
    marks: frozenset[str]

    def values(self) -> Iterator[tuple[Values, Values]]:
        """Give what to fill in: once with what is hers, once with what nobody has."""
        jobs, files = list(self.jobs.values()), list(self.files)
        for turn in range(max(len(jobs), len(files))):
            job, file = jobs[turn % len(jobs)], files[turn % len(files)]
            yield self._fill(job, file), self._twin(job, file)

    def _fill(self, job: UUID, file: str) -> Values:
        return {
            "<job>": str(job),
            "<etag>": etag_of(job, 1),
            "<cursor>": write_cursor(job),
            "<file>": file,
            "<signature>": self.signature,
            "<upload>": str(self.upload),
            "<attempt>": str(self.attempt),
            "<token>": self.token,
            "<endpoint>": str(self.endpoint),
            "<delivery>": str(self.delivery),
            "<delivery cursor>": write_cursor(self.delivery),
            "<once>": KEY,
            "<key>": str(self.key),
            "<owner>": "alice",
            "<prompt>": PROMPT,
            "<model>": "garden/own-model",
        }

    def _twin(self, job: UUID, file: str) -> Values:
        """Give neighbours of hers: the same shape, the same place in every order."""
        name, _, extension = file.rpartition(".")
        last = f"{int(name[-1], 16) ^ 1:x}"
        return {
            "<job>": str(_neighbour(job)),
            "<etag>": etag_of(_neighbour(job), 1),
            "<cursor>": write_cursor(_neighbour(job)),
            "<file>": f"{name[:-1]}{last}.{extension}",
            "<signature>": self.signature,
            "<upload>": str(_neighbour(self.upload)),
            "<attempt>": str(_neighbour(self.attempt)),
            "<token>": self.token[::-1],
            "<endpoint>": str(_neighbour(self.endpoint)),
            "<delivery>": str(_neighbour(self.delivery)),
            "<delivery cursor>": write_cursor(_neighbour(self.delivery)),
            "<once>": KEY.replace("garden", "garage"),
            "<key>": str(_neighbour(self.key)),
            "<owner>": "alize",
            "<prompt>": PROMPT.replace("garden", "garage"),
            "<model>": "garage/own-model",
        }


def _neighbour(one: UUID) -> UUID:
    return UUID(int=one.int ^ 1)


def filled(value: Any, values: Values) -> Any:
    """Put ids in their places, however deep."""
    match value:
        case str():
            for place, one in values.items():
                value = value.replace(place, one)
            return value
        case dict():
            return {name: filled(one, values) for name, one in value.items()}
        case list():
            return [filled(one, values) for one in value]
    return value


def drawing(seed: int) -> bytes:
    """Draw a small picture."""
    out = io.BytesIO()
    Image.frombytes("RGB", (8, 8), Random(seed).randbytes(192)).save(out, "PNG")
    return out.getvalue()


async def keep(runtime: Runtime, data: bytes) -> StoredFile:
    """Put a picture into the store."""

    async def stream() -> AsyncIterator[bytes]:
        yield data

    return await runtime.store.put(stream(), max_bytes=10**7)


async def completed_job(jobs: JobTable, file: StoredFile, **fields: Any) -> UUID:
    """Make a job with this file as its output, and nobody to look after it."""
    (job_id,) = await jobs.submit(new_job(**fields))
    await jobs.look(job_id, Started(f"prediction-{job_id.hex[-8:]}"), Generated())
    await jobs.make_due(job_id)
    output = StoredOutput(
        0,
        file.key,
        file.sha256,
        file.content_type,
        file.size_bytes,
        file.width,
        file.height,
    )
    await jobs.settle(await jobs.claim_one(job_id), Stored(1), outputs=[output])
    return job_id


async def add_upload(runtime: Runtime, file: StoredFile, owner: str) -> UUID:
    """Write down that the file came in from an owner."""
    async with runtime.database.begin() as conn:
        return (
            await conn.execute(
                insert(UPLOADS)
                .values(
                    id=uuid4(),
                    owner=owner,
                    key=file.key,
                    sha256=file.sha256,
                    content_type=file.content_type,
                    size_bytes=file.size_bytes,
                    width=file.width,
                    height=file.height,
                    created_at=func.now(),
                    used_at=func.now(),
                )
                .returning(UPLOADS.c.id)
            )
        ).scalar_one()


async def settle_in(people: People) -> Belongings:
    """Give alice one of everything; bob gets a job or two as well."""
    runtime: Runtime = people.api.app.state.runtime
    jobs = JobTable(runtime.database)
    private = {"owner": "alice", "is_public": False, "prompt": PROMPT}
    private |= {"metadata": {"note": NOTE}, "webhook_url": HOOK}

    def asked() -> GenerationRequest:
        return GenerationRequest(
            "garden/own-model", {"prompt": PROMPT, "n": uuid4().hex}
        )

    made = await people.alice.post(
        "/api/v1/generate", json=BODY, headers={"Idempotency-Key": KEY}
    )
    assert made.status_code == 202, made.text
    found = {"pending": UUID(made.json()["job_id"])}
    picture = await keep(runtime, drawing(1))
    found["completed"] = await completed_job(jobs, picture, request=asked(), **private)
    for status in ("processing", "failed", "cancelled"):
        (found[status],) = await jobs.submit(new_job(request=asked(), **private))
    await jobs.look(found["processing"], Started(HANDLE))
    await jobs.look(found["failed"], Refused(RefusalKind.PERMANENT, FAILURE))
    await jobs.cancel(found["cancelled"])
    came_in = await keep(runtime, drawing(2))
    upload_id = await add_upload(runtime, came_in, "alice")
    await people.bob.post("/api/v1/generate", json={"prompt": "a plain field"})
    other = await keep(runtime, drawing(3))
    await completed_job(jobs, other, owner="bob", is_public=False)

    hooks = Hooks(runtime.database)
    endpoint = await hooks.register(HOOK, owner="alice")
    delivery = await hooks.test(endpoint)

    for status, job_id in found.items():
        assert (await jobs.row(job_id)).status == status
    attempt = (await jobs.attempts(found["processing"]))[0]
    link = runtime.links.now().path(picture.key, is_public=False)
    marks = {PROMPT, HOOK, NOTE, HANDLE, attempt.token, str(attempt.id), "alice"}
    marks |= {str(one) for one in found.values()} | {str(upload_id)}
    marks |= {str(endpoint.id), str(delivery), delivery.hex, endpoint.secret}
    marks |= {runtime.owner_secrets.of("alice")[0]}
    marks |= {picture.sha256, came_in.sha256, str(people.keys["alice"].key_id)}
    return Belongings(
        jobs=found,
        files=(picture.key, came_in.key),
        upload=upload_id,
        attempt=attempt.id,
        token=attempt.token,
        key=people.keys["alice"].key_id,
        signature=link.rpartition("=")[2],
        endpoint=endpoint.id,
        delivery=delivery,
        marks=frozenset(marks),
    )
