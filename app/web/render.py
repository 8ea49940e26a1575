"""Make pages from templates.

What routes of the pages use:

    page(request, "job.html", job=body)            a whole page; extends base.html
    fragment(request, "card.html", job=body)       a piece of one, for htmx to put in
    see_other("/jobs/…")                           303, after a form was taken without JavaScript
    toast(request, "Cancelled.", kind="good")      a note in the corner, for htmx alone

What every template knows besides what it is given:

    caller      `domain.access.Caller`, or None when nobody is signed in
    keys_on     whether one signs in at all
    token()     the hidden field's value: {{ csrf() }} from `forms.html` writes the whole field;
                htmx sends it by itself, as a header
    path        of this request; `origin`: our address as the caller sees it
    is_htmx     whether a piece was asked for
    service     the name of the service
    static_url("app.css"), and the filters below: ago, moment, money, size, span, count

Everything is escaped unless marked `|safe`; a name a template does not know is an error.  The
policy forbids inline scripts and styles: no `<script>` or `<style>` with text, no `style=` and no
`on…=` attributes, no `hx-on`, no `hx-vals="js:…"`, no `[…]` filters in `hx-trigger`.  What a style
attribute would say goes into a class, an SVG attribute (`fill`, `width`: the policy allows those),
or `app.js`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Literal

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from app.api.safe_headers import CSP
from app.domain.access import Caller
from app.web.model_form import slug
from app.web.static_files import static_url

HTMX_REQUEST: Final = "hx-request"
Kind = Literal["good", "bad", "note"]


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whom a page is made for.  `token` gives what their forms must bring back."""

    caller: Caller | None
    keys_on: bool
    token: Callable[[], str]
    picture_sources: tuple[str, ...] = ()


def page(
    request: Request,
    name: str,
    /,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **context: Any,
) -> HTMLResponse:
    """Make a whole page, under the policy of pages, kept by nobody."""
    visitor: Visitor = request.scope["visitor"]
    text = _render(request, visitor, name, context)
    own = {
        CSP: policy(visitor.picture_sources),
        "Cache-Control": "no-store",
        # "null" would be all that forms could say of where they come from.
        "Referrer-Policy": "same-origin",
        "Vary": "Cookie, HX-Request",
    }
    return HTMLResponse(text, status, own | dict(headers or {}))


def fragment(
    request: Request,
    name: str,
    /,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **context: Any,
) -> HTMLResponse:
    """Make a piece of a page; as safe as a page when somebody opens it by itself."""
    return page(request, name, status, headers, **context)


def toast(
    request: Request,
    text: str,
    *,
    kind: Kind = "note",
    title: str | None = None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> HTMLResponse:
    """Say something in the corner of the page, wherever htmx meant to put the answer."""
    aimed = {"HX-Retarget": "#toasts", "HX-Reswap": "beforeend"} | dict(headers or {})
    return fragment(
        request, "toast.html", status, aimed, text=text, kind=kind, title=title
    )


def see_other(path: str) -> Response:
    """Lead a browser on after a form was taken: reloading does not send it again."""
    return Response(
        status_code=303, headers={"Location": path, "Cache-Control": "no-store"}
    )


def is_htmx(request: Request) -> bool:
    """Tell whether a piece is asked for; the way back in a browser's history wants a page."""
    headers = request.headers
    return HTMX_REQUEST in headers and "hx-history-restore-request" not in headers


def policy(picture_sources: tuple[str, ...] = ()) -> str:
    """Say what a page may load and run: what comes from here, and pictures of the store."""
    pictures = " ".join(("'self'", "data:", *picture_sources))
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            f"img-src {pictures}",
            "font-src 'self'",
            "connect-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    )


def _render(
    request: Request, visitor: Visitor, name: str, context: Mapping[str, Any]
) -> str:
    known = {
        "caller": visitor.caller,
        "keys_on": visitor.keys_on,
        "token": visitor.token,
        "path": request.url.path,
        "is_htmx": is_htmx(request),
        "service": request.app.title,
    }
    return _TEMPLATES.get_template(name).render(known | dict(context))


# ------------------------------------------------------------------------------- filters


def moment(value: datetime | str) -> Markup:
    """Write a moment for people and machines; `app.js` says it in the reader's own zone."""
    at = _moment(value)
    return Markup('<time datetime="{}" data-local>{}</time>').format(
        at.isoformat().replace("+00:00", "Z"), f"{at:%-d %b %Y, %H:%M} UTC"
    )


def ago(value: datetime | str, now: datetime | None = None) -> Markup:
    """Write how long ago a moment was; `app.js` keeps it true while the page is open."""
    at = _moment(value)
    seconds = ((now or datetime.now(UTC)) - at).total_seconds()
    return Markup('<time datetime="{}" title="{}" data-ago>{}</time>').format(
        at.isoformat().replace("+00:00", "Z"),
        f"{at:%-d %b %Y, %H:%M} UTC",
        _in_words(seconds),
    )


def _moment(value: datetime | str) -> datetime:
    found = datetime.fromisoformat(value) if isinstance(value, str) else value
    return found.astimezone(UTC)


def _in_words(seconds: float) -> str:
    if seconds < 45:
        return "just now"
    for size, word in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size * 0.95:
            return f"{round(seconds / size)} {word} ago"
    return "1 min ago"


def money(value: Decimal | str | float | None) -> str:
    """Write dollars: cents at least, and no less than there is."""
    if value is None:
        return "unknown"
    amount = Decimal(str(value))
    if amount and amount < Decimal("0.000001"):
        return "under $0.000001"
    text = f"{amount:.6f}".rstrip("0")
    whole, _, part = text.partition(".")
    return f"${int(whole):,}.{part:0<2}"


def size(value: float) -> str:
    """Write a number of bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def span(value: float | timedelta | None) -> str:
    """Write seconds as somebody would say them."""
    if value is None:
        return "–"
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def count(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun: 1 job, 2 jobs."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _open_templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("app.web", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.globals["static_url"] = static_url
    for one in (moment, ago, money, size, span, count, slug):
        environment.filters[one.__name__] = one
    return environment


_TEMPLATES: Final = _open_templates()
