"""Writes every part of the documentation that the code or a measurement already says.

    python scripts/generate_docs.py            bring the pages up to date
    python scripts/generate_docs.py --check    say which are not, and exit with 1

Whole pages: `docs/lookup/methods.md`, `cli.md`, `recipe.md`. Parts of pages: what stands between
`<!-- generated:NAME -->` and `<!-- end -->`, where NAME is one of PARTS below or the name of a results file
`benchmarks/**/results/NAME.json`. Such a file holds what it measured, and under the key `table` how to show it:

    "table": {"columns": ["method", "accuracy"], "rows": [["lora_xs", 0.91]], "note": "8 cores, 3 seeds"}
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOOKUP = Path("docs/lookup")
_MARK = re.compile(r"(<!-- generated:(?P<name>[\w.-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
_HEAD = "<!-- written by scripts/generate_docs.py; do not edit -->\n\n"
_WIDTH = 100


def main() -> int:
    """0 when everything is, or now has been brought, up to date; 1 when `--check` found differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    check = parser.parse_args().check
    stale = 0
    for path, text in pages().items():
        file = ROOT / path
        old = file.read_text(encoding="utf-8") if file.is_file() else ""
        if old == text:
            continue
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
            continue
        stale += 1
        lines = list(
            difflib.unified_diff(
                old.splitlines(), text.splitlines(), "written", "should be", n=1, lineterm=""
            )
        )
        print(
            f"{path} is out of date; run: python scripts/generate_docs.py",
            *lines[:20],
            sep="\n  ",
            file=sys.stderr,
        )
    return 1 if stale else 0


def pages() -> dict[Path, str]:
    """The right text of every page that has something generated, by path from the root."""
    found = {
        LOOKUP / "methods.md": methods_page(),
        LOOKUP / "cli.md": cli_page(),
        LOOKUP / "recipe.md": recipe_page(),
    }
    for file in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]):
        path = file.relative_to(ROOT)
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if path not in found and _MARK.search(text):
            found[path] = _MARK.sub(lambda mark: f"{mark[1]}\n{part(mark['name'])}\n\n{mark[4]}", text)
    return found


def part(name: str) -> str:
    """The text of one generated part."""
    return PARTS[name]() if name in PARTS else results_part(name)


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; a column of numbers is set flush right."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        bool(cells) and all(re.fullmatch(r"[-+~≤≥]?[\d.,]+( ?[%×\w/]+)?", row[i]) for row in cells)
        for i in range(len(columns))
    ]
    lines = [columns, ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:,.4g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def results_part(name: str) -> str:
    """The table of a results file, or a line saying that there is none yet."""
    files = sorted((ROOT / "benchmarks").glob(f"**/results/{name}.json"))
    if not files:
        return "*Not measured yet.*"
    shown = json.loads(files[0].read_text(encoding="utf-8")).get("table")
    if not shown:
        return f"*See `{files[0].relative_to(ROOT).as_posix()}`.*"
    note = f"\n\n{shown['note']}" if shown.get("note") else ""
    return (
        f"{table(shown['columns'], shown['rows'])}{note}\n\nFrom `{files[0].relative_to(ROOT).as_posix()}`."
    )


def methods_table() -> str:
    """One row per method of ours: name, config, source, update, trained numbers."""
    from modicum.adapters import registry

    rows = []
    for name in registry.names():
        adapter = registry.get(name)
        count = (adapter.count.__doc__ or "").strip().partition("\n")[0]
        rows.append(
            [f"`{name}`", f"`{adapter.config_class.__name__}`", adapter.source, f"`{adapter.formula}`", count]
        )
    return table(["method", "config", "source", "update", "trained numbers per layer"], rows)


def baselines_table() -> str:
    """One row per method of PEFT that recipes and plans know."""
    from modicum.models.counts import BASELINES

    return table(
        ["baseline", "trained numbers per layer"],
        [[f"`{n}`", f"`{b.formula}`"] for n, b in BASELINES.items()],
    )


def methods_page() -> str:
    """The page of all methods and their options, from the registry and the config dataclasses."""
    from modicum.adapters import registry
    from modicum.adapters.config import AdapterConfig

    shared = {spec.name for spec in dataclasses.fields(AdapterConfig)}
    sections = [
        "# Methods\n",
        methods_table(),
        "\n## Options of every method\n",
        _options(AdapterConfig, set()),
    ]
    for name in registry.names():
        config = registry.config_class(name)
        own = _options(config, shared)
        text = (sys.modules[registry.get(name).__module__].__doc__ or "").strip()
        sections += [f"\n## `{name}`\n", f"```text\n{text}\n```\n", own or "It has no options of its own."]
    sections += [
        "\n## Baselines\n",
        "These come from PEFT through the same recipes; modicum does not rewrite them.\n",
        baselines_table(),
    ]
    return _HEAD + "\n".join(sections) + "\n"


def _options(config: type, without: set[str]) -> str:
    rows = []
    for spec in dataclasses.fields(config):
        if spec.name in without or "help" not in spec.metadata or not spec.init:
            continue
        if spec.default is not dataclasses.MISSING:
            default = spec.default
        else:
            default = (
                spec.default_factory() if spec.default_factory is not dataclasses.MISSING else "required"
            )
        limits = [
            f"{word} {spec.metadata[key]}"
            for key, word in (("minimum", "≥"), ("maximum", "≤"))
            if key in spec.metadata
        ]
        choices = (
            [" or ".join(f"`{choice}`" for choice in spec.metadata["choices"])]
            if "choices" in spec.metadata
            else []
        )
        rows.append([f"`{spec.name}`", f"`{default!r}`", ", ".join(limits + choices), spec.metadata["help"]])
    # PEFT's own fields carry help too, but are set by PEFT or by loading
    rows = [row for row in rows if row[0] not in _SET_BY_PEFT]
    return table(["option", "default", "allowed", "what it does"], rows) if rows else ""


_SET_BY_PEFT = {
    f"`{name}`" for name in ("task_type", "peft_type", "auto_mapping", "peft_version", "revision")
}


def cli_page() -> str:
    """The page of the command line, from the help of every verb."""
    from modicum.cli import _root

    parts = ["# Command line\n", verbs_table()]
    for verb in _root.verbs():
        command = _root.load(verb)
        parts.append(f"\n## `modicum {verb}`\n")
        parts.append(_help(command, f"modicum {verb}"))
        for name, inner in getattr(command, "commands", {}).items():
            parts += [f"\n### `modicum {verb} {name}`\n", _help(inner, f"modicum {verb} {name}")]
    return _HEAD + "\n".join(parts) + "\n"


def _help(command: Any, path: str) -> str:
    # plain text of a fixed width, whatever terminal this runs in
    context = command.context_class(command, info_name=path, terminal_width=_WIDTH, max_content_width=_WIDTH)
    command.rich_markup_mode = None
    lines = command.get_help(context).strip().splitlines()
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def verbs_table() -> str:
    """One row per verb of the command line."""
    from modicum.cli import _root

    return table(
        ["verb", "what it does"], [[f"`modicum {verb}`", _root.summary(verb)] for verb in _root.verbs()]
    )


def recipe_page() -> str:
    """The page of the recipe, from its schema."""
    from modicum.train.recipe import json_schema

    schema = json_schema()
    intro = (
        "One YAML drives a training run. An unknown name is an error that says the nearest right one. The "
        "options of `method` besides its name are those of the method, see [methods](methods.md).\n"
    )
    parts = ["# Recipe\n", intro]
    for name, spec in schema["properties"].items():
        section = _referred(spec, schema)
        if "properties" not in section:
            continue
        parts += [f"\n## `{name}`\n", (section.get("description") or "").partition("\n")[0] + "\n"]
        required = set(section.get("required", ()))
        rows = [
            [
                f"`{name}.{key}`",
                _type(value, schema),
                "required" if key in required else _default(value),
                value.get("description", ""),
            ]
            for key, value in section["properties"].items()
        ]
        parts.append(table(["option", "type", "default", "what it does"], rows))
    plain = [
        (name, spec)
        for name, spec in schema["properties"].items()
        if "properties" not in _referred(spec, schema)
    ]
    if plain:
        rows = [
            [f"`{name}`", _type(spec, schema), _default(spec), spec.get("description", "")]
            for name, spec in plain
        ]
        parts += ["\n## Outside the sections\n", table(["option", "type", "default", "what it does"], rows)]
    return _HEAD + "\n".join(parts) + "\n"


def _referred(spec: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    options = [spec, *spec.get("anyOf", ()), *spec.get("allOf", ())]
    reference = next((option["$ref"] for option in options if "$ref" in option), None)
    return schema["$defs"][reference.rpartition("/")[2]] if reference else spec


def _type(spec: dict[str, Any], schema: dict[str, Any]) -> str:
    if "enum" in spec:
        return " or ".join(f"`{value}`" for value in spec["enum"])
    if "const" in spec:
        return f"`{spec['const']}`"
    if "anyOf" in spec:
        return ", ".join(
            dict.fromkeys(_type(one, schema) for one in spec["anyOf"] if one.get("type") != "null")
        )
    if "$ref" in spec:
        return _type(_referred(spec, schema), schema)
    kind = spec.get("type", "anything")
    if kind == "array":
        return f"list of {_type(spec.get('items', {}), schema)}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {spec[key]:g}" for key, sign in limits.items() if key in spec]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _default(spec: dict[str, Any]) -> str:
    return f"`{json.dumps(spec['default'])}`" if spec.get("default") is not None else ""


def plan_headline() -> str:
    """The arithmetic of a million personalized GPT-3 models."""
    from modicum.models.architecture import read_architecture
    from modicum.models.plan import make_plan

    plan = make_plan(
        read_architecture("gpt3"),
        methods=["lora", "lora_xs"],
        targets=["q_proj", "v_proj"],
        users=10**6,
        dtype="float16",
    )
    rows = [
        [
            f"`{row.method}`, rank {row.rank}",
            row.trained,
            f"{row.payload_bytes / 1024:,.0f} KiB",
            f"{row.total_bytes / 1e12:,.3g} TB",
            f"{row.basis_bytes / 1e6:,.0f} MB",
        ]
        for row in plan.rows
    ]
    return table(
        ["GPT-3, query and value", "trained", "one adapter", "a million users, all in", "of it shared, once"],
        rows,
    )


def save_load() -> str:
    """Bytes and loading time of one adapter, as measured by benchmarks/micro/save_load.py."""
    file = ROOT / "benchmarks" / "micro" / "results" / "save_load.json"
    if not file.is_file():
        return "*Not measured yet.*"
    found = json.loads(file.read_text(encoding="utf-8"))
    ours, lora = found["lora_xs"], found["lora"]
    rows = [
        ["LoRA-XS, compact record", ours["bytes"]["record_bytes"], _ms(ours["seconds"]["record"]["median"])],
        [
            "LoRA-XS, PEFT folder",
            ours["bytes"]["folder_bytes"],
            _ms(ours["seconds"]["folder_through_peft"]["median"]),
        ],
        [
            "LoRA, PEFT folder",
            lora["bytes"]["folder_bytes"],
            _ms(lora["seconds"]["folder_through_peft"]["median"]),
        ],
    ]
    for row, bits in zip(
        rows, (8 * ours["bytes"]["payload_bytes"] // ours["bytes"]["values"], 32, 32), strict=True
    ):
        row.insert(1, f"{bits} bits")
    shown = table(["one adapter", "per number", "bytes", "load, median"], rows)
    return f"{shown}\n\nMeasured: {found['what']} (`{found['command']}`)."


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


PARTS = {
    "save-load": save_load,
    "methods": methods_table,
    "baselines": baselines_table,
    "verbs": verbs_table,
    "plan-headline": plan_headline,
}

if __name__ == "__main__":
    sys.exit(main())
