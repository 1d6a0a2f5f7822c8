"""The compact record: small, exact, and never silently wrong."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modicum.errors import ConfigError, CorruptAdapterError
from modicum.store import record
from modicum.store.layout import from_text, natural, to_text
from modicum.store.numbers import to_floats, to_storage
from modicum.store.record import Record, Section, build, decode, encode, peek

LLAMA = [*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
ROBERTA = ["attention.self.query", "attention.self.value", "attention.output.dense", "output.dense"]
SHAPES = {
    "llama-2-7b": [f"model.layers.{i}.{m}.R" for i in range(32) for m in LLAMA],
    "roberta-large": [f"roberta.encoder.layer.{i}.{m}.R" for i in range(24) for m in ROBERTA],
    "embedded": [f"model.layers.{i}.{m}.R" for i in range(6) for m in LLAMA],
}
#: what a real adapter says about itself
ABOUT = {
    "config": {
        "r": 8,
        "alpha": 8.0,
        "target_modules": sorted(m.split(".")[-1] for m in LLAMA),
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 8},
    },
    "task_type": "CAUSAL_LM",
    "base_fingerprint": "sha256:" + "5f" * 32,
    "basis_fingerprint": [round(1.2345678 * i - 7, 5) for i in range(16)],
    "recipe_digest": "blake2b:" + "a1" * 32,
    "metadata": {"user": "0b6c5a3e-54dd-4c43-8f0c-1d2a54c2a2f9", "created": "2026-01-01T12:00:00+00:00"},
}


def adapter(names, r, dtype="bfloat16", seed=0, **about):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=(r, r)).astype(np.float32) * 1e-2 for name in names}
    return build("lora_xs", tensors, dtype, **about)


@pytest.mark.parametrize(
    ("shape", "r"),
    [("llama-2-7b", r) for r in (4, 8, 16)]
    + [("roberta-large", r) for r in (4, 8, 12, 16, 20, 25)]
    + [("embedded", r) for r in (1, 4, 8)],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_container_stays_within_2_percent_and_1_kib(shape, r, dtype):
    names = SHAPES[shape]
    data = encode(adapter(names, r, dtype, **ABOUT))
    payload = len(names) * r * r * 2
    assert len(data) <= 1.02 * payload + 1024
    header = peek(data)
    assert (header.bytes, header.value_bytes, header.section_bytes) == (len(data), payload, 0)
    assert header.container_bytes == len(data) - payload


def test_the_published_counts():
    sizes = [adapter(SHAPES["roberta-large"], r).layout.size for r in (4, 8, 12, 16, 20, 25)]
    assert sizes == [1536, 6144, 13824, 24576, 38400, 60000]
    assert adapter(SHAPES["llama-2-7b"], 16).layout.size == 57344


def test_a_million_gpt3_adapters_take_a_thousandth_more_than_their_numbers():
    names = [f"h.{i}.attn.{m}.R" for i in range(96) for m in ("q", "v")]
    size = len(encode(adapter(names, 16, **ABOUT)))
    assert 96 * 1024 < size < 1.011 * 96 * 1024


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_come_back_flat_and_exact_after_one_rounding(dtype):
    made = adapter(SHAPES["embedded"], 3, dtype, **ABOUT)
    read = decode(encode(made))
    assert read.values.ndim == 1
    assert not read.values.flags.owndata
    assert not read.values.flags.writeable
    assert np.array_equal(read.values, made.values)
    assert dataclasses.asdict(read)["config"] == ABOUT["config"]
    assert read.basis_fingerprint == ABOUT["basis_fingerprint"]
    assert read == made
    for (name, got), (wanted_name, wanted) in zip(read.tensors(), made.tensors(), strict=True):
        assert name == wanted_name
        assert got.shape == (3, 3)
        assert np.array_equal(got, wanted)


def test_the_same_adapter_has_the_same_bytes_whatever_the_order_of_its_tensors():
    names = SHAPES["embedded"]
    tensors = {name: np.full((2, 2), float(i), np.float32) for i, name in enumerate(names)}
    turned = dict(reversed(tensors.items()))
    assert encode(build("lora_xs", tensors)) == encode(build("lora_xs", turned))


def test_layers_are_in_natural_order():
    made = adapter(SHAPES["llama-2-7b"], 1)
    assert [name.split(".")[2] for name in made.layout.names[::7]] == [str(i) for i in range(32)]
    assert sorted(["a.10", "a.9", "a"], key=natural) == ["a", "a.9", "a.10"]


finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60)
@given(
    hnp.arrays(
        np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_bfloat16_rounds_as_torch_does(values):
    wanted = torch.from_numpy(values).to(torch.bfloat16)
    if not torch.isfinite(wanted).all():
        with pytest.raises(ConfigError, match="float32"):
            to_storage(values, "bfloat16")
        return
    stored = to_storage(values, "bfloat16")
    assert np.array_equal(stored.view(np.int16), wanted.view(torch.int16).numpy())
    assert np.array_equal(to_floats(stored, "bfloat16"), wanted.float().numpy())


def test_what_overflows_float16_says_to_use_bfloat16():
    with pytest.raises(ConfigError, match=r"7e\+04 does not fit float16.*bfloat16"):
        build("lora_xs", {"a.R": np.full((2, 2), 7e4, np.float32)}, "float16")


def test_unknown_types_and_values_that_are_not_finite_are_refused_on_writing():
    with pytest.raises(ConfigError, match="only as float32, float16, bfloat16, int8, int4"):
        build("lora_xs", {"a.R": np.ones((1, 1), np.float32)}, "int16")
    bad = {f"layers.{i}.R": np.full((1, 1), np.nan if i in (2, 5) else 1, np.float32) for i in range(7)}
    with pytest.raises(CorruptAdapterError, match=r"layers\.2\.R, layers\.5\.R"):
        build("lora_xs", bad)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
any_names = st.lists(
    st.text(max_size=12)
    | st.builds(
        "{}.{}.{}".format, st.sampled_from(["a.layers", "h", ""]), st.integers(0, 12), st.sampled_from("RAB")
    ),
    unique=True,
    max_size=12,
)


@st.composite
def records(draw):
    names = draw(any_names)
    shapes = {name: draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3)) for name in names}
    numbers = st.floats(-100, 100, width=16)
    tensors = {name: draw(hnp.arrays(np.float32, shape, elements=numbers)) for name, shape in shapes.items()}
    sections = tuple(
        Section(f"head.{i}", dtype, (2, 3), np.arange(6).astype(kind))
        for i, (dtype, kind) in enumerate(
            draw(st.lists(st.sampled_from(list(record.DTYPES.items())), max_size=3))
        )
    )
    return build(
        "lora_xs", tensors, draw(st.sampled_from(["float32", "float16", "bfloat16"])), sections=sections,
        config=draw(st.dictionaries(st.text(max_size=8), json_values, max_size=4)),
        metadata=draw(st.dictionaries(st.text(max_size=8), json_values, max_size=4)),
        task_type=draw(st.none() | st.just("SEQ_CLS")),
        base_fingerprint=draw(st.none() | st.text(min_size=1)),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(records())
def test_every_record_round_trips(made):
    data = encode(made)
    read = decode(data)
    assert encode(read) == data
    for spec in dataclasses.fields(Record):
        if spec.name not in ("layout", "values", "sections"):
            assert getattr(read, spec.name) == getattr(made, spec.name)
    assert (read.layout.names, read.layout.shapes) == (made.layout.names, made.layout.shapes)
    assert np.array_equal(read.values, made.values)
    for got, wanted in zip(read.sections, made.sections, strict=True):
        assert (got.name, got.dtype, got.shape) == (wanted.name, wanted.dtype, wanted.shape)
        assert np.array_equal(got.data, wanted.data)
    assert peek(data).layout.names == made.layout.names


@settings(max_examples=150, deadline=None)
@given(any_names, st.integers(0, 2**31))
def test_every_list_of_names_can_be_written(names, seed):
    rng = np.random.default_rng(seed)
    shapes = tuple(tuple(int(n) for n in rng.integers(0, 4, size=rng.integers(0, 3))) for _ in names)
    read = from_text(to_text(tuple(names), shapes))
    assert (read.names, read.shapes) == (tuple(names), shapes)


@pytest.fixture(scope="module")
def sample() -> bytes:
    head = Section("classifier.weight", "float32", (2, 3), np.arange(6, dtype="<f4"))
    return encode(adapter(SHAPES["embedded"], 2, sections=(head,), **ABOUT))


def test_every_flipped_bit_is_refused(sample):
    for place in range(len(sample)):
        for bit in range(8):
            damaged = bytearray(sample)
            damaged[place] ^= 1 << bit
            with pytest.raises(CorruptAdapterError):
                decode(bytes(damaged))


def test_every_truncation_and_every_extension_is_refused(sample):
    for size in range(len(sample)):
        with pytest.raises(CorruptAdapterError):
            decode(sample[:size])
        with pytest.raises(CorruptAdapterError):
            peek(sample[:size])
    with pytest.raises(CorruptAdapterError, match="longer than it says"):
        decode(sample + b"\0")


def test_peek_of_a_file_refuses_damage_in_what_it_reads(sample, tmp_path):
    header = peek(sample)
    first_value = len(sample) - header.value_bytes - header.section_bytes
    path = tmp_path / "a.modicum"
    for place in range(first_value - 8):  # the last 8 bytes may be padding, which only `decode` checks
        damaged = bytearray(sample)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CorruptAdapterError):
            peek(path)


def test_damage_is_named_with_what_to_do(sample):
    cases = {
        b"": "cut short",
        b"PK\x03\x04" + sample[4:]: "no modicum record",
        sample[:100]: "cut short.*header",
        sample[:-8]: "cut short.*instead of",
        sample[:-1] + b"\x01": "check sum",
    }
    for data, words in cases.items():
        with pytest.raises(CorruptAdapterError, match=words) as caught:
            decode(data)
        assert "save the adapter again" in str(caught.value)


def test_a_newer_format_asks_for_an_upgrade(sample):
    front = bytearray(sample[:92])
    front[8:10] = struct.pack("<H", 9)
    newer = bytes(front) + struct.pack("<I", zlib.crc32(bytes(front) + sample[96:128])) + sample[96:]
    with pytest.raises(CorruptAdapterError, match=r"format version 9.*upgrade modicum$"):
        decode(newer)


def test_numbers_that_are_not_finite_are_refused_on_reading(monkeypatch):
    made = adapter(["a.0.R", "a.1.R"], 2, "float16")
    values = made.values.copy()
    values[5] = np.inf
    head = Section("score.weight", "bfloat16", (2,), np.array([0x7F80, 0], "<u2"))
    poisoned = dataclasses.replace(made, values=values, sections=(head,))
    with pytest.raises(CorruptAdapterError, match=r"a\.1\.R; .*score\.weight"):
        encode(poisoned)
    with monkeypatch.context() as patch:
        patch.setattr(record, "_check_numbers", lambda _: None)
        data = encode(poisoned)
    with pytest.raises(CorruptAdapterError, match=r"a\.1\.R; .*score\.weight"):
        decode(data)


def test_what_does_not_fit_the_layout_or_json_is_refused_on_writing():
    made = adapter(["a.R"], 2)
    with pytest.raises(CorruptAdapterError, match="values"):
        encode(dataclasses.replace(made, values=made.values[:-1]))
    with pytest.raises(CorruptAdapterError, match="head"):
        encode(dataclasses.replace(made, sections=(Section("head", "float32", (3,), np.zeros(2, "<f4")),)))
    with pytest.raises(ConfigError, match="JSON"):
        encode(dataclasses.replace(made, metadata={"when": object()}))
    with pytest.raises(ConfigError, match="JSON"):
        encode(dataclasses.replace(made, metadata={"loss": float("nan")}))
    with pytest.raises(ConfigError, match="1 to 48 bytes"):
        encode(dataclasses.replace(made, method="x" * 49))


def test_records_of_one_base_model_share_their_list_of_names():
    first, second = (decode(encode(adapter(SHAPES["llama-2-7b"], 4, seed=seed))) for seed in (0, 1))
    assert first.layout is second.layout


BROKEN_LAYOUTS = [
    "[",
    "[[1]]",
    "{}x",
    '[["a.",5,2,[[".R",[2]]]]]',
    '[["",-1,-1,[["a",[-2]]]]]',
    '[["a.",0,99999999,[[".R",[2]]]]]',
    '[["",-1,-1,[["a",[1]],["a",[1]]]]]',
]


@pytest.mark.parametrize("text", BROKEN_LAYOUTS)
def test_a_senseless_list_of_tensors_is_refused(text):
    with pytest.raises(CorruptAdapterError, match="list of tensors"):
        from_text(text)


def test_the_record_imports_neither_torch_nor_peft():
    import subprocess
    import sys

    heavy = "('torch', 'peft', 'transformers')"
    code = f"import sys, modicum.store.record; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
