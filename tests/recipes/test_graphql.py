import json

import pytest
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

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

    async def db():
        async with (await project.resources.pool()).acquire(timeout=10) as connection:
            connection.add_query_logger(asked)
            yield connection

    async with serve(*project.urls.urlpatterns) as site:
        await ask(site, 'mutation { a: post(text: "one") b: post(text: "two") }')
        with override(project.resources.db, db):
            for _ in range(2):
                found = await ask(
                    site, "{ a: note(number: 1) b: note(number: 2) c: note(number: 1) }"
                )
                assert found == {"data": {"a": "one", "b": "two", "c": "one"}}
    assert queries == [([1, 2],)] * 2, "once for each request"


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
