"""Promise 15 and trap 18: no scope sees another's resources."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from scoped import (
    NoScopeError,
    ScopeClosedError,
    current_scope,
    lifespan_scope,
    lifespan_scoped,
    request_scope,
    request_scoped,
)


@request_scoped
async def thing() -> AsyncIterator[object]:
    yield object()


@request_scoped
def sync_thing() -> Iterator[object]:
    yield object()


class TestNested:
    async def test_a_scope_inside_another_has_its_own_values(self) -> None:
        async with request_scope() as outer:
            first = await thing(), sync_thing()
            async with request_scope() as inner:
                assert current_scope() is inner
                second = await thing(), sync_thing()
            assert current_scope() is outer
            assert (await thing(), sync_thing()) == first
        assert not set(first) & set(second)

    async def test_the_inner_one_is_torn_down_when_it_ends(self) -> None:
        log: list[str] = []

        @request_scoped
        async def db() -> AsyncIterator[str]:
            name = f"db {len(log)}"
            log.append(f"+{name}")
            yield name
            log.append(f"-{name}")

        async with request_scope():
            await db()
            async with request_scope():
                await asyncio.create_task(db())
        assert log == ["+db 0", "+db 1", "-db 1", "-db 0"]

    @pytest.mark.parametrize("how", ["fails", "is cancelled"])
    async def test_the_outer_one_is_current_again_when_the_inner_one(self, how: str) -> None:
        async with request_scope() as outer:
            error = ValueError() if how == "fails" else asyncio.CancelledError()
            with pytest.raises(type(error)):
                async with request_scope():
                    await thing()
                    raise error
            assert current_scope() is outer

    async def test_nothing_is_current_after_the_outermost(self) -> None:
        async with request_scope():
            pass
        with pytest.raises(NoScopeError):
            current_scope()
        with pytest.raises(NoScopeError):
            await thing()

    def test_sync_in_sync(self) -> None:
        with request_scope() as outer:
            first = sync_thing()
            with request_scope():
                assert sync_thing() is not first
            assert current_scope() is outer
            assert sync_thing() is first
        with pytest.raises(NoScopeError):
            sync_thing()

    async def test_sync_in_async(self) -> None:
        async with request_scope() as outer:
            first = sync_thing()
            with request_scope():
                assert sync_thing() is not first
            assert current_scope() is outer
            assert sync_thing() is first

    async def test_a_resource_may_use_a_scope_of_its_own(self) -> None:
        @request_scoped
        async def inner_thing() -> tuple[object, object]:
            before = await thing()
            async with request_scope():
                return before, await thing()

        async with request_scope():
            before, inside = await asyncio.create_task(inner_thing())
            assert before is await thing()
            assert inside is not before

    async def test_a_circle_through_a_scope_of_its_own_has_an_end(self) -> None:
        depth: list[object] = []

        @request_scoped
        async def deeper() -> int:
            depth.append(current_scope())
            if len(depth) == 3:
                return 3
            async with request_scope():
                return await deeper()

        async with request_scope():
            assert await deeper() == 3
        assert len(set(depth)) == 3


class TestInheritedContext:
    async def test_a_request_whose_context_has_another_open_one(self) -> None:
        """Keep-alive connections: the task of one request is made in another's Context."""
        go_on = asyncio.Event()

        async def request() -> tuple[object, object]:
            async with request_scope():
                return await thing(), sync_thing()

        async with request_scope():
            first = await thing(), sync_thing()
            inside = asyncio.create_task(request())
            others = await asyncio.gather(request(), request(), inside)

            async def later() -> tuple[object, object]:
                await go_on.wait()
                return await request()

            after = asyncio.create_task(later())
        go_on.set()
        found = [first, *others, await after]
        assert len({value for pair in found for value in pair}) == 10

    async def test_a_request_whose_context_has_a_closed_one(self) -> None:
        async with request_scope():
            context = contextvars.copy_context()

        async def request() -> object:
            async with request_scope():
                return await thing()

        async def twice() -> tuple[object, object]:
            pair = await request(), await request()
            with pytest.raises(NoScopeError):
                current_scope()
            return pair

        first, second = await context.run(asyncio.create_task, twice())
        assert first is not second

    async def test_one_that_closes_while_another_is_open_inside_it(self) -> None:
        opened, go_on = asyncio.Event(), asyncio.Event()

        async def request() -> None:
            async with request_scope() as scope:
                value = await thing()
                opened.set()
                await go_on.wait()
                assert await thing() is value
                assert current_scope() is scope
            with pytest.raises(NoScopeError):  # the one around it has closed meanwhile
                current_scope()

        async with request_scope():
            await thing()
            task = asyncio.create_task(request())
            await opened.wait()
        go_on.set()
        await task

    async def test_a_child_may_not_leave_a_scope_for_its_parent(self) -> None:
        async def child() -> None:
            async with request_scope():
                await thing()

        async with request_scope() as scope:
            await asyncio.create_task(child())
            assert current_scope() is scope

    async def test_a_scope_closed_in_another_context_leaves_that_one_alone(self) -> None:
        scope = request_scope()
        asyncio.get_running_loop()
        await asyncio.create_task(scope.__aenter__())
        async with request_scope() as mine:
            await scope.__aexit__(None, None, None)
            assert current_scope() is mine

    async def test_a_thread_with_a_context_of_its_own_has_no_scope(self) -> None:
        async with request_scope():
            found: list[object] = []

            def ask() -> None:
                try:
                    found.append(sync_thing())
                except NoScopeError as error:
                    found.append(error)

            thread = threading.Thread(target=contextvars.Context().run, args=(ask,))
            thread.start()
            thread.join()
        assert isinstance(found[0], NoScopeError)

    async def test_many_at_once(self) -> None:
        log: list[object] = []

        @request_scoped
        async def slow() -> AsyncIterator[object]:
            value = object()
            await asyncio.sleep(0)
            yield value
            log.append(value)

        async def request() -> object:
            async with request_scope():
                found = await asyncio.gather(slow(), slow(), slow())
                assert len(set(found)) == 1
                await asyncio.sleep(0)
                assert await slow() is found[0]
            return found[0]

        values = await asyncio.gather(*(request() for _ in range(50)))
        assert len(set(values)) == 50
        assert set(log) == set(values)
        assert len(log) == 50


class TestCurrentScope:
    async def test_it_says_what_it_is_and_whether_it_is_open(self) -> None:
        async with request_scope() as scope:
            assert current_scope() is scope
            assert scope.is_open
            assert scope.name == str(scope) == "the request scope"
            assert repr(scope) == "<RequestScope 'the request scope', open>"
        assert not scope.is_open
        assert repr(scope) == "<RequestScope 'the request scope', closed>"

    async def test_of_a_closed_scope_there_is_none(self) -> None:
        async with request_scope():
            context = contextvars.copy_context()
        with pytest.raises(NoScopeError):
            context.run(current_scope)
        with pytest.raises(ScopeClosedError):
            context.run(sync_thing)

    async def test_outside_any_request_it_is_the_lifespan(self) -> None:
        @lifespan_scoped
        async def pool() -> str:
            return "pool"

        async with lifespan_scope() as lifespan:
            assert current_scope() is lifespan
            assert str(lifespan) == "the lifespan"
            async with request_scope() as scope:
                assert current_scope() is scope
                await pool()
            assert current_scope() is lifespan
        with pytest.raises(NoScopeError):
            current_scope()
