"""Values in 8 and 4 bits: small, off by what the record says, and never silently wrong."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft import LoraConfig, get_peft_model
from tests import models_for_tests as models

import modicum
from modicum.cli import main
from modicum.errors import ConfigError, CorruptAdapterError
from modicum.store import Store, low_bit
from modicum.store.convert import export_adapter
from modicum.store.files import load_adapter, read_adapter, save_adapter
from modicum.store.front import HEADER_BYTES, Front, pad
from modicum.store.inspection import inspect
from modicum.store.layout import from_text, to_text
from modicum.store.record import Section, build, decode, encode, peek

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = pytest.mark.parametrize("dtype", low_bit.BITS)


def cores(names, r, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(r, r)).astype(np.float32) * 1e-2 for name in names}


def exact(tensors):
    """All values of the tensors in the order of their record, flat."""
    return np.concatenate(
        [tensors[name].ravel() for name in build("lora_xs", tensors, "float32").layout.names]
    )


def test_a_gpt3_adapter_takes_about_24_kib():
    names = [f"h.{i}.attn.{m}.R" for i in range(96) for m in ("q", "v")]
    made = {
        dtype: encode(build("lora_xs", cores(names, 16), dtype)) for dtype in ("bfloat16", "int8", "int4")
    }
    sizes = {dtype: len(data) / 1024 for dtype, data in made.items()}
    assert sizes["bfloat16"] > 96
    assert 24 < sizes["int4"] < 25.1  # 24 KiB of codes, 768 bytes of scales, and the rest
    assert 48 < sizes["int8"] < 49.1
    assert peek(made["int4"]).rounding.relative < 0.11
    assert peek(made["int8"]).rounding.relative < 0.008


any_tensors = st.dictionaries(
    st.sampled_from([f"layers.{i}.{p}" for i in range(3) for p in "RAB"]),
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, max_side=12),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
        | st.floats(-2, 2, width=32, allow_subnormal=False),
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(any_tensors, st.sampled_from(list(low_bit.BITS)))
def test_a_record_is_off_by_what_it_says(tensors, dtype):
    data = encode(build("lora_xs", tensors, dtype))
    read = decode(data)
    if not tensors:
        assert read.floats().size == 0
        return
    wanted, got = exact(tensors).astype(np.float64), read.floats()
    assert np.isfinite(got).all()
    off = np.abs(wanted - got)
    assert peek(data).rounding == read.rounding
    assert read.rounding.largest == off.max()
    assert read.rounding.relative * np.linalg.norm(wanted) == pytest.approx(np.linalg.norm(off), rel=1e-12)
    # no block is worse than with the scale that takes its largest value to the highest code
    start = 0
    for length in read.layout.blocks:
        part = slice(start, start + length)
        step = np.abs(wanted[part]).max() / (2 ** (low_bit.BITS[dtype] - 1) - 1)
        most = step * (0.5 + 2**-8 * 2 ** low_bit.BITS[dtype] / 2)
        assert np.linalg.norm(off[part]) <= np.sqrt(length) * most + 1e-37
        start += length


@settings(max_examples=60, deadline=None)
@given(any_tensors, st.sampled_from(list(low_bit.BITS)))
def test_what_was_quantized_once_stays_as_it_is(tensors, dtype):
    once = build("lora_xs", tensors, dtype)
    again = build("lora_xs", dict(once.tensors()), dtype)
    assert np.array_equal(again.floats(), once.floats())
    assert again.rounding.largest == 0


def test_blocks_never_reach_into_another_tensor():
    assert low_bit.block_lengths([300, 0, 5, 128]).tolist() == [128, 128, 44, 5, 128]
    assert low_bit.block_lengths([]).tolist() == []
    tensors = {"a.0.R": np.full((3, 3), 1e-6, np.float32), "a.1.R": np.full((3, 3), 1e6, np.float32)}
    for name, values in build("lora_xs", tensors, "int4").tensors():
        assert np.allclose(values, tensors[name], rtol=0.01)


@KINDS
def test_a_better_scale_is_found(dtype):
    rng = np.random.default_rng(1)
    values = rng.standard_t(4, size=128 * 64).astype(np.float32)
    lengths = low_bit.block_lengths([values.size])
    rows, highest = values.reshape(-1, 128), 2 ** (low_bit.BITS[dtype] - 1) - 1
    step = np.abs(rows).max(1, keepdims=True) / highest
    plain = np.linalg.norm(np.rint(rows / step) * step - rows)
    found = low_bit.dequantize(low_bit.quantize(values, lengths, dtype), lengths, dtype)
    assert np.linalg.norm(found - values) < {"int4": 0.85, "int8": 0.99}[dtype] * plain


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_records_of_the_first_format_stay_readable(dtype):
    data = (FIXTURES / f"version_1_{dtype}.modicum").read_bytes()
    read = decode(data)
    rng = np.random.default_rng(3)
    wanted = {
        f"model.layers.{i}.self_attn.{w}_proj.R": rng.integers(-64, 64, size=(3, 3)).astype(np.float32) / 8
        for i in range(3)
        for w in "qv"
    }
    assert {name: value.tolist() for name, value in read.tensors()} == {
        n: v.tolist() for n, v in wanted.items()
    }
    assert (read.method, read.dtype, read.task_type, read.rounding) == ("lora_xs", dtype, "SEQ_CLS", None)
    assert (read.config, read.metadata) == ({"r": 3, "alpha": 6}, {"user": "ada"})
    assert [(s.name, s.dtype, s.shape) for s in read.sections] == [("score.weight", "bfloat16", (2, 3))]
    assert peek(data).version == 1
    assert encode(read) == data  # written as ever, so digests in stores stay


@pytest.fixture(scope="module", params=low_bit.BITS)
def sample(request) -> bytes:
    head = Section("classifier.weight", "float32", (2, 3), np.arange(6, dtype="<f4"))
    names = [f"layers.{i}.R" for i in range(3)]
    made = build("lora_xs", cores(names, 7), request.param, sections=(head,), config={"r": 7})
    return encode(made)


def test_every_flipped_bit_and_every_truncation_is_refused(sample):
    assert peek(sample).version == 2
    for place in range(len(sample)):
        for bit in range(8):
            damaged = bytearray(sample)
            damaged[place] ^= 1 << bit
            with pytest.raises(CorruptAdapterError):
                decode(bytes(damaged))
        with pytest.raises(CorruptAdapterError):
            decode(sample[:place])


def sealed(front, body):
    return front.sealed(bytes(body)) + bytes(body)


def refused_or_right(data):
    """Decodes bytes whose check sums hold; what comes out can be used, and little memory was."""
    tracemalloc.start()
    try:
        read = decode(data)
        assert encode(read)
        assert np.isfinite(read.floats()).all()
        assert sum(value.size for _, value in read.tensors()) == read.layout.size
        assert all(section.array() is not None for section in read.sections)
    except CorruptAdapterError:
        pass
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 3_000_000


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bytes_that_were_made_up_are_refused_or_right(sample, data):
    front, body = Front.read(sample), bytearray(sample[HEADER_BYTES:])
    sizes = st.integers(0, 80) | st.integers(0, 2**32 - 1)
    fields = {
        "values": sizes | st.integers(0, 2**64 - 1), "tensors": sizes, "packed": sizes, "unpacked": sizes,
        "blocks": sizes, "dtype": st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
    }  # fmt: skip
    changed = data.draw(st.dictionaries(st.sampled_from(list(fields)), st.none(), max_size=2))
    front = dataclasses.replace(front, **{name: data.draw(fields[name]) for name in changed})
    for _ in range(data.draw(st.integers(0, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # as many bytes as the header says, where that is possible
        wanted = pad(front.packed) + pad(front.value_bytes) + front.section_bytes
        body = (body + bytes(min(max(0, wanted - len(body)), 4096)))[: max(wanted, 0)]
    refused_or_right(sealed(front, body))


words = st.sampled_from(
    ["config", "metadata", "rounding", "sections", "task_type", "basis_fingerprint", "other", "layers."]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10) | st.integers() | words
    | st.sampled_from(["float32", "bool", "int4"]) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    about=st.dictionaries(words, json_values, max_size=3) | json_values,
    runs=json_values
    | st.lists(st.tuples(words, st.integers(-1, 2**40), st.integers(-1, 2**40), json_values)),
    values=st.integers(0, 300),
    dtype=st.sampled_from(["float16", "int8", "int4"]),
    tensors=st.integers(0, 400),
    rest=st.binary(max_size=64),
)
def test_descriptions_that_were_made_up_are_refused_or_right(about, runs, values, dtype, tensors, rest):
    text = f"{json.dumps(about)}\n{json.dumps(runs)}".encode()
    packed = zlib.compress(text)
    front = Front(dtype, tensors, values, len(packed), len(text), len(rest) // 8 * 8, "lora_xs", tensors)
    body = packed.ljust(pad(len(packed)), b"\0") + bytes(pad(front.value_bytes)) + rest[: len(rest) // 8 * 8]
    refused_or_right(sealed(front, body))


def test_scales_that_are_not_finite_and_bits_behind_the_end_are_refused():
    made = build("lora_xs", cores(["a.R"], 3), "int4")
    for place, bits in ((1, 0x7F), (len(made.values) - 1, 0x10)):
        values = made.values.copy()
        values[place] |= bits
        values[0] |= 0x80
        with pytest.raises(CorruptAdapterError, match="infinite scales"):
            encode(dataclasses.replace(made, values=values))
    with pytest.raises(CorruptAdapterError, match="for 7 bytes of int4"):
        encode(dataclasses.replace(made, values=made.values[:-1]))


def test_a_list_of_nothing_is_not_gone_through():
    with pytest.raises(CorruptAdapterError, match="range 0 to 1099511627776"):
        from_text(json.dumps([["a.", 0, 1 << 40, []]]), 10)


def test_a_description_that_unpacks_to_much_is_refused_unread():
    bomb = zlib.compress(bytes(1 << 26), 9)
    front = Front("int4", 0, 0, len(bomb), 1 << 26, 0, "lora_xs", 0)
    refused_or_right(sealed(front, bomb.ljust(pad(len(bomb)), b"\0")))
    many = to_text(("a.0.x", "a.1.x"), ((0,), (0,))).replace("0,1", "0,4000000")
    text = f"{{}}\n{many}".encode()
    packed = zlib.compress(text)
    front = Front("int4", 4_000_001, 0, len(packed), len(text), 0, "lora_xs", 0)
    refused_or_right(sealed(front, packed.ljust(pad(len(packed)), b"\0")))
    with pytest.raises(ConfigError, match="at most"):
        encode(build("lora_xs", {}, metadata={"text": "x" * (1 << 24)}))


@KINDS
def test_many_records_become_one_block(tmp_path, dtype):
    names = [f"layers.{i}.R" for i in range(4)]
    made = [build("lora_xs", cores(names, 12, seed), dtype) for seed in range(5)]
    with Store(tmp_path / "store", create=True) as store:
        store.put_many([(f"u{n}", one) for n, one in enumerate(made)])
        assert store.show("u3").dtype == dtype
        assert store.get("u3") == made[3]
        stack = store.get_many([f"u{n}" for n in (4, 0, 4)])
        store.put("wide", build("lora_xs", cores(names, 12)))
        with pytest.raises(ConfigError, match=r"different are wide@1 \(lora_xs, bfloat16"):
            store.get_many(["u1", "wide"])
    wanted = np.stack([made[n].floats() for n in (4, 0, 4)])
    assert np.array_equal(stack.floats(), wanted)
    assert np.array_equal(stack.tensor().numpy(), wanted)
    assert torch.equal(stack.tensor(torch.bfloat16), torch.from_numpy(wanted).bfloat16())


@KINDS
@pytest.mark.parametrize("method", ["lora_xs", "lora"])
def test_an_adapter_is_loaded_from_low_bits(tmp_path, method, dtype, capsys):
    config = {
        "lora_xs": modicum.LoraXSConfig(r=6, init_weights=False),
        "lora": LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"),
    }[method]
    model = get_peft_model(models.llama(), config).eval()
    saved = save_adapter(model, tmp_path / "exact", dtype="float32")
    written = export_adapter(model, tmp_path / "small", "modicum", dtype=dtype)
    assert peek(written.output).value_bytes < saved.value_bytes * {"int8": 0.28, "int4": 0.16}[dtype]
    found = inspect(tmp_path / "small.modicum")
    assert found.dtypes == (dtype,)
    trained, stored = read_adapter(saved.path)[1], read_adapter(tmp_path / "small.modicum")[1]
    off = max(float((trained[name] - stored[name]).abs().max()) for name in trained)
    assert off == pytest.approx(found.rounding.largest)
    assert 0 < off < 0.2 * max(float(value.abs().max()) for value in trained.values())
    loaded = load_adapter(models.llama(), tmp_path / "small.modicum")
    with torch.no_grad():
        base, exactly, low = (
            m(input_ids=models.tokens()).logits for m in (models.llama().eval(), model, loaded)
        )
    assert (low - exactly).norm() < {"int8": 0.02, "int4": 0.3}[dtype] * (base - exactly).norm()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["inspect", str(tmp_path / "small.modicum")])
    said = capsys.readouterr().out
    assert dtype in said
    assert "of the norm" in said
