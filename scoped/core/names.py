"""
What comes from outside (a request's path and method, the words in a task's name) as it may
stand in a log line, a message or a page: escaped, so that it cannot forge any, and cut.
"""

from collections.abc import Collection
from itertools import islice

__all__ = ["few", "printable", "printable_repr"]


def printable(text: str, limit: int = 200) -> str:
    r"""
    The text, with what is no printable character (line breaks, terminal escapes, bidi
    controls, lone surrogates) written as in a Python string: ``\n``, ``\x1b``, ``\u202e``.
    Of what is longer than ``limit``, so many characters, and how many there were.
    """
    if len(text) <= limit and text.isprintable():
        return text
    shown: list[str] = []
    room = limit
    for character in text[:limit]:  # what is written is never shorter than what it stands for
        if not character.isprintable():
            character = character.encode("unicode_escape").decode("ascii")  # noqa: PLW2901
        room -= len(character)
        if room < 0:
            break
        shown.append(character)
    whole = "" if len(shown) == len(text) else f"... ({len(text)} characters)"
    return "".join(shown) + whole


def printable_repr(thing: object, limit: int = 1000) -> str:
    """What it says of itself, if it does: it is somebody else's, and may raise."""
    try:
        return printable(repr(thing), limit)
    except Exception:
        return f"<{type(thing).__name__} object, whose repr() fails>"


def few(things: Collection[object]) -> str:
    """The first ten of them, and how many more there are."""
    shown = ", ".join(map(str, islice(things, 10)))
    return shown if len(things) <= 10 else f"{shown} and {len(things) - 10} more"
