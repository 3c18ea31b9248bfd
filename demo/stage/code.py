"""The code beside the buttons, read from the functions that run."""

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    text: str
    is_marked: bool = False
    why: str = ""

    @property
    def indent(self) -> str:
        return self.text[: len(self.text) - len(self.text.lstrip())]


class Listing:
    """
    The source of some functions, as lines. ``marks`` are what some lines have in them, each with
    why that decides. Raises ValueError where none has it, or several.
    """

    def __init__(
        self,
        *functions: Callable[..., Any],
        lines: Sequence[str] = (),
        marks: Mapping[str, str] | None = None,
    ) -> None:
        texts: list[str] = []
        for function in functions:
            texts += [*([""] if texts else []), *_source(function).splitlines()]
        texts += ["", *(_line(functions[0], line) for line in lines)] if lines else []
        found = {mark: [n for n, text in enumerate(texts) if mark in text] for mark in marks or {}}
        if wrong := [mark for mark, numbers in found.items() if len(numbers) != 1]:
            raise ValueError(f"{wrong} are not in one line each of:\n" + "\n".join(texts))
        why = {numbers[0]: (marks or {})[mark] for mark, numbers in found.items()}
        self.lines = [Line(text, n in why, why.get(n, "")) for n, text in enumerate(texts)]


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, where it is a resource."""
    resource = getattr(function, "resource", None)
    return function if resource is None else resource.factory.function


def _source(function: Callable[..., Any]) -> str:
    return textwrap.dedent(inspect.getsource(_plain(function)))


def _line(function: Callable[..., Any], line: str) -> str:
    """A line of the function's module, which must be there as it is."""
    module = inspect.getmodule(_plain(function))
    if module is None or line not in inspect.getsource(module).splitlines():
        raise ValueError(f"{line!r} is no line of {module}.")
    return line
