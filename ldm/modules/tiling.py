"""A network on a picture too large for it: overlapping tiles, blended linearly."""

import math

import torch


def windows(length, size, overlap, cell=1):
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


def tiled(network, x, size, overlap, cell_in=1, cell_out=1):
    """network(x), computed tile by tile; exactly network(x) where x fits into one tile.

    network: [B, C, cell_in * h, cell_in * w] -> [B, C', cell_out * h, cell_out * w] for all h, w
    x: [B, C, H, W], H and W divisible by cell_in
    size, overlap: of the square tiles, in cells; 0 <= overlap < size
    """
    rows, columns = (windows(n // cell_in, size, overlap, cell_out) for n in x.shape[2:])
    if len(rows) == len(columns) == 1:
        return network(x)
    out = None
    for top, weights_y in rows:
        for left, weights_x in columns:
            tile = network(x[..., top * cell_in : (top + size) * cell_in, left * cell_in : (left + size) * cell_in])
            if out is None:  # only the network knows the number of channels
                out = tile.new_zeros(*tile.shape[:2], *(n // cell_in * cell_out for n in x.shape[2:]))
            weights = (weights_y[:, None] * weights_x).to(tile)
            height, width = weights.shape
            i, j = top * cell_out, left * cell_out
            out[..., i : i + height, j : j + width] += weights * tile
    return out
