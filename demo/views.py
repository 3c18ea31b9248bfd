"""A message wall: read it, write on it, watch it."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

from django import forms
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST, require_safe
from redis.asyncio.client import PubSub

from demo.resources import db, pool, redis, subscription

LATEST = "SELECT id, text, posted_at FROM messages ORDER BY id DESC LIMIT 50"
MISSED = "SELECT id, text, posted_at FROM messages WHERE id > $1 ORDER BY id LIMIT 50"
POST = "INSERT INTO messages (text) VALUES ($1) RETURNING id, text, posted_at"

HEARTBEAT = 15  # seconds: shorter than the idle timeouts of proxies


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


async def show(request: HttpRequest, form: MessageForm, status: int = 200) -> HttpResponse:
    messages = await (await db()).fetch(LATEST)
    return render(request, "wall.html", {"form": form, "messages": messages}, status=status)


async def stream(messages: PubSub, last_seen: str) -> AsyncIterator[str]:
    yield ": subscribed\n\n"
    # Subscribed first: what comes between the two is sent twice rather than never. And not
    # through db(), which would keep a connection for as long as the page is open.
    if re.fullmatch(r"[0-9]{1,18}", last_seen):
        for message in await (await pool()).fetch(MISSED, int(last_seen)):
            yield as_event(as_json(message))
    while True:
        published = await messages.get_message(timeout=HEARTBEAT)
        yield as_event(published["data"]) if published else ": still here\n\n"


def as_json(message: Any) -> str:
    return json.dumps({**message, "posted_at": message["posted_at"].isoformat()})


def as_event(message: str) -> str:
    return f"id: {json.loads(message)['id']}\ndata: {message}\n\n"
