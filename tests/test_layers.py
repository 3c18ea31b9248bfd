"""A module imports only from those above it, and nothing above the line imports Django."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import scoped

PACKAGE = Path(scoped.__file__).parent

# The table under "Words and shape" in the design; those in one line may import each other's line
# above only.
CORE = [
    *("exceptions", "factories", "events", "waiting", "setups", "teardown"),
    *("scopes", "releases", "lifespans", "requests", "resources"),
    *("inspection", "overrides", "threads", "background", "yields"),
]
DJANGO = ["dispatch", "receivers", "asgi", "conf", "checks", "apps", "testing"]
DJANGO += ["handlers", "wsgi", "signals", "management/commands/scoped"]
THERE = [name for name in DJANGO if (PACKAGE / f"{name}.py").exists()]  # some are yet to come


def imported(source: str, *, at_run_time: bool = True) -> set[str]:
    """The full names of all modules that a source imports, also inside functions."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {inner for part in node.body for inner in ast.walk(part)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            if node.module == "scoped":
                found |= {f"scoped.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def source_of(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text()


def test_the_check_sees_every_form_of_import() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from scoped import e\n"
    typing = "if TYPE_CHECKING:\n    import g\n"
    assert imported(source + typing) == {"a.b", "c", "scoped.e"}
    assert imported(source + typing, at_run_time=False) == {"a.b", "c", "scoped.e", "g"}


def test_every_module_has_its_place_in_the_table() -> None:
    modules = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    names = {module.as_posix() for module in modules if module.name != "__init__"}
    assert names <= {*CORE, *DJANGO}


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_only_from_above(module: str) -> None:
    above = {f"scoped.{name}" for name in CORE[: CORE.index(module)]}
    found = imported(source_of(module))
    assert {name for name in found if name.startswith("scoped")} <= above


@pytest.mark.parametrize("module", [*CORE, "__init__"])
def test_the_core_knows_no_django(module: str) -> None:
    found = imported(source_of(module), at_run_time=False)
    assert not {name for name in found if name.partition(".")[0] == "django"}
    assert not {name for name in found if name in {f"scoped.{below}" for below in DJANGO}}


@pytest.mark.parametrize("module", THERE)
def test_below_the_line_nothing_is_imported_in_a_circle(module: str) -> None:
    def reach(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if (PACKAGE / f"{name}.py").exists():
            for other in imported((PACKAGE / f"{name}.py").read_text()):
                if other.startswith("scoped."):
                    reach(other.removeprefix("scoped."), (*path, name))

    source_of(module)
    reach(module, ())


def test_importing_the_package_imports_no_django() -> None:
    program = "import scoped, sys; sys.exit(any(m.split('.')[0] == 'django' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("module", CORE)
def test_what_a_module_exports_is_there(module: str) -> None:
    imported_module = importlib.import_module(f"scoped.{module}")
    assert list(imported_module.__all__) == sorted(imported_module.__all__)
    for name in imported_module.__all__:
        assert hasattr(imported_module, name)
