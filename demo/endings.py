"""
A view for each way in which a request can end. Those that urls.py hands a ``db`` are served
twice: with scoped's, from resources.py, and with that of stock.py.
"""

import asyncio

from asgiref.sync import async_to_sync
from django.http import Http404, HttpResponse, StreamingHttpResponse

from demo.mishaps import DeliberateError, careless, refused, stuck
from demo.resources import db as scoped_db
from demo.resources import transaction, turn
from demo.stage import server
from scoped import spawn

WORK = "SELECT pg_sleep(0.2)"


async def fine(request, db):
    await (await db()).execute(WORK)
    return HttpResponse("All is well.")


def sync(request, db):
    @async_to_sync
    async def work():
        await (await db()).execute(WORK)

    work()
    return HttpResponse("All is well, in a thread.")


async def stream(request, db):
    connection = await db()

    async def body():
        for number in range(1, 6):
            await connection.execute("SELECT pg_sleep(0.1)")
            yield f"{number} "

    return StreamingHttpResponse(body())


async def missing(request, db):
    await (await db()).execute(WORK)
    raise Http404


async def raises(request, db):
    await (await db()).execute(WORK)
    raise DeliberateError("The view raises.")


async def leave(request, db):
    await (await db()).execute("SELECT pg_sleep(10)")  # whoever asks waits for less
    return HttpResponse("Who reads this has waited long.")


async def broken_stream(request, db):
    connection = await db()

    async def body():
        for number in range(1, 4):
            await connection.execute("SELECT pg_sleep(0.1)")
            yield f"{number} "
        raise DeliberateError("The stream raises.")

    return StreamingHttpResponse(body())


async def children(request, db):
    async def child():
        return await db()

    connections = await asyncio.gather(*(child() for _ in range(10)))
    await connections[0].execute(WORK)
    return HttpResponse(f"Ten tasks asked, and got {len(set(connections))}.")


async def shutdown(request, db):
    await (await db()).execute(WORK)
    server.restart()
    await asyncio.sleep(10)  # the server waits for less
    return HttpResponse("Who reads this has met a patient server.")


# What stock Django has no counterpart of.


async def commit(request):
    connection = await transaction()
    await connection.execute(WORK)
    await connection.execute("INSERT INTO likes (message_id) VALUES (0)")  # there is no message 0
    return HttpResponse("Liked.")  # which the client never hears


async def background(request):
    spawn(count_likes(), name="count likes")
    return HttpResponse("Counting.", status=202)


async def count_likes():
    await (await scoped_db()).fetchval("SELECT count(*) FROM likes, pg_sleep(0.8)")


async def release(request):
    numbers = await (await scoped_db()).fetch("SELECT generate_series(1, 5)")
    await scoped_db.release()  # the stream does without it

    async def body():
        for (number,) in numbers:
            await asyncio.sleep(0.2)
            yield f"{number} "

    return StreamingHttpResponse(body())


async def long_stream(request):
    await (await scoped_db()).execute(WORK)

    async def body():  # the connection is not used any more, and nobody else can have it
        for number in range(1, 6):
            await asyncio.sleep(0.4)
            yield f"{number} "

    return StreamingHttpResponse(body())


async def turns(request):
    await turn()
    await asyncio.sleep(1)
    return HttpResponse("It was this request's turn.")


async def setup_fails(request):
    await refused()
    return HttpResponse("It never comes to this.")


async def teardown_raises(request):
    await careless()
    return HttpResponse("All is well, for all that the client hears.")


async def teardown_hangs(request):
    await stuck()
    return HttpResponse("All is well, for all that the client hears.")
