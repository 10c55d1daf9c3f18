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

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tunerkit_testing import cases
from tunerkit_testing.cases import STEPS, TOLERANCE, Case, Trial, assert_base_untouched, assert_same, name_of, train
from tunerkit_testing.checks import files, merging, ranks, start, training

__all__ = ["CHECKS", "STEPS", "TOLERANCE", "Case", "Check", "assert_base_untouched", "assert_same", "name_of", "train"]
__all__ += ["trained", "wrapped"]

Check = Callable[..., None]


def wrapped(case: Case, method: str, config: Mapping[str, object]) -> nn.Module:
    """Build the model of ``case`` and add an untrained adapter; the config takes precedence over ``case.settings``."""
    return Trial(case, method, config, Path()).wrapped()


def trained(case: Case, method: str, config: Mapping[str, object]) -> nn.Module:
    """Wrap a model, train it for `STEPS` steps, and return it in eval mode."""
    return Trial(case, method, config, Path()).trained()


def _made_of(name: str, *parts: cases.Check) -> Check:
    def check(
        case: Case, method: str, config: Mapping[str, object], tmp_path: Path, kept: dict[object, Any] | None = None
    ) -> None:
        for part in parts:
            part(Trial(case, method, config, tmp_path, {} if kept is None else kept))

    check.__name__, check.__doc__ = name, "\n\n".join(str(part.__doc__) for part in parts)
    return check


check_wrap_changes_no_output = _made_of(
    "check_wrap_changes_no_output", start.check_building_keeps_the_base, start.check_start
)
check_fused_is_plain = _made_of("check_fused_is_plain", merging.check_fused_is_plain)
check_trains_only_the_adapter = _made_of(
    "check_trains_only_the_adapter",
    training.check_only_the_adapter_trains,
    training.check_steps_keep_the_base,
    training.check_trains_beside_copies,
)
check_meets_the_budget = _made_of("check_meets_the_budget", ranks.check_budget)
check_disabled_shows_the_base = _made_of("check_disabled_shows_the_base", merging.check_disabled_is_the_base)
check_loads_what_was_saved = _made_of("check_loads_what_was_saved", files.check_saves_and_loads)
check_merges_and_unmerges = _made_of("check_merges_and_unmerges", merging.check_merges)
check_unwraps = _made_of("check_unwraps", merging.check_unwraps, merging.check_keeps_merged)

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
