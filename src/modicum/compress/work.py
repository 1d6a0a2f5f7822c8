"""The folder in which a long job keeps what it has finished, and from which a model folder is published whole."""

from __future__ import annotations

import contextlib
import json
import shutil
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, CorruptAdapterError
from modicum.store.atomic import flush, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

_OPTIONS = "options.json"
_MODEL = "model"
_OLD = "replaced"


class Work:
    """`OUTPUT.partial`: the options of the job, one file per finished unit, streams to go on with."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")

    def fault(self, *, overwrite: bool, resume: bool = False, resumable: bool = False) -> str | None:
        """Why the job cannot begin, None if it can. `resumable`: whether jobs of its kind can go on at all."""
        if self.output.exists() and not overwrite:
            return f"{self.output} exists already; choose another name or pass --overwrite"
        if self.folder.exists() and not (resume or overwrite):
            ways = ["go on with --resume"] if resumable else []
            ways += ["start anew with --overwrite", "or delete it"]
            return f"{self.folder} holds an unfinished run; {', '.join(ways)}"
        return None

    def begin(self, options: Mapping[str, Any], *, resume: bool) -> None:
        """Set up the folder; a resumed one has to have the same options.

        Raises:
            ConfigError: the unfinished run had other options; all of them.
        """
        file = self.folder / _OPTIONS
        if resume and file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            wanted = json.loads(json.dumps(options))
            other = [
                f"{key} was {before.get(key)!r}, is {wanted.get(key)!r}"
                for key in sorted({*before, *wanted})
                if before.get(key) != wanted.get(key)
            ]
            if other:
                raise ConfigError(
                    f"{self.folder} was begun with other options: {'; '.join(other)}. Resume with the same ones, "
                    "or start anew with --overwrite"
                )
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(file, json.dumps(options, indent=2) + "\n")

    def save(self, name: str, tensors: Mapping[str, Tensor], about: Any) -> None:
        """Keep the result of a unit, all of it or nothing."""
        from safetensors.torch import save_file

        file = self._file(name)
        temporary = file.with_suffix(".new")
        save_file(dict(tensors), temporary, {"about": json.dumps(about)})
        flush(temporary)
        temporary.replace(file)
        flush(self.folder)

    def about(self, name: str) -> Any:
        """What was noted about a finished unit, None if it is not finished."""
        if not self._file(name).is_file():
            return None
        with self._open(name) as file:
            return json.loads((file.metadata() or {}).get("about", "null"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a finished unit, views of the file."""
        with self._open(name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping

    @property
    def model(self) -> Path:
        """A new empty folder for the finished model."""
        folder = self.folder / _MODEL
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    @property
    def finished(self) -> Path:
        """The folder of the finished model, as it is."""
        return self.folder / _MODEL

    def publish(self) -> None:
        """Put the finished model in the place of the output and remove the folder."""
        folder = self.finished
        for file in folder.iterdir():
            flush(file)
        flush(folder)
        if self.output.exists():
            self.output.rename(self.folder / _OLD)
        folder.rename(self.output)
        flush(self.output.parent)
        shutil.rmtree(self.folder)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(name), framework="pt") as file:
                yield file
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptAdapterError(
                f"{self._file(name)} cannot be read ({error}); delete {self.folder} and start anew"
            ) from error
