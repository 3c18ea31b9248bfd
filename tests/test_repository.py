"""What is around the package: workflows, forms, the changelog's fragments, what is released."""

import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
RUN = (ROOT / ".ci" / "run").read_text()
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))

SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.github-issue-forms": [
        path for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml") if path.name != "config.yml"
    ],
    "vendor.readthedocs": [ROOT / ".readthedocs.yaml"],
}


def load(path: Path) -> ModuleType:
    """A program without a name that can be imported."""
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_loader(path.stem, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def versions_of(what: str) -> list[str]:
    """Those that the package's classifiers name."""
    found = [re.fullmatch(rf"{what} :: (\d\.\d+)", line) for line in PROJECT["classifiers"]]
    return [match[1] for match in found if match]


# Workflows and forms


@pytest.mark.parametrize("schema", SCHEMAS)
def test_it_is_valid_by_its_schema(schema: str) -> None:
    files = SCHEMAS[schema]
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_can_refuse(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    done = subprocess.run(
        [*command, "vendor.github-workflows", broken], capture_output=True, check=False
    )
    assert done.returncode == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit_and_named_by_its_version(path: Path) -> None:
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    for line in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_nothing_but_what_a_job_asks_for(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {}


# Versions


def test_every_python_and_every_django_that_is_promised_is_run() -> None:
    pythons, djangos = (
        versions_of("Programming Language :: Python"),
        versions_of("Framework :: Django"),
    )
    assert len(pythons) == 4
    assert len(djangos) == 3
    matrix = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]["tests"][
        "strategy"
    ]["matrix"]
    assert (matrix["python"], matrix["django"]) == (pythons, djangos)
    assert {extra["django"] for extra in matrix["include"]} == {"oldest", "main"}
    here = re.search(r"for combination in (.*); do", RUN)
    assert here
    combinations = [pair.split() for pair in re.findall(r'"([\d. ]+)"', here[1])]
    assert [python for python, _ in combinations] == pythons
    assert sorted({django for _, django in combinations}) == djangos
    page = (ROOT / "docs" / "versions.md").read_text()
    assert all(f"| Django {django} |" in page for django in djangos)


def test_the_oldest_that_is_allowed_can_be_asked_for() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "oldest")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.partition("==")[0] for line in done.stdout.splitlines()]
    assert names == [re.split(r"[<>=]", line)[0] for line in PROJECT["dependencies"]]


# What is left out of coverage


def test_each_exception_from_coverage_has_its_reason_beside_it() -> None:
    exceptions = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "scoped").rglob("*.py")
        for line in path.read_text().splitlines()
        if "pragma: no" in line
    ]
    assert exceptions
    pattern = re.compile(r"  # pragma: no (cover|branch) \(\w.+\)$")
    assert [line for line in exceptions if not pattern.search(line)] == []


# .ci/run, and the commands of CONTRIBUTING


def bash(script: str, *names: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """Runs it with functions of .ci/run."""
    found = [re.search(rf"^{name}\(\) \{{.*?^\}}$", RUN, re.M | re.S) for name in names]
    functions = "\n".join(match[0] for match in found if match)
    assert len(names) == len([match for match in found if match])
    program = f"set -euo pipefail\nuser=()\n{functions}\n{script}"
    return subprocess.run(
        ["/bin/bash", "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("printed", "code", "passes"),
    [
        ("==== 12 passed, 3 deselected in 1.2s ====", 0, True),
        ("12 passed in 1.2s", 0, True),
        ("12 passed, 1 warning in 1.2s", 1, False),
        ("==== 12 passed, 1 skipped in 1.2s ====", 0, False),
        ("SKIPPED [1] tests/test_x.py:3: no redis\n12 passed in 1.2s", 0, False),
        ("==== 3 deselected in 1.2s ====", 0, False),
        ("", 0, False),
    ],
)
def test_ci_fails_where_tests_fail_or_are_skipped_or_none_is_run(
    tmp_path: Path, printed: str, code: int, passes: bool
) -> None:
    (tmp_path / "a clone").mkdir()
    (tmp_path / "a clone" / "output").write_text(printed)
    script = f"constraints() {{ :; }}\ntested '{tmp_path}' 'cat output; exit {code}'\necho went on"
    done = bash(script, "say", "fail", "in_fresh", "tested")
    assert (done.returncode == 0) == passes, done.stdout + done.stderr
    assert ("went on" in done.stdout) == passes


def test_ci_finds_the_commands_as_they_stand(tmp_path: Path) -> None:
    for page, heading in (("README.md", "The demo"), ("CONTRIBUTING.md", "The tests")):
        done = bash(f'command_in {page} "{heading}"', "command_in")
        assert done.stdout.startswith("python3 -m venv .venv && ")
        assert done.stdout.count("\n") == 1
        assert done.stdout in (ROOT / page).read_text()
    assert bash('command_in README.md "No such"', "command_in").stdout == ""


def test_ci_runs_the_test_command_as_it_stands_in_contributing() -> None:
    blocks = re.findall(r"^## The tests\n\n```sh\n(.*?)^```", CONTRIBUTING, re.M | re.S)
    [command] = [block.strip() for block in blocks]
    assert command.endswith("-X dev -m pytest")
    assert 'command_in CONTRIBUTING.md "The tests"' in RUN
    assert 'command_in README.md "The demo"' in RUN


def test_the_dependency_groups_that_contributing_names_exist() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    named = re.findall(r"--group (\w+)", CONTRIBUTING) + re.findall(
        r"\| `(\w+)` \|$", CONTRIBUTING, re.M
    )
    assert {"dev", "test", "servers", "browser", "benchmarks"} <= set(named)
    assert set(named) <= set(groups)


# A release


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of what a release is decided by, in which it may be made."""
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "template.md").touch()
    urls = "".join(f'{name} = "https://example.org/"\n' for name in releasable.URLS)
    text = (ROOT / "pyproject.toml").read_text()
    text = re.sub(
        r"^\[project\.urls\]\n(?:\w+ = .*\n)*", f"[project.urls]\n{urls}", text, flags=re.M
    )
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "CHANGELOG.md").write_text(f"## {PROJECT['version']}, 2027-01-31\n")
    return tmp_path


releasable = load(ROOT / ".ci" / "releasable")
TAG = f"v{PROJECT['version']}"


def test_a_release_that_is_complete_may_be_made(release: Path) -> None:
    assert releasable.problems(release, TAG) == []


def test_without_the_project_s_urls_nothing_is_released(release: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", release)
    missing = [name for name in releasable.URLS if name not in PROJECT.get("urls", {})]
    problems = releasable.problems(release, TAG)
    assert len(problems) == len(missing)
    assert all("RELEASING.md" in problem for problem in problems)


def test_a_tag_is_the_version(release: Path) -> None:
    [problem] = releasable.problems(release, "v9.9.9")
    assert f"must be {TAG}" in problem


def test_the_changelog_has_the_release_and_no_fragment_is_left(release: Path) -> None:
    (release / "CHANGELOG.md").write_text(f"## {PROJECT['version']}, unreleased\n")
    (release / "news" / "12.fixed.md").touch()
    first, second = releasable.problems(release, TAG)
    assert "CHANGELOG.md" in first
    assert "12.fixed.md" in second


def test_the_workflow_asks_before_it_builds_and_publishes_nothing_else() -> None:
    jobs = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text())["jobs"]
    steps = [step.get("run", "") for step in jobs["build"]["steps"]]
    asks = steps.index('python .ci/releasable "$GITHUB_REF_NAME"')
    assert asks < steps.index("python -m build")
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["environment"]["name"] == "pypi"


def test_every_fragment_has_a_kind_that_the_changelog_knows() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]
    for path in (ROOT / config["directory"]).iterdir():
        if path.name != "template.md":
            match = re.fullmatch(r"(?:\d+|\+[\w-]+)\.(\w+)(?:\.\d+)?\.md", path.name)
            assert match, path.name
            assert match[1] in config["fragment"], path.name
    assert config["start_string"] in (ROOT / config["filename"]).read_text()


# The README where it is shown alone

package = load(ROOT / "hatch_build.py")


def test_with_a_repository_every_link_of_the_package_s_readme_is_whole() -> None:
    text = package.readme((ROOT / "README.md").read_text(), "https://example.org/scoped")
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(targets) > 20
    assert all(target.startswith("https://") for target in targets)
    for target in targets:
        place = re.fullmatch(
            r"https://example\.org/scoped/(?:blob|raw)/main/([^#]+)(?:#.*)?", target
        )
        assert place is None or (ROOT / place[1]).exists(), target


def test_without_one_it_has_no_link_and_no_picture_that_lead_nowhere() -> None:
    text = package.readme((ROOT / "README.md").read_text(), None)
    assert "<picture>" not in text
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]+)\)", text))
    assert "Concepts on one page." in text
