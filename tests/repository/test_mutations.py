"""The breaks on purpose fit the source as it is now, and every row of the fault suite has one."""

from pathlib import Path

import pytest

from scripts.mutations import MUTATIONS, ROOT, Mutation, apply
from tests.faults.table import ROWS


def test_every_row_has_one_break() -> None:
    """A row that no break can fail proves nothing."""
    assert [mutation.row for mutation in MUTATIONS] == [row.name for row in ROWS]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.row)
def test_a_break_can_be_made_in_the_source(mutation: Mutation, tmp_path: Path) -> None:
    """Its old text stands in the file once; if the source changed, the break has to change too."""
    copy = tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / mutation.file).read_text(encoding="utf-8"), encoding="utf-8")
    apply(mutation, tmp_path)
    compile(copy.read_text(encoding="utf-8"), mutation.file, "exec")
    with pytest.raises(ValueError, match="not once"):
        apply(Mutation(mutation.row, mutation.file, "text that no source file has", ""), tmp_path)
