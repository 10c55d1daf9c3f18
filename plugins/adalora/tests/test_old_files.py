"""Files written before the core was split into packages (at commit 9d060d1) still load."""

from pathlib import Path

from tests.support import old_files

FIXTURES = Path(__file__).parent / "fixtures"


def test_an_old_adapter_loads() -> None:
    """Output and ranks are the same as at saving, in the middle of pruning."""
    old_files.check_adapter_loads(FIXTURES)


def test_an_old_training_state_resumes() -> None:
    """Averages, masks, schedule and history are restored, and training ends like the uninterrupted run."""
    old_files.check_state_resumes(FIXTURES)
