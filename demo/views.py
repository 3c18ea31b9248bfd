"""A message wall: read it, write on it, watch it."""

import json
import platform
import re
from collections.abc import AsyncIterator
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
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST, require_safe
from redis.asyncio.client import PubSub

from demo import timeline
from demo.buttons import ENDINGS, LOSSES, LOST
from demo.resources import db, pool, redis, subscription

LATEST = "SELECT id, text, posted_at FROM messages ORDER BY id DESC LIMIT 50"
MISSED = "SELECT id, text, posted_at FROM messages WHERE id > $1 ORDER BY id LIMIT 50"
POST = "INSERT INTO messages (text) VALUES ($1) RETURNING id, text, posted_at"

HEARTBEAT = 15  # seconds: shorter than the idle timeouts of proxies

STATIC = {
    "demo.css": ("text/css", Path(__file__).with_name("static") / "demo.css"),
    "demo.js": ("text/javascript", Path(__file__).with_name("static") / "demo.js"),
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
        widget=forms.Textarea(attrs={"rows": 3}),
        error_messages={"required": "Write something first."},
    )


class SeeOther(HttpResponseRedirect):
    status_code = 303


@require_safe
async def wall(request: HttpRequest) -> HttpResponse:
    return await show(request, MessageForm())


@require_POST
async def post(request: HttpRequest) -> HttpResponse:
    form = MessageForm(request.POST)
    if not form.is_valid():
        return await show(request, form, status=422)
    connection = await db()
    message = await connection.fetchrow(POST, form.cleaned_data["text"])
    await (await redis()).publish("messages", as_json(message))
    return SeeOther(reverse("wall"))


@require_GET
async def events(request: HttpRequest) -> StreamingHttpResponse:
    last_seen = request.headers.get("Last-Event-ID") or request.GET.get("after", "")
    return StreamingHttpResponse(
        stream(await subscription(), last_seen),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


@require_POST
async def reset(request: HttpRequest) -> HttpResponse:
    await (await redis()).publish("stock", "reset")
    return HttpResponse(status=204)


@require_safe
async def static(request: HttpRequest, name: str) -> HttpResponse:
    if name not in STATIC:
        raise Http404
    content_type, path = STATIC[name]
    content = path.read_bytes()  # a few kilobytes, in the system's cache
    return HttpResponse(content, content_type, headers={"Cache-Control": "no-cache"})


async def show(request: HttpRequest, form: MessageForm, status: int = 200) -> HttpResponse:
    messages = await (await db()).fetch(LATEST)
    context = {
        "form": form,
        "messages": messages,
        "endings": [(ending, ending.name in LOST) for ending in ENDINGS],
        "losses": LOSSES,
        "django": django.get_version(),
        "python": platform.python_version(),
    }
    return render(request, "wall.html", context, status=status)


async def stream(published: PubSub, last_seen: str) -> AsyncIterator[str]:
    yield ": subscribed\n\n"
    # Subscribed first: what comes between the two is sent twice rather than never. And not
    # through db(), which would keep a connection for as long as the page is open.
    if re.fullmatch(r"[0-9]{1,18}", last_seen):
        for message in await (await pool()).fetch(MISSED, int(last_seen)):
            yield as_event("messages", as_json(message))
    yield as_event("timeline", await timeline.latest(await redis()))
    while True:
        news = await published.get_message(timeout=HEARTBEAT)
        yield as_event(news["channel"], news["data"]) if news else ": still here\n\n"


def as_json(message: Any) -> str:
    return json.dumps({**message, "posted_at": message["posted_at"].isoformat()})


def as_event(channel: str, data: str) -> str:
    if channel == "messages":
        return f"id: {json.loads(data)['id']}\ndata: {data}\n\n"
    return f"event: {channel}\ndata: {data}\n\n"
