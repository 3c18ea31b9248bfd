"""
System checks: much of what goes wrong when a project is served can be seen
before. ``docs/checks.md`` has a section on each.
"""

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asgiref
import django
from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage
from django.core.management import get_commands
from django.utils.version import get_version_tuple

from scoped import conf
from scoped.checks.yields import first_skipped_line
from scoped.core.override import overridden
from scoped.core.resource import Lifetime, Resource
from scoped.discovery import import_urls

__all__ = ["declared_resources", "path_from_here", "register"]

_DJANGOS = ("django.core.asgi", "django.core.handlers.asgi.ASGIHandler")
# Whose `runserver` is Django's; that of an app such as daphne serves over ASGI.
_DJANGOS_RUNSERVER = ("django.core", "django.contrib.staticfiles")
_DJANGOS_WSGI = ("django.core.wsgi", "django.core.handlers.wsgi.WSGIHandler")


def register() -> None:
    for check in (
        *(check_asgiref, check_settings, check_handler, check_wsgi, check_runserver),
        check_yields,
    ):
        checks.register(check, "scoped")
    for check in (check_overrides, check_wsgi_handler):
        checks.register(check, "scoped", deploy=True)


def check_asgiref(**kwargs: Any) -> list[CheckMessage]:
    if get_version_tuple(asgiref.__version__) >= (3, 13):
        return []
    return [
        checks.Error(
            f"asgiref {asgiref.__version__} is too old for scoped.",
            hint="Install asgiref 3.13 or newer.",
            id="scoped.E001",
        )
    ]


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    return [checks.Error(problem, hint=hint, id="scoped.E002") for problem, hint in conf.problems()]


def check_handler(**kwargs: Any) -> list[CheckMessage]:
    return [_djangos_handler(path) for path in _asgi_files() if _uses_djangos_handler(path)]


def _djangos_handler(path: Path) -> CheckMessage:
    what = f"{path_from_here(path)} serves the project with Django's own ASGI handler"
    hint = "Write `from scoped.asgi import get_asgi_application` there, in place of Django's."
    if django.VERSION < (6, 1):
        return checks.Warning(
            f"{what}. Before Django 6.1 request-scoped resources raise NoScopeError under it.",
            hint=hint,
            id="scoped.W001",
        )
    return checks.Warning(
        f"{what}. Under it resources are not torn down when a stream or the sending of a response "
        "fails, nor when the server cancels a request.",
        hint=hint,
        id="scoped.W002",
    )


def check_wsgi(**kwargs: Any) -> list[CheckMessage]:
    if not (settings.WSGI_APPLICATION or _beside_the_settings("wsgi.py")) or _asgi_files():
        return []
    if not (names := _async_resources()):
        return []
    return [
        checks.Warning(
            "The project has a WSGI application and no ASGI application. Async resources raise "
            f"AsyncResourceError under WSGI: {', '.join(names)}.",
            hint="Serve it over ASGI, from an asgi.py with `from scoped.asgi import "
            "get_asgi_application` and `application = get_asgi_application()`; or make the "
            "factories sync.",
            id="scoped.W003",
        )
    ]


def check_runserver(**kwargs: Any) -> list[CheckMessage]:
    """Of the command that runs, as no check is told which one that is."""
    if sys.argv[1:2] != ["runserver"] or get_commands().get("runserver") not in _DJANGOS_RUNSERVER:
        return []
    paths, names = _asgi_files(), _async_resources()
    if not paths or not names:
        return []
    return [
        checks.Warning(
            "Django's runserver is a WSGI server. Async resources raise AsyncResourceError under "
            f"it: {', '.join(names)}.",
            hint=f"Run `uvicorn --reload {_asgi_application(paths[0])} "
            "--timeout-graceful-shutdown 5`; or "
            'put "daphne" first in INSTALLED_APPS, whose runserver serves over ASGI.',
            id="scoped.W005",
        )
    ]


def _asgi_application(path: Path) -> str:
    """As servers take it."""
    if (given := _given_application()) is not None:
        return ":".join(given)
    # As it is imported: from the innermost folder that Python looks in.
    parts = path.absolute().with_suffix("").parts
    above = [Path(folder).absolute().parts for folder in sys.path]
    depth = max((len(one) for one in above if parts[: len(one)] == one), default=len(parts) - 1)
    return f"{'.'.join(parts[depth:])}:application"


def _async_resources() -> list[str]:
    factories = [resource.factory for resource in declared_resources()]
    return [factory.name for factory in factories if factory.is_async]


def check_yields(**kwargs: Any) -> list[CheckMessage]:
    return [
        checks.Warning(
            f"Line {line} is skipped when the {resource.lifetime} fails, for the failure is "
            "raised at the `yield`.",
            hint="What must always run: put it into the `finally:` of a `try:` around the `yield`, "
            "or use a context manager. What is for success only, as a commit: put it into the "
            "`else:` of that `try:`, or beside the `yield` in its `with`.",
            obj=resource,
            id="scoped.W004",
        )
        for resource in declared_resources()
        if (line := first_skipped_line(resource.factory.function)) is not None
    ]


def check_overrides(**kwargs: Any) -> list[CheckMessage]:
    """With ``--deploy``: tests override, and run the other checks too."""
    return [
        checks.Warning(
            "An override() of it is in force as soon as the project is loaded: what is meant for "
            "a test stands in its place.",
            hint="Leave override() to the tests, in a `with` or as a decorator. For another "
            "factory in production, declare that one.",
            obj=resource,
            id="scoped.W006",
        )
        for resource in sorted(overridden(), key=_place)
    ]


def check_wsgi_handler(**kwargs: Any) -> list[CheckMessage]:
    """
    With ``--deploy``, as every new project has such a file: of those in which it would
    matter, whose resources WSGI can serve.
    """
    names = [
        resource.factory.name
        for resource in declared_resources()
        if resource.lifetime is not Lifetime.LIFESPAN
        and resource.factory.is_generator
        and not resource.factory.is_async
    ]
    paths = [
        path
        for path in _beside_the_settings("wsgi.py")
        if _uses_djangos_handler(path, _DJANGOS_WSGI, "scoped.wsgi")
    ]
    return [
        checks.Warning(
            f"{path_from_here(path)} serves the project with Django's own WSGI handler. Under it "
            "factories are not told of Http404, PermissionDenied and other exceptions that become "
            "a response, nor of a stream's: what commits when the request has succeeded commits "
            'then, too. What is declared with until="response" raises NoScopeError. So with: '
            f"{', '.join(names)}.",
            hint="Write `from scoped.wsgi import get_wsgi_application` there, in place of "
            "Django's.",
            id="scoped.W007",
        )
        for path in paths
        if names
    ]


def declared_resources() -> list[Resource[Any]]:
    """All of them, sorted by module and line."""
    # Views may declare some, and Django's check that imports them may yet be to come.
    import_urls()
    return sorted(Resource.declared, key=_place)


def _place(resource: Resource[Any]) -> tuple[str, int, str]:
    function = resource.factory.function
    code = getattr(function, "__code__", None)
    return str(function.__module__), code.co_firstlineno if code else 0, resource.factory.name


def path_from_here(path: Path) -> str:
    """Relative to the current directory, where it is inside that."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _asgi_files() -> list[Path]:
    """What serves the project over ASGI, as far as that can be known."""
    if (given := _given_application()) is not None:
        path = _file_of(given[0])
        return [] if path is None else [path]
    return _beside_the_settings("asgi.py")


def _given_application() -> tuple[str, str] | None:
    """Its module and its name there, by Channels' and daphne's setting."""
    given = getattr(settings, "ASGI_APPLICATION", None)
    if not given or not isinstance(given, str):
        return None
    module, _, name = given.rpartition(".")
    return module, name


def _beside_the_settings(name: str) -> list[Path]:
    """The files of that name where ``startproject`` puts it, or one package above."""
    found = {folder / name: None for folder in _folders()}
    return [path for path in found if path.is_file()]


def _folders() -> Iterator[Path]:
    wsgi, urls = settings.WSGI_APPLICATION, getattr(settings, "ROOT_URLCONF", None)
    wsgi = wsgi.rpartition(".")[0] if isinstance(wsgi, str) else None
    for module in (settings.SETTINGS_MODULE, urls, wsgi):
        if module and isinstance(module, str) and (path := _file_of(module)):
            # So that `settings/production.py` is found to be in `settings` and in the project.
            yield from path.parents[: max(1, module.count("."))]


def _file_of(module: str) -> Path | None:
    """A module's source, without importing it: an asgi.py is made for the server."""
    try:
        spec = find_spec(module)
    except Exception:  # that of the package around it runs, and may raise anything
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


def _uses_djangos_handler(
    path: Path, djangos: tuple[str, ...] = _DJANGOS, ours: str = "scoped.asgi"
) -> bool:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError):
        return False
    names = set(_imported(tree))
    return any(name.startswith(djangos) for name in names) and not any(
        name.startswith(ours) for name in names
    )


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
