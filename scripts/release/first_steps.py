"""The tutorial in small form, run where only wheels are: wrap, attach, train, generate, save, load, merge."""

import copy
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tunerkit
from tunerkit_adalora import AdaLoraConfig

STEPS = 20


def main() -> None:
    """Train a tiny language model, and compare what is saved, loaded and merged."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).eval()
    batch = torch.arange(16).repeat(4, 1)

    model = tunerkit.wrap(copy.deepcopy(base), "adalora", AdaLoraConfig(target_rank=2, init_rank=4))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {STEPS} steps")
    tuner = tunerkit.tuner(model)
    print(f"ranks: {sum(tuner.ranks().values())} of a budget of {tuner.budget()}")
    written = model.generate(batch[:1, :4], max_new_tokens=4, do_sample=False)

    path = tunerkit.save(model, "out")
    loaded = tunerkit.load(copy.deepcopy(base), "out")
    trained = model(batch).logits
    checks = {
        "the loss fell": losses[-1] < 0.9 * losses[0],
        "the budget is spent": sum(tuner.ranks().values()) == tuner.budget(),
        "tokens were generated": written.shape == (1, 8),
        "the loaded model computes the same": torch.equal(loaded(batch).logits, trained),
        "verbs of other distributions are found": all(map(callable, (tunerkit.calibrate, tunerkit.method))),
        "the package lies outside the working folder": not Path(tunerkit.__file__).is_relative_to(Path.cwd()),
    }
    tunerkit.merge(loaded)
    error = (loaded(batch).logits - trained).abs().max() / trained.abs().max()
    checks["the merged model computes the same"] = bool(error <= 1e-5)
    print(f"saved: {Path(path).name}, {Path(path).stat().st_size} bytes")
    failed = [name for name, holds in checks.items() if not holds]
    print("\n".join(f"{'FAILED' if name in failed else 'ok'}: {name}" for name in checks))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
