"""What experiments have found."""

from typing import Any

from modicum.cli._common import JsonFlag, emit, table
from modicum.cli._experiment._shared import URL, KeyOption, NameArgument, UrlOption, server
from modicum.cli._experiment._shared import show as shown
from modicum.cli._store._shared import plain


def list_(url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False) -> None:
    """List all experiments, the newest first."""
    emit(server(url, key).get("experiments"), as_json, _listed)


def show(name: NameArgument, url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False) -> None:
    """Show what an experiment has found so far, arm by arm, with intervals."""
    emit(server(url, key).get("experiments", name), as_json, shown)


def _listed(found: dict[str, Any]) -> Any:
    columns = ["name", "state", "arms", "users", "winner", "why it ended"]
    rows = [
        [
            plain(one["name"]),
            one["state"],
            ", ".join(plain(f"{arm['label']} {arm['version'] or 'base model'}") for arm in one["arms"]),
            f"{sum(arm['users'] for arm in one['arms']):,}",
            plain(one["winner"] or ""),
            plain(one["reason"] or ""),
        ]
        for one in found["experiments"]
    ]
    return table("experiments", columns, rows)
