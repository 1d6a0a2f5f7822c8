"""Models exported to GGUF hold the same codes, and llama.cpp computes with them and with the same tokens."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from tests.compress import export_cases as cases
from tests.conftest import shared_folder

from modicum.compress.export import export_model
from modicum.errors import ConfigError
from modicum.models.loading import load_base, load_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
PROJECTIONS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
HOMES = {
    "4 bits": {"Q4_1"},
    "4 bits, group 64": {"Q4_1"},
    "4 bits, group 48": {"F16"},
    "4 bits, group 26": {"F16"},
    "3 bits": {"F16"},
    "2 bits": {"Q4_1"},
    "8 bits": {"F16"},
    "symmetric, tied, biases": {"Q4_0"},
    "symmetric 8 bits": {"Q8_0"},
    "integer zero-points, head too": {"Q4_1"},
    "tiles": {"F16"},
    "update on groups": {"Q4_1"},
    "update on tiles": {"F16"},
}


def read(file):
    """Every tensor as float32, in our names and our order of rows, and what each is stored as."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if "token" not in name}
    heads = {
        "attn_q": fields.get("llama.attention.head_count"),
        "attn_k": fields.get("llama.attention.head_count_kv"),
    }
    tensors, kinds = {}, {}
    for tensor in reader.tensors:
        found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)}
        if tensor.tensor_type.name == "Q4_1":
            blocks = tensor.data.reshape(len(tensor.data), -1, 20)
            found[f"{tensor.name}: minima"] = (
                blocks[:, :, 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
            )
        kinds[tensor.name] = tensor.tensor_type.name
        count = heads.get(tensor.name.split(".")[-2])
        for name, array in found.items():
            values = torch.from_numpy(array.copy())
            # llama.cpp rotates neighbouring rows: back to halves
            tensors[name] = (
                values.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2) if count else values
            )
    return tensors, kinds, fields


def place(name):
    """llama.cpp's name of one of our layers."""
    if name == "lm_head":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{PROJECTIONS[rest]}.weight"


@pytest.mark.parametrize("name", HOMES)
def test_the_file_holds_our_numbers(name, tmp_path):
    model = cases.CASES[name].model()
    result = export_model(model, cases.tokenizer(), tmp_path / "out", "gguf")
    tensors, kinds, _ = read(result.output)
    assert result.output == tmp_path / "out.gguf"
    assert result.exact
    errors = {}
    for layer, module in cases.low_bit(model).items():
        wanted, found = module.dequantized(), tensors[place(layer)]
        errors[layer] = float((found - wanted).norm() / wanted.norm())
        if kinds[place(layer)] == "F16":
            assert torch.equal(found, wanted.half().float())
        elif module.grid().offsets is None:
            assert torch.equal(found, wanted)
        else:
            (scales, offsets), middle = module.grid(), 2 ** (module.spec.bits - 1)
            group = module.spec.block[1]
            d, m = scales.half().float(), (offsets - middle * scales.float()).half().float()
            codes = module.unpacked_codes().float()
            assert torch.equal(found, codes * d.repeat_interleave(group, 1) + m.repeat_interleave(group, 1))
    assert {kinds[place(layer)] for layer in errors} == HOMES[name]
    assert result.max_weight_error == pytest.approx(max(errors.values()), rel=1e-3, abs=1e-9)
    # float16 keeps 11 binary digits
    assert result.max_weight_error < (0 if HOMES[name] & {"Q4_0", "Q8_0"} else 1e-3) + 1e-12
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)
    assert torch.equal(
        tensors["blk.1.ffn_norm.weight"], model.model.layers[1].post_attention_layernorm.weight
    )
    assert ("output.weight" in tensors) == (not model.config.tie_word_embeddings)


def test_eight_bits_on_request(tmp_path):
    model = cases.Case(8).model()
    result = export_model(model, cases.tokenizer(), tmp_path / "out.gguf", "gguf", allow_inexact=True)
    assert not result.exact
    tensors, kinds, _ = read(result.output)
    for layer, module in cases.low_bit(model).items():
        wanted = module.dequantized()
        assert kinds[place(layer)] == "Q8_0"
        assert float((tensors[place(layer)] - wanted).norm() / wanted.norm()) < 0.01
    assert 0.001 < result.max_weight_error < 0.01
    assert "moved to the grid of Q8_0" in result.notes[0]


def test_a_bfloat16_checkpoint_keeps_every_bit(tmp_path):
    model = cases.Case().model()
    for parameter in model.parameters():
        parameter.data = (parameter.data * 1e-4).bfloat16().float()
    tensors, kinds, _ = read(export_model(model, cases.tokenizer(), tmp_path / "out", "gguf").output)
    assert kinds["token_embd.weight"] == "BF16"
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)


def test_rotary_factors(tmp_path):
    model = cases.CASES["llama3 positions"].model()
    tensors, _, fields = read(export_model(model, cases.tokenizer(), tmp_path / "out", "gguf").output)
    plain = 500.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / tensors["rope_freqs.weight"], model.model.rotary_emb.inv_freq)
    assert fields["llama.rope.freq_base"] == 500.0
    plainer = export_model(cases.Case().model(), cases.tokenizer(), tmp_path / "plain", "gguf").output
    assert "rope_freqs.weight" not in read(plainer)[0]


def test_a_splitter_that_llama_cpp_does_not_know(tmp_path):
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = cases.tokenizer()
    known = tokenizer.backend_tokenizer.pre_tokenizer
    try:
        tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
        with pytest.raises(ConfigError, match="no name for how this tokenizer splits"):
            export_model(cases.Case().model(), tokenizer, tmp_path / "out", "gguf")
    finally:
        tokenizer.backend_tokenizer.pre_tokenizer = known
    assert list(tmp_path.iterdir()) == []


def test_biases_that_llama_cpp_does_not_know(tmp_path):
    model = cases.Case(kind="qwen3", options={"attention_bias": True}).model()
    with pytest.raises(ConfigError, match="a qwen3 GGUF file has no bias for"):
        export_model(model, cases.tokenizer(), tmp_path / "out", "gguf")


@contextlib.contextmanager
def llama(file):
    """The file opened by llama.cpp."""
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    opened = library.Llama(
        str(file),
        type_k=0,
        type_v=0,
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
    )
    try:
        yield opened
    finally:
        opened.close()


def llama_logits(opened, ids):
    opened.reset()
    opened.eval(list(map(int, ids)))
    return np.array(opened.scores[: len(ids)])


class LlamaCppLinear(torch.nn.Module):
    """A product as llama.cpp computes it: inputs in float16, or in 8 bits with a float16 scale for every 32.

    Minima of `Q4_1` meet the sums of the rounded inputs, which are float16 as well.
    """

    def __init__(self, weight, kind, minima, bias):
        super().__init__()
        self.weight, self.kind, self.minima, self.bias = weight, kind, minima, bias

    def forward(self, x):
        if self.kind == "F16":
            return torch.nn.functional.linear(x.half().float(), self.weight, self.bias)
        blocks = x.unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(scale == 0, 0, blocks / scale).round()
        weight, y = self.weight, 0.0
        if self.minima is not None:
            weight = weight - self.minima.repeat_interleave(32, 1)
            y = ((codes.sum(-1) * scale.squeeze(-1)).half().float()) @ self.minima.T
        y = y + (codes * scale.half().float()).flatten(-2) @ weight.T
        return y if self.bias is None else y + self.bias


def as_llama_cpp(model, file):
    """`model` with the weights of the file and llama.cpp's products."""
    tensors, kinds, _ = read(file)
    for layer, module in cases.low_bit(model).items():
        name = place(layer)
        product = LlamaCppLinear(tensors[name], kinds[name], tensors.get(f"{name}: minima"), module.bias)
        model.set_submodule(layer, product)
    return model


@pytest.mark.parametrize("name", [*HOMES, "mistral", "qwen2", "qwen3", "llama3 positions"])
def test_llama_cpp_computes_our_logits(name, tmp_path):
    model, given = cases.CASES[name].model(), cases.batch(padded=0)
    result = export_model(model, cases.tokenizer(), tmp_path / "out", "gguf")
    with llama(result.output) as opened:
        found = llama_logits(opened, given.ids[0])
    # its rounding of inputs is all there is between us, and it costs a few percent in a random model
    assert cases.relative(found, cases.logits(model, given)[0]) < (
        0.005 if HOMES.get(name) == {"F16"} else 0.08
    )
    wanted = cases.logits(as_llama_cpp(model, result.output), given)[0]
    # a value between two codes may fall to the other one in another order of additions, and its token with it
    errors = [cases.relative(*rows) for rows in zip(found, wanted, strict=True)]
    assert np.median(errors) < 1e-3
    assert max(errors) < 0.03


def sentence_piece_like():
    """A tokenizer in the manner of SentencePiece: words start with ▁, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, normalizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=cases.VOCABULARY, special_tokens=special, max_token_length=5)
    inner.train_from_iterator(["the cat and the hat sat on the mat, then the cat thanks them"] * 3, trainer)
    stated = json.loads(inner.to_str())
    # bytes are plain tokens of the vocabulary
    stated["added_tokens"] = stated["added_tokens"][:3]
    inner = Tokenizer.from_str(json.dumps(stated))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_tokens_of_a_sentence_piece_like_tokenizer(tmp_path):
    tokenizer = sentence_piece_like()
    result = export_model(cases.Case().model(), tokenizer, tmp_path / "out", "gguf")
    fields = gguf.GGUFReader(result.output).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [2, 3, 3, 6]
    with llama(result.output) as opened:
        for text in ("the cat thanks them", "that hat  Zoë and 😀 then", "on", "thatthe matthen"):
            ids = tokenizer(text).input_ids
            assert opened.tokenize(text.encode(), add_bos=True, special=True) == ids
            assert opened.detokenize(ids, special=False).decode().strip() == text


TEXTS = {
    "embedded": 'The quick brown fox, 1234 times; it’s "fine"\n ok<|user|>hé 😀',
    "stories260k": "Once upon a time, there was a  little girl named Zoë 😀.\n She's 12.",
}


@pytest.mark.parametrize("bits", [None, 4], ids=["dense", "4 bits"])
@pytest.mark.parametrize("name", TEXTS)
def test_real_models(name, bits, tmp_path):
    folder = "embedded" if name == "embedded" else str(shared_folder() / "models" / name)
    if name != "embedded" and not (shared_folder() / "models" / name).is_dir():
        pytest.skip(f"no {name} beside the repository")
    model, tokenizer = load_base(folder, dtype="float32"), load_tokenizer(folder)
    if bits:
        for layer, linear in list(model.named_modules()):
            if isinstance(linear, torch.nn.Linear) and layer != "lm_head" and linear.in_features % 32 == 0:
                model.set_submodule(layer, cases.Case(bits).layer(linear))
    result = export_model(model, tokenizer, tmp_path / "out", "gguf")
    ids = tokenizer(TEXTS[name]).input_ids
    with llama(result.output) as opened:
        assert opened.tokenize(TEXTS[name].encode(), add_bos=True, special=True) == ids
        assert opened.detokenize(ids, special=True).decode().removeprefix("<s> ") == TEXTS[name]
        found = llama_logits(opened, ids)
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        assert cases.relative(found, wanted) < (0.02 if bits else 0.005)
        start = ids[:12]
        continued = model.generate(torch.tensor([start]), max_new_tokens=10, do_sample=False)[0].tolist()
        tokens = list(start)
        while len(tokens) < len(continued):
            tokens.append(int(llama_logits(opened, tokens)[-1].argmax()))
    assert tokens == continued
