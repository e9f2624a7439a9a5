"""Regions of drawings by colour: the labels that the parser of emoji learns from, read off each drawing's own alpha and colours."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ldm.images import to_uint8

CLASSES = ("background", "black", "white", "red", "yellow", "green", "blue", "purple", "brown")
COLOURS = ((226, 226, 226), (40, 40, 45), (255, 255, 255), (225, 50, 60), (255, 205, 60), (90, 180, 75), (70, 150, 230),
           (190, 100, 200), (140, 85, 50))  # to show them: red, green and blue, 0 to 255  # fmt: skip
HUES = (20, 68, 165, 260, 338)  # degrees where red, yellow (with orange), green, blue and purple end; then red begins again
AT_HUE = tuple(CLASSES.index(name) for name in ("red", "yellow", "green", "blue", "purple", "red"))


def families(rgb):
    """Colours [..., 3] uint8 -> classes [...] from 1 on, by the brightest of the channels in [0, 1] and how far they differ:

    black     brightest below 0.3, or below 0.45 where they differ by less than 0.15
    white     others that differ by less than 0.15: white and light grey
    brown     hues of red and yellow, brightest below 0.68
    the rest  by hue (HUES)
    """
    rgb = rgb.astype(np.float32) / 255
    most, least = rgb.max(-1), rgb.min(-1)
    chroma = np.maximum(most - least, 1e-6)
    r, g, b = np.moveaxis(rgb, -1, 0)
    hue = np.where(most == r, (g - b) / chroma % 6, np.where(most == g, (b - r) / chroma + 2, (r - g) / chroma + 4)) * 60
    found = np.array(AT_HUE)[np.digitize(hue, HUES)]
    found = np.where((most < 0.68) & ((hue < HUES[1]) | (hue > HUES[-1])), CLASSES.index("brown"), found)
    grey = most - least < 0.15
    found = np.where(grey, CLASSES.index("white"), found)
    return np.where((most < 0.3) | grey & (most < 0.45), CLASSES.index("black"), found)


def regions(image, size=64):
    """A drawing, a PIL image with alpha, `size` pixels a side or more -> labels [size, size] uint8, numbers of CLASSES.

    Background is where alpha is below a half. A label is that of most pixels, at up to twice the size, among 3 x 3 of `size`:
    blended edges are no region."""
    image = image.convert("RGBA")
    if image.width > 2 * size:
        image = image.resize((2 * size, 2 * size), Image.Resampling.NEAREST)
    pixels = np.asarray(image)
    return most(np.where(pixels[..., 3] < 128, 0, families(pixels[..., :3])), size)


def by_rules(images):
    """Labels [B, H, W] of images [B, 3, H, W] in [-1, 1] without a network: a parser that judges those that learned.

    The same rules, but that background is what is white (all channels from 0.9 on) and connected with the border."""
    pixels = to_uint8(images).movedim(1, 3).numpy()
    white = (images.amin(1, keepdim=True) >= 0.8).float().cpu()
    border = F.pad(torch.zeros_like(white)[..., 1:-1, 1:-1], (1, 1, 1, 1), value=1.0)
    outside, more = white * border, 1
    while more:  # it spreads over white, from each pixel to its eight neighbours
        before, outside = outside, white * F.max_pool2d(outside, 3, 1, 1)
        more = (outside != before).any()
    labels = np.where(outside[:, 0].numpy() > 0, 0, families(pixels))
    return torch.from_numpy(np.stack([most(each, len(each)) for each in labels])).long().to(images.device)


def most(labels, size):
    """Of square labels, the one that most of 3 x 3 pixels have, [size, size] uint8."""
    votes = [
        Image.fromarray((labels == k).astype(np.float32)).resize((size, size), Image.Resampling.BOX) for k in range(len(CLASSES))
    ]
    votes = np.pad(np.stack([np.asarray(vote) for vote in votes]), ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = votes[:, :-2] + votes[:, 1:-1] + votes[:, 2:]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).argmax(0).astype(np.uint8)
