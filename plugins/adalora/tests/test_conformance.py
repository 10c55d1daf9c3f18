"""The method passes the conformance tests on small random models of every architecture, and meets each budget."""

from collections.abc import Mapping
from pathlib import Path

import pytest

import tunerkit
from tests.support import lengths
from tests.support.each_check import each_check
from tunerkit.plugin import Tuner
from tunerkit_testing import conformance, matrix, parametrize_with_checks
from tunerkit_testing.conformance import Case, Check
from tunerkit_testing.runner import BoundCheck

# No warning about any of these models, except for the batch norms that a case keeps in eval mode itself.
pytestmark = pytest.mark.filterwarnings(
    "error::tunerkit.TunerkitWarning", "ignore:.* normalization layers of the frozen base:tunerkit.TunerkitWarning"
)

DEFAULTS: dict[str, object] = {"target_rank": 2, "delta_t": 2}
CONFIGS: dict[str, dict[str, object]] = {
    "paper": {"target_rank": 2, "delta_t": 1, "start": "gaussian", "gamma": 0.1, "orthogonality": "paper", "alpha": 48},
    "not rotated": {"target_rank": 4, "delta_t": 2},
    "parameters": {"init_rank": 4, "budget": 900, "budget_unit": "parameters", "delta_t": 2, "bias": "adapters"},
}


@parametrize_with_checks("adalora", DEFAULTS, lengths.by_length())
def test_passes_every_check_of_the_kit(check: BoundCheck) -> None:
    """No failure is expected with the SVD form."""
    check()


@parametrize_with_checks("adalora", CONFIGS["paper"], matrix.cases() if lengths.is_long() else matrix.cases()[:1])
def test_passes_every_check_of_the_kit_with_the_regulariser(check: BoundCheck) -> None:
    """No failure is expected with the paper's setting, which adds gradients."""
    check()


@each_check(matrix.cases(), {"default": DEFAULTS})
def test_keeps_the_contract(check: Check, case: Case, config: Mapping[str, object], tmp_path: Path) -> None:
    """Every conformance test passes for every architecture."""
    check(case, "adalora", config, tmp_path)


@each_check(lengths.few(), CONFIGS)
def test_keeps_the_contract_in_every_setting(
    check: Check, case: Case, config: Mapping[str, object], tmp_path: Path
) -> None:
    """Every test passes for every kind of base layer and setting."""
    check(case, "adalora", config, tmp_path)


@pytest.mark.parametrize("case", matrix.cases())
def test_every_architecture_is_pruned_to_exactly_its_target(case: Case) -> None:
    """With the default's targets the final ranks are ``target_rank`` on average, and not all equal."""
    tuner = pruned(case, None)
    assert sum(tuner.ranks().values()) == tuner.budget() == 2 * len(tuner.targets)
    assert len(set(tuner.ranks().values())) > 1


@pytest.mark.parametrize("case", lengths.linear())
def test_all_linear_layers_are_pruned_to_exactly_their_target(case: Case) -> None:
    """The same with all linear layers, including pooler, projections and time embeddings outside the blocks."""
    tuner = pruned(case, "all-linear")
    assert sum(tuner.ranks().values()) == tuner.budget() == 2 * len(tuner.targets)
    assert len(set(tuner.ranks().values())) > 1


def pruned(case: Case, targets: str | None) -> Tuner:
    return tunerkit.tuner(conformance.trained(case, "adalora", {**DEFAULTS, "targets": targets}))
