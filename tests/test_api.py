"""The one path everybody walks: a prompt goes in, a picture comes out."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from uuid import UUID

from PIL import Image

from app.core.config import Settings
from app.models import schemas
from tests.api.served import buying_from, provided, served, working


async def test_generate_endpoint(settings: Callable[..., Settings]) -> None:
    async with provided() as sandbox:
        ours = settings(**buying_from(sandbox))
        async with served(ours) as api, working(ours):
            answer = await api.client.post(
                "/api/v1/generate",
                json={
                    "prompt": "a lighthouse at dusk, gentle waves",
                    "aspect_ratio": "16:9",
                    "num_outputs": 2,
                    "output_format": "png",
                    "seed": 42,
                    "metadata": {"campaign": "winter"},
                },
            )

            assert answer.status_code == 202
            accepted = schemas.Job.model_validate_json(answer.content)
            job_id = accepted.job_id
            assert job_id.version == 7
            assert answer.headers["location"] == f"/api/v1/status/{job_id}"
            assert answer.headers["retry-after"] == "1"
            assert (accepted.status, accepted.stage) == ("pending", "queued")
            assert (accepted.version, accepted.attempts) == (1, 0)
            assert accepted.parameters["seed"] == 42
            assert accepted.metadata == {"campaign": "winter"}
            assert accepted.image_path is None

            done = await api.finished(job_id)
            assert (done.status, done.stage, done.error) == ("completed", None, None)
            assert (done.attempts, done.num_outputs) == (1, 2)
            assert done.provider.prediction_id is not None
            assert done.cost_usd is None, "what a sandbox costs is not known"
            assert [output.index for output in done.outputs] == [0, 1]
            assert done.image_path == done.outputs[0].url
            assert done.version > accepted.version
            assert None not in done.timings.model_dump().values()
            for output in done.outputs:
                picture = await api.client.get(output.url)
                assert picture.status_code == 200
                assert picture.headers["content-type"] == output.content_type
                assert hashlib.sha256(picture.content).hexdigest() == output.sha256
                assert len(picture.content) == output.size_bytes
                with Image.open(io.BytesIO(picture.content)) as image:
                    image.load()
                    assert image.format == "PNG"
                    assert image.size == (output.width, output.height)
            assert isinstance(done.job_id, UUID)
