"""Middleware of the demo."""

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseForbidden
from django.utils.decorators import async_only_middleware

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

View = Callable[[HttpRequest], Awaitable[HttpResponseBase]]


@async_only_middleware
def content_security_policy(get_response: View) -> View:
    """Nothing but the page's own files runs, whatever people type."""

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        response = await get_response(request)
        response["Content-Security-Policy"] = POLICY
        return response

    return middleware


@async_only_middleware
def health(get_response: View) -> View:
    """
    ``/health``, by whatever name the process is called, and whatever others do to it: that it
    answers means that it has started, which it does with a pool of connections, and that its
    event loop runs. Servers that are away are the page's to tell.
    """

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        if request.path == "/health":
            return HttpResponse("Healthy.", content_type="text/plain")
        return await get_response(request)

    return middleware


@async_only_middleware
def no_other_site(get_response: View) -> View:
    """
    Nobody's page but ours has a browser end requests here. The endings have no token, so that they
    can be called with curl, too; a browser says where a POST comes from, and curl does not.
    """

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        origin = request.headers.get("Origin")
        is_told = request.method == "POST" and origin is not None
        if is_told and urlsplit(origin).netloc != request.get_host():
            return HttpResponseForbidden("From another site.", content_type="text/plain")
        return await get_response(request)

    return middleware
