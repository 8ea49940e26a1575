"""Jobs as the pages show them: what the JSON API tells, and what a browser needs besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.api.views import job_body, obstacle_to
from app.domain.state import Status
from app.runtime import Runtime
from app.services.job_queries import JobRecord


async def jobs_shown(
    runtime: Runtime, records: Sequence[JobRecord]
) -> list[dict[str, Any]]:
    """Give what templates know of jobs: `views.job_body`, and

    * `is_cancelling`: somebody asked for its end, and the provider has not agreed yet;
    * of every output `small`, the address of a picture for a card, and `srcset`, all sizes there
      are for it.

    Addresses of pictures are paths: a page shows only what comes from its own host.
    """
    # Where PUBLIC_BASE_URL is another name of ours, a browser would refuse what is there.
    addresses = replace(runtime.links.now(), base="")
    obstacle = await obstacle_to(runtime, records)
    return [
        _complete(record, job_body(record, addresses, obstacle)) for record in records
    ]


def _complete(record: JobRecord, body: dict[str, Any]) -> dict[str, Any]:
    is_live = not Status(record.row.status).is_terminal
    return body | {
        "is_cancelling": is_live and record.row.is_cancel_requested,
        "outputs": [_output(output) for output in body["outputs"]],
    }


def _output(output: Mapping[str, Any]) -> dict[str, Any]:
    longest = max(output["width"], output["height"])
    widths: dict[int, str] = {}
    for side, url in output["thumbnails"].items():
        share = min(1.0, int(side) / longest)  # each fits into a square
        widths.setdefault(round(output["width"] * share), url)
    return {
        **output,
        "small": output["thumbnails"]["768"],
        "srcset": ", ".join(f"{url} {width}w" for width, url in widths.items()),
    }
