"""Search spaces: what they resolve to, what is refused, and that every choice is the small network it stands for."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch
from tests.models_for_tests import bert, gpt2, llama, tokens

from modicum import LoraXSConfig
from modicum.adapters.elastic import Switch
from modicum.errors import ConfigError
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.search.space import SearchSpace
from modicum.search.spec import bundled_spaces

#: one choice for every group of one layer of the tests' Llama (48 channels, 4 heads in 2 groups)
SPACE = {
    "groups": [
        {"rank": ["q_proj", "k_proj", "v_proj"], "choices": [4, 3, 1]},
        {"rank": ["mlp.outputs"], "choices": [1.0, 0.5]},
        {"width": "mlp", "choices": [48, 24, 12]},
        {"width": "heads", "choices": [4, 2]},
    ]
}


def adapted(base=None, config=ElasticLoraConfig, **options):
    torch.manual_seed(0)
    options = {"r": 4, "alpha": 8, "init_weights": False, **options}
    return peft.get_peft_model(base or llama(), config(**options)).eval()


def test_groups_of_a_llama():
    space = SearchSpace.of_model(SPACE, adapted())
    assert list(space.groups) == [
        "0.rank.q_proj+k_proj+v_proj",
        "1.rank.q_proj+k_proj+v_proj",
        "0.rank.gate_proj+up_proj",
        "1.rank.gate_proj+up_proj",
        "0.width.mlp",
        "1.width.mlp",
        "0.width.heads",
        "1.width.heads",
    ]
    assert space.size == (3 * 2 * 3 * 2) ** 2
    assert space.heuristic()["0.width.mlp"] == 24
    assert space.heuristic()["0.width.heads"] == 4
    assert space.smallest()["1.rank.q_proj+k_proj+v_proj"] == 1


@pytest.mark.parametrize("name", list(bundled_spaces()))
@pytest.mark.parametrize("base", [llama, gpt2, bert])
def test_bundled_spaces_fit_every_family(name, base):
    model = adapted(base(), task_type="SEQ_CLS" if base is bert else None)
    space = SearchSpace.of_model(name, model)
    Switch(model).activate(space.sub_network(space.smallest()))
    ids = tokens()
    small = model(input_ids=ids).logits
    Switch(model).activate(None)
    assert not torch.equal(small, model(input_ids=ids).logits)


def test_one_choice_for_the_whole_model():
    space = SearchSpace.of_model(
        {"groups": [{"width": "mlp", "choices": [1.0, 0.5], "share": "model"}]}, adapted()
    )
    assert space.largest() == {"width.mlp": 48}
    assert space.sub_network({"width.mlp": 24}).widths == {"model.layers.0.mlp": 24, "model.layers.1.mlp": 24}


def test_shares_are_taken_to_multiples():
    group = {"width": "mlp", "choices": [1.0, 0.8, 0.5], "multiple_of": 16}
    space = SearchSpace.of_model({"groups": [group]}, adapted())
    # of 48: 38.4 and 24 are nearest to 32 and, of even distance, to 32 as well
    assert space.groups["0.width.mlp"].choices == (48, 32)


def test_neighbours_differ_by_one_step():
    space = SearchSpace.of_model(SPACE, adapted())
    found = list(space.neighbours(space.heuristic()))
    assert all(sum(one[name] != space.heuristic()[name] for name in one) == 1 for one in found)
    # the heuristic is in the middle of three choices and at the larger of two
    assert len(found) == 2 * (2 + 1 + 2 + 1)


def test_samples_are_uniform_and_depend_on_the_generator_alone():
    space = SearchSpace.of_model(SPACE, adapted())
    first, second = (space.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    generator = torch.Generator().manual_seed(0)
    drawn = [space.sample(generator)["0.width.mlp"] for _ in range(600)]
    # five standard deviations around a third
    assert all(abs(drawn.count(choice) - 200) < 58 for choice in (48, 24, 12))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"rank": ["q_prj"], "choices": [4]}], "q_proj"),
        ([{"width": ["gate_proj"], "choices": [24]}], "needs model.layers.0.mlp.up_proj cut along"),
        ([{"width": "heads", "choices": [3]}], "no multiple of the 2"),
        ([{"width": "mpl", "choices": [24]}], "mlp"),
        ([{"rank": ["q_proj"], "choices": [5]}], "outside 1 to 4"),
        ([{"rank": ["q_proj"], "choices": [4]}, {"rank": ["heads.outputs"], "choices": [4]}], "is in"),
        ([{"rank": ["q_proj"], "choices": [4], "blocks": [7]}], "blocks"),
        ([{"rank": ["q_proj"], "width": "mlp", "choices": [4]}], "either a rank or a width"),
        ([{"rank": ["q_proj"], "choises": [4]}], "choices"),
        ([{"rank": ["q_proj"], "choices": [-0.5]}], "-0.5 is no share"),
        ([{"rank": ["q_proj"], "choices": [float("nan")]}], "nan is no share"),
        ([{"rank": ["q_proj"], "choices": [4.0, 0.5]}], "as a count write 4"),
        ([{"rank": ["q_proj"], "choices": [1, 0.5]}], "1 is a count of one"),
        ([{"rank": ["q_proj"], "choices": [True]}], "valid integer"),
        ([{"rank": [], "choices": [4]}], "rank is empty"),
        ([{"rank": ["q_proj"], "choices": [4], "blocks": []}], "blocks is empty"),
        ([{"width": ["gate_proj", "up_proj", "dawn_proj"], "choices": [24]}], "is called dawn_proj"),
        ([{"width": ["gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"], "choices": [2]}], "give each a"),
        ([], "groups"),
    ],
)
def test_what_does_not_fit_is_refused(groups, words):
    with pytest.raises(ConfigError, match=words):
        SearchSpace.of_model({"groups": groups}, adapted())


def test_all_faults_at_once():
    with pytest.raises(ConfigError) as error:
        SearchSpace.of_model(
            {
                "groups": [
                    {"rank": ["nothing"], "choices": [4]},
                    {"width": "heads", "choices": [3]},
                    {"width": "mpl", "choices": [1.0]},
                ]
            },
            adapted(),
        )
    for words in ("nothing", "3 query heads", "did you mean 'mlp'"):
        assert words in str(error.value)


def test_a_cut_layer_needs_an_adapter():
    model = adapted(target_modules=["gate_proj", "up_proj"])
    with pytest.raises(ConfigError, match=r"down_proj.*carry no adapter"):
        SearchSpace.of_model({"groups": [{"width": "mlp", "choices": [24]}]}, model)


def test_no_such_space():
    with pytest.raises(ConfigError, match="did you mean 'shears'"):
        SearchSpace.of_model("sheers", adapted())


def test_a_space_of_the_users_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        """
name: mine
groups:
  - rank: [heads.outputs]            # a comment
    choices: [4, 2]
  - width: mlp
    choices: [1.0, 0.5]
    share: model
"""
    )
    space = SearchSpace.of_model(str(file), adapted())
    assert {name: group.choices for name, group in space.groups.items()} == {
        "0.rank.q_proj+k_proj+v_proj": (4, 2),
        "1.rank.q_proj+k_proj+v_proj": (4, 2),
        "width.mlp": (48, 24),
    }
    assert space.spec.name == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("groups: [", r"give a YAML file or one of .*while parsing"),
        ("- rank: [q_proj]", "a search space is a mapping with `groups`"),
        ("name: mine", "groups: Field required"),
        (
            "grups: []\ngroups: [{rank: [q_proj], choises: [4]}, {width: mlp, choices: [1.5]}]",
            r"no option 'choises' \(did you mean 'choices'.*1\.5 is no share.*'grups' \(did you mean 'groups'",
        ),
    ],
)
def test_a_file_that_is_no_space_is_named_with_all_that_is_wrong(text, words, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        SearchSpace.of_model(str(file), adapted())
    assert str(file) in str(error.value)


def test_wrong_choices_are_listed():
    space = SearchSpace.of_model(SPACE, adapted())
    with pytest.raises(ConfigError) as error:
        space.sub_network({**space.largest(), "0.width.mlp": 47, "7.width.mlp": 48})
    assert "0.width.mlp = 47 (choices: 48, 24, 12)" in str(error.value)
    assert "7.width.mlp" in str(error.value)


#: sixteen sub-networks
RANKS = {"groups": [{"rank": ["q_proj", "v_proj", "down_proj"], "choices": [4, 3, 2, 1]}]}


@pytest.mark.parametrize("method", [ElasticLoraConfig, LoraXSConfig])
@pytest.mark.parametrize("ranks", [*itertools.product([4, 3, 2, 1], repeat=2)], ids=str)
def test_an_active_rank_is_an_adapter_of_that_rank_with_copied_prefixes(ranks, method):
    options = {} if method is ElasticLoraConfig else {"svd_mode": "exact"}
    model = adapted(config=method, **options)
    space = SearchSpace.of_model(RANKS, model)
    assert space.size == 16
    chosen = space.sub_network(dict(zip(space.groups, ranks, strict=True)))
    Switch(model).activate(chosen)
    # the scaling stays alpha / R, so the small adapter's alpha is 8 · k / 4
    small = adapted(
        config=method,
        rank_pattern=dict(chosen.ranks),
        alpha_pattern={name: 8 * rank / 4 for name, rank in chosen.ranks.items()},
        **options,
    )
    ours, theirs = Switch(model).adapters, Switch(small).adapters
    with torch.no_grad():
        for name, adapter in theirs.items():
            for key, value in adapter.named_parameters():
                source = dict(ours[name].named_parameters())[key]
                value.copy_(source[tuple(slice(size) for size in value.shape)])
    for name, adapter in ours.items():
        torch.testing.assert_close(adapter.delta_weight(), theirs[name].delta_weight(), rtol=1e-5, atol=1e-6)
    # what is left of a difference in doubles would be one of numbers, not of the order of sums
    ids = tokens()
    whole, part = (one.double()(input_ids=ids).logits for one in (model, small))
    torch.testing.assert_close(whole, part, rtol=0, atol=1e-12)


def test_a_saved_adapter_comes_back_as_the_sub_network_it_was(tmp_path):
    model = adapted()
    space = SearchSpace.of_model(SPACE, model)
    chosen = space.sub_network(space.smallest())
    Switch(model).activate(chosen)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    ids = tokens()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.peft_config["default"].sub_network["choices"] == space.smallest()
    with again.disable_adapter():
        assert torch.equal(again(input_ids=ids).logits, llama()(input_ids=ids).logits)


def test_several_adapters_keep_their_own_sub_networks():
    model = adapted()
    space = SearchSpace.of_model(SPACE, model)
    whole = model(input_ids=tokens()).logits
    other = copy.copy(model.peft_config["default"])
    other.sub_network = space.sub_network(space.smallest()).as_dict()
    model.add_adapter("small", other)
    assert torch.equal(model(input_ids=tokens()).logits, whole)
    model.set_adapter("small")
    assert not torch.equal(model(input_ids=tokens()).logits, whole)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=tokens()).logits, whole)


def test_switching_names_what_does_not_fit():
    model = adapted()
    chosen = SearchSpace.of_model(SPACE, model)
    wrong = chosen.sub_network(chosen.smallest())
    wrong.ranks["model.layers.9.mlp.up_proj"] = 2
    wrong.ranks["model.layers.0.self_attn.q_proj"] = 9
    before = model(input_ids=tokens()).logits
    with pytest.raises(ConfigError) as error:
        Switch(model).activate(wrong)
    assert "layers.9" in str(error.value)
    assert "rank 9" in str(error.value)
    assert torch.equal(model(input_ids=tokens()).logits, before)


def test_layers_of_equal_names_are_groups_of_their_own():
    """BERT's layers are called dense all over; a group must not take the place of another."""
    space = SearchSpace.of_model("shears", adapted(bert(), task_type="SEQ_CLS"))
    ranks = {
        group.layers[0].rpartition("layer.0.")[2] for name, group in space.groups.items() if name[0] == "0"
    }
    assert ranks == {"attention.self.query", "intermediate.dense", "output.dense"}
    assert len(space.groups) == 6


def test_one_choice_for_some_layers_and_another_for_the_rest():
    group = {"width": "mlp", "choices": [1.0, 0.5], "share": "model"}
    space = SearchSpace.of_model({"groups": [group | {"blocks": [0]}, group | {"blocks": [1]}]}, adapted())
    assert {name: [w.block for w in one.widths] for name, one in space.groups.items()} == {
        "0.width.mlp": [0],
        "1.width.mlp": [1],
    }


def test_a_share_near_the_whole_never_ends_above_it():
    # of 48 channels 43.2 are nearest to 32, and to 56 where steps are 28
    group = {"width": "mlp", "choices": [1.0, 0.9], "multiple_of": 32}
    assert SearchSpace.of_model({"groups": [group]}, adapted()).groups["0.width.mlp"].choices == (48, 32)
    group = {"width": "mlp", "choices": [1.0, 0.9], "multiple_of": 28}
    assert SearchSpace.of_model({"groups": [group]}, adapted()).groups["0.width.mlp"].choices == (48,)


def test_ranks_are_elastic_on_models_of_unknown_families():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from modicum.search.costs import Costs

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = adapted(GPTNeoXForCausalLM(config))
    space = SearchSpace.of_model({"groups": [{"rank": ["query_key_value"], "choices": [4, 1]}]}, model)
    assert [group.choices for group in space.groups.values()] == [(4, 1), (4, 1)]
    costs = Costs.of_model(model, merged=False)
    small = costs.parameters(space.sub_network(space.smallest()))
    assert costs.parameters() - small == 2 * 3 * (16 + 48)
    with pytest.raises(ConfigError, match="ranks alone can be elastic"):
        SearchSpace.of_model({"groups": [{"width": "mlp", "choices": [1.0]}]}, model)


def test_the_digest_tells_apart_what_groups_hold():
    first, second = (
        SearchSpace.of_model({"groups": [{"rank": [layer], "choices": [4, 2], "share": "model"}]}, adapted())
        for layer in ("self_attn.q_proj", "self_attn.k_proj")
    )
    assert first.digest() != second.digest()
