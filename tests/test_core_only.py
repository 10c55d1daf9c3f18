"""The check of `make test-core` that a test marked core_only is not skipped there."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core_only
ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.core_only
def test_lost(): pytest.importorskip("no_such_module")

@pytest.mark.core_only
@pytest.mark.skipif(True, reason="never")
def test_lost_by_a_mark(): ...

@pytest.mark.core_only
@pytest.mark.everywhere
def test_everywhere(): pytest.importorskip("no_such_module")

def test_in_both(): pytest.importorskip("no_such_module")

@pytest.mark.core_only
def test_long(): pytest.skip("TUNERKIT_LONG=1 runs it")

@pytest.mark.core_only
@pytest.mark.xfail
def test_expected(): assert False

@pytest.mark.core_only
def test_passed(): ...
"""
SKIPPED_AS_A_WHOLE = 'import pytest\npytestmark = pytest.mark.core_only\npytest.importorskip("no_such_module")\n'


@pytest.mark.skipif(sys.platform != "linux", reason="skips are checked on Linux")
def test_a_core_only_test_that_would_run_nowhere_fails(tmp_path: Path) -> None:
    """So do a file that is skipped as a whole, and a skip by a mark; what runs elsewhere, or waits, is skipped."""
    (tmp_path / "test_each.py").write_text(TESTS)
    (tmp_path / "test_whole.py").write_text(SKIPPED_AS_A_WHOLE)
    options = ("-p", "tests.core_only", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-rA")
    command = [sys.executable, "-m", "pytest", *map(str, options), "--continue-on-collection-errors", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    words = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    failed = sorted((word, Path(place).name.rpartition("::")[2]) for word, place in words)
    # A mark is read before the test is called, so what pytest reports is an error.
    assert failed == [("ERROR", "test_lost_by_a_mark"), ("ERROR", "test_whole.py"), ("FAILED", "test_lost")]
    assert "1 failed, 1 passed, 3 skipped, 1 xfailed, 2 errors" in done.stdout
    assert "a test marked core_only was skipped, so it runs nowhere; mark it everywhere" in done.stdout
