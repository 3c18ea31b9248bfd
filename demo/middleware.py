"""Middleware of the demo."""

from collections.abc import Awaitable, Callable

from django.http import HttpRequest, HttpResponseBase
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
