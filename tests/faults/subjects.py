"""What is attacked: tunerkit with every installed method, and peft, behind the same few operations."""

import abc
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tunerkit
from tunerkit_testing import small
from tunerkit_testing.toy_methods import LowRankPlugin, ShiftPlugin

TARGETS = ("0", "2")
# A message names what was received; a file of 10 MB must not give a message of 10 MB.
LONGEST_MESSAGE = 10_000


class Subject(abc.ABC):
    """Abstract. The operations that both have.

    Attributes:
        name: The heading of its column.
        kinds: The kinds of adapter, which share the cases of a row.
        strict: Whether errors must be of one class and leave the base model as it was.
        file: The file with the tensors.
    """

    name: str
    kinds: tuple[str, ...]
    strict: bool
    file: str

    @abc.abstractmethod
    def trained(self, kind: str, seed: int = 0, *, base: nn.Module | None = None, rank: int = 2) -> nn.Module:
        """Return a wrapped base whose adapter has random values."""

    @abc.abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter."""

    @abc.abstractmethod
    def load(self, folder: Path, *, base: nn.Module | None = None) -> nn.Module:
        """Load an adapter into a base."""

    @abc.abstractmethod
    def merge(self, model: nn.Module) -> None:
        """Merge the adapter, with all checks that there are."""

    @abc.abstractmethod
    def unmerge(self, model: nn.Module) -> None:
        """Undo a merge."""

    @abc.abstractmethod
    def base_weights(self, model: nn.Module) -> list[torch.Tensor]:
        """Return the parameters of the base model."""

    @abc.abstractmethod
    def wrong_error(self, error: Exception) -> str:
        """Return an empty text if an error is a proper refusal, else what is wrong with it."""


def net() -> nn.Module:
    """Return the base model, the same at each call: (N, 6) to (N, 3)."""
    return small.net().eval()


def output(model: nn.Module) -> torch.Tensor:
    """Return the model's output for a fixed batch."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(small.X.to(next(model.parameters()).dtype))
    return found


class Tunerkit(Subject):
    """tunerkit with the toy methods and every installed one."""

    name = "tunerkit"
    strict = True
    file = "adapter.safetensors"

    def __init__(self) -> None:
        for name, plugin in (("toy-low-rank", LowRankPlugin()), ("toy-shift", ShiftPlugin())):
            if name not in tunerkit.methods():
                tunerkit.register(plugin)
        installed = tunerkit.methods()
        self.kinds = ("toy-low-rank", "toy-shift", *(name for name in ("lora", "adalora") if name in installed))

    def config(self, kind: str, rank: int = 2) -> dict[str, Any]:
        """Return a config of a method for `net`."""
        shared: dict[str, Any] = {"targets": list(TARGETS)}
        if kind == "adalora":
            schedule = {"t_init": 2, "t_final": 4, "delta_t": 2}
            # Over half of the triplets go, so that λ is not trained: a file with λ outside its mask is a contradiction.
            return {**shared, "target_rank": rank, "init_rank": 2 * rank + 1, **schedule}
        return shared if kind in ("toy-shift", "toy-stepper") else {**shared, "rank": rank}

    def trained(self, kind: str, seed: int = 0, *, base: nn.Module | None = None, rank: int = 2) -> nn.Module:
        model = tunerkit.wrap(base if base is not None else net(), kind, self.config(kind, rank), seed=seed)
        if kind in ("adalora", "toy-stepper"):
            optimizer = torch.optim.SGD(small.trainable(model), lr=0.5)
            tunerkit.attach(model, optimizer, total_steps=12)
            small.train(model.train(), optimizer, 12)
        return fill_(model, ".tunerkit.", seed).eval()

    def save(self, model: nn.Module, folder: Path) -> None:
        tunerkit.save(model, folder)

    def load(self, folder: Path, *, base: nn.Module | None = None) -> nn.Module:
        return tunerkit.load(base if base is not None else net(), folder)

    def merge(self, model: nn.Module) -> None:
        tunerkit.merge(model)

    def unmerge(self, model: nn.Module) -> None:
        tunerkit.unmerge(model)

    def base_weights(self, model: nn.Module) -> list[torch.Tensor]:
        return [p for name, p in model.named_parameters() if ".tunerkit." not in name]

    def wrong_error(self, error: Exception) -> str:
        if not isinstance(error, tunerkit.TunerkitError):
            return f"{type(error).__name__}, which is no TunerkitError: {str(error)[:200]!r}"
        if len(str(error)) > LONGEST_MESSAGE:
            return f"a message of {len(str(error))} characters"
        return "" if str(error).strip() else "an error without a message"


class Peft(Subject):
    """peft's LoRA. It has no class of errors of its own, so every exception counts as a refusal."""

    name = "peft"
    kinds = ("lora",)
    strict = False
    file = "adapter_model.safetensors"

    def trained(self, kind: str, seed: int = 0, *, base: nn.Module | None = None, rank: int = 2) -> nn.Module:
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
        model = peft.get_peft_model(base if base is not None else net(), config)
        return fill_(model, "lora_", seed).eval()

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(str(folder))

    def load(self, folder: Path, *, base: nn.Module | None = None) -> nn.Module:
        import peft

        loaded: nn.Module = peft.PeftModel.from_pretrained(base if base is not None else net(), str(folder))
        return loaded

    def merge(self, model: Any) -> None:
        model.merge_adapter(safe_merge=True)

    def unmerge(self, model: Any) -> None:
        model.unmerge_adapter()

    def base_weights(self, model: nn.Module) -> list[torch.Tensor]:
        return [p for name, p in model.named_parameters() if "lora_" not in name]

    def wrong_error(self, error: Exception) -> str:
        return "it needs more than 300 MB" if isinstance(error, MemoryError) else ""


def subject(name: str) -> Subject:
    """Return a new subject by the heading of its column."""
    return Peft() if name == Peft.name else Tunerkit()


def fill_(model: nn.Module, part: str, seed: int) -> nn.Module:
    """Give the trained weights random values, where they are not exactly 0: a pruned triplet stays pruned."""
    generator = torch.Generator().manual_seed(random.Random(seed).randrange(2**31))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name and parameter.is_floating_point():
                noise = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise * (parameter != 0) if name.endswith(".lam") else noise)
    return model
