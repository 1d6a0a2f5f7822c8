"""A model run layer by layer, so that one decoder or encoder layer is all that is ever in memory.

Hidden states of all sequences wait in front of a layer, pass through it, and the layer goes. The model itself
says what happens around its layers (embeddings, masks, positions, final norm, output head): its own forward runs
with the layers replaced by recorders at the beginning, and by the finished hidden states at the end.
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.compress.source import WITHOUT_TEXT, empty
from modicum.errors import ConfigError
from modicum.models.loading import HEAD_NAMES, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modicum.compress.source import Source


class _EnteredError(Exception):
    """All layers were given what they are given; the rest of a forward pass is of no interest."""


def layer_names(model: nn.Module) -> list[str]:
    """The names of the decoder layers of a causal language model in order, empty for other models."""
    return stack_names(model) if getattr(model, "lm_head", None) is not None else []


def stack_names(model: nn.Module) -> list[str]:
    """The names of the layers of a decoder or an encoder in order; empty for models with both, or without a stack."""
    config = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None or getattr(config, "is_encoder_decoder", False):
        return []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return [f"{name}.{index}" for index in range(depth)]
    return []


def head_name(model: Any) -> str | None:
    """The name of the output head of a causal language model, None for other models."""
    head = model.get_output_embeddings() if layer_names(model) else None
    return next((name for name, module in model.named_modules() if module is head), None)


def behind_names(model: nn.Module) -> list[str]:
    """The names of the modules behind the layers that a checkpoint saved for another task may lack."""
    if layer_names(model):
        return []
    ends = (*HEAD_NAMES, "pooler")
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends]


class Stack:
    """The layers of a source. Sequences go through one at a time, in float32."""

    def __init__(self, source: Source) -> None:
        from accelerate import init_empty_weights

        self.source = source
        config = copy.deepcopy(source.config)
        # layers are run again and again, and would find what they cached
        config.get_text_config().use_cache = False
        # buffers (rotary frequencies) are computed, parameters take no memory
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            self.model: Any = type(source.model)._from_config(config, dtype=torch.float32)  # noqa: SLF001 - as Auto classes do
        self.model.eval()
        self.names = stack_names(self.model)
        if not self.names:
            raise ConfigError(
                f"{type(self.model).__name__} has no stack of layers to go through one by one. {WITHOUT_TEXT}"
            )
        self.layers = [self.model.get_submodule(name) for name in self.names]
        #: what the model gives each layer beside the hidden states
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        #: what a layer returns behind the hidden states, None if it returns nothing else; "?" before the first
        self._rest: tuple[Any, ...] | str | None = "?"
        #: the last sequence in front of the first layer
        self._entered = torch.empty(0)

    @torch.no_grad()
    def enter(self, *streams: Tensor) -> list[Tensor]:
        """The hidden states (sequences, length, width) in front of the first layer, of each (sequences, length) ids.

        All streams have the same length, so that masks and positions, which are noted here, serve all of them.

        Raises:
            ConfigError: the layers are given something that depends on the tokens.
        """
        with self._outside(), self.layer(0), self._instead(self._note):
            return [torch.cat([self._first(row) for row in ids.split(1)]) for ids in streams]

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The layer with its weights; they are gone afterwards."""
        layer = self.layers[index]
        self.source.fill(layer, self.names[index])
        try:
            yield layer
        finally:
            empty(layer)

    @torch.no_grad()
    def advance(self, index: int, hidden: Tensor, *, keep: bool = True) -> None:
        """Run all hidden states through a layer, in place; with `keep` False only for those who watch its inputs."""
        args, kwargs = self._given[index]
        for row in range(len(hidden)):
            result = self.layers[index](hidden[row : row + 1], *args, **kwargs)
            if keep:
                hidden[row : row + 1] = result if self._rest is None else result[0]

    @torch.no_grad()
    def loss(self, ids: Tensor, hidden: Tensor, head: Tensor | None = None) -> float:
        """The mean negative log-likelihood of the next token, from the hidden states behind the last layer.

        For causal language models only. `head` is a weight in place of the output head's own.
        """
        total = 0.0
        with self._outside(head):
            for row in range(len(ids)):
                finished = hidden[row : row + 1]
                with self._instead(lambda _i, _h, _a, _k, done=finished: done):
                    logits = self.model(input_ids=ids[row : row + 1]).logits
                total += float(F.cross_entropy(logits[0, :-1].float(), ids[row, 1:], reduction="sum"))
        return total / (ids.shape[0] * (ids.shape[1] - 1))

    @contextlib.contextmanager
    def _outside(self, head: Tensor | None = None) -> Iterator[None]:
        """Everything but the layers, with its weights; `head` in place of the output head's."""
        skip = [f"{name}." for name in [*self.names, *behind_names(self.model)]]
        if head is not None:
            skip.append(f"{head_name(self.model)}.weight")
            self.model.get_output_embeddings().weight = nn.Parameter(head, requires_grad=False)
        self.source.fill(self.model, "", skip=tuple(skip))
        try:
            yield
        finally:
            empty(self.model)

    def _first(self, ids: Tensor) -> Tensor:
        before, self._given = self._given, []
        with contextlib.suppress(_EnteredError):
            self.model(input_ids=ids)
        if before and not all(map(_same, before, self._given)):
            raise ConfigError(
                f"the layers of {type(self.model).__name__} are given more of a sequence than its hidden states, and "
                f"cannot be gone through one by one. {WITHOUT_TEXT}"
            )
        return self._entered

    def _note(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """In place of a layer: keeps what it is given, and hands the hidden states on."""
        self._given.append((args, kwargs))
        if index == 0:
            self._entered = hidden
            if self._rest == "?":
                layer = self.layers[0]
                result = type(layer).forward(layer, hidden, *args, **kwargs)
                self._rest = None if isinstance(result, Tensor) else tuple(result[1:])
        if index == len(self.layers) - 1:
            raise _EnteredError
        return hidden

    @contextlib.contextmanager
    def _instead(
        self, forward: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
    ) -> Iterator[None]:
        """The model with `forward(index, hidden, other arguments)` in place of each layer."""

        def stand_in(index: int) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                hidden = forward(index, hidden, args[1:], kwargs)
                return hidden if self._rest is None else (hidden, *self._rest)

            return run

        for index, layer in enumerate(self.layers):
            layer.forward = stand_in(index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


def _same(one: Any, other: Any) -> bool:
    """Whether two sequences give a layer the same, as far as tensors go."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(value, other.get(name)) for name, value in one.items())
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, Tensor) == isinstance(other, Tensor)


@contextlib.contextmanager
def watching(layer: nn.Module, names: list[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see(name, x)` is called with each input of the modules of `layer` called `names`."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args: see(name, args[0])

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
