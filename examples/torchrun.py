"""Plain data parallel, with no wrapper around the model: ``torchrun --nproc-per-node 2 examples/torchrun.py``."""

import os

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import tunerkit

EPOCHS, BATCH = 5, 8  # of each process

distributed.init_process_group()
if cuda := torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = "cuda" if cuda else "cpu"

torch.manual_seed(0)  # the base and the data are the same in all processes
model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(device)
x = torch.randn(256, 16)
rows = TensorDataset(x, x[:, :4].argmax(1))
sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(rows, seed=0, drop_last=True)
loader = DataLoader(rows, BATCH, sampler=sampler, drop_last=True)  # as many batches in each process

tunerkit.wrap(model, "adalora", {"target_rank": 2, "targets": ["0", "2"]}, seed=0)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
tunerkit.attach(model, optimizer, total_steps=EPOCHS * len(loader), data_parallel=True)
for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    for inputs, classes in loader:
        loss = nn.functional.cross_entropy(model(inputs.to(device)), classes.to(device))
        loss.backward()  # at its end tunerkit averages the gradients of the adapters
        optimizer.step()
        optimizer.zero_grad()

path = tunerkit.save(model, "out/torchrun")  # in all processes: one writes, and all return
if distributed.get_rank() == 0:
    print(f"{distributed.get_world_size()} processes, loss {loss:.3f}, written to {path}")
distributed.destroy_process_group()
