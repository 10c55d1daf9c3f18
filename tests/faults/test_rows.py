"""The rows of the table: one test each, short here, and long with TUNERKIT_LONG=1."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from tests.faults.harness import Result, is_long, run
from tests.faults.table import ROWS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the faults are injected in forks")
ROW = {row.name: row for row in ROWS}
PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "reliability.md"


def attacked(name: str) -> Result:
    """Run a row against tunerkit."""
    row = ROW[name]
    for module in row.needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{name} needs {module}")
    result = run(row, "tunerkit", row.long if is_long() else row.short)
    assert result.cases == (row.long if is_long() else row.short)
    return result


def assert_no_failure(name: str) -> None:
    result = attacked(name)
    assert not result.failures, str(result)


def test_damaged_files() -> None:
    """A file with changed, missing or additional bytes is refused."""
    assert_no_failure("damaged files")


def test_wrong_bases() -> None:
    """A base with other layers, shapes or values is refused."""
    assert_no_failure("wrong bases")


def test_other_forwards() -> None:
    """A base whose config gives the same weights another forward is refused."""
    assert_no_failure("other forwards")


def test_forged_files() -> None:
    """A file whose parts contradict each other is refused although its digest is right."""
    assert_no_failure("forged files")


def test_base_keys_in_files() -> None:
    """A file cannot replace weights of the base model."""
    assert_no_failure("base keys in files")


def test_nan() -> None:
    """Weights that are not finite are neither saved nor loaded nor merged."""
    assert_no_failure("NaN")


def test_mutated_headers() -> None:
    """Whatever stands in a header, loading gives one clean error or a model that works, within 2 s and 300 MB."""
    assert_no_failure("mutated headers")


def test_mutated_configs() -> None:
    """Whatever stands in a mapping of settings, it gives one clean error or a config, within 2 s and 300 MB."""
    assert_no_failure("mutated configs")


def test_mutated_yaml() -> None:
    """Whatever stands in a settings file, reading it gives one clean error or a config, within 2 s and 300 MB."""
    assert_no_failure("mutated YAML")


def test_evil_pickles_and_import_names() -> None:
    """No code of a file runs, and no module is imported because a file names it."""
    assert_no_failure("evil pickles and import names")


def test_names_traversal_and_links() -> None:
    """A name works or is refused, and nothing is written outside the folder that was given."""
    assert_no_failure("names, traversal, links")


def test_kills_in_mid_save() -> None:
    """After a kill, the older or the newer adapter is there, and the next save works."""
    assert_no_failure("kills in mid-save")


def test_kills_of_a_command() -> None:
    """After a kill, no file of the user's is lost, none is half written, and the same call works again."""
    assert_no_failure("kills of a command")


def test_commands_without_room() -> None:
    """A full disk and a read-only folder are said in one line, and the same call works afterwards."""
    assert_no_failure("commands without room")


def test_failing_calls() -> None:
    """If any system call of a save fails, the older adapter stays and nothing else is left."""
    assert_no_failure("failing calls")


def test_flushes() -> None:
    """A file is on the disk before its name is, and its folder afterwards, so that a power failure loses neither."""
    assert_no_failure("flushes")


def test_full_disk() -> None:
    """Without room for the whole file, the older one stays as it was."""
    assert_no_failure("full disk")


def test_two_writers_and_a_reader() -> None:
    """A reader always gets one of the two adapters that others are writing."""
    assert_no_failure("two writers and a reader")


def test_umask_and_modes() -> None:
    """A new file's mode follows the umask; a replaced file's mode stays."""
    assert_no_failure("umask and modes")


def test_resume() -> None:
    """A resumed training ends as if nothing had happened, or there is an error."""
    assert_no_failure("resume")


def test_bad_gradients() -> None:
    """A gradient that is not finite reaches no training state and no file."""
    assert_no_failure("bad gradients")


def test_merge_cycles() -> None:
    """Merging and unmerging restores every bit, however often."""
    assert_no_failure("merge cycles")


def test_leaks() -> None:
    """Operations that are undone leave nothing behind."""
    assert_no_failure("leaks")


def test_threads() -> None:
    """Threads get the results of one thread, or an error."""
    assert_no_failure("threads")


def test_misuse() -> None:
    """A wrong call raises an error and changes nothing."""
    assert_no_failure("misuse")


def test_broken_plugins() -> None:
    """A broken plugin is named, and every other method works."""
    assert_no_failure("broken plugins")


# --- The table itself -------------------------------------------------------------------------------------------------


def test_every_row_has_a_test() -> None:
    """A new row is run by a test of its own."""
    text = Path(__file__).read_text(encoding="utf-8")
    assert re.findall(r'assert_no_failure\("(.*?)"\)', text) == [row.name for row in ROWS]


def test_the_published_table_has_every_row_and_no_failure_of_ours() -> None:
    """The page was written for the rows that there are now, in the long form."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    found = {cells[0].strip(): cells[2].strip() for cells in rows if cells[0].strip() in ROW}
    assert found == {row.name: f"0 of {row.long:,}" for row in ROWS}


def test_the_rows_find_failures_where_there_are_some() -> None:
    """peft, run by the same harness, does not detect flipped bits in weights: the row reports them."""
    pytest.importorskip("peft", reason="it is compared with peft")
    result = run(ROW["damaged files"], "peft", 60)
    assert 0 < len(result.failures) < result.cases == 60
    assert "gives other outputs" in str(result)
