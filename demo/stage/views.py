"""The page: what runs on it, what it shows, and what it is told."""

import asyncio
import json
import platform
import re
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from typing import Any

import django
from django import forms
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseRedirect,
    StreamingHttpResponse,
)
from django.shortcuts import render
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils.safestring import SafeString
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST, require_safe

from demo.resources import db, pool, redis
from demo.stage import reports, runs
from demo.stage.buttons import ALONE, ENDINGS, PAIRS, Ending
from demo.stage.pools import stock_pool
from demo.stage.resources import heard
from scoped import spawn

LATEST = "SELECT id, text, posted_at FROM messages ORDER BY id DESC LIMIT 10"
MISSED = "SELECT id, text, posted_at FROM messages WHERE id > $1 ORDER BY id LIMIT 50"
POST = "INSERT INTO messages (text) VALUES ($1) RETURNING id, text, posted_at"

HEARTBEAT = 15  # seconds: shorter than the idle timeouts of proxies

STATIC = {
    name: (content_type, Path(__file__).with_name("static") / name)
    for name, content_type in {"demo.css": "text/css", "demo.js": "text/javascript"}.items()
}


class TextField(forms.CharField):
    def to_python(self, value: str | None) -> str | None:
        # A form sends two characters for the end of a line, for which maxlength counts one. And
        # some charsets a client may name have surrogates, which PostgreSQL's text cannot hold.
        text = (value or "").replace("\r\n", "\n").encode(errors="replace").decode()
        return super().to_python(text)


class MessageForm(forms.Form):
    """Refuses NUL, as every CharField does: PostgreSQL's text cannot hold it."""

    text = TextField(
        label="Message",
        max_length=2000,
        widget=forms.Textarea(attrs={"rows": 1}),
        error_messages={"required": "Write something first."},
    )


class SeeOther(HttpResponseRedirect):
    status_code = 303


def ending(one: Ending) -> Callable[..., Any]:
    """Its view, for POST. It has no token, so that curl can call it: see ``no_other_site``."""
    return csrf_exempt(require_POST(one.view))


@require_safe
async def page(request: HttpRequest) -> HttpResponse:
    return await show(request, MessageForm())


@require_POST
async def post(request: HttpRequest) -> HttpResponse:
    form = MessageForm(request.POST)
    if not form.is_valid():
        return await show(request, form, status=422)
    connection = await db()
    message = await connection.fetchrow(POST, form.cleaned_data["text"])
    await (await redis()).publish("messages", as_json(message))
    return SeeOther(reverse("page"))


@require_GET
async def events(request: HttpRequest) -> HttpResponse | StreamingHttpResponse:
    last_seen = request.headers.get("Last-Event-ID") or request.GET.get("after", "")
    try:
        queue = await heard()
    except reports.TooManyPagesError:
        return HttpResponse("Too many pages are open.", "text/plain", status=503)
    return StreamingHttpResponse(
        stream(queue, last_seen),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


@csrf_exempt
@require_POST
async def run(request: HttpRequest, kind: str) -> HttpResponse:
    if kind not in runs.RUNS:
        raise Http404
    broker, ours, stock = await redis(), await pool(), await stock_pool()
    if runs.Latest.goes_on():
        return HttpResponse("A run is going on already.", "text/plain", status=409)
    address = request.scope["server"]  # where this request came in
    host = request.get_host()

    async def work() -> None:
        await runs.make_equal(ours, stock)
        await runs.RUNS[kind](broker, address, host)

    runs.Latest.task = spawn(work(), name=f"run of {kind}")
    return HttpResponse("Running.", "text/plain", status=202)


@csrf_exempt
@require_POST
async def reset(request: HttpRequest) -> HttpResponse:
    await (await redis()).publish("reset", "")
    return HttpResponse(status=204)


@require_safe
async def static(request: HttpRequest, name: str) -> HttpResponse:
    if name not in STATIC:
        raise Http404
    content_type, path = STATIC[name]
    content = path.read_bytes()  # a few kilobytes, in the system's cache
    return HttpResponse(content, content_type, headers={"Cache-Control": "no-cache"})


async def show(request: HttpRequest, form: MessageForm, status: int = 200) -> HttpResponse:
    # Not through db(), which gives up after a second: whoever opens the page may wait longer.
    messages = await (await pool()).fetch(LATEST)
    context = {
        "form": form,
        "messages": messages,
        "pairs": PAIRS,
        "alone": ALONE,
        "in_runs": sum(ending.is_in_runs for ending in [*PAIRS, *ALONE]),
        "requests": len(runs.mixed_list()),
        "fine": runs.MIX["fine"],
        "code": code(),
        "django": django.get_version(),
        "python": platform.python_version(),
    }
    return render(request, "page.html", context, status=status)


@cache
def code() -> SafeString:
    """The code of all endings, which takes longer to put on a page than all the rest of it."""
    return render_to_string("code.html", {"endings": ENDINGS, "django": django.get_version()})


async def stream(queue: Any, last_seen: str) -> AsyncIterator[str]:
    yield ": subscribed\nretry: 1000\n\n"
    # Heard first: what comes between the two is sent twice rather than never. And not through
    # db(), which would keep a connection for as long as the page is open.
    if re.fullmatch(r"[0-9]{1,18}", last_seen):
        for message in await (await pool()).fetch(MISSED, int(last_seen)):
            yield as_event("messages", as_json(message))
    yield as_event("timeline", await reports.latest(await redis()))
    while True:
        try:
            async with asyncio.timeout(HEARTBEAT):
                heard_now = await queue.get()
        except TimeoutError:
            yield ": still here\n\n"
            continue
        if heard_now is None:  # the server shuts down: the browser asks again in a moment
            return
        yield as_event(*heard_now)


def as_json(message: Any) -> str:
    return json.dumps({**message, "posted_at": message["posted_at"].isoformat()})


def as_event(channel: str, data: str) -> str:
    if channel == "messages":
        return f"id: {json.loads(data)['id']}\ndata: {data}\n\n"
    return f"event: {channel}\ndata: {data}\n\n"
