"""
Promise 17, the sync world, served by ``scoped.wsgi``: sync resources at the cost of no
event loop, failures seen at the ``yield``, the response known to be sent.
"""

import asyncio
import gc
import os
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import Context, copy_context
from pathlib import Path
from urllib.error import HTTPError
from weakref import ref
from wsgiref.simple_server import WSGIRequestHandler, make_server

import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.core.cache import caches
from django.core.cache.backends.base import BaseCache
from django.core.exceptions import PermissionDenied
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import got_request_exception, request_finished, request_started
from django.http import FileResponse, Http404, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.test import override_settings
from django.urls import path

from scoped import (
    AsyncResourceError,
    NoScopeError,
    ScopeClosedError,
    TeardownError,
    current_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)
from scoped.core import lifespan as lifespans
from scoped.core.current import current
from scoped.core.waits import run_without_loop
from scoped.serving.receivers import connect, open_foreign
from scoped.wsgi import ScopedWSGIHandler, get_wsgi_application
from tests.processes import eventually
from tests.slowness import within
from tests.views import Views
from tests.wsgi_server import call, environ

log: list[str] = []
view = Views()


class logs:  # noqa: N801 (used as a function)
    """What a generator does around its `yield`."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        log.append(f"{self.name} set up")

    def __exit__(self, kind, error, traceback):
        log.append(f"{self.name} saw {kind.__name__}" if kind else f"{self.name} torn down")


@lifespan_scoped
def registry():
    with logs("registry"):
        yield "registry"


@request_scoped
def tenant():
    with logs("tenant"):
        yield "tenant"


@request_scoped(until="response")
def boundary():
    tenant()
    with logs("boundary"):
        yield "boundary"


@request_scoped(until="response")
def broken():
    tenant()
    yield "broken"
    raise ValueError("deferred")


@request_scoped
async def db():
    yield "db"


urlpatterns = [path("async/<name>", view.dispatch), path("<name>", view.dispatch_sync)]


@view
def uses(request):
    return HttpResponse(boundary())


@pytest.fixture(autouse=True)
def _fresh():
    log.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield
    assert current.get() is None
    if lifespan := lifespans.lifespans.get(None):  # else it is kept until the process ends
        run_without_loop(lifespan.close())


@pytest.fixture
def connected():
    """Connect a receiver for the length of a test."""
    pairs = []

    def connect(signal, receiver):
        signal.connect(receiver)
        pairs.append((signal, receiver))

    yield connect
    for signal, receiver in pairs:
        signal.disconnect(receiver)


def get(where, **more):
    status, body = call(ScopedWSGIHandler(), where, **more)
    return int(status.split()[0]), body


# What is torn down, and when


def test_sync_resources_are_torn_down_after_the_body_and_before_it_if_declared_so():
    statuses = []

    def start_response(status, headers):
        log.append(f"sent {status}")
        statuses.append(status)

    body = ScopedWSGIHandler()(environ("/uses"), start_response)
    assert log == ["tenant set up", "boundary set up", "boundary torn down", "sent 200 OK"]
    assert b"".join(body) == b"boundary"
    body.close()
    assert log[4:] == ["tenant torn down"]


def test_each_request_has_its_own_and_the_process_its_lifespan():
    application = ScopedWSGIHandler()
    made = []

    @request_scoped
    def value():
        registry()
        made.append(object())
        return made[-1]

    @view
    def uses_value(request):
        assert value() is value()
        return HttpResponse(registry())

    for _ in range(2):
        assert call(application, "/uses_value") == ("200 OK", b"registry")
    assert made[0] is not made[1]
    assert log == ["registry set up"]


def test_a_generator_is_torn_down_in_its_thread():
    threads = []

    @request_scoped
    def local():
        threads.append(threading.get_ident())
        yield
        threads.append(threading.get_ident())

    @view
    def uses_local(request):
        local()
        return HttpResponse()

    application = ScopedWSGIHandler()
    with ThreadPoolExecutor(2) as pool:
        together = threading.Barrier(2)

        def serve():
            together.wait(5)
            return call(application, "/uses_local")

        for _ in range(5):
            first, second = pool.submit(serve), pool.submit(serve)
            assert first.result()[0] == second.result()[0] == "200 OK"
    assert all(threads.count(thread) % 2 == 0 for thread in set(threads))
    assert threading.get_ident() not in threads


def test_no_event_loop_is_made():
    @view
    def looks(request):
        tenant()
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return HttpResponse(str(threading.active_count()))

    before = threading.active_count()
    assert get("/looks") == (200, str(before).encode())


@pytest.mark.parametrize("status", [204, 304])
def test_a_response_without_a_body(status):
    @view
    def empty(request):
        boundary()
        return HttpResponse(status=status)

    assert get("/empty", REQUEST_METHOD="HEAD") == (status, b"")
    assert log[2:] == ["boundary torn down", "tenant torn down"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_also_as_the_server_sends_it(wrapped):
    class Wrapper:
        def __init__(self, file, block_size):
            self.file = file
            self.close = file.close

        def __iter__(self):
            return iter(self.file)

    @view
    def file(request):
        boundary()
        handle = tempfile.TemporaryFile()  # noqa: SIM115 (the response closes it)
        handle.write(b"file")
        handle.seek(0)
        return FileResponse(handle)

    assert get("/file", **({"wsgi.file_wrapper": Wrapper} if wrapped else {})) == (200, b"file")
    assert log[2:] == ["boundary torn down", "tenant torn down"]


# Failures


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, 500), (Http404, 404), (PermissionDenied, 403)]
)
def test_the_factory_sees_what_the_view_raised(error, status):
    @view
    def raises(request):
        boundary()
        raise error

    assert get("/raises")[0] == status
    assert log[2:] == [f"boundary saw {error.__name__}", f"tenant saw {error.__name__}"]


def forgives(get_response):
    def handle(request):
        return get_response(request)

    handle.process_exception = lambda request, exception: HttpResponse("forgiven")
    return handle


def fails(get_response):
    def handle(request):
        get_response(request)
        raise ValueError

    return handle


def test_also_if_middleware_answers_it_with_a_200():
    @view
    def raises(request):
        boundary()
        raise KeyError

    with override_settings(MIDDLEWARE=[f"{__name__}.forgives"]):
        assert get("/raises") == (200, b"forgiven")
    assert log[2:] == ["boundary saw KeyError", "tenant saw KeyError"]


def test_also_what_middleware_raised():
    with override_settings(MIDDLEWARE=[f"{__name__}.fails"]):
        assert get("/uses")[0] == 500
    assert log[2:] == ["boundary saw ValueError", "tenant saw ValueError"]


def test_a_teardown_that_fails_before_the_response_makes_it_a_500(connected, caplog):
    closed, requests = [], []

    def note(request, **kwargs):
        requests.append(request.path)

    @view
    def breaks(request):
        broken()
        response = HttpResponse("never")
        response._resource_closers.append(lambda: closed.append("closed"))
        return response

    connected(got_request_exception, note)
    status, body = get("/breaks")
    assert status == 500
    assert b"never" not in body
    assert requests == ["/breaks"]
    assert closed == ["closed"]
    assert log == ["tenant set up", "tenant saw TeardownError"]
    [record] = [record for record in caplog.records if record.name == "django.request"]
    assert isinstance(record.exc_info[1], TeardownError)


def test_one_that_fails_after_the_response_is_logged(caplog):
    @request_scoped
    def fails_late():
        yield
        raise ValueError("late")

    @view
    def uses_it(request):
        tenant()
        fails_late()
        return HttpResponse("ok")

    assert get("/uses_it") == (200, b"ok")
    assert "late" in caplog.text
    assert log[-1] == "tenant torn down"


def test_exceptions_that_are_to_propagate_close_the_scope():
    closed = []

    @view
    def raises(request):
        boundary()
        raise ValueError

    @view
    def breaks(request):
        broken()
        response = HttpResponse("never")
        response._resource_closers.append(lambda: closed.append("closed"))
        return response

    with override_settings(DEBUG_PROPAGATE_EXCEPTIONS=True):
        with pytest.raises(ValueError):
            get("/raises")
        assert log[2:] == ["boundary saw ValueError", "tenant saw ValueError"]
        log.clear()
        with pytest.raises(TeardownError):
            get("/breaks")
    assert log == ["tenant set up", "tenant saw TeardownError"]
    assert closed == ["closed"]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("where", ["view", "teardown", "start_response", "request_started"])
def test_what_leaves_djangos_handler_closes_the_scope(where, connected):
    closed = []

    @request_scoped(until="response")
    def stops():
        yield
        raise Stop

    @view
    def leaves(request):
        tenant()
        if where == "view":
            raise Stop
        if where == "teardown":
            stops()
        response = HttpResponse()
        response._resource_closers.append(lambda: closed.append("closed"))
        return response

    def start_response(status, headers):
        raise Stop

    def receiver(**kwargs):
        tenant()
        if where == "request_started":
            raise Stop

    connected(request_started, receiver)
    with pytest.raises(Stop):
        ScopedWSGIHandler()(environ("/leaves"), start_response)
    assert log == ["tenant set up", "tenant saw Stop"]
    assert closed == (["closed"] if where == "teardown" else [])
    assert current.get() is None


def test_a_malformed_request_closes_the_scope(connected):
    def receiver(**kwargs):
        tenant()

    connected(request_started, receiver)
    with pytest.raises(AttributeError):  # Django's
        get("/uses", REQUEST_METHOD=None)
    assert log == ["tenant set up", "tenant saw AttributeError"]


def test_one_that_fails_before_it_has_a_scope_leaves_the_one_around_it_alone():
    @view
    def outer(request):
        tenant()
        with pytest.raises(UnicodeDecodeError):  # Django's
            get("/uses", SCRIPT_NAME="\xff")
        assert current_scope().request is request
        return HttpResponse(boundary())

    assert get("/outer") == (200, b"boundary")
    assert log[2:] == ["boundary torn down", "tenant torn down"]


# Streams


def test_a_stream_keeps_its_resources_to_its_end_but_not_what_lives_until_the_response():
    @view
    def streams(request):
        boundary()

        def body():
            with pytest.raises(ScopeClosedError, match="before the first byte"):
                boundary()
            yield tenant()
            log.append("streamed")

        return StreamingHttpResponse(body())

    assert get("/streams") == (200, b"tenant")
    assert log[2:] == ["boundary torn down", "streamed", "tenant torn down"]


def test_the_factory_sees_what_the_stream_raised():
    @view
    def streams(request):
        def body():
            yield tenant()
            raise KeyError

        return StreamingHttpResponse(body())

    with pytest.raises(KeyError):
        get("/streams")
    assert log == ["tenant set up", "tenant saw KeyError"]


def test_a_stream_that_the_server_gives_up_is_no_failure_and_is_closed():
    """The client has gone: PEP 3333 has the server call close()."""

    @view
    def streams(request):
        def body():
            try:
                while True:
                    yield tenant()
            finally:
                log.append("stream closed")

        return StreamingHttpResponse(body())

    for asked_for in (0, 2):
        log.clear()
        body = ScopedWSGIHandler()(environ("/streams"), lambda status, headers: None)
        chunks = iter(body)
        for _ in range(asked_for):
            next(chunks)
        del chunks
        body.close()
    assert log == ["tenant set up", "stream closed", "tenant torn down"]


def test_a_stream_that_something_else_takes_the_place_of_is_no_failure():
    """As what is around the application may do, while the request goes on."""

    @view
    def streams(request):
        def body():
            while True:
                yield tenant()

        return StreamingHttpResponse(body())

    body = ScopedWSGIHandler()(environ("/streams"), lambda status, headers: None)
    next(iter(body))
    body.streaming_content = [b"enough"]
    assert list(body) == [b"enough"]
    body.close()
    assert log == ["tenant set up", "tenant torn down"]


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume asynchronous iterators")
def test_the_factory_sees_what_an_async_stream_raised():
    @view
    def streams(request):
        async def body(name):
            yield name
            if request.GET:
                raise KeyError

        return StreamingHttpResponse(body(tenant()))

    assert get("/streams") == (200, b"tenant")
    assert log == ["tenant set up", "tenant torn down"]
    log.clear()
    with pytest.raises(KeyError):
        get("/streams", QUERY_STRING="raises")
    assert log == ["tenant set up", "tenant saw KeyError"]


def test_an_async_stream_that_is_given_up_is_no_failure():
    """By who iterates over it in async code of a thread."""

    @view
    def streams(request):
        async def body(name):
            while True:
                yield name

        return StreamingHttpResponse(body(tenant()))

    async def first(parts):
        part = await anext(parts)
        await parts.aclose()
        return part

    response = ScopedWSGIHandler()(environ("/streams"), lambda status, headers: None)
    assert asyncio.run(first(response._iterator)) == b"tenant"
    response.close()
    assert log == ["tenant set up", "tenant torn down"]


# Several at once in one thread, as a server may take them that waits for its sockets


@request_scoped
def own():
    name = current_scope().request.GET["name"]
    with logs(name):
        yield name


def answer_to(name):
    where = environ("/several", QUERY_STRING=f"name={name}")
    return ScopedWSGIHandler()(where, lambda status, headers: None)


@pytest.mark.parametrize("first", ["one", "two"])
def test_whichever_response_is_closed_first_ends_its_own_request(first):
    @view
    def several(request):
        own()
        if request.GET["name"] == "two":
            raise Http404
        return HttpResponse()

    responses = {name: answer_to(name) for name in ("one", "two")}
    assert log == ["one set up", "two set up"]
    log.clear()
    last = ({*responses} - {first}).pop()
    seen = {"one": "one torn down", "two": "two saw Http404"}
    responses[first].close()
    assert log == [seen[first]]
    responses[last].close()
    assert log == [seen[first], seen[last]]
    assert current.get() is None


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume asynchronous iterators")
def test_each_stream_sees_what_is_its_own_requests(is_async):
    @view
    def several(request):
        def body():
            for _ in range(2):
                yield own()

        async def body_async():
            for _ in range(2):
                yield own()

        return StreamingHttpResponse(body_async() if is_async else body())

    one, two = answer_to("one"), answer_to("two")
    parts = iter(one), iter(two)
    assert [next(parts[turn]) for turn in (0, 1, 0, 1)] == [b"one", b"two", b"one", b"two"]
    one.close()
    assert log == ["one set up", "two set up", "one torn down"]
    two.close()
    assert log[3:] == ["two torn down"]


@pytest.mark.parametrize("has_its_own", [False, True])
def test_a_response_may_be_closed_in_another_thread(has_its_own):
    class Response(HttpResponse):
        def close(self):
            log.append(f"close() sees {own()}")
            super().close()

    @view
    def several(request):
        return (Response if has_its_own else HttpResponse)(own())

    answer = Context().run(answer_to, "one")
    with ThreadPoolExecutor(1) as executor:
        executor.submit(answer.close).result()
        assert executor.submit(current.get).result() is None
    assert log == ["one set up", *["close() sees one"] * has_its_own, "one torn down"]


def test_a_response_that_is_served_again_ends_the_request_that_it_then_answers():
    class Response(HttpResponse):
        def close(self):
            log.append(f"close() sees {own()}")
            super().close()

    response = Response()

    @view
    def several(request):
        own()
        return response

    for name in ("one", "two"):
        answer = Context().run(answer_to, name)
        Context().run(answer.close)
        assert log == [f"{name} set up", f"close() sees {name}", f"{name} torn down"]
        log.clear()


class Closes(HttpResponse):
    def close(self):
        log.append("its own close()")
        super().close()


@pytest.mark.parametrize("kind", [HttpResponse, Closes])
@pytest.mark.parametrize("first", ["one", "two"])
def test_one_response_that_several_requests_share_ends_each_of_them(kind, first):
    """As a module's own does: "down for maintenance"."""
    shared = kind("down", status=503)

    @view
    def several(request):
        own()
        return shared

    contexts = {name: copy_context() for name in ("one", "two")}
    answers = {name: context.run(answer_to, name) for name, context in contexts.items()}
    last = ({*answers} - {first}).pop()
    assert {answer.status_code for answer in answers.values()} == {503}
    for name in (first, last):
        contexts[name].run(answers[name].close)
    ends = [line for line in log if line.endswith("torn down")]
    assert ends == [f"{first} torn down", f"{last} torn down"]
    assert log.count("its own close()") == (2 if kind is Closes else 0)
    log.clear()
    again = Context().run(answer_to, "one")
    Context().run(again.close)
    assert log[-1] == "one torn down"


@pytest.mark.parametrize("fails", [False, True])
def test_a_response_that_middleware_closes_and_replaces_is_no_end(fails, monkeypatch):
    def middleware(get_response):
        def replaces(request):
            get_response(request).close()
            log.append(f"closed, and there is still the {tenant()}")
            if fails:
                raise ValueError
            return HttpResponse("another")

        return replaces

    monkeypatch.setitem(globals(), "replaces", middleware)
    with override_settings(MIDDLEWARE=[f"{__name__}.replaces"]):
        assert get("/uses")[0] == (500 if fails else 200)
    end = "saw ValueError" if fails else "torn down"
    assert log == [
        "tenant set up",
        "boundary set up",
        "closed, and there is still the tenant",
        f"boundary {end}",
        f"tenant {end}",
    ]


class Parts(HttpResponseBase):
    streaming = True

    def __iter__(self):
        yield from (b"a", b"b")


class Lazy(StreamingHttpResponse):
    @property
    def streaming_content(self):
        return iter((b"a", b"b"))

    @streaming_content.setter
    def streaming_content(self, value): ...


@pytest.mark.parametrize("kind", [Parts, Lazy])
def test_a_stream_of_a_class_of_its_own(kind):
    @view
    def own_class(request):
        tenant()
        return kind()

    assert get("/own_class") == (200, b"ab")
    assert log == ["tenant set up", "tenant torn down"]


def test_where_somebody_has_disconnected_what_opens_the_scope_all_else_works():
    @view
    def fine(request):
        with pytest.raises(NoScopeError):
            tenant()
        return HttpResponse("fine")

    handler = ScopedWSGIHandler()
    request_started.disconnect(open_foreign)
    try:
        assert call(handler, "/fine") == ("200 OK", b"fine")
    finally:
        connect()


# Async ones


@pytest.mark.parametrize("where", ["/async/asks", "/asks_sync"])
def test_an_async_resource_is_refused_in_words_that_say_what_to_do(where):
    refused = []

    @view
    async def asks(request):
        with pytest.raises(AsyncResourceError) as caught:
            await db()
        refused.append(str(caught.value))
        return HttpResponse(tenant())

    @view
    def asks_sync(request):
        with pytest.raises(AsyncResourceError) as caught:
            async_to_sync(db)()
        refused.append(str(caught.value))
        with pytest.raises(AsyncResourceError) as caught:
            db.get_nowait()
        refused.append(str(caught.value))
        return HttpResponse(tenant())

    assert get(where) == (200, b"tenant")
    for message in refused:
        assert "opened by sync code, which has no event loop to keep it in" in message
        assert "serve the project over ASGI" in message
        assert "plain `def`" in message
    assert log == ["tenant set up", "tenant torn down"]


# What belongs to the request


def test_the_scope_knows_its_request_and_forgets_it_at_the_end():
    seen = []

    @view
    def looks(request):
        assert current_scope().request is request
        seen.append(current_scope())
        with request_scope() as inner:
            assert inner.request is None
        return HttpResponse()

    get("/looks")
    assert seen[0].request is None
    assert str(seen[0]) == "the request GET /looks"


def test_receivers_of_request_finished_find_the_scope_closed(connected):
    def ask(**kwargs):
        with pytest.raises(NoScopeError):
            tenant()
        log.append("asked")

    connected(request_finished, ask)
    get("/uses")
    assert log[2:] == ["boundary torn down", "tenant torn down", "asked"]


# The end of a response: what Django's own close() does


@pytest.mark.parametrize("way", [WSGIHandler, ScopedWSGIHandler])
@pytest.mark.parametrize("fails", [False, True])
def test_receivers_of_request_finished_are_called_as_djangos_own_close_calls_them(
    way, fails, connected
):
    """In their order, and none after the one that raises."""

    def first(**kwargs):
        del kwargs["signal"]
        log.append(("first", kwargs))
        if fails:
            raise ValueError("of a receiver")

    async def asynchronous(**kwargs):
        del kwargs["signal"]
        log.append(("async", kwargs))

    def last(**kwargs):
        log.append("last")

    @view
    def plain(request):
        response = HttpResponse("plain")
        response._resource_closers.append(lambda: log.append("closed"))
        return response

    def serve():
        with pytest.raises(ValueError, match="of a receiver") if fails else nullcontext():
            call(way(), "/plain")

    told = {"sender": way}
    connected(request_finished, first)
    connected(request_finished, last)
    for _ in range(2):
        serve()
        assert log == ["closed", ("first", told), *([] if fails else ["last"])]
        log.clear()
    connected(request_finished, asynchronous)
    serve()
    assert log == ["closed", ("first", told), *([] if fails else ["last", ("async", told)])]


class Closing(BaseCache):
    """A cache that is connected to something."""

    def __init__(self, *args):
        super().__init__({})

    def close(self):
        log.append("cache closed")


def test_caches_are_closed_after_each_request_where_that_does_anything():
    @view
    def uses_the_cache(request):
        return HttpResponse(caches["default"].default_timeout)

    application = ScopedWSGIHandler()
    for backend, closed in [
        (f"{__name__}.Closing", ["cache closed", "cache closed"]),
        ("django.core.cache.backends.locmem.LocMemCache", []),
        (f"{__name__}.Closing", ["cache closed", "cache closed"]),
    ]:
        with override_settings(CACHES={"default": {"BACKEND": backend}}):
            for _ in range(2):
                assert call(application, "/uses_the_cache") == ("200 OK", b"300")
            assert log == closed
        log.clear()  # of what the end of the settings closes, too


@pytest.mark.parametrize("kind", [HttpResponse, StreamingHttpResponse])
def test_a_response_that_is_closed_waits_for_no_garbage_collector(kind):
    served = []

    @view
    def plain(request):
        response = kind([b"plain"])
        served.append(ref(response))
        return response

    gc.disable()
    try:
        assert get("/plain") == (200, b"plain")
        assert served[0]() is None
    finally:
        gc.enable()


def test_a_response_that_is_closed_again_is_so_as_under_django(connected):
    def finished(**kwargs):
        log.append("finished")

    connected(request_finished, finished)
    body = ScopedWSGIHandler()(environ("/uses"), lambda status, headers: None)
    body.close()
    assert log[2:] == ["boundary torn down", "tenant torn down", "finished"]
    body.close()
    assert log[5:] == ["finished"]


class Other(ScopedWSGIHandler):
    pass


@pytest.mark.parametrize("first", [ScopedWSGIHandler, Other])
def test_a_response_that_is_served_while_it_is_served_ends_each_request(first):
    """As one that a module holds, in two threads."""
    kept = HttpResponse("kept")

    @view
    def keeps(request):
        tenant()
        return kept

    context = copy_context()
    body = context.run(first(), environ("/keeps"), lambda status, headers: None)
    assert get("/keeps") == (200, b"kept")
    assert log == ["tenant set up", "tenant set up", "tenant torn down"]
    if first is Other:
        body._handler_class = Other  # which Django has forgotten
    context.run(body.close)
    assert log[3:] == ["tenant torn down"]


def test_a_request_inside_a_request():
    @view
    def outer(request):
        assert boundary() == "boundary"
        outside = current_scope()
        assert get("/uses") == (200, b"boundary")
        with override_settings(DEBUG_PROPAGATE_EXCEPTIONS=True):
            with pytest.raises(KeyError):
                get("/nothing_here")
        assert call(WSGIHandler(), "/plain") == ("200 OK", b"plain")
        assert current_scope() is outside
        log.append("inner ended")
        return HttpResponse(boundary())

    @view
    def plain(request):
        return HttpResponse("plain")

    assert get("/outer") == (200, b"boundary")
    assert log == [
        *("tenant set up", "boundary set up"),
        *("tenant set up", "boundary set up", "boundary torn down", "tenant torn down"),
        "inner ended",
        *("boundary torn down", "tenant torn down"),
    ]


@pytest.mark.parametrize("handler", [ScopedWSGIHandler, WSGIHandler])
def test_what_the_server_never_closes_is_collected_and_says_so(handler):
    """Against PEP 3333. The next request in that thread has a Context where it is current still."""
    values = []

    class Value:
        pass

    @request_scoped
    def value():
        registry()
        value = Value()
        values.append(ref(value))
        yield value

    @view
    def uses_value(request):
        value()
        return HttpResponse()

    def serve(application):
        for _ in range(4):
            list(application(environ("/uses_value"), lambda *_: None))
        gc.collect()
        assert [one() is None for one in values] == [True, True, True, False]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        copy_context().run(serve, handler())
        gc.collect()
    assert [one() for one in values] == [None] * 4
    told = [str(one.message) for one in caught if one.category is ResourceWarning]
    assert len(told) == 4
    assert "the request GET /uses_value was never closed" in told[0]


@pytest.mark.parametrize("handler", [ScopedWSGIHandler, WSGIHandler])
def test_one_that_is_closed_after_the_next_has_ended_is_kept_until_then(handler):
    def serve():
        application = handler()
        mine = environ("/uses_tenant")  # as a middleware may call twice with one
        late = [application(mine, lambda *_: None) for _ in range(2)]
        assert call(application, "/uses_tenant") == ("200 OK", b"tenant")
        gc.collect()
        assert log == [*["tenant set up"] * 3, "tenant torn down"]
        while late:
            late.pop().close()
        assert current.get() is None

    @view
    def uses_tenant(request):
        return HttpResponse(tenant())

    copy_context().run(serve)
    assert log[4:] == ["tenant torn down"] * 2


def test_a_subclass_ends_its_responses_too():
    class Handler(ScopedWSGIHandler):
        pass

    assert call(Handler(), "/uses") == ("200 OK", b"boundary")
    assert log[2:] == ["boundary torn down", "tenant torn down"]


def test_get_wsgi_application_is_one():
    assert isinstance(get_wsgi_application(), ScopedWSGIHandler)


# A real transaction


def test_a_commit_that_fails_gives_the_client_a_500_and_no_row(postgres_url):
    @lifespan_scoped
    def connection():
        with psycopg.connect(postgres_url) as connection:
            connection.execute(
                "CREATE TEMPORARY TABLE entry (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
            )
            connection.commit()
            yield connection

    @request_scoped(until="response")
    def transaction():
        with connection().transaction():
            yield connection()

    def insert(request):
        for number in request.GET.getlist("n"):
            transaction().execute("INSERT INTO entry VALUES (%s)", [number])

    @view
    def inserts(request):
        insert(request)
        return HttpResponse("inserted")

    @view
    def not_found(request):
        insert(request)
        raise Http404

    @view
    def rows(request):
        found = transaction().execute("SELECT n FROM entry ORDER BY n").fetchall()
        return HttpResponse(" ".join(str(n) for (n,) in found))

    assert get("/inserts", QUERY_STRING="n=1&n=2") == (200, b"inserted")
    assert get("/inserts", QUERY_STRING="n=3&n=3")[0] == 500
    assert get("/not_found", QUERY_STRING="n=4")[0] == 404
    assert get("/rows") == (200, b"1 2")


# Under servers


SITE = """
import os, sys, threading

from django.conf import settings
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={},
    INSTALLED_APPS=[],
    ROOT_URLCONF="site_under_test",
    SECRET_KEY="tests",
    WSGI_APPLICATION="site_under_test.application",
    USE_TZ=True,
)

from scoped import AsyncResourceError, lifespan_scoped, request_scoped
from scoped.wsgi import get_wsgi_application


def say(*words):
    line = " ".join(map(str, words)) + "\\n"
    with open(os.environ["LOG"], "a") as file:
        file.write(line)


@lifespan_scoped
def registry():
    say("registry", os.getpid(), "set up")
    yield os.getpid()
    say("registry", os.getpid(), "torn down")


@request_scoped
def tenant():
    thread = threading.get_ident()
    say("tenant set up")
    try:
        yield "tenant"
    except Exception as error:
        say("tenant saw", type(error).__name__)
        raise
    finally:
        say("tenant torn down", "in its thread" if thread == threading.get_ident() else "elsewhere")


@request_scoped(until="response")
def broken():
    yield
    raise ValueError


@request_scoped
async def db():
    yield


def index(request):
    tenant()
    return HttpResponse(str(registry()))


def raises(request):
    tenant()
    raise Http404


def breaks(request):
    tenant()
    broken()
    return HttpResponse("never")


def streams(request):
    def body():
        yield "one "
        yield tenant()

    return StreamingHttpResponse(body())


async def asks(request):
    try:
        await db()
    except AsyncResourceError as error:
        return HttpResponse(str(error))


urlpatterns = [
    path("", index),
    path("raises", raises),
    path("breaks", breaks),
    path("streams", streams),
    path("asks", asks),
]
application = get_wsgi_application()
if "WARM_UP" in os.environ:  # before gunicorn forks
    from tests.wsgi_server import call

    call(application)
"""


class Site:
    """The project above in a process of its own, served by a command."""

    def __init__(self, folder, command, **environment):
        self.folder = folder
        (folder / "site_under_test.py").write_text(SITE)
        self.log = folder / "log"
        self.log.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        root = Path(__file__).parent.parent
        self.output = (folder / "output").open("w+b")
        self.process = subprocess.Popen(
            [part.replace("PORT", str(self.port)) for part in command],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": f"{folder}:{root}", "LOG": str(self.log)}
            | {"DJANGO_SETTINGS_MODULE": ""}
            | environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self):
        eventually(self.answers, 20)
        return self

    def __exit__(self, *exc_info):
        self.stop()
        self.output.close()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(within(10))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def answers(self):
        if self.process.poll() is not None:
            self.output.seek(0)
            raise AssertionError(self.output.read().decode())
        try:
            socket.create_connection(("127.0.0.1", self.port), within(1)).close()
        except OSError:
            return False
        return True

    def get(self, where=""):
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/{where}", timeout=within(10)
            ) as it:
                return it.status, it.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    @property
    def lines(self):
        return self.log.read_text().splitlines()

    def of_tenant(self):
        return [line for line in self.lines if line.startswith("tenant")]


def check(site):
    """What every server must do."""
    assert site.get()[0] == 200
    assert site.get("raises")[0] == 404
    assert site.get("breaks")[0] == 500
    assert site.get("streams") == (200, "one tenant")
    status, message = site.get("asks")
    assert status == 200
    assert "serve the project over ASGI" in message
    eventually(lambda: len(site.of_tenant()) == 10)
    assert site.of_tenant() == [
        *("tenant set up", "tenant torn down in its thread"),
        *("tenant set up", "tenant saw Http404", "tenant torn down in its thread"),
        *("tenant set up", "tenant saw TeardownError", "tenant torn down in its thread"),
        *("tenant set up", "tenant torn down in its thread"),
    ]


PYTHON = [sys.executable, "-X", "dev", "-W", "error"]


def test_under_wsgiref():
    """In a thread here, for it is the standard library's."""

    class Quiet(WSGIRequestHandler):
        def log_message(self, *arguments):
            pass

    @view
    def raises(request):
        tenant()
        raise Http404

    @view
    def streams(request):
        return StreamingHttpResponse(iter([tenant(), "!"]))

    with make_server("127.0.0.1", 0, ScopedWSGIHandler(), handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            for where, expected in [("uses", 200), ("raises", 404), ("streams", 200)]:
                url = f"http://127.0.0.1:{server.server_port}/{where}"
                try:
                    with urllib.request.urlopen(url, timeout=within(5)) as response:
                        status = response.status
                        response.read()
                except HTTPError as error:
                    status = error.code
                    error.close()
                assert status == expected
        finally:
            server.shutdown()
            thread.join()
    assert log == [
        *("tenant set up", "boundary set up", "boundary torn down", "tenant torn down"),
        *("tenant set up", "tenant saw Http404"),
        *("tenant set up", "tenant torn down"),
    ]


def test_under_runserver(tmp_path):
    program = (
        "import site_under_test; from django.core.management import execute_from_command_line; "
        "execute_from_command_line(['manage.py', 'runserver', '--noreload', '127.0.0.1:PORT'])"
    )
    with Site(tmp_path, [*PYTHON, "-c", program]) as site:
        check(site)


@pytest.mark.servers
@pytest.mark.parametrize("worker", ["sync", "gthread"])
def test_under_gunicorn_each_worker_has_a_lifespan_of_its_own(tmp_path, worker):
    """Also where the application was loaded, and used, before the workers were forked."""
    command = [
        *(sys.executable, "-m", "gunicorn", "--preload", "--workers=2", "--no-control-socket"),
        "--graceful-timeout=4",  # a worker that is just starting may miss the signal to stop
        *(f"--worker-class={worker}", "--bind=127.0.0.1:PORT", "site_under_test:application"),
    ]
    with Site(tmp_path, command, WARM_UP="1") as site:
        before = len(site.of_tenant())
        assert before == 2
        pids = {site.get()[1] for _ in range(40)}
        site.stop()
        assert str(site.process.pid) not in pids
        of_registry = [line for line in site.lines if line.startswith("registry")]
    for pid in [str(site.process.pid), *pids]:
        assert of_registry.count(f"registry {pid} set up") == 1
        assert of_registry.count(f"registry {pid} torn down") == 1
    assert len(of_registry) == 2 * (1 + len(pids))


@pytest.mark.servers
@pytest.mark.parametrize("worker", ["sync", "gthread"])
def test_under_gunicorn(tmp_path, worker):
    command = [
        *(sys.executable, "-m", "gunicorn", "--no-control-socket"),
        *(f"--worker-class={worker}", "--bind=127.0.0.1:PORT", "site_under_test:application"),
    ]
    with Site(tmp_path, command) as site:
        check(site)


# Forks


FORKS = '''
import gc, json, os, sys

import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={},
    INSTALLED_APPS=[],
    ROOT_URLCONF="__main__",
    SECRET_KEY="tests",
)

from django.http import HttpResponse
from django.urls import path

from scoped import lifespan_scoped, request_scope
from scoped.wsgi import get_wsgi_application
from tests.wsgi_server import call


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


class Connection:
    def __init__(self):
        self.pid = os.getpid()
        say(who, "connects")

    def close(self, write=os.write, getpid=os.getpid):  # at the exit, globals are gone
        whose = b"its own" if self.pid == getpid() else b"its parent's"
        write(1, b"%s closes %s\\n" % (who.encode() if who else b"somebody", whose))


@lifespan_scoped
def connection():
    made = Connection()
    try:
        yield made
    finally:
        made.close()


@lifespan_scoped
def plain():
    return os.getpid()


def index(request):
    return HttpResponse(str(connection().pid == plain() == os.getpid()))


urlpatterns = [path("", index)]
who = "parent"
application = get_wsgi_application()


def fork():
    """True in the child."""
    global who
    sys.stdout.flush()
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return False
    who = "child"
    return True


'''


def run_forks(program):
    done = subprocess.run(
        [*PYTHON, "-c", FORKS + program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=within(30),
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_what_was_set_up_before_a_fork_is_the_parents_alone():
    """Not used by the child, nor closed by it, not even when it exits as any program does."""
    said = run_forks(
        "assert call(application)[1] == b'True'\n"
        "if fork():\n"
        "    gc.collect()\n"
        "    assert call(application)[1] == b'True'\n"
        "    assert call(application)[1] == b'True'\n"
        "    sys.exit()\n"
        "assert call(application)[1] == b'True'\n"
    )
    assert said == [
        "parent connects",
        *("child connects", "child closes its own"),
        "parent closes its own",
    ]


def test_the_child_does_not_wait_for_a_thread_that_only_the_parent_has():
    said = run_forks(
        "import signal, threading, warnings\n"
        "from scoped.core import books, lifespan, record\n"
        "warnings.simplefilter('ignore')  # Python's own, of forks beside threads\n"
        "held, go_on = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with books._lock, record._lock, lifespan._lock:\n"
        "        held.set()\n"
        "        go_on.wait()\n"
        "threading.Thread(target=hold).start()\n"
        "held.wait()\n"
        "if fork():\n"
        "    signal.alarm(20)\n"
        "    assert call(application)[1] == b'True'\n"
        "    sys.exit()\n"
        "go_on.set()\n"
    )
    assert said == ["child connects", "child closes its own"]


def test_a_child_that_uses_nothing_closes_nothing():
    said = run_forks("call(application)\nif fork():\n    sys.exit()\n")
    assert said == ["parent connects", "parent closes its own"]


def test_a_fork_inside_a_scope_too():
    said = run_forks(
        "with request_scope():\n"
        "    connection()\n"
        "    if fork():\n"
        "        assert connection().pid == os.getpid()\n"
        "    else:\n"
        "        assert connection().pid == os.getpid()\n"
        "    say(who, 'ends')\n"
    )
    assert said == [
        "parent connects",
        *("child connects", "child ends", "child closes its own"),
        *("parent ends", "parent closes its own"),
    ]


def test_a_fork_inside_an_event_loop_leaves_what_that_holds_to_the_parent():
    said = run_forks(
        "import asyncio\n"
        "from scoped import lifespan_scope\n"
        "@lifespan_scoped\n"
        "async def pool():\n"
        "    made = Connection()\n"
        "    try:\n"
        "        yield made\n"
        "    finally:\n"
        "        made.close()\n"
        "async def main():\n"
        "    asyncio.get_running_loop().slow_callback_duration = 60  # it waits for the child\n"
        "    async with lifespan_scope(), request_scope():\n"
        "        await pool()\n"
        "        if fork():\n"
        "            gc.collect()\n"
        "            os._exit(0)\n"
        "        await pool()\n"
        "asyncio.run(main(), debug=False)\n"  # else it says on stderr when the machine is slow
    )
    assert said == ["parent connects", "parent closes its own"]
