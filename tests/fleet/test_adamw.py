"""The stacked optimizer row by row against PyTorch's, and its schedule against Transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from modicum.fleet.adamw import Rows, StackedAdamW, clip_, rate_at


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_rows_step_as_if_each_had_an_optimizer_of_its_own(weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator)
    stack = start.clone()
    stacked = StackedAdamW(stack, weight_decay=weight_decay)
    single = [torch.nn.Parameter(row.clone()) for row in start]
    optimizers = [torch.optim.AdamW([p], lr=1.0, weight_decay=weight_decay) for p in single]
    # some rows more often than others, next to each other or not, in any order
    for turn, slots in enumerate([[0, 1, 2, 3, 4], [1, 2], [4, 0], [2], [3, 1], [0, 1, 2, 3, 4]]):
        gradient = torch.randn(len(slots), 7, generator=generator) * 10.0 ** (turn - 3)
        rates = [1e-2 * (slot + 1) for slot in slots]
        stacked.step(slots, gradient.clone(), rates)
        for slot, part, rate in zip(slots, gradient, rates, strict=True):
            single[slot].grad = part
            optimizers[slot].param_groups[0]["lr"] = rate
            optimizers[slot].step()
    for row, parameter in zip(stack, single, strict=True):
        torch.testing.assert_close(row, parameter.detach(), rtol=1e-6, atol=1e-7)
    assert stacked.steps.tolist() == [3, 4, 4, 3, 3]


def test_rows_next_to_each_other_are_not_copied():
    stack = torch.arange(12.0).view(4, 3)
    assert Rows([1, 2], stack.device).of(stack).data_ptr() == stack[1].data_ptr()
    apart = Rows([2, 0], stack.device)
    found = apart.of(stack)
    assert torch.equal(found, stack[[2, 0]])
    apart.put(stack, found * 0)
    assert stack.sum(1).tolist() == [0.0, 12.0, 0.0, 30.0]


@pytest.mark.parametrize("most", [0.0, 0.5, 100.0])
def test_each_row_is_clipped_by_its_own_norm(most):
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[0.01], [1], [5], [0]]
    )
    wanted, norms = [], []
    for row in gradient:
        parameter = torch.nn.Parameter(torch.zeros(6))
        parameter.grad = row.clone()
        norms.append(torch.nn.utils.clip_grad_norm_([parameter], most or torch.inf))
        wanted.append(parameter.grad)
    found = clip_(gradient, most)
    torch.testing.assert_close(found, torch.stack(norms))
    torch.testing.assert_close(gradient, torch.stack(wanted))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.06), (7, 0.3), (20, 0.06), (20, 0.0)])
def test_schedules_are_those_of_transformers(name, steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = "constant_with_warmup" if name == "constant" else name
    rising = -int(-steps * warmup // 1)
    schedule = get_scheduler(theirs, optimizer, rising, steps)
    for step in range(steps):
        assert rate_at(step, steps, 0.5, name, warmup) == pytest.approx(schedule.get_last_lr()[0]), step
        optimizer.step()
        schedule.step()
