"""Write a sub-network of a trained super-network as a smaller model of its own."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, OutputOption, OverwriteFlag, emit, size, table


def run(
    model: Annotated[str, typer.Argument(help="The base model: a folder, a hub name, or 'embedded'.")],
    adapter: Annotated[Path, typer.Argument(help="A .modicum file or a PEFT folder.")],
    output: OutputOption,
    sub_network: Annotated[
        str | None,
        typer.Option(
            help="heuristic, largest or smallest of the adapter's search space, or a JSON file; the one that is "
            "active in the adapter without."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto is the base model's.")
    ] = "auto",
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a sub-network as a dense model folder for `from_pretrained`, adapter merged in, tokenizer included.

    First runs text through the super-network and through the smaller model as written, reports the difference, and
    refuses when it is more than rounding. A JSON file holds a choice for every group of the search space, or a
    sub-network in full (`{"widths": {...}, "ranks": {...}}`).
    """
    from modicum.compress.extract import extract
    from modicum.models.architecture import read_config
    from modicum.models.loading import load_tokenizer
    from modicum.store.convert import load_for

    tokenizer = load_tokenizer(model)
    adapted, loaded = load_for(model, adapter, upcast=True)
    # without a GPU models are loaded in float32, whatever they are stored in
    stored = read_config(model).dtype or loaded
    result = extract(
        adapted,
        output,
        tokenizer=tokenizer,
        sub_network=_chosen(sub_network, adapted),
        dtype=str(stored).removeprefix("torch.") if dtype == "auto" else dtype,
        overwrite=overwrite,
    )
    emit(result, as_json, _show)


def _chosen(wanted: str | None, model: Any) -> Any:
    """The sub-network that `--sub-network` names, of the search space in the adapter; None for the active one."""
    from modicum.adapters.elastic import SubNetwork
    from modicum.errors import ConfigError
    from modicum.search.space import SearchSpace

    if wanted is None:
        return None
    choices = None
    if Path(wanted).suffix == ".json":
        try:
            values = json.loads(Path(wanted).expanduser().read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{wanted} is no JSON: {error}") from error
        if not isinstance(values, dict) or {"ranks", "widths", "cuts"} & set(values):
            return SubNetwork.read(values)
        choices = values.get("choices", values)
    space = getattr(model.peft_config[model.active_adapter], "search_space", None)
    if space is None:
        raise ConfigError(
            f"the adapter has no search space to find {wanted!r} in; give a JSON file with its widths"
        )
    fitted = SearchSpace.of_model(space, model, model.active_adapter)
    return fitted.sub_network(fitted.named(wanted) if choices is None else choices)


def _show(result: Any) -> Any:
    widths = sorted(set(result.widths.values()), reverse=True)
    ranks = sorted(set(result.ranks.values()), reverse=True)
    saved = 1 - result.parameters / result.parameters_before
    rows = [
        ["parameters", f"{result.parameters_before:,} -> {result.parameters:,} ({saved:.1%} fewer)"],
        ["of linear layers", f"{result.linear_before:,} -> {result.linear:,}"],
        ["widths cut", f"{len(result.widths)}, to {', '.join(map(str, widths))} units" if widths else "none"],
        ["ranks merged", ", ".join(map(str, ranks))],
        *[[f"  {name}", f"{choice}"] for name, choice in result.choices.items()],
        [
            "class",
            result.model_class + (" (Transformers alone)" if result.stock else " (import modicum first)"),
        ],
        ["dtype", result.dtype],
        ["tokens compared", f"{result.tokens:,}"],
        ["error of the logits", f"{result.logit_error:.2e} (tolerance {result.tolerance:.0e})"],
        ["largest difference", f"{result.max_difference:.3g} (RMS {result.rms_difference:.3g})"],
        ["output", str(result.output)],
        *[[f"  {name}", size(count)] for name, count in result.files.items()],
    ]
    return table("extract", ["", "what"], rows)
