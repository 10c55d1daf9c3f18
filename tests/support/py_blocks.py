"""What surrounds the pages' blocks marked ``py`` when a test runs them: they need a library or a process group."""

from collections.abc import Mapping
from pathlib import Path

import attrs

# One process that torchrun might have started.
_ONE_OF_ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@attrs.frozen
class Setting:
    """How a block runs."""

    needs: tuple[str, ...] = ()  # modules without which it is skipped
    after_the_page: bool = False  # whether the page's ``python`` blocks above it run first
    before: str = ""  # lines that make what the block takes as given
    after: str = ""  # lines that check what it left
    environment: Mapping[str, str] = attrs.Factory(dict)
    processes: int = 1  # torchrun starts that many; 1 is started without it


# A small model, batches and an optimizer, as a page on several processes takes them as given.
_GIVEN = """
import os

import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tunerkit

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
texts = torch.randint(0, 64, (30, 2, 8))
loader = [{"input_ids": ids, "labels": ids} for ids in texts]
rows = [{"input_ids": ids, "labels": ids} for ids in texts.flatten(0, 1)]
"""
_GROUP = "torch.distributed.init_process_group('gloo')\n"
_WRAPPED = "model = tunerkit.wrap(model, 'adalora', {'target_rank': 8}, seed=0)\n"
_OPTIMIZER = "optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)\n"
_LEFT = "\ntorch.distributed.destroy_process_group()\n"  # else gloo may abort the end: pytorch/pytorch#179291
_TRAINED = "for batch in loader:\n    model(**batch).loss.backward()\n    optimizer.step()\n    optimizer.zero_grad()\n"
_ARGUMENTS = """
import functools

TrainingArguments = functools.partial(TrainingArguments, use_cpu=True, max_steps=10, save_steps=5, report_to=[])
"""
# accelerate runs FSDP on accelerators alone; and there is a checkpoint to resume from.
_FSDP_ON_CPU = """
import copy

import accelerate

plain = accelerate.Accelerator.__init__


def forced(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, **kwargs)
    if fsdp_plugin is not None:
        accelerate.PartialState().distributed_type = accelerate.DistributedType.FSDP
        self.state.distributed_type = accelerate.DistributedType.FSDP
        self.state.fsdp_plugin = fsdp_plugin


accelerate.Accelerator.__init__ = forced
again = tunerkit.wrap(copy.deepcopy(model), "adalora", seed=0)
first = Trainer(again, TrainingArguments("out", fsdp=True, fsdp_config={"version": 2}), train_dataset=rows)
tunerkit.attach(first.model, first)
first.train()
os.rename("out/checkpoint-10", "last")
"""
# A page's training is longer than a test's. A warning says that it has not ended.
_SHORT = "import warnings\nwarnings.filterwarnings('ignore', message='.*above the final.*')\n"
# What the page says of DeepSpeed.
_MASKED = "import warnings\nwarnings.filterwarnings('ignore', message='.*masked, until training ends.*')\n"
_SAVED = """
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

tunerkit.save(model, "kept")
tunerkit.save_state(model, "kept")
save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id="kept/optimizer")
"""
# TRL's default, bf16, is refused on a CPU.
_SFT_ON_CPU = """
import functools

from datasets import Dataset
from transformers import BitsAndBytesConfig, ByT5Tokenizer
from trl import SFTConfig, SFTTrainer

name = "tiny"
model.save_pretrained(name)
ByT5Tokenizer().save_pretrained(name)
settings = SFTConfig("sft", max_steps=20, bf16=False, report_to=[])
SFTTrainer = functools.partial(SFTTrainer, args=settings)
rows = Dataset.from_list([{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in texts.flatten(0, 1)])
"""
# Trained and merged by the command.
_MERGED = """
import json

from transformers import BertConfig, BertModel, ByT5Tokenizer
from typer.testing import CliRunner

from tunerkit_cli.app import build

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BertModel(BertConfig(vocab_size=384, **sizes)).save_pretrained("base")
ByT5Tokenizer().save_pretrained("base")
rows = [{"anchor": f"question {n}", "positive": f"answer {n}"} for n in range(10)]
open("pairs.jsonl", "w").write("\\n".join(map(json.dumps, rows)))
for line in ("train --model base --data pairs.jsonl --out out/pairs --epochs 1", "merge out/pairs --out merged"):
    done = CliRunner().invoke(build(), line.split())
    assert done.exit_code == 0, done.output
"""
# A server with vLLM's routes, for what is trained already.
_SERVED = f"""
import sys

sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from plugins.serving.tests.stub_vllm import perturb_, running

serving = running()
server = serving.__enter__()
url = server.url
model = tunerkit.wrap(model, "lora", {{"rank": 4}})
perturb_(model)
"""
_ENGINE = f"""\
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

import tunerkit
from plugins.serving.tests.stub_vllm import perturb_, running, save_base

folder = save_base(Path(tempfile.mkdtemp()))
serving = running()
server = serving.__enter__()
server.serve(AutoModelForCausalLM.from_pretrained(folder))
url = server.url
model = tunerkit.wrap(AutoModelForCausalLM.from_pretrained(folder), "lora", {{"rank": 4}})
perturb_(model)
rows = Dataset.from_dict({{"prompt": ["the film"] * 8}})
options = {{"max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4}}
args = GRPOConfig("out", beta=0.0, use_cpu=True, bf16=False, report_to="none", **options)


def score(completion_ids, **columns):
    return [float(sum(each)) for each in completion_ids]
"""
# vLLM of a small size in this process.
_IN_PROCESS = f"""
import functools
import sys
from pathlib import Path

import vllm

sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from plugins.serving.tests.planted import wrapped
from plugins.serving.tests.stub_vllm import save_base

model = wrapped(save_base(Path("BASE")))
sizes = {{"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_cpu_loras": 3}}
vllm.LLM = functools.partial(vllm.LLM, **sizes)
"""
_ZERO = '"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": true}'
_BATCH_OF_TWO, _ANY_BATCH = (f'{{"train_micro_batch_size_per_gpu": {size}, {_ZERO}' for size in ("2", '"auto"'))

# The setting of each block, by a line that no other block has: pages are renamed more often than examples.
SETTINGS = {
    'trainer = Trainer(model, TrainingArguments("runs", learning_rate=1e-3), train_dataset=rows)': Setting(
        needs=("tunerkit_peft",), before=_GIVEN, after="assert tunerkit.tuner(model).steps == trainer.state.global_step"
    ),
    'questions = model.encode_query(["How do I reset my password?"])': Setting(
        needs=("sentence_transformers", "datasets", "tunerkit_cli"),
        before=_MERGED,
        after="assert model.similarity(questions, answers).shape == (1, 2)",
    ),
    'engine = VllmInProcess(LLM("BASE", enable_lora=True, max_lora_rank=16, max_loras=3))': Setting(
        needs=("vllm", "tunerkit_peft"),
        before=_IN_PROCESS,
        after="assert engine.listed().adapters == {name}",
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a further process does not start from warm_python's
        },
    ),
    'packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")': Setting(
        needs=("bitsandbytes", "tunerkit_quant", "trl", "datasets", "tunerkit_gguf", "tunerkit_peft"),
        after_the_page=True,
        after="assert tunerkit.tuner(model).steps == 20",
    ),
    "tunerkit.attach(model, optimizer, total_steps=len(batches), data_parallel=True)  # then train as above": (
        Setting(
            needs=("tunerkit_distributed",),
            before=_GIVEN + "name, batches = f'tiny-{os.environ[\"RANK\"]}', loader\nmodel.save_pretrained(name)\n",
            after=_TRAINED + "assert tunerkit.tuner(model).steps == len(loader)" + _LEFT,
            processes=2,
        )
    ),
    "for batch in loader:  # each process has its own part of the data": Setting(
        needs=("tunerkit_distributed",),
        before=_GIVEN,
        after="assert tunerkit.tuner(model).steps == len(loader)",
        processes=2,
    ),
    "adapters = set(tunerkit.tuner(model).parameters())": Setting(
        needs=("tunerkit_distributed",),
        before=_GIVEN + _GROUP + _WRAPPED,
        after=_OPTIMIZER + "tunerkit.attach(model, optimizer, total_steps=len(loader))\n" + _TRAINED,
        environment=_ONE_OF_ONE,
    ),
    'arguments = TrainingArguments("out", fsdp=True, fsdp_config={"version": 2})': Setting(
        needs=("tunerkit_distributed",),
        before=_GIVEN + _GROUP + _ARGUMENTS + _FSDP_ON_CPU,
        after="assert trainer.state.global_step == 10",
        environment=_ONE_OF_ONE,
    ),
    "checkpoint_adapters_(accelerator)": Setting(
        needs=("tunerkit_distributed",),
        before=_GIVEN
        + "from accelerate import Accelerator\naccelerator = Accelerator(cpu=True)\n"
        + _WRAPPED
        + _OPTIMIZER,
        after="assert not any(name.startswith('model') for name in os.listdir('checkpoint'))",
    ),
    "engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)": Setting(
        needs=("tunerkit_distributed", "deepspeed"),
        before=_GIVEN
        + _SHORT
        + f"import json\nimport deepspeed\nconfig = json.loads({_BATCH_OF_TWO!r})\n"
        + "optimizer = None\nmake = deepspeed.initialize\n"
        + "deepspeed.initialize = lambda model, optimizer, config: make(\n"
        + "    model=model, config=config,\n"
        + "    optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))\n",
        after="assert os.path.exists('out/adapter.safetensors')",
        environment={**_ONE_OF_ONE, "DS_ACCELERATOR": "cpu"},
    ),
    'arguments = TrainingArguments("out", deepspeed="zero3.json")  # before from_pretrained': Setting(
        needs=("tunerkit_distributed", "deepspeed"),
        before=_GIVEN
        + _MASKED
        + _GROUP
        + _ARGUMENTS
        + "from accelerate import PartialState\nPartialState(backend='gloo')\n"
        + "model.save_pretrained('...')\n"
        + f"open('zero3.json', 'w').write({_ANY_BATCH!r})\n",
        environment={**_ONE_OF_ONE, "DS_ACCELERATOR": "cpu"},
    ),
    'save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id="kept/optimizer")': Setting(
        needs=("tunerkit_distributed",),
        before=_GIVEN + _WRAPPED + _OPTIMIZER + "tunerkit.attach(model, optimizer, total_steps=30)\n" + _TRAINED,
        after="assert os.path.exists('kept/optimizer')",
    ),
    'set_optimizer_state_dict(model, optimizer, state["optimizer"])': Setting(
        needs=("tunerkit_distributed",),
        before=_GIVEN
        + _SHORT
        + "import copy\nbase = copy.deepcopy(model)\n"
        + _WRAPPED
        + _OPTIMIZER
        + "tunerkit.attach(model, optimizer, total_steps=1000)\n"
        + _TRAINED
        + _SAVED,
        after="assert tunerkit.tuner(model).steps == len(loader)",
    ),
    "name = versions.publish()  # at any step; the requests' model": Setting(
        needs=("tunerkit_serving", "tunerkit_peft"),
        before=_GIVEN + _SERVED,
        after="assert set(server.adapters) == {name}\nserving.__exit__(None, None, None)",
    ),
    'answers = rollout(model, url, patience=600)  # such as "http://localhost:8000"': Setting(
        needs=("trl", "tunerkit_serving", "tunerkit_peft"),
        before=_ENGINE,
        after="assert len(server.adapters) == 1\nserving.__exit__(None, None, None)",
    ),
    "trainer = SFTTrainer(model, train_dataset=rows)": Setting(
        needs=("bitsandbytes", "tunerkit_quant", "trl", "datasets"),
        before=_GIVEN + _SFT_ON_CPU,
        after="assert tunerkit.tuner(model).steps == 20",
    ),
}


def settings_of(block: str) -> list[Setting]:
    """The settings whose line a block has; there should be one."""
    return [setting for line, setting in SETTINGS.items() if line in block.splitlines()]
