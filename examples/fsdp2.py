"""FSDP2 that shards the base and leaves the adapters whole: ``torchrun --nproc-per-node 2 examples/fsdp2.py``."""

import os

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import tunerkit

STEPS, BATCH = 30, 8  # of each process

distributed.init_process_group()
if cuda := torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = "cuda" if cuda else "cpu"

torch.manual_seed(0)  # the base is the same in all processes
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
with torch.device(device):
    model = LlamaForCausalLM(config)

tunerkit.wrap(model, "adalora", {"target_rank": 2, "targets": ["q_proj", "v_proj"]}, seed=0)
adapters = set(tunerkit.tuner(model).parameters())
for layer in model.model.layers:
    fully_shard(layer, ignored_params=adapters)
fully_shard(model, ignored_params=adapters)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
tunerkit.attach(model, optimizer, total_steps=STEPS, data_parallel=True)  # after sharding

generator = torch.Generator().manual_seed(distributed.get_rank())  # each process has data of its own
for _ in range(STEPS):
    ids = (torch.randint(64, (BATCH, 1), generator=generator) + torch.arange(12)).remainder(64).to(device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

path = tunerkit.save(model, "out/fsdp2")  # in all processes: one writes, and all return
if distributed.get_rank() == 0:
    print(f"{distributed.get_world_size()} processes, loss {loss:.3f}, written to {path}")
distributed.destroy_process_group()
