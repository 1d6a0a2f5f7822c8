"""The command line: one thin file per verb, which parses, calls a lower floor and prints.

How to write a verb
-------------------

* **The file name is the verb**: `cli/tune.py` is `modicum tune`. A name that Python keeps to itself gets a
  trailing underscore that is not part of the verb: `eval_.py` is `modicum eval`, `import_.py` is
  `modicum import`. Files that start with an underscore are no verbs.
* **The first line of the module docstring is the verb's line in `modicum --help`.** It is read without
  importing the file.
* The file defines **either** `run`, a function that becomes the command, **or** `app`, a `typer.Typer` with
  several commands (`modicum basis build`). The docstring of `run` is the text of `modicum VERB --help`.
* **Nothing heavy at the top of the file**: only the standard library, typer and `modicum.cli._common`. torch
  and the other floors are imported inside `run`, so that help and completion answer at once.
* **Results** go through `_common.emit(result, as_json, table)`: a table for people, or with `--json` exactly
  one JSON object on stdout. Progress goes to stderr, through `_common.progress`.
* **Errors** are raised, not printed. `modicum.cli._root.main` turns `ModicumError`, file errors and Ctrl-C
  into one line on stderr (with `--json`: an object with the key `error` on stdout) and an exit code.
* A verb stays under 120 lines. Logic belongs to a lower floor.

A complete verb:

    \"\"\"Print how many numbers a file holds.\"\"\"

    from pathlib import Path
    from typing import Annotated, Any

    import typer

    from modicum.cli._common import JsonFlag, emit, table


    def run(
        file: Annotated[Path, typer.Argument(help="A safetensors file.")],
        as_json: JsonFlag = False,
    ) -> None:
        \"\"\"Print how many numbers FILE holds, tensor by tensor.\"\"\"
        from modicum.store.counting import count_numbers

        emit(count_numbers(file), as_json, _table)


    def _table(result: dict[str, Any]) -> Any:
        return table("numbers", ["tensor", "numbers"], [[k, f"{v:,}"] for k, v in result.items()])
"""

from modicum.cli._root import main

__all__ = ["main"]
