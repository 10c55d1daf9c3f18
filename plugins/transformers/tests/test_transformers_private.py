"""Canaries: each private name of transformers that the core uses exists and behaves as expected."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts.structure import private_attributes, read
from tests.support.canaries import confirm
from tunerkit_transformers import transformers_private

transformers = pytest.importorskip("transformers", reason="the canaries are about its Trainer")
pytest.importorskip("accelerate", reason="the Trainer needs it")

MARK = "_is_hf_initialized"
PLUGIN = Path(__file__).parents[1] / "tunerkit_transformers"
FILE = "tunerkit_transformers/transformers_private.py"
USER = "tunerkit_transformers.checkpoints"
LOSSES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")


class Net(nn.Module):
    """A regression with the Trainer's calling convention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


def trainer(folder: Path, **options: Any) -> Any:
    rows = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return transformers.Trainer(model=Net(), args=arguments, train_dataset=rows, eval_dataset=rows)


def weights(own: Any) -> Tensor:
    found: Tensor = own.model.layer.weight
    return found.detach().clone()


def calls(own: Any, **replaced: str) -> list[str]:
    """Make `transformers_private.replace_` record each called method, and call it."""
    noted: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        def call(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            noted.append(name)
            original(*args, **kwargs)

        return call

    names = ("save", "save_states", "load", "load_best", "load_states")
    transformers_private.replace_(own, **{name: noting(name) for name in names})
    return noted


def saves(folder: Path) -> bool:
    """Writes the weights, and `save_model` calls it."""
    own = trainer(folder)
    noted = calls(own)
    own.save_model(str(folder / "model"))
    return noted == ["save"] and any((folder / "model").glob("*.safetensors"))


def saves_states(folder: Path) -> bool:
    """Called for each checkpoint, in addition to `_save`, with the folder."""
    own = trainer(folder, save_strategy="steps", save_steps=2)
    noted = calls(own)
    own.train()
    return sorted(noted) == ["save", "save_states"] and (folder / "checkpoint-2" / "optimizer.pt").is_file()


def loads(folder: Path) -> bool:
    """Called once when a training resumes, and loads the checkpoint's weights."""
    first = trainer(folder, save_strategy="steps", save_steps=2)
    first.train()
    own = trainer(folder)
    noted = calls(own)
    own.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return noted == ["load", "load_states"] and torch.equal(weights(own), weights(first))


def loads_best(folder: Path) -> bool:
    """Called at the end of a training, with the best checkpoint's path in the trainer's state."""
    own = trainer(
        folder, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    noted = calls(own)
    own.train()
    return noted.count("load_best") == 1 and own.state.best_model_checkpoint is not None


def loads_states(folder: Path) -> bool:
    """Called once when a training resumes, and loads the optimizer's state."""
    trainer(folder, save_strategy="steps", save_steps=1, optim="adamw_torch").train()
    own = trainer(folder, optim="adamw_torch")
    noted = calls(own)
    own.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    state = own.optimizer.state[own.model.layer.weight]
    return "load_states" in noted and int(state["step"]) == 2


def samples(folder: Path) -> bool:
    """Asked for the sampler of the data loader, with the data set."""
    own = trainer(folder)
    own.train_dataset = [{"x": torch.full((2,), float(number)), "labels": torch.ones(1)} for number in range(4)]
    asked: list[object] = []

    def sampler(dataset: object) -> list[int]:
        asked.append(dataset)
        return [3, 1]

    transformers_private.sample_by_(own, sampler)
    return [batch["x"][0, 0] for batch in own.get_train_dataloader()] == [3, 1] and asked == [own.train_dataset]


CANARIES: dict[str, tuple[list[str], Callable[[Path], bool]]] = {
    "_save": (["output_dir", "state_dict"], saves),
    "_save_optimizer_and_scheduler": (["output_dir"], saves_states),
    "_load_from_checkpoint": (["resume_from_checkpoint", "model"], loads),
    "_load_best_model": ([], loads_best),
    "_load_optimizer_and_scheduler": (["checkpoint"], loads_states),
    "_get_train_sampler": (["train_dataset"], samples),
}


@pytest.mark.parametrize("name", CANARIES)
def test_a_private_method_of_the_trainer_does_what_it_is_taken_for(name: str, tmp_path: Path) -> None:
    """On failure, the message says what broke, what uses it, and where to fix it."""
    expected, check = CANARIES[name]
    version = transformers.__version__
    where = f"transformers {version}: Trainer.{name} is not what it was. {USER} relies on it: mend {FILE}"
    method = vars(transformers.Trainer).get(name)
    assert method is not None, where
    taken = list(inspect.signature(functools.partial(method, None)).parameters)
    assert taken == expected, f"{where} (it takes {taken})"
    confirm(functools.partial(check, tmp_path), where)


def test_every_private_name_in_the_file_has_a_canary() -> None:
    """Also, no canary is for a name that is no longer used."""
    source = next(s for s in read("plugin", PLUGIN) if s.name.endswith("transformers_private"))
    others = {MARK, transformers_private.HAS_ADAPTERS, "_version"}
    assert set(private_attributes(source)) == {*CANARIES, *LOSSES, *others}


def test_a_trainer_adds_its_losses_up_where_they_are_taken_from(tmp_path: Path) -> None:
    """Before a training there are none. What is set as it begins counts in the means that it logs."""
    own = trainer(tmp_path, logging_steps=2)
    assert transformers_private.losses(None) == transformers_private.losses(own) == {}
    seen: list[dict[str, float]] = []

    class Setting(transformers.TrainerCallback):  # type: ignore[misc, name-defined]  # a module that may be missing
        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            assert transformers_private.set_losses_(own, {"logged": 10.0, "since": 100.0, "last_logged": 0})
            assert not transformers_private.set_losses_(own, {"logged": "10", "since": 100.0, "last_logged": 0})

        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            seen.append(transformers_private.losses(own))

    own.add_callback(Setting())
    own.train()
    assert [(each["logged"], each["last_logged"]) for each in seen] == [(10.0, 0), (10.0, 0)]
    assert 100 < seen[0]["since"] < seen[1]["since"]
    (mean,) = [entry["loss"] for entry in own.state.log_history if "loss" in entry]
    assert 2 * mean == pytest.approx(seen[1]["since"])
    found = transformers_private.losses(own)
    assert found == {"logged": pytest.approx(10 + 2 * mean), "since": 0.0, "last_logged": 2}


def test_a_trainer_takes_a_quantised_model_with_the_mark_of_adapters_alone() -> None:
    """The class has the mark as False; on the instance it is set, and the Trainer looks at nothing else."""
    where = f"transformers {transformers.__version__}: the mark of adapters is not what it was: mend {FILE}"
    name = transformers_private.HAS_ADAPTERS
    assert getattr(transformers.PreTrainedModel, name) is False, where
    model: Any = transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    setattr(model, transformers_private.IS_QUANTISED, True)
    arguments = transformers.TrainingArguments(report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(model, arguments)
    setattr(model, name, True)
    transformers.Trainer(model, arguments)


def test_loaded_parameters_have_a_mark_that_new_ones_lack(tmp_path: Path) -> None:
    """Moves, casts, training and pickles keep it, a deep copy does not, and a model from a config has none."""
    where = f"transformers {transformers.__version__}: {MARK} is not what it was. new_modules.py relies on it: "
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)

    def marked(model: nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if transformers_private.is_loaded(p)}

    loaded = {name for name, _ in model.named_parameters() if name.startswith("bert.")}
    assert marked(model) == loaded, f"{where}mend {FILE}"
    assert marked(pickle.loads(pickle.dumps(model))) == loaded, f"{where}mend {FILE}"
    assert marked(model.to(torch.bfloat16).requires_grad_(False)) == loaded, f"{where}mend {FILE}"
    assert not marked(copy.deepcopy(model)), f"{where}deep copies keep it now, so say less in the warning"
    assert not marked(transformers.BertForSequenceClassification(config)), f"{where}mend {FILE}"


def test_from_pretrained_marks_every_module_and_writes_in_place_only_what_it_did_not_load(tmp_path: Path) -> None:
    """Casts and moves keep both; a module that is put in later has no mark, and a copied parameter was not written."""
    where = f"transformers {transformers.__version__}: {MARK} is not what it was. new_modules.py relies on it: "
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    for changed in (model, model.to(torch.bfloat16).to("cpu")):
        assert all(map(transformers_private.is_built, changed.modules())), f"{where}mend {FILE}"
        for name, parameter in changed.named_parameters():
            new = name.startswith("model.layers.1.")
            assert transformers_private.is_loaded(parameter) is not new, f"{where}mend {FILE}"
            assert bool(transformers_private.version(parameter)) is new, f"{where}it wrote {name}, or not: mend {FILE}"
    assert not transformers_private.is_built(nn.Linear(1, 1))
    assert not any(transformers_private.version(p) for p in copy.deepcopy(model).parameters())


def test_torch_counts_the_changes_of_a_parameter_s_values() -> None:
    """In place, and not those that replace it; a parameter of inference mode has no count."""
    weight = nn.Parameter(torch.zeros(2))
    with torch.no_grad():
        before = transformers_private.version(weight)
        weight.add_(1)
    assert (before, transformers_private.version(weight)) == (0, 1)
    with torch.inference_mode():
        assert transformers_private.version(nn.Parameter(torch.zeros(2))) is None


def test_methods_for_weights_of_a_trainer_s_own_are_named() -> None:
    """The methods that a subclass overrides; all others are shared with its base."""
    own = type("Own", (transformers.Trainer,), {"_load_best_model": lambda self: None})
    assert transformers_private.overridden(own, transformers.Trainer) == ["_load_best_model"]
    assert transformers_private.overridden(transformers.Trainer, transformers.Trainer) == []
