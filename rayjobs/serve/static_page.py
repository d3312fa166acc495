"""The page to try a server in a browser: three files, which ask the API for everything else."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rayjobs.reporting.palette import css

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Path → file and media type."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""A browser runs the page's own script and talks to this server alone."""


def page_routes() -> list[Route]:
    """Return the routes of the page, whose colours are those of reports."""
    texts = {path: (FOLDER / name).read_text(encoding="utf-8") for path, (name, _) in FILES.items()}
    texts["/page.css"] = f"{css()}\n{texts['/page.css']}"
    return [Route(path, _serve(texts[path], kind), methods=["GET"]) for path, (_, kind) in FILES.items()]


def _serve(text: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        return Response(text, media_type=media_type, headers=HEADERS)

    return serve
