"""The method keeps core's contract on small random models of every architecture."""

from pathlib import Path

import pytest

from tunerkit.testing import conformance, matrix

# Nothing is told about any of these models, but for the batch norms that a case keeps in eval mode itself.
pytestmark = pytest.mark.filterwarnings(
    "error::tunerkit.TunerkitWarning", "ignore:.* normalisation layers of the frozen base:tunerkit.TunerkitWarning"
)

PLAIN: dict[str, object] = {"rank": 3, "dropout": 0.1}
CONFIGS: dict[str, dict[str, object]] = {
    "biases": {"rank": 3, "bias": "adapters"},
    "fp64": {"rank": 2, "adapter_dtype": "float64"},
}
# One for each kind of base layer, to keep the tests short.
FEW = [case for case in matrix.cases() if case.id in ("bert", "gpt2", "gemma3", "resnet")]
LINEAR = [case for case in matrix.cases() if case.id != "resnet"]


@pytest.mark.parametrize("check", conformance.CHECKS, ids=conformance.name_of)
@pytest.mark.parametrize("case", matrix.cases())
def test_keeps_the_contract(check: conformance.Check, case: conformance.Case, tmp_path: Path) -> None:
    """Every check of the conformance kit holds for every architecture."""
    check(case, "lora", PLAIN, tmp_path)


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("check", conformance.CHECKS, ids=conformance.name_of)
@pytest.mark.parametrize("case", FEW)
def test_keeps_the_contract_in_every_setting(
    check: conformance.Check, case: conformance.Case, config: str, tmp_path: Path
) -> None:
    """Every check holds for every kind of base layer and setting."""
    check(case, "lora", CONFIGS[config], tmp_path)


@pytest.mark.parametrize("case", matrix.cases())
def test_default_targets_serve_every_architecture(case: conformance.Case, tmp_path: Path) -> None:
    """Also where the case names targets of its own, the default finds some, and they merge."""
    conformance.check_merges_and_unmerges(case, "lora", {"rank": 2, "targets": None}, tmp_path)


@pytest.mark.parametrize("case", LINEAR)
def test_all_linear_serves_every_architecture(case: conformance.Case, tmp_path: Path) -> None:
    """Encoders, decoders and towers alike: all linear layers merge."""
    conformance.check_merges_and_unmerges(case, "lora", {"rank": 2, "targets": "all-linear"}, tmp_path)
