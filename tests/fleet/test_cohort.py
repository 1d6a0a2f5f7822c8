"""A cohort does to every adapter what training it alone with PEFT and PyTorch's AdamW does, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tests import models_for_tests, small_checkpoints
from tests.fleet import fleets
from transformers import get_scheduler

from modicum.adapters import registry
from modicum.data.encoded import Collator, Encoded, EncodedRow
from modicum.data.sampling import EpochSampler
from modicum.evaluate.memory import Peak
from modicum.fleet.base import stacked
from modicum.fleet.cohort import Cohort
from modicum.fleet.passes import Pass
from modicum.fleet.training import Learner, Training
from modicum.models.loading import HEAD_NAMES
from modicum.store.state import AdapterState
from modicum.train.methods import make_config
from modicum.train.recipe import make_recipe
from modicum.train.run import load

TOKENS = 200


def alone(model, spec, data: Encoded, rank: int, steps: int) -> dict[str, torch.Tensor]:
    """The numbers of an adapter trained by hand: PEFT, AdamW, Transformers' schedule, the mean loss of each batch."""
    registry.register()
    options = {**spec.method.options, "r": rank}
    if spec.model.task == "seq_cls":
        options["exclude_modules"] = list(HEAD_NAMES)
    config = make_config(spec.method.name, options, "causal_lm", spec.train.seed)
    if spec.model.task == "seq_cls":
        config.task_type = None
    torch.manual_seed(spec.train.seed)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    options = spec.train
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=options.weight_decay)
    warmup = -int(-steps * options.warmup_ratio // 1)
    schedule = get_scheduler(options.scheduler, optimizer, warmup, steps)
    sampler, done = EpochSampler(len(data), options.seed), 0
    while done < steps:
        order = list(sampler)
        for at in range(0, len(order), options.batch_size):
            if done == steps:
                break
            batch = Collator(0)([data[row] for row in order[at : at + options.batch_size]])
            adapted(**batch).loss.backward()
            if options.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
        sampler.set_epoch(sampler.epoch + 1)
    return {name: value.detach() for name, value in AdapterState.of(adapted, "default").tensors.items()}


def assert_equal_to_alone(model, spec, learners, tokens: int = TOKENS, tolerance: float = 1e-4) -> None:
    training = Training(fleets.base_of(copy.deepcopy(model), spec), spec, learners, tokens)
    learnt = training.run()
    for slot, one in enumerate(learners):
        wanted = alone(model, spec, one.train, one.rank, learnt[slot].steps)
        record = training.cohort.base.record(one.rank, training.values[slot], "float32")
        found = dict(record.tensors())
        assert found.keys() == wanted.keys()
        moved = 0.0
        for name, value in found.items():
            scale = wanted[name].abs().max().item()
            error = (torch.from_numpy(value.copy()) - wanted[name]).abs().max().item()
            assert error <= tolerance * max(scale, 1e-2), (slot, name, error, scale)
            moved = max(moved, scale)
        assert moved > 5e-3


@pytest.mark.parametrize("method", fleets.METHODS)
@pytest.mark.parametrize("train", [{}, {"max_grad_norm": 0.5, "weight_decay": 0.1, "scheduler": "cosine"}])
def test_uneven_users_become_what_they_become_alone(method, train):
    assert_equal_to_alone(models_for_tests.llama(), fleets.spec(method, train=train), fleets.learners())


@pytest.mark.parametrize("method", fleets.METHODS)
def test_biases_and_transposed_weights(method):
    # GPT-2 reads A x from the input in some layers and from the output, less its bias, in others
    spec = fleets.spec(method, method={"fan_in_fan_out": True} if method == "lora" else {})
    assert_equal_to_alone(models_for_tests.gpt2(), spec, fleets.learners((5, 2)))


@pytest.mark.parametrize(
    "options",
    [{"core": "diagonal"}, {"use_sigma": False}, {"basis": "random"}, {"target_modules": ["q_proj"]}],
)
def test_variants_of_lora_xs(options):
    spec = fleets.spec(method=options)
    assert_equal_to_alone(models_for_tests.llama(), spec, fleets.learners((5, 2)))


def test_lora_of_mixed_ranks_in_one_cohort():
    spec = fleets.spec("lora", ranks={0: 2, 5: 8})
    mixed = [
        Learner(fleets.texts(count, user), rank=spec.rank_of(count))
        for user, count in enumerate((3, 9, 4, 14))
    ]
    assert {one.rank for one in mixed} == {2, 8}
    assert_equal_to_alone(models_for_tests.llama(), spec, mixed)


def test_classifiers_share_a_head():
    model = models_for_tests.bert(num_labels=3)
    spec = fleets.spec(task="seq_cls", data={"label_names": ["a", "b", "c"]})
    rows = [
        Encoded(
            [EncodedRow(row, target=float(at % 3)) for at, row in enumerate(ids.tolist())], class_targets=True
        )
        for ids in (models_for_tests.tokens(5, 6, 1), models_for_tests.tokens(9, 7, 2))
    ]
    assert_equal_to_alone(model, spec, [Learner(one, rank=4) for one in rows])


@pytest.mark.parametrize("method", fleets.METHODS)
def test_adapters_start_where_single_training_starts(method, tmp_path):
    spec = fleets.spec(method, train={"seed": 3})
    values = small_checkpoints.recipe_values(tmp_path, seed=3)
    loaded = load(make_recipe({**values, "method": fleets.METHODS[method]}))
    wanted = AdapterState.of(loaded.model, "default").tensors
    base = fleets.base(spec)
    rows = stacked(base, [4, 4])
    for row in rows:
        found = dict(base.record(4, row, "float32").tensors())
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert torch.equal(torch.from_numpy(value.copy()), wanted[name]), name
    assert rows.abs().max() > 0


@pytest.mark.parametrize("method", fleets.METHODS)
def test_who_shares_a_batch_changes_nothing(method):
    spec, model = fleets.spec(method), models_for_tests.llama()
    base = fleets.base_of(model, spec)
    people = fleets.learners()
    together = Training(base, spec, people, TOKENS)
    together.run()
    order = [3, 0, 4, 2, 1]
    turned = Training(base, spec, [people[at] for at in order], 37)
    turned.run()
    few = Training(base, spec, people[1:3], 10_000)
    few.run()
    for place, at in enumerate(order):
        torch.testing.assert_close(turned.values[place], together.values[at], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(few.values, together.values[1:3], rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_digits_and_another_one_others():
    model = models_for_tests.llama()
    found = []
    for seed in (0, 0, 1):
        spec = fleets.spec(train={"seed": seed})
        training = Training(fleets.base_of(copy.deepcopy(model), spec), spec, fleets.learners(), TOKENS)
        training.run()
        found.append(training.values)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-4)


def test_the_base_model_is_untouched_and_gets_no_gradient():
    spec, model = fleets.spec(), models_for_tests.llama()
    base = fleets.base_of(model, spec)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    Training(base, spec, fleets.learners(), TOKENS).run()
    assert not [name for name, p in base.model.named_parameters() if p.requires_grad or p.grad is not None]
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not base.turn.is_open


def test_a_user_that_diverges_takes_nobody_along():
    spec = fleets.spec()
    base = fleets.base_of(models_for_tests.llama(), spec)
    people = fleets.learners()
    well = Training(base, spec, people, TOKENS)
    well.run()
    ill = Training(base, spec, people, TOKENS)
    ill.cohort.values[1] = float("inf")
    learnt = ill.run()
    assert [one.diverged for one in learnt] == [False, True, False, False, False]
    assert learnt[1].steps == 1
    others = [0, 2, 3, 4]
    torch.testing.assert_close(ill.values[others], well.values[others], rtol=1e-4, atol=1e-6)


def test_only_adapters_that_step_have_state():
    spec = fleets.spec()
    base = fleets.base_of(models_for_tests.llama(), spec)
    cohort, data = Cohort(base, [4] * 4), {slot: fleets.texts(4, slot) for slot in range(4)}
    start = cohort.values.clone()
    cohort.step(Pass((0, 2), ((0, 1), (1, 3))), data, [1e-2, 1e-3], 1.0)
    cohort.step(Pass((2,), ((0, 1),)), data, [1e-3], 1.0)
    assert cohort.optimizer.steps.tolist() == [1, 0, 2, 0]
    for slot in (1, 3):
        assert torch.equal(cohort.values[slot], start[slot])
        assert not cohort.optimizer.mean[slot].any()
        assert not cohort.optimizer.square[slot].any()
    moved = (cohort.values - start).abs().amax(1)
    assert moved[0] == pytest.approx(1e-2, rel=0.01)
    assert moved[2] <= 2.1e-3


def test_numbers_of_a_layer_are_a_view_of_the_stack():
    spec = fleets.spec()
    cohort = Cohort(fleets.base_of(models_for_tests.llama(), spec), [4] * 3)
    cores = cohort.numbers("model.layers.1.mlp.up_proj.R")
    assert cores.shape == (3, 4, 4)
    cores[1] = 7.0
    assert (cohort.values[1] == 7.0).sum() == 16
    assert not (cohort.values[0] == 7.0).any()


def test_memory_of_many_adapters_is_their_numbers_and_moments():
    spec = fleets.spec()
    base = fleets.base_of(models_for_tests.llama(), spec)
    users, rows = 16, 4
    everything = fleets.texts(users * rows, 1, shortest=12)
    # the same rows in both cases: of one adapter, and of sixteen
    one = {0: everything}
    many = {
        slot: Encoded([EncodedRow(everything[slot * rows + row]["input_ids"]) for row in range(rows)])
        for slot in range(users)
    }
    peaks = []
    for data, share in ((one, users * rows), (many, rows)):
        cohort = None
        with Peak(base.device) as peak:
            cohort = Cohort(base, [4] * len(data))
            turn = Pass(tuple(data), tuple(tuple(range(share)) for _ in data))
            for _ in range(2):
                cohort.step(turn, data, [1e-3] * len(data), 1.0)
        peaks.append(peak.bytes)
    numbers = base.widest.record.layout.size
    assert peaks[1] - peaks[0] <= 12 * numbers * users * 1.05


def test_layers_that_see_no_rows_are_refused():
    from modicum.errors import ConfigError

    spec = fleets.spec()
    base = fleets.base_of(models_for_tests.llama(), spec)
    cohort = Cohort(base, [4])
    base.turn.open({}, [2, 2], [1.0, 1.0], base.device)
    layer = base.model.model.layers[0].mlp.up_proj
    with pytest.raises(ConfigError, match="7 rows where the batch has 4"):
        layer(torch.zeros(7, 32))
    base.turn.close()
    assert cohort.values.shape[0] == 1
