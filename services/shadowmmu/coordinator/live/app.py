"""The live page as a web application: a page, its events, and the same for programs. Everything is read-only.

- `GET /`: the page, one HTML file with its script and style in it
- `GET /events`: server-sent events, see `Feed.events`
- `GET /state`: the run now, a `LiveRun` as JSON
- `GET /metrics`: the same for Prometheus
- `GET /healthz`: 200, as long as the coordinator's loop turns
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Final

import structlog
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shadowmmu.coordinator.live.feed import Feed

__all__ = ["LISTENER_LIMIT", "live_app"]

LISTENER_LIMIT: Final = 64
"""Who wants events when so many have them is answered 503."""

log = structlog.get_logger("shadowmmu.coordinator")

_EVENTS: Final = "text/event-stream"
_COMMON_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def live_app(feed: Feed, allowed_hosts: list[str]) -> Starlette:
    """The application. `allowed_hosts`: what a request's `Host` may be (`*`: anything)."""
    page, policy = _page()

    async def show_page(_request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def show_state(_request: Request) -> Response:
        return Response(feed.state(), media_type="application/json")

    async def show_metrics(request: Request) -> Response:
        text, content_type = feed.metrics(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    async def show_health(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def failed(request: Request, error: Exception) -> Response:
        _log_failure(request.url.path, error)
        return PlainTextResponse("This is a defect of shadowmmu; its log says more.\n", status_code=500)

    return Starlette(
        exception_handlers={Exception: failed},
        routes=[
            Route("/", show_page),
            Route("/events", _Events(feed), methods=["GET"]),
            Route("/state", show_state),
            Route("/metrics", show_metrics),
            Route("/healthz", show_health),
        ],
        middleware=[
            Middleware(_CommonHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False),
        ],
    )


class _Events:
    """The stream of events, for so many clients at once."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._listeners = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response
        if scope["method"] == "HEAD":  # whose answer would end with the run
            response = Response(media_type=_EVENTS)
        elif self._listeners >= LISTENER_LIMIT:
            response = PlainTextResponse("Too many listen already.\n", status_code=503)
        else:
            response = StreamingResponse(self._feed.events(), media_type=_EVENTS)
        self._listeners += 1
        try:
            await response(scope, receive, send)
        except Exception as error:
            _log_failure("/events", error)
            raise
        finally:
            self._listeners -= 1


def _log_failure(path: str, error: Exception) -> None:
    log.error("the live page has failed; the run goes on", path=path, error=repr(error))


class _CommonHeaders:
    """Adds what every answer has, also one that refuses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_COMMON_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _page() -> tuple[str, str]:
    """The page, and the policy under which a browser runs the script and the style in it, and nothing else."""
    folder = files(__package__)
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace("/* page.css */", style).replace("/* page.js */", script)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
