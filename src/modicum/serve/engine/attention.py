"""Attention by request, for Transformers' continuous batching, through its attention interface.

Transformers' `sdpa` computes every query against the keys of all requests, and a mask hides what is not its own:
n times the work for n requests, and 0 · NaN = NaN carries one request's broken numbers to all others. Here a request
only ever meets its own keys and values:

    few queries (decoding)   the C library reads keys and values where they lie in the cache (`native/paged.py`)
    everything else          torch, one request at a time, over the keys that Transformers has put together

The second also takes sliding windows, soft caps and attention sinks, and all devices.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from modicum.serve.engine.native import paged

if TYPE_CHECKING:
    from torch import Tensor, nn

#: the name of it among Transformers' attention functions; no mask is made for it
NAME = "modicum_by_request"
#: queries of a request up to which the library takes it; from there on products of matrices are faster
_FEW = 4
_local = threading.local()


def register() -> str:
    """The name under which models find it; see `PreTrainedModel.set_attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    return NAME


class Plan(NamedTuple):
    """What is the same for all layers of a kind during a step."""

    #: bounds of the requests among the queries, and among the keys
    queries: list[int]
    keys: list[int]
    #: where every key lies in the cache; empty if all are new
    rows: Tensor
    #: (n, 3) of the tokens in requests with few queries, as `paged.attend` wants them
    few: np.ndarray
    #: the requests with more, and those with a single query
    many: list[int]
    single: list[int]

    def bounds(self, request: int) -> tuple[slice, slice]:
        """The request's queries and keys."""
        return slice(*self.queries[request : request + 2]), slice(*self.keys[request : request + 2])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - there is none
    dropout: float = 0.0,  # noqa: ARG001 - nothing is trained
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Outputs (1, tokens, heads, size) of the tokens of all requests, one after the other.

    `query` (1, heads, tokens, size), `key` and `value` (1, groups, tokens, size) are of the new tokens; `kwargs` are
    Transformers' `PagedAttentionArgs`. New keys and values are written to the cache, which has room for as many groups
    in every layer: where a layer has fewer, as in an extracted model, the rest of its room is left empty.
    """
    groups, cache, layer = key.shape[1], kwargs["cache"], int(getattr(module, "layer_idx", 0))
    allocator = cache.layer_to_allocator[layer]
    plan = _plan(kwargs, allocator.index)
    rule = Rule(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        allocator.sliding_window if allocator.layer_type == "sliding_attention" else None,
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
    )
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    if (missing := allocator.cache_tensor.shape[-2] - groups) > 0:
        key, value = (F.pad(part, (0, 0, 0, 0, 0, missing)) for part in (key, value))
    if len(plan.few) and rule.plain and paged.takes(query, allocator.cache_tensor):
        written = _written(allocator, layer, plan, kwargs, key[0], value[0])
        keys, values = (part[:, :groups] for part in written)
        rows = plan.rows if len(plan.rows) else torch.arange(query.shape[2])
        paged.attend(query[0], keys, values, out, rows.numpy(), plan.few, rule.scale)
        for request in plan.many:
            mine, seen = plan.bounds(request)
            places = rows[seen]
            own = [part.index_select(0, places).transpose(0, 1) for part in (keys, values)]
            out[mine] = dense(query[0, :, mine], own[0], own[1], rule)
        return out[None], None
    key, value = (part[:, :groups] for part in cache.update(key, value, layer, dict(kwargs)))
    one_by_one = range(len(plan.queries) - 1)
    if len(plan.single) > 1 and rule.direct:
        _together(plan, query[0], key[0], value[0], out, rule)
        one_by_one = sorted(set(one_by_one) - set(plan.single))
    for request in one_by_one:
        mine, seen = plan.bounds(request)
        out[mine] = dense(query[0, :, mine], key[0, :, seen], value[0, :, seen], rule)
    return out[None], None


class Rule(NamedTuple):
    """How scores become shares."""

    scale: float
    #: keys that a query looks at, itself among them; None: all before it
    window: int | None = None
    softcap: float | None = None
    #: (heads), scores that take a share and give nothing
    sinks: Tensor | None = None

    @property
    def direct(self) -> bool:
        """Whether shares are the softmax of scaled products."""
        return self.softcap is None and self.sinks is None

    @property
    def plain(self) -> bool:
        """Whether, besides, a query looks at all before it."""
        return self.direct and self.window is None


def dense(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """One request's attention (n, heads, size): `query` (heads, n, size), `key`, `value` (groups, m, size), m ≥ n.

    The last query is at the place of the last key.
    """
    (heads, n, _), (groups, m, _) = query.shape, key.shape
    key, value = (part.repeat_interleave(heads // groups, 0) for part in (key, value))
    if rule.plain and n in (1, m):
        found = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=n > 1, scale=rule.scale
        )[0]
        return found.transpose(0, 1)
    place = torch.arange(m - n, m, device=query.device)[:, None]
    other = torch.arange(m, device=query.device)
    seen = other <= place
    if rule.window is not None:
        seen &= other > place - rule.window
    if rule.direct:
        found = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=seen, scale=rule.scale
        )[0]
        return found.transpose(0, 1)
    scores = (query @ key.transpose(1, 2)).float() * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.float()[:, None, None].expand(-1, n, 1)], -1)
    shares = scores.softmax(-1)[..., :m].to(value.dtype)
    return (shares @ value).transpose(0, 1)


def _together(plan: Plan, query: Tensor, key: Tensor, value: Tensor, out: Tensor, rule: Rule) -> None:
    """All requests with one query at once, each over as many keys as the longest has; a window is no shorter."""
    starts = torch.tensor([plan.keys[i] for i in plan.single], device=query.device)
    counts = torch.tensor([plan.keys[i + 1] - plan.keys[i] for i in plan.single], device=query.device)
    steps = torch.arange(int(counts.max()), device=query.device)
    seen = steps < counts[:, None]
    # behind its own keys a request reads its first one again, never another's
    places = starts[:, None] + torch.where(seen, steps, 0)
    tokens = torch.tensor([plan.queries[i] for i in plan.single], device=query.device)
    each = query.shape[0] // key.shape[0]
    own = (part[:, places].transpose(0, 1).repeat_interleave(each, 1) for part in (key, value))
    found = F.scaled_dot_product_attention(
        query[:, tokens].transpose(0, 1)[:, :, None], *own, attn_mask=seen[:, None, None], scale=rule.scale
    )
    out[tokens] = found[:, :, 0]


def _written(
    allocator: Any, layer: int, plan: Plan, kwargs: dict[str, Any], key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values by token (any number, groups, size) after the new ones were written among them."""
    new = key.transpose(0, 1), value.transpose(0, 1)
    nothing = plan.rows[:0]
    allocator.update(*new, layer, nothing, kwargs["write_index"][allocator.index])
    if not len(plan.rows):
        return new[0].contiguous(), new[1].contiguous()
    keys, values = allocator.get_cache_for_block_table(layer)
    return keys.flatten(0, 1), values.flatten(0, 1)


def _plan(kwargs: dict[str, Any], index: int) -> Plan:
    """The plan of this step for one kind of layers; made by its first layer."""
    step = kwargs["read_index"]
    # a list of this step alone; as long as it is held, no other one can have its identity
    if getattr(_local, "step", None) is not step:
        _local.step, _local.plans = step, {}
    if index not in _local.plans:
        _local.plans[index] = _planned(kwargs, step[index], index)
    return _local.plans[index]


def _planned(kwargs: dict[str, Any], rows: Tensor, index: int) -> Plan:
    kind = next(kind for kind, found in kwargs["cache"].cache_allocators.items() if found.index == index)
    queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"][kind].tolist()
    few, many, single = [], [], []
    for request, (first, last) in enumerate(itertools.pairwise(queries)):
        start, stop = keys[request : request + 2]
        if last - first > _FEW:
            many.append(request)
        else:
            few += [(token, start, stop - start - (last - 1 - token)) for token in range(first, last)]
        if last - first == 1:
            single.append(request)
    return Plan(queries, keys, rows, np.array(few, np.int64).reshape(-1, 3), many, single)
