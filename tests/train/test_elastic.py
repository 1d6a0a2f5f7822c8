"""Training super-networks: what is drawn, what recomputation sees, and that runs repeat."""

from __future__ import annotations

import json

import pytest
import torch
from peft.utils import load_peft_weights

from modicum.adapters.elastic import Switch
from modicum.adapters.layer import AdapterLinear
from modicum.errors import ConfigError
from modicum.models.loading import load_adapted, load_base
from modicum.train.recipe import make_recipe
from modicum.train.run import tune

SPACE = {
    "groups": [
        {"rank": ["heads.outputs"], "choices": [4, 2, 1]},
        {"width": "mlp", "choices": [1.0, 0.75, 0.5]},
        {"rank": ["mlp.inputs"], "choices": [1.0, 0.5]},
    ]
}


def recipe(output, **changes):
    values = {
        "model": {"name_or_path": "embedded"},
        "data": {"train": "bundled:notes", "max_rows": 24, "max_eval_rows": 8, "max_length": 24},
        "method": {"name": "elastic_lora", "r": 4, "alpha": 8.0, "dropout": 0.1},
        "train": {
            "max_steps": 4,
            "batch_size": 2,
            "report_to": "none",
            "evaluate_before": False,
            "load_best": False,
            "save_steps": 2,
            "learning_rate": 1e-2,
        },
        "elastic": {"space": SPACE},
        "output": str(output),
    }
    return make_recipe(values).with_values(**changes)


def weights(result):
    return load_peft_weights(str(result.adapter))


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tune(recipe(tmp_path_factory.mktemp("run") / "a"))


def test_two_runs_with_one_seed_give_the_same_adapter(trained, tmp_path):
    assert equal(weights(trained), weights(tune(recipe(tmp_path / "b"))))


def test_another_seed_draws_other_sub_networks(trained, tmp_path):
    same_start = recipe(tmp_path / "b", method__seed=0)
    other = tune(recipe(tmp_path / "c", train__seed=1, method__seed=0))
    assert not equal(weights(tune(same_start)), weights(other))


def test_resumed_is_uninterrupted(trained, tmp_path, monkeypatch):
    from transformers import Trainer

    half = recipe(tmp_path / "b")
    step = Trainer.training_step
    calls = []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(half)
    monkeypatch.setattr(Trainer, "training_step", step)
    # between steps it is the sub-network that is evaluated, not the one that was drawn last
    saved, final = (
        json.loads((folder / "adapter_config.json").read_text())["sub_network"]
        for folder in (half.folder / "checkpoints/checkpoint-2", trained.adapter)
    )
    assert saved == final
    assert equal(weights(tune(half, resume=True)), weights(trained))


def test_the_heuristic_sub_network_is_saved_as_the_active_one(trained):
    model = load_adapted(load_base("embedded"), trained.adapter)
    config = model.peft_config["default"]
    assert config.sub_network["choices"]["0.width.mlp"] == config.sub_network["widths"]["model.layers.0.mlp"]
    assert config.search_space["groups"][0]["choices"] == [4, 2, 1]
    adapter = next(iter(Switch(model).adapters.values()))
    assert (adapter.rank, adapter.active_rank) == (4, 2)


def test_the_best_checkpoint_comes_back_as_the_sub_network_that_was_evaluated(tmp_path):
    steps = {"train__eval_steps": 1, "train__save_steps": 1, "train__load_best": True}
    done = tune(recipe(tmp_path / "run", **steps, train__learning_rate=2.0, train__bf16=True))
    assert done.report["best_step"] < done.report["steps"] == 4
    from modicum.data.prepare import prepare
    from modicum.evaluate.run import evaluate
    from modicum.models.loading import load_tokenizer

    model, tokenizer = load_adapted(load_base("embedded"), done.adapter), load_tokenizer("embedded")
    assert model.peft_config["default"].sub_network["choices"]["0.width.mlp"] == 576
    rows = prepare(recipe(tmp_path).data, tokenizer, "causal_lm").validation
    found = evaluate(model, tokenizer, rows, exact_match=False, resamples=1).metrics["loss"].value
    assert found == pytest.approx(done.metrics["validation"]["loss"], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_sees_the_sub_network_of_the_forward_pass_in_200_of_200_steps(
    reentrant, tmp_path, monkeypatch
):
    """Each layer runs twice in a step, forward and recomputed; the pairs have to agree, and to vary between steps."""
    seen: list[list[tuple]] = []
    forward = AdapterLinear.forward

    def watched(self, x, *args, **kwargs):
        if self.training:
            adapter = self.adapters["default"]
            seen[-1].append((self.site.name, adapter.active_rank, adapter.cut))
        return forward(self, x, *args, **kwargs)

    from modicum.train.trainer import TwoRateTrainer

    step = TwoRateTrainer.training_step

    def counted(self, *args, **kwargs):
        seen.append([])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdapterLinear, "forward", watched)
    monkeypatch.setattr(TwoRateTrainer, "training_step", counted)
    steps = {"train__max_steps": 200, "train__save_steps": 200, "train__batch_size": 1, "data__max_length": 8}
    checkpointing = {"train__gradient_checkpointing": True, "train__use_reentrant": reentrant}
    tune(recipe(tmp_path / "run", **steps, **checkpointing))
    assert len(seen) == 200
    for step_seen in seen:
        layers = {name for name, _, _ in step_seen}
        assert len(step_seen) == 2 * len(layers), "not every layer was recomputed once"
        assert len(set(step_seen)) == len(layers), "a layer was recomputed as another sub-network"
    assert len({tuple(sorted(map(str, step_seen))) for step_seen in seen}) > 150


def test_gradient_checkpointing_changes_no_number(trained, tmp_path):
    for reentrant in (False, True):
        again = tune(
            recipe(
                tmp_path / str(reentrant), train__gradient_checkpointing=True, train__use_reentrant=reentrant
            )
        )
        for key, value in weights(again).items():
            torch.testing.assert_close(value, weights(trained)[key], rtol=1e-4, atol=1e-5)


def test_every_micro_batch_draws_anew(tmp_path):
    from modicum.train.elastic import ElasticTraining
    from modicum.train.run import load

    wanted = recipe(tmp_path / "run")
    elastic = ElasticTraining(load(wanted).model, wanted.elastic, seed=0)
    drawn = [elastic.drawn(step, micro) for step in range(4) for micro in range(4)]
    assert len({str(one) for one in drawn}) == 16
    assert drawn == [elastic.drawn(step, micro) for step in range(4) for micro in range(4)]


def test_the_trainer_counts_the_micro_batches_of_every_step(tmp_path, monkeypatch):
    from modicum.train.elastic import ElasticTraining

    asked, drawn = [], ElasticTraining.drawn

    def watched(self, step, micro):
        asked.append((step, micro))
        return drawn(self, step, micro)

    monkeypatch.setattr(ElasticTraining, "drawn", watched)
    tune(recipe(tmp_path / "run", train__gradient_accumulation_steps=3, train__max_steps=2))
    assert asked == [(step, micro) for step in range(2) for micro in range(3)]


@pytest.mark.parametrize("distill", [False, True])
def test_the_sandwich_rule_averages_its_sub_networks(distill, tmp_path):
    """The gradient of a micro-batch is the mean over largest, smallest and random sub-networks, taken one by one."""
    from modicum.train.elastic import ElasticTraining
    from modicum.train.run import load

    wanted = recipe(
        tmp_path / "run",
        method__dropout=0.0,
        elastic__sampling="sandwich",
        elastic__samples=1,
        elastic__distill=distill,
    )
    loaded = load(wanted)
    model = loaded.model.train()
    elastic = ElasticTraining(model, wanted.elastic, seed=0)
    row = loaded.data.train[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with elastic.micro_batch(0, 0) as turns:
        for _ in turns:
            output = model(input_ids=ids, labels=labels)
            elastic.loss(output.loss, output.logits, labels).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    switch, taught = Switch(model), None
    drawn = elastic.drawn(0, 0)
    assert drawn[0] == elastic.space.largest()
    assert drawn[1] == elastic.space.smallest()
    for choices in drawn:
        switch.activate(elastic.space.sub_network(choices))
        output = model(input_ids=ids, labels=labels)
        loss = output.loss
        if distill and taught is not None:
            kept = labels[0, 1:] != -100
            logs = output.logits[0, :-1][kept].log_softmax(-1)
            loss = -(taught[0, :-1][kept].softmax(-1) * logs).sum(-1).mean()
        elif distill:
            taught = output.logits.detach()
        (loss / 3).backward()
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"name": "lora"}}, "no sub-networks"),
        ({"elastic": {"space": "sheers"}}, "did you mean 'shears'"),
        ({"elastic": {"space": "shears", "distill": True}}, "sandwich"),
        ({"elastic": {"space": "shears", "samplin": "uniform"}}, "sampling"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_anything_is_loaded(changes, words, tmp_path):
    values = recipe(tmp_path).model_dump(exclude_unset=True) | changes
    with pytest.raises(ConfigError, match=words):
        make_recipe(values)
