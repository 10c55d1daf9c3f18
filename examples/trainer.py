"""A Trainer under DDP: ``torchrun --nproc-per-node 2 examples/trainer.py``, or with ``accelerate launch``."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tunerkit

torch.manual_seed(0)  # the base is the same in all processes
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
rows = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(12) + torch.arange(64)[:, None]).remainder(64)]

tunerkit.wrap(model, "adalora", {"target_rank": 2, "targets": ["q_proj", "v_proj"]}, seed=0)
arguments = TrainingArguments(
    "out/trainer",
    max_steps=30,
    per_device_train_batch_size=8,
    learning_rate=2e-2,
    use_cpu=not torch.cuda.is_available(),  # without it, processes on CPUs would not know of each other
    save_steps=10,
    logging_steps=10,
    report_to="none",
)
trainer = Trainer(model, arguments, train_dataset=rows)
tunerkit.attach(model, trainer)
trainer.train()  # each checkpoint holds the adapter, written by process 0
path = tunerkit.save(model, "out/trainer")  # in all processes: one writes, and all return
if trainer.is_world_process_zero():
    print(
        f"{arguments.world_size} processes, loss {trainer.state.log_history[-1]['train_loss']:.3f}, written to {path}"
    )
