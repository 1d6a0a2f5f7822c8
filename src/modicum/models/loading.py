"""Loading base models and tokenizers, with errors that say what is there instead."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modicum.errors import ConfigError, did_you_mean, listing

if TYPE_CHECKING:
    from collections.abc import Iterator

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

EMBEDDED = "embedded"
#: names that architectures give their classification head
HEAD_NAMES = ("classifier", "score", "classification_head")


def load_base(
    name_or_path: str,
    task: str = "causal_lm",
    *,
    dtype: Dtype = "auto",
    num_labels: int | None = None,
    label_names: list[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    tokenizer: Any = None,
) -> Any:
    """The base model for `task` (causal_lm, seq_cls or regression), on the CPU, in evaluation mode.

    A classification head that the checkpoint lacks is drawn from torch's global generator: seed it first. The
    names of drawn tensors are the model's `drawn_tensors`.
    The dtype 'auto' is that of the checkpoint on a GPU and float32 without one, where 16 bits are slower.
    With `tokenizer`, its pad token becomes the model's, which classification of batches needs. A quantized
    checkpoint is loaded so that any adapter can be trained on it, PEFT's included.

    Raises:
        ConfigError: no such model, no model for this task, or weights besides the head are missing.
        MissingExtraError: a quantized checkpoint whose library is not installed.
    """
    import torch
    import transformers

    from modicum.quant.base import loading_options, prepare_model

    path = resolve(name_or_path)
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    factories = {"causal_lm": "AutoModelForCausalLM"}
    factory = getattr(transformers, factories.get(task, "AutoModelForSequenceClassification"))
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if task != "causal_lm":
        options["num_labels"] = 1 if task == "regression" else (num_labels or 2)
        options["problem_type"] = "regression" if task == "regression" else "single_label_classification"
        if label_names and task == "seq_cls":
            options["id2label"] = dict(enumerate(label_names))
            options["label2id"] = {name: index for index, name in enumerate(label_names)}
    with quiet_transformers():
        try:
            raw, _ = transformers.PretrainedConfig.get_config_dict(path, revision=revision)
            quantized = raw.get("quantization_config") or {}
            options |= loading_options(quantized.get("quant_method", ""))
            model, info = factory.from_pretrained(path, output_loading_info=True, **options)
        except (OSError, ValueError) as error:
            raise ConfigError(_no_model(name_or_path, error)) from error
    _check_missing(name_or_path, info["missing_keys"], task)
    if tokenizer is not None and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model = prepare_model(model.eval())
    vars(model)["drawn_tensors"] = tuple(sorted(info["missing_keys"]))
    return model


def load_tokenizer(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, with a pad token (the end mark where it has none of its own).

    Raises:
        ConfigError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    path = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer: {_no_model(name_or_path, error)}") from error
    if tokenizer.pad_token_id is None:
        # padding is masked by length, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.cls_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer of {name_or_path!r} has no pad, end, unknown or class token to pad with"
        )
    tokenizer.padding_side = "right"
    return tokenizer


def load_adapted(base: Any, adapter: str | Path, *, name: str = "default") -> Any:
    """`base` carrying the saved adapter at `adapter` (a PEFT folder) as `name`, in evaluation mode.

    A PEFT model gets one adapter more and is returned itself.

    Raises:
        ConfigError: no adapter there.
    """
    from peft import PeftModel

    from modicum.adapters import registry

    folder = adapter_folder(adapter)
    if json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"].startswith(
        "MODICUM_"
    ):
        registry.register()
    if isinstance(base, PeftModel):
        base.load_adapter(folder, name)
        return base.eval()
    return PeftModel.from_pretrained(base, folder, adapter_name=name).eval()


def adapter_folder(adapter: str | Path) -> Path:
    """The PEFT folder at `adapter`: the folder itself, or `adapter` in that of a run.

    Raises:
        ConfigError: no adapter there.
    """
    folder = Path(adapter)
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            return place
    raise ConfigError(f"no adapter in {folder}: it holds no adapter_config.json")


def resolve(name_or_path: str) -> str:
    """The path or hub name that Transformers is given; `embedded` is the model inside this package.

    Raises:
        ConfigError: a folder without a model, or a path that does not exist.
    """
    if name_or_path == EMBEDDED:
        from modicum.models import embedded

        return str(embedded.path())
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = _models_in(path)
            hint = f"; models inside: {listing(inside)}" if inside else ""
            raise ConfigError(f"the folder {path} holds no model: it has no config.json{hint}")
        return str(path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ConfigError(_no_model(name_or_path, None))
    return name_or_path


def head_names(model: Any) -> list[str]:
    """The names of the classification head's modules that `model` has at its top."""
    return [name for name in HEAD_NAMES if getattr(model, name, None) is not None]


def _models_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file())


def _no_model(name: str, error: Exception | None) -> str:
    path = Path(name).expanduser()
    folder = path.parent if path.parent.is_dir() else Path.cwd()
    local = [*_models_in(folder), EMBEDDED]
    message = f"no model {name!r}{did_you_mean(path.name, local)}; models in {folder}: {listing(local[:-1]) or 'none'}"
    if error is None or not str(error):
        return message
    offline = any(
        os.environ.get(key, "0") not in {"", "0"} for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    hint = (
        "the hub is switched off by HF_HUB_OFFLINE" if offline else "offline? Give the path of a local folder"
    )
    return f"{message}. {type(error).__name__}: {str(error).splitlines()[0]} ({hint}, or 'embedded')"


def _check_missing(name: str, missing: Any, task: str) -> None:
    # a fresh head (and the pooler that feeds it in BERT) is expected, anything else would be random in silence
    expected = (*HEAD_NAMES, "pooler") if task != "causal_lm" else ()
    wrong = sorted(key for key in missing if not any(part in expected for part in key.split(".")))
    if wrong:
        raise ConfigError(
            f"{name!r} is no complete checkpoint for {task}: {len(wrong)} tensors are missing ({listing(wrong, 3)})"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences Transformers' reports and bars while open; what matters in them is checked and raised instead."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT still reads names that Transformers renames
            warnings.simplefilter("ignore", FutureWarning)
            # how a quantized checkpoint is loaded can only be said this way
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
