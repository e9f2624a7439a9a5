"""Images that notebooks begin with, where the user gives none: held-out emoji for small models, photographs for large ones."""

import torch
from PIL import Image
from torch import Tensor

from ldm.data.emoji import sample_emoji
from ldm.images import load_image

PHOTO_SIZE = 256  # models of so many pixels a side and more get photographs
# Held-out emoji by their places in ldm.data.emoji.sample_emoji, and whether their names are the prompts. Pairs, unseen drawings of
# known names, lie there in the order of a hash: the first ones are not chosen. Of the names, 16 are Noto's and then 16 Fluent 3D's.
EMOJI = {
    "inpainting": ("pairs", range(8), True),
    "super-resolution": ("pairs", range(8, 16), False),
    "joining": ("pairs", range(16, 24), False),
    "style": ("pairs", range(24, 26), False),
    "restyling": ("names", range(2), True),
    "set": ("names", range(18, 32), False),  # in Fluent 3D's style, of other things than are restyled
}
# Photographs that come with scikit-image, in the public domain or CC0.
PHOTOS = {
    "inpainting": (["astronaut"], ["a portrait of an astronaut in an orange space suit"]),
    "super-resolution": (["astronaut"], [""]),
    "style": (["immunohistochemistry"], [""]),
    "restyling": (["astronaut"], ["a portrait of an astronaut"]),
    "set": (["brick", "grass", "gravel"], [""] * 3),
    "joining": (["coffee", "chelsea"], [""] * 2),
}


def examples(model, task: str, image=None) -> tuple[Tensor, list[str]]:
    """(images [N, 3, H, W] in [-1, 1], prompts [N]) for a task: "inpainting", "super-resolution", "style" (references),
    "restyling", "set" (of one style, of other things than are restyled) or "joining" (the first half of them is joined
    with the second).

    image   what `ldm.images.open_image` takes: this one, without a prompt; for joining, it and its mirror image. None: emoji, or
            photographs for models of 256 pixels and more

    Images are cropped to the model's square; one's own image for inpainting is as large as it is. ValueError for another task.
    """
    if task not in EMOJI:
        raise ValueError(f"task = {task!r}: known are {', '.join(map(repr, EMOJI))}")
    side = model.image_size * model.downsampling
    if image is not None:
        own = load_image(image, None if task == "inpainting" else (side, side), crop=True)
        return (torch.cat([own, own.flip(3)]), [""] * 2) if task == "joining" else (own, [""])
    if side >= PHOTO_SIZE:
        names, words = PHOTOS[task]
        return torch.cat([load_image(photo(name), (side, side), crop=True) for name in names]), list(words)
    kind, chosen, named = EMOJI[task]
    images, names = sample_emoji(kind)
    images, words = images[list(chosen)], [names[i] if named else "" for i in chosen]
    if images.shape[2] != side:
        images = torch.nn.functional.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    return images, words


def large_example(model) -> tuple[Tensor, Tensor]:
    """(image [1, 3, H, W] in [-1, 1], mask [1, 1, H, W]) larger than the model's images and no square, with two holes: emoji side
    by side, three times as large as they are, or for models of 256 pixels and more the photograph of a rocket."""
    if model.image_size * model.downsampling >= PHOTO_SIZE:
        image, holes = load_image(photo("rocket")), [(0.5, 0.2, 0.2, 0.1), (0.1, 0.7, 0.2, 0.2)]
    else:
        emoji = torch.cat([*sample_emoji()[0][[1, 9, 13, 23]]], 2)[None]
        image = torch.nn.functional.interpolate(emoji, scale_factor=3, mode="bicubic").clamp(-1, 1)
        holes = [(0.25, 0.05, 0.5, 0.12), (0.3, 0.55, 0.35, 0.12)]
    h, w = image.shape[2:]
    mask = torch.ones(1, 1, h, w)
    for top, left, height, width in holes:
        mask[..., round(top * h) : round((top + height) * h), round(left * w) : round((left + width) * w)] = 0
    return image, mask


def photo(name: str) -> Image.Image:
    """A photograph that scikit-image brings with it, by its name there."""
    from skimage import data  # optional, and takes a second to import

    return Image.fromarray(getattr(data, name)())  # a module of functions, by name
