"""The contract of a job's manifest: how its pictures came about, and how to make them again."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from app.models.schemas import Provider, ProvenanceWord, StatusWord


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Replay(_Body):
    """What to send to `POST /generate` for the same again."""

    model: str
    prompt: str
    num_outputs: int
    parameters: dict[str, Any]


class ManifestTimes(_Body):
    """When it happened; null where it did not."""

    created_at: datetime
    started_at: datetime | None
    generated_at: datetime | None
    completed_at: datetime


class ManifestOutput(_Body):
    """One stored file, as it is."""

    index: int
    content_type: str
    size_bytes: int
    width: int
    height: int
    sha256: str = Field(description="Of the stored bytes, the marker included.")
    provenance: ProvenanceWord | None = Field(
        description="`marked`: a marker was added here; `signed`: and credentials; "
        "`present`: it came with a source type, `credentials`: with C2PA credentials, and is"
        " as it came; `none`: it tells nothing; null: from before that was noted."
    )


class Software(_Body):
    """What wrote the manifest."""

    name: str
    version: str


class Manifest(_Body):
    """How the pictures of a finished job came about."""

    manifest_version: Literal[1]
    job_id: UUID
    retry_of: UUID | None
    status: StatusWord
    request: Replay
    fingerprint: str = Field(
        description="SHA-256 over model and input: equal ones ask for the same."
    )
    model: str
    model_version: str | None = Field(
        description="The pinned one; null when the job took whatever was the newest."
    )
    input: dict[str, Any] = Field(
        description="As really sent; pictures by the uploads they are kept as."
    )
    seed: int | None
    provider: Provider
    attempts: int
    times: ManifestTimes
    cost_usd: Decimal | None
    digital_source_type: str = Field(description="IPTC's, of what the model made.")
    outputs: list[ManifestOutput]
    software: Software
