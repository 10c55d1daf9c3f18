"""The kit names the cause of each mistake first, in a sentence that says what to change, and passes what is right."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch

import tunerkit
from plugins.testing.tests import bad_methods, checks_page
from plugins.testing.tests.bad_methods import (
    CASE,
    MISTAKES,
    LoopsInAStep,
    Mistake,
    NoRoomIn,
    ReadsOutputInSecret,
    plugin_of,
)
from tests.support import lengths
from tests.support.toy_growing import GrowingPlugin
from tests.support.toy_outputs import OutputPlugin
from tests.support.toy_readers import DirectionPlugin, Scale, ScaleConfig, ScalePlugin
from tests.support.toy_shared import SharedPlugin
from tests.support.toy_starts import FittedPlugin, PrincipalPlugin
from tunerkit import TunerkitError
from tunerkit.errors import PluginError
from tunerkit.plugin import Adapter, BaseLayer, Delta, Method, setting
from tunerkit_testing import Case, check_method, known_cases, matrix, runner, small
from tunerkit_testing.cases import in_dtype
from tunerkit_testing.checks.order import BY_NAME, CHECKS, NEEDS
from tunerkit_testing.registering import registered
from tunerkit_testing.runner import BoundCheck
from tunerkit_testing.toy_methods import DeclaredPlugin, LowRankConfig, LowRankPlugin, ShiftPlugin

# Methods with one feature each beyond adding a product, with the settings that they need on the small network.
UNUSUAL: Mapping[str, Mapping[str, object]] = {
    **{f"toy-{name}": {} for name in ("growing", "scale", "direction", "shared", "principal", "inputs", "gradients")},
    "toy-outputs": {"targets": ("1",), "features": 8},
}
PAGE = (Path(__file__).parents[3] / "docs" / "authors" / "checks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    with registered(LowRankPlugin(), ShiftPlugin()):
        yield


@pytest.mark.parametrize("mistake", [each for each in MISTAKES if each.what], ids=lambda mistake: mistake.what)
def test_each_mistake_is_named_by_its_check_first(mistake: Mistake) -> None:
    """Law: the first check that fails is the one about the mistake; it is a failure with a sentence, not an error."""
    found = bad_methods.first_failure(bad_methods.results(mistake.plugin, mistake.case, last=mistake.check))
    assert (found.check, found.status) == (mistake.check, "failed"), found.reason
    assert len(found.reason.split()) > 8
    assert f"| {mistake.what} | `{mistake.check}` |" in PAGE


@pytest.mark.parametrize("plugin", [bad_methods.Plugin, bad_methods.StateSaved])
def test_the_same_plugins_without_a_mistake_pass(plugin: type) -> None:
    """Law: nothing but the mistake is reported."""
    assert [r for r in bad_methods.results(plugin) if r.status not in ("passed", "skipped")] == []


def test_a_rank_may_have_a_small_part() -> None:
    """As a square matrix of random numbers has, in VeRA: its smallest singular value is still one."""
    with registered(bad_methods.NearlyOfALowerRank()):
        (found,) = check_method(bad_methods.METHOD, cases=[bad_methods.CASE], checks=["rank"])
    assert found.status == "passed", found.reason


@pytest.mark.parametrize(
    ("method", "name"), [("toy-low-rank", "bert"), ("toy-shift", "llama"), ("toy-stepper", "llama")]
)
def test_methods_that_keep_the_contract_pass(toys: None, method: str, name: str) -> None:
    """Law: no check fails for a right method, and those that are skipped say why."""
    pytest.importorskip("transformers", reason="the cases are its models")
    found = check_method(method, cases=[each.values[0] for each in matrix.cases()] if lengths.is_long() else [name])
    assert [result for result in found if result.status not in ("passed", "skipped")] == []
    assert all(result.reason for result in found if result.status == "skipped")


def test_a_method_may_be_named_in_any_case(toys: None) -> None:
    """As in `tunerkit.wrap`: the checks see the method's own name."""
    checks = ["start", "steps_run", "merges", "saves_and_loads", "resumes", "stacked_first", "operations"]
    found = check_method("Toy-SHIFT", cases=[CASE], checks=checks)
    assert found == check_method("toy-shift", cases=[CASE], checks=checks)
    assert [result for result in found if result.status not in ("passed", "skipped")] == []


@pytest.mark.parametrize(("method", "config"), UNUSUAL.items(), ids=UNUSUAL)
def test_unusual_methods_that_keep_the_contract_pass(method: str, config: Mapping[str, object]) -> None:
    """Law: no check asks for more of methods that scale, read, share, grow, are fitted, or start elsewhere."""
    plugins = (GrowingPlugin(), OutputPlugin(), ScalePlugin(), DirectionPlugin(), SharedPlugin(), FittedPlugin())
    cases = [parameter.values[0] for parameter in lengths.by_length()] if lengths.is_long() and not config else []
    with registered(*plugins, PrincipalPlugin()):
        found = check_method(method, config, [known_cases.NETWORK, *cases])
    assert [result for result in found if result.status not in ("passed", "skipped")] == []


def test_the_default_cases_are_a_bert_a_gpt2_and_a_llama(toys: None) -> None:
    """Law: without transformers, the kit runs on a small network of torch's own layers."""
    found = check_method("toy-shift", checks=["config_round_trip"])
    assert [result.case for result in found] in (["bert", "gpt2", "llama"], ["network"])
    assert check_method("toy-shift", cases=[known_cases.NETWORK], checks=["start"])[0].status == "passed"


@pytest.mark.parametrize(
    "mistake",
    [each for each in MISTAKES if not each.what],
    ids=lambda mistake: f"{mistake.check}-{mistake.plugin.__name__}",
)
def test_every_other_check_fails_for_some_plugin_and_names_the_cause(toys: None, mistake: Mistake) -> None:
    """Law: no check passes whatever a plugin does; of what shows late or elsewhere, its sentence names the cause."""
    with registered(mistake.plugin()):
        (result,) = check_method("bad", cases=[CASE], checks=[mistake.check])
    assert result.status == "failed" or (result.status == "error" and not mistake.says), result
    assert len(result.reason.split()) > 8
    assert mistake.says in result.reason


class LooksAtValues(bad_methods.Product):
    def added(self, x: torch.Tensor) -> torch.Tensor:
        return super().added(x) * (2 if x.abs().max() > 1e9 else 1)


class AsksForAutocast(bad_methods.Product):
    def added(self, x: torch.Tensor) -> torch.Tensor:
        return super().added(x) * (2 if torch.is_autocast_enabled(x.device.type) else 1)


class TurnsAutocastOff(bad_methods.Product):
    def added(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().added(x)


@pytest.mark.parametrize("adapter", [LooksAtValues, AsksForAutocast, TurnsAutocastOff])
def test_what_a_device_without_values_cannot_do_is_not_called_wrong(adapter: type[bad_methods.Product]) -> None:
    """Law: the meta device has neither values nor autocast, and says nothing of a forward that asks for them."""
    with registered(plugin_of(adapter)()):
        (result,) = check_method("bad", cases=[CASE], checks=["device"])
    assert result.status != "failed", result


def test_every_check_is_seen_to_fail() -> None:
    """Law: each check has a plugin that fails it, except one that needs what may be missing here."""
    failing = {mistake.check for mistake in MISTAKES}
    # It needs LoRA, whose own tests have a plugin that fails it.
    assert set(BY_NAME) - failing == {"operations"}


@pytest.mark.skipif("lora" not in tunerkit.methods(), reason="the check compares with LoRA, which is not installed")
def test_a_loop_in_a_step_hook_gets_advice_beside_plain_lora() -> None:
    """Law: it has both numbers, says how to avoid a loop, and is no failure; it may be expected too."""
    with registered(LoopsInAStep()):
        (result,) = check_method("bad", cases=[CASE], checks=["operations"])
        (expected,) = check_method(
            "bad", cases=[CASE], checks=["operations"], expected_failures={"operations": "it is so"}
        )
    assert result.status == "advice"
    assert re.match(r"\d+ operations per step, \d+\.\d\d times LoRA's; .* Use torch._foreach_ functions", result.reason)
    assert (expected.status, expected.reason) == ("expected failure", "it is so")


def test_an_adapter_that_hides_what_it_reads_fails_where_several_share_a_target() -> None:
    """Law: the message names the order of the two and what to declare."""
    with registered(ReadsOutputInSecret()):
        (result,) = check_method("bad", cases=[CASE], checks=["stacked_second"])
    assert result.status == "failed"
    assert "bad is the cause: it fails beside a plain low-rank product too. bad on top of" in result.reason
    assert "reads_output = True" in result.reason


class RaisesAtTheTarget(ReadsOutputInSecret):
    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        raise RuntimeError("out of order")


@pytest.mark.parametrize("other", [ReadsOutputInSecret, RaisesAtTheTarget])
def test_another_plugin_s_fault_is_not_the_fault_of_the_method(toys: None, other: type) -> None:
    """Law: the check passes, and its remark names the method that fails beside any other one."""
    with registered(other(), DeclaredPlugin()):
        (result,) = check_method("toy-declared", cases=[CASE], checks=["stacked_first"])
    assert result.status == "passed"
    assert "bad (its own fault: it fails beside a plain low-rank product too)" in result.reason


class Quarrelsome(bad_methods.Product):
    """Adds more where a `Partner` is at its target."""

    def forward(self, base: BaseLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        more = any(type(module) is Partner for module in base.module.modules())
        return y + self.added(x).to(y.dtype) * (2 if more else 1)


class QuarrelsomePlugin(bad_methods.Plugin):
    adapter = Quarrelsome


class Partner(bad_methods.Product):
    """Nothing is wrong with it."""


class PartnerPlugin(bad_methods.Plugin):
    adapter = Partner

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("partner", config=LowRankConfig)]


def test_two_methods_that_are_wrong_only_together_are_both_named() -> None:
    """Law: if neither can be told to be the cause, the message says so."""
    with registered(QuarrelsomePlugin(), PartnerPlugin()):
        (result,) = check_method("bad", cases=[CASE], checks=["stacked_first"])
    assert result.status == "failed"
    assert "bad and partner fail only together: each is right beside a plain low-rank product" in result.reason


def test_checks_that_need_one_that_failed_are_skipped_with_its_name(toys: None) -> None:
    """Law: one mistake is one failure; also what needs it indirectly is skipped because of the first cause."""
    found = {result.check: result for result in bad_methods.results(plugin_of(bad_methods.AllZero))}
    assert {name for name, result in found.items() if result.status in ("failed", "error")} == {"every_tensor_moves"}
    assert found["saves_and_loads"].status == found["resumes"].status == "skipped"
    assert found["resumes"].reason == "because every_tensor_moves failed"


def test_a_check_stands_after_those_that_it_needs() -> None:
    """Law: root causes come first, and no name occurs twice."""
    order = {check: number for number, check in enumerate(CHECKS)}
    assert all(order[need] < order[check] for check, needs in NEEDS.items() for need in needs)
    assert len(BY_NAME) == len(CHECKS)


def test_every_check_states_its_law() -> None:
    """Law: the docstring of a check is one sentence or two, and the documentation's table has all of them in order."""
    assert all((check.__doc__ or "").strip().endswith(".") for check in CHECKS)
    assert checks_page.checks_table() in PAGE


def test_an_expected_failure_is_recorded_with_its_reason() -> None:
    """Law: it is no failure, and it silences itself alone; a check that passes all the same has passed and says so."""
    expected = {name: "no delta yet" for name in ("delta_is_what_forward_adds", "merges", "keeps_merged", "rank")}
    expected |= {"delta_gives_gradients": "no delta yet", "start": "never fails"}
    with registered(bad_methods.DeltaMissing()):
        found = {r.check: r for r in check_method("bad", cases=[CASE], expected_failures=expected)}
    failed = found["delta_is_what_forward_adds"]
    assert (failed.status, failed.reason) == ("expected failure", "no delta yet")
    assert found["merges"].status == "expected failure"
    assert found["start"].status == "passed"
    assert found["start"].reason == (
        "it passes, and is expected to fail (never fails); remove it from expected_failures, or from the method's "
        "record if it passes on all models"
    )
    assert not [r for r in found.values() if r.status in ("failed", "error")]


class Declares(bad_methods.Plugin):
    adapter = bad_methods.Widening

    """Its record expects what its base class does wrong, and a failure that does not come."""

    failures: ClassVar[Mapping[str, object]] = {"output_dtype": "fp32 is the point", "start": "not on this model"}

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("bad", config=LowRankConfig, foreign={"testing": {"expected_failures": self.failures}})]


def test_a_record_may_carry_its_own_expected_failures() -> None:
    """Law: everybody who runs the checks expects them; one that passes, as on another model, has passed."""
    with registered(Declares()):
        found = check_method("BAD", cases=[CASE], checks=["output_dtype", "start"])
        given = check_method("bad", cases=[CASE], checks=["output_dtype"], expected_failures={"output_dtype": "mine"})
        with pytest.raises(pytest.xfail.Exception, match="fp32 is the point"):
            BoundCheck(BY_NAME["output_dtype"], CASE, "bad", None, [CASE], {})()
        BoundCheck(BY_NAME["start"], CASE, "bad", None, [CASE], {})()
    assert {r.check: r.status for r in found} == {"output_dtype": "expected failure", "start": "passed"}
    assert [r.reason for r in found if r.check == "output_dtype"] == ["fp32 is the point"]
    assert given[0].reason == "mine"


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ({"stat": "why"}, "foreign['testing'] of method 'bad': no check named 'stat'; did you mean 'start'"),
        ({"start": " "}, "expected a reason why 'start' fails, got ' '"),
        (["start"], "expected {'expected_failures': {CHECK: REASON}}"),
    ],
)
def test_a_record_s_expected_failures_are_checked(failures: object, words: str) -> None:
    """Law: before any check runs, with the closest name of a check that there is not."""
    plugin = Declares()
    vars(plugin)["failures"] = failures
    with registered(plugin), pytest.raises(PluginError, match=re.escape(words)):
        check_method("bad", cases=[CASE], checks=["start"])


def test_an_expected_failure_silences_no_other_check() -> None:
    """Law: a check that needs it and fails too is a failure, which says that the other one may be why."""
    expected = {"every_tensor_moves": "a start of zeros is the point"}
    with registered(plugin_of(bad_methods.AllZero)()):
        found = check_method("bad", cases=[CASE], expected_failures=expected)
    assert {r.check for r in found if r.status == "expected failure"} == {"every_tensor_moves"}
    failed = {r.check: r.reason for r in found if r.status in ("failed", "error")}
    assert failed.keys() == {"loss_falls", "bf16_base"}
    hint = "(every_tensor_moves, which this needs, is expected to fail; if that is why, give a reason here too) "
    assert all(reason.startswith(hint) for reason in failed.values())
    passed = {r.check for r in found if r.status == "passed"}
    assert {"saves_and_loads", "resumes", "merges", "accumulation", "deepcopy", "budget"} <= passed


def test_a_mistyped_check_is_refused_with_the_closest_name(toys: None) -> None:
    """Law: in ``checks`` and in ``expected_failures``, before anything runs."""
    with pytest.raises(TunerkitError, match="no check named 'stat'; did you mean 'start'"):
        check_method("toy-shift", checks=["stat"])
    with pytest.raises(TunerkitError, match="no check named 'merge'; did you mean 'merges'"):
        check_method("toy-shift", expected_failures={"merge": "not yet"})
    with pytest.raises(TunerkitError, match="no case named 'bort'"):
        check_method("toy-shift", cases=["bort"])


def test_cases_may_be_named(toys: None) -> None:
    """Law: names and cases mix, in the order that they are given in; the page lists each name."""
    found = check_method("toy-shift", cases=["network", CASE], checks=["start"])
    assert [(result.case, result.status) for result in found] == [("network", "passed"), ("square", "passed")]
    known = [
        known_cases.NETWORK,
        *(case for library in known_cases.LIBRARIES for case in known_cases.of_library(library)),
    ]
    assert [case.name for case in known if f"`{case.name}`" not in PAGE] == []


def test_a_config_may_be_an_object_or_a_mapping(toys: None) -> None:
    """Law: both mean the same, and a wrong one is refused before anything runs."""
    for config in ({"rank": 3}, LowRankConfig(rank=3)):
        (result,) = check_method("toy-low-rank", config, [CASE], checks=["rank"])
        assert result.status == "passed"
        assert runner.settings_of("toy-low-rank", config) == {"rank": 3}  # the case's own targets stay
    with pytest.raises(tunerkit.errors.ConfigError, match="unknown key 'rnk'"):
        check_method("toy-low-rank", {"rnk": 3})


def test_merging_is_held_to_the_precision_of_the_adapters(toys: None) -> None:
    """In bf16 the product is rounded in another place when it is merged, and the output shows it; in fp32 it may not.

    The delta itself is still compared in fp64.
    """
    config, checks = {"adapter_dtype": "bfloat16"}, ["delta_is_what_forward_adds", "merges", "keeps_merged"]
    found = check_method("toy-low-rank", config, [known_cases.NETWORK], checks=checks)
    assert [(result.status, result.reason) for result in found] == [("passed", "")] * 3
    with registered(bad_methods.DeltaTooSmall()):
        (result,) = check_method("bad", config, [CASE], checks=checks[:1])
    assert result.status == "failed"


@attrs.frozen
class EvenRanks(LowRankConfig):
    def problems(self) -> Iterator[str]:
        if self.rank % 2:
            yield f"expected an even rank, got {self.rank} @ $.rank"


@attrs.frozen
class RankTwo(LowRankConfig):
    rank: int = setting(2, ge=2, le=2, doc="The only one.")


@pytest.mark.parametrize(("config", "status"), [(EvenRanks, "passed"), (RankTwo, "skipped")])
def test_another_rank_is_one_that_the_config_accepts(config: type, status: str) -> None:
    """Law: a method whose ranks are even, or whose rank is fixed, has nothing to answer for."""
    with registered(plugin_of(config)()):
        (result,) = check_method("bad", cases=[CASE], checks=["other_rank_setting"])
    assert (result.status, bool(result.reason)) == (status, status == "skipped"), result


@pytest.mark.parametrize(("dtype", "status"), [("bfloat16", "passed"), ("float32", "passed"), ("float64", "failed")])
def test_a_delta_that_is_computed_in_fp32_is_not_precise_enough_for_adapters_in_fp64(dtype: str, status: str) -> None:
    """A method may compute in fp32 what its libraries have only there, unless its config asks for more."""
    with registered(DeltaInSinglePrecision()):
        (result,) = check_method("bad", {"adapter_dtype": dtype}, [CASE], checks=["delta_is_what_forward_adds"])
    assert result.status == status


def test_a_delta_in_fp32_has_the_rank_that_it_says() -> None:
    """Law: singular values that are rounding in fp32 do not count."""
    with registered(DeltaInSinglePrecision()):
        (result,) = check_method("bad", cases=[CASE], checks=["rank"])
    assert result.status == "passed", result


class Bent(bad_methods.Product):
    """Has a kink at 0, where a gradient is one of two slopes."""

    def added(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x.to(self.a.dtype) @ self.a.T) @ self.b.T


class DrawsARank(bad_methods.Product):
    """Trains a prefix of its rank, drawn at each call, as DyLoRA does."""

    def added(self, x: torch.Tensor) -> torch.Tensor:
        rank = int(torch.randint(1, 3, ())) if self.training else 2
        return x.to(self.a.dtype) @ self.a[:rank].T @ self.b[:, :rank].T


@pytest.mark.parametrize(
    ("adapter", "check", "status"),
    [(Bent, "gradients_are_true", "passed"), (DrawsARank, "same_in_training", "skipped")],
)
def test_a_right_method_with_a_kink_or_random_ranks_is_not_accused(adapter: type, check: str, status: str) -> None:
    """Law: a slope beside a kink is not measured across it, and what is drawn is not compared."""
    with registered(plugin_of(adapter)()):
        (result,) = check_method("bad", cases=[CASE], checks=[check])
    assert result.status == status, result


class Encoder(torch.nn.Module):
    """Torch computes its layers in one operation each, unless they have adapters."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode (N, L, 8); the head's input is not contiguous, and torch has other kernels for such inputs."""
        result: torch.Tensor = self.head(self.layers(x)[:, :2])
        return result


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return Encoder()


X = torch.randn(3, 17, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [("self_attn", "linear1"), ("linear1", "linear2", "head")])
def test_a_model_that_torch_runs_with_fused_layers_is_compared_without_them(
    targets: tuple[str, ...], toys: None
) -> None:
    """Law: the base and the adapted model are computed in the same way, and equal bits are asked for."""
    case = Case(
        "encoder",
        encoder,
        torch.no_grad()(lambda model: model(X)),
        lambda model: model(X).square().mean(),
        {"targets": targets},
    )
    fast = torch.backends.mha.get_fastpath_enabled()
    checks = ["start", "delta_is_what_forward_adds", "disabled_is_the_base", "unwraps", "merges", "compiles"]
    found = check_method("toy-low-rank", cases=[case], checks=checks)
    assert [result for result in found if result.status != "passed"] == []
    assert torch.backends.mha.get_fastpath_enabled() is fast


class DeltaInSinglePrecision(bad_methods.Plugin):
    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: bad_methods.Product) -> Delta:
        return Delta(weight=adapter.b.float() @ adapter.a.float())


def test_a_model_that_the_method_refuses_is_skipped_beside_one_that_it_takes() -> None:
    """Law: a refusal in words is no failure, unless the method takes no model at all."""
    with registered(NoRoomIn()):
        found = check_method("bad", cases=[CASE, known_cases.NETWORK], checks=["building_keeps_the_base", "merges"])
        (alone,) = check_method("bad", cases=[CASE], checks=["building_keeps_the_base"])
    assert [result.status for result in found] == ["skipped", "skipped", "passed", "passed"]
    assert found[0].reason.startswith("the method cannot be used on this model: 0 and 1 more like it: ")
    assert "6 features are too few" in found[0].reason
    assert alone.status == "error"


def test_a_check_leaves_random_state_and_files_alone(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: checks write into folders of their own, which are gone afterwards, and draw no random numbers of others."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = torch.get_rng_state()
    check_method("toy-low-rank", cases=[CASE], checks=["saves_and_loads", "seed"])
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["network", "bert"])
@pytest.mark.parametrize("dtype", ["adapters", "base"])
def test_training_in_fp16_keeps_every_law(toys: None, name: str, dtype: str) -> None:
    """Law: what fp16 rounds to 0, such as AdamW's epsilon and small gradients, is not the method's fault."""
    if name == "bert":
        pytest.importorskip("transformers")
    (case,) = known_cases.named([name])
    config = {"adapter_dtype": "float16"} if dtype == "adapters" else {}
    found = check_method("toy-low-rank", config, [case if config else in_dtype(case, torch.float16)])
    assert [result for result in found if result.status not in ("passed", "skipped")] == []


def test_checks_compute_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On models this small, threads cost time; afterwards there are as many as before."""
    seen: list[int] = []
    before = torch.get_num_threads()

    def added(self: object, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return 0 * x

    torch.set_num_threads(2)
    monkeypatch.setattr(bad_methods.Product, "added", added)
    try:
        with registered(bad_methods.Plugin()):
            check_method("bad", cases=[CASE], checks=["start"])
        assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_plugin_says_where_it_was_raised() -> None:
    """Law: an exception that is no failed law is an error, with its class, line and the law that was checked."""
    with registered(Raising()):
        (result,) = check_method("bad", cases=[CASE], checks=["start"])
    assert result.status == "error"
    assert "ZeroDivisionError" in result.reason
    assert re.search(r" in test_kit\.py, line \d+: return y / \(1 // 0\)\. ", result.reason)
    assert "bit-identical" in result.reason


class Broken(bad_methods.Product):
    def forward(self, base: BaseLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y / (1 // 0)


class Raising(bad_methods.Plugin):
    adapter = Broken


def test_a_plugin_that_writes_into_its_input_changes_no_other_test() -> None:
    """Law: the kit's own cases run on copies of their inputs."""
    before = small.X.clone()
    with registered(plugin_of(bad_methods.Scribbling)()):
        check_method("bad", cases=[CASE, known_cases.NETWORK], checks=["inputs_unwritten", "forward_keeps_the_base"])
    assert torch.equal(small.X, before)


class ForgetsBiases(ScalePlugin):
    """Scales outputs, and says so of the weights alone."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-forgets", config=ScaleConfig)]

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: Scale, base: BaseLayer) -> Delta:
        return Delta(weight=adapter.l[:, None] * base.dense())


def test_a_delta_without_the_bias_is_noticed_where_the_model_s_biases_are_0() -> None:
    """A new BERT has biases of 0, so its outputs would be equal."""
    pytest.importorskip("transformers")
    check = "delta_is_what_forward_adds"
    with registered(ForgetsBiases()):
        (result,) = check_method("toy-forgets", cases=known_cases.named(["bert"]), checks=[check])
    assert (result.check, result.status) == (check, "failed")
