"""Turn the files a caller names as a model's inputs into addresses the provider can read.

Runs between the validation of an input and the acceptance of its job (docs/adr/0017).  A picture
by URL or in a data URI is fetched by us, checked like an upload, and kept as one; the provider
never sees a stranger's URL for it.  What comes out is exactly what is sent, and stays so.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

from app.domain.errors import Conflict, InvalidRequest, NotFound, OutputError
from app.domain.generation import JSON, InputFile, MediaClient, ProvidedFile
from app.services.file_inputs import FileInput
from app.services.media_store import MediaStore
from app.services.outbound import Outbound
from app.services.providers.transport import Downloader, DownloadLimits
from app.services.translation import PreparedInput
from app.services.upload_rows import Upload
from app.services.uploads import Uploads

T = TypeVar("T")

LinkOf = Callable[[str, timedelta], str | None]
"""Gives a URL that opens a stored file to anybody for a while; None where there is none."""

UPLOAD: Final = "upload:"
_ADDRESS: Final = re.compile(r"(upload|data|https?):", re.IGNORECASE)
_TEXTS: Final = ("prompt", "negative_prompt")  # may be anything
_MISPLACED: Final = re.compile(rf"{UPLOAD}[0-9a-fA-F-]{{36}}")
FETCH_PATIENCE: Final = timedelta(seconds=15)
_FETCHES: Final = 16  # at once, a process
_OWN_FETCHES: Final = 8  # of them, one owner's: slow servers hold up whoever named them
_MOST_FILES: Final = 20  # of one job; models take up to 14
_KEPT_ADDRESSES: Final = 256


@dataclass(frozen=True, slots=True)
class ResolvedInput:
    """An input as it is sent, and the uploads behind it.

    `uploads` names them by input: `{"image": "<id>"}`; of a list, one for each of its items, with
    None for what was passed on as it came.
    """

    prepared: PreparedInput
    uploads: Mapping[str, JSON]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file stands in an input: `index` in a list, None where there is no list."""

    input: FileInput
    index: int | None

    @property
    def field(self) -> str:
        """Name it as the caller does."""
        end = "" if self.index is None else f".{self.index}"
        return f"parameters.{self.input.name}{end}"


class Inputs:
    """Resolve files in inputs.  One per process."""

    def __init__(
        self,
        *,
        uploads: Uploads,
        store: MediaStore,
        client: MediaClient,
        outbound: Outbound,
        link_of: LinkOf,
        lifetime: timedelta,
        patience: timedelta = FETCH_PATIENCE,
    ) -> None:
        """`lifetime` is how long an address must work at least, where we decide that."""
        self._uploads = uploads
        self._store = store
        self._client = client
        self._outbound = outbound
        self._link_of = link_of
        self._lifetime = lifetime
        self._patience = patience
        self._fetching = asyncio.Semaphore(_FETCHES)
        # Of owners who fetch at the moment: whoever uses one keeps it alive.
        self._own_fetching: WeakValueDictionary[str, asyncio.Semaphore] = (
            WeakValueDictionary()
        )
        limits = DownloadLimits(uploads.max_bytes, total=patience)
        self._downloader = Downloader(
            outbound, limits, max_redirects=0, sessions=outbound.sessions
        )
        self._provided: OrderedDict[str, ProvidedFile] = OrderedDict()

    async def resolve(self, owner: str, prepared: PreparedInput) -> ResolvedInput:
        """Give the input with addresses the provider can read in place of the caller's.

        Fetches, stores and perhaps uploads: not for dry runs.  Buys nothing; may be repeated.
        Raise `InvalidRequest` naming the input, `Unavailable` when a part we need is away.
        """
        _refuse_misplaced(prepared)
        places = _places(prepared.input, prepared.files)
        if not places:
            return ResolvedInput(prepared, {})
        if len(places) > _MOST_FILES:
            raise InvalidRequest(
                f"An input can have {_MOST_FILES} files at most, not {len(places)}.",
                field="parameters",
            )
        fetched = [
            (place, text)
            for place, text in places.items()
            if self._is_ours(place, text)
        ]
        uploads = await self._take_all(owner, dict(fetched))
        addresses = await _all(
            self._address(upload, place.field) for place, upload in uploads.items()
        )
        found = dict(zip(uploads, addresses, strict=True))
        return ResolvedInput(
            replace(prepared, input=_replaced(prepared.input, found)),
            _mapping(prepared.input, uploads),
        )

    async def refresh(
        self, owner: str, model_input: Mapping[str, JSON], uploads: Mapping[str, JSON]
    ) -> Mapping[str, JSON]:
        """Give an old job's input with addresses that work again.

        `uploads` is what `resolve` said then.  Raise `Conflict` when one is not kept any more.
        """
        ids = dict(_ids_of(uploads))
        if not ids:
            return model_input
        known = await self._uploads.use(owner, list(ids.values()))
        found: dict[_Place, str] = {}
        for place, upload_id in ids.items():
            upload = known.get(upload_id)
            if upload is None:
                raise Conflict(_say_gone(place.field))
            try:
                found[place] = await self._address(upload, place.field)
            except InvalidRequest as error:
                raise Conflict(str(error)) from error
        return _replaced(model_input, found)

    # ------------------------------------------------------------------- what was given

    def _is_ours(self, place: _Place, text: str) -> bool:
        """Tell whether we get the file ourselves; raise for what nobody may.

        Files other than pictures are the provider's to fetch: we could not tell good from bad.
        """
        if text.startswith(UPLOAD):
            return True
        if text[:5].lower() == "data:":
            return place.input.is_picture
        self._outbound.check(text, field=place.field)
        return place.input.is_picture

    async def _take_all(
        self, owner: str, places: Mapping[_Place, str]
    ) -> dict[_Place, Upload]:
        """Find or fetch what stands at each place; the same text twice is fetched once."""
        ids = {
            place: _parse_upload(text, place.field)
            for place, text in places.items()
            if text.startswith(UPLOAD)
        }
        known = await self._uploads.use(owner, list(ids.values()))
        found: dict[_Place, Upload] = {}
        for place, upload_id in ids.items():
            upload = known.get(upload_id)
            if upload is None:
                raise InvalidRequest(
                    f"{place.field} names an upload that is not there (any more). Upload the "
                    "file, and use the uri of the answer.",
                    field=place.field,
                )
            found[place] = upload
        first: dict[str, _Place] = {}
        for place, text in places.items():
            if place not in ids:
                first.setdefault(text, place)
        fetched = await _all(
            self._fetch(owner, text, place.field) for text, place in first.items()
        )
        by_text = dict(zip(first, fetched, strict=True))
        return {
            place: found[place] if place in found else by_text[text]
            for place, text in places.items()
        }

    async def _fetch(self, owner: str, text: str, field: str) -> Upload:
        own = self._own_fetching.setdefault(owner, asyncio.Semaphore(_OWN_FETCHES))
        try:
            async with (
                asyncio.timeout(self._patience.total_seconds()),
                own,
                self._fetching,
            ):
                stream = self._downloader.download(text)
                return await self._uploads.take_in(owner, stream, field=field)
        except OutputError as error:
            raise InvalidRequest(
                f"{field} cannot be used: {str(error).rstrip('.')}. "
                "Check the address, or upload the file instead.",
                field=field,
                code="invalid_file",
            ) from error
        except TimeoutError as error:
            raise InvalidRequest(
                f"{field} did not arrive within {self._patience.total_seconds():g} seconds. "
                "Upload the file instead.",
                field=field,
                code="invalid_file",
            ) from error

    # -------------------------------------------------------------------- what is sent

    async def _address(self, upload: Upload, field: str) -> str:
        """Give a URL the provider can read the upload from."""
        try:
            await self._store.head(upload.key)
        except NotFound as error:
            raise InvalidRequest(_say_gone(field), field=field) from error
        link = self._link_of(upload.key, self._lifetime)
        if link is not None:
            return link
        kept = self._provided.get(upload.key)
        if kept is None or not self._lasts(kept):
            with _named(field):
                kept = await self._client.upload(self._file_of(upload))
            self._keep(upload.key, kept)
        return kept.url

    def _lasts(self, file: ProvidedFile) -> bool:
        """Tell whether the provider keeps the file long enough for another job."""
        if file.expires_at is None:
            return False
        return file.expires_at > datetime.now(UTC) + self._lifetime

    def _keep(self, key: str, file: ProvidedFile) -> None:
        self._provided[key] = file
        self._provided.move_to_end(key)
        while len(self._provided) > _KEPT_ADDRESSES:
            self._provided.popitem(last=False)

    def _file_of(self, upload: Upload) -> InputFile:
        name = upload.key.rpartition("/")[2]
        read = partial(self._read, upload.key)
        return InputFile(name, upload.content_type, upload.size_bytes, read)

    async def _read(self, key: str) -> AsyncIterator[bytes]:
        blob = await self._store.open(key)
        async for chunk in blob.stream:
            yield chunk


def _places(
    model_input: Mapping[str, JSON], inputs: Mapping[str, FileInput]
) -> dict[_Place, str]:
    """Find every file named in an input, in the order of the model's inputs."""
    found: dict[_Place, str] = {}
    for name, one in inputs.items():
        value = model_input.get(name)
        if isinstance(value, str) and not one.is_sure and not _ADDRESS.match(value):
            continue
        if isinstance(value, str):
            found[_Place(one, None)] = value
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, str):
                    found[_Place(one, index)] = item
    return found


def _refuse_misplaced(prepared: PreparedInput) -> None:
    """Refuse an upload where the model takes no file: it would be sent as a text."""
    for name, value in prepared.input.items():
        if name in (*prepared.files, *_TEXTS) or not isinstance(value, str):
            continue
        if _MISPLACED.fullmatch(value):
            known = ", ".join(prepared.files) or "none"
            raise InvalidRequest(
                f"parameters.{name} takes no file. Inputs of {prepared.model} that do: "
                f"{known}.",
                field=f"parameters.{name}",
            )


def _replaced(
    model_input: Mapping[str, JSON], addresses: Mapping[_Place, str]
) -> dict[str, JSON]:
    """Write the addresses into a copy of the input."""
    written = dict(model_input)
    for place, address in addresses.items():
        name, index = place.input.name, place.index
        if index is None:
            written[name] = address
            continue
        items = written[name]
        assert isinstance(items, list)
        written[name] = [*items[:index], address, *items[index + 1 :]]
    return written


def _mapping(
    model_input: Mapping[str, JSON], uploads: Mapping[_Place, Upload]
) -> dict[str, JSON]:
    """Name the uploads as they are kept with the job."""
    found: dict[str, JSON] = {}
    for place, upload in uploads.items():
        name, index = place.input.name, place.index
        if index is None:
            found[name] = str(upload.id)
            continue
        given = model_input[name]
        assert isinstance(given, list)
        items = found.setdefault(name, [None] * len(given))
        assert isinstance(items, list)
        items[index] = str(upload.id)
    return found


def with_uploads(
    model_input: Mapping[str, JSON], uploads: Mapping[str, JSON]
) -> Mapping[str, JSON]:
    """Give an input as a caller may send it again: uploads by their names, not by links."""
    names = {place: f"{UPLOAD}{one}" for place, one in _ids_of(uploads)}
    return _replaced(model_input, names)


def _ids_of(uploads: Mapping[str, JSON]) -> Iterator[tuple[_Place, UUID]]:
    """Read back what `_mapping` wrote."""
    for name, value in uploads.items():
        one = FileInput(name, isinstance(value, list), is_picture=True)
        if isinstance(value, str):
            yield _Place(one, None), UUID(value)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, str):
                    yield _Place(one, index), UUID(item)


def _parse_upload(text: str, field: str) -> UUID:
    try:
        return UUID(text.removeprefix(UPLOAD))
    except ValueError:
        raise InvalidRequest(
            f"{field} must be {UPLOAD} and the id of an upload.", field=field
        ) from None


def _say_gone(field: str) -> str:
    return f"The picture of {field} is not kept any more. Upload it again."


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Say which input it was that the provider did not take."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{field} cannot be used: {error}", field=field, code="invalid_file"
        ) from error


async def _all(works: Iterator[Coroutine[Any, Any, T]]) -> list[T]:
    """Do it all at once; the first failure ends the rest."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
