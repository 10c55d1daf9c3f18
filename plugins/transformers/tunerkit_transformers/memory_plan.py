"""Plan the memory of a training before its first step, part by part, and list settings that save memory."""

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.training_args import OptimizerNames

import tunerkit
from tunerkit.errors import ConfigError, closest, shown
from tunerkit.plugin import Tuner, method_record
from tunerkit_transformers.activations import address, kept_by, tensors_in
from tunerkit_transformers.grouping import lengths_in
from tunerkit_transformers.head_weights import forward_of_trl
from tunerkit_transformers.learned_positions import is_scored, may_overwrite
from tunerkit_transformers.quantising import stacks_in

MIB: Final = 2**20
CHECKPOINTING: Final = ("activation_checkpointing", "gradient_checkpointing")  # the name, and that of earlier versions
_PARTS: Final = ("base", "adapter", "gradients", "optimizer", "averages", "activations", "overhead")
_ESTIMATED: Final = ("activations", "overhead")
_FP32: Final = 4  # bytes
_NOT_LEARNED: Final = -100
_COPIES: Final = 3  # of the logits in fp32: themselves, their logarithms or probabilities, and a gradient
# Of the logits at learned positions alone: themselves, and probabilities whose gradient takes their place. A plain
# head's logits give up their own.
_LEARNED_COPIES, _OF_PLAIN_HEAD = 2, 1
_LOGITS: Final = 2**30  # bytes; TRL's loss keeps no more at once: it computes those of larger batches in parts
# nf4 with nested constants: 4 bits, an 8-bit constant for 64 weights, and an fp32 one for 256 of those.
_NF4: Final = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# Beside tensors a CPU's process takes pages of the libraries that it first uses in a step, and freed blocks that lie
# between those in use. Fitted with glibc on other shapes than it is tested on (docs/evidence/memory.md).
_PROCESS: Final = 60 * MIB
_HOLES: Final = 0.2  # of the activations


@attrs.frozen(kw_only=True)
class Plan:
    """The memory of a training in bytes. All is counted but activations and overhead, which are estimates.

    Attributes:
        base: The base model, as it is loaded, with its buffers.
        adapter: Adapters, and what is trained in full.
        gradients: The gradients of what is trained.
        optimizer: The optimizer's state. If it is not known, it is taken to be Adam's: see ``assumed``.
        averages: What the method keeps of each step beside that, such as AdaLoRA's averages of importance.
        activations: What the forward keeps for the backward, and the logits with their gradient.
        overhead: What a CPU's allocator and the libraries take beside tensors; 0 on an accelerator.
        checkpointing: What gradient checkpointing would save; 0 if it is on, or if the model has none.
        four_bit: What a 4-bit base (nf4) would save; 0 if it is quantized.
        half_batch: What batches of half of the rows would save.
        assumed: The parts that are not known, and assumed to be as usual: none, or ``("optimizer",)``.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    overhead: int
    checkpointing: int
    four_bit: int
    half_batch: int
    assumed: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The bytes that a step takes in addition to the model and its adapters."""
        return self.gradients + self.optimizer + self.averages + self.activations + self.overhead

    @property
    def total(self) -> int:
        """The sum of all parts, without the memory that the process takes before it loads the model."""
        return self.base + self.adapter + self.step

    def advice(self) -> str:
        """Return a phrase with the settings that save memory, and how much each saves; "" if none does."""
        ways = {
            "gradient checkpointing": self.checkpointing,
            "a 4-bit base": self.four_bit,
            "batches of half the rows": self.half_batch,
        }
        found = [f"{way} {_shown(saved)}" for way, saved in ways.items() if saved > 0]
        return f"would save about: {', '.join(found)}" if found else ""

    def parts(self) -> str:
        """Return one line with the total and its parts."""
        parts = ", ".join(f"{name} {_shown(getattr(self, name))}" for name in _PARTS if getattr(self, name))
        assumed = "; the optimizer's state is not known, and taken to be Adam's" if self.assumed else ""
        return f"about {_shown(self.total)} ({parts}; activations and overhead are estimated{assumed})"

    def __str__(self) -> str:
        rows = {**{name: getattr(self, name) for name in _PARTS}, "total": self.total}
        notes = {**dict.fromkeys(_ESTIMATED, "estimated"), **dict.fromkeys(self.assumed, "not known: as Adam's")}
        notes = {name: f"  ({note})" for name, note in notes.items()}
        lines = [f"{name:<12}{_shown(size):>12}{notes.get(name, '')}" for name, size in rows.items()]
        return "\n".join([*lines, *filter(None, [self.advice()])])


def _shown(count: int) -> str:
    return f"{count / MIB:,.1f} MiB" if count < 100 * MIB else f"{count / MIB:,.0f} MiB"


def plan(
    model: Any,
    *,
    rows: int,
    tokens: int | None = None,
    image: tuple[int, int, int] | None = None,
    logits: int | None = None,
    optimizer: str | Callable[..., Optimizer] | Optimizer = "adamw_torch",
    precision: torch.dtype | None = None,
    checkpointing: bool = False,
) -> Plan:
    """Return the memory that a training takes, before its first step. A forward of few rows is made for it.

    It is that of a process that holds the whole model.

    Args:
        model: A model of transformers with adapters, on its device.
        rows: The rows of a batch, for which one forward and backward is made. A pair of answers counts as two.
        tokens: The tokens of its longest row, for a model of texts.
        image: The shape of a row for a model of images: channels, height, width.
        logits: The positions of a batch at which a language model computes logits; by default all.
        optimizer: A name as the Trainer's argument ``optim`` takes it, an optimizer, or what makes one of parameters.
        precision: What matrix products are computed in under autocast, such as ``torch.bfloat16``; None without.
        checkpointing: Whether the training recomputes activations.

    Returns:
        Bytes by part, and what other settings would save.

    Raises:
        ConfigError: The model is not one of transformers, a number is not positive, both or neither of tokens and image
            are given, or no optimizer has the name.
    """
    shape = _checked_shape(model, rows, tokens, image)
    device = next(model.parameters()).device.type
    trained = [each for each in model.parameters() if each.requires_grad]
    tuners = tunerkit.adapters(model).values()
    adapter = _bytes({id(each): each for each in (*trained, *(p for t in tuners for p in t.parameters()))}.values())
    kept = kept_by(model, rows, shape, precision)
    positions = (rows * shape[0] if logits is None else logits) if writes_tokens(model) and len(shape) == 1 else 0
    of_logits = positions * _vocabulary(model) * _COPIES * _FP32

    def activations(count: int, *, recomputed: bool) -> int:
        return kept.at(count, of_logits * count // rows, checkpointing=recomputed)

    def saved(other: int) -> int:
        return max(0, int((now - other) * (1 + holes)))

    holes, process = (_HOLES, _PROCESS) if device == "cpu" else (0.0, 0)
    state = _state_bytes(optimizer, trained)
    now, can = activations(rows, recomputed=checkpointing), getattr(model, "supports_gradient_checkpointing", False)
    return Plan(
        base=_bytes((*model.parameters(), *model.buffers())) - adapter,
        adapter=adapter,
        gradients=_bytes(trained),
        optimizer=2 * _bytes(trained) if state is None else state,
        averages=sum(map(_averages, tuners)),
        activations=now,
        overhead=process + int(holes * now),
        checkpointing=saved(activations(rows, recomputed=True)) if can and not checkpointing else 0,
        four_bit=_saved_by_nf4(model),
        half_batch=saved(activations(rows // 2, recomputed=checkpointing)) if rows > 1 else 0,
        assumed=("optimizer",) if state is None else (),
    )


def _checked_shape(model: Any, rows: int, tokens: int | None, image: tuple[int, int, int] | None) -> tuple[int, ...]:
    """Return the shape of a row. Raises `ConfigError` if an argument of `plan` is wrong."""
    if not isinstance(model, PreTrainedModel):
        raise ConfigError([f"plan: expected a model of transformers, got {type(model).__name__}"])
    if (tokens is None) == (image is None):
        raise ConfigError(["plan: pass the shape of a row: either tokens, or image=(channels, height, width)"])
    if any(each.is_meta for each in model.parameters()):
        raise ConfigError(["plan: the model has weights on the meta device; load them first"])
    shape: tuple[int, ...] = (tokens,) if tokens is not None else image or ()
    for name, value in {"rows": rows, "tokens or image": min(shape)}.items():
        if value < 1:
            raise ConfigError([f"plan: {name}: expected 1 or more, got {shown(value)}"])
    return shape


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; tensors with the same storage count once."""
    return sum({address(each): each.nbytes for each in tensors}.values())


def writes_tokens(model: Any) -> bool:
    """Whether the model is a transformers model with output embeddings, so that token ids suffice as input."""
    ask = getattr(model, "get_output_embeddings", None)
    return ask is not None and ask() is not None


def _vocabulary(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "vocab_size", 0))


def _averages(tuner: Tuner) -> int:
    """Return the bytes of a method's own training state; before `attach`, an estimate.

    A method that needs steps is assumed to keep two numbers for each trained weight, in fp32 or wider.
    """
    if tuner.state is not None:
        return _bytes(tensors_in(tuner.state, set()))
    if not method_record(tuner.method).needs_steps:
        return 0
    weights = [each for adapter in tuner.adapters().values() for each in adapter.parameters() if each.requires_grad]
    return sum(2 * each.numel() * max(_FP32, each.element_size()) for each in weights)


def _state_bytes(optimizer: str | Callable[..., Optimizer] | Optimizer, trained: Sequence[Tensor]) -> int | None:
    """Return the bytes of an optimizer's state; if it is empty, those after a step on meta tensors; None if that fails.

    A given optimizer has its own parameters and settings, others have what is trained.
    """
    if isinstance(optimizer, Optimizer) and (held := [*tensors_in([*optimizer.state.values()], set())]):
        return _bytes(held)
    if isinstance(optimizer, str):
        optimizer = _named(optimizer)
    try:
        if isinstance(optimizer, Optimizer):
            made = copy.copy(optimizer)  # without its hooks
            made.state = defaultdict(dict)
            made.param_groups = [{**each, "params": _on_meta(each["params"])} for each in optimizer.param_groups]
        else:
            made = optimizer(_on_meta(trained))
        for each in (each for group in made.param_groups for each in group["params"]):
            each.grad = torch.empty_like(each) if each.requires_grad else None
        made.step()
    except Exception:  # whatever one raises that needs values, a device, or the model
        return None
    return sum(each.nbytes for each in tensors_in([*made.state.values()], set()))


def _on_meta(parameters: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad) for each in parameters]


def _named(name: str) -> Callable[..., Optimizer]:
    """Return a function that builds the optimizer with this name in the Trainer's ``optim``."""
    names = [each.value for each in OptimizerNames]
    if name not in names:
        raise ConfigError([f"plan: there is no optimizer {shown(name)}{closest(name, names)}; pass one of {names}"])
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=name))
    return partial(kind, **settings)


def _saved_by_nf4(model: Any) -> int:
    """Return the bytes that nf4 would save in linear layers and experts, without the output head and trained layers."""
    head = model.get_output_embeddings() if writes_tokens(model) else None
    linear = [each for each in model.modules() if isinstance(each, nn.Linear | Conv1D) and each is not head]
    found = [*(each.weight for each in linear), *(weight for _, _, weight in stacks_in(model))]
    weights = [each for each in found if each.is_floating_point() and not each.requires_grad]
    return int(sum(each.nbytes - _NF4 * each.numel() for each in weights))


# --- of a Trainer ---


def plan_of(trainer: Any) -> Plan | None:
    """Return the plan of a Trainer's training by its arguments and rows; None if their shape or the model is unknown.

    A batch is planned as if all its rows were as long as the longest one.
    """
    try:
        return _planned(trainer) if isinstance(trainer.model, PreTrainedModel) else None
    except Exception:  # of a forward that needs other inputs, or of memory: no training ends by its estimate
        return None


def _planned(trainer: Any) -> Plan | None:
    model, arguments, dataset = trainer.model, trainer.args, trainer.train_dataset
    rows = arguments.per_device_train_batch_size * (2 if "DPO" in type(trainer).__name__ else 1)
    lengths, most = lengths_in(dataset), getattr(arguments, "max_length", None)
    shape: dict[str, Any] = {}
    if lengths:
        longest = max(lengths) if most is None else min(max(lengths), most)  # TRL cuts pairs as it makes a batch
        shape = {"tokens": longest, "logits": _scored(trainer, rows, longest)}
    elif (image := _image_in(dataset, model)) is not None:
        shape = {"image": image}
    else:
        return None
    kind, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(arguments, model)
    precision = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return plan(
        model,
        rows=rows,
        optimizer=trainer.optimizer or partial(kind, **settings),
        precision=precision,
        checkpointing=any(getattr(arguments, name, False) for name in CHECKPOINTING),
        **shape,
    )


def _image_in(dataset: Any, model: Any) -> tuple[int, int, int] | None:
    """Return the shape of the first row's image, or None. Random augmentation of it leaves all RNGs unchanged."""
    if model.main_input_name != "pixel_values" or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([]):
            row = dataset[0]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    pixels = row.get("pixel_values") if isinstance(row, Mapping) else None
    return tuple(pixels.shape) if isinstance(pixels, Tensor) and pixels.ndim == 3 else None  # type: ignore[return-value]


def _has_plain_head(model: Any) -> bool:
    """Whether `may_overwrite` the logits of the model's head."""
    head = model.get_output_embeddings()
    with torch.enable_grad():
        return may_overwrite(head(head.weight.new_zeros((1, head.weight.shape[-1]), requires_grad=True)))


def _scored(trainer: Any, rows: int, longest: int) -> int:
    """The positions of a batch at which a language model's loss keeps as many copies of the logits as others do."""
    positions, names = rows * longest, {*(getattr(trainer.train_dataset, "column_names", None) or ())}
    if is_scored(trainer) and "labels" in names:
        learned = (sum(label != _NOT_LEARNED for label in row) for row in trainer.train_dataset["labels"])
        is_plain = not trainer.args.bf16 and not trainer.args.fp16 and _has_plain_head(trainer.model)
        copies = _OF_PLAIN_HEAD if is_plain else _LEARNED_COPIES
        positions = rows * min(longest, max(learned)) * copies // _COPIES
    in_parts = is_scored(trainer) or forward_of_trl(trainer.model) is not None
    most = _LOGITS // (_COPIES * _FP32 * max(1, _vocabulary(trainer.model)))
    return min(positions, most) if in_parts else positions
