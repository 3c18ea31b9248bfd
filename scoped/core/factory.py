"""
Turns the four kinds of factory into one: something that is started, which
gives the value and perhaps a generator, and later finished with how the scope
ended. Past this module nobody asks which kind it was, only whether it is
async.
"""

import inspect
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from scoped.core.errors import FactoryError, set_traceback

__all__ = ["Factory"]

_ONCE = "Yield the value exactly once; what follows the `yield` tears it down."


@dataclass(frozen=True, slots=True, eq=False)
class Factory:
    """
    ``start()`` returns ``(generator or None, value)`` and ``finish(generator,
    failure)`` tears the value down. Where ``is_async`` is true, the value is to be
    awaited, and StopAsyncIteration then means that the generator has
    ``never_yielded()``; ``finish`` takes the first step, which is the last of most,
    and returns what is to be awaited for the rest, or None.
    """

    name: str
    declared_at: str
    kind: str
    is_async: bool
    start: Callable[[], Any]
    finish: Callable[[Any, BaseException | None], Any]
    function: Callable[[], Any]

    @classmethod
    def of(cls, function: Callable[[], Any]) -> "Factory":
        """
        Raises FactoryError where ``function`` is no function that can be called
        without arguments.
        """
        if not inspect.isroutine(function):
            raise _refusal(function)
        name = f"{function.__module__}.{function.__qualname__}"
        code = getattr(function, "__code__", None)
        declared_at = f"{code.co_filename}:{code.co_firstlineno}" if code else "a builtin"
        label = _label(name, declared_at)
        for parameter in _parameters(function):
            if parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                raise FactoryError(
                    label,
                    f"needs an argument, {parameter.name!r}",
                    "A factory is called without arguments: ask for what it needs in its body, "
                    "or give the parameter a default.",
                )
        start: Callable[[], Any]
        finish: Callable[[Any, BaseException | None], Any]
        if inspect.isasyncgenfunction(function):
            kind, is_async = "async generator", True
            start, finish = _async_generator(label, function)
        elif inspect.iscoroutinefunction(function):
            kind, is_async = "coroutine function", True
            start, finish = _coroutine_function(function), _nothing_to_finish
        elif inspect.isgeneratorfunction(function):
            kind, is_async = "generator", False
            start, finish = _generator(label, function)
        else:
            inner = inspect.unwrap(function)
            if inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner):
                raise FactoryError(
                    label,
                    "is a generator function wrapped in another decorator",
                    "Decorate the generator function itself, without @contextmanager or "
                    "@asynccontextmanager: scoped makes one of it.",
                )
            kind, is_async = "function", False
            start, finish = _function(label, function), _nothing_to_finish
        return cls(name, declared_at, kind, is_async, start, finish, function)

    def __str__(self) -> str:
        return _label(self.name, self.declared_at)

    @property
    def is_generator(self) -> bool:
        return self.finish is not _nothing_to_finish

    def never_yielded(self) -> FactoryError:
        return _never_yielded(str(self))


def _never_yielded(label: str) -> FactoryError:
    return FactoryError(label, "ended without a `yield`", _ONCE)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin that does not tell
        return []


def _label(name: str, declared_at: str) -> str:
    return f"{name} ({declared_at})"


def _refusal(thing: object) -> FactoryError:
    name, problem, call = repr(thing), "not a function", "..."
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
    the ``yield`` puts it in an exception group. Python turns a StopIteration or
    StopAsyncIteration that leaves a generator into a RuntimeError (PEP 479, 525).
    """
    if error is failure:
        return True
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return all(_is_failure(inner, failure) for inner in group.exceptions)
    return (
        isinstance(failure, StopIteration | StopAsyncIteration)
        and type(error) is RuntimeError
        and error.__cause__ is failure
    )


def _async_generator(
    label: str, function: Callable[[], AsyncGenerator[Any, None]]
) -> tuple[Callable[[], Any], Callable[[Any, BaseException | None], Awaitable[None] | None]]:
    def start() -> tuple[AsyncGenerator[Any, None], Awaitable[Any]]:
        generator = function()
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
    label: str, function: Callable[[], Generator[Any, None, None]]
) -> tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]:
    def start() -> tuple[Generator[Any, None, None], Any]:
        generator = function()
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
    function: Callable[[], Awaitable[Any]],
) -> Callable[[], tuple[None, Awaitable[Any]]]:
    def start() -> tuple[None, Awaitable[Any]]:
        return None, function()

    return start


def _function(label: str, function: Callable[[], Any]) -> Callable[[], tuple[None, Any]]:
    def start() -> tuple[None, Any]:
        value = function()
        if isinstance(value, types.CoroutineType):
            value.close()
            raise FactoryError(
                label,
                "is a sync function that returned a coroutine",
                "Write `async def`, and `await` it there.",
            )
        return None, value

    return start


def _nothing_to_finish(_generator: None, _failure: BaseException | None) -> None:
    raise AssertionError("a factory without a generator has nothing to finish")
