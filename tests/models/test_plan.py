"""Published counts and sizes, reproduced by arithmetic on shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save
from tests.models_for_tests import SMALL, base_for, bert, llama
from transformers import LlamaConfig, RobertaConfig

from modicum.adapters import registry
from modicum.errors import ConfigError, TargetError
from modicum.models.architecture import read_architecture
from modicum.models.plan import RECORD_BYTES, all_methods, make_plan
from modicum.store.layout import layout
from modicum.store.record import Record, encode

MIB, KIB = 2**20, 2**10


def _row(plan, method):
    (row,) = [row for row in plan.rows if row.method == method]
    return row


@pytest.fixture(scope="module")
def llama2_7b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-2-7b")
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return read_architecture(str(folder))


@pytest.fixture(scope="module")
def roberta_large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta-large")
    RobertaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=50265,
        max_position_embeddings=514, type_vocab_size=1,
    ).save_pretrained(folder)  # fmt: skip
    return read_architecture(str(folder), "seq_cls", num_labels=2)


def test_a_million_gpt3_models():
    users = 1_000_000
    plan = make_plan(
        read_architecture("gpt3"),
        methods=["lora_xs", "lora"],
        targets=["q_proj", "v_proj"],
        users=users,
        dtype="float16",
    )
    lora, ours = _row(plan, "lora"), _row(plan, "lora_xs")
    assert lora.payload_bytes == 144 * MIB
    assert ours.payload_bytes == 96 * KIB
    assert ours.smaller_than_lora == 1536
    assert plan.adapted_layers == 2 * 96
    # the figures usually quoted, 144 TB and 96 GB, are a million times 144 MiB and 96 KiB in "units of 1024²"
    assert users * lora.payload_bytes / MIB == 144e6
    assert users * ours.payload_bytes / KIB == 96e6
    # what they leave out: one basis for all users, and the container
    assert ours.basis_bytes == 2 * 96 * 16 * 12288 * 4
    assert ours.total_bytes == users * (96 * KIB + RECORD_BYTES) + ours.basis_bytes


def test_gpt3_has_175_billion_parameters():
    assert read_architecture("gpt3").parameters == pytest.approx(175e9, rel=0.003)


def test_llama2_7b_seven_projections(llama2_7b):
    plan = make_plan(llama2_7b, methods=["lora_xs"])
    assert plan.adapted_layers == 7 * 32
    assert plan.rows[0].trained == 57_344
    assert plan.parameters == 6_738_415_616


@pytest.mark.parametrize(
    ("rank", "published"), [(4, 1_536), (8, 6_144), (12, 13_824), (16, 24_576), (20, 38_400), (25, 60_000)]
)
def test_roberta_large_on_glue(roberta_large, rank, published):
    plan = make_plan(
        roberta_large, methods=["lora_xs"], ranks=[rank], targets=["query", "value", "output.dense"]
    )
    row = plan.rows[0]
    assert plan.adapted_layers == 4 * 24
    assert row.trained == published
    # the head that the published figure does not count
    assert row.head == 1024 * 1024 + 1024 + 2 * 1024 + 2


def test_a_small_adapter_is_not_a_small_file_by_itself(llama2_7b):
    """The header that a PEFT folder carries on LLaMA-2-7B, and what it weighs against the numbers at rank 8."""
    row = make_plan(llama2_7b, methods=["lora_xs"], ranks=[8], dtype="float16").rows[0]
    tensors = {
        f"base_model.model.{name}.modicum_lora_xs_adapters.R": torch.zeros(8, 8, dtype=torch.float16)
        for name in llama2_7b.shapes()
    }
    header = len(save(tensors)) - row.payload_bytes
    assert row.payload_bytes == 224 * 64 * 2
    assert header == pytest.approx(30e3, rel=0.03)
    assert row.folder_overhead_bytes == pytest.approx(header, rel=0.05)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_the_container_is_never_larger_than_planned(targets):
    shapes = read_architecture("gpt3").shapes(targets)
    names = tuple(f"base_model.model.{name}.modicum_lora_xs_adapters.R" for name in shapes)
    written = Record(
        "lora_xs",
        "float16",
        layout(names, tuple((16, 16) for _ in names)),
        np.zeros(256 * len(names), np.float16),
        config={"r": 16, "target_modules": ["q_proj", "v_proj"], "alpha": 32.0},
        base_fingerprint="0123456789abcdef" * 2,
        basis_fingerprint="svd-top-fast-v1:" + "Gw7TQa39" * 11,
    )
    assert len(encode(written)) - 512 * len(names) <= RECORD_BYTES


def test_every_method_is_planned(llama2_7b):
    plan = make_plan(llama2_7b)
    assert list(dict.fromkeys(row.method for row in plan.rows)) == all_methods()
    assert _row(plan, "full").trained == llama2_7b.parameters
    assert all(row.optimizer_bytes == 8 * row.trained for row in plan.rows)


@pytest.mark.parametrize("method", registry.names())
@pytest.mark.parametrize("rank", [1, 4])
def test_plan_equals_what_is_trained_and_saved(method, rank, tmp_path):
    """The plan of a config against the real adapter: trained numbers and size of the file."""
    base = llama()
    base.config.save_pretrained(tmp_path / "base")
    row = make_plan(
        read_architecture(str(tmp_path / "base"), "causal_lm"),
        methods=[method],
        ranks=[rank],
        dtype="float32",
        options=SMALL.get(method, {}),
    ).rows[0]
    model = get_peft_model(
        base_for(method, base), registry.config_class(method)(r=rank, **SMALL.get(method, {}))
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == row.trained
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert sum(t.numel() for t in load_file(file).values()) == row.trained
    header = file.stat().st_size - row.payload_bytes
    assert row.folder_overhead_bytes == pytest.approx(header, rel=0.35)


def test_a_row_per_rank_unless_the_rank_changes_nothing(llama2_7b):
    plan = make_plan(llama2_7b, methods=["lora_xs", "full"], ranks=[4, 8])
    assert [(row.method, row.rank) for row in plan.rows] == [("lora_xs", 4), ("lora_xs", 8), ("full", None)]


def test_options_reach_the_methods_that_have_them(llama2_7b):
    plan = make_plan(llama2_7b, methods=["lora_xs", "lora"], options={"core": "diagonal"})
    assert _row(plan, "lora_xs").trained == 7 * 32 * 16


def test_all_faults_at_once(llama2_7b):
    with pytest.raises(ConfigError) as error:
        make_plan(llama2_7b, methods=["lora_sx"], ranks=[0], dtype="float61", users=0, options={"cor": 1})
    for part in ("did you mean 'lora_xs'", "rank = 0", "float16", "users = 0", "'cor'"):
        assert part in str(error.value)


def test_a_rank_larger_than_a_layer(tmp_path):
    bert().config.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"rank is larger than the layer \(r = 33\)"):
        make_plan(read_architecture(str(tmp_path)), methods=["lora_xs"], ranks=[33])


def test_a_plan_is_plain_json(llama2_7b):
    from modicum.cli._common import jsonable

    text = json.dumps(jsonable(make_plan(llama2_7b, users=3)))
    assert json.loads(text)["rows"][0]["method"] == all_methods()[0]
