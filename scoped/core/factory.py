"""
Turns the four kinds of factory into one: something that is started, which
gives the value and perhaps a generator, and later finished with how the scope
ended. Past this module nobody asks which kind it was, only whether it is
async.
"""

import inspect
import sys
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, cast

from scoped.core.errors import FactoryError, set_traceback
from scoped.core.names import printable_repr

if sys.version_info >= (3, 14):
    from annotationlib import Format

    # What an annotation names may be there for the type checker alone (PEP 649).
    _signature = partial(inspect.signature, annotation_format=Format.STRING)
else:
    _signature = inspect.signature

__all__ = ["UNFINISHED", "Factory", "is_function"]

_ONCE = "Yield the value exactly once; what follows the `yield` tears it down."
_ITSELF = (
    "the generator function itself, without @contextmanager or @asynccontextmanager: "
    "scoped makes one of it."
)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Factory:
    """
    ``start()`` returns ``(generator or None, value)`` and ``finish(generator,
    failure)`` tears the value down. Where ``is_async`` is true, the value is to be
    awaited, and StopAsyncIteration then means that the generator has
    ``never_yielded()``; ``finish`` takes the first step, which is the last of most,
    and returns what is to be awaited for the rest, or None. Where the factory is
    keyed, ``start()`` takes its arguments.
    """

    name: str
    declared_at: str
    kind: str
    is_async: bool
    start: Callable[..., Any]
    finish: Callable[[Any, BaseException | None], Any]
    function: Callable[..., Any]  # the user's own, for whoever reads it

    @classmethod
    def of(cls, function: Callable[..., Any], *, keyed: bool = False) -> "Factory":
        """
        Raises FactoryError where ``function`` is no function that can be called
        without arguments or, where it is ``keyed``, with positional ones.
        """
        if isinstance(function, staticmethod):  # in a class's body
            function = function.__func__
        if not is_function(function):
            raise _refusal(function)
        written = _as_written(_without_partial(function))
        name = _name_of(function, written)
        code = getattr(written, "__code__", None)
        declared_at = f"{code.co_filename}:{code.co_firstlineno}" if code else "a builtin"
        label = _label(name, declared_at)
        _check_parameters(label, function, keyed=keyed)
        start: Callable[..., Any]
        finish: Callable[[Any, BaseException | None], Any]
        if _makes_generators(written) and not _makes_generators(function):
            problem = "is a generator function wrapped in another decorator"
            raise FactoryError(label, problem, f"Decorate {_ITSELF}")
        if inspect.isasyncgenfunction(function):
            kind, is_async = "async generator", True
            start, finish = _async_generator(label, function)
        elif inspect.iscoroutinefunction(function):
            kind, is_async = "coroutine function", True
            start, finish = _coroutine_function(label, function), _nothing_to_finish
        elif inspect.isgeneratorfunction(function):
            kind, is_async = "generator", False
            start, finish = _generator(label, function)
        else:
            kind, is_async = "function", False
            start, finish = _function(label, function), _nothing_to_finish
        return cls(name, declared_at, kind, is_async, start, finish, written)

    def __repr__(self) -> str:
        return f"<Factory {self}>"

    def __str__(self) -> str:
        return _label(self.name, self.declared_at)

    @property
    def is_generator(self) -> bool:
        return self.finish is not _nothing_to_finish

    def never_yielded(self) -> FactoryError:
        return _never_yielded(str(self))


def _never_yielded(label: str) -> FactoryError:
    return FactoryError(label, "ended without a `yield`", _ONCE)


def is_function(thing: object) -> bool:
    """Or partial() of one: which is a routine, too, from Python 3.14 on, be it what it may."""
    bare = _without_partial(thing)
    return inspect.isroutine(bare) and callable(bare)


def _without_partial(function: Any) -> Any:
    return _without_partial(function.func) if isinstance(function, partial) else function


def _makes_generators(function: Any) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _as_written(function: Any) -> Any:
    """The user's own function, of which a decorator has made another one."""
    try:
        return inspect.unwrap(function)
    except ValueError:  # it is wrapped in itself
        return function


def _name_of(function: Any, written: Any) -> str:
    # A partial has no name, but may have been given one.
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    module = getattr(written, "__module__", None)
    return ".".join(filter(None, (module, name or written.__qualname__)))


def _check_parameters(label: str, function: Callable[..., Any], *, keyed: bool) -> None:
    try:
        parameters = list(_signature(function).parameters.values())
    except ValueError:  # a builtin that does not tell
        return
    required = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and (one.kind is one.KEYWORD_ONLY or not keyed)
    ]
    if required and keyed:
        raise FactoryError(
            label,
            f"needs a keyword argument, {required[0]!r}",
            "A keyed factory is called with positional arguments: give the parameter a default, "
            "or move it before the `*`.",
        )
    if required:
        raise FactoryError(
            label,
            f"needs an argument, {required[0]!r}",
            "A factory is called without arguments: ask for what it needs in its body, or give the "
            "parameter a default. For one value for each set of arguments, declare it with "
            "@request_scoped(keyed=True).",
        )
    if keyed and not any(
        one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD, one.VAR_POSITIONAL)
        for one in parameters
    ):
        raise FactoryError(
            label,
            "is keyed, and takes no positional argument",
            "Give it a parameter for each part of the key, or leave out keyed=True.",
        )


def _label(name: str, declared_at: str) -> str:
    return f"{name} ({declared_at})"


def _refusal(thing: object) -> FactoryError:
    name, problem, call = printable_repr(thing), "not a function", "..."
    if inspect.isclass(thing):
        name, problem = f"{thing.__module__}.{thing.__qualname__}", "a class"
        call = f"{thing.__name__}(...)"
    return FactoryError(
        name,
        f"is {problem}, so it cannot be a factory",
        f"Write a function: `def name(): return {call}`, or `async def` with `return` or `yield`.",
    )


async def _aclose(generator: AsyncGenerator[Any, None]) -> Exception | None:
    try:
        await generator.aclose()
    except Exception as error:
        return error
    return None


def _is_failure(error: BaseException, failure: BaseException | None) -> bool:
    """
    Whether a generator gave back what was thrown into it. A task group around
    the ``yield`` puts it in an exception group; an ``except*`` lets through what it has not
    handled of one. Python turns a StopIteration or StopAsyncIteration that leaves a generator
    into a RuntimeError (PEP 479, 525).
    """
    if error is failure:
        return True
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return all(_is_failure(inner, failure) for inner in group.exceptions)
    if isinstance(failure, BaseExceptionGroup):
        thrown = cast("BaseExceptionGroup[BaseException]", failure)
        return any(_is_failure(error, inner) for inner in thrown.exceptions)
    return (
        isinstance(failure, StopIteration | StopAsyncIteration)
        and type(error) is RuntimeError
        and error.__cause__ is failure
    )


def _async_generator(
    label: str, function: Callable[..., AsyncGenerator[Any, None]]
) -> tuple[Callable[..., Any], Callable[[Any, BaseException | None], Awaitable[None] | None]]:
    def start(*key: Any) -> tuple[AsyncGenerator[Any, None], Awaitable[Any]]:
        generator = function(*key)
        return generator, generator.__anext__()

    async def throw(generator: AsyncGenerator[Any, None], failure: BaseException) -> None:
        traceback = failure.__traceback__
        try:
            await generator.athrow(failure)
        except BaseException as error:
            if not _is_failure(error, failure):
                raise
            raise StopAsyncIteration from None
        finally:
            # Each throw adds the generator's frames to it.
            set_traceback(failure, traceback)

    def finish(
        generator: AsyncGenerator[Any, None], failure: BaseException | None
    ) -> Awaitable[None] | None:
        step: Any = generator.__anext__() if failure is None else throw(generator, failure)
        try:
            waits_for = step.send(None)
        except StopAsyncIteration:
            return None
        except StopIteration:
            return refuse(generator)
        return finish_later(generator, _go_on(step, waits_for))

    async def finish_later(generator: AsyncGenerator[Any, None], step: Awaitable[Any]) -> None:
        try:
            await step
        except StopAsyncIteration:
            return
        await refuse(generator)

    async def refuse(generator: AsyncGenerator[Any, None]) -> NoReturn:
        raise FactoryError(label, "yielded more than once", _ONCE) from await _aclose(generator)

    return start, finish


@types.coroutine
def _go_on(begun: Any, waits_for: Any) -> Generator[Any, Any, None]:
    """As ``await begun`` does, after its first step."""
    while True:
        try:
            try:
                answer = yield waits_for
            except GeneratorExit:
                begun.close()
                raise
            except BaseException as error:
                waits_for = begun.throw(error)
            else:
                waits_for = begun.send(answer)
        except StopIteration:
            return


def _generator(
    label: str, function: Callable[..., Generator[Any, None, None]]
) -> tuple[Callable[..., Any], Callable[[Any, BaseException | None], None]]:
    def start(*key: Any) -> tuple[Generator[Any, None, None], Any]:
        generator = function(*key)
        try:
            return generator, next(generator)
        except StopIteration:
            raise _never_yielded(label) from None

    def finish(generator: Generator[Any, None, None], failure: BaseException | None) -> None:
        traceback = failure.__traceback__ if failure is not None else None
        try:
            if failure is None:
                next(generator)
            else:
                generator.throw(failure)
        except StopIteration:
            return
        except BaseException as error:
            if _is_failure(error, failure):
                return
            raise
        finally:
            if failure is not None:
                set_traceback(failure, traceback)
        cause: Exception | None = None
        try:
            generator.close()
        except Exception as error:
            cause = error
        raise FactoryError(label, "yielded more than once", _ONCE) from cause

    return start, finish


def _coroutine_function(
    label: str, function: Callable[..., Awaitable[Any]]
) -> Callable[..., tuple[None, Awaitable[Any]]]:
    async def value_of(*key: Any) -> Any:
        value = await function(*key)
        if isinstance(value, UNFINISHED):
            if isinstance(value, types.AsyncGeneratorType):
                await _aclose(cast("AsyncGenerator[Any, None]", value))
            raise _unfinished(label, value)
        return value

    def start(*key: Any) -> tuple[None, Awaitable[Any]]:
        return None, value_of(*key)

    return start


def _function(label: str, function: Callable[..., Any]) -> Callable[..., tuple[None, Any]]:
    def start(*key: Any) -> tuple[None, Any]:
        value = function(*key)
        if isinstance(value, UNFINISHED):
            raise _unfinished(label, value)
        return None, value

    return start


UNFINISHED = types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType


def _unfinished(label: str, value: Any) -> FactoryError:
    """What somebody was to run: a decorator hides of which kind the factory is, say."""
    with suppress(Exception):
        if isinstance(value, types.AsyncGeneratorType):
            value.aclose().send(None)  # nothing has begun in it, so nothing waits
        else:
            value.close()
    if isinstance(value, types.CoroutineType):
        return FactoryError(
            label,
            f"is a function that returned a coroutine, of {_made_by(value.cr_code)}",
            "Write `async def`, and `await` it there; in a decorator around it, too.",
        )
    if isinstance(value, types.GeneratorType):
        what = f"a generator, of {_made_by(value.gi_code)}"
    else:
        what = f"an async generator, of {_made_by(value.ag_code)}"
    return FactoryError(
        label,
        f"is a function that returned {what}, which nobody has run",
        f"Where a decorator hides the factory, decorate {_ITSELF} Where what it yields is the "
        "value, return a list of that, or an object with an `__iter__()`.",
    )


def _made_by(code: types.CodeType) -> str:
    return _label(code.co_qualname, f"{code.co_filename}:{code.co_firstlineno}")


def _nothing_to_finish(_generator: None, _failure: BaseException | None) -> None:
    raise AssertionError(  # pragma: no cover (its identity counts: nobody calls it)
        "a factory without a generator has nothing to finish"
    )
