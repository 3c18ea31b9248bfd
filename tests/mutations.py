"""
``python -m tests.mutations``: breaks the library in one way after the other, each
in a copy of the checkout, and reports which test notices it. Fails if one is not
noticed, or cannot be made any more: then the list must be brought up to date.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# The fast ones, those that name what is wrong first.
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("exits", "teardown", "first_use", "handler", "isolation", "lifespan", "asend"),
        *("books", "until_response", "release", "wsgi", "long_stream"),
        *("factories", "keyed", "calls", "foreign_errors", "names", "errors"),
        *("threads", "many_threads", "every_await", "model"),
        *("background", "testing", "signals", "good_neighbour", "who_cancels", "bounds"),
    )
]
# Seconds for all tests under one mutation, of which some make them hang.
DEADLINE = 240


class Edit(NamedTuple):
    module: str
    old: str  # occurs once
    new: str


class Mutation(NamedTuple):
    what: str
    edits: tuple[Edit, ...]


def mutation(what: str, *edits: tuple[str, str, str]) -> Mutation:
    return Mutation(what, tuple(Edit(*edit) for edit in edits))


MUTATIONS = [
    # The end of a request
    mutation(
        "the scope is not closed",
        ("serving/exchange", "if closing := request_scope.begin_close():", "if closing := ():"),
    ),
    mutation(
        "request_finished is not sent to async receivers",
        (
            "serving/exchange",
            "await self.attempt(self.call_async(receiver))",
            "pass",
        ),
    ),
    mutation(
        "async receivers run in tasks of their own",
        (
            "dispatch",
            "response = await receiver(signal=signal, sender=sender, **named)",
            "response = await __import__('asyncio').create_task("
            "receiver(signal=signal, sender=sender, **named))",
        ),
    ),
    mutation(
        "a stream is not closed",
        (
            "serving/exchange",
            "await self.attempt(close_stream(self.response, request_scope))",
            "pass",
        ),
    ),
    mutation(
        "a sync view that runs on is not waited for",
        (
            "serving/exchange",
            "await self.attempt(sync_code_ended(self.thread, request_scope))",
            "pass",
        ),
    ),
    mutation(
        "a thread is lent again while a sync view runs on in it",
        ("serving/threads", "        elif worker.is_busy:\n", "        elif False:\n"),
    ),
    mutation(
        "the response's closers are not run",
        ("serving/ending", "for closer in response._resource_closers:", "for closer in ():"),
    ),
    mutation(
        "the view's failure is not noted",
        ("serving/handler", "        note_failure(exception)\n", ""),
    ),
    # Cancellation
    mutation(
        "the words of somebody else's error are taken on trust",
        ("core/scope", "self, printable_repr(error), exc_info", "self, error, exc_info"),
    ),
    mutation(
        "what a factory cancels leaves a block as a bare cancellation",
        (
            "core/scope",
            "if isinstance(failure, asyncio.CancelledError) and not is_cancelled():",
            "if False:",
        ),
    ),
    mutation(
        "a cancellation from outside goes behind a teardown's error",
        (
            "core/scope",
            "if isinstance(failure, asyncio.CancelledError) and not is_cancelled():",
            "if isinstance(failure, asyncio.CancelledError):",
        ),
    ),
    mutation(
        "a factory that cancels without a word ends a block so",
        ("core/scope", "        if was_cancelled and not is_cancelled():\n", "        if False:\n"),
    ),
    mutation(
        "what a factory cancels in a background task cancels that",
        (
            "serving/background",
            "failure = None  # a factory's own, which has said why",
            "pass",
        ),
    ),
    mutation(
        "the request is never uncancelled",
        (
            "serving/exchange",
            "        while self.task.cancelling():\n            self.task.uncancel()",
            "        pass",
        ),
    ),
    mutation(
        "a server's cancellation is swallowed",
        ("serving/supervisor", "raise_first([cancellation, failure])", "return"),
    ),
    mutation(
        "the request is cancelled though it is finishing",
        (
            "serving/exchange",
            "        if not self.cancelled and not self.finishing:",
            "        if not self.cancelled:",
        ),
    ),
    mutation(
        "the request is cancelled again and again",
        (
            "serving/exchange",
            "        if not self.cancelled and not self.finishing:",
            "        if not self.finishing:",
        ),
    ),
    mutation(
        "the view is not told that its client has gone",
        (
            "serving/exchange",
            "                self.client_gone = True\n",
            "                return\n",
        ),
    ),
    mutation(
        "a cancelled scope does not say so",
        (
            "core/teardown",
            "            scope.log(TeardownError(scope, errors))\n        raise fatal\n",
            "            scope.log(TeardownError(scope, errors))\n        return\n",
        ),
    ),
    mutation(
        "who waits for something to end is cancelled at once",
        (
            "core/waits",
            "                cancellation = error\n            finally:\n",
            "                return error\n            finally:\n",
        ),
    ),
    mutation(
        "an unwanted keeper is cancelled again and again",
        (
            "core/place",
            "if self.task is not None and not self.is_unwanted:",
            "if self.task is not None:",
        ),
    ),
    mutation(
        "what will not end when it is cancelled is never cancelled again",
        (
            "core/teardown",
            "            keeper.is_unwanted = False  # it has had its time: once more\n",
            "            pass\n",
        ),
    ),
    mutation(
        "what waits for its teardown is cancelled for good by its own factory",
        (
            "core/place",
            "                task.uncancel()\n        failure = self.verdict",
            "                pass\n        failure = self.verdict",
        ),
    ),
    mutation(
        "a keeper that is cancelled before its first step tells nobody",
        (
            "core/place",
            "            record.scope.fail(record, asyncio.CancelledError())\n",
            "            pass\n",
        ),
    ),
    mutation(
        "a keeper that is cancelled while it waits goes before its turn",
        (
            "core/place",
            "        while not self.verdict.done():\n            try:\n                await asyncio.wait([self.verdict])\n            except asyncio.CancelledError as error:\n                cancellation = error\n                task.uncancel()\n        failure = self.verdict.result()\n",
            "        try:\n            await asyncio.wait([self.verdict])\n        except asyncio.CancelledError as error:\n            return error\n        failure = self.verdict.result()\n",
        ),
    ),
    mutation(
        "the keepers of a scope whose owner has gone wait for ever at the event loop's end",
        ("core/abandoned", "        await scope.close_abandoned(error)\n", "        raise\n"),
    ),
    mutation(
        "a scope that is given up is not closed where its guard never began",
        (
            "core/abandoned",
            "        closing.add_done_callback(_closing.discard)\n",
            "        closing.cancel()\n        closing.add_done_callback(_closing.discard)\n",
        ),
    ),
    mutation(
        "a closed scope keeps its guard",
        (
            "core/abandoned",
            "        loop.call_soon_threadsafe(set_done, over)\n",
            "        pass\n",
        ),
    ),
    mutation(
        "a hop to the thread is dropped when it is cancelled",
        (
            "core/waits",
            "    while claims:\n        try:\n",
            "    for _ in range(1):\n        try:\n",
        ),
    ),
    # Teardown
    mutation(
        "what a factory lets through of a group counts as its own failure",
        ("core/factory", "if isinstance(failure, BaseExceptionGroup):", "if False:"),
    ),
    mutation(
        "whatever a factory raises of a group counts as the group",
        (
            "core/factory",
            "return any(_is_failure(error, inner) for inner in thrown.exceptions)",
            "return thrown is not None",
        ),
    ),
    mutation(
        "an error ends the teardown",
        (
            "core/teardown",
            "            if scope.take(record):\n                rest = begin_end(record, failure, problems)\n",
            "            if not problems and scope.take(record):\n                rest = begin_end(record, failure, problems)\n",
        ),
        (
            "core/teardown",
            "        while held:\n            record = held.pop()\n",
            "        if problems:\n            return\n        while held:\n            record = held.pop()\n",
        ),
    ),
    mutation(
        "an exception that refuses a note is replaced",
        (
            "core/errors",
            '            object.__setattr__(error, "__notes__", [text])\n',
            "            error.add_note(text)\n",
        ),
        (
            "core/errors",
            "    except Exception:  # noqa: S110",
            "    except KeyError:  # noqa: S110",
        ),
    ),
    mutation(
        "an exception that has refused a note gets none",
        (
            "core/errors",
            '            object.__setattr__(error, "__notes__", [text])\n',
            "            error.add_note(text)\n",
        ),
    ),
    mutation(
        "notes pile up on an exception that is raised again",
        (
            "core/errors",
            "        elif isinstance(notes, list) and text not in notes_of(error):\n",
            "        elif isinstance(notes, list):\n",
        ),
    ),
    mutation(
        "what a client sends is printed as it is",
        ("core/names", "        if not character.isprintable():\n", "        if False:\n"),
        (
            "core/names",
            "    if len(text) <= limit and text.isprintable():\n",
            "    if len(text) <= limit:\n",
        ),
    ),
    mutation(
        "what a client sends is printed at any length",
        (
            "core/names",
            "        if room < 0:\n            break\n",
            "        if False:\n            break\n",
        ),
        ("core/names", "    for character in text[:limit]:", "    for character in text:"),
    ),
    mutation(
        "what was set up first is torn down first",
        (
            "core/teardown",
            "            record = held.pop()\n",
            "            record = held.pop(0)\n",
        ),
    ),
    mutation(
        "what lives until the response goes among what lives longer",
        (
            "core/books",
            "record.number += RESPONSE_FIRST",
            "pass",
        ),
    ),
    mutation(
        "several may take what is to be torn down",
        (
            "core/books",
            "        try:\n            value = record.value  # its finalizer may ask for anything, so it comes last\n            del record.value\n        except AttributeError:\n            return False\n        record.state = ENDING\n",
            "        value = None\n        if record.state != HELD:\n            return False\n        __import__('time').sleep(0.0001)\n        record.state = ENDING\n        with __import__('contextlib').suppress(AttributeError):\n            del record.value\n",
        ),
    ),
    mutation(
        "a KeyboardInterrupt is hidden by a cancellation",
        (
            "core/teardown",
            "        elif fatal is None or isinstance(fatal, asyncio.CancelledError):\n            fatal = problem\n",
            "        else:\n            fatal = problem\n",
        ),
    ),
    mutation(
        "whoever closes the scope tears a sync generator down",
        (
            "core/place",
            "        if record.scope.sync_only or self.ident == get_ident():\n",
            "        if self.way is None or record.scope.sync_only or self.ident == get_ident():\n",
        ),
    ),
    mutation(
        "what a thread comes to tear down too late has no generator any more",
        (
            "core/place",
            "            self.context.run(record.resource.factory.finish, generator, failure)\n",
            "            self.context.run(record.resource.factory.finish, record.generator, failure)\n",
        ),
    ),
    mutation(
        "a thread waits for what it is itself to tear down",
        ("core/place", "        elif self.ident == get_ident():\n", "        elif False:\n"),
    ),
    mutation(
        "a thread that hangs in a teardown is waited for",
        (
            "core/place",
            "        await _wait_for(record, done, scope.teardown_timeout)\n",
            "        await _wait_for(record, done)\n",
        ),
    ),
    mutation(
        "a lifespan's sync generator ends in any thread",
        (
            "core/first_use",
            "    if not resource.factory.is_generator or resource.lifetime is not LIFESPAN:\n",
            "    if True:\n",
        ),
    ),
    mutation(
        "the way back to a thread is not kept",
        ("core/first_use", "        way.keep()\n", ""),
    ),
    mutation(
        "the way back to a thread is kept for ever",
        (
            "core/place",
            "            do_for(done, finish_there)\n        self.way.let_go()\n",
            "            do_for(done, finish_there)\n",
        ),
        (
            "core/place",
            "            finally:\n                self.way.let_go()\n",
            "            finally:\n                pass\n",
        ),
    ),
    mutation(
        "what ends with its thread is not torn down",
        (
            "core/place",
            "        except RuntimeError:  # the thread has ended",
            "        except KeyError:  # the thread has ended",
        ),
    ),
    mutation(
        "a set-up that fails leaves its own thread running",
        (
            "core/first_use",
            "    except BaseException:\n        way.let_go()\n        raise\n",
            "    except BaseException:\n        raise\n",
        ),
    ),
    mutation(
        "async factories are not told of the failure",
        ("core/factory", "await generator.athrow(failure)", "await generator.__anext__()"),
    ),
    mutation(
        "sync factories are not told of the failure",
        ("core/factory", "generator.throw(failure)", "next(generator)"),
    ),
    mutation(
        "a teardown may hang",
        ("core/deadline", "                bound.expire()\n", "                pass\n"),
    ),
    mutation(
        "errors of teardowns are not raised",
        (
            "core/teardown",
            "            raise TeardownError(scope, errors)\n",
            "            return\n",
        ),
    ),
    mutation(
        "set-ups under way are not stopped",
        (
            "core/scope",
            "        cancellation = await stop_keepers(self, lifetime) if in_loop else None\n",
            "        cancellation = None\n",
        ),
    ),
    mutation(
        "what threads set up with what a scope holds is not waited for",
        (
            "core/scope",
            "                await wait_for_threads(self, lifetime, deadline, in_loop=in_loop)\n",
            "                if not in_loop:\n                    await wait_for_threads(self, lifetime, deadline, in_loop=in_loop)\n",
        ),
    ),
    mutation(
        "sync code does not wait for what threads set up with what its scope holds",
        (
            "core/scope",
            "                await wait_for_threads(self, lifetime, deadline, in_loop=in_loop)\n",
            "                if in_loop:\n                    await wait_for_threads(self, lifetime, deadline, in_loop=in_loop)\n",
        ),
    ),
    mutation(
        "a thread that sets up for ever keeps the scope open",
        (
            "core/scope",
            "        deadline = monotonic() + self.teardown_timeout\n",
            "        deadline = monotonic() + 1000\n",
        ),
    ),
    mutation(
        "a factory that closes its own scope waits for itself",
        (
            "core/teardown",
            "        and not _leads_to(record, here)\n    ]:\n",
            "    ]:\n",
        ),
    ),
    mutation(
        "a thread that closes a scope waits for the set-up that it is a part of",
        (
            "core/teardown",
            "        and not _leads_to(record, here)\n        and any(",
            "        and any(",
        ),
    ),
    mutation(
        "what is set up too late is never torn down",
        (
            "core/books",
            "            not self.takes(record.resource) and self.take_and_tell(record)\n        ):\n            return False\n",
            "            not self.takes(record.resource) and self.take_and_tell(record)\n        ):\n            record.generator = None\n            return False\n",
        ),
    ),
    mutation(
        "a closed scope keeps what ended it",
        (
            "core/scope",
            "self.failure = self.owner = self.request = None",
            "self.owner = self.request = None",
        ),
    ),
    mutation(
        "a record that is gone keeps what it used",
        (
            "core/record",
            "        self.generator = self.place = self.uses = self.needs = None\n",
            "        self.place = self.needs = None\n",
        ),
    ),
    mutation(
        "a scope that is collected open says nothing",
        ("core/scope", '"_state", "new") == "open" and self.records:', '"_state", "new") == "":'),
    ),
    mutation(
        "a scope that is collected open says so though it holds nothing",
        (
            "core/scope",
            '"_state", "new") == "open" and self.records:',
            '"_state", "new") == "open":',
        ),
    ),
    mutation(
        "a closed scope sets up all the same",
        (
            "core/books",
            "not self.takes(resource) and (record is None or record.state != HELD)",
            "False",
        ),
        (
            "core/books",
            """if not self.is_open or (self.has_responded and resource.lifetime is RESPONSE):
            raise""",
            """if False:
            raise""",
        ),
    ),
    # First use
    mutation(
        "what fails at the end of the stack stays half-open",
        (
            "core/first_use",
            "record.state = GONE  # first, and without a call: the stack may be at its end",
            "pass",
        ),
    ),
    mutation(
        "what fails at the end of a sync stack stays half-open",
        ("core/first_use", "record.state = GONE  # as above", "pass"),
    ),
    mutation(
        "a sync set-up may fail before anybody sees it fail",
        (
            "core/first_use",
            "    try:\n        if not scope.is_owner_here():\n            context = scope.context()\n            record.place = Thread(context)\n",
            "    if not scope.is_owner_here():\n        context = scope.context()\n        record.place = Thread(context)\n    try:\n",
        ),
    ),
    mutation(
        "an error that is copied is made anew, with other words",
        (
            "core/errors",
            "return _again, (type(self), *self.args), state",
            "return type(self), self.args, state",
        ),
    ),
    mutation(
        "an error takes its resource to another process",
        ("core/errors", 'state.keys() & {"resource", "needed"}', "()"),
    ),
    mutation(
        "a group that is copied takes its words for its scope",
        (
            "core/errors",
            "return again, (type(self), self.scope, self.exceptions), state",
            "return super().__reduce__()",
        ),
    ),
    mutation(
        "a teardown is taken for a task that a factory has left running",
        ("core/lookup", "left_running=here.state in (HELD, GONE),", "left_running=True,"),
    ),
    mutation(
        "a lifespan's block is taken for no scope at all",
        (
            "core/lookup",
            "in_lifespan=scope is not None and scope.is_open)",
            "in_lifespan=False)",
        ),
    ),
    mutation(
        "no keeper: factories run wherever they are asked for",
        (
            "core/first_use",
            "        if is_new and scope.owns_set_ups and scope.owner is asyncio.current_task():\n",
            "        if is_new:\n",
        ),
    ),
    mutation(
        "who asks while it is set up is not told when it is",
        (
            "core/record",
            "                    waiter.set_result(outcome)\n",
            "                    pass\n",
        ),
    ),
    mutation(
        "those who wait are cancelled with the one who asked first",
        (
            "core/first_use",
            "    if not is_new and not isinstance(outcome.error, Exception):\n",
            "    if False:\n",
        ),
    ),
    mutation(
        "a value is not handed to those who wait",
        (
            "core/first_use",
            "        return record.scope.is_open or record.state == HELD\n",
            "        return record.state == HELD\n",
        ),
    ),
    mutation(
        "a value is handed to those who wait though its scope has closed",
        (
            "core/first_use",
            "        return record.scope.is_open or record.state == HELD\n",
            "        return True\n",
        ),
    ),
    mutation(
        "who waits may be told twice",
        (
            "core/record",
            "                del waiters[waiter]  # whoever completes it and whoever takes it may come at "
            "once\n            except KeyError:  # pragma: no cover (a race of two threads)\n"
            "                continue\n",
            "                __import__('time').sleep(0.0001)\n"
            "                waiters.pop(waiter, None)\n"
            "            except KeyError:\n                continue\n",
        ),
    ),
    mutation(
        "each who waits leaves its frames on the error",
        ("core/record", "        set_traceback(self.error, self.traceback)\n", ""),
    ),
    mutation(
        "a plain with block in async code runs async factories",
        ("core/request", "is_owned = not sync_only and", "is_owned ="),
    ),
    mutation(
        "threads that wait are not told when it is set up",
        ("core/record", "                waiter.wake(outcome)\n", "                pass\n"),
    ),
    mutation(
        "who has stopped waiting stays among those who wait",
        ("core/record", "        self.waiters.pop(waiter, None)\n", "        pass\n"),
    ),
    mutation(
        "a set-up that has failed stays behind",
        (
            "core/books",
            "        if record.state == GONE:\n            with _lock:",
            "        if False:\n            with _lock:",
        ),
    ),
    mutation(
        "a set-up that the garbage collector ends takes another's scope away",
        (
            "core/first_use",
            "        # Where the garbage collector has ended this, it is somebody else's Context.\n        if current.get() is record:\n",
            "        if True:\n",
        ),
    ),
    mutation(
        "a scope that a factory holds becomes that of who asks",
        (
            "core/first_use",
            "    current.set(outer)  # which its factory may have set: to a scope that it holds, say\n",
            "    if current.get() is record:\n        current.set(outer)\n",
        ),
    ),
    mutation(
        "what a thread came to release too late is told of as being torn down for ever",
        (
            "core/record",
            "        if (ending := self.scope.ending) is not None:\n            ending.pop(self, None)\n",
            "",
        ),
    ),
    mutation(
        "a task that shares a Context is taken for a part of the set-up there",
        (
            "core/first_use",
            "            if not _is_of_another_task(blocked):\n",
            "            if True:\n",
        ),
    ),
    mutation(
        "a task that waits for sync code's thread has no patience",
        (
            "core/first_use",
            "            timer = loop.call_later(_PATIENCE, _give_up, record, waiter, context=Context())\n",
            "            pass\n",
        ),
    ),
    mutation(
        "sync code that waits for its own thread has no patience",
        (
            "core/first_use",
            "    is_bound = running_loop() is not None or _is_in_this_thread(record)\n",
            "    is_bound = running_loop() is not None\n",
        ),
    ),
    mutation(
        "sync code that holds the event loop up has no patience",
        (
            "core/first_use",
            "    is_bound = running_loop() is not None or _is_in_this_thread(record)\n",
            "    is_bound = _is_in_this_thread(record)\n",
        ),
    ),
    mutation(
        "a set-up goes on though nobody wants it",
        (
            "core/first_use",
            "            record.place.cancel()  # nobody wants",
            "            pass  # nobody wants",
        ),
    ),
    mutation(
        "what is set up in a scope that a factory has opened is in no circle",
        (
            "core/first_use",
            "        elif scope.around is not None and record.place is None:\n            blocked = _set_up_around()\n",
            "",
        ),
    ),
    mutation(
        "who waits in a scope that a factory has opened is in no circle",
        (
            "core/first_use",
            "    blocked = asker or _set_up_around()\n    if blocked is not None:\n        try",
            "    blocked = asker\n    if blocked is not None:\n        try",
        ),
    ),
    mutation(
        "what sync code sets up in a scope that a factory has opened is in no circle",
        (
            "core/first_use",
            "    if asker is None and scope.around is not None:\n",
            "    if False:\n",
        ),
    ),
    mutation(
        "a thread that waits in a scope that a factory has opened is in no circle",
        (
            "core/first_use",
            "    blocked = asker or _set_up_around()\n    if blocked is not None:\n        blocked",
            "    blocked = asker\n    if blocked is not None:\n        blocked",
        ),
    ),
    mutation(
        "a scope in a scope that a factory has opened is in no circle",
        (
            "core/first_use",
            "    while around is not None and not isinstance",
            "    while False and not isinstance",
        ),
    ),
    mutation(
        "a task that a factory has started is a part of it in a scope of its own too",
        (
            "core/first_use",
            "    return around if scope.owner in (None, _task_of(around)) else None\n",
            "    return around\n",
        ),
    ),
    mutation(
        "circles are not looked for",
        (
            "core/record",
            "if other.needs and (circle := other.way_to(self)):",
            "if other.needs and (circle := None):",
        ),
    ),
    mutation(
        "a circle is looked for before it is noted",
        (
            "core/record",
            "        self.note_need(other, waiter)\n        if other.needs and (circle := other.way_to(self)):\n            self.got(waiter)\n            raise CircularResourceError([step.resource for step in [self, *circle]])\n",
            "        if other.needs and (circle := other.way_to(self)):\n            raise CircularResourceError([step.resource for step in [self, *circle]])\n        __import__('time').sleep(0.0001)\n        self.note_need(other, waiter)\n",
        ),
    ),
    mutation(
        "what is not waited for any more is still looked at for a circle",
        (
            "core/record",
            "    def got(self, waiter: object) -> None:\n        if (needs := self.needs) is not None:\n",
            "    def got(self, waiter: object) -> None:\n        if False:\n",
        ),
    ),
    mutation(
        "the way of a circle is looked for on every path",
        (
            "core/record",
            "                if needed is self or needed in came_from:\n",
            "                if needed is self:\n",
        ),
    ),
    mutation(
        "threads do not wait for each other's set-ups",
        (
            "core/books",
            "            record = self.records.setdefault(resource, new)\n",
            "            record = self.records[resource] = new\n",
        ),
    ),
    # Isolation
    mutation(
        "a request takes over the open scope around it",
        (
            "serving/receivers",
            '    return scope_class(_name(scope["method"], scope["path"])).open()\n',
            "    if isinstance(around := scope_here(), RequestScope):\n"
            "        return around\n"
            '    return scope_class(_name(scope["method"], scope["path"])).open()\n',
        ),
    ),
    mutation(
        "the scope around another is not current again",
        (
            "core/scope",
            "current.set(previous if previous is not None and previous.is_open else None)",
            "current.set(None)",
        ),
    ),
    mutation(
        "a lifespan resource is set up in the Context of the first request",
        ("core/lifespan", "return self._base.copy()", "return copy_context()"),
    ),
    mutation(
        "shutdown does not wait for open requests",
        (
            "core/lifespan",
            "            cancellation = await self._requests_ended(set(around))\n",
            "            pass\n",
        ),
    ),
    mutation(
        "a lifespan that is joined inside a request waits for that",
        (
            "core/lifespan",
            "            cancellation = await self._requests_ended(set(around))\n",
            "            cancellation = await self._requests_ended(set())\n",
        ),
    ),
    mutation(
        "a lifespan that is joined inside a request, be it by sync code, is closed under it",
        (
            "core/lifespan",
            "            closes = not left and self._claim()\n",
            "            closes = self._claim()\n",
        ),
    ),
    mutation(
        "a lifespan of sync code is closed under another thread's request",
        (
            "core/lifespan",
            "            if self.loop is not None:\n                left &=",
            "            if True:\n                left &=",
        ),
    ),
    mutation(
        "the requests around the one around it are forgotten",
        (
            "core/lifespan",
            "            previous = previous.scope.around\n",
            "            previous = None\n",
        ),
    ),
    mutation(
        "a lifespan that somebody closes may be joined",
        (
            "core/lifespan",
            "        return self.is_open and not self._is_claimed\n",
            "        return self.is_open\n",
        ),
    ),
    mutation(
        "a lifespan that somebody has taken over is closed by its last holder",
        (
            "core/lifespan",
            "        if self._holders or self._idle or",
            "        if self._idle or",
        ),
    ),
    mutation(
        "a request scope that a lifespan's factory holds is waited for",
        (
            "core/request",
            "            if (mine := of_whose_factory(self.around, self.loop)) is not None:\n                self.lifespan = mine.scope.lifespan\n                return\n",
            "",
        ),
    ),
    mutation(
        "a scope in a scope that a lifespan's factory holds is waited for",
        (
            "core/lifespan",
            "        here = here.scope.around\n    return None\n",
            "        return None\n    return None\n",
        ),
    ),
    mutation(
        "what is opened as an implied lifespan ends has another",
        (
            "core/request",
            "            if (mine := of_whose_factory(self.around, self.loop)) is not None:\n                self.lifespan = mine.scope.lifespan  #",
            "            if (mine := None) is not None:\n                self.lifespan = mine.scope.lifespan  #",
        ),
    ),
    mutation(
        "what is opened as a resource ends knows nothing around it",
        ("core/record", "self.scope.is_open or self.state == ENDING", "self.scope.is_open"),
    ),
    mutation(
        "a task that a lifespan's resource has left running is not waited for",
        ("core/lifespan", "here.state in (STARTING, ENDING)", "True"),
    ),
    mutation(
        "a background task that a lifespan's factory starts is a part of its set-up",
        ("serving/background", "        current.set(None)\n", ""),
    ),
    mutation(
        "a lifespan keeps requests that are never closed",
        (
            "core/lifespan",
            "[id(request)] = ref(request, self._lost)\n",
            "[id(request)] = lambda: request\n",
        ),
    ),
    mutation(
        "a request that is collected counts as open",
        (
            "core/lifespan",
            "                    self._requests.pop(address, None)\n",
            "                    pass\n",
        ),
    ),
    mutation(
        "who waits for a lifespan's requests is not told of one that is collected",
        (
            "core/lifespan",
            "            with suppress(RuntimeError):  # the event loop has ended\n                self._tell_of_end()\n",
            "",
        ),
    ),
    mutation(
        "a server's request keeps all before it that were never closed",
        (
            "serving/receivers",
            "        if self.served and isinstance(here, _ForeignScope) and here.served:\n",
            "        if False:\n",
        ),
    ),
    mutation(
        "after a server's request the one before it, which is open still, is not current",
        (
            "serving/receivers",
            "        if was_here and before is not None and before.is_open:\n",
            "        if False:\n",
        ),
    ),
    mutation(
        "a server's request that is to be closed yet is not kept",
        ("serving/receivers", "        if opened.served:  #", "        if False:  #"),
    ),
    # Until the response
    mutation(
        "nothing ends with the response",
        ("serving/exchange", "request_scope.begin_to_respond()) is not None", "None) is not None"),
    ),
    mutation(
        "nothing ends with the response under WSGI",
        (
            "serving/handler",
            "                run_without_loop(rest)\n",
            "                rest.close()\n",
        ),
    ),
    mutation(
        "all ends with the response",
        (
            "core/request",
            "        for rest in end_all(self, RESPONSE, self.failure, problems):\n",
            "        for rest in end_all(self, REQUEST, self.failure, problems):\n",
        ),
    ),
    mutation(
        "the closers of a response that an error replaces are forgotten",
        ("serving/ending", "    page._resource_closers.extend(response._resource_closers)\n", ""),
    ),
    mutation(
        "the closers of a response that is never sent are forgotten",
        (
            "serving/handler",
            "                close_resources(response)  # nobody else will see it\n",
            "                pass\n",
        ),
    ),
    mutation(
        "a stream that an error replaces is left to the garbage collector",
        (
            "serving/exchange",
            "                await drop_stream(self.response, request_scope)\n",
            "                pass\n",
        ),
    ),
    mutation(
        "a request that was cancelled keeps it beyond request_finished's receivers",
        ("serving/exchange", "await self.attempt(end_response(request_scope))", "pass"),
    ),
    mutation(
        "a malformed request keeps it beyond its response",
        (
            "serving/exchange",
            "await request_scope.end_response()  # receivers",
            "pass  # receivers",
        ),
    ),
    mutation(
        "what async middleware raises is not noted",
        (
            "serving/handler",
            "                note_failure(error)\n                return await",
            "                return await",
        ),
    ),
    mutation(
        "what middleware raises is not noted in sync code",
        (
            "serving/handler",
            "            note_failure(error)\n            return exception",
            "            return exception",
        ),
    ),
    mutation(
        "a view that a middleware cancels and answers for has succeeded",
        (
            "serving/handler",
            "                note_failure(error)\n                raise\n\n        return inner_async",
            "                raise\n\n        return inner_async",
        ),
    ),
    mutation(
        "a factory's own timeout is taken for the server's cancellation",
        ("serving/exchange", "            if self.is_cut_off():\n", "            if True:\n"),
    ),
    mutation(
        "a stream's end may take for ever",
        ("serving/ending", "await in_time(iterator.aclose(), ", "await (iterator.aclose()) or ("),
    ),
    mutation(
        "a receiver may take for ever",
        ("serving/exchange", "await in_time(called, ", "await called or ("),
    ),
    mutation(
        "a closer that raises keeps the others from their work",
        (
            "serving/ending",
            "        except Exception:  # noqa: S110",
            "        except KeyError:  #",
        ),
    ),
    mutation(
        "a response whose close() raises ends nothing",
        ("serving/ending", "        if not response.closed:\n", "        if False:\n"),
    ),
    mutation(
        "what waits for the response begins though the request has failed",
        ("serving/background", "    if scope.failure is not None:\n", "    if False:\n"),
    ),
    mutation(
        "a background task is torn down under its sync code",
        (
            "serving/background",
            "            if thread is not None and thread.is_busy:\n",
            "            if False:\n",
        ),
    ),
    mutation(
        "a long stream is not logged",
        ("serving/streams", "        if self.seconds is not None:\n", "        if False:\n"),
    ),
    mutation(
        "a stream may set up anew what ended with the response",
        (
            "core/books",
            "return self.is_open and not (self.has_responded and resource.lifetime is RESPONSE)",
            "return self.is_open",
        ),
    ),
    mutation(
        "a resource may ask for what does not live as long",
        (
            "core/books",
            "if asker is not None and asker.resource.lifetime > resource.lifetime:",
            "if False:",
        ),
    ),
    mutation(
        "a lifespan resource asks for a request's without being told why not",
        ("core/lookup", "    if isinstance(here, Record):\n", "    if False:\n"),
    ),
    mutation(
        "what has cancelled a keeper is not told to its factory",
        (
            "core/place",
            "return cancellation if failure is None and scope.tells_own_cancellation else failure",
            "return failure",
        ),
    ),
    # Early release
    mutation(
        "what has used a resource outlives its release",
        (
            "core/release",
            "            if not gone.isdisjoint(record.used):\n                gone.add(record)\n",
            "            if False:\n                gone.add(record)\n",
        ),
    ),
    mutation(
        "what has used a resource is torn down after it",
        ("core/release", "record := users.pop()", "record := users.pop(0)"),
    ),
    mutation(
        "one that found it set up already is not known to use it",
        (
            "core/books",
            "            asker.use(record)\n            if self",
            "            if is_new:\n                asker.use(record)\n            if self",
        ),
    ),
    mutation(
        "releases do not wait for each other",
        ("core/release", "    await wait_for_others(scope, in_loop=True)\n", ""),
    ),
    mutation(
        "all who wait to release are woken at each end",
        ("core/release", "    if asker_here() is not None:  # whom", "    if True:  # whom"),
    ),
    mutation(
        "who came last releases first",
        ("core/release", "turns.popitem(last=False)", "turns.popitem()"),
    ),
    mutation(
        "a release that is cancelled as its turn comes keeps it",
        (
            "core/release",
            "        else:  # it came in this moment\n            _end_turn(scope)\n",
            "",
        ),
    ),
    mutation(
        "a release that a teardown waits for takes its turn",
        ("core/release", "    if asker_here() is not None:  # whom", "    if False:  # whom"),
    ),
    mutation(
        "a release that a teardown asks for waits for the one around it",
        (
            "core/release",
            "                    self.asker.note_need(record, record)\n",
            "                    pass\n",
        ),
    ),
    mutation(
        "a release waits for the teardown that waits for it",
        (
            "core/teardown",
            "if record.state != GONE and not _leads_to(record, here)",
            "if record.state != GONE and record is not here",
        ),
    ),
    mutation(
        "what a teardown asks for is not known to be waited for by it",
        ("core/current", "here.state in (STARTING, ENDING)", "here.state == STARTING"),
    ),
    mutation(
        "a release that waits already is not told that a teardown waits for it",
        (
            "core/record",
            "            record.settle(None)  # who waits",
            "            pass  # who waits",
        ),
    ),
    mutation(
        "a teardown is a user of what it asks for",
        ("core/books", "if asker is not None and asker.state == ENDING:", "if False:"),
    ),
    mutation(
        "a thread's set-up is given what is about to go",
        (
            "core/books",
            "            if isinstance(asker.place, Thread) and not",
            "            if False and not",
        ),
    ),
    mutation(
        "what a thread sets up with a lifespan's is not waited for",
        (
            "core/books",
            "        if asker is not None:  # of this scope, or of a request that uses the lifespan's\n",
            "        if asker is not None and asker.scope is self:\n",
        ),
    ),
    mutation(
        "a background task that is cancelled twice leaves its scope to somebody else",
        (
            "serving/background",
            "            if failure is None:\n                failure = error\n",
            "            raise\n",
        ),
    ),
    mutation(
        "factories are not told of a background task that is cancelled after its work",
        (
            "serving/background",
            "            if failure is None:\n                failure = error\n",
            "            pass\n",
        ),
    ),
    mutation(
        "what a thread has just taken is not waited for",
        (
            "core/teardown",
            "if record.state != GONE and not _leads_to(record, here)",
            "if record.state == 2 and not _leads_to(record, here)",
        ),
    ),
    mutation(
        "a release does not wait for what somebody else has taken meanwhile",
        ("core/release", "            elif scope.is_open:\n                yield None\n", ""),
    ),
    mutation(
        "a release in sync code does not wait for what another thread has just taken",
        (
            "core/release",
            "                await wait_for_others(self.scope, in_loop=self.in_loop)\n",
            "                if self.in_loop:\n                    await wait_for_others(self.scope, in_loop=True)\n",
        ),
    ),
    mutation(
        "what a thread takes after the look is not waited for",
        (
            "core/teardown",
            "if is_busy or scope.ending:",
            "if is_busy:",
        ),
    ),
    mutation(
        "the end does not look anew at what a thread completes as it comes",
        (
            "core/teardown",
            "                yield scope.stop(lifetime, problems)\n                break\n",
            "                yield scope.stop(lifetime, problems)\n",
        ),
    ),
    mutation(
        "a teardown does not find what is there yet",
        (
            "core/lookup",
            "(lifespan.is_open or resource in lifespan.records)",
            "lifespan.is_open",
        ),
    ),
    mutation(
        "a teardown in a thread does not find the lifespan",
        (
            "core/lookup",
            "    lifespan = None if scope is None or scope.is_over else scope.lifespan\n",
            "    lifespan = scope if scope is not None and scope.lifespan is scope else None\n",
        ),
    ),
    mutation(
        "a teardown in a thread is lost where its task is cancelled before its first step",
        (
            "core/waits",
            "        if task.cancelled() and claims:  # before",
            "        if False:  # before",
        ),
    ),
    mutation(
        "work is lost where the task that gives it to a thread is cancelled before its first step",
        ("core/waits", "        if not (task.cancelled() and claims):\n", "        if True:\n"),
    ),
    mutation(
        "the end of a scope does not wait for a release",
        (
            "core/scope",
            "                await wait_for_others(self, in_loop=in_loop)\n",
            "                pass\n",
        ),
    ),
    mutation(
        "the response does not wait for a release",
        (
            "core/request",
            "if not self.has_boundary and not self.ending:",
            "if not self.has_boundary:",
        ),
    ),
    mutation(
        "a release does not see what is being set up",
        (
            "core/release",
            "                and not gone.isdisjoint(record.used)\n",
            "                and False\n",
        ),
    ),
    mutation(
        "a factory cannot release what it has used",
        (
            "core/release",
            "                and not (asker is not None and record.way_to(asker) is not None)\n",
            "",
        ),
    ),
    mutation(
        "who has wrapped create_task does not see the request's task",
        ("serving/exchange", 'return hasattr(create_task, "__wrapped__")', "return False"),
    ),
    mutation(
        "whoever reads bodies in Django's place does not see the empty ones",
        (
            "asgi",
            'if getattr(read, "__func__", None) is not _djangos_read_body:',
            "if False:",
        ),
    ),
    mutation(
        "a body ends where its first part is empty",
        ("asgi", "if message == _NO_BODY:", 'if not message.get("body"):'),
    ),
    mutation(
        "the sync code that waits for a request is not looked for",
        ("core/waits", "_beneath.get(None) is None:", "True:"),
    ),
    mutation(
        "a request leaves its lifespan before it is told that it has closed",
        (
            "core/scope",
            "        self._let_go(failure if self.failure is None else self.failure)\n"
            "        if self.lifespan is None or (rest := self._closed()) is None:\n"
            "            return ()\n",
            "        rest = None if self.lifespan is None else self._closed()\n"
            "        self._let_go(failure if self.failure is None else self.failure)\n"
            "        if rest is None:\n"
            "            return ()\n",
        ),
    ),
    mutation(
        "what a lifespan failed with hides what the last of its requests did",
        (
            "core/scope",
            "            yield self._end_of_lifespan(rest, problems)\n",
            "            yield rest\n",
        ),
    ),
    mutation(
        "what a lifespan failed with is told apart from what its last request did",
        (
            "core/scope",
            "            problems.extend(error.exceptions)\n",
            "            problems.append(error)\n",
        ),
    ),
    mutation(
        "sync code that ends a request ends the lifespan of an event loop itself",
        ("core/lifespan", "        if can_wait or self.loop is None:\n", "        if True:\n"),
    ),
    mutation(
        "a client that leaves at once cuts short what hears of the request's start",
        ("serving/exchange", "        if not self.starting:\n", "        if True:\n"),
    ),
    mutation(
        "a request whose client has left at its start is answered",
        (
            "serving/exchange",
            "        if self.client_gone or self.stray is not None:  # meanwhile",
            "        if False:  # meanwhile",
        ),
    ),
    mutation(
        "a receiver without a hash fails every request",
        (
            "serving/receivers",
            "    except Exception:  # somebody's own, that",
            "    except ValueError:  # that",
        ),
    ),
    mutation(
        "what an error page sets in ContextVars is lost",
        ("serving/handler", "    adopt(context)\n", ""),
    ),
    mutation(
        "a response ends whichever request is current",
        (
            "serving/ending",
            "    with as_current(scope):\n        close_resources(response)\n"
            "        listeners.send(request_finished)\n",
            "    close_resources(response)\n    listeners.send(request_finished)\n",
        ),
    ),
    mutation(
        "a response with a close() of its own ends whichever request is current",
        (
            "serving/ending",
            "    with as_current(scope):\n        close_response(response, own_close)\n",
            "    close_response(response, own_close)\n",
        ),
    ),
    mutation(
        "a response that is served again ends its first request",
        (
            "serving/ending",
            "            if before.is_open:\n",
            "            if True:\n                return response\n            if before.is_open:\n",
        ),
    ),
    mutation(
        "requests that share a response end each other",
        ("serving/ending", "            if before.is_open:\n", "            if False:\n"),
    ),
    mutation(
        "a response that middleware closes ends the request",
        (
            "serving/receivers",
            "and (sender is not None or scope.tells_of_response):",
            "and sender is not None:",
        ),
    ),
    mutation(
        "the page of a request whose thread hangs waits for that",
        (
            "serving/handler",
            "        if thread is not None and thread.is_busy:\n",
            "        if False:\n",
        ),
    ),
    mutation(
        "a background task in a test uses another connection than that",
        (
            "serving/background",
            "    thread = None if scope.is_brief else LentThread(tidy)\n",
            "    thread = LentThread(tidy)\n",
        ),
    ),
    mutation(
        "a stream sees what is another request's",
        (
            "serving/streams",
            "            with as_current(scope):  # a server",
            "            if True:  # a server",
        ),
    ),
    mutation(
        "an async stream under WSGI sees what is another request's",
        ("serving/streams", "            with as_current(scope):\n", "            if True:\n"),
    ),
    mutation(
        "under WSGI a stream is of Django's class",
        (
            "serving/streams",
            '    if getattr(response, "_iterator", None) is None:\n',
            "    if False:\n",
        ),
    ),
    mutation(
        "what a thread looks at is set up by nobody where it is released meanwhile",
        (
            "core/first_use",
            "            scope.fail(record, asyncio.CancelledError())\n",
            "            pass\n",
        ),
    ),
    mutation(
        "a task keeps each scope that it has opened",
        ("core/abandoned", "partial(owner.remove_done_callback, gone)", "lambda: None"),
    ),
    mutation(
        "a keeper knows who was the first to ask",
        ("core/place", "        del set_up  # it knows who has asked first\n", ""),
    ),
    mutation(
        "a record that is gone keeps its key",
        (
            "core/record",
            '            self.resource = getattr(self.resource, "keyed", self.resource)  # without its key\n',
            "            pass\n",
        ),
    ),
    mutation(
        "a value's finalizer runs before it is known that the value goes",
        (
            "core/books",
            "            value = record.value  # its",
            "            value = None  # its",
        ),
    ),
    mutation(
        "a key that cannot be compared stops the teardown",
        (
            "core/books",
            "            self.records.pop(record.resource, None)  # a fork empties them\n"
            "        except Exception:\n",
            "            self.records.pop(record.resource, None)  # a fork empties them\n"
            "        except KeyError:\n",
        ),
    ),
    mutation(
        "a key that cannot be compared hides why a set-up failed",
        (
            "core/books",
            "                        del self.records[record.resource]\n                except Exception:\n",
            "                        del self.records[record.resource]\n                except KeyError:\n",
        ),
    ),
    mutation(
        "a stray thread is told that it is a teardown",
        ("core/books", "                and self.thread == get_ident()\n", ""),
    ),
    mutation(
        "a timer that was cancelled keeps a request",
        ("core/waits", "set_done, time_is_up, context=Context())", "set_done, time_is_up)"),
    ),
    mutation(
        "what has been read of a body is kept to its end",
        ("asgi", "        del message\n", ""),
    ),
    mutation(
        "whoever had put another reading of bodies in Django's place is not asked",
        ("asgi", "_found if _found.__module__ == ASGIHandler.__module__ else object()", "_found"),
    ),
    mutation(
        "whoever waits for a lifespan's requests is not told of the last",
        (
            "core/lifespan",
            "            if self._idle:\n                self._tell_of_end()\n",
            "",
        ),
    ),
    mutation(
        "of two who wait for a lifespan's requests the first to wait is forgotten",
        (
            "core/lifespan",
            "                self._idle[idle] = around\n",
            "                self._idle = {idle: around}\n",
        ),
        (
            "core/lifespan",
            "            with _lock:\n                del self._idle[idle]\n",
            "            with _lock:\n                self._idle = {}\n",
        ),
    ),
    mutation(
        "whose time is up gives up the requests for which another waits",
        ("core/lifespan", "(is_late and self._idle)", "False"),
    ),
    mutation(
        "a lifespan is closed under a request that comes as the last one ends",
        (
            "core/lifespan",
            "            is_late = not idle.done() or",
            "            is_late = idle.done() or",
        ),
    ),
    mutation(
        "who waits for a lifespan's requests keeps them",
        ("core/lifespan", "            del left  # which would keep what nobody closes\n", ""),
    ),
    mutation(
        "who has taken a lifespan over is not left alone with its requests",
        ("core/lifespan", "not left or self._holders or", "not left or"),
    ),
    mutation(
        "who has gone without closing a lifespan holds it still",
        (
            "core/lifespan",
            "            self._holders = 0  # they have gone\n",
            "            pass\n",
        ),
    ),
    mutation(
        "a teardown that was cancelled by its like passes for one that was cancelled from outside",
        (
            "core/teardown",
            "(task := current_task()) is None or task.cancelling() > 0",
            "bool(task := current_task()) or True",
        ),
    ),
    mutation(
        "nobody is told which teardown was cancelled",
        ("core/errors", "        note(error, text)\n", "        pass\n"),
    ),
    mutation(
        "a background task begins in an event loop that ends with the view",
        (
            "serving/background",
            "    if around is not None and around.sync_only and around.request is not None and _is_brief(loop):\n",
            "    if False:\n",
        ),
    ),
    mutation(
        "no background task may be begun in a scope of sync code",
        ("serving/background", "around.request is not None and _is_brief(loop)", "True"),
    ),
    mutation(
        "a background task that is cut off with its event loop is not told of",
        (
            "serving/background",
            "        elif scope.is_brief and not _is_brief(asyncio.get_running_loop()):\n",
            "        elif False:\n",
        ),
    ),
    mutation(
        "a background task that somebody has cancelled is told of as cut off",
        (
            "serving/background",
            "        elif scope.is_brief and not _is_brief(asyncio.get_running_loop()):\n",
            "        elif scope.is_brief:\n",
        ),
    ),
    mutation(
        "a background task that nobody has cancelled hides that behind what its teardown says",
        ("serving/background", " and was_cancelled != is_cancelled():", ":"),
    ),
    mutation(
        "what is cancelled in the thread for sync code passes for done",
        (
            "core/waits",
            "            raise cancellation or asyncio.CancelledError\n",
            "            return\n",
        ),
    ),
    mutation(
        "a server whose start-up awaits something cancelled takes that for its end",
        (
            "asgi",
            "    except (Exception, asyncio.CancelledError) as error:\n",
            "    except Exception as error:\n",
        ),
    ),
    mutation(
        "a shutdown that is cancelled is told of as its failure",
        ("asgi", "isinstance(error, asyncio.CancelledError) and is_cancelled()", "False"),
    ),
    mutation(
        "what a factory opens in its lifespan knows nothing of that factory",
        (
            "core/lifespan",
            "            self._here = mine\n",
            "            self._here = mine.scope\n",
        ),
    ),
    mutation(
        "sync code in a factory's thread is part of an event loop's lifespan",
        ("core/lifespan", "mine.scope.is_open and mine.scope.loop is loop:", "mine.scope.is_open:"),
    ),
    mutation(
        "what is eager is set up once more by its own end",
        (
            "core/lifespan",
            "        self._sets_up = mine is None\n",
            "        self._sets_up = True\n",
        ),
    ),
    mutation(
        "a background task closes a coroutine that somebody else awaits",
        (
            "serving/background",
            '    if getattr(coroutine, "cr_await", None) is None:\n        coroutine.close()\n',
            "    coroutine.close()\n",
        ),
    ),
    mutation(
        "a background task that nobody has cancelled ends without a word",
        (
            "serving/background",
            "if isinstance(failure, asyncio.CancelledError) and not is_cancelled():",
            "if False:",
        ),
    ),
    mutation(
        "what a TestCase has failed with does not reach the factories",
        (
            "pytest_plugin",
            "    report = yield  # in which pytest's unittest plugin finds out what a TestCase has failed with\n",
            "",
        ),
        (
            "pytest_plugin",
            "            item.stash[_failures].append(call.excinfo.value)\n    return report\n",
            "            item.stash[_failures].append(call.excinfo.value)\n    return (yield)\n",
        ),
        (
            "pytest_plugin",
            "            if report.failed:  # by passing, where it was to fail\n",
            "            if False:\n",
        ),
    ),
    mutation(
        "a test that passes, and was to fail, has not failed for the factories",
        (
            "pytest_plugin",
            "            if report.failed:  # by passing, where it was to fail\n",
            "            if False:\n",
        ),
    ),
    mutation(
        "a test that is interrupted commits",
        (
            "pytest_plugin",
            "        item.stash.get(_failures, nobodys).append(error)\n",
            "",
        ),
    ),
    mutation(
        "a backend of anyio's makes sync tests async",
        ("pytest_plugin", " and _is_async(request.function):", ":"),
    ),
    mutation(
        "a client that is entered twice is left once",
        (
            "testing",
            "        await self._held.pop().__aexit__(",
            "        await self._held[-1].__aexit__(",
        ),
    ),
    mutation(
        "what has yet to run stands in as a value",
        ("core/override", "    elif isinstance(stand_in, UNFINISHED):\n", "    elif False:\n"),
    ),
    mutation(
        "a resource that is made of a static method is none of what is of its class",
        (
            "core/declare",
            "    if isinstance(function, staticmethod):  # in a class's body: so it is to be had as one\n",
            "    if False:\n",
        ),
    ),
    mutation(
        "leaks of an async function are looked for before it has run",
        (
            "testing",
            '        return during_each_call(assert_no_leaks, function, "assert_no_leaks")\n',
            "        return lambda *args, **kwargs: [function(*args, **kwargs), self.__enter__(), self.__exit__(None, None, None)][0]  # type: ignore\n",
        ),
    ),
    mutation(
        "a page waits for the sync code that waits for it",
        ("serving/handler", "lent_here() if sync_parent() is None else None", "lent_here()"),
    ),
    mutation(
        "a lifespan's own factory may hold it",
        (
            "core/lifespan",
            "        if mine is not None and mine.scope.is_open and",
            "        if mine is not None and False and",
        ),
    ),
    mutation(
        "a lifespan that closes is that of what its factories open",
        (
            "core/lifespan",
            "        if mine is not None and mine.scope.is_open and",
            "        if mine is not None and",
        ),
    ),
    mutation(
        "the last request closes a lifespan that its holder is about to close",
        ("core/lifespan", "if self._holders or self._idle or not", "if self._holders or not"),
    ),
    mutation(
        "what a teardown asks for counts as asked for by a factory",
        ("core/access", "(asker is None or asker.state == STARTING)", "True"),
    ),
    mutation(
        "what a factory asks for first is not noted as used by it",
        (
            "core/books",
            "            asker.use(record)\n        return record\n",
            "            pass\n        return record\n",
        ),
    ),
    mutation(
        "locks are held in a forked process too",
        ("core/waits", "os.register_at_fork(after_in_child=lock._at_fork_reinit)", "pass"),
    ),
    mutation(
        "a release looks once only",
        ("core/release", "if scope.version != version or not users:", "if not users:"),
    ),
    mutation(
        "a release does not look anew at who has come to use it",
        (
            "core/books",
            "            asker.use(record)\n            if self.ending is not None:\n                self.version = next_number()\n",
            "            asker.use(record)\n",
        ),
    ),
    mutation(
        "a release does not look anew at what was set up meanwhile",
        (
            "core/books",
            "        record.state = HELD\n        if self.ending is not None:\n            self.version = next_number()\n",
            "        record.state = HELD\n",
        ),
    ),
    mutation(
        "a release is not checked again when it looks anew",
        (
            "core/release",
            "                    users = self.check()\n                except",
            "                    users = self.users()\n                except",
        ),
    ),
    mutation(
        "a release changes something before it is refused",
        ("core/release", "self.check()  # before anything changes", "self.users()"),
    ),
    mutation(
        "a thread releases what another has set up",
        ("core/release", "place.is_here(in_loop=self.in_loop)", "place.is_here(in_loop=True)"),
    ),
    mutation(
        "sync code releases while something else is torn down",
        ("core/release", "    if others_ending(scope):\n", "    if False:\n"),
    ),
    mutation(
        "sync code tears down what is async",
        (
            "core/release",
            "        if not self.in_loop and record.resource.factory.is_async:\n",
            "        if False:\n",
        ),
    ),
    mutation(
        "what was used once is taken to be used for ever",
        (
            "core/record",
            "        self.generator = self.place = self.uses = self.needs = None\n",
            "        self.generator = self.place = self.needs = None\n",
        ),
    ),
    mutation(
        "anybody may release what the owner has set up",
        ("core/release", "self.scope.is_owner_here() if place is None", "True if place is None"),
    ),
    # The sync world
    mutation(
        "a body that fails under WSGI is no failure",
        (
            "serving/streams",
            "        scope.note_failure(error)\n        raise\n\n\nasync def _parts_async",
            "        raise\n\n\nasync def _parts_async",
        ),
    ),
    mutation(
        "a body that a WSGI server gives up is a failure",
        (
            "serving/streams",
            "        raise  # the server has had enough\n",
            "        scope.note_failure(GeneratorExit())\n        raise\n",
        ),
    ),
    mutation(
        "what leaves Django's WSGI handler leaves the scope open",
        ("wsgi", "                close_foreign(sender=type(self))\n", ""),
    ),
    mutation(
        "what leaves Django's WSGI handler closes the scope around it",
        ("wsgi", "if current.get() is not around:", "if True:"),
    ),
    mutation(
        "what WSGI has answered waits for the garbage collector",
        ("serving/ending", '    response.__dict__.pop("close", None)  #', "    pass  #"),
    ),
    mutation(
        "who patches a response's close() is gone round",
        (
            "serving/ending",
            "        if own is None and response.__class__.close is _djangos_close:\n",
            "        if own is None:\n",
        ),
    ),
    mutation(
        "a response that is served twice at once tells of its first handler",
        (
            "serving/ending",
            '        if (how := getattr(own, "func", None)) in (close_plainly, _close_itself):\n',
            '        if (how := getattr(own, "func", None)) is _close_itself:\n',
        ),
    ),
    mutation(
        "under WSGI a response's end reaches no async receiver",
        (
            "serving/receivers",
            "            signal.send(self.sender)\n            return\n",
            "            pass\n",
        ),
    ),
    mutation(
        "no cache is closed",
        ("serving/receivers", " or caches_have_to_be_closed():", ":"),
    ),
    mutation(
        "caches are looked through once and for all",
        (
            "serving/caches",
            "if _Seen.settings is not (settings := caches.settings):",
            "if (settings := caches.settings) and _Seen.settings is None:",
        ),
    ),
    mutation(
        "a forked process uses what its parent has set up",
        ("core/lifespan", "os.register_at_fork(after_in_child=_forked)\n", ""),
    ),
    mutation(
        "a forked process closes at its exit what its parent has set up",
        ("core/lifespan", "        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))\n", ""),
    ),
    mutation(
        "a request that was open at the fork keeps its parent's lifespan",
        (
            "core/request",
            "while self.lifespan is None or self.lifespan.is_parents:",
            "while self.lifespan is None:",
        ),
    ),
    # Background tasks, tests, signals
    mutation(
        "a background task that shutdown no longer waits for runs on",
        ("serving/background", "        self.task.cancel()\n", "        return None\n"),
    ),
    mutation(
        "a background task uses the request's thread",
        (
            "serving/background",
            "    with thread or nullcontext():\n",
            "    if thread:\n",
        ),
    ),
    # Threads
    mutation(
        "a thread is lent again whose request was cut off",
        (
            "serving/exchange",
            "            self.thread.lend_again = False  #",
            "            pass  #",
        ),
    ),
    mutation(
        "a thread is lent again whose background task has failed",
        (
            "serving/background",
            "                thread.lend_again = False\n",
            "                pass\n",
        ),
    ),
    mutation(
        "an idle thread holds a transaction that nobody ended",
        ("serving/exchange", "            self.thread.leave()\n", "            pass\n"),
    ),
    mutation(
        "a thread that ends leaves its connections to the garbage collector",
        ("serving/threads", "        _close_connections()\n        _workers", "        _workers"),
    ),
    mutation(
        "receivers are looked through once and for all",
        ("serving/receivers", " and found.connected == signal.receivers", ""),
    ),
    mutation(
        "who wraps receivers later is gone round",
        ("serving/receivers", " and found.look_up is look_up", ""),
    ),
    mutation(
        "a handler keeps receivers that are gone",
        (
            "serving/receivers",
            "        if only_tidy(receivers[0])",
            "        if receivers or only_tidy(receivers[0])",
        ),
    ),
    mutation(
        "a thread hears of no connection to a database",
        ("serving/threads", "        worker.is_connected = True\n", "        pass\n"),
    ),
    mutation(
        "a thread seems busy when its last work has been heard of",
        ("serving/threads", "            self.done += 1  # before", "            pass  # before"),
        (
            "serving/threads",
            "                _answer(future, result, failure)\n",
            "                _answer(future, result, failure)\n"
            "                time.sleep(0.01)\n"
            "                self.done += 1\n",
        ),
        ("serving/threads", "import os\n", "import os\nimport time\n"),
    ),
    mutation(
        "what Sentry patches is gone round",
        (
            "asgi",
            "await super().__call__(scope, receive, send)",
            "await self.handle(scope, receive, send)",
        ),
    ),
    mutation(
        "factories are not told of a background task's failure",
        ("serving/background", "await scope.end(failure)", "await scope.close()"),
    ),
    mutation(
        "a background task that never began keeps its scope",
        ("serving/background", "    if scope.is_open:  #", "    if False:  #"),
    ),
    mutation(
        "an override is not undone",
        ("core/override", "recipes[-1] if recipes else self._access.resource", "self._recipe"),
    ),
    mutation(
        "an override undoes the one inside it",
        (
            "core/override",
            "recipes[-1] if recipes else self._access.resource",
            "self._access.resource",
        ),
    ),
    mutation(
        "two of one key are two",
        (
            "core/resource",
            "            and other.key == self.key\n",
            "            and other.key is self.key\n",
        ),
    ),
    mutation(
        "two of one key of two resources are one",
        ("core/resource", "            and other.keyed is self.keyed", "            and True"),
    ),
    mutation(
        "a function with a scope for each call gives away what is yet to run",
        ("core/calls", "            _refuse_unfinished(name, result)\n", ""),
    ),
    mutation(
        "a coroutine function has a scope for its call and not for its work",
        ("core/calls", "    if iscoroutinefunction(function):  #", "    if False:  #"),
    ),
    mutation(
        "test clients' lifespan-scoped resources live for ever",
        ("serving/receivers", '("django.test.", "scoped.testing")', '("django.test.",)'),
    ),
    mutation(
        "signals do not tell who asked",
        (
            "core/first_use",
            "    return None if asker is None or asker.state == ENDING else asker.resource\n",
            "    return None\n",
        ),
    ),
    mutation(
        "signals tell of a teardown as of a factory that asks",
        ("core/first_use", "None if asker is None or asker.state == ENDING else", "asker and"),
    ),
]


def copy(to: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("scoped", "tests", "demo"):
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", to)


def apply(mutation: Mutation, to: Path) -> None:
    for edit in mutation.edits:
        path = to / "scoped" / f"{edit.module}.py"
        source = path.read_text()
        if (count := source.count(edit.old)) != 1:
            sys.exit(f"{mutation.what!r}: {count} times in {edit.module}.py, not once: {edit.old}")
        path.write_text(source.replace(edit.old, edit.new))


def run_tests(directory: Path, tests: list[str]) -> str | None:
    """The first test that fails, or None."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "pytest", "-x", "-q", "--tb=no"]
    command += ["-p", "no:randomly", "-p", "no:cacheprovider", "--timeout=20", *tests]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "mutation"}
    environment.pop("PYTHONPATH", None)  # `-m` puts the copy first
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=DEADLINE)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"(hangs for {DEADLINE} s)"
    if process.returncode == 0:
        return None
    if failed := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE):
        return failed[1].removeprefix("tests/")
    return f"(exit code {process.returncode}) {output.strip().splitlines()[-1:]}"


def likely(mutation: Mutation, tests: list[str]) -> list[str]:
    """Those that have the name of what is broken, and of the core's those on its books."""
    names = {edit.module.rpartition("/")[2] for edit in mutation.edits}
    if any(edit.module.startswith("core/") for edit in mutation.edits):
        names.add("books")
    return [test for test in tests if any(name in test for name in names)]


def check(mutation: Mutation, tests: list[str]) -> tuple[Mutation, str | None, float]:
    with tempfile.TemporaryDirectory(prefix="scoped-mutation-") as name:
        directory = Path(name)
        copy(directory)
        apply(mutation, directory)
        start = time.monotonic()
        failed, first = None, likely(mutation, tests)
        if first:  # it is half of the time to collect the others
            failed = run_tests(directory, first)
        if failed is None and (rest := [test for test in tests if test not in first]):
            failed = run_tests(directory, rest)
        return mutation, failed, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="mutations whose description contains this")
    parser.add_argument("--module", default="", help="mutations of modules that begin with this")
    parser.add_argument("--skip", type=int, default=0, help="so many of these")
    parser.add_argument("--seconds", type=float, help="begin with none after so many")
    parser.add_argument("tests", nargs="*", default=TESTS)
    options = parser.parse_args()

    chosen = [
        mutation
        for mutation in MUTATIONS
        if options.only in mutation.what
        and any(edit.module.startswith(options.module) for edit in mutation.edits)
    ][options.skip :]
    with tempfile.TemporaryDirectory(prefix="scoped-mutation-") as name:
        for number, one in enumerate(chosen):  # before the first minute is spent
            directory = Path(name, str(number))
            shutil.copytree(ROOT / "scoped", directory / "scoped")
            apply(one, directory)
    _, failed, seconds = check(mutation("nothing"), options.tests)
    if failed is not None:
        sys.exit(f"Without any mutation this fails: {failed}")
    print(f"Without any mutation the tests pass, in {seconds:.0f} s.\n")

    end = None if options.seconds is None else time.monotonic() + options.seconds

    def checked(one: Mutation) -> tuple[Mutation, str | None, float] | None:
        return check(one, options.tests) if end is None or time.monotonic() < end else None

    ran = survivors = 0
    print(f"| {'Mutation':76} | Caught by | Seconds |\n|---|---|---|")
    with ThreadPoolExecutor(options.processes) as workers:
        for result in workers.map(checked, chosen):
            if result is None:
                break
            one, failed, seconds = result
            ran, survivors = ran + 1, survivors + (failed is None)
            print(f"| {one.what:76} | {failed or 'SURVIVES'} | {seconds:.0f} |", flush=True)
    print(f"\n{ran} mutations, {ran - survivors} caught, {survivors} survive.")
    if ran < len(chosen):
        print(f"{len(chosen) - ran} are left: --skip {options.skip + ran}.")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
