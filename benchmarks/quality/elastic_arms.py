"""Settings, bases and arms of `elastic.py`, and where their files are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SEEDS = [0, 1, 2]
RATES = [1e-3, 3e-3, 1e-2]
BATCH = 16
LENGTH = 64
RANK, ALPHA, DROPOUT = 32, 64, 0.1
#: rows and sub-networks of a search; LoNAS begins over its budget, and spends some of them on the way down
SEARCH_ROWS, TRIALS, LONAS_TRIALS = 100, 20, 40
#: of all parameters, embeddings included, tied ones once, as `modicum extract` reports them
BUDGET = 0.8
#: training texts that the error of a merge or an extraction is measured on
MEASURED = 32
#: number type of the dense models that ship
SHIPPED_AS = "float16"
NOT_DOWN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]

#: `close`: rates whose validation loss on the first seed is within this factor of the best are run with all seeds.
#: stories260k: down projections have 172 inputs, which no group of 32 divides; they are sparse, but stay dense and
#: unadapted, except in LoNAS, which cuts them
SETTINGS: dict[str, dict[str, Any]] = {
    "notes": {
        "what": "bundled task notes on the embedded model (5.8M parameters)",
        "model": "embedded", "steps": 80, "close": 2.0, "score": "exact_match", "space": "shears", "calibration": None,
        "targets": None, "exclude": [],
    },
    "stories260k": {
        "what": "TinyStories on stories260k (0.26M parameters)",
        "model": "models/stories260k", "steps": 80, "close": 1.02, "score": "token_accuracy",
        "calibration": "train.txt", "targets": NOT_DOWN, "exclude": ["down_proj"],
        "space": {"name": "shears without down", "groups": [
            {"rank": ["heads.outputs"], "choices": [1.0, 0.75, 0.5]},
            {"rank": ["mlp.outputs"], "choices": [1.0, 0.75, 0.5]},
        ]},
    },
}  # fmt: skip

#: base -> the stage that makes it, what from, options
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sparse-40": ("sparsify", "dense", {"sparsity": 0.4}),
    "sparse-50": ("sparsify", "dense", {"sparsity": 0.5}),
    "sparse-60": ("sparsify", "dense", {"sparsity": 0.6}),
    "int4": ("quantize", "sparse-50", {}),
    "int4-residuals": ("quantize", "sparse-50", {"keep_residuals": True}),
    "reordered": ("reorder", "dense", {}),
}
_SUPER = ("heuristic", "largest", "searched")
#: an MLP width that leaves 80 % of the parameters, trained alone
_ALONE = {"name": "80 % of the parameters", "groups": [{"width": "mlp", "choices": [0.67]}]}


def lora(rank: int) -> dict[str, Any]:
    """PEFT's LoRA, its scaling that of the super-network; layers that the space leaves alone keep their rank."""
    scaling = ALPHA // RANK
    return {
        "name": "lora",
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": DROPOUT,
        "rank_pattern": {} if rank == RANK else {"o_proj": RANK},
        "alpha_pattern": {} if rank == RANK else {"o_proj": ALPHA},
    }


def elastic(name: str) -> dict[str, Any]:
    """One of our elastic methods."""
    return {"name": name, "r": RANK, "alpha": ALPHA, "dropout": DROPOUT}


#: arm -> base, method, search space (`shears`: the setting's), what is measured of it, how it ships, and the arm
#: whose learning rate it takes over
ARMS: dict[str, dict[str, Any]] = {
    "lora r32": {"base": "dense", "method": lora(RANK)},
    "sparse 50 + lora r32": {"base": "sparse-50", "method": lora(RANK)},
    "sparse 50 + lora r24": {"base": "sparse-50", "method": lora(24)},
    "shears 50": {"base": "sparse-50", "method": elastic("elastic_lora"), "space": "shears"},
    "shears 40": {"base": "sparse-40", "method": elastic("elastic_lora"), "space": "shears", "rate": "shears 50"},
    "shears 60": {"base": "sparse-60", "method": elastic("elastic_lora"), "space": "shears", "rate": "shears 50"},
    "sqft 4-bit": {"base": "int4", "method": elastic("elastic_lora"), "space": "shears"},
    "sparse_peft": {"base": "sparse-50", "method": elastic("sparse_peft"), "space": "shears", "ship": "merge"},
    "qa_sparse_peft": {
        "base": "int4-residuals", "method": elastic("qa_sparse_peft"), "space": "shears", "ship": "merge",
    },
    "qa_sparse_peft, no residuals": {
        "base": "int4", "method": elastic("qa_sparse_peft"), "space": "shears", "ship": "merge",
        "forms": ["heuristic"],
    },
    "lonas": {"base": "reordered", "method": elastic("elastic_lora"), "space": "lonas", "ship": "extract"},
    "lonas, not reordered": {
        "base": "dense", "method": elastic("elastic_lora"), "space": "lonas", "ship": "extract", "rate": "lonas",
    },
    "80 % alone": {
        "base": "reordered", "method": elastic("elastic_lora"), "space": _ALONE, "ship": "extract",
        "forms": ["heuristic"],
    },
}  # fmt: skip
#: what one process does in turn, the longest first; who takes over a rate comes after whom it takes it from
JOBS = [
    ["qa_sparse_peft"], ["qa_sparse_peft, no residuals"], ["lonas", "lonas, not reordered"], ["sparse_peft"],
    ["shears 50", "shears 40", "shears 60"], ["sqft 4-bit"], ["lora r32"], ["sparse 50 + lora r32"],
    ["sparse 50 + lora r24"], ["80 % alone"],
]  # fmt: skip


def forms_of(arm: str) -> list[str]:
    """The sub-networks of an arm that are measured; a method without any has one form."""
    facts = ARMS[arm]
    return list(facts.get("forms", _SUPER if "space" in facts else ("whole",)))


def folder_of(setting: str, arm: str, work: Path) -> Path:
    """Where the runs of an arm are."""
    return work / setting / arm.replace(" ", "-").replace(",", "").replace("%", "percent")


def model_of(setting: str, base: str, shared: Path, work: Path) -> str:
    """A model of a setting by the name of its base."""
    name = SETTINGS[setting]["model"]
    dense = name if name == "embedded" else str(shared / name)
    return dense if base == "dense" else str(work / setting / "bases" / base)
