"""The pages to look things up in say all that there is: names, settings, errors."""

import asyncio
import gc
import importlib
import inspect
import re
import shutil

import pytest

import scoped
from scoped import ScopedError, conf
from tests import pages
from tests.test_layers import MODULES
from tests.test_types import CHECKERS, check

INDEX = ("index.md", "scoped")
INSTALL = ("install.md", "Install")
SETTINGS = ("settings.md", "Settings")
TYPES = ("typing.md", "Types")
NO_SCOPE = ("errors.md", "NoScopeError")
SCOPE_CLOSED = ("errors.md", "ScopeClosedError")
CIRCULAR_RESOURCE = ("errors.md", "CircularResourceError")
LIFETIME = ("errors.md", "LifetimeError")
ASYNC_RESOURCE = ("errors.md", "AsyncResourceError")
FACTORY = ("errors.md", "FactoryError")
TEARDOWN = ("errors.md", "TeardownError")
ERRORS = {
    entry[1]: entry
    for entry in (
        NO_SCOPE,
        SCOPE_CLOSED,
        CIRCULAR_RESOURCE,
        LIFETIME,
        ASYNC_RESOURCE,
        FACTORY,
        TEARDOWN,
    )
}

# Modules beside the package's face whose names users do not import.
OURS = ("scoped.apps", "scoped.conf", "scoped.discovery")
PUBLIC = [
    name
    for name, path in MODULES.items()
    if name == "scoped" or (name.count(".") == 1 and path.stem not in ("__init__",))
]
NAMES = [
    (module, name)
    for module in PUBLIC
    if module not in OURS
    for name in importlib.import_module(module).__all__
]


def read(page: str) -> str:
    return (pages.DOCS / page).read_text()


def test_which_modules_are_public():
    assert {"scoped", "scoped.asgi", "scoped.testing", "scoped.signals"} <= set(PUBLIC)
    assert len(NAMES) > 25


@pytest.mark.parametrize(("module", "name"), NAMES, ids=".".join)
def test_every_public_name_is_in_the_reference(module, name):
    entry = name if module == "scoped" else f"{module}.{name}"
    listed = re.findall(r"^\.\. auto\w+:: ([\w.]+)", read("reference.md"), re.MULTILINE)
    assert listed.count(entry) == 1


CLASSES = ("lifespan_scope", "override", "AsyncClient", "Client")  # that users call


def test_its_signatures_are_those_of_all_that_is_called():
    shown = {}
    for line in pages.blocks(pages.DOCS / "reference.md", "Reference", "text")[0].splitlines():
        name, bracket, rest = line.partition("(")
        shown[name] = bracket + rest
    called = {}
    for module, name in NAMES:
        thing = getattr(importlib.import_module(module), name)
        if inspect.isfunction(thing) or name in CLASSES:
            signature = inspect.signature(thing)
            bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
            entry = name if module == "scoped" else f"{module}.{name}"
            called[entry] = str(inspect.Signature(bare))
    assert shown == called


@pytest.mark.parametrize(("module", "name"), NAMES, ids=".".join)
def test_every_public_name_has_a_docstring(module, name):
    thing = getattr(importlib.import_module(module), name)
    if module == "scoped.signals":  # an instance: the module tells of it
        assert f"``{name}``" in (importlib.import_module(module).__doc__ or "")
    else:
        assert len(inspect.getdoc(thing) or "") > 30


def test_the_version_page_names_every_public_module():
    said = re.search(
        r"^What (.*?) list in `__all__`", read("versions.md"), re.MULTILINE | re.DOTALL
    )
    assert said
    assert set(re.findall(r"`([\w.]+)`", said[1])) == set(PUBLIC) - set(OURS)


def test_every_setting_is_on_its_page_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", read("settings.md"), re.MULTILINE)
    assert [name for name, _ in rows] == list(conf._DEFAULTS)
    for name, default in rows:
        if default.isdecimal():
            assert float(default) == conf._DEFAULTS[name]


def test_the_setting_of_the_page_is_one(project, settings_of):
    assert settings_of(SETTINGS, "SCOPED").keys() <= conf._DEFAULTS.keys()


@pytest.fixture
def settings_of(project):
    return lambda section, name: getattr(project(section).settings, name)


def test_the_project_that_installs_it_is_served_by_our_handler(project, monkeypatch):
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.settings")
    modules = project(INSTALL)
    assert modules.settings.INSTALLED_APPS == ["scoped"]
    assert type(modules.asgi.application).__module__ == "scoped.asgi"


async def test_the_index_begins_with_what_one_writes(project, postgres_url, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    resources = project(INDEX).resources
    async with scoped.request_scope():
        assert await (await resources.db()).fetchval("SELECT 1") == 1


# Errors


def test_every_error_has_an_entry():
    classes = {name for name in scoped.__all__ if name.endswith("Error")} - {"ScopedError"}
    assert set(ERRORS) == classes
    linked = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| `(\w+)` \|", read("errors.md"), re.MULTILINE)
    assert {name for name, _ in linked} == classes
    for name, also in linked:
        bases = [base.__name__ for base in getattr(scoped, name).__mro__]
        assert also in bases
        assert ScopedError.__name__ in bases


@pytest.mark.parametrize("name", ERRORS)
def test_what_raises_it_and_what_does_not(name, project):
    [module] = vars(project(ERRORS[name])).values()

    with pytest.raises(ScopedError) as raised:
        run(module.wrong)
    assert type(raised.value) is getattr(scoped, name)
    run(module.right)


ROWS = re.findall(r"^\| (`[^|]+`) \| (`[^|]+`) \| [^|]+ \|$", read("errors.md"), re.MULTILINE)


def test_what_python_says_has_its_rows():
    assert len(ROWS) == 8


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize(("written", "said"), ROWS)
async def test_what_python_itself_says(written, said):
    class Connection:
        async def fetch(self): ...

    names = {
        "db": scoped.request_scoped(_factory(Connection())),
        "tenant": scoped.request_scoped(lambda: "tenant"),
        "pool": scoped.lifespan_scoped(_factory("pool")),
    }

    @scoped.request_scoped(keyed=True)
    async def lock(name):
        return name

    names["lock"] = lock
    exec(f"async def wrong():\n {written.strip('`')}", names)  # noqa: S102 (the page's)
    async with scoped.request_scope():
        with pytest.raises((AttributeError, TypeError)) as caught:
            await names["wrong"]()
    python_says = str(caught.value)
    # Its traceback holds the coroutine that nobody awaits: Python is to warn of it here, where that
    # is ignored, and not in the test that runs next.
    del caught
    gc.collect()
    assert any(text in python_says for text in re.findall("`([^`]+)`", said))


def _factory(value):
    async def factory():
        return value

    return factory


def run(function):
    return asyncio.run(function()) if inspect.iscoroutinefunction(function) else function()


# Types


@CHECKERS
@pytest.mark.timeout(300)
def test_a_type_checker_agrees_with_the_page(checker, tmp_path):
    [text] = pages.files(pages.DOCS / TYPES[0], TYPES[1]).values()
    program = tmp_path / "typed.py"
    program.write_text(text)
    code, output = check(checker, program, tmp_path / "cache")
    assert code == 0, output
    wrong = text.replace("shop: str = await name()", "shop: int = await name()")
    assert wrong != text
    program.write_text(wrong)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    code, output = check(checker, program, tmp_path / "cache")
    assert code == 1, output


async def test_the_typed_example_runs(project):
    typed = project(TYPES).typed
    async with scoped.request_scope():
        assert await typed.index() == ["shop of acme"]
