"""What a search leaves: all points, the Pareto front as table and picture, and the best sub-network."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from modicum.search.pareto import draw, front, page
from modicum.search.study import FILE
from modicum.store.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from modicum.search.options import SearchOptions
    from modicum.search.space import SearchSpace
    from modicum.search.study import Point

REPORT, SUB_NETWORK, PAGE, PICTURE = "search.json", "sub_network.json", "pareto.html", "pareto.png"


@dataclass(frozen=True)
class SearchResult:
    """A finished search."""

    folder: Path
    #: objective -> whether larger is better
    objectives: dict[str, bool]
    points: list[Point]
    #: the best trade-offs within the budgets
    front: list[Point]
    #: the point with the best metric within the budgets, None where no point keeps them
    best: Point | None
    #: the super-network's costs
    whole: dict[str, float]
    space_size: int
    strategy: str

    def sub_network(self) -> dict[str, Any] | None:
        """The best sub-network as `SubNetwork.as_dict` gives it."""
        file = self.folder / SUB_NETWORK
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def clear(folder: Path) -> None:
    """Remove what a search left in `folder`, and nothing else."""
    for name in (FILE, f"{FILE}-journal", REPORT, SUB_NETWORK, PAGE, PICTURE):
        (folder / name).unlink(missing_ok=True)


def write_result(
    folder: Path,
    space: SearchSpace,
    options: SearchOptions,
    maximized: Mapping[str, bool],
    points: list[Point],
    whole: Mapping[str, float],
) -> SearchResult:
    """The result of a search with `points`, written to `folder`: JSON, sub-network and pictures."""
    best = front(points, maximized)
    chosen = best[0] if best else None
    result = SearchResult(
        folder, dict(maximized), points, best, chosen, dict(whole), space.size, options.strategy
    )
    report = asdict(result) | {
        "folder": str(folder),
        "space": space.spec.model_dump(exclude_unset=True),
        "options": options.model_dump(),
    }
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    if chosen is None:
        (folder / SUB_NETWORK).unlink(missing_ok=True)
    else:
        values = space.sub_network(chosen.choices).as_dict()
        write_text(folder / SUB_NETWORK, json.dumps(values, indent=2) + "\n")
    title = f"{space.spec.name}: {len(points)} of {space.size:,} sub-networks ({options.strategy})"
    figure = draw(points, best, maximized, title)
    write_text(folder / PAGE, page(figure, points, best, title))
    figure.savefig(folder / PICTURE, dpi=120)
    return result
