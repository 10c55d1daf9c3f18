"""The table of docs/quantised.md: what works on quantised models, with tunerkit and with peft; each cell is run.

Run it with a folder of a causal LM in full precision, and the forms that the installed libraries can make::

    python -m scripts.quantised MODEL [FORM ...] > rows.md
"""

import copy
import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS, RANK, TARGETS = 8, 4, ("q_proj", "v_proj", "down_proj")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "hqq", "optimum-quanto", "gptqmodel")
METHODS = ("lora", "adalora")
HEAD = (
    "| base | adapter | package | trains after eval | budget | reloads equal | merge error | unmerges | dense error |"
)


def quantised(folder: str, form: str, *, repacked: bool = True) -> Any:
    """Load the model in one form. Heads and embeddings stay as they are.

    With ``repacked=False``, bitsandbytes does not repack 4-bit weights for inference on a CPU.
    """
    model = _quantised(folder, form)
    for module in model.modules():
        if not repacked and hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)
    return model


_REPACKS = "support_avx512bf16_for_cpu"


def _quantised(folder: str, form: str) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    match form:
        case "bitsandbytes int8":
            config: Any = transformers.BitsAndBytesConfig(load_in_8bit=True)
        case "bitsandbytes nf4" | "bitsandbytes fp4":
            kind = form.rpartition(" ")[2]
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32
            )
        case "torchao int8" | "torchao int4":
            from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

            four: Any = vars(torch)["int4"]
            eight = Int8WeightOnlyConfig()
            groups = IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(32))
            config = transformers.TorchAoConfig(eight if form.endswith("8") else groups)
        case "quanto int8":
            config = transformers.QuantoConfig(weights="int8")
        case "HQQ int4":
            return _by_hand(folder, _hqq)
        case "GPTQ int4":
            return _by_hand(folder, _gptq)
        case _:
            raise SystemExit(f"no form named {form!r}; there are: {', '.join(FORMS)}")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


FORMS = (
    *("bitsandbytes int8", "bitsandbytes nf4", "bitsandbytes fp4", "torchao int8", "torchao int4"),
    *("HQQ int4", "quanto int8", "GPTQ int4"),
)


def _by_hand(folder: str, build: Callable[[nn.Linear], nn.Module]) -> Any:
    """Load the model and replace the linear layers of its blocks: transformers has no loader for these on a CPU."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in path:
            model.set_submodule(path, build(module))
    return model


def _hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    built: nn.Module = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    return built


def _gptq(linear: nn.Linear) -> nn.Module:
    """GPTQ's format, rounded to the nearest: what is tried here does not depend on how well it was quantised."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    rows, columns = linear.weight.shape
    built: Any = TorchLinear(
        bits=4, group_size=32, sym=True, desc_act=False, in_features=columns, out_features=rows, bias=False
    )
    scales = linear.weight.detach().view(rows, -1, 32).abs().amax(-1).clamp_min(1e-5) / 7
    built.pack(linear, scales, torch.full_like(scales, 8), torch.arange(columns, dtype=torch.int32) // 32)
    built.post_init()
    return built  # type: ignore[no-any-return]


def batch() -> Tensor:
    """Two sequences of 24 tokens."""
    return torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    """The output in eval mode."""
    with torch.no_grad():
        found: Tensor = model.eval()(batch()).logits
    return found.float()


def trained(model: Any, parameters: Callable[[], list[nn.Parameter]], after: Callable[[int], object]) -> bool:
    """Train ``model``, each step after a forward in eval mode; whether each trainable tensor had a gradient."""
    optimizer = torch.optim.AdamW(parameters(), lr=5e-3)
    after(-1) if not isinstance(after, _Attach) else after.to(optimizer)
    complete = True
    for step in range(STEPS):
        logits(model)
        optimizer.zero_grad()
        ids = batch()
        model.train()(ids, labels=ids).loss.backward()
        if step == 2:
            # A pruned module has gradients of 0, which is no fault.
            found = [p.grad for p in parameters()]
            complete = all(grad is not None for grad in found) and any(bool(g.any()) for g in found if g is not None)
        optimizer.step()
        after(step)
    return complete


class _Attach:
    """tunerkit's side of `trained`: the optimizer drives the adapter, and nothing is called after a step."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def to(self, optimizer: torch.optim.Optimizer) -> None:
        import tunerkit

        tunerkit.attach(self.model, optimizer, total_steps=STEPS)

    def __call__(self, step: int) -> None:
        """Do nothing."""


def share(found: Tensor, wanted: Tensor, base: Tensor) -> str:
    """The difference as a share of what the adapter changes."""
    return f"{float((found - wanted).norm() / (wanted - base).norm()):.1e}"


def of_tunerkit(folder: str, form: str, method: str) -> Iterator[str]:
    """The cells of one row, in the columns' order."""
    import tunerkit

    config = {"lora": {"rank": RANK}, "adalora": {"target_rank": RANK, "init_rank": 2 * RANK}}[method]
    base = logits(tunerkit.wrap(quantised(folder, form), method, {**config, "targets": list(TARGETS)}))
    model = tunerkit.wrap(quantised(folder, form), method, {**config, "targets": list(TARGETS)}, seed=0)
    own = lambda: [p for p in tunerkit.tuner(model).parameters() if p.requires_grad and p.numel()]  # noqa: E731
    yield "yes" if trained(model, own, _Attach(model)) else "**no gradient**"
    ranks = tunerkit.tuner(model).ranks().values()
    yield "exact" if sum(ranks) == RANK * len(ranks) else f"**{sum(ranks)} of {RANK * len(ranks)}**"
    output = logits(model)
    with tempfile.TemporaryDirectory() as saved:
        loaded = tunerkit.load(quantised(folder, form), tunerkit.save(model, saved))
        yield "yes" if torch.equal(logits(loaded), output) else "**no**"
    try:
        tunerkit.merge(model)
        every = tunerkit.rounding(model).values()
        added, alone = (sum(getattr(each, name) for each in every) / len(every) for name in ("added", "own"))
        yield f"{share(logits(model), output, base)} (weights: {added:.1%}, own {alone:.1%})"
        yield "yes" if torch.equal(logits(tunerkit.unmerge(model)), output) else "**no**"
    except tunerkit.AdapterError:
        yield from ("refused", "–")
    yield share(logits(tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)), output, base)


def of_peft(folder: str, form: str, method: str) -> Iterator[str]:
    """The cells of one row, in the columns' order."""
    peft: Any = importlib.import_module("peft")

    config: Any = (
        peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
        if method == "lora"
        else peft.AdaLoraConfig(
            target_r=RANK,
            init_r=2 * RANK,
            total_step=STEPS,
            tfinal=2,
            target_modules=list(TARGETS),
            lora_alpha=2 * RANK,
        )
    )

    def fresh() -> Any:
        return quantised(folder, form, repacked=False)

    base = logits(fresh())
    model: Any = peft.get_peft_model(fresh(), copy.deepcopy(config))
    own = lambda: [p for p in model.parameters() if p.requires_grad]  # noqa: E731
    allocate = lambda step: model.base_model.update_and_allocate(step) if method == "adalora" and step >= 0 else None  # noqa: E731
    complete = trained(model, own, allocate)
    yield ("yes" if complete else "**no gradient**") + _unless_repacked(folder, form, copy.deepcopy(config))
    yield "masks" if method == "adalora" else "exact"
    output = logits(model)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        loaded = peft.PeftModel.from_pretrained(fresh(), saved)
        yield "yes" if torch.equal(logits(loaded), output) else f"differs by {share(logits(loaded), output, base)}"
    model.merge_adapter()
    merged = logits(model)
    yield "**nothing happens**" if share(merged, base, output) == "0.0e+00" else share(merged, output, base)
    model.unmerge_adapter()
    found = logits(model)
    yield "yes" if torch.equal(found, output) else f"differs by {share(found, output, base)}"
    yield "–"


def _unless_repacked(folder: str, form: str, config: Any) -> str:
    """What becomes of peft's gradients if bitsandbytes repacks 4-bit weights, which only some CPUs do."""
    peft: Any = importlib.import_module("peft")

    model: Any = peft.get_peft_model(quantised(folder, form), config)
    if not any(getattr(module, _REPACKS, False) for module in model.modules()):
        return ""
    logits(model)
    ids = batch()
    try:
        model.train()(ids, labels=ids).loss.backward()
    except (RuntimeError, TypeError):
        return " (repacked: **error**)"
    missing = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    return f" (repacked: **{len(missing)} tensors without**)" if missing else ""


def row(cells: Iterator[str]) -> list[str]:
    """The cells; the first that raises names its error, and the rest are empty."""
    found: list[str] = []
    try:
        for cell in cells:
            found.append(cell)
    except Exception as error:  # whatever a library raises is the cell
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        found.append(f"{type(error).__name__}")
    return [*found, *["–"] * (6 - len(found))]


def main(folder: str, forms: Sequence[str]) -> None:
    """Print the versions and one row for each form, method and package."""
    print(", ".join(f"{name} {found}" for name in LIBRARIES if (found := _version(name))), end="\n\n")
    print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}")
    for form in forms:
        for method in METHODS:
            for package, cells in (("tunerkit", of_tunerkit), ("peft", of_peft)):
                print(f"| {form} | {method} | {package} | {' | '.join(row(cells(folder, form, method)))} |", flush=True)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(str(Path(sys.argv[1])), sys.argv[2:] or FORMS[:-1])
