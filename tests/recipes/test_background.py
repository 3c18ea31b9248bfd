import asyncio
import os
import signal

import asyncpg
import django
import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.http import HttpResponse
from django.urls import path

ASYNCPG = ("postgresql.md", "asyncpg")
SYNC = ("background.md", "Celery with sync resources")
ASYNC = ("background.md", "Celery with async resources")
TASKS = ("background.md", "django.tasks")
TASKIQ = ("background.md", "taskiq")
DRAMATIQ = ("background.md", "dramatiq")
HUEY = ("background.md", "huey")
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


def disconnect(tasks):
    from celery.signals import worker_process_init, worker_process_shutdown

    worker_process_init.disconnect(tasks.open_lifespan)
    worker_process_shutdown.disconnect(tasks.close_lifespan)


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
        tasks.run(fails())

    @tasks.app.task
    def look():
        pools.append(tasks.run(project.resources.pool()))

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
        disconnect(tasks)
    assert states == ["SUCCESS", "SUCCESS", "FAILURE", "SUCCESS", "SUCCESS"]
    assert await notes() == ["one", "two"]
    await backends.reach(before)


def rows(address):
    with psycopg.connect(address) as connection:
        return [text for (text,) in connection.execute("SELECT text FROM notes ORDER BY id")]


@pytest.fixture
def time_limit():
    """As a worker of the pool prefork hears of a task's `soft_time_limit`, in its main thread."""
    from celery.exceptions import SoftTimeLimitExceeded

    def exceeded(number, frame):
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGALRM, exceeded)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.05)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("project", [[ASYNCPG, ASYNC]], ids=["async"], indirect=True)
def test_celery_rolls_back_what_a_time_limit_interrupts(project, postgres_url, time_limit):
    tasks, waits = project.tasks, []

    async def slow():
        from scoped import request_scope

        async with request_scope():
            connection = await project.resources.transaction()
            await connection.execute("INSERT INTO notes (text) VALUES ('never')")
            waits.append(asyncio.Event())
            time_limit()
            await waits[0].wait()

    async def insert_with_patience(text):
        waits[0].set()
        await tasks.insert(text)
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=1)

    @tasks.app.task
    def interrupted():
        tasks.run(slow())

    @tasks.app.task
    def post(text):
        tasks.run(insert_with_patience(text))

    @tasks.app.task
    def rarely():
        asyncio.run(slow())

    tasks.open_lifespan()
    try:
        assert "SoftTimeLimitExceeded" in repr(rarely.apply().result)
        assert rows(postgres_url) == []
        waits.clear()
        assert "SoftTimeLimitExceeded" in repr(interrupted.apply().result)
        assert rows(postgres_url) == []
        assert post.apply(["two"]).state == "SUCCESS"
    finally:
        tasks.close_lifespan()
        disconnect(tasks)
    assert rows(postgres_url) == ["two"]


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


def test_a_management_command_is_cancelled_by_ctrl_c(recipe, notes, postgres_url, monkeypatch):
    project = recipe(ASYNCPG, COMMAND)
    asked = []

    async def transaction():
        connection = await project.resources.transaction()
        asked.append(connection)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return connection

    monkeypatch.setattr(project.import_notes, "transaction", transaction)
    with pytest.raises(KeyboardInterrupt):
        call_command(project.import_notes.Command(), "one", "two", "three")
    assert len(asked) == 2
    assert rows(postgres_url) == ["one"]


# Each of these runs a task as its worker does. `None` is refused by the table: the task fails.


async def test_taskiq(recipe, notes, backends):
    project = recipe(ASYNCPG, TASKIQ)
    tasks = project.tasks
    before = await backends()
    await tasks.broker.startup()  # a broker in memory is its own worker
    for text, failed in [("one", False), (None, True), ("two", False)]:
        sent = await tasks.post.kiq(text)
        assert (await sent.wait_result(timeout=20)).is_err is failed
        pool = await project.resources.pool()
        assert pool.get_idle_size() == pool.get_size() == 1
    await tasks.broker.shutdown()
    assert pool.is_closing()
    assert await notes() == ["one", "two"]
    await backends.reach(before)


async def test_dramatiq(recipe, notes, backends, keys):
    import dramatiq

    project = recipe(ASYNCPG, DRAMATIQ)
    tasks, pools, ended = project.tasks, [], []

    @dramatiq.actor(max_retries=0)
    async def look():
        pools.append(await project.resources.pool())

    class Ended(dramatiq.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            ended.append(exception)

    before = await backends()
    tasks.broker.add_middleware(Ended())
    tasks.broker.flush_all()
    worker = dramatiq.Worker(tasks.broker, worker_timeout=100, worker_threads=1)
    worker.start()
    try:
        for number, send in enumerate(
            [
                lambda: tasks.post.send("one"),
                lambda: tasks.post.send(None),
                lambda: tasks.post.send("two"),
                look.send,
                look.send,
            ],
            1,
        ):
            await asyncio.to_thread(send)
            async with asyncio.timeout(20):
                while len(ended) < number:
                    await asyncio.sleep(0.01)
    finally:
        await asyncio.to_thread(worker.stop)
        await asyncio.to_thread(tasks.broker.flush_all)
        tasks.broker.close()
        tasks.broker.client.connection_pool.disconnect()  # which close() leaves to its maker
        dramatiq.broker.global_broker = None
    assert [type(error).__name__ for error in ended] == [
        "NoneType",
        "NotNullViolationError",
        "NoneType",
        "NoneType",
        "NoneType",
    ]
    [pool] = set(pools)
    assert pool.is_closing()
    assert await notes() == ["one", "two"]
    await backends.reach(before)


async def test_huey(recipe, notes, backends, keys):
    project = recipe(SYNC, HUEY)
    tasks = project.tasks
    before = await backends()

    def work():
        outcomes = []
        for text in ["one", None, "two"]:
            tasks.post(text)
            task = tasks.huey.dequeue()  # as its consumer does
            outcomes.append(tasks.huey.execute(task))
        return outcomes

    await asyncio.to_thread(work)
    assert await notes() == ["one", "two"]
    await backends.reach(before)
    tasks.huey.flush()
    tasks.huey.storage.pool.disconnect()  # which conn.close() leaves to its maker
