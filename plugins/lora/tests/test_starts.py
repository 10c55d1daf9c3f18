"""LoRA's starts: ΔW is 0 bit for bit, A and B are what the papers say, and EVA's are PEFT's."""

import copy
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import AdapterError, StepError, TargetError
from tunerkit_lora.subtracted import SubtractedLora

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
BATCHES = [(X[:24],), (X[24:],)]
OF_THE_WEIGHT, OF_THE_DATA = ("pissa", "olora"), ("eva", "gradients")


class Net(nn.Module):
    """Every kind of base layer that has a dense weight, apart from attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 12, padding_idx=0)
        self.conv = nn.Conv1d(12, 12, 3, groups=2, padding=1)
        self.linear, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 5).long().clamp(max=15)
        hidden = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        found: Tensor = self.head(torch.tanh(self.linear(hidden)))
        return found


def wrapped(start: str, **settings: Any) -> Net:
    """The network with its start set, also by data."""
    settings = {"rank": 3, "targets": ("embed", "conv", "linear", "head"), **settings}
    model = tunerkit.wrap(Net(), "lora", {"start": start, **settings}, seed=0)
    return fitted(model) if start in OF_THE_DATA else model


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """Of a frozen copy: torch chooses another kernel for a convolution that is trained."""
    found: Tensor = copy.deepcopy(model).requires_grad_(False)(X)
    return found


def fitted(model: Net) -> Net:
    return tunerkit.calibrate(model, BATCHES, loss=lambda output, batch: output.square().mean())


def train(model: nn.Module, count: int = 5) -> nn.Module:
    optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-2))
    tunerkit.attach(model, optimizer)
    for _ in range(count):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("start", [*OF_THE_WEIGHT, *OF_THE_DATA])
def test_the_start_adds_nothing_and_trains_merges_saves_and_unwraps(start: str, tmp_path: Path) -> None:
    """Law: on every kind of layer the first output is the base's bit for bit; then it is LoRA like any other."""
    model = wrapped(start)
    assert torch.equal(output(model), output(Net()))
    adapters = tunerkit.tuner(model).adapters()
    assert all(bool(p.any()) for a in adapters.values() for n, p in a.named_parameters() if n == "a")
    trained = output(train(model))
    assert not torch.allclose(trained, output(Net()), atol=1e-3)
    again = tunerkit.load(Net(), tunerkit.save(model, tmp_path))
    assert torch.equal(output(again), trained)
    torch.testing.assert_close(output(tunerkit.merge(model)), trained)
    assert torch.equal(output(tunerkit.unwrap(tunerkit.unmerge(model))), output(Net()))


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_at_the_best_approximation_of_the_weight(rslora: bool) -> None:
    """Law: scale · B A has the largest singular values of W, divided evenly between the two."""
    model = wrapped("pissa", rslora=rslora, alpha=5.0)
    for path, adapter in tunerkit.tuner(model).adapters().items():
        assert isinstance(adapter, SubtractedLora)
        weight = Net().get_submodule(path).get_parameter("weight")
        matrix = weight.T if path == "embed" else weight.flatten(1)
        left = torch.linalg.svdvals((matrix - adapter.scale * adapter.b @ adapter.a).detach())
        torch.testing.assert_close(left[:-3], torch.linalg.svdvals(matrix.detach())[3:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(adapter.a @ adapter.a.T, adapter.b.T @ adapter.b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", OF_THE_WEIGHT)
def test_it_learns_what_peft_learns(start: str) -> None:
    """Law: over 20 AdamW steps A, B and the output are PEFT's, which changes the base instead."""
    peft = pytest.importorskip("peft", reason="peft is the peer that this test compares with")

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 6))

    ours = tunerkit.wrap(network(), "lora", {"rank": 3, "alpha": 5.0, "start": start, "targets": ["0", "2"]})
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=start, target_modules=["0", "2"])
    theirs = peft.get_peft_model(network(), config)
    double = {"ours": ours.double(), "theirs": theirs.double()}
    for path, adapter in tunerkit.tuner(ours).adapters().items():
        assert isinstance(adapter, SubtractedLora)
        layer = theirs.base_model.model.get_submodule(path)
        base = network().get_submodule(path).get_parameter("weight").detach().double()
        # From the same numbers: PEFT computes in fp32, and keeps the rest in the base.
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = adapter.a.data, adapter.b.data
        layer.base_layer.weight.data = base - adapter.scale * adapter.b.data @ adapter.a.data
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.clone()
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.clone()
    outputs = {}
    for name, model in double.items():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(20):
            model(X.double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs[name] = model(X.double())
    assert float((outputs["ours"] - outputs["theirs"]).detach().abs().max()) < 1e-9
    for path, adapter in tunerkit.tuner(ours).adapters().items():
        layer = theirs.base_model.model.get_submodule(path)
        assert float((layer.lora_A["default"].weight - adapter.a).detach().abs().max()) < 1e-9
        assert float((layer.lora_B["default"].weight - adapter.b).detach().abs().max()) < 1e-9


@pytest.mark.parametrize("start", OF_THE_WEIGHT)
def test_a_saved_adapter_loads_without_a_decomposition(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: the file has the start, so loading decomposes nothing."""
    model = train(wrapped(start))
    path = tunerkit.save(model, tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("an SVD at loading"))
    monkeypatch.setattr(torch.linalg, "qr", lambda *_, **__: pytest.fail("a QR at loading"))
    assert torch.equal(output(tunerkit.load(Net(), path)), output(model))


@pytest.mark.parametrize(
    ("start", "settings", "words"),
    [
        ("pissa", {"rank": 11}, "rank 11 is above 10, the most directions that start 'pissa' finds"),
        ("olora", {"rank_pattern": {"head": 5}}, r"rank 5 is above 4, .*rank_pattern=\{'head': 4\}"),
        ("eva", {"rank": 13}, "rank 13 is above 12"),
        ("gradients", {"rank": 5}, "rank 5 is above 4"),
    ],
)
def test_a_rank_above_the_matrix_is_refused_with_the_largest_one(
    start: str, settings: dict[str, Any], words: str
) -> None:
    """Law: a line for each target names it, the rank, the largest possible one, and what to write."""
    with pytest.raises(TargetError, match=words) as caught:
        tunerkit.wrap(Net(), "lora", {"start": start, "targets": ["linear", "head"], **settings})
    assert all("above" in line and "rank_pattern" in line for line in str(caught.value).splitlines())
    tunerkit.wrap(Net(), "lora", {"targets": ["linear", "head"], **settings})  # random rows may be more


@pytest.mark.parametrize("start", OF_THE_DATA)
def test_a_start_that_needs_data_is_not_trained_without(start: str, tmp_path: Path) -> None:
    """Law: attaching says which call is missing; what was calibrated, and what comes from a file, trains."""
    model = tunerkit.wrap(Net(), "lora", {"start": start, "rank": 2, "targets": ["linear"]})
    optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-3))
    with pytest.raises(
        StepError, match=rf"start '{start}' is computed from data.*tunerkit.calibrate\(model, batches\)"
    ):
        tunerkit.attach(model, optimizer)
    train(fitted(model))
    train(tunerkit.load(Net(), tunerkit.save(model, tmp_path), trainable=True))


def test_a_start_that_needs_none_is_not_calibrated() -> None:
    """Law: data that would change nothing are refused in one line."""
    with pytest.raises(AdapterError, match="method 'lora' needs no data with its settings; train it directly"):
        tunerkit.calibrate(tunerkit.wrap(Net(), "lora", {"targets": ["linear"]}), BATCHES)


@pytest.mark.parametrize("start", [*OF_THE_WEIGHT, *OF_THE_DATA])
def test_a_training_resumes_bit_for_bit(start: str, tmp_path: Path) -> None:
    """Law: stopped after 4 of 8 steps and resumed from files, the weights are those of 8 steps."""

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-2))
        tunerkit.attach(model, optimizer, total_steps=8)
        return optimizer

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(4):
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = wrapped(start, lr_ratio=4.0)
    optimizer = optimizer_of(model)
    steps(model, optimizer)
    path, state = tunerkit.save(model, tmp_path), copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer)
    again = tunerkit.load(Net(), path, trainable=True)
    resumed = optimizer_of(again)
    resumed.load_state_dict(state)
    steps(again, resumed)
    found = dict(tunerkit.tuner(again).named_parameters())
    for name, parameter in tunerkit.tuner(model).named_parameters():
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize("start", OF_THE_WEIGHT)
def test_a_weight_that_is_read_past_its_layer_keeps_the_output(start: str) -> None:
    """Law: attention's packed projection, where only the delta counts, trains from a delta of 0."""
    torch.manual_seed(0)
    base = nn.MultiheadAttention(12, 2, batch_first=True).requires_grad_(False)
    x = torch.randn(3, 5, 12)
    before = base(x, x, x)[0]
    model = tunerkit.wrap(nn.ModuleDict({"attention": base}), "lora", {"start": start, "targets": ["attention"]})
    torch.testing.assert_close(base(x, x, x)[0], before)
    base(x, x, x)[0].square().mean().backward()
    (adapter,) = tunerkit.tuner(model).adapters().values()
    assert isinstance(adapter, SubtractedLora)
    assert not (adapter.factors().p @ adapter.factors().q).any()
    assert adapter.get_parameter("b").grad is not None


# --- EVA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["embed", "conv", "linear"])
def test_eva_starts_at_the_principal_components_of_the_inputs(path: str) -> None:
    """Law: A has the first right singular vectors of the centred inputs, of patches and one-hot rows too."""
    model = wrapped("eva", rank=4, rho=1.0, targets=(path,))
    seen: list[Tensor] = []
    base = Net()
    module = base.get_submodule(path)
    module.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    base(X)
    (x,) = seen
    if path == "embed":
        rows = nn.functional.one_hot(x, 16).float()
        rows[..., 0] = 0  # the padding row adds nothing
    elif path == "conv":
        windows = nn.functional.pad(x, (1, 1)).unfold(2, 3, 1)  # (n, channels, positions, kernel)
        rows = windows.unflatten(1, (2, 6)).permute(0, 1, 3, 2, 4).flatten(3)
    else:
        rows = x
    rows = rows.reshape(-1, rows.shape[-1]).double()
    expected = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:4].float()
    (adapter,) = tunerkit.tuner(model).adapters().values()
    found = adapter.get_parameter("a").detach()
    assert float(torch.cosine_similarity(found, expected).abs().min()) > 0.999
    torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-4, rtol=0)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model is transformers'")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # a trained model's activations have main directions; random ones have none
                u, _, vh = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(3 * (u * 0.6 ** torch.arange(u.shape[1])) @ vh)
    return model


def by_input(ranks: dict[str, int]) -> dict[str, list[int]]:
    """The ranks of layers with the same input together: their shares are equal, and PEFT's sort is not stable."""
    found: dict[str, list[int]] = {}
    for path, rank in sorted(ranks.items(), key=lambda each: each[1]):
        found.setdefault(re.sub("[qkv]_proj$", "qkv", path), []).append(rank)
    return found


@pytest.mark.parametrize(("count", "rho"), [(1, 2.0), (1, 1.0), (1, 4 / 3), (3, 2.0)])
def test_eva_is_pefts(count: int, rho: float) -> None:
    """Law: on the same batches, A has PEFT's components up to their signs, and each target PEFT's rank and scale."""
    peft = pytest.importorskip("peft", reason="peft is the peer that this test compares with")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    ids = torch.randint(0, 64, (count, 16, 32), generator=torch.Generator().manual_seed(5))
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.9999),  # by default it stops before it has seen all batches
    )
    theirs = peft.get_peft_model(llama(), config)
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    ours = tunerkit.wrap(llama(), "lora", {"rank": 3, "alpha": 12.0, "start": "eva", "rho": rho, "targets": targets})
    tunerkit.calibrate(ours, batches)
    ranks, least = {}, 1.0
    for path, adapter in tunerkit.tuner(ours).adapters().items():
        layer = theirs.base_model.model.get_submodule(path)
        if not hasattr(layer, "lora_A"):  # PEFT takes out what gets no rank
            ranks[path] = 0
            continue
        expected = layer.lora_A["default"].weight.detach()
        ranks[path] = len(expected)
        assert layer.scaling["default"] == pytest.approx(tunerkit.tuner(ours).config.scale_at(path))  # type: ignore[attr-defined]
        found = adapter.get_parameter("a").detach()[: len(expected)]
        least = min(least, float(torch.cosine_similarity(found, expected[: len(found)]).abs().min()))
    assert by_input(tunerkit.tuner(ours).ranks()) == by_input(ranks)
    assert len(set(ranks.values())) > 1 or rho == 1
    assert sum(ranks.values()) == 3 * len(ranks)
    assert least >= 0.999


def test_ranks_that_data_chose_survive_a_file(tmp_path: Path) -> None:
    """Law: ranks, weights and scale are those of the calibrated adapter, though the setting says another rank."""
    model = train(wrapped("eva", rank=4, rho=3.0))
    ranks = tunerkit.tuner(model).ranks()
    assert len(set(ranks.values())) > 1
    again = tunerkit.load(Net(), tunerkit.save(model, tmp_path))
    assert tunerkit.tuner(again).ranks() == ranks
    assert torch.equal(output(again), output(model))


# --- LoRA-One and GoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["kaiming", *OF_THE_WEIGHT])
def test_tensors_of_another_rank_are_refused_where_ranks_do_not_move(start: str) -> None:
    """The scale depends on the settings' rank: with another one, they would be another ΔW."""
    few, more = (tunerkit.tuner(wrapped(start, rank=rank)).adapters()["linear"] for rank in (2, 3))
    with pytest.raises(RuntimeError, match="size mismatch"):
        more.load_state_dict(few.state_dict())


def gradients(*paths: str) -> dict[str, Tensor]:
    """The gradient of the loss by the weights, summed over the batches."""
    base = Net()
    for (x,) in BATCHES:
        base(x).square().mean().backward()
    grads = {path: base.get_submodule(path).get_parameter("weight").grad for path in paths}
    return {path: grad for path, grad in grads.items() if grad is not None}


def test_gradients_start_at_the_singular_vectors_of_the_descent() -> None:
    """Law: B A is in the subspaces of −G, its triplets in G's proportions, and the largest has the size √out / γ."""
    model = wrapped("gradients", targets=("linear", "head"))
    for path, adapter in tunerkit.tuner(model).adapters().items():
        u, sigma, vh = torch.linalg.svd(gradients(path)[path], full_matrices=False)
        size = math.sqrt(len(u)) / 64
        expected = -size / sigma[0] * (u[:, :3] * sigma[:3]) @ vh[:3]
        found = adapter.get_parameter("b") @ adapter.get_parameter("a")
        torch.testing.assert_close(found.detach(), expected, atol=1e-4 * size, rtol=1e-3)


def test_gradients_give_the_budget_to_important_matrices() -> None:
    """Law: the ranks add up to rank x targets, none is above rho times its own, and more importance is no less rank."""
    paths = ("conv", "linear", "head")
    model = wrapped("gradients", rank=3, rho=4.0 / 3, targets=paths)
    ranks = tunerkit.tuner(model).ranks()
    base = Net()
    importance = {
        path: float((base.get_submodule(path).get_parameter("weight") * grad).abs().mean())
        for path, grad in gradients(*paths).items()
    }
    assert sum(ranks.values()) == 9
    assert max(ranks.values()) == 4
    ordered = sorted(paths, key=lambda path: importance[path])
    assert [ranks[path] for path in ordered] == sorted(ranks.values())


# --- LoRA+ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_lr_ratio_gives_b_its_own_learning_rate(start: str) -> None:
    """Law: B's group has the ratio times the learning rate, and holds exactly the Bs; 1 leaves one group."""
    model = wrapped(start, lr_ratio=16.0)
    slow, fast = tunerkit.param_groups(model, lr=1e-3)
    assert (slow["lr"], fast["lr"]) == (1e-3, 16e-3)
    adapters = tunerkit.tuner(model).adapters().values()
    assert {id(p) for p in fast["params"]} == {id(adapter.get_parameter("b")) for adapter in adapters}
    assert len(tunerkit.param_groups(wrapped(start), lr=1e-3)) == 1


def attached(model: nn.Module, groups: Any, *, schedule: bool = False) -> list[str]:
    """The warnings of an optimizer that is attached, after a scheduler has set its rates to those of step 0."""
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    if schedule:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tunerkit.attach(model, optimizer)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_an_optimizer_that_does_not_keep_lr_ratio_is_named(start: str, schedule: bool) -> None:
    """Law: without the groups of `param_groups` LoRA+ is off, and one warning says so; with them there is none."""
    model = wrapped(start, lr_ratio=16.0)
    (warning,) = attached(model, [p for p in model.parameters() if p.requires_grad], schedule=schedule)
    assert "lr_ratio=16, but the optimizer trains A at a learning rate of 0.001 and B at 0.001" in warning
    assert "tunerkit.param_groups(model, lr=...)" in warning
    model = wrapped(start, lr_ratio=16.0)
    assert attached(model, tunerkit.param_groups(model, lr=1e-3), schedule=schedule) == []
    model = wrapped(start)
    assert attached(model, [p for p in model.parameters() if p.requires_grad]) == []


def test_rates_of_ones_own_are_compared_where_both_are_trained() -> None:
    """Law: each B is compared with its own A, and an optimizer of the Bs alone says nothing about A's rate."""
    model = wrapped("kaiming", lr_ratio=2.0)
    adapters = tunerkit.tuner(model).adapters().values()
    groups = [
        {"params": [adapter.get_parameter(name)], "lr": rate * 10.0**-at}
        for at, adapter in enumerate(adapters)
        for name, rate in (("a", 0.1), ("b", 0.2))
    ]
    assert attached(model, groups) == []
    model = wrapped("kaiming", lr_ratio=2.0)
    some = attached(model, [adapter.get_parameter("b") for adapter in tunerkit.tuner(model).adapters().values()])
    assert not any("lr_ratio" in each for each in some)


def test_an_attached_trainer_keeps_lr_ratio_without_a_warning(tmp_path: Path) -> None:
    """Law: it makes the groups itself, also with a warmup from 0; an optimizer that it is given is compared."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tunerkit_transformers")
    from tests.support.trainer_toys import Regression, RegressionRows, arguments

    for given in (False, True):
        model = tunerkit.wrap(Regression(), "lora", {"targets": ["first", "second"], "lr_ratio": 16.0})
        options: dict[str, Any] = {}
        if given:
            options["optimizers"] = (torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), None)
        run = arguments(tmp_path, max_steps=2, warmup_steps=1)
        trainer = transformers.Trainer(model, run, train_dataset=RegressionRows(), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tunerkit.attach(model, trainer)
            trainer.train()
        assert sum("lr_ratio" in str(warning.message) for warning in caught) == given


def test_loftq_is_refused_on_a_base_that_is_not_quantised() -> None:
    """Law: there is nothing to make up for; the line says what to do. plugins/quant has the tests of quantised ones."""
    with pytest.raises(TargetError, match=r"start 'loftq' compensates for quantization errors, .*; quantize the base"):
        tunerkit.wrap(Net(), "lora", {"start": "loftq", "rank": 2, "targets": ["linear"]})


@pytest.mark.parametrize("start", [*OF_THE_WEIGHT, "gradients"])
def test_an_export_to_peft_is_a_lora_of_twice_the_rank(start: str, tmp_path: Path) -> None:
    """Law: PEFT's module, on the unchanged base, gives the trained output."""
    peft = pytest.importorskip("peft", reason="peft reads the folder")
    pytest.importorskip("tunerkit_peft", reason="it writes the folder")
    targets = ("embed", "linear", "head")
    model = train(wrapped(start, targets=targets))
    tunerkit.export(model, tmp_path, format="peft", form="compact")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert theirs.peft_config["default"].r == 6
    torch.testing.assert_close(output(theirs), output(model), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output(tunerkit.load(Net(), tmp_path)), output(model), atol=1e-6, rtol=1e-5)


def test_an_export_of_moved_ranks_to_peft_is_the_adapter(tmp_path: Path) -> None:
    """Law: ranks that data chose, 0 among them, and their scale survive a PEFT folder."""
    peft = pytest.importorskip("peft", reason="peft reads the folder")
    pytest.importorskip("tunerkit_peft", reason="it writes the folder")
    model = train(wrapped("eva", rank=2, rho=6.0, targets=("embed", "linear", "head")))
    tunerkit.export(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(output(theirs), output(model), atol=1e-6, rtol=1e-5)
