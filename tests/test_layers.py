"""Nothing in core/ imports from outside it, but asgiref; and nothing is imported in a circle."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import scoped

PACKAGE = Path(scoped.__file__).parent
ROOT = PACKAGE.parent


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CORE = [name for name in MODULES if name.startswith("scoped.core.")]


@cache
def imported(source: str, *, at_run_time: bool = True) -> set[str]:
    """The full names of all modules that a source imports, also inside functions."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {inner for part in node.body for inner in ast.walk(part)}
    return {name for node in ast.walk(tree) if node not in skipped for name in names_in(node)}


def names_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
        yield from inner or {node.module}


def source_of(module: str) -> str:
    return MODULES[module].read_text()


def test_the_check_sees_every_form_of_import() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from scoped.core import scope\n"
    typing = "if TYPE_CHECKING:\n    import g\n"
    assert imported(source + typing) == {"a.b", "c", "scoped.core.scope"}
    assert imported(source + typing, at_run_time=False) == {"a.b", "c", "scoped.core.scope", "g"}


@pytest.mark.parametrize("module", CORE)
def test_nothing_in_the_core_imports_from_outside_it(module: str) -> None:
    found = imported(source_of(module), at_run_time=False)
    ours = {name for name in found if name.partition(".")[0] == "scoped"}
    assert ours <= set(CORE)
    theirs = {name.partition(".")[0] for name in found - ours}
    if module == "scoped.core.scope":  # names the type of what others put there
        assert "django.http" not in imported(source_of(module))
        theirs.remove("django")
    assert theirs <= {*sys.stdlib_module_names, "annotationlib", "asgiref"}  # the first from 3.14


def test_nothing_is_imported_in_a_circle() -> None:
    clear: set[str] = set()  # looked into, with all that it imports

    def reach(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in clear:
            return
        for other in imported(source_of(name)) & MODULES.keys():
            reach(other, (*path, name))
        clear.add(name)

    for module in MODULES:
        reach(module, ())


def test_importing_the_package_imports_no_django() -> None:
    program = "import scoped, sys; sys.exit(any(m.split('.')[0] == 'django' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", CORE)
def test_what_a_module_exports_is_there(module: str) -> None:
    imported_module = importlib.import_module(module)
    for name in imported_module.__all__:
        assert hasattr(imported_module, name)
