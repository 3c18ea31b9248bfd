"""``manage.py scoped``: which resources the project has."""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand

from scoped.checks import declared_resources, path_from_here
from scoped.core.lifespan import eager
from scoped.core.resource import Resource

_NONE = (
    "No resource is declared. Decorate a factory with @request_scoped or @lifespan_scoped, in the "
    "resources.py of an installed app: that is imported at start-up."
)


class Command(BaseCommand):
    help = "Lists the declared resources. What they need to work: see `manage.py check`."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="Print a JSON list.")

    def handle(self, *args: Any, **options: Any) -> None:  # noqa: ARG002 (Django's signature)
        rows = [_row(resource) for resource in declared_resources()]
        if options["json"]:
            self.stdout.write(json.dumps(rows, indent=2))
        else:
            self.stdout.write(_table(rows) if rows else _NONE)


def _row(resource: Resource[Any]) -> dict[str, Any]:
    factory = resource.factory
    code = getattr(factory.function, "__code__", None)
    return {
        "name": factory.name,
        "lifetime": str(resource.lifetime),
        "kind": factory.kind,
        "eager": any(access.resource is resource for access in eager),
        "file": path_from_here(Path(code.co_filename)) if code else None,
        "line": code.co_firstlineno if code else None,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [("NAME", "LIFETIME", "KIND", "EAGER", "DECLARED AT"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    place = f"{row['file']}:{row['line']}" if row["file"] else "a builtin"
    return row["name"], row["lifetime"], row["kind"], "yes" if row["eager"] else "no", place
