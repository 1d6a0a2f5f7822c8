"""The computation of a decoder-only model in a dozen steps, which each graph engine's file knows how to write."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.compress.export._source import Source


class Graph(abc.ABC):
    """What an engine's file has to build; values are whatever stands for a tensor in its graph."""

    @abc.abstractmethod
    def embed(self, name: str) -> Any:
        """The rows of the embedding for the input tokens, (batch, tokens, hidden)."""

    @abc.abstractmethod
    def norm(self, x: Any, name: str) -> Any:
        """RMS normalisation with the weight of the module `name`."""

    @abc.abstractmethod
    def linear(self, x: Any, name: str) -> Any:
        """X ŵᵀ + bias for the linear layer `name`."""

    @abc.abstractmethod
    def attend(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        """Causal attention over cached and new tokens, with rotary positions; (batch, tokens, heads · width)."""

    @abc.abstractmethod
    def gated(self, gate: Any, up: Any) -> Any:
        """Silu(gate) · up."""

    @abc.abstractmethod
    def add(self, x: Any, y: Any) -> Any:
        """X + y."""


def logits(graph: Graph, source: Source) -> Any:
    """The logits (batch, tokens, vocabulary) as a value of `graph`."""
    x = graph.embed("model.embed_tokens")
    for layer in range(source.layers):
        at = f"model.layers.{layer}"
        h = graph.norm(x, f"{at}.input_layernorm")
        q, k, v = (graph.linear(h, f"{at}.self_attn.{name}_proj") for name in "qkv")
        x = graph.add(x, graph.linear(graph.attend(layer, q, k, v), f"{at}.self_attn.o_proj"))
        h = graph.norm(x, f"{at}.post_attention_layernorm")
        gate, up = (graph.linear(h, f"{at}.mlp.{name}_proj") for name in ("gate", "up"))
        x = graph.add(x, graph.linear(graph.gated(gate, up), f"{at}.mlp.down_proj"))
    head = "model.embed_tokens" if source.tied else "lm_head"
    return graph.linear(graph.norm(x, "model.norm"), head)
