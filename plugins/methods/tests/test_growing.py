"""Growing ranks go where something is to be learned, as many as the budget says, and the same after a break."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.two_processes import spawn
from tunerkit.errors import StepError, TargetError
from tunerkit_methods.growth import growths_by, largest, looking, spread

STEPS = 120


class Beside(nn.Module):
    """Three layers that see different inputs, so that no one can do what another one should."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(each) for part, each in zip(self.parts, x.unbind(1), strict=True)], dim=1)


def base() -> Beside:
    torch.manual_seed(0)
    return Beside()


def wrapped(target_rank: int = 3) -> tuple[Any, torch.optim.Optimizer]:
    model = tunerkit.wrap(base(), "growing", {"targets": "re:parts.*", "target_rank": target_rank}, seed=0)
    optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-2))
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    return model, optimizer


def planted() -> Beside:
    """The base with changes of ranks 0, 5 and 2, whose singular values are all 1."""
    model, generator = base(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for at, rank in ((1, 5), (2, 2)):
            p, _ = torch.linalg.qr(torch.randn(24, rank, generator=generator))
            q, _ = torch.linalg.qr(torch.randn(16, rank, generator=generator))
            model.parts[at].get_parameter("weight").add_(p @ q.T)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> Iterator[int]:
    teacher = planted()
    for step in range(first, last + 1):
        x = torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(step))
        (model(x) - teacher(x)).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def test_ranks_go_where_a_low_rank_change_was_planted() -> None:
    """Of 9, the layers with planted ranks 5 and 2 get their own, and at most one more; the third stays at 1 or 2."""
    model, optimizer = wrapped()
    list(train(model, optimizer, 1, STEPS))
    nothing, five, two = tunerkit.tuner(model).ranks().values()
    assert nothing <= 2
    assert five >= 5
    assert two >= 2
    assert nothing + five + two == 9


def test_the_budget_is_exact_after_each_step() -> None:
    """The ranks sum to what the schedule says at each step; it grows from 1 at each target to ``target_rank``."""
    model, optimizer = wrapped(target_rank=8)
    tuner = tunerkit.tuner(model)
    seen = []
    for step in train(model, optimizer, 1, STEPS):
        seen.append(sum(tuner.ranks().values()))
        assert seen[-1] == tuner.budget() == tuner.budget(step)
    assert seen == sorted(seen)
    assert (seen[0], seen[STEPS // 2 - 1], seen[-1]) == (3, 24, 24)


def test_a_resumed_training_grows_as_one_without_a_break(tmp_path: Path) -> None:
    """Saved between two growths, it ends with the same bits."""
    whole, optimizer = wrapped()
    list(train(whole, optimizer, 1, STEPS))
    first, optimizer = wrapped()
    list(train(first, optimizer, 1, 30))
    assert 3 < tunerkit.tuner(first).budget() < 9
    path, state = tunerkit.save(first, tmp_path), tunerkit.save_state(first, tmp_path / "state.safetensors")
    saved = optimizer.state_dict()
    again = tunerkit.load(base(), path, trainable=True)
    optimizer = torch.optim.AdamW(tunerkit.param_groups(again, lr=1e-2))
    tunerkit.attach(again, optimizer, total_steps=STEPS)
    tunerkit.load_state(again, state)
    optimizer.load_state_dict(saved)
    list(train(again, optimizer, 31, STEPS))
    for one, other in zip(tunerkit.tuner(whole).parameters(), tunerkit.tuner(again).parameters(), strict=True):
        assert torch.equal(one, other)


def test_refuses_what_it_cannot_do() -> None:
    """A rank above the matrix, a training of unknown length, an optimizer whose state cannot grow: one line each."""
    with pytest.raises(TargetError, match="target_rank is 17, and at most 16 fits"):
        wrapped(target_rank=17)
    model = tunerkit.wrap(base(), "growing", {"targets": "re:parts.*"})
    with pytest.raises(StepError, match="total_steps"):
        tunerkit.attach(model, torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-2)))
    with pytest.raises(StepError, match="Adafactor"):
        tunerkit.attach(model, torch.optim.Adafactor(tunerkit.param_groups(model, lr=1e-2)), total_steps=9)


def test_without_a_setting_the_budget_fits_small_layers() -> None:
    """Where rank 8 does not fit everywhere, the sum is what fits."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 2)), "growing", {"targets": "re:0|1"})
    optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-2))
    tunerkit.attach(model, optimizer, total_steps=20)
    for _ in range(20):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    assert tunerkit.tuner(model).ranks() == {"0": 12, "1": 2}


def test_looks_where_the_rows_of_a_cannot_follow() -> None:
    """After some looks at one gradient, the rows are its singular vectors off those of A, and the scores its values."""
    generator = torch.Generator().manual_seed(0)
    gradient, a = (torch.randn(size, 12, generator=generator) for size in (9, 2))
    left, right = torch.randn(9, 4, generator=generator), torch.randn(4, 12, generator=generator)
    for _ in range(400):
        p, q = torch.linalg.qr(left).Q, torch.linalg.qr(right.T).Q.T
        left, right, scores = largest(a, gradient @ q.T, p.T @ gradient)
    off = gradient - gradient @ torch.linalg.pinv(a) @ a
    assert (right @ a.T).abs().max() < 1e-5
    _, true, rows = torch.linalg.svd(off, full_matrices=False)
    assert ((right[:2] * rows[:2]).sum(1).abs() > 0.999).all()
    torch.testing.assert_close(scores[:2], true[:2], rtol=0.05, atol=0.0)


def test_what_looks_adds_nothing_and_has_gradients() -> None:
    """Whatever its values are. The gradients are those of the directions of length 1."""
    generator = torch.Generator().manual_seed(0)
    a, b, left, right = (torch.randn(*size, generator=generator) for size in ((2, 6), (5, 2), (5, 3), (3, 6)))
    left.requires_grad_(), right.requires_grad_()
    q, p = looking(a, b, left, right)
    torch.testing.assert_close(p @ q, b @ a)
    gradient = torch.randn(5, 6, generator=generator)
    (p @ q * gradient).sum().backward()
    torch.testing.assert_close(left.grad, gradient @ nn.functional.normalize(right.detach()).T)
    torch.testing.assert_close(right.grad, nn.functional.normalize(left.detach(), dim=0).T @ gradient)


def test_triplets_go_to_the_largest_scores_where_there_is_room() -> None:
    """In comparison with giving one after the other."""
    scores, rooms = [[5.0, 1.0], [4.0, 3.0], [2.0, 0.5]], [3, 1, 9]
    for due in range(14):
        left, counts = [list(each) for each in scores], [0, 0, 0]
        for _ in range(due):
            free = [at for at in range(3) if counts[at] < rooms[at]]
            best = max(free, key=lambda at: (left[at][0] if left[at] else 0.0, -counts[at], -at))
            counts[best] += 1
            left[best] = left[best][1:]
        found = spread(scores, rooms, due)
        assert [found[at] for at in range(3)] == counts


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1001])
def test_all_growths_are_over_at_the_end(total: int) -> None:
    """However short a training is; they never go back."""
    counts = [growths_by(step, total, 10, 0.5) for step in range(total + 1)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (-1, 10)


@pytest.mark.skipif(os.environ.get("TUNERKIT_LONG") != "1", reason="starts two processes")
def test_under_ddp_all_processes_grow_alike(tmp_path: Path) -> None:
    """Two processes with half of each batch have the same bits, and the ranks of one process with all of it."""
    pytest.importorskip("tunerkit_distributed")
    from plugins.methods.tests.growing_runs import run

    spawn(run, (str(tmp_path),))
    (ranks, one), (others, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    model, optimizer = wrapped()
    list(train(model, optimizer, 1, STEPS))
    assert ranks == others == tunerkit.tuner(model).ranks()
    for mine, its in zip(one, other, strict=True):
        assert torch.equal(mine, its)
