"""The HTTP API from the other side: ask, follow a job to its end, fetch its files.

What `mediagen` and scripts use.  Knows the public contract only, nothing of the service.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote, urljoin, urlsplit
from uuid import uuid4

import httpx

T = TypeVar("T")
Job = dict[str, Any]  # as `models/schemas.py` describes it
Event = dict[str, Any]  # a `JobEvent`, or a `StreamReset`, which has a `reason`

TERMINAL = ("completed", "failed", "cancelled")

_LONG_POLL = 20  # seconds
_UPLOAD = 120
_QUIET = 45  # seconds without so much as a comment: the other side is lost
_BEFORE_COMING_BACK = 1.0  # seconds
_SHORT_POLL = 5  # while a job is pending, for why it waits is no news of the job's own
_TEMPORARY = (502, 503, 504)  # what a proxy, or an API without its database, answers


class Refused(Exception):
    """The API answered with a problem; `str()` is its detail, fit for people.

    `fields` are pairs of the field's name and what is wrong with it.
    """

    def __init__(
        self, status: int, detail: str, fields: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.fields = fields


class NotOurs(Exception):
    """Something answers at this address, but not as our API does."""


class BadKey(ValueError):
    """What was given as a key cannot be one."""


class Client:
    """One running API at `url`; its routes are under `prefix`, and `key` opens them.

    The key is sent to the API's own origin only, wherever files lead: a bucket gets none.
    While a job is followed or files are fetched, an API that is away is asked again for
    `patience` seconds, and `say` is told so.  All verbs raise `Refused`, `NotOurs` and
    `httpx.TransportError`.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "/api/v1",
        *,
        key: str | None = None,
        patience: float = 60,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Raise `ValueError` when `url` is none, `BadKey`.  Nothing is connected yet."""
        if key is not None and not re.fullmatch("[!-~]+", key):
            raise BadKey("has characters that no key has")
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is not an http:// or https:// URL")
        self._root = self.url + prefix
        self._origin = _origin(httpx.URL(self.url))
        self._key = key
        self._patience = patience
        self._say = say
        is_here = parts.hostname in ("127.0.0.1", "::1", "localhost")
        self._http = httpx.Client(
            timeout=httpx.Timeout(10, connect=5, read=_LONG_POLL + 10),
            trust_env=not is_here,  # a proxy to the internet knows nothing of this machine
            headers={"User-Agent": "mediagen-cli"},
            event_hooks={"request": [self._authorize]},  # each redirect is a request
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.close()

    def _authorize(self, request: httpx.Request) -> None:
        if self._key is None:
            return
        ours = f"Bearer {self._key}"
        if _origin(request.url) == self._origin:
            request.headers["Authorization"] = ours
        elif request.headers.get("Authorization") == ours:
            del request.headers["Authorization"]

    # -- asking ------------------------------------------------------------------------------

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask once; return a success with a JSON object or with nothing, or a 304."""
        return _believed(self._http.request(method, self._root + path, **options))

    def generate(self, body: Mapping[str, Any]) -> httpx.Response:
        """Submit a job; once, also when the answer is lost and it has to be asked for again."""
        headers = {"Idempotency-Key": uuid4().hex}

        def submit() -> httpx.Response:
            return self.ask("POST", "/generate", json=body, headers=headers)

        try:
            return submit()
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise  # nobody is there, and nothing was sent
        except httpx.TransportError:
            return self._patiently(submit)

    def upload(self, path: Path) -> str:
        """Send a picture; give the URI that names it in a job.  May be repeated."""
        with path.open("rb") as file:
            form = {"file": (path.name, file, "application/octet-stream")}
            answer = self.ask("POST", "/uploads", files=form, timeout=_UPLOAD)
        return str(answer.json()["uri"])

    def status(self, job_id: str, **options: Any) -> httpx.Response:
        """Read a job."""
        return self.ask("GET", f"/status/{segment(job_id)}", **options)

    def verb(self, job_id: str, verb: str) -> Job:
        """Cancel or retry a job; give the job as it is then."""
        path = f"/jobs/{segment(job_id)}/{verb}"
        job: Job = self.ask("POST", path).json()
        return job

    def follow(self, job: Job, etag: str | None, tell: Callable[[Job], None]) -> Job:
        """Tell every change of a job until it is finished; give it as it is then."""
        tell(job)
        path = str(job["job_id"])
        while job["status"] not in TERMINAL:
            is_pending = job["status"] == "pending"
            wait = _SHORT_POLL if is_pending else _LONG_POLL
            response = self._patiently(self._asking(path, wait, etag))
            if response.status_code == 304 and is_pending:
                response = self._patiently(self._asking(path, 0, None))
            if response.status_code != 304:
                job, etag = response.json(), response.headers.get("etag")
                tell(job)
        return job

    def _asking(
        self, job_id: str, wait: int, etag: str | None
    ) -> Callable[[], httpx.Response]:
        headers = {"If-None-Match": etag} if etag else {}
        params = {"wait": wait} if wait else {}
        return lambda: self.status(job_id, params=params, headers=headers)

    def _patiently(self, action: Callable[[], T]) -> T:
        """Do it again while the API is away: it may be restarting."""
        away_since = None
        pause = 0.1
        while True:
            try:
                result = action()
            except (httpx.TransportError, Refused) as error:
                if isinstance(error, Refused) and error.status not in _TEMPORARY:
                    raise
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    self._say(f"The API is away; asking again for {self._patience:g} s")
                if now - away_since + pause > self._patience:
                    raise
                time.sleep(pause)
                pause = min(pause * 1.5, 2.0)
            else:
                if away_since is not None:
                    self._say("The API is back")
                return result

    # -- events ------------------------------------------------------------------------------

    def events(
        self, job_id: str | None, *, after: str | None = None, owner: str | None = None
    ) -> Iterator[Event]:
        """Give events as they come: a job's up to its end, else all jobs' without end.

        A connection that breaks is opened again, and nothing is missed or told twice.
        """
        path = f"/jobs/{segment(job_id)}/events" if job_id else "/events"
        params = {"owner": owner} if owner else {}
        last_id = after
        while True:
            response = self._patiently(lambda: self._listen(path, params, last_id))
            with closing(response):
                if response.status_code == 204:
                    return
                try:
                    for last_id, data in event_blocks(response.iter_lines(), last_id):
                        if data is None:
                            continue
                        yield data
                        if job_id and data.get("status") in TERMINAL:
                            return
                except httpx.TransportError:
                    pass  # cut off, or quiet for too long
            time.sleep(_BEFORE_COMING_BACK)

    def _listen(
        self, path: str, params: Mapping[str, str], last_id: str | None
    ) -> httpx.Response:
        """Open a stream, to be closed by the caller."""
        request = self._http.build_request(
            "GET",
            self._root + path,
            params=params,
            headers={"Last-Event-ID": last_id} if last_id else {},
            timeout=httpx.Timeout(10, connect=5, read=_QUIET),
        )
        response = self._http.send(request, stream=True)
        kind = response.headers.get("content-type", "")
        if response.status_code == 200 and kind.startswith("text/event-stream"):
            return response
        with closing(response):
            response.read()
            if _believed(response).status_code != 204:
                raise NotOurs
            return response

    # -- files -------------------------------------------------------------------------------

    def address_of(self, output: Mapping[str, Any]) -> str:
        """Give the absolute URL of an output."""
        return urljoin(self.url, str(output["url"]))

    def download(
        self, job: Job, folder: Path
    ) -> Iterator[tuple[Path | None, Mapping[str, Any]]]:
        """Fetch every output into the folder; give each with its path, None when damaged.

        A file is believed when size and SHA-256 are as the API says; a damaged one is fetched
        once more.  A file of another content is never replaced: the new one gets the next
        free name.  Raise `OSError` when the folder does not take it.
        """
        for output in job["outputs"]:
            wanted = folder / file_name(job, output)
            part = folder / f".{wanted.name}.part"
            try:
                is_whole = any(self._fetch_patiently(output, part) for _ in range(2))
                path = _publish(part, wanted, output["sha256"]) if is_whole else None
            finally:
                part.unlink(missing_ok=True)
            yield path, output

    def _fetch_patiently(self, output: Mapping[str, Any], target: Path) -> bool:
        return self._patiently(lambda: self._fetch(output, target))

    def _fetch(self, output: Mapping[str, Any], target: Path) -> bool:
        """Write the bytes; tell whether they are what they should be."""
        digest, size = hashlib.sha256(), 0
        url = self.address_of(output)
        with (
            self._http.stream("GET", url, follow_redirects=True) as response,
            target.open("wb") as file,
        ):
            if response.is_error:
                detail = f"Output {output['index']} cannot be had from {url}"
                raise Refused(response.status_code, detail)
            for chunk in response.iter_bytes():
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        found = (digest.hexdigest(), size)
        return found == (output["sha256"], output["size_bytes"])


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.host, port


def file_name(job: Job, output: Mapping[str, Any]) -> str:
    """Name an output's file for people: prompt, end of the job's id, number."""
    prompt = unicodedata.normalize("NFKC", job["prompt"]).lower()
    slug = re.sub(r"[\W_]+", "-", prompt)[:40].strip("-") or "picture"
    ending = re.search(r"\.[a-z0-9]{1,5}$", urlsplit(output["url"]).path)
    short_id = re.sub(r"\W", "", job["job_id"])[-8:]
    return f"{slug}-{short_id}-{int(output['index'])}{ending[0] if ending else '.bin'}"


def _publish(part: Path, wanted: Path, sha256: str) -> Path:
    """Give a complete file its name, or the next free one."""
    target, number = wanted, 1
    while True:
        try:
            target.open("xb").close()
        except FileExistsError:
            if target.is_file() and _digest(target) == sha256:
                return target
            number += 1
            target = wanted.with_stem(f"{wanted.stem}-{number}")
        else:
            os.replace(part, target)
            return target


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def event_blocks(
    lines: Iterable[str], last_id: str | None
) -> Iterator[tuple[str | None, Event | None]]:
    """Read a stream of events: each block's id and data; None for one that only has an id.

    The last of several lines of data wins: the API sends one.
    """
    data = None
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            yield last_id, None if data is None else json.loads(data)
            data = None
        elif field == "id":
            last_id = value
        elif field == "data":
            data = value


def _believed(response: httpx.Response) -> httpx.Response:
    """Give a success with a JSON object or with nothing, or a 304; raise anything else."""
    if response.status_code in (204, 304):
        return response
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code in _TEMPORARY and not isinstance(body, dict):
        raise Refused(response.status_code, f"{response.reason_phrase}.")
    if not isinstance(body, dict) or response.is_redirect:
        raise NotOurs
    if response.is_error:
        raise _refusal(response.status_code, body)
    return response


def _refusal(status: int, problem: Mapping[str, Any]) -> Refused:
    if not isinstance(problem.get("detail"), str):
        raise NotOurs
    fields = tuple(
        (str(one.get("pointer", "")).strip("/"), str(one.get("detail", "")))
        for one in problem.get("errors") or ()
    )
    return Refused(status, problem["detail"], fields)


def segment(identifier: str) -> str:
    """Keep whatever was typed as an id within its path segment."""
    return quote(identifier, safe="")
