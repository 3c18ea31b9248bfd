import asyncio

import asyncpg
import django
import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.http import HttpResponse
from django.urls import path

ASYNCPG = ("postgresql.md", "asyncpg")
SYNC = ("background.md", "Celery with sync resources")
ASYNC = ("background.md", "Celery with async resources")
TASKS = ("background.md", "django.tasks")
COMMAND = ("background.md", "Management commands")


@pytest.fixture
def project(recipe, notes, request):
    project = recipe(*request.param)
    project.tasks.app.conf.task_always_eager = True
    yield project
    project.tasks.app.close()


async def run(task, *arguments):
    """As a worker does: in a thread without an event loop."""
    return await asyncio.to_thread(task.apply, arguments)


@pytest.mark.parametrize("project", [[SYNC]], ids=["sync"], indirect=True)
async def test_celery_with_sync_resources(project, notes, backends):
    @project.tasks.app.task
    def fails(text):
        project.resources.db().execute("INSERT INTO notes (text) VALUES (%s)", [text])
        raise ValueError

    @project.tasks.app.task
    def calls(text):
        project.tasks.post(f"{text}, called")
        project.resources.db().execute("INSERT INTO notes (text) VALUES (%s)", [text])
        raise ValueError

    @project.tasks.app.task(bind=True, max_retries=1, default_retry_delay=0)
    def retries(self, text):
        assert project.resources.db() is project.resources.db()
        project.resources.db().execute(
            "INSERT INTO notes (text) VALUES (%s)", [f"{text} {self.request.retries}"]
        )
        if not self.request.retries:
            raise self.retry()

    before = await backends()
    assert (await run(project.tasks.post, "one")).state == "SUCCESS"
    assert (await run(fails, "never")).state == "FAILURE"
    assert await notes() == ["one"]
    assert (await run(retries, "try")).state == "SUCCESS"
    assert await notes() == ["one", "try 1"]
    assert (await run(calls, "never")).state == "FAILURE"
    assert await notes() == ["one", "try 1", "never, called"]
    await backends.reach(before)


@pytest.mark.parametrize("project", [[ASYNCPG, ASYNC]], ids=["async"], indirect=True)
async def test_celery_with_one_loop_for_the_process(project, notes, backends):
    from celery.signals import worker_process_init, worker_process_shutdown

    tasks, pools = project.tasks, []

    async def fails():
        from scoped import request_scope

        async with request_scope():
            connection = await project.resources.transaction()
            await connection.execute("INSERT INTO notes (text) VALUES ('never')")
            raise ValueError

    @tasks.app.task
    def failing():
        tasks.runner.run(fails())

    @tasks.app.task
    def look():
        pools.append(tasks.runner.run(project.resources.pool()))

    def worker():
        worker_process_init.send(sender=None)
        try:
            states = [tasks.post.apply(["one"]).state, look.apply().state]
            states += [failing.apply().state, tasks.post.apply(["two"]).state, look.apply().state]
            [pool] = set(pools)
            assert pool.get_idle_size() == pool.get_size() > 0
            assert not pool.is_closing()
        finally:
            worker_process_shutdown.send(sender=None)
        assert pool.is_closing()
        return states

    before = await backends()
    try:
        states = await asyncio.to_thread(worker)
    finally:
        worker_process_init.disconnect(tasks.open_lifespan)
        worker_process_shutdown.disconnect(tasks.close_lifespan)
    assert states == ["SUCCESS", "SUCCESS", "FAILURE", "SUCCESS", "SUCCESS"]
    assert await notes() == ["one", "two"]
    await backends.reach(before)


@pytest.mark.parametrize("project", [[ASYNCPG, ASYNC]], ids=["async"], indirect=True)
async def test_celery_with_a_loop_for_each_task(project, notes, backends, serve):
    before = await backends()
    for text in ["one", "two"]:
        assert (await run(project.rare.post_rarely, text)).state == "SUCCESS"
        await backends.reach(before)  # its pool is closed with it

    async def view(request):
        connection = await project.resources.transaction()
        await sync_to_async(project.rare.post_rarely.delay)("eager")
        assert await project.resources.transaction() is connection
        assert await notes() == ["one", "two", "eager"], "committed by the task"
        raise ValueError

    async with serve(path("", view)) as site:
        assert (await site.get("/")).status == 500
        pool = await project.resources.pool()
        assert pool.get_idle_size() == pool.get_size() == 2
    assert await notes() == ["one", "two", "eager"]
    await backends.reach(before)


@pytest.mark.only_if(django.VERSION >= (6, 0), reason="django.tasks is new in Django 6.0")
async def test_django_tasks(recipe, notes, serve):
    project = recipe(ASYNCPG, TASKS)

    async def fails(request):
        from scoped import request_scope

        connection = await project.resources.transaction()
        result = await project.tasks.post.aenqueue(None)  # NOT NULL
        assert result.status == "FAILED"
        assert "NotNullViolation" in result.errors[0].exception_class_path
        assert await connection.fetchval("SELECT 1") == 1, "the request's is another transaction"
        async with request_scope():
            assert await project.resources.transaction() is not connection
        return HttpResponse()

    async def raises(request):
        await project.views.enqueue(request)
        assert await notes() == ["one", "two"]
        raise ValueError

    async with serve(
        path("", project.views.enqueue), path("fails", fails), path("raises", raises)
    ) as site:
        assert (await site.post("/", text="one")).body == b"SUCCESSFUL"
        assert await notes() == ["one"]
        assert (await site.get("/fails")).status == 200
        assert await notes() == ["one"]
        assert (await site.post("/raises", text="two")).status == 500
        pool = await project.resources.pool()
        assert pool.get_idle_size() == pool.get_size() > 0
    assert await notes() == ["one", "two"]


async def test_a_management_command(recipe, notes, backends, monkeypatch):
    project = recipe(ASYNCPG, COMMAND)
    opened = []
    create_pool = asyncpg.create_pool

    def counted(*args, **kwargs):
        opened.append(True)
        return create_pool(*args, **kwargs)

    monkeypatch.setattr(asyncpg, "create_pool", counted)
    before = await backends()
    command = project.import_notes.Command()
    await asyncio.to_thread(call_command, command, "one", "two")
    assert await notes() == ["one", "two"]
    assert len(opened) == 1
    with pytest.raises(asyncpg.CharacterNotInRepertoireError):
        await asyncio.to_thread(call_command, command, "three", "\0", "four")
    assert await notes() == ["one", "two", "three"]
    await backends.reach(before)
