"""How the longer reports of verbs are shown on a terminal."""

from typing import Any

from modicum.cli._common import size, table


def quantization(report: Any) -> Any:
    """The tables of a `QuantizationReport`."""
    layers = [
        [layer.name, "x".join(map(str, layer.shape)), f"{layer.bits_per_weight:.2f}", size(layer.bytes)]
        + [f"{e:.4f}" if e is not None else "" for e in (layer.weight_error, layer.output_error)]
        for layer in report.layers
    ]
    columns = ["layer", "shape", "bits", "size", "weight error", "output error"]
    rows = [
        ["bits per weight", f"{report.bits_per_weight:.3f}"],
        ["quantized weights", f"{report.quantized_weights:,} ({report.kept_weights:,} stay)"],
        ["size", f"{size(report.bytes_before)} -> {size(report.bytes_after)}"],
        *([["zeros", _zeros(report)]] if 100 * report.zeros > report.quantized_weights else []),
        *outcome(report),
    ]
    shown = layers if report.dry_run else sorted(layers, key=lambda row: row[5], reverse=True)[:5]
    title = "layers" if report.dry_run else "layers with the largest output error"
    return [table("quantize", ["", "what"], rows), table(title, columns, shown)]


def outcome(report: Any) -> list[list[str]]:
    """The rows that reports of quantized and of sparse models share: texts, notes, and where the model is."""
    before, after = report.perplexity_before, report.perplexity_after
    return [
        # a model that overflows has none
        *(
            [["perplexity", f"{before:.3f} -> {after:.3f} on {report.evaluation}"]]
            if before and after
            else []
        ),
        *([["calibrated on", f"{report.calibration}"]] if report.calibration else []),
        *[["note", note] for note in report.notes],
        ["output", report.output + (" (nothing written)" if report.dry_run else "")],
    ]


def _zeros(report: Any) -> str:
    share = f"{report.zeros:,} ({report.zeros / report.quantized_weights:.1%})"
    lost = report.zeros - report.zeros_kept
    return f"{share}, {f'{lost:,} of them no longer: --keep-zeros keeps them' if lost else 'all kept'}"
