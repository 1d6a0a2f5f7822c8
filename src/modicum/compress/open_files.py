"""Weights files of a checkpoint, each opened once and read tensor by tensor."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, final

from modicum.errors import CorruptAdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


@final
class OpenFiles:
    """Tensors by key, views of the files that hold them; `close` ends that."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self._opened: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()

    def tensor(self, key: str) -> Tensor:
        """The tensor `key`, a view of its file.

        Raises:
            CorruptAdapterError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        file = self.files[key]
        try:
            if file not in self._opened:
                self._opened[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            return self._opened[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CorruptAdapterError(
                f"{file} cannot be read ({error}); download or copy it again"
            ) from error

    def close(self) -> None:
        """Close all files."""
        self._stack.close()
