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
        *("until_response", "release", "wsgi"),
        *("factories", "threads", "many_threads", "every_await", "model"),
        *("background", "testing", "signals", "good_neighbour"),
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
        "neither the handler nor its receiver closes the scope",
        ("serving/exchange", "await self.attempt(close(request_scope))", "pass"),
        ("serving/receivers", "        await close(scope)\n", "        pass\n"),
    ),
    mutation(
        "the handler leaves the closing to its receiver",
        ("serving/exchange", "await self.attempt(close(request_scope))", "pass"),
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
        ("serving/exchange", "await self.attempt(close_stream(self.response, whose))", "pass"),
    ),
    mutation(
        "a sync view that runs on is not waited for",
        ("serving/exchange", "await self.attempt(sync_code_ended(self.thread, whose))", "pass"),
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
        ("core/scope", "            raise fatal\n", "            return\n"),
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
        "a hop to the thread is dropped when it is cancelled",
        ("core/waits", "    while not begun:\n", "    for _ in range(1):\n"),
    ),
    # Teardown
    mutation(
        "an error ends the teardown",
        (
            "core/scope",
            "        while self.values:\n",
            "        while self.values and not errors:\n",
        ),
    ),
    mutation(
        "what was set up first is torn down first",
        (
            "core/scope",
            "resource = self.values.popitem()[0]",
            "self.values.pop(resource := next(iter(self.values)))",
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
        ("core/teardown", "                teardown.expire()\n", "                pass\n"),
    ),
    mutation(
        "errors of teardowns are not raised",
        (
            "core/scope",
            "                raise TeardownError(self, errors)\n",
            "                pass\n",
        ),
    ),
    mutation(
        "set-ups under way are not stopped",
        ("core/scope", "if self.pending and (cancellation", "if None and (cancellation"),
    ),
    mutation(
        "what is set up too late is never torn down",
        (
            "core/scope",
            "rest = finish(resource, self, generator, self.failure)",
            "rest = None",
        ),
    ),
    mutation(
        "a closed scope keeps what ended it",
        (
            "core/scope",
            "self.failure = self.owner = self.uses",
            "self.uses",
        ),
    ),
    mutation(
        "a closed scope sets up all the same",
        (
            "core/scope",
            'if self._state != "open" and not (self._state == "closing" and resource in '
            "self.values):",
            "if False:",
        ),
    ),
    # First use
    mutation(
        "no keeper: factories run wherever they are asked for",
        (
            "core/scope",
            "            and self.owner is asyncio.current_task()\n        ):\n",
            "        ):\n",
        ),
        (
            "core/scope",
            "if self.owns_set_ups and self.owner is asyncio.current_task():",
            "if True:",
        ),
    ),
    mutation(
        "who asks while it is set up is not told when it is",
        (
            "core/record",
            "                    waiter.set_result(error)\n",
            "                    pass\n",
        ),
    ),
    mutation(
        "those who wait are cancelled with the one who asked first",
        ("core/scope", "(first or isinstance(error, Exception))", "(True)"),
    ),
    mutation(
        "a set-up goes on though nobody wants it",
        (
            "core/scope",
            "                set_up.keeper.cancel()  # nobody",
            "                pass  # nobody",
        ),
    ),
    mutation(
        "circles are not looked for",
        ("core/record", "if circle := _way(other, self, set()):", "if circle := None:"),
    ),
    mutation(
        "threads do not wait for each other's set-ups",
        (
            "core/scope",
            "other = latched.setdefault(resource, set_up)",
            "other = latched[resource] = set_up",
        ),
    ),
    # Isolation
    mutation(
        "a request takes over the open scope around it",
        (
            "serving/receivers",
            '    ServedScope(_name(scope["method"], scope["path"])).open()\n',
            "    if current.get() is None:\n"
            '        ServedScope(_name(scope["method"], scope["path"])).open()\n',
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
        ("core/lifespan", "cancellation = await self._requests_ended()", "cancellation = None"),
    ),
    mutation(
        "a lifespan resource may ask for a request's",
        (
            "core/request",
            "        raise LifetimeError(asker, resource, asker.lifetime.value, "
            "resource.lifetime.value)\n",
            "        return here.scope\n",
        ),
    ),
    # Until the response
    mutation(
        "nothing ends with the response",
        ("serving/exchange", "            await scope.end_response()\n", "            pass\n"),
    ),
    mutation(
        "nothing ends with the response under WSGI",
        (
            "serving/handler",
            "            run_without_loop(scope.end_response())\n",
            "            pass\n",
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
        "a response whose close() raises ends nothing",
        ("serving/ending", "        if not response.closed:\n", "        if False:\n"),
    ),
    mutation(
        "what waits for the response begins though the request has failed",
        ("serving/background", "    if scope.failure is not None:\n", "    if False:\n"),
    ),
    mutation(
        "a background task is torn down under its sync code",
        ("serving/background", "            if thread.is_busy:\n", "            if False:\n"),
    ),
    mutation(
        "a long stream is not logged",
        ("serving/streams", "        if self.seconds is not None:\n", "        if False:\n"),
    ),
    mutation(
        "a stream may set up anew what ended with the response",
        (
            "core/request",
            '"open" if around.is_open and not around.has_responded else "closed"',
            '"open" if around.is_open else "closed"',
        ),
    ),
    mutation(
        "a request's resource may ask for what ends with the response",
        ("core/request", "if not isinstance(here, SetUp) or here.scope is not scope:", "if True:"),
    ),
    mutation(
        "a keeper's timeout across the yield is not seen until the response",
        (
            "core/scope",
            "self.lifetime is not Lifetime.LIFESPAN:",
            "self.lifetime is Lifetime.REQUEST:",
        ),
    ),
    # Early release
    mutation(
        "what has used a resource outlives its release",
        (
            "core/release",
            "if one is resource or not gone.isdisjoint(uses.get(one, ())):",
            "if one is resource:",
        ),
    ),
    mutation(
        "what has used a resource is torn down after it",
        ("core/release", "        holder, user = users[-1]\n", "        holder, user = users[0]\n"),
    ),
    mutation(
        "releases do not wait for each other",
        ("core/release", "    await others_released(scope)\n", ""),
    ),
    mutation(
        "a release that a teardown asks for waits for the one around it",
        ("core/teardown", "            release.tasks.append(keeper.task)\n", "            pass\n"),
    ),
    mutation(
        "the end of a scope does not wait for a release",
        (
            "core/scope",
            "        if self.releases:\n            overs",
            "        if None:\n            overs",
        ),
    ),
    mutation(
        "the end of an empty block does not wait for a release",
        ("core/request", "            or self.releases\n", ""),
    ),
    mutation(
        "the response does not wait for a release",
        ("core/request", "            await others_released(self)\n", ""),
    ),
    mutation(
        "a release does not wait for what ends with the response",
        (
            "core/request",
            "            with releasing(self):\n                await",
            "            if True:\n                await",
        ),
    ),
    mutation(
        "a release does not see what is being set up",
        (
            "core/release",
            "if doomed.isdisjoint(set_up.uses or ()) or set_up.waits_for(asker):",
            "if True:",
        ),
    ),
    mutation(
        "a factory cannot release what it has used",
        ("core/release", " or set_up.waits_for(asker):", ":"),
    ),
    mutation(
        "a release takes what was set up later out of its teardown's reach",
        ("core/scope", "        for one in reversed(later):\n", "        for one in ():\n"),
    ),
    mutation(
        "what is torn down in a keeper is not taken from its scope",
        (
            "core/scope",
            "self.others.pop(resource, None)\n            rest =",
            "self.others.get(resource)\n            rest =",
        ),
    ),
    mutation(
        "a release goes on with what is set up anew",
        ("core/release", "        if user is resource:\n", "        if False:\n"),
    ),
    mutation(
        "threads may set it up anew between the two steps of a release",
        (
            "core/scope",
            "            del self.values[resource]\n"
            "            return None if self.others is None else self.others.pop(resource, None)\n",
            "            del self.values[resource]\n"
            "        __import__('time').sleep(0.0001)\n"
            "        return None if self.others is None else self.others.pop(resource, None)\n",
        ),
    ),
    mutation(
        "an empty block's end forgets the threads that set up",
        ("core/request", "            or self.latched\n", ""),
    ),
    mutation(
        "locks are held in a forked process too",
        ("core/waits", "        os.register_at_fork(after_in_child=self._renew)\n", ""),
    ),
    mutation(
        "a release looks once only",
        (
            "core/release",
            "    while users := _users_of(scope, resource):\n",
            "    users = _users_of(scope, resource)\n    while users:\n",
        ),
        (
            "core/release",
            "        holder, user = users[-1]\n",
            "        holder, user = users.pop()\n",
        ),
    ),
    mutation(
        "what was used once is taken to be used for ever",
        ("core/release", "            holder.uses.pop(user, None)\n", "            pass\n"),
    ),
    mutation(
        "anybody may release what the owner has set up",
        (
            "core/release",
            "        here = scope.thread == get_ident() and scope.owner is current_task()\n",
            "        here = True\n",
        ),
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
        ("wsgi", "if scope_here() is not around:", "if True:"),
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
        ("serving/background", "            self.task.cancel()\n", "            return None\n"),
    ),
    mutation(
        "a background task uses the request's thread",
        (
            "serving/background",
            "with LentThread(tidy) as thread:",
            "if thread := LentThread(tidy):",
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
        ("serving/background", "            thread.lend_again = False\n", ""),
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
        "a thread seems busy when its last work has been heard of",
        (
            "serving/threads",
            "        self.done += 1  # before",
            "        import time; time.sleep(0.01); self.done += 1  # before",
        ),
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
        ("serving/background", "await scope.close(failure)", "await scope.close()"),
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
        "test clients' lifespan-scoped resources live for ever",
        ("serving/receivers", '("django.test.", "scoped.testing")', '("django.test.",)'),
    ),
    mutation(
        "signals do not tell who asked",
        ("core/scope", "set_up.asked_by if asker is None else asker.resource", "None"),
    ),
    mutation(
        "the lifespan of a loop that ends is kept by who never dropped it",
        ("core/lifespan", "if not self._holders or loop_ends:", "if not self._holders:"),
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


def check(mutation: Mutation, tests: list[str]) -> tuple[Mutation, str | None, float]:
    with tempfile.TemporaryDirectory(prefix="scoped-mutation-") as name:
        directory = Path(name)
        copy(directory)
        apply(mutation, directory)
        start = time.monotonic()
        return mutation, run_tests(directory, tests), time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="mutations whose description contains this")
    parser.add_argument("tests", nargs="*", default=TESTS)
    options = parser.parse_args()

    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.what]
    with tempfile.TemporaryDirectory(prefix="scoped-mutation-") as name:
        for number, one in enumerate(chosen):  # before the first minute is spent
            directory = Path(name, str(number))
            shutil.copytree(ROOT / "scoped", directory / "scoped")
            apply(one, directory)
    _, failed, seconds = check(mutation("nothing"), options.tests)
    if failed is not None:
        sys.exit(f"Without any mutation this fails: {failed}")
    print(f"Without any mutation the tests pass, in {seconds:.0f} s.\n")

    survivors = 0
    print(f"| {'Mutation':66} | Caught by | Seconds |\n|---|---|---|")
    with ThreadPoolExecutor(options.processes) as workers:
        for one, failed, seconds in workers.map(lambda one: check(one, options.tests), chosen):
            survivors += failed is None
            print(f"| {one.what:66} | {failed or 'SURVIVES'} | {seconds:.0f} |", flush=True)
    print(f"\n{len(chosen)} mutations, {len(chosen) - survivors} caught, {survivors} survive.")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
