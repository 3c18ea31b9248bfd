"""
Finds in a factory's source what a failure would skip: it is raised at the
``yield``, so what follows runs on success alone::

    client = Client()
    yield client
    client.close()  # found

Not found is what may well be meant so, as a commit is: what stands beside the
``yield`` in a ``with``, or in a ``try`` that has an ``except`` or a ``finally``,
and what stands in the ``else:`` of that ``try``.
"""

import ast
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["first_skipped_line"]

_Definition = ast.FunctionDef | ast.AsyncFunctionDef
_DO_NOTHING = (
    *(ast.Pass, ast.Break, ast.Continue, ast.Raise, ast.Global, ast.Nonlocal),
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
)
_LOOKED_INTO = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Match, ast.Try, ast.TryStar)


def first_skipped_line(function: Callable[..., Any]) -> int | None:
    """The number of the first line that a failure would skip; None where none is to be seen."""
    code = getattr(function, "__code__", None)
    definition = None if code is None else _parse(code)
    if definition is None:
        return None
    found: list[ast.stmt] = []
    _follow(definition.body, found, guarded=False, yielded=False)
    return min((statement.lineno for statement in found), default=None)


def _parse(code: Any) -> _Definition | None:
    """Its definition, with the line numbers of its file; None for a lambda, or without source."""
    try:
        source = inspect.getsource(code)
        # Not dedent(), which a string over several lines may defeat.
        is_indented = source[:1].isspace()
        tree = ast.parse(f"if True:\n{source}" if is_indented else source)
    except Exception:  # it may have been edited since it was imported, and be anything
        return None
    ast.increment_lineno(tree, code.co_firstlineno - (2 if is_indented else 1))
    for node in ast.walk(tree):
        if isinstance(node, _Definition):
            return node if node.name == code.co_name else None
    return None


def _follow(block: list[ast.stmt], found: list[ast.stmt], *, guarded: bool, yielded: bool) -> bool:
    """
    ``yielded`` says whether the block is reached after the ``yield``, on success
    alone; what is returned says the same of its end. ``guarded``: something around
    the ``yield`` and this block takes care of a failure.
    """
    for statement in block:
        if yielded and not guarded and not _may_be_skipped(statement):
            found.append(statement)
        if isinstance(statement, ast.Return | ast.Raise):
            return False
        if isinstance(statement, ast.Break | ast.Continue):
            break
        if _enter(statement, found, guarded=guarded, yielded=yielded):
            yielded = True
    return yielded


def _enter(statement: ast.stmt, found: list[ast.stmt], *, guarded: bool, yielded: bool) -> bool:
    match statement:
        case ast.With() | ast.AsyncWith():
            return _follow(statement.body, found, guarded=True, yielded=yielded)
        case ast.Try() | ast.TryStar():
            return _enter_try(statement, found, guarded=guarded, yielded=yielded)
        case ast.If() | ast.For() | ast.AsyncFor() | ast.While():
            blocks = [statement.body, statement.orelse]
        case ast.Match():
            blocks = [case.body for case in statement.cases]
        case _:
            return _yields(statement)
    ends = [_follow(block, found, guarded=guarded, yielded=yielded) for block in blocks]
    return any(ends)


def _enter_try(
    statement: ast.Try | ast.TryStar, found: list[ast.stmt], *, guarded: bool, yielded: bool
) -> bool:
    by_finally = guarded or (not yielded and bool(statement.finalbody))
    # One that comes after the `yield` takes care of nothing.
    end = _follow(statement.body, found, guarded=guarded or not yielded, yielded=yielded)
    yields_here = end and not yielded
    end = _follow(statement.orelse, found, guarded=by_finally or yields_here, yielded=end)
    if yields_here and any(map(_goes_on, statement.handlers)):
        end = False  # what follows is reached after a failure too
    ends = [
        _follow(handler.body, found, guarded=by_finally, yielded=yielded)
        for handler in statement.handlers
    ]
    ends.append(_follow(statement.finalbody, found, guarded=guarded, yielded=yielded))
    return end or any(ends)


def _goes_on(handler: ast.ExceptHandler) -> bool:
    """Whether it swallows every failure. A cancellation is none of ``Exception``'s."""
    catches_all = handler.type is None or any(
        isinstance(node, ast.Name) and node.id == "BaseException" for node in ast.walk(handler.type)
    )
    return catches_all and not any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def _may_be_skipped(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Return):
        return not any(isinstance(node, ast.Call) for node in ast.walk(statement))
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return True
    # One that yields is another branch's, and no teardown.
    return isinstance(statement, (*_DO_NOTHING, *_LOOKED_INTO)) or _yields(statement)


def _yields(node: ast.AST) -> bool:
    if isinstance(node, ast.Yield | ast.YieldFrom):
        return True
    if isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    return any(map(_yields, ast.iter_child_nodes(node)))
