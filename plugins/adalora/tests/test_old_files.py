"""Files that were written before the core was cut into packages (at commit 9d060d1) still load."""

from pathlib import Path

from tunerkit.testing import old_files

FIXTURES = Path(__file__).parent / "fixtures"


def test_an_old_adapter_loads() -> None:
    """Same output and ranks as when it was saved, in the middle of pruning."""
    old_files.check_adapter_loads(FIXTURES)


def test_an_old_training_state_resumes() -> None:
    """Averages, masks, schedule and history come back, and training ends where the whole run ended."""
    old_files.check_state_resumes(FIXTURES)
