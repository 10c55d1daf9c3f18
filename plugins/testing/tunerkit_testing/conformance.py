"""The short form of the kit: eight tests that plugin authors run on the models they choose.

::

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=conformance.name_of)
    @pytest.mark.parametrize("case", matrix.cases())
    def test_conforms(check, case, tmp_path):
        check(case, "my-method", {"rank": 2}, tmp_path)

Each is made of some checks of `tunerkit_testing.check_method`, which has more, and takes the same arguments: a case,
the method's name, its config as a mapping, and a folder for files. It raises `AssertionError` if the method does not
conform. Each check builds its own models, so you can run any subset in any order. Dropout must be off in the case's
model, because the checks compare outputs.
"""

from collections.abc import Mapping
from pathlib import Path

from tunerkit_testing.cases import (
    STEPS,
    TOLERANCE,
    Case,
    Check,
    assert_base_untouched,
    assert_same,
    name_of,
    train,
    trained,
    wrapped,
)
from tunerkit_testing.checks import files, merging, ranks, start, training

__all__ = ["CHECKS", "STEPS", "TOLERANCE", "Case", "Check", "assert_base_untouched", "assert_same", "name_of", "train"]
__all__ += ["trained", "wrapped"]


def check_wrap_changes_no_output(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """`wrap` returns the same object and keeps names, types and output; the output is bit-identical."""
    start.check_building_keeps_the_base(case, method, config, tmp_path)
    start.check_start(case, method, config, tmp_path)


def check_trains_only_the_adapter(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Only the tuner's parameters are trainable. Training lowers the loss and changes no base tensor."""
    training.check_only_the_adapter_trains(case, method, config, tmp_path)
    training.check_steps_keep_the_base(case, method, config, tmp_path)
    training.check_trains_beside_copies(case, method, config, tmp_path)


def check_disabled_shows_the_base(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Inside ``disabled`` the output is bit-identical to the base model's; then it is adapted again."""
    merging.check_disabled_is_the_base(case, method, config, tmp_path)


def check_unwraps(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """`unwrap` restores the base model and its ``requires_grad`` flags. ``keep_merged`` keeps the adapted output."""
    merging.check_unwraps(case, method, config, tmp_path)
    merging.check_keeps_merged(case, method, config, tmp_path)


check_fused_is_plain = merging.check_fused_is_plain
check_meets_the_budget = ranks.check_budget
check_loads_what_was_saved = files.check_saves_and_loads
check_merges_and_unmerges = merging.check_merges

CHECKS: tuple[Check, ...] = (
    check_wrap_changes_no_output,
    check_fused_is_plain,
    check_trains_only_the_adapter,
    check_meets_the_budget,
    check_disabled_shows_the_base,
    check_loads_what_was_saved,
    check_merges_and_unmerges,
    check_unwraps,
)
