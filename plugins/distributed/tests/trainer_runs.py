"""A Trainer and an accelerate loop under DDP and FSDP2, in processes that import this by name, and in one process.

accelerate turns FSDP on only for accelerators, so its distributed type is forced here; all else is as on GPUs.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch
from torch import distributed, nn
from torch.distributed import fsdp
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tunerkit
from tests.support import together, two_processes
from tunerkit_distributed.accelerate import checkpoint_adapters_

STEPS, STOP, ROWS = 8, 3, 4  # rows of a micro-batch, of all processes together
SHRUNK = 6  # after the last allocation, when dead triplets have left memory
LONG = os.environ.get("TUNERKIT_LONG") == "1"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 3}),
    "adalora 8 -> 2": ("adalora", {"init_rank": 8, "target_rank": 2, "delta_t": 2}),
    "adalora 6 -> 4": ("adalora", {"init_rank": 6, "target_rank": 4, "delta_t": 2, "exact_svd": False}),
}

UNDER_DDP = [*METHODS] if LONG else ["adalora 8 -> 2"]  # it leaves some layers without a triplet
STOPS = (SHRUNK, STOP) if LONG else (SHRUNK,)


class Tokens(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(0, 32, (64, 7), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double()


def build(method: str, **more: Any) -> Any:
    """An adapted model in float64: Adam scales what one order of sums rounds otherwise than another."""
    name, settings = METHODS[method]
    return tunerkit.wrap(base(), name, {"adapter_dtype": "float64", **settings, **more}, seed=3)


def trainer_of(model: nn.Module, folder: Path, processes: int, **options: Any) -> Trainer:
    return Trainer(model, arguments_of(folder, processes, **options), train_dataset=Tokens())


def arguments_of(folder: Path, processes: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS // processes,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.5,
            "learning_rate": 1e-2,
            "adam_epsilon": 1e-6,
            "warmup_steps": 1,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 5,
            **options,
        },
    )


@contextlib.contextmanager
def forced(rank: int) -> Iterator[None]:
    """Make accelerate run FSDP on CPUs, in a process of a group."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    plain = accelerate.Accelerator.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if fsdp_plugin is not None:
            # Each new AcceleratorState copies what the PartialState says.
            accelerate.PartialState().distributed_type = accelerate.DistributedType.FSDP
            self.state.distributed_type = accelerate.DistributedType.FSDP
            self.state.fsdp_plugin = fsdp_plugin

    accelerate.Accelerator.__init__ = init  # type: ignore[method-assign]
    yield
    accelerate.Accelerator.__init__ = plain  # type: ignore[method-assign]


FSDP2 = {"version": 2}


def results(model: Any) -> dict[str, Any]:
    tuner = tunerkit.tuner(model)
    masks = [getattr(adapter, "mask", None) for adapter in tuner.adapters().values()]
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in tuner.named_parameters()},
        "masks": [mask for mask in masks if mask is not None],
        "history": [(change.step, change.budget, change.ranks) for change in tuner.history],
        "sharded": sum(hasattr(parameter, "to_local") for parameter in model.parameters()),
    }


def train(model: Any, folder: Path, processes: int, resume: bool = False, **options: Any) -> dict[str, Any]:
    trainer = trainer_of(model, folder, processes, **options)
    tunerkit.attach(model, trainer)
    trainer.train(resume_from_checkpoint=True if resume else None)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    trainer.save_model(str(folder / "end"))
    return {**results(trainer.model), "losses": logged}


def train_under_fsdp2(rank: int, folder: str) -> dict[Any, Any]:
    """Train, as one of two processes, with a Trainer under FSDP2, and resume in the middle."""
    found: dict[Any, Any] = {}
    for number, method in enumerate(METHODS):
        run = Path(folder) / f"run{number}"
        found[method] = train(build(method), run, 2, fsdp=True, fsdp_config=dict(FSDP2))
        found[method]["files"] = sorted(path.name for path in (run / "checkpoint-3").iterdir())
        distributed.barrier()
        if rank == 0:
            for name in ("checkpoint-8", "checkpoint-6"):
                shutil.rmtree(run / name)
        distributed.barrier()
        found[method]["resumed"] = train(build(method), run, 2, resume=True, fsdp=True, fsdp_config=dict(FSDP2))
    found["refused"] = refusals(Path(folder) / "refused")
    return found


def train_under_ddp(rank: int, folder: str) -> dict[Any, Any]:
    """Train, as one of two processes, with a Trainer under DDP, and resume after pruning and before it."""
    found: dict[Any, Any] = {}
    for number, method in enumerate(UNDER_DDP):
        run = Path(folder) / f"run{number}"
        found[method] = train(build(method), run, 2)
        for stop in STOPS:
            distributed.barrier()
            if rank == 0:
                for name in ("checkpoint-8", *(["checkpoint-6"] if stop < SHRUNK else [])):
                    shutil.rmtree(run / name)
            distributed.barrier()
            found[method, stop] = train(build(method), run, 2, resume=True)
    return found


def loop_under_ddp(rank: int, folder: str) -> dict[Any, Any]:
    """Run, as one of two processes, an accelerate loop under DDP, and resume after pruning and before it.

    With accelerate's own checkpoints, and with those of adapters alone.
    """
    found: dict[Any, Any] = {}
    for method in UNDER_DDP:
        for alone in (True, False):
            accelerator, model, optimizer = prepared_for_ddp(method, alone)
            done = 0
            for stop in sorted(STOPS):
                loop(model, optimizer, range(done, stop), accelerator, rank, 2)
                accelerator.save_state(f"{folder}/{method}{alone}{stop}")
                done = stop
            loop(model, optimizer, range(done, STEPS), accelerator, rank, 2)
            found[method, alone] = results(model)
            for stop in STOPS:
                accelerator, model, optimizer = prepared_for_ddp(method, alone)
                accelerator.load_state(f"{folder}/{method}{alone}{stop}")
                loop(model, optimizer, range(stop, STEPS), accelerator, rank, 2)
                found[method, alone, stop] = results(model)
    return found


def prepared_for_ddp(method: str, alone: bool) -> tuple[Any, Any, Any]:
    """An Accelerator, a model that it has put into DDP, and its optimizer, attached."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    model, optimizer = accelerator.prepare(*with_adam(build(method)))
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    if alone:
        checkpoint_adapters_(accelerator)
    return accelerator, model, optimizer


def refusals(folder: Path) -> dict[str, str]:
    """What attach says to a Trainer under FSDP1, and to settings that cannot go together."""

    def answer(**settings: Any) -> str:
        model = build("lora")
        trainer: Any = trainer_of(model, folder, 2, fsdp=True, fsdp_config=dict(FSDP2))
        for name, value in settings.items():  # FSDP1 does not start on a CPU
            setattr(trainer.accelerator.state.fsdp_plugin, name, value)
        try:
            tunerkit.attach(model, trainer)
            model.lm_head.weight.requires_grad_(True)
            trainer.train()
        except tunerkit.errors.StepError as error:
            return str(error)
        return ""

    return {
        "fsdp1": answer(fsdp_version=1),
        "ram": answer(cpu_ram_efficient_loading=True),
        "base": answer(),
    }


def prepared(method: str, ignored: str | None, kind: str) -> tuple[Any, Any, Any]:
    """An Accelerator under FSDP2, a model and an optimizer that it has prepared, attached."""
    accelerate.state.AcceleratorState._reset_state(True)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        ignored_modules=ignored,
        state_dict_type=kind,
        cpu_ram_efficient_loading=False,
    )
    accelerator = accelerate.Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2, cpu=True)
    model, optimizer = accelerator.prepare(*with_adam(build(method)))
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    checkpoint_adapters_(accelerator)
    return accelerator, model, optimizer


def with_adam(model: Any) -> tuple[Any, torch.optim.Optimizer]:
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)


def loop(model: Any, optimizer: Any, steps: range, accelerator: Any = None, rank: int = 0, of: int = 1) -> None:
    """An accelerate loop, or the same without accelerate."""
    ids = Tokens().ids
    for step in steps:
        for part in range(2):
            start = (step * 2 + part) * ROWS % len(ids)
            rows = ids[start : start + ROWS][rank::of]
            if accelerator is None:
                (model(input_ids=rows, labels=rows).loss / 2).backward()
            else:
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=rows, labels=rows).loss)
                    if accelerator.sync_gradients:
                        together.clip_(model, 0.5, accelerator.clip_grad_norm_)
                    optimizer.step()
                    optimizer.zero_grad()
        if accelerator is None:
            together.clip_(model, 0.5)
            optimizer.step()
            optimizer.zero_grad()


def loop_alone(method: str, **settings: Any) -> dict[str, Any]:
    """The loop in one process."""
    model = build(method, **settings)
    _, optimizer = with_adam(model)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    loop(model, optimizer, range(STEPS))
    return results(model)


LOOPS = [(True, "FULL_STATE_DICT"), (False, "SHARDED_STATE_DICT")]  # whether adapters are left out of sharding


def loop_under_fsdp2(rank: int, folder: str) -> dict[Any, Any]:
    """Run, as one of two processes, an accelerate loop under FSDP2, and resume in the middle."""
    found: dict[Any, Any] = {}
    for method in METHODS:
        for ignored, kind in LOOPS:
            place = f"{folder}/checkpoint{len(found)}"
            accelerator, model, optimizer = prepared(method, r".*\.tunerkit" if ignored else None, kind)
            loop(model, optimizer, range(STOP), accelerator, rank, 2)
            accelerator.save_state(place)
            loop(model, optimizer, range(STOP, STEPS), accelerator, rank, 2)
            found[method, ignored] = seen(model)
            accelerator, model, optimizer = prepared(method, r".*\.tunerkit" if ignored else None, kind)
            accelerator.load_state(place)
            steps = tunerkit.tuner(model).steps
            loop(model, optimizer, range(STOP, STEPS), accelerator, rank, 2)
            resumed = {**seen(model), "steps": steps, "files": sorted(os.listdir(place))}
            found[method, ignored]["resumed"] = resumed
    return found


def seen(model: Any) -> dict[str, Any]:
    with tunerkit.tuner(model).whole():
        return results(model)


def merge_under_fsdp2(rank: int, folder: str) -> dict[Any, Any]:
    """Merge, as one of two processes, and unmerge after training, with adapters left out of sharding or not."""
    found: dict[Any, Any] = {}
    for method in METHODS:
        for ignored in (True, False):
            model = build(method, train_modules=["lm_head"])
            kept = set(tunerkit.tuner(model).parameters()) if ignored else None
            for part in (*model.model.layers, model):
                fsdp.fully_shard(part, ignored_params=kept)
            _, optimizer = with_adam(model)
            tunerkit.attach(model, optimizer, total_steps=STEPS)
            loop(model, optimizer, range(STEPS), None, rank, 2)
            found[method, ignored] = merging(model, f"{folder}/merged{len(found)}")
    return found


@torch.no_grad()
def merging(model: Any, path: str) -> dict[str, Any]:
    ids = Tokens().ids[:3]

    def output() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids).logits
        return logits.clone()

    def base_output() -> torch.Tensor:
        with tunerkit.disabled(model):
            return output()

    found: dict[str, Any] = {"adapted": output(), "base": base_output()}
    before = shards(model)
    tunerkit.merge(model)
    found |= {"merged": output(), "base while merged": base_output(), "merged again": output()}
    file = tunerkit.save(model, path)
    tunerkit.unmerge(model)
    found |= {"unmerged": output()}
    after = shards(model)
    found["shards restored"] = all(torch.equal(after[name], value) for name, value in before.items())
    tunerkit.merge(model, permanent=True)
    return {**found, "permanent": output(), "loaded": tunerkit.load(base(), file)(input_ids=ids).logits}


def shards(model: Any) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
    return {name: p.to_local().clone() for name, p in model.named_parameters() if hasattr(p, "to_local")}


def run_all(rank: int, folder: str) -> None:
    """Be one of two processes that do all of this; the results are written to ``{folder}/{rank}.pt``."""
    with forced(rank), two_processes.joined(rank, folder):
        # DDP first: FSDP's type stays in accelerate's state.
        parts = {"trainer, ddp": train_under_ddp, "loop, ddp": loop_under_ddp}
        parts |= {"trainer": train_under_fsdp2, "loop": loop_under_fsdp2, "merge": merge_under_fsdp2}
        found = {}
        for name, part in parts.items():
            place = Path(folder) / name
            place.mkdir(exist_ok=True)
            found[name] = part(rank, str(place))
        torch.save(found, f"{folder}/{rank}.pt")
