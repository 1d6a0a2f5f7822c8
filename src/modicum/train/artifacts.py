"""What a run leaves on disk: written aside, flushed, then renamed, so that nothing half-written is ever found."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from modicum.errors import ModicumError
from modicum.store.atomic import flush, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

REPORT = "report.json"
RECIPE = "recipe.yaml"
ADAPTER = "adapter"
MODEL = "model"
CHECKPOINTS = "checkpoints"
#: losses and metrics by step, and the runs of a sweep, as tables
HISTORY = "history.parquet"
RUNS = "runs.parquet"


@contextlib.contextmanager
def disk_guard(folder: Path) -> Iterator[None]:
    """Turns a full disk, in whatever way a library words it, into one clear error about `folder`."""
    try:
        yield
    except Exception as error:
        usage = shutil.disk_usage(_existing(folder))
        if not _is_full(error, usage.free):
            raise
        drop_incomplete(folder)
        raise ModicumError(
            f"the disk is full: cannot write to {folder} ({usage.free / 2**20:,.0f} MiB free). Nothing half-written "
            "was kept; make room and run again with --resume"
        ) from error


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON to `path`, see `write_text`; what is not finite becomes null."""
    write_text(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write flat `rows` as a Parquet file, whole or not at all; what a row lacks is null there."""
    import pyarrow as pa
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        parquet.write_table(table, aside)
        flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at `path`, or None where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; ones that a crash left half-written are passed over."""
    root = folder / CHECKPOINTS
    numbered = []
    for entry in root.glob("checkpoint-*") if root.is_dir() else ():
        number = entry.name.rpartition("-")[2]
        # the Trainer writes its state last
        if number.isdigit() and read_json(entry / "trainer_state.json") is not None:
            numbered.append((int(number), entry))
    return max(numbered)[1] if numbered else None


def drop_incomplete(folder: Path) -> None:
    """Remove checkpoints below `folder` that a failed write left unfinished."""
    for entry in folder.rglob(f"{CHECKPOINTS}/checkpoint-*"):
        if read_json(entry / "trainer_state.json") is None:
            shutil.rmtree(entry, ignore_errors=True)


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weights, and of all files a loader needs (the model card is not one)."""
    files = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    weights = sum(size for name, size in files.items() if name.endswith((".safetensors", ".bin")))
    return {"weights": weights, "total": sum(size for name, size in files.items() if name != "README.md")}


def model_card(report: dict[str, Any], *, base: str, method: str, task: str, is_ours: bool) -> str:
    """The model card: what was trained, how well it does, how to load it."""
    trained = report["trained_values"]
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "library_name: peft",
        f"tags: [modicum, {method}, {task}]",
        "---",
        "",
        f"# {method} adapter for {base}",
        "",
        f"{trained['adapter']:,} trained numbers in the adapter, {trained['head']:,} in the head.",
        f"Recipe digest {report['recipe_digest']}, seed {report['seed']}, modicum {report['versions']['modicum']}.",
        "",
        "## Loading",
        "",
    ]
    if is_ours:
        lines += [f"The method `{method}` lives in modicum: **`import modicum` is needed before loading**, otherwise",
                  "PEFT stops with a KeyError.", ""]  # fmt: skip
    auto = "AutoModelForCausalLM" if task == "causal_lm" else "AutoModelForSequenceClassification"
    lines += [
        "```python",
        *(["import modicum  # makes the method known to PEFT"] if is_ours else []),
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f"base = {auto}.from_pretrained({base!r})",
        "model = PeftModel.from_pretrained(base, 'PATH-OF-THIS-FOLDER')",
        "```",
        "",
        "## Metrics",
        "",
        "| metric | before | after |",
        "|---|---|---|",
    ]
    before, after = report["metrics"]["before"] or {}, report["metrics"]["validation"] or {}
    test = report["metrics"]["test"] or {}
    lines += [
        f"| validation {k} | {_cell(before.get(k))} | {_cell(v)} |" for k, v in after.items() if k != "n"
    ]
    lines += [f"| test {key} | | {_cell(value)} |" for key, value in test.items() if key != "n"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


def _is_full(error: BaseException | None, free: int) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        words = str(error).lower()
        if "no space left on device" in words or "disk quota exceeded" in words:
            return True
        # torch.save words every failed write alike
        if "file write failed" in words and free < 2**24:
            return True
        error = error.__cause__ or error.__context__
    return False


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
