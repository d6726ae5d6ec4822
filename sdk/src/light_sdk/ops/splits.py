"""Requests of decodes cut along their keys: what the plans of `attention` and of `mla_attention` have in common."""

import triton
import triton.language as tl

__all__ = ["load_item", "write_plan"]


@triton.jit
def _cut(
    table_ptr: tl.tensor,
    stride: tl.tensor,
    first_entry: tl.tensor,
    owner: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    splits: tl.tensor,
    first_part: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
) -> None:
    """Writes `splits` entries (owner, first key, end of the keys, part) that cover the keys begin … end - 1."""
    # Parts differ by a block at most; this rounding leaves none of them empty.
    blocks = (end - begin + BLOCK_N - 1) // BLOCK_N
    length = (blocks + splits - 1) // tl.maximum(splits, 1) * BLOCK_N
    split = tl.arange(0, BLOCK_SPLITS)
    entry, mask, begins = table_ptr + first_entry + split, split < splits, begin + split * length
    tl.store(entry, owner + tl.zeros_like(split), mask=mask)
    tl.store(entry + stride, begins, mask=mask)
    tl.store(entry + 2 * stride, tl.minimum(begins + length, end), mask=mask)
    tl.store(entry + 3 * stride, tl.where(first_part < 0, -1, first_part + split), mask=mask)


@triton.jit
def write_plan(
    first_parts_ptr: tl.tensor,
    items_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    members_ptr: tl.tensor,
    items_stride: tl.tensor,
    tiles_stride: tl.tensor,
    num_decodes: tl.tensor,
    requests: tl.tensor,
    begins: tl.tensor,
    ends: tl.tensor,
    shared: tl.tensor,
    splits: tl.tensor,
    earlier: tl.tensor,
    tile_budget: tl.tensor,
    tile_min_blocks: tl.tensor,
    HAS_SHARED: tl.constexpr,
    TILE_REQUESTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
) -> None:
    """Writes the items of the request at this program's place, and the tiles of a prefix that it is the first to share, to
    the tensors of a `DecodePlan`. Vectors are of all places, those beyond `num_decodes` with 0 splits.

    Args:
        members_ptr: the third line of `Step.shared_prefixes`.
        requests: of each place.
        begins, ends: of the keys that the request attends to by itself.
        shared: keys before them that others attend to as well.
        splits: items of each request.
        earlier: whose items come before those of this place.
        tile_budget, tile_min_blocks: as the budget and the least blocks of items, of tiles.
    """
    place, index = tl.program_id(0), tl.arange(0, BLOCK_B)
    here, before = index == place, index < place
    parts = splits
    if HAS_SHARED:
        members = tl.load(members_ptr + index, mask=index < num_decodes, other=0)
        is_first = (shared > 0) & (members % TILE_REQUESTS == 0)
        tile_blocks = (shared + TILE_BLOCK_N - 1) // TILE_BLOCK_N
        all_blocks = tl.sum(tl.where(is_first, tile_blocks, 0), axis=0)
        tile_chunk = tl.maximum((all_blocks + tile_budget - 1) // tile_budget, tile_min_blocks)
        tile_splits = (tile_blocks + tile_chunk - 1) // tile_chunk
        parts += tile_splits

    request = tl.sum(tl.where(here, requests, 0), axis=0)
    begin = tl.sum(tl.where(here, begins, 0), axis=0)
    end = tl.sum(tl.where(here, ends, 0), axis=0)
    own_splits = tl.sum(tl.where(here, splits, 0), axis=0)
    own_parts = tl.sum(tl.where(here, parts, 0), axis=0)
    first_item = tl.sum(tl.where(earlier, splits, 0), axis=0)
    first_part = tl.sum(tl.where(before, parts, 0), axis=0)
    item_part = tl.where(own_parts == 1, -1, first_part + own_parts - own_splits)
    _cut(items_ptr, items_stride, first_item, request, begin, end, own_splits, item_part, BLOCK_N, BLOCK_ITEMS)
    split = tl.arange(0, BLOCK_ITEMS)
    slot_row = tl.load(rows_ptr + request) + tl.zeros_like(split)
    tl.store(items_ptr + 4 * items_stride + first_item + split, slot_row, mask=split < own_splits)
    tl.store(first_parts_ptr + place, first_part)
    if HAS_SHARED:
        tiles = tl.where(is_first, tile_splits, 0)
        own_tiles = tl.sum(tl.where(here, tiles, 0), axis=0)
        own_shared = tl.sum(tl.where(here, shared, 0), axis=0)
        first_tile = tl.sum(tl.where(before, tiles, 0), axis=0)
        _cut(tiles_ptr, tiles_stride, first_tile, place, 0, own_shared, own_tiles, 0, TILE_BLOCK_N, BLOCK_TILES)
        if place == num_decodes - 1:
            tl.store(counts_ptr + 1, first_tile + own_tiles)
    if place == num_decodes - 1:
        tl.store(first_parts_ptr + num_decodes, first_part + own_parts)
        tl.store(counts_ptr, tl.sum(splits, axis=0))


@triton.jit
def load_item(items_ptr: tl.tensor, items_stride: tl.tensor, item: tl.tensor) -> tuple[tl.tensor, ...]:
    """Request, first key, end of the keys, part and row of the slot table; of no item, nothing in particular."""
    entry = items_ptr + item
    request, begin, end = tl.load(entry), tl.load(entry + items_stride), tl.load(entry + 2 * items_stride)
    return request, begin, end, tl.load(entry + 3 * items_stride), tl.load(entry + 4 * items_stride)
