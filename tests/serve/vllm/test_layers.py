"""Cores of many slots in one product, and plain LoRA beside them: every token as if it were alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from modicum.serve.vllm.layers import Cores, Step, add_plain

SLOTS, INNER, WIDTHS, RANK = 5, 12, (8, 6, 3), 4


def made(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # the narrowest slice has fewer directions than the others
    ranks = [min(RANK, width) for width in WIDTHS]
    a, u = [random(k, INNER) for k in ranks], [random(w, k) for w, k in zip(WIDTHS, ranks, strict=True)]
    cores = Cores(a, u, SLOTS, torch.empty(0))
    held = {}
    for slot, rank in {0: 4, 2: 2, 4: 3}.items():
        held[slot] = [random(min(rank, k), min(rank, k)) for k in ranks]
    held[2][1] = None
    for slot, parts in held.items():
        cores.set(slot, parts)
    return cores, a, u, held, random


def alone(x, a, u, parts):
    found = []
    for inward, outward, core in zip(a, u, parts, strict=True):
        if core is None:
            found.append(x.new_zeros(outward.shape[0]))
            continue
        k = core.shape[0]
        found.append(outward[:, :k] @ (core @ (inward[:k] @ x)))
    return torch.cat(found)


@pytest.mark.parametrize(
    "slots", [[0, 2, -1, 4, 2, 1], [0] * 30 + [-1] * 30 + [2] * 30, [-1] * 4], ids=["each", "runs", "base"]
)
def test_every_token_gets_the_core_of_its_slot(slots):
    cores, a, u, held, random = made()
    x, base = random(len(slots), INNER), random(len(slots), sum(WIDTHS))
    step = Step.of(torch.tensor(slots), set(held))
    assert (step.runs is None) == (len(slots) < 30)
    output = base.clone()
    cores.add(x, output, step)
    for row, slot in enumerate(slots):
        update = alone(x[row], a, u, held[slot]) if slot in held else 0
        torch.testing.assert_close(output[row], base[row] + update)


def test_a_slot_that_is_written_anew_is_read_anew():
    cores, a, u, held, random = made()
    x, step = random(2, INNER), Step.of(torch.tensor([0, 2]), set(held))
    cores.add(x, torch.zeros(2, sum(WIDTHS)), step)
    cores.set(0, held[4])
    output = torch.zeros(2, sum(WIDTHS))
    cores.add(x, output, step)
    torch.testing.assert_close(output[0], alone(x[0], a, u, held[4]))
    cores.clear(0)
    output.zero_()
    cores.add(x, output, step)
    assert not output[0].any()
    assert output[1].any()


def test_smaller_cores_leave_nothing_of_larger_ones():
    cores, a, u, held, random = made()
    x = random(1, INNER)
    cores.set(0, held[2])
    output = torch.zeros(1, sum(WIDTHS))
    cores.add(x, output, Step.of(torch.tensor([0]), set(held)))
    torch.testing.assert_close(output[0], alone(x[0], a, u, held[2]))


def test_plain_loras_reach_their_own_tokens_alone():
    *_, random = made()
    layer = SimpleNamespace(
        lora_a_stacked=tuple(random(SLOTS, 1, RANK, INNER) for _ in WIDTHS),
        lora_b_stacked=tuple(random(SLOTS, 1, width, RANK) for width in WIDTHS),
        output_slices=WIDTHS,
    )
    slots = [1, 1, -1, 0, 3]
    step = Step.of(torch.tensor(slots), {0})
    x, output = random(5, INNER), torch.zeros(5, sum(WIDTHS))
    add_plain(layer, x, output, step)
    for row, slot in enumerate(slots):
        pairs = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
        wanted = torch.cat([b[slot, 0] @ (a[slot, 0] @ x[row]) for a, b in pairs])
        torch.testing.assert_close(output[row], wanted if slot in {1, 3} else torch.zeros_like(wanted))
