"""The prefix cache: pages of keys and values are shared by what made them, never by tokens alone.

Transformers names a page by a hash chain over its tokens and all before it. Under two adapters, equal tokens have
different keys and values, so a chain of ours begins with the realm of the request (version and salt):

    name_0 = H(realm ‖ tokens of page 0),  name_i = H(name_{i−1} ‖ tokens of page i)

with 256 bits, where nobody finds two beginnings that meet. A request without a realm shares nothing.
"""

from __future__ import annotations

import hashlib
import inspect
from array import array
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators import CacheAllocator

#: what is replaced, or relied on, and how it looked when this was written
_SHAPES = {
    "search_prefix_match": ("request_id", "prompt_ids"),
    "mark_complete_blocks": ("state", "complete_blocks"),
}
_ALLOCATOR_SHAPES = {
    "match_prefix_blocks": ("prompt_ids",),
    "acquire_prefix_blocks": ("request_id", "prefix_len", "block_ids"),
    "mark_complete_blocks": ("request_id", "token_ids", "new_new_blocks"),
}
_LEDGER = ("hash_to_block", "block_to_hash", "register_new_hash", "acquire", "release")


class PrefixCache:
    """Replaces, in one cache of Transformers, how pages are found and named.

    `realm(request_id)` gives what must be equal besides the tokens, None for a request that shares nothing;
    `found(request_id, tokens)` is told how much of a prompt was there.

    Raises:
        ConfigError: this version of Transformers does it otherwise than the one this was written for.
    """

    def __init__(
        self,
        cache: PagedAttentionCache,
        realm: Callable[[str], bytes | None],
        found: Callable[[str, int], None],
    ) -> None:
        _check(cache)
        self._cache, self._realm, self._found = cache, realm, found
        replaced: Any = cache
        replaced.search_prefix_match = self._search
        for allocator in cache.cache_allocators.values():
            replaced = allocator
            # nothing may go back to names of tokens alone
            replaced.match_prefix_blocks = _refuse
            replaced.mark_complete_blocks = lambda *given, a=allocator: self._mark(a, *given)

    def _search(self, request_id: str, prompt_ids: list[int]) -> int:
        realm = self._realm(request_id)
        if realm is None:
            return 0
        matches = {}
        for name, allocator in self._cache.cache_allocators.items():
            matches[name] = _matching(allocator, realm, prompt_ids)
        length = min(
            len(blocks) * self._cache.cache_allocators[name].tokens_per_page
            for name, blocks in matches.items()
        )
        if length:
            for name, blocks in matches.items():
                self._cache.cache_allocators[name].acquire_prefix_blocks(request_id, length, blocks)
            self._found(request_id, length)
        return length

    def _mark(self, allocator: CacheAllocator, request_id: str, token_ids: list[int], count: int) -> None:
        """Names the pages that the last step filled; a page that is there already takes the new one's place."""
        name = self._realm(request_id)
        if name is None:
            return
        size, ledger, blocks = allocator.tokens_per_page, allocator.ledger, allocator.block_table[request_id]
        names: dict[int, Any] = ledger.block_to_hash
        for i, block in enumerate(blocks):
            known = names.get(block)
            if known is None:
                tokens = token_ids[i * size : (i + 1) * size]
                if count == 0 or len(tokens) < size:
                    return
                count -= 1
                known = page_name(name, tokens)
                same = ledger.register_new_hash(block, known)  # pyright: ignore[reportArgumentType] - opaque there
                if same is not None:
                    ledger.acquire(same)
                    blocks[i] = same
                    if ledger.release(block):
                        allocator.pool.free_blocks(allocator.index, [block])
            name = known


def page_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page of `tokens` behind the page (or realm) `before`."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=32).digest()


def _matching(allocator: CacheAllocator, realm: bytes, prompt: list[int]) -> list[int]:
    """The pages that hold the beginning of the prompt; its last token is always left to be computed."""
    size, name, blocks = allocator.tokens_per_page, realm, []
    table: dict[Any, int] = allocator.ledger.hash_to_block
    for start in range(0, (len(prompt) - 1) // size * size, size):
        name = page_name(name, prompt[start : start + size])
        block = table.get(name)
        if block is None:
            break
        blocks.append(block)
    return blocks


def _refuse(*_: object, **__: object) -> None:
    raise RuntimeError("pages were asked for by their tokens alone, which would mix adapters")


def _check(cache: PagedAttentionCache) -> None:
    checked: list[tuple[Any, dict[str, tuple[str, ...]]]] = [(cache, _SHAPES)]
    checked += [(allocator, _ALLOCATOR_SHAPES) for allocator in cache.cache_allocators.values()]
    other = []
    for owner, shapes in checked:
        for name, wanted in shapes.items():
            method = getattr(owner, name, None)
            if method is None or tuple(inspect.signature(method).parameters) != wanted:
                other.append(f"{type(owner).__name__}.{name}")
    for allocator in cache.cache_allocators.values():
        other += [f"BlockLedger.{name}" for name in _LEDGER if not hasattr(allocator.ledger, name)]
    if other:
        from transformers import __version__

        raise ConfigError(
            f"Transformers {__version__} keeps its prefix cache otherwise ({', '.join(sorted(set(other)))}); "
            "start with prefix_caching off, or use the version in constraints.txt"
        )
