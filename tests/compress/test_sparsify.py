"""Sparse folders: which weights go, recomputed inputs, what the report says, resuming, refusing."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import small_checkpoints as small
from tests.compress.folder_cases import (
    LENGTH,
    Stop,
    files_of,
    perplexity,
    saved,
    stop_at,
    tensors_of,
    write_text,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import modicum
from modicum.compress.calibration import calibration_sequences
from modicum.compress.quantize import quantize_model
from modicum.compress.quantize_report import QuantizeOptions
from modicum.compress.source import Source
from modicum.compress.sparsify import sparsify_model
from modicum.compress.sparsify_report import SparsifyOptions, parse_ratios
from modicum.compress.streaming import Stack, stack_names
from modicum.errors import ConfigError
from modicum.models.architecture import linear_shape
from modicum.ops.sparsity import count


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def options(text):
    return SparsifyOptions(
        calibration=(str(text),), sequence_length=LENGTH, sequences=12, eval_text=text, eval_sequences=10
    )


@pytest.fixture(scope="module")
def plain(options):
    """Options that need no text."""
    return dataclasses.replace(options, algorithm="magnitude", calibration=(), evaluate=False, eval_text=None)


def decoder(name, **more):
    usual: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**(usual | more))).eval()


def encoder(name, **more):
    torch.manual_seed(0)
    usual = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32}
    config = getattr(transformers, name)(
        vocab_size=101, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2, num_labels=3,
        **(usual | more),
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config).eval()


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


FAMILIES = {
    "llama": lambda: decoder("LlamaConfig", num_key_value_heads=2),
    "mistral": lambda: decoder("MistralConfig", num_key_value_heads=2, sliding_window=6),
    "qwen3": lambda: decoder("Qwen3Config", num_key_value_heads=2, head_dim=16),
    "gemma2": lambda: decoder("Gemma2Config", num_key_value_heads=2, head_dim=16, sliding_window=8),
    "phi3": lambda: decoder("Phi3Config", num_key_value_heads=2),
    "gpt2": gpt2,
    "falcon": lambda: decoder("FalconConfig", alibi=True),
    "bert": lambda: encoder("BertConfig"),
    "roberta": lambda: encoder("RobertaConfig"),
    "distilbert": lambda: encoder(
        "DistilBertConfig", dim=32, n_layers=2, n_heads=4, hidden_dim=48, hidden_size=32
    ),
    "deberta": lambda: encoder("DebertaV2Config", relative_attention=True, pos_att_type=["c2p", "p2c"]),
}


def reference(model, ids, ratio, *, recompute=True):
    """Wanda with nothing but full forward passes of the model, which is changed in place; the masks by name."""
    masks = {}
    for prefix in stack_names(model):
        inside = {n: m for n, m in model.named_modules() if n.startswith(f"{prefix}.") and linear_shape(m)}
        squares: dict[str, torch.Tensor] = {}

        def hook(name, squares=squares):
            def add(_module, args):
                squares[name] = squares.get(name, 0) + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

            return add

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in inside.items()]
        with torch.no_grad():
            for row in ids.split(1):
                model(input_ids=row)
        for handle in handles:
            handle.remove()
        for name, module in inside.items():
            transposed = not isinstance(module, torch.nn.Linear)
            weight = module.weight.detach().T if transposed else module.weight.detach()
            scores = weight.abs() * squares[name].sqrt()
            gone = scores.argsort(dim=1)[:, : count(weight.shape[1], ratio)]
            keep = torch.ones_like(weight, dtype=torch.bool).scatter_(1, gone, value=False)
            masks[name] = keep.T if transposed else keep
            if recompute:
                with torch.no_grad():
                    module.weight *= masks[name]
    return masks


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_scores_with_the_inputs_that_sparse_layers_give(family, options, text, tmp_path):
    model = FAMILIES[family]()
    folder, causal = saved(model, tmp_path / "model"), stack_names(model) and hasattr(model, "lm_head")
    chosen = options if causal else dataclasses.replace(options, eval_text=None)
    report = sparsify_model(str(folder), tmp_path / "s", chosen)
    ids = calibration_sequences([text], small.tokenizer(), 12, LENGTH).ids
    original = type(model).from_pretrained(folder).eval()
    masks = reference(original, ids, 0.5)
    stored, before = tensors_of(tmp_path / "s"), tensors_of(folder)
    assert [layer.name for layer in report.layers] == [n for n, _ in model.named_modules() if n in masks]
    for name, keep in masks.items():
        found = stored[f"{name}.weight"]
        # scores that all but agree may be rounded apart
        assert ((found != 0) == keep).float().mean() > 0.995, name
        assert torch.equal(found[found != 0], before[f"{name}.weight"][found != 0])
    if causal:
        assert report.perplexity_before == pytest.approx(perplexity(folder, text), rel=1e-4)
        assert report.perplexity_after == pytest.approx(perplexity(tmp_path / "s", text), rel=1e-4)
        assert report.perplexity_after != pytest.approx(report.perplexity_before, rel=1e-4)
    else:
        assert report.perplexity_after is None
        assert "no perplexity" in report.notes[0]
    loaded = type(model).from_pretrained(tmp_path / "s").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids[:2]).logits, original(ids[:2]).logits, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_inputs_of_the_original_layers_would_give_other_masks(family, text):
    """The test above can tell them apart."""
    ids = calibration_sequences([text], small.tokenizer(), 12, LENGTH).ids
    recomputed = reference(FAMILIES[family](), ids, 0.5)
    original = reference(FAMILIES[family](), ids, 0.5, recompute=False)
    first, second = stack_names(FAMILIES[family]())
    for name, keep in recomputed.items():
        alike = float((keep == original[name]).float().mean())
        assert (alike == 1) if name.startswith(f"{first}.") else (alike < 0.99), name
    assert any(name.startswith(f"{second}.") for name in recomputed)


@pytest.mark.parametrize(
    "chosen",
    [
        {"sparsity": 0.3},
        {"per": "layer"},
        {"pattern": "2:4"},
        {"pattern": "4:8", "algorithm": "magnitude"},
        {"pattern": "1:4", "sparsity": 0.75},
        {"algorithm": "magnitude"},
        {"algorithm": "magnitude", "per": "row", "sparsity": 0.29},
        {"ratios": {"down_proj": 0.75, r".*layers\.1\.self_attn.*": 0.0, "v_proj,k_proj": 0.25}},
    ],
    ids=str,
)
def test_the_folder_holds_what_the_report_says(chosen, options, text, tmp_path):
    calibration = () if chosen.get("algorithm") == "magnitude" else options.calibration
    options = dataclasses.replace(options, **chosen, calibration=calibration)
    seen = []
    plan = sparsify_model(str(small.llama()), tmp_path / "s", options, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    report = sparsify_model(
        str(small.llama()), tmp_path / "s", options, progress=lambda *step: seen.append(step)
    )
    assert seen == [(0, 2, ""), (1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    assert not (tmp_path / "s.partial").exists()
    stored, original = tensors_of(tmp_path / "s"), tensors_of(small.llama())
    assert stored.keys() == original.keys()
    kept = [key for key in original if not key.endswith("_proj.weight")]
    assert all(torch.equal(stored[key], original[key]) for key in kept)
    assert len(report.layers) == len(plan.layers) == 14
    for layer, planned in zip(report.layers, plan.layers, strict=True):
        value, weight = stored[f"{layer.name}.weight"], original[f"{layer.name}.weight"]
        zero = value == 0
        assert layer.shape == tuple(weight.shape)
        assert torch.equal(value, weight.masked_fill(zero, 0))
        assert layer.sparsity == planned.sparsity == pytest.approx(float(zero.double().mean()))
        assert layer.weight_error == pytest.approx(float((value - weight).norm() / weight.norm()), rel=1e-4)
        assert (layer.output_error == 0) == (layer.sparsity == 0)
        assert 0 <= layer.output_error < 1
        ratio = options.ratio
        for pattern, share in options.ratios.items():
            inside = pattern.startswith(".") and "layers.1.self_attn" in layer.name
            if inside or layer.name.endswith(tuple(pattern.split(","))):
                ratio = share
        if options.pattern:
            m = int(options.pattern[2:])
            assert ((~zero).view(-1, m).sum(1) == int(options.pattern[0])).all()
        elif options.compared == "row":
            assert (zero.sum(1) == count(weight.shape[1], ratio)).all()
        else:
            assert int(zero.sum()) == count(weight.numel(), ratio)
            assert len(zero.sum(1).unique()) > 1
    weights = sum(original[key].numel() for key in original if key not in kept)
    zeros = sum(int((stored[key] == 0).sum()) for key in original if key not in kept)
    assert (report.weights, report.kept_weights) == (weights, sum(original[key].numel() for key in kept))
    assert report.sparsity == plan.sparsity == pytest.approx(zeros / weights)
    assert report.perplexity_before == pytest.approx(perplexity(small.llama(), text), rel=1e-5)
    assert report.perplexity_after == pytest.approx(perplexity(tmp_path / "s", text), rel=1e-5)
    assert report.evaluation_tokens == 10 * (LENGTH - 1)
    assert report.calibration_tokens == (12 * LENGTH if calibration else 0)
    written = json.loads((tmp_path / "s" / "sparsity_report.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(report)))
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config == json.loads((small.llama() / "config.json").read_text())
    assert (tmp_path / "s" / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "s")
    assert tokenizer("cat").input_ids == small.tokenizer()("cat").input_ids


def test_magnitude_takes_the_smallest_of_a_layer(plain, tmp_path):
    report = sparsify_model(str(small.llama()), tmp_path / "s", plain)
    weight = tensors_of(small.llama())["model.layers.1.mlp.up_proj.weight"]
    value = tensors_of(tmp_path / "s")["model.layers.1.mlp.up_proj.weight"]
    assert weight[value == 0].abs().max() < weight[value != 0].abs().min()
    assert report.layers[0].output_error is None
    assert report.perplexity_after is None
    assert report.calibration is None


def test_wanda_loses_less_of_the_outputs_than_magnitude(options, tmp_path):
    magnitude = dataclasses.replace(options, algorithm="magnitude", per="row", calibration=())
    a = sparsify_model(str(small.llama()), tmp_path / "a", magnitude)
    b = sparsify_model(str(small.llama()), tmp_path / "b", options)
    pairs = list(zip(a.layers, b.layers, strict=True))
    assert sum(after.output_error < before.output_error for before, after in pairs) >= 9
    assert all(after.weight_error >= before.weight_error for before, after in pairs)


def test_types_shards_and_tied_embeddings_stay(options, text, tmp_path):
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(small.llama()).config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    small.tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    report = sparsify_model(str(tmp_path / "model"), tmp_path / "s", options)
    assert report.perplexity_after == pytest.approx(perplexity(tmp_path / "s", text), rel=1e-5)
    stored, original = tensors_of(tmp_path / "s"), tensors_of(tmp_path / "model")
    assert stored.keys() == original.keys()
    assert "lm_head.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("streamed", [True, False])
def test_an_interrupted_run_goes_on_where_it_was(step, streamed, options, plain, tmp_path):
    options = options if streamed else plain
    model, output = str(small.llama()), tmp_path / "s"
    whole = sparsify_model(model, tmp_path / "whole", options)
    with pytest.raises(Stop):
        sparsify_model(model, output, options, progress=stop_at(step))
    assert not output.exists()
    with pytest.raises(ConfigError, match=r"s\.partial holds an unfinished run; go on with --resume"):
        sparsify_model(model, output, options)
    other = dataclasses.replace(options, sparsity=0.25, ratios={"down_proj": 0.1})
    with pytest.raises(ConfigError, match=r"other options: ratios was \{\}.*sparsity was None, is 0\.25"):
        sparsify_model(model, output, other, resume=True)
    done = []
    resumed = sparsify_model(model, output, options, resume=True, progress=lambda *s: done.append(s[0]))
    assert done == (list(range(step, 3)) if streamed else list(range(15)))
    assert files_of(output) == files_of(tmp_path / "whole")
    assert resumed.perplexity_after == whole.perplexity_after
    assert not (tmp_path / "s.partial").exists()


def test_an_encoder_resumes_too(options, tmp_path):
    folder = saved(FAMILIES["bert"](), tmp_path / "model")
    options = dataclasses.replace(options, eval_text=None)
    sparsify_model(str(folder), tmp_path / "whole", options)
    with pytest.raises(Stop):
        sparsify_model(str(folder), tmp_path / "s", options, progress=stop_at(1))
    sparsify_model(str(folder), tmp_path / "s", options, resume=True)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def test_an_encoder_saved_without_its_pooler(options, tmp_path):
    config = FAMILIES["bert"]().config
    folder = saved(transformers.BertForMaskedLM(config), tmp_path / "model")
    assert not any("pooler" in key for key in tensors_of(folder))
    report = sparsify_model(str(folder), tmp_path / "s", dataclasses.replace(options, eval_text=None))
    stored, original = tensors_of(tmp_path / "s"), tensors_of(folder)
    assert stored.keys() == original.keys()
    assert (stored["bert.encoder.layer.1.output.dense.weight"] == 0).float().mean() == 0.5
    assert torch.equal(
        stored["cls.predictions.transform.dense.weight"], original["cls.predictions.transform.dense.weight"]
    )
    assert len(report.layers) == 12


def test_one_layer_of_an_encoder_is_in_memory_at_a_time(tmp_path):
    folder = saved(FAMILIES["bert"](), tmp_path / "model")
    with Source(str(folder)) as source:
        stack, ids = Stack(source), torch.arange(4, 28).view(2, 12)
        (hidden,) = stack.enter(ids)
        want = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            states = want(ids, output_hidden_states=True).hidden_states
        for index in range(2):
            torch.testing.assert_close(hidden, states[index], rtol=1e-5, atol=1e-5)
            with stack.layer(index) as layer:
                loaded = {id(p) for p in stack.model.parameters() if not p.is_meta}
                assert loaded == {id(parameter) for parameter in layer.parameters()}
                stack.advance(index, hidden)
        torch.testing.assert_close(hidden, states[2], rtol=1e-5, atol=1e-5)


def test_sparsifying_has_one_layer_in_memory_at_a_time(options, tmp_path, monkeypatch):
    from modicum.compress import sparsify

    seen, weights = [], {}

    class Watched(Stack):
        def advance(self, index, *args, **kwargs):
            layers = [
                at for at, one in enumerate(self.layers) if not all(p.is_meta for p in one.parameters())
            ]
            seen.append((index, layers))
            if (len(self.layers), index) not in weights:
                weights[len(self.layers), index] = held()
            return super().advance(index, *args, **kwargs)

    def held():
        """Bytes of the matrices that the MLPs of these models have, and nothing else here."""
        every = (one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))
        return sum(one.nbytes for one in every if not one.is_meta and one.shape in ((56, 32), (32, 56)))

    monkeypatch.setattr(sparsify, "Stack", Watched)
    few = dataclasses.replace(options, sequences=2, eval_sequences=2)
    for depth in (2, 5):
        config = {"num_key_value_heads": 2, "num_hidden_layers": depth, "intermediate_size": 56}
        folder = saved(decoder("LlamaConfig", **config), tmp_path / f"model-{depth}")
        gc.collect()
        sparsify_model(str(folder), tmp_path / f"s-{depth}", few)
    assert all(layers == [index] for index, layers in seen)
    assert {index for index, _ in seen} == set(range(5))
    assert max(weights.values()) == 3 * 56 * 32 * 4, "three float32 matrices of one layer, whatever the depth"


def test_models_without_a_stack_go_by_magnitude(options, plain, tmp_path):
    torch.manual_seed(0)
    albert = transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(
            vocab_size=101,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    )
    folder = saved(albert, tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"AlbertForSequence.* has no stack of: use the algorithm magnitude"
    ):
        sparsify_model(str(folder), tmp_path / "s", dataclasses.replace(options, eval_text=None))
    report = sparsify_model(str(folder), tmp_path / "s", plain)
    names = {layer.name.rpartition(".")[2] for layer in report.layers}
    assert "query" in names
    assert not names & {"pooler", "classifier"}
    assert type(albert).from_pretrained(tmp_path / "s")


def test_models_with_an_encoder_and_a_decoder_go_by_magnitude(options, plain, tmp_path):
    config = transformers.T5Config(vocab_size=101, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    folder = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "model")
    with pytest.raises(ConfigError, match="which T5Model has no stack of"):
        sparsify_model(str(folder), tmp_path / "s", dataclasses.replace(options, eval_text=None))
    report = sparsify_model(str(folder), tmp_path / "s", plain)
    assert {layer.name.partition(".")[0] for layer in report.layers} == {"encoder", "decoder"}


def test_joined_experts_are_refused_before_anything_is_written(options, plain, tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = saved(transformers.MixtralForCausalLM(config), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"does not store .*experts.*sparsify: magnitude"):
        sparsify_model(str(folder), tmp_path / "s", options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sparsify_model(str(folder), tmp_path / "s", plain).sparsity == pytest.approx(0.5)


def test_layers_given_more_than_hidden_states_are_refused(options, tmp_path, monkeypatch):
    """A model whose layers see something of each sequence, as those with embeddings for each layer do."""
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward

    def with_ids(self, input_ids=None, **more):
        return forward(self, input_ids=input_ids, seen_ids=input_ids, **more)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_ids)
    with pytest.raises(ConfigError, match="given more of a sequence than its hidden states"):
        sparsify_model(str(small.llama()), tmp_path / "s", options)


def test_excluded_layers_stay_and_the_last_ratio_counts(plain, tmp_path):
    chosen = dataclasses.replace(
        plain, exclude=("down_proj",), ratios={"mlp.up_proj": 0.25, r".*layers\.0\..*": 0.75, "q_proj": 0.0}
    )
    report = sparsify_model(str(small.llama()), tmp_path / "s", chosen)
    found = {layer.name.removeprefix("model.layers."): layer.sparsity for layer in report.layers}
    assert len(found) == 12
    assert (found["0.mlp.up_proj"], found["1.mlp.up_proj"]) == (0.75, 0.25)
    assert (found["0.self_attn.q_proj"], found["0.self_attn.k_proj"]) == (0.0, 0.75)
    assert found["1.self_attn.v_proj"] == 0.5


def test_text_from_a_data_set(options, text, tmp_path):
    lines = text.read_text().splitlines()
    (tmp_path / "set").mkdir()
    small.write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": line, "n": 1} for line in lines])
    chosen = dataclasses.replace(
        options, calibration=(f"hub:{tmp_path / 'set'}",), evaluate=False, eval_text=None
    )
    report = sparsify_model(str(small.llama()), tmp_path / "s", chosen)
    assert report.calibration == f"hub:{tmp_path / 'set'}"
    whole = dataclasses.replace(chosen, calibration=(text,))
    sparsify_model(str(small.llama()), tmp_path / "w", whole)
    assert report.calibration_tokens == 12 * LENGTH
    with pytest.raises(
        ConfigError, match=r"hub:nobody/nothing cannot be read \(train split\).*Write hub:NAME"
    ):
        sparsify_model(
            str(small.llama()),
            tmp_path / "p",
            dataclasses.replace(chosen, calibration=("hub:nobody/nothing",)),
        )


def test_less_text_than_was_asked_for_is_noted(options, tmp_path):
    (tmp_path / "short.txt").write_text("a little text\n" * 6)
    chosen = dataclasses.replace(
        options, calibration=(tmp_path / "short.txt",), evaluate=False, eval_text=None
    )
    report = sparsify_model(str(small.llama()), tmp_path / "s", chosen)
    assert report.calibration_tokens == 3 * LENGTH
    assert any("calibrated on 3 sequences of 24 tokens" in note for note in report.notes)
    (tmp_path / "short.txt").write_text("a little text")
    with pytest.raises(ConfigError, match=r"has 15 tokens, which is too short: one sequence takes 24"):
        sparsify_model(str(small.llama()), tmp_path / "p", chosen)
    bundled = dataclasses.replace(chosen, calibration=())
    report = sparsify_model(str(small.llama()), tmp_path / "b", bundled)
    assert "bundled task" in report.calibration
    assert "bundles" in report.notes[0]


def test_everything_wrong_is_said_at_once(options, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(small.llama(), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    wrong = dataclasses.replace(
        options, sparsity=50.0, sequences=0, sequence_length=500, exclude=("nothing",), per="lair",
        ratios={"down_prj": 0.5, "model.layers.0.self_attn.q_prj": 1.0, "lm_head": 0.2, "(": 0.2, "up_proj": -0.5},
        eval_text=tmp_path / "absent.txt", algorithm="wand",
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        sparsify_model(str(broken), tmp_path / "taken", wrong)
    for part in (
        "algorithm = 'wand' (did you mean 'wanda'?)",
        "per = 'lair' (did you mean 'layer'?)",
        "sparsity = 50.0, must be at least 0 and below 1; 50 % is 0.5",
        "ratios: up_proj = -0.5",
        "ratios: model.layers.0.self_attn.q_prj = 1.0, must be at least 0 and below 1",
        "ratios: no linear layer matches 'down_prj' (did you mean 'down_proj'",
        "did you mean 'model.layers.0.self_attn.q_proj'",
        "ratios: 'lm_head' matches lm_head, which stays as it is",
        "ratios: '(' is no regular expression",
        "sequences = 0, must be at least 1",
        "taken exists already",
        "exclude: no linear layer matches 'nothing'",
        "sequence_length = 500, the model takes at most 128 tokens",
        "NaN or infinite weights in model.layers.0.self_attn.q_proj, model.layers.1.mlp.up_proj",
    ):
        assert part in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    absent = dataclasses.replace(options, calibration=("x.txt", "y.txt"), eval_text="z.txt")
    with pytest.raises(ConfigError) as caught:
        sparsify_model(str(small.llama()), tmp_path / "s", absent)
    assert all(f"{name}.txt cannot be read: No such file" in str(caught.value) for name in "xyz")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"sparsity": 1.0}, "sparsity = 1.0, must be at least 0 and below 1"),
        ({"pattern": "4:4"}, "pattern = '4:4'; write N:M with 1 <= N < M"),
        ({"pattern": "4:2"}, "pattern = '4:2'; write N:M"),
        ({"pattern": "0:4"}, "pattern = '0:4'; write N:M"),
        ({"pattern": "half"}, "pattern = 'half'; write N:M"),
        ({"pattern": "3:5"}, r"runs of 5 inputs \(pattern 3:5\) do not divide model.layers.0.self_attn.q_proj \(32\)"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity = 0.6, but the pattern 2:4 zeroes 0.5"),
        ({"pattern": "2:4", "ratios": {"q_proj": 0.1}}, "ratios are for layers without a pattern"),
        ({"pattern": "2:4", "per": "row"}, "a pattern compares the weights of each run of 4"),
        ({"algorithm": "magnitude"}, "magnitude needs no calibration text"),
        ({"evaluate": False}, "an evaluation text without evaluation"),
        ({"exclude": (".*",)}, "no linear layer is left to sparsify"),
        ({"exclude": ("q_proj",), "ratios": {"q_proj": 0.1}}, "'q_proj' matches .*, which stays as it is"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_will_not_do(chosen, said, options, tmp_path):
    with pytest.raises(ConfigError, match=said):
        sparsify_model(str(small.llama()), tmp_path / "s", dataclasses.replace(options, **chosen))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_noticed(options, tmp_path):
    folder = saved(decoder("LlamaConfig", vocab_size=60), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"makes ids up to \d+, the model knows 60"):
        sparsify_model(str(folder), tmp_path / "s", options)


def test_positions_of_roberta_begin_behind_the_padding(options, tmp_path):
    folder = saved(FAMILIES["roberta"](), tmp_path / "model")
    chosen = dataclasses.replace(options, eval_text=None, sequences=2, sequence_length=64)
    with pytest.raises(ConfigError, match="the model takes at most 63 tokens"):
        sparsify_model(str(folder), tmp_path / "s", chosen)
    sparsify_model(str(folder), tmp_path / "s", dataclasses.replace(chosen, sequence_length=63))


def test_what_is_quantized_already_is_refused(options, tmp_path):
    quantize_model(
        str(small.llama()), tmp_path / "q", QuantizeOptions(algorithm="rtn", group_size=16, evaluate=False)
    )
    with pytest.raises(ConfigError, match=r"is quantized already \(modicum\).*sparsity = 2"):
        sparsify_model(str(tmp_path / "q"), tmp_path / "s", dataclasses.replace(options, sparsity=2))


def test_a_model_that_overflows_says_where(options, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(small.llama())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1e30
        model.model.layers[0].mlp.down_proj.weight *= 1e30
    folder = saved(model, tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.mlp\.down_proj: the calibration inputs hold NaN"
    ):
        sparsify_model(str(folder), tmp_path / "s", options)
    assert not (tmp_path / "s").exists()


def test_the_model_itself_is_never_overwritten(plain, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(small.llama(), model)
    before = tensors_of(model)
    with pytest.raises(ConfigError, match="the output is the model itself"):
        sparsify_model(str(model), tmp_path / "x" / ".." / "model", plain, overwrite=True)
    assert all(torch.equal(value, before[key]) for key, value in tensors_of(model).items())


def test_ratios_of_a_command_line():
    assert parse_ratios(["down_proj=0.4", "(?=x).*=0", "a=1", "a=0.5"]) == {
        "down_proj": 0.4,
        "(?=x).*": 0,
        "a": 0.5,
    }
    assert list(parse_ratios(["a=0.1", "b=0.2", "a=0.3"])) == ["b", "a"]
    with pytest.raises(ConfigError, match=r"ratio = 'x', 'y=', '=0.5', 'z=half'; write PATTERN=SHARE"):
        parse_ratios(["x", "y=", "=0.5", "z=half", "good=0.1"])


def test_it_is_a_public_name():
    assert modicum.sparsify_model is sparsify_model


def test_a_sparse_model_is_quantized_and_loaded_like_any_other(plain, tmp_path):
    sparsify_model(str(small.llama()), tmp_path / "s", plain)
    chosen = QuantizeOptions(algorithm="rtn", group_size=16, zero_point="none", evaluate=False)
    quantize_model(str(tmp_path / "s"), tmp_path / "q", chosen)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    sparse = tensors_of(tmp_path / "s")["model.layers.0.mlp.up_proj.weight"]
    assert (model.model.layers[0].mlp.up_proj.weight[sparse == 0] == 0).all()


@pytest.mark.shared_data
def test_the_embedded_model_on_stories(shared_data, tmp_path):
    import gzip

    for name, size in (("train", 150_000), ("valid", 40_000)):
        with gzip.open(shared_data / "tinystories" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            (tmp_path / f"{name}.txt").write_text(file.read(size), encoding="utf-8")
    lost = {}
    for algorithm, files in (("wanda", (tmp_path / "train.txt",)), ("magnitude", ())):
        options = SparsifyOptions(
            algorithm=algorithm, pattern="2:4", calibration=files, sequences=24, sequence_length=128,
            eval_text=tmp_path / "valid.txt", eval_sequences=12,
        )  # fmt: skip
        report = sparsify_model("embedded", tmp_path / algorithm, options)
        lost[algorithm] = report.perplexity_after - report.perplexity_before
    assert 0 < lost["wanda"] < 0.8 * lost["magnitude"]
