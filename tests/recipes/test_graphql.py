import asyncio
import json
import os

import asyncpg
import pytest
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from scoped import request_scope
from scoped.testing import override

ASYNCPG = ("postgresql.md", "asyncpg")
STRAWBERRY = ("graphql.md", "strawberry")


@pytest.fixture
def project(recipe, notes):
    return recipe(ASYNCPG, STRAWBERRY)


async def ask(site, query):
    body = json.dumps({"query": query}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    answer = await site.get("/graphql", method="POST", headers=headers, body=[body])
    assert answer.status == 200
    return json.loads(answer.body)


async def test_a_loader_for_each_request_asks_once(project, serve, notes):
    queries = []

    def asked(record):
        if record.query.startswith("SELECT id, text FROM notes"):
            queries.append(record.args)

    async def logged(connection):
        connection.add_query_logger(asked)

    async def pool():
        url = os.environ["DATABASE_URL"]
        async with asyncpg.create_pool(url, min_size=1, setup=logged) as pool:
            yield pool

    with override(project.resources.pool, pool):
        async with serve(*project.urls.urlpatterns) as site:
            await ask(site, 'mutation { a: post(text: "one") b: post(text: "two") }')
            for _ in range(2):
                found = await ask(
                    site, "{ a: note(number: 1) b: note(number: 2) c: note(number: 1) }"
                )
                assert found == {"data": {"a": "one", "b": "two", "c": "one"}}
    assert queries == [([1, 2],)] * 2, "once for each request"


async def test_two_loads_at_once_do_not_meet_on_one_connection(project, serve, notes, backends):
    """The first waits for a lock until the second has come to the database too."""
    waits = "wait_event_type = 'Lock'"

    async with serve(*project.urls.urlpatterns) as site:
        await ask(site, 'mutation { a: post(text: "one") b: post(text: "two") }')
        other = await asyncpg.connect(os.environ["DATABASE_URL"])
        async with request_scope():
            loader = project.loaders.notes_by_number()
            async with other.transaction():
                await other.execute("LOCK TABLE notes")
                first = loader.load(1)
                await backends.reach(1, waits)
                second = loader.load(2)
                await backends.reach(2, waits)
            assert await asyncio.gather(first, second) == ["one", "two"]
        await other.close()


async def test_a_schema_in_a_unit_test_has_no_scope(project):
    found = await project.schema.schema.execute("{ nothing }")
    assert "nothing" in found.errors[0].message


@pytest.mark.parametrize("is_noted", [True, False])
async def test_an_error_must_be_noted_to_roll_back(project, serve, notes, is_noted):
    import strawberry
    from strawberry.django.views import AsyncGraphQLView

    @strawberry.type
    class Mutation(project.schema.Mutation):
        @strawberry.mutation
        async def refuse(self) -> int:
            raise ValueError("not today")

    make = project.schema.NotingSchema if is_noted else strawberry.Schema
    schema = make(project.schema.Query, Mutation)
    async with serve(path("graphql", csrf_exempt(AsyncGraphQLView.as_view(schema=schema)))) as site:
        answer = await ask(site, 'mutation { post(text: "one") refuse }')
        assert answer["errors"][0]["message"] == "not today"
        assert await notes() == ([] if is_noted else ["one"])
        await ask(site, 'mutation { post(text: "two") }')
    assert await notes() == ([] if is_noted else ["one"]) + ["two"]
