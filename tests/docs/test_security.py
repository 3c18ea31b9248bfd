"""docs/security.md. `WRITE_PAGES=1` has the tables written as they are measured."""

import ast
import os
import re

import asyncpg
import pytest
from django.conf import settings
from django.http import Http404, HttpResponse
from django.urls import path

from demo.servers import start_postgres
from scoped import lifespan_scope, request_scoped
from tests import pages
from tests.docs import kept

PAGE = pages.DOCS / "security.md"
CLEAN = ("security.md", "A session that is handed on clean")
FAILED = ("security.md", "When a COMMIT fails")


@pytest.fixture(scope="module")
def superusers_url():
    """Of a role that may become another one."""
    with start_postgres(superuser=True) as server:
        yield server.url


@pytest.fixture
async def guest(superusers_url):
    connection = await asyncpg.connect(superusers_url)
    await connection.execute("DROP ROLE IF EXISTS guest; CREATE ROLE guest")
    yield superusers_url
    await connection.execute("DROP ROLE guest")
    await connection.close()


def compare(name, lines):
    """With the table of that name in the page."""
    text = PAGE.read_text()
    pattern = re.compile(rf"(<!-- {name}, [^>]*-->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
    table = "".join(f"{line}\n" for line in lines)
    if os.environ.get("WRITE_PAGES"):
        PAGE.write_text(pattern.sub(lambda match: match[1] + table + match[3], text))
        return
    [[_, documented, _]] = pattern.findall(text)
    assert documented == table


WORDS = {True: "**kept**", False: "ended"}


async def test_what_a_session_keeps_is_what_the_table_says(guest):
    lines = [
        "| What a request leaves in the session | asyncpg's pool | psycopg's pool | Ended by |",
        "|---|---|---|---|",
    ]
    for what, (change, look, local, name) in kept.SESSION.items():
        by_asyncpg = await kept.asyncpg_keeps(guest, change, look)
        by_psycopg = await kept.psycopg_keeps(guest, change, look)
        ways = ["`DISCARD ALL`"]
        if local is not None:
            assert not await kept.asyncpg_keeps_of_a_transaction(guest, local, look)
            assert not await kept.psycopg_keeps(guest, local, look)
            ways.insert(0, name)
        lines.append(
            f"| {what} | {WORDS[by_asyncpg]} | {WORDS[by_psycopg]} | {', or '.join(ways)} |"
        )
    compare("a session", lines)


@pytest.mark.parametrize("what", kept.SESSION)
async def test_the_pools_of_the_page_hand_a_session_on_clean(project, guest, monkeypatch, what):
    monkeypatch.setenv("DATABASE_URL", guest)
    change, look, *_ = kept.SESSION[what]
    resources = project(CLEAN).resources
    options = {"reset": resources.clean, "statement_cache_size": 0}
    assert not await kept.asyncpg_keeps(guest, change, look, **options)
    assert not await kept.psycopg_keeps(guest, change, look, reset=resources.clean_psycopg)


async def test_what_is_kept_elsewhere_is_what_the_table_says(tmp_path, guest, redis_url):
    lines = ["| What a request leaves elsewhere | The next one | Ended by |", "|---|---|---|"]
    for (what, way), probe in kept.elsewhere(tmp_path, guest, redis_url).items():
        is_kept = await probe(False)
        assert is_kept == (way != "-"), what
        if is_kept:
            assert not await probe(True), what
        lines.append(f"| {what} | {WORDS[is_kept]} | {way} |")
    compare("elsewhere", lines)


async def test_each_request_has_the_tenant_that_it_says_and_the_next_has_none(
    project, serve, guest, monkeypatch
):
    monkeypatch.setenv("DATABASE_URL", guest)
    resources = project(CLEAN).resources
    look = "SELECT current_setting('app.tenant', true)"

    async def told(request):
        return HttpResponse(await (await resources.tenant_db()).fetchval(look))

    async def fails(request):
        await resources.tenant_db()
        raise Http404

    async def not_told(request):
        return HttpResponse(await (await resources.db()).fetchval(look) or "nobody's")

    async with serve(path("told", told), path("fails", fails), path("not", not_told)) as site:
        for tenant in (b"ada", b"grace"):
            assert (await site.get("/told", headers=[(b"x-tenant", tenant)])).body == tenant
            assert (await site.get("/not")).body == b"nobody's"
        assert (await site.get("/fails", headers=[(b"x-tenant", b"ada")])).status == 404
        assert (await site.get("/not")).body == b"nobody's"


async def test_the_psycopg_pool_of_the_page_lends_again_and_again(project, guest, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", guest)
    resources = project(CLEAN).resources
    async with lifespan_scope():
        pool = await resources.psycopg_pool()
        for _ in range(8):  # psycopg prepares what it has been asked five times
            async with pool.connection() as connection:
                cursor = await connection.execute("SELECT 1 WHERE %s", [True])
                assert await cursor.fetchone() == (1,)


MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]


async def test_the_500_of_a_failed_commit_lacks_what_the_page_says_it_lacks(project, serve):
    @request_scoped(until="response")
    async def transaction():
        yield
        raise ValueError

    async def fine(request):
        return HttpResponse()

    async def book(request):
        await transaction()
        return HttpResponse("Booked.")

    settings = {"MIDDLEWARE": MIDDLEWARE, "SECURE_HSTS_SECONDS": 60}
    secure = {"scheme": "https"}
    async with serve(path("", fine), path("book", book), **settings) as site:
        connection = site.open("/")
        connection.scope |= secure
        await connection.run()
        fine_headers = {name.decode() for name, _ in connection.sent[0]["headers"]}
        failed = await site.get("/book")
        headers = {name.decode() for name, _ in failed.sent[0]["headers"]}
    assert failed.status == 500
    assert b"Server Error (500)" in failed.body
    assert b"Booked" not in failed.body
    assert fine_headers - headers == {
        "Strict-Transport-Security",
        "X-Content-Type-Options",
        "Referrer-Policy",
        "Cross-Origin-Opener-Policy",
        "X-Frame-Options",
    }


async def test_handler500_gives_it_what_it_is_to_have(project, serve):
    @request_scoped(until="response")
    async def transaction():
        yield
        raise ValueError

    async def book(request):
        await transaction()
        return HttpResponse("Booked.")

    urls = project(FAILED).urls
    async with serve(path("book", book)) as site:
        settings.ROOT_URLCONF.handler500 = urls.handler500
        failed = await site.get("/book")
    assert (failed.status, failed.body) == (500, b"Not saved.")
    headers = dict(failed.sent[0]["headers"])
    assert headers[b"X-Frame-Options"] == b"DENY"
    assert headers[b"Content-Security-Policy"] == b"default-src 'none'"


WRITES = re.compile(
    r"INSERT |UPDATE |DELETE |\.(a?save|a?create|add|incr|aenqueue|enqueue|delay)\(|\bspawn\("
)
# Whoever reads a page has not asked to be counted, nor is answerable for it (RFC 9110, 9.2.1).
COUNT_VISITS = {("README.md", "index"), ("tutorial.md", "book")}


def views():
    """Of all pages: where, its source, and whether a GET reaches it."""
    for page in [*pages.DOCS.rglob("*.md"), pages.DOCS.parent / "README.md"]:
        for language, block in pages.BLOCK.findall(page.read_text()):
            for node in ast.walk(ast.parse(block if language == "python" else "")):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                arguments = [argument.arg for argument in node.args.args]
                decorators = " ".join(ast.unparse(one) for one in node.decorator_list)
                if arguments[:2] == ["self", "request"]:
                    gets = node.name not in ("post", "put", "patch", "delete")
                else:
                    gets = not re.search(r"require_POST|\.post\(|'POST'", decorators)
                if "request" in arguments[:2]:
                    yield (page.name, node.name), ast.get_source_segment(block, node), gets


def test_no_example_writes_on_get():
    """A GET has no CSRF protection, and is sent by whatever follows a link."""
    writing = {where: gets for where, source, gets in views() if WRITES.search(source)}
    assert all(writing.pop(where) for where in COUNT_VISITS)
    assert len(writing) > 8
    assert [where for where, gets in writing.items() if gets] == []


async def test_what_the_examples_write_on_is_protected_from_other_sites(
    project, serve, notes, monkeypatch
):
    views = project(("recipes/postgresql.md", "asyncpg")).views
    middleware = ["django.middleware.csrf.CsrfViewMiddleware"]
    async with serve(path("save", views.save), MIDDLEWARE=middleware) as site:
        assert (await site.get("/save?text=never")).status == 405
        assert (await site.post("/save", text="never")).status == 403
        token = "a" * 32
        connection = site.open("/save", form={"text": "mine", "csrfmiddlewaretoken": token})
        connection.scope["headers"].append((b"cookie", f"csrftoken={token}".encode()))
        await connection.run()
        assert connection.status == 200
    assert await notes() == ["mine"]
