"""docs/keyed.md."""

import asyncio

import pytest
from django.urls import path

from scoped import FactoryError, lifespan_scoped, request_scope, request_scoped
from tests.docs.project import urls

EXAMPLE = ("keyed.md", "One for each name")
TESTS = ("keyed.md", "In tests")


async def test_each_lock_is_held_once_and_to_the_last_byte(project, serve, keys):
    views = project(EXAMPLE).views
    held = []

    async def look(number, message):
        held.append(await keys.exists("invoice-7"))

    async with serve(path("<int:number>", views.pay)) as site:
        connection = await site.get("/7", before_send=look)
    assert connection.body == b"paid"
    assert held == [1] * len(connection.sent)
    assert await keys.exists("invoice-7") == 0


async def test_one_is_released_and_the_other_kept(project, serve, keys):
    views = project(EXAMPLE).views
    held = []

    async def look(number, message):
        held.append((await keys.exists("invoice-7"), await keys.exists("invoice-8")))

    async with serve(path("<int:number>/<int:other>", views.move)) as site:
        assert (await site.get("/7/8", before_send=look)).body == b"moved"
    assert set(held) == {(0, 1)}
    assert await keys.exists("invoice-8") == 0


async def test_each_key_is_a_resource_of_its_own():
    log = []

    @request_scoped(keyed=True)
    async def price(of, currency="EUR"):
        log.append(f"+{of} {currency}")
        await asyncio.sleep(0)
        yield [of, currency]
        log.append(f"-{of} {currency}")

    @request_scoped(keyed=True)
    def rate(currency):
        return [currency]

    async with request_scope():
        first, second = await asyncio.gather(price("bread"), price("bread"))
        assert first is second is price.get_nowait("bread")
        assert await price("bread", "EUR") is not first
        assert rate("EUR") is rate("EUR")
        with pytest.raises(FactoryError, match="hashable"):
            await price(["bread"])
    assert log == ["+bread EUR", "+bread EUR", "-bread EUR", "-bread EUR"]


def test_a_lifespan_resource_has_no_keys():
    with pytest.raises(TypeError):
        lifespan_scoped(keyed=True)  # type: ignore[call-overload]


async def test_the_tests_of_the_page_pass(project, monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://nobody.invalid")
    modules = project(EXAMPLE, TESTS)
    with urls(path("pay/<int:number>", modules.views.pay)):
        await modules.test_views.test_the_lock()
        await modules.test_views.test_a_view()
