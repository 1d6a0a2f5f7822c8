"""YAML with the line of every key, so that an error can say where it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from modicum.errors import ConfigError, did_you_mean

#: path of keys and list positions -> line in the file, counted from 1
Lines = dict[tuple[str | int, ...], int]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for numbers such as `1e-3`, which it would read as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def read_yaml_file(file: Path, what: str) -> tuple[Any, Lines]:
    """The values and the lines of a YAML file; `what` it should hold, for the message.

    Raises:
        ConfigError: it cannot be read, with the nearest name beside it; or it is no YAML.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        folder = file.parent if file.parent.is_dir() else Path.cwd()
        beside = [entry.name for entry in folder.glob("*.y*ml")]
        raise ConfigError(
            f"cannot read the {what} {file}{did_you_mean(file.name, beside)}: {error}"
        ) from error
    return read_yaml(text, str(file))


def read_yaml(text: str, name: str) -> tuple[Any, Lines]:
    """The values of a YAML document and the line of every key.

    Raises:
        ConfigError: no valid YAML, or a key that occurs twice; with the line.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: Lines = {}
        twice: list[str] = []
        _walk(node, (), lines, twice)
        if twice:
            raise ConfigError(f"{name}: " + "; ".join(twice))
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: no valid YAML: {error.problem or error.context}") from error
    finally:
        loader.dispose()


def yaml_value(text: str) -> Any:
    """`text` read as one YAML value."""
    return read_yaml(text, repr(text))[0]


def _walk(node: yaml.Node, path: tuple[str | int, ...], lines: Lines, twice: list[str]) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            here = (*path, str(key.value))
            if key.value in seen:
                twice.append(f"line {key.start_mark.line + 1}: {'.'.join(map(str, here))} is given twice")
            seen.add(key.value)
            lines[here] = key.start_mark.line + 1
            _walk(value, here, lines, twice)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, index), lines, twice)
