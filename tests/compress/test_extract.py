"""A sub-network is the small network with copied prefixes, and what is extracted is that network."""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.cli.adapter_files import tokenizer, trained
from tests.models.test_families import decoder
from tests.models_for_tests import ENCODERS, bert, encoder, llama, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from modicum.adapters.elastic import Cut, SubNetwork, Switch, take
from modicum.compress.extract import extract
from modicum.errors import ConfigError, InexactMergeError
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.methods.lora_xs import LoraXSConfig
from modicum.methods.sparse_peft import SparsePeftConfig
from modicum.models.families import widths
from modicum.models.subnetwork import kept, narrow
from modicum.search.space import SearchSpace

FAMILIES = ("llama", "qwen2", "phi3", "gpt2", *ENCODERS)
RANK, ALPHA = 4, 6.0
TEXTS = ["w1 w5 w9 w2 w7", "w3 w3 w8 w20 w40 w11 w60"]


def base(kind: str) -> Any:
    return encoder(kind) if kind in ENCODERS else decoder(kind)


def super_network(kind: str, **options: Any) -> Any:
    """The model of a family with a trained elastic LoRA on every linear layer."""
    return trained(base(kind), ElasticLoraConfig(r=RANK, alpha=ALPHA, **_without_head(kind), **options), 0.1)


def _without_head(kind: str) -> dict[str, Any]:
    heads = ["classifier", "pooler.dense", "classifier.dense", "classifier.out_proj"]
    return {"exclude_modules": heads} if kind in ENCODERS else {}


def auto(kind: str) -> Any:
    return AutoModelForSequenceClassification if kind in ENCODERS else AutoModelForCausalLM


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens() if ids is None else ids).logits


@st.composite
def sub_networks(draw: st.DrawFn, kind: str) -> SubNetwork:
    """A rank for every layer and units for every width, all of them drawn on their own."""
    model = base(kind)
    # a small network of fewer channels than its rank would be refused
    least = {"heads": 1, "mlp": RANK}
    units = {w.name: draw(st.integers(least[w.kind], w.units), label=w.name) for w in widths(model)}
    layers = [layer for w in widths(model) for layer in kept(model, {w.name: 1})]
    cuts = {layer: cut for w in widths(model) for layer, cut in w.cuts(units[w.name]).items()}
    return SubNetwork({layer: draw(st.integers(1, RANK)) for layer in layers}, cuts, units)


def small_network(kind: str, big: Any, chosen: SubNetwork) -> Any:
    """The narrow model with a small LoRA of its own, all numbers copied prefixes of the big ones."""
    model = base(kind)
    narrow(model, chosen.widths)
    ranks = {f"^{re.escape(layer)}$": rank for layer, rank in chosen.ranks.items()}
    alphas = {layer: ALPHA * rank / RANK for layer, rank in ranks.items()}
    small = get_peft_model(
        model,
        ElasticLoraConfig(
            r=RANK, alpha=ALPHA, rank_pattern=ranks, alpha_pattern=alphas, **_without_head(kind)
        ),
    )
    cuts = kept(big, chosen.widths)
    mine, theirs = Switch(small).adapters, Switch(big).adapters
    with torch.no_grad():
        for layer, adapter in mine.items():
            whole, cut, rank = theirs[layer], cuts.get(layer, Cut()), chosen.ranks.get(layer, RANK)
            adapter.A.copy_(take(whole.A[:rank], cut.inputs, 1))
            adapter.B.copy_(take(whole.B[:, :rank], cut.outputs, 0))
    return small


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_sub_network_is_the_small_network_with_copied_prefixes(kind: str, data: st.DataObject) -> None:
    chosen = data.draw(sub_networks(kind))
    big = super_network(kind)
    small = logits(small_network(kind, big, chosen))
    Switch(big).activate(chosen)
    # bit for bit on the machine this was written on; another one may order the sums of other shapes otherwise
    torch.testing.assert_close(logits(big), small, rtol=0, atol=1e-5)


#: 64 sub-networks of two layers
SPACE = {
    "groups": [
        {"rank": ["heads.outputs"], "choices": [4, 3], "share": "model"},
        {"rank": ["mlp.outputs", "mlp.inputs"], "choices": [4, 1], "share": "model"},
        {"width": "mlp", "choices": [1.0, 0.5]},
        {"width": "heads", "choices": [1.0, 0.5]},
    ]
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_every_choice_of_a_space_is_its_small_network_exactly(kind: str) -> None:
    """In doubles, where sums in another order differ by 1e-15 and another number would by far more."""
    big = super_network(kind)
    space = SearchSpace.of_model(SPACE, big)
    named = [(name, group.choices) for name, group in space.groups.items()]
    every = [
        dict(zip(space.groups, picked, strict=True))
        for picked in itertools.product(*(choices for _, choices in named))
    ]
    assert len(every) == space.size == 64
    chosen = [space.sub_network(choices) for choices in every]
    small = [logits(small_network(kind, big, one).double()) for one in chosen]
    big.double()
    seen = set()
    for one, wanted in zip(chosen, small, strict=True):
        Switch(big).activate(one)
        torch.testing.assert_close(logits(big), wanted, rtol=0, atol=1e-12)
        seen.add(wanted.sum().item())
    assert len(seen) == 64


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_what_is_extracted_computes_what_the_super_network_computes(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chosen = data.draw(sub_networks(kind))
    big = super_network(kind)
    out = tmp_path_factory.mktemp("out") / "small"
    before = logits(big)
    done = extract(big, out, tokenizer=tokenizer(), sub_network=chosen, texts=TEXTS)
    assert torch.equal(logits(big), before), "the super-network is as it was"
    assert big.peft_config["default"].sub_network is None
    Switch(big).activate(chosen)
    small = auto(kind).from_pretrained(out)
    torch.testing.assert_close(logits(small), logits(big), rtol=1e-4, atol=1e-4)
    assert type(small).__name__ == done.model_class
    assert done.logit_error < 1e-5
    assert done.parameters == small.num_parameters()
    assert {w.name: w.units for w in widths(small)} == chosen.widths
    assert done.widths == {
        w.name: chosen.widths[w.name] for w in widths(big) if w.units > chosen.widths[w.name]
    }
    assert done.linear_before - done.linear == numbers_gone(kind, chosen)


def numbers_gone(kind: str, chosen: SubNetwork) -> int:
    """Weights that a sub-network lacks, in closed form: hidden 32 rows or columns for each unit of each port."""
    gone = 0
    for width in widths(base(kind)):
        left = width.units - chosen.widths[width.name]
        rows = sum(size for port in (*width.outputs, *width.inputs) for _, size in port.parts)
        gone += left * rows * 32
    return gone


def test_the_active_sub_network_is_what_is_extracted_and_bfloat16_rounds_once(tmp_path: Any) -> None:
    big = super_network("llama")
    ranks = {layer: 1 + index % RANK for index, layer in enumerate(Switch(big).adapters)}
    Switch(big).activate(SubNetwork(ranks, choices={"all": 3}))
    done = extract(big, tmp_path / "small", tokenizer=tokenizer(), dtype="bfloat16")
    assert (done.model_class, done.stock, done.dtype) == ("LlamaForCausalLM", True, "bfloat16")
    assert done.ranks == ranks
    assert done.parameters == done.parameters_before
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.dtype == torch.bfloat16
    for name, layer in Switch(big).layers.items():
        wanted = (layer.site.weight().float() + layer.get_delta_weight("default")).bfloat16()
        assert torch.equal(small.get_submodule(name).weight, wanted), name
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("w1 w2").input_ids == [4, 5]
    about = small.config.modicum
    assert about["sub_network"] == {"ranks": ranks, "choices": {"all": 3}}
    assert about["base_fingerprint"] == big.peft_config["default"].base_fingerprint
    small.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").modicum == about
    assert "import modicum" not in (tmp_path / "small" / "README.md").read_text()


def test_a_json_without_cuts_is_enough_and_other_cuts_are_refused(tmp_path: Any) -> None:
    big = super_network("llama")
    widths_only = SubNetwork.read({"widths": {"model.layers.1.mlp": 12}})
    done = extract(big, tmp_path / "small", tokenizer=tokenizer(), sub_network=widths_only, texts=TEXTS)
    assert (done.model_class, done.stock) == ("ModicumLlamaForCausalLM", False)
    assert done.widths == {"model.layers.1.mlp": 12}
    about = AutoConfig.from_pretrained(tmp_path / "small").modicum["sub_network"]
    assert about == {"ranks": done.ranks, "widths": done.widths}
    assert set(done.ranks.values()) == {RANK}
    assert "import modicum" in (tmp_path / "small" / "README.md").read_text()
    wrong = SubNetwork(
        cuts={"model.layers.1.mlp.down_proj": Cut(inputs=((0, 7),))}, widths=widths_only.widths
    )
    for chosen, words in (
        (wrong, "the cuts of this sub-network are not those of its widths"),
        (SubNetwork(widths={"model.layers.1.mpl": 12}), "no width 'model.layers.1.mpl'.*mlp"),
        (SubNetwork(widths={"model.layers.1.mlp": 49}), "1 to 48 units"),
        (SubNetwork(ranks={"model.layers.1.mlp.down_proj": 9}), "rank 9"),
    ):
        with pytest.raises(ConfigError, match=words):
            extract(big, tmp_path / "other", tokenizer=tokenizer(), sub_network=chosen, texts=TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert Switch(big).adapters["model.layers.1.mlp.down_proj"].active_rank == RANK


def test_heads_trained_in_full_come_along(tmp_path: Any) -> None:
    big = super_network("bert", modules_to_save=["classifier"], task_type="SEQ_CLS")
    extract(big, tmp_path / "small", tokenizer=tokenizer(), texts=TEXTS)
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(small), logits(big), rtol=1e-4, atol=1e-4)
    own = big.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(small.classifier.weight, own.weight)


def test_a_head_that_only_another_adapter_trained_is_the_base_models(tmp_path: Any) -> None:
    big = super_network("bert", task_type="FEATURE_EXTRACTION")
    other = ElasticLoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    big.add_adapter("other", other)
    big.base_model.model.classifier.modules_to_save["other"].weight.data.add_(1)
    big.set_adapter("default")
    extract(big, tmp_path / "small", tokenizer=tokenizer(), texts=TEXTS)
    small: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(small.classifier.weight, bert().classifier.weight)


def test_every_method_that_merges_is_merged_and_zeros_stay(tmp_path: Any) -> None:
    model = llama()
    mask = torch.rand(48, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    model.model.layers[0].mlp.up_proj.weight.data[mask] = 0
    for index, config in enumerate((LoraXSConfig(r=4), SparsePeftConfig(r=4))):
        adapted = trained(copy.deepcopy(model), config)
        chosen = SubNetwork(widths={"model.layers.0.mlp": 20})
        extract(adapted, tmp_path / f"{index}", tokenizer=tokenizer(), sub_network=chosen, texts=TEXTS)
        Switch(adapted).activate(
            SubNetwork(cuts=dict(widths(adapted)[1].cuts(20)), widths={"model.layers.0.mlp": 20})
        )
        small = AutoModelForCausalLM.from_pretrained(tmp_path / f"{index}")
        torch.testing.assert_close(logits(small), logits(adapted), rtol=1e-4, atol=1e-4)
    zeros = small.model.layers[0].mlp.up_proj.weight == 0
    assert torch.equal(zeros, mask[:20])


def test_what_cannot_be_extracted_is_refused_at_once(tmp_path: Any) -> None:
    (tmp_path / "there").mkdir()
    lora = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"'float23'.*exists already.*not modicum's"):
        extract(lora, tmp_path / "there", tokenizer=tokenizer(), dtype="float23")
    merged = super_network("llama")
    merged.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        extract(merged, tmp_path / "new", tokenizer=tokenizer())


def test_quantized_bases_are_refused_with_what_to_do(tmp_path: Any) -> None:
    from modicum.quant.affine import AffineLinear
    from modicum.quant.spec import AffineSpec

    model = llama()
    model.model.layers[0].mlp.up_proj = AffineLinear(32, 48, AffineSpec(4, (1, 16)), False)
    adapted = trained(model, ElasticLoraConfig(r=2))
    with pytest.raises(ConfigError, match=r"up_proj are quantized.*modicum quantize.*modicum merge"):
        extract(adapted, tmp_path / "new", tokenizer=tokenizer())


def test_a_file_that_does_not_hold_the_model_is_never_seen(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modicum.compress import extract as module

    right = module.narrowed

    def last_instead_of_first(part: str, tensor: torch.Tensor, cut: Cut, **options: Any) -> torch.Tensor:
        return right(part, tensor.flip(0), cut, **options)

    monkeypatch.setattr(module, "narrowed", last_instead_of_first)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "old").write_text("what was there")
    with pytest.raises(InexactMergeError, match="rounding does not explain"):
        extract(
            super_network("llama"), tmp_path / "small", tokenizer=tokenizer(), texts=TEXTS, overwrite=True
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["small", "old"]


def test_the_entry_in_the_configuration_is_plain_and_names_the_adapter_whatever_its_file(
    tmp_path: Any,
) -> None:
    big = super_network("llama")
    digests = []
    for name in ("a", "b"):
        extract(big, tmp_path / name, tokenizer=tokenizer(), texts=TEXTS)
        digests.append(json.loads((tmp_path / name / "config.json").read_text())["modicum"]["adapter_digest"])
        Switch(big).activate(SubNetwork(ranks=dict.fromkeys(Switch(big).adapters, 2)))
    assert digests[0] == digests[1], "the numbers are the same, only the active sub-network is not"
    with torch.no_grad():
        next(iter(Switch(big).adapters.values())).B.add_(1)
    extract(big, tmp_path / "c", tokenizer=tokenizer(), texts=TEXTS)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["modicum"]["adapter_digest"] != digests[0]
