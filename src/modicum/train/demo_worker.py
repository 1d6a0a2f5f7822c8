"""One step of the demo, in a process of its own: `python -m modicum.train.demo_worker JOB.json`.

`train` trains one method. `reload` knows only the saved file: it measures the base model, loads the adapter,
exports and merges it, and loads what it wrote with plain Transformers and PEFT. `serve` answers two users.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modicum.data.prepare import prepare
from modicum.errors import ConfigError
from modicum.evaluate.run import evaluate
from modicum.models.loading import load_base, load_tokenizer, quiet_transformers
from modicum.store.files import load_adapter, save_adapter, to_record
from modicum.store.lora_export import export_lora
from modicum.store.record import encode
from modicum.train.demo import FORMS, RECORD, slug
from modicum.train.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from modicum.data.encoded import Encoded

#: rows whose logits are compared; the texts of all rows are
_LOGIT_ROWS = 32
_BATCH = 50


def train(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train as the recipe says, save the adapter as one file, and measure it in memory."""
    from modicum.evaluate.resources import resident_peak
    from modicum.train.methods import trained_values
    from modicum.train.run import load
    from modicum.train.trainer import build_trainer

    loaded = load(recipe)
    trainer = build_trainer(recipe, loaded.model, loaded.data, loaded.tokenizer.pad_token_id, folder)
    start = resident_peak()
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    # before measuring, which needs memory of its own
    peak = resident_peak()
    saved = save_adapter(
        loaded.model, folder / RECORD, dtype="float32", recipe_digest=recipe.digest(), overwrite=True
    )
    small, _ = to_record(loaded.model, dtype="bfloat16", recipe_digest=recipe.digest())
    model = loaded.model.eval()
    metrics = answer(FORMS[0], model, loaded.tokenizer, _test_rows(loaded.data), folder)
    return {
        "method": recipe.method.name,
        "values": trained_values(model)["total"],
        "bytes_float32": saved.bytes,
        "bytes_bfloat16": len(encode(small)),
        "after": metrics["exact_match"],
        "loss": metrics["loss"]["value"],
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "start_bytes": start,
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
        "forms": {FORMS[0]: {"exact_match": metrics["exact_match"]["value"], "bytes": 0}},
    }


def reload(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Measure the base model, load the saved file on it, export and merge it, and measure all of these."""
    if not (folder / RECORD).is_file():
        raise ConfigError(f"no {RECORD} in {folder}: train first")
    tokenizer, rows = _data(recipe)
    base = load_base(recipe.model.name_or_path, dtype=recipe.model.dtype, tokenizer=tokenizer)
    before = answer("before", base, tokenizer, rows, folder)
    texts = json.loads((folder / "before.texts.json").read_text(encoding="utf-8"))
    model = load_adapter(base, folder / RECORD)
    metrics = answer(FORMS[1], model, tokenizer, rows, folder)
    export_lora(model, folder / "lora", overwrite=True)
    model.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    return {
        "before": before["exact_match"],
        "example": {
            "prompt": tokenizer.decode(rows.prompt(0), skip_special_tokens=True),
            "wanted": rows.references[0],
            "before": texts[0],
        },
        "forms": {FORMS[1]: _form(metrics, folder / RECORD), **_stock(recipe, folder, tokenizer, rows)},
    }


def _stock(recipe: Recipe, folder: Path, tokenizer: Any, rows: Encoded) -> dict[str, Any]:
    """How the merged model, loaded by Transformers, and the exported LoRA, loaded by PEFT, answer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    found = {FORMS[2]: _form(answer(FORMS[2], merged, tokenizer, rows, folder), folder / "merged")}
    base = load_base(recipe.model.name_or_path, dtype=recipe.model.dtype, tokenizer=tokenizer)
    lora = PeftModel.from_pretrained(base, folder / "lora").eval()
    found[FORMS[3]] = _form(answer(FORMS[3], lora, tokenizer, rows, folder), folder / "lora")
    return found


def serve(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Serve the store in `folder` and ask it as two users."""
    from modicum.train.demo_serve import serve as answered

    return answered(recipe, folder, *_data(recipe))


@torch.no_grad()
def answer(form: str, model: Any, tokenizer: Any, rows: Encoded, folder: Path) -> dict[str, Any]:
    """The metrics of `model` on the held-out rows; its texts and logits go to files named after `form`."""
    result = evaluate(model, tokenizer, rows, batch_size=_BATCH, exact_match=True)
    (folder / f"{slug(form)}.texts.json").write_text(json.dumps(result.predictions), encoding="utf-8")
    logits = [
        model(input_ids=torch.tensor([rows[index]["input_ids"]])).logits[0].float().numpy()
        for index in range(min(_LOGIT_ROWS, len(rows)))
    ]
    np.save(folder / f"{slug(form)}.logits.npy", np.concatenate(logits))
    return result.as_dict()["metrics"]


def _data(recipe: Recipe) -> tuple[Any, Encoded]:
    tokenizer = load_tokenizer(recipe.model.name_or_path)
    return tokenizer, _test_rows(prepare(recipe.data, tokenizer, recipe.model.task))


def _test_rows(data: Any) -> Encoded:
    assert data.test is not None
    return data.test


def _form(metrics: dict[str, Any], path: Path) -> dict[str, Any]:
    files = (
        [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in {".safetensors", ".json"}]
    )
    return {"exact_match": metrics["exact_match"]["value"], "bytes": sum(p.stat().st_size for p in files)}


def main() -> None:
    """Run the job that the command line names and write its result."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(job["folder"])
    # VeRA warns that its projections are not saved, which is what the recipe says
    warnings.filterwarnings("ignore", message="Specified to not")
    with quiet_transformers():
        result = {"train": train, "reload": reload, "serve": serve}[job["job"]](
            make_recipe(job["recipe"]), folder
        )
    (folder / f"{job['job']}.result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
