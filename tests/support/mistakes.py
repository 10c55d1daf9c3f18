"""Which check must name which mistake first.

``python -m tests.support.mistakes`` prints the table of the documentation.
"""

from collections.abc import Iterable

import attrs

from tests.support import bad_plugins, hard_plugins
from tests.support.bad_plugins import CASE, METHOD
from tunerkit_testing import CheckResult, check_method, known_cases
from tunerkit_testing.registering import registered


@attrs.frozen
class Mistake:
    """One bad plugin.

    Attributes:
        what: What is wrong with it, in a few words.
        plugin: Its class.
        check: The name of the check that must fail first.
        case: The model on which it does; the small network, unless the mistake needs another layer.
    """

    what: str
    plugin: type
    check: str
    case: str = ""


_DELTA = "delta_is_what_forward_adds"

MISTAKES: tuple[Mistake, ...] = (
    Mistake("changes the base when it builds an adapter", bad_plugins.ChangesAtBuild, "building_keeps_the_base"),
    Mistake("changes the base in forward", bad_plugins.ChangesInForward, "forward_keeps_the_base"),
    Mistake("changes the base after a step", bad_plugins.ChangesAfterAStep, "steps_keep_the_base"),
    Mistake("the start moves the output by 1e-2", bad_plugins.StartsAFarOff, "start"),
    Mistake("the start moves the output by 1e-6", bad_plugins.StartsACloseBy, "start"),
    Mistake("trains nothing: every parameter is fixed", bad_plugins.TrainsNothingFixed, "something_trains"),
    Mistake("trains nothing: forward detaches", bad_plugins.TrainsNothingDetached, "gradients_reach_every_tensor"),
    Mistake("trains nothing: both factors start at 0", bad_plugins.TrainsNothingZero, "every_tensor_moves"),
    Mistake("half of the tensors have no gradient", bad_plugins.TrainsHalf, "gradients_reach_every_tensor"),
    Mistake("half of what forward adds is detached", bad_plugins.GradientHalved, "gradients_are_true"),
    Mistake("forward detaches x", bad_plugins.InputDetached, "gradients_are_true"),
    Mistake("adds less in training mode than in eval mode", bad_plugins.ScaledInTraining, "same_in_training"),
    Mistake("says rank 1, adds rank 2", bad_plugins.RankLies, "rank"),
    Mistake("the delta is 0.999 times what forward adds", bad_plugins.DeltaTooSmall, "delta_is_what_forward_adds"),
    Mistake("the delta is transposed", bad_plugins.DeltaTransposed, "delta_is_what_forward_adds"),
    Mistake(
        "the delta has no gradient for half of the tensors", bad_plugins.DeltaHalfDetached, "delta_gives_gradients"
    ),
    Mistake("a shared tensor has no gradient at one target", bad_plugins.TrainsTheGainOnce, "gradients_are_true"),
    Mistake("there is no delta", bad_plugins.DeltaMissing, "delta_is_what_forward_adds"),
    Mistake("forward counts its calls and uses the number", bad_plugins.HiddenState, "no_hidden_state"),
    Mistake("forward writes into x", bad_plugins.WritesX, "inputs_unwritten"),
    Mistake("the output is fp32 on a bf16 base", bad_plugins.WrongDtype, "output_dtype"),
    Mistake("an adapter cannot be pickled", bad_plugins.NotPicklable, "pickle"),
    Mistake("adds gradients without grad_scale", bad_plugins.IgnoresGradScale, "grad_scale"),
    Mistake("forward uses a plain attribute that training changes", bad_plugins.GainNotSaved, "saves_and_loads"),
    Mistake("keeps averages that it does not save", bad_plugins.StateNotSaved, "resumes"),
    Mistake("seeds with `hash()` of a path", hard_plugins.SeedsByHash, "other_process"),
    Mistake("calls `torch.manual_seed` when it builds an adapter", hard_plugins.SeedsTorch, "random_state"),
    Mistake("calls `torch.manual_seed` in forward", hard_plugins.SeedsTorchInForward, "random_state"),
    Mistake("calls `torch.manual_seed` in a step", hard_plugins.SeedsTorchInAStep, "random_state"),
    Mistake("the delta is transposed for Conv1D alone", hard_plugins.DeltaAsConv1DHasIt, _DELTA, "gpt2"),
    Mistake("dropout is ignored", hard_plugins.DropoutIgnored, "dropout"),
    Mistake("dropout is not scaled", hard_plugins.DropoutUnscaled, "dropout"),
    Mistake("dropout goes on in eval mode", hard_plugins.DropoutInEval, "dropout"),
    Mistake("gradients are wrong above 40 rows", hard_plugins.GradientOfAFewRows, "large_batch"),
    Mistake("says rank 7, adds rank 2", hard_plugins.RankTooHighByFive, "rank"),
    Mistake("says its first rank after a step took half of it", hard_plugins.RankOfTheStart, "rank"),
    Mistake("overflows on a base in fp16", hard_plugins.WrongInHalf, "half_precision"),
    Mistake("rounds to halves on a base in bf16", hard_plugins.WrongInBfloat, "half_precision"),
    Mistake("adds half in inference mode", hard_plugins.InferenceScale, "same_in_inference"),
    Mistake("adds half where there are no gradients", hard_plugins.NoGradScale, "same_in_inference"),
    Mistake("shapes do not fit in forward", hard_plugins.ShapesDoNotFit, "forward_runs"),
    Mistake("shapes do not fit in a step", hard_plugins.StepDoesNotFit, "steps_run"),
    Mistake("the delta has another shape", hard_plugins.DeltaDoesNotFit, _DELTA),
    Mistake("keeps what it computed from the base, and does not save it", hard_plugins.StartNotSaved, "state_is_all"),
    Mistake("keeps averages of all models in one dict", hard_plugins.AveragesOfAllModels, "trainings_do_not_meet"),
    Mistake("finds its fast parameters by a part of a name", hard_plugins.FastByName, "param_groups"),
    Mistake("norms dim=1 instead of the last dimension", hard_plugins.MixesTokens, "row_by_row"),
)


def results(plugin: type, case: str = "") -> list[CheckResult]:
    """Register a plugin, and run all checks of its method on a small model, or on a case of this name."""
    with registered(plugin()):
        return check_method(METHOD, cases=known_cases.named([case]) if case else [CASE])


def first_failure(found: Iterable[CheckResult]) -> CheckResult:
    """The first check that did not pass."""
    return next(result for result in found if result.status in ("failed", "error"))


def table() -> str:
    """The table of the documentation."""
    rows = []
    for mistake in MISTAKES:
        found = first_failure(results(mistake.plugin, mistake.case))
        rows.append(f"| {mistake.what} | `{found.check}` | {found.reason} |")
    return "\n".join(["| mistake | check | sentence |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
