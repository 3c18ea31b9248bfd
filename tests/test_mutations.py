"""Each mutation can be made: its text occurs once. That each is noticed: `-m tests.mutations`."""

import ast

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_it_can_be_made(mutation: Mutation) -> None:
    changed: dict[str, str] = {}
    for edit in mutation.edits:
        path = ROOT / "scoped" / f"{edit.module}.py"
        source = changed.get(edit.module) or path.read_text()
        assert source.count(edit.old) == 1, f"{edit.module}: {edit.old!r}"
        assert edit.new != edit.old
        changed[edit.module] = source.replace(edit.old, edit.new)
    for source in changed.values():
        ast.parse(source)


def test_their_names_are_different() -> None:
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)
