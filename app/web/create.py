"""The first page: the form that makes pictures, above the pictures."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.domain.access import Scope
from app.web.door import PageRoute, needs
from app.web.gallery import gallery_of
from app.web.render import page

router = APIRouter(route_class=PageRoute)


@router.get("/")
@needs(Scope.READ)
async def home(request: Request) -> Response:
    """Show the form, and what was made lately."""
    return page(request, "home.html", **await gallery_of(request))
