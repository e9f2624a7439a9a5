"""A network on an image too large for it: overlapping tiles, blended linearly."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def windows(length: int, size: int, overlap: int, cell: int = 1) -> list[tuple[int, Tensor]]:
    """The windows that cover 0 .. length-1: a list of (start, weights).

    All have `size` positions (`length`, where that is less), are spread evenly and overlap by `overlap` or more.
    weights: [size * cell], linear ramps towards the neighbours; at each position they sum to one over the windows.
    """
    if length <= size:
        return [(0, torch.ones(length * cell))]
    count = math.ceil((length - overlap) / (size - overlap))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    ramp = ((torch.arange(size * cell) + 0.5) / max(overlap * cell, 1)).clamp(max=1)
    weights = torch.zeros(count, length * cell)
    for i, start in enumerate(starts):
        up = ramp if i else 1
        down = ramp.flip(0) if i < count - 1 else 1
        weights[i, start * cell : (start + size) * cell] = up * down
    weights /= weights.sum(0)
    return [(start, w[start * cell : (start + size) * cell]) for start, w in zip(starts, weights, strict=True)]


@lru_cache(maxsize=8)
def tile_places(height: int, width: int, size: int, overlap: int, cell: int, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """The tiles of an image: a list of (top, left, weights [1, 1, cell * size, cell * size]). Kept, so that the weights are sent
    to the device once and not at every evaluation of a sampler."""
    rows, columns = (windows(n, size, overlap, cell) for n in (height, width))
    with torch.inference_mode(False):  # ordinary tensors, for whoever differentiates later
        return [(top, left, (v[:, None] * w)[None, None].to(device)) for top, v in rows for left, w in columns]


def tiled(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    size: int,
    overlap: int,
    cell_in: int = 1,
    cell_out: int = 1,
    batch: int = 1,
) -> Tensor:
    """network(x), computed tile by tile; exactly network(x) where x fits into one tile.

    network: [B, C, cell_in * h, cell_in * w] -> [B, C', cell_out * h, cell_out * w] for all B, h, w
    x: [B, C, H, W], H and W divisible by cell_in
    size, overlap: of the square tiles, in cells; 0 <= overlap < size
    batch: tiles per call of the network, which then gets [n * B, ...], n <= batch: all samples' first tile, all samples' second ...
    """
    height, width = (n // cell_in for n in x.shape[2:])
    tiles = tile_places(height, width, size, overlap, cell_out, x.device)
    if len(tiles) == 1:
        return network(x)
    out: Any = None
    for i in range(0, len(tiles), batch):
        part = tiles[i : i + batch]
        crops = [x[..., j * cell_in : (j + size) * cell_in, k * cell_in : (k + size) * cell_in] for j, k, _ in part]
        for (top, left, weights), tile in zip(part, network(torch.cat(crops)).chunk(len(part)), strict=True):
            if out is None:  # only the network knows the number of channels
                out = tile.new_zeros(*tile.shape[:2], height * cell_out, width * cell_out)
            h, w = tile.shape[2:]
            j, k = top * cell_out, left * cell_out
            out[..., j : j + h, k : k + w] += weights.to(tile.dtype) * tile
    return out
