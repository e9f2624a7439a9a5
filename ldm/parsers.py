"""Segmenters as parsers: images [B, 3, H, W] in [-1, 1] -> logits [B, K, H, W] of K classes, differentiable, for
`ldm.guidance.parsing_distance`. The networks are those of transformers; their files are on this machine, nothing is downloaded."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPSegForImageSegmentation, SegformerForSemanticSegmentation

from ldm.util import resolve_device

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, where preprocessor_config.json says nothing


class Parser:
    """A segmenter of transformers. classes: their names, in the order of the logits; size: the side of the images that the network
    sees, None: their own."""

    def __init__(self, network, classes: Sequence[str], size: int | None, mean=MEAN, std=STD, tokens=None):
        self.network, self.classes, self.size, self.tokens = network.eval().requires_grad_(False), list(classes), size, tokens
        self.mean, self.std = (torch.tensor(v, device=network.device).view(3, 1, 1) for v in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        x = images
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std
        if self.tokens is None:
            logits = self.network(pixel_values=x).logits
        else:  # one question for each class, which are independent
            ask = {name: ids.repeat(len(x), 1) for name, ids in self.tokens.items()}
            logits = self.network(pixel_values=x.repeat_interleave(len(self.classes), 0), **ask).logits
            logits = logits.view(len(x), len(self.classes), *logits.shape[-2:])
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)

    def labels(self, images: Tensor) -> Tensor:
        """The most likely class of each pixel, [B, H, W]: what an example image asks for."""
        with torch.no_grad():
            return self(images).argmax(1)


def load_parser(path: str | Path, classes: Sequence[str] | None = None, device: str | torch.device = "auto") -> Parser:
    """The parser of a folder that transformers has saved a SegFormer or a CLIPSeg to.

    classes: for CLIPSeg what to look for, in words, at least two ("a dog", "background"); a SegFormer has its own. ValueError for
    other models and missing files.
    """
    folder, device = Path(path).expanduser(), resolve_device(device)
    if not (folder / "config.json").is_file():
        raise ValueError(f"path = {str(path)!r}: give a folder with the config.json of a SegFormer or a CLIPSeg")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    stored = folder / "preprocessor_config.json"
    told = json.loads(stored.read_text()) if stored.is_file() else {}
    norm = dict(mean=told.get("image_mean", MEAN), std=told.get("image_std", STD))
    if kind == "segformer":
        if classes is not None:
            raise ValueError(f"classes = {list(classes)}: a SegFormer has its own, leave them out")
        network = SegformerForSemanticSegmentation.from_pretrained(folder, local_files_only=True).to(device)
        names = [network.config.id2label[i] for i in range(network.config.num_labels)]
        size = told.get("size", {})
        return Parser(network, names, size.get("height", size.get("shortest_edge")), **norm)
    if kind == "clipseg":
        if classes is None or isinstance(classes, str) or len(classes) < 2:
            raise ValueError(f"classes = {classes!r}: give at least two texts, which CLIPSeg is asked for")
        network = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True).to(device)
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(list(classes), padding=True, return_tensors="pt")
        size = network.config.vision_config.image_size
        return Parser(network, classes, size, **norm, tokens={k: tokens[k].to(device) for k in ("input_ids", "attention_mask")})
    raise ValueError(f"path = {str(path)!r}: its model_type is {kind!r}, known are 'segformer' and 'clipseg'")
