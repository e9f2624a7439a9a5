"""CLIP's image encoder, which gives style guidance its features. The network itself is open_clip's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torch.nn import functional as F

from ldm.checkpoints import load_model
from ldm.util import ROOT, resolve_device
from ldm.weights import index, match

OPENAI_HUB = "timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors"  # where open_clip has ViT-B/16 "openai" from


class ClipVision:
    """Images [B, 3, H, W] in [-1, 1] -> tokens [B, N, C] after residual block number `block`, without the class token;
    differentiable.

    visual     the image encoder of an open_clip model
    size       side of the images that it takes, in pixels; others are resized (bicubic, anti-aliased)
    mean, std  of the pixel values in [0, 1] that it was trained on, three each
    """

    def __init__(
        self,
        visual: open_clip.transformer.VisionTransformer,
        block: int = 2,
        size: int = 224,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        if not 0 <= block < visual.transformer.layers:
            raise ValueError(f"block = {block}: this CLIP has the blocks 0 to {visual.transformer.layers - 1}")
        self.visual, self.block, self.size = visual, block, size
        self.mean, self.std = (torch.tensor(v, device=visual.conv1.weight.device).view(3, 1, 1) for v in (mean, std))

    def pixels(self, images: Tensor) -> Tensor:
        """The images as the network takes them: resized and normalised."""
        x = images
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        return ((x + 1) / 2 - self.mean.to(x)) / self.std.to(x)

    def __call__(self, images: Tensor) -> Tensor:
        x = self.pixels(images)
        out = self.visual.forward_intermediates(x, [self.block], stop_early=True, intermediates_only=True, output_fmt="NLC")
        return out["image_intermediates"][0]


class Clip:
    """An open_clip model: features [B, C] of images [B, 3, H, W] in [-1, 1], differentiable, and of texts. size, mean, std as those
    of `ClipVision`; tokenize: (texts, length) -> token numbers."""

    def __init__(
        self, network: Any, tokenize: Any, size: int, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
    ):
        self.network, self.tokenize, self.look = network, tokenize, ClipVision(network.visual, 0, size, mean, std)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.network.encode_image(self.look.pixels(images))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenize(list(texts), self.network.context_length)
        return self.network.encode_text(ids.to(self.look.mean.device))


def load_clip(device: str | torch.device = "auto") -> Clip:
    """The CLIP that this repository ships, trained on emoji and their names."""
    from ldm.modules.encoders.modules import bpe_tokenizer

    return Clip(load_model("tiny-clip", device=device), bpe_tokenizer(ROOT / "configs/tiny/bpe.txt.gz"), 64)


def load_clip_vision(source: str | Path = "tiny-clip", block: int = 2, device: str | torch.device = "auto") -> ClipVision:
    """A `ClipVision` for style guidance.

    source  "tiny-clip", the CLIP that this repository ships; "openai", OpenAI's ViT-B/16 from open_clip's own download cache;
            or the path of its weights (open_clip_model.safetensors)
    block   index of the residual block whose output is used, from 0. The paper uses block 2 of ViT-B/16
    Nothing is downloaded: FileNotFoundError says how to get what is missing.
    """
    device = resolve_device(device)
    if source == "tiny-clip":
        return ClipVision(load_model(source, device=device).visual, block, size=64)
    if source == "openai":
        source = try_to_load_from_cache(*OPENAI_HUB)
        if not isinstance(source, str):
            raise FileNotFoundError(
                "the weights of CLIP ViT-B/16 (openai) are not in open_clip's cache. With a network connection, `python -c "
                "\"import open_clip; open_clip.create_model('ViT-B-16', 'openai')\"` puts them there (600 MB); or give the path of "
                f"{OPENAI_HUB[1]} of huggingface.co/{OPENAI_HUB[0]}"
            )
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'clip = {str(source)!r}: there is no such file; give "tiny-clip", "openai" or the path of {OPENAI_HUB[1]}'
        )
    config = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        clip = open_clip.CLIP(**{k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")}, quick_gelu=True)
    stored = {k: v for k, v in index(path).items() if k.startswith("visual.")}
    expected = {k: v for k, v in clip.state_dict(keep_vars=True).items() if k.startswith("visual.")}
    tensors = {k: stored[name].read().float().to(device) for k, name in match(path, stored, expected).items()}
    clip.load_state_dict(tensors, strict=False, assign=True)  # `match` was strict; the text tower is not needed
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return ClipVision(clip.visual.eval().requires_grad_(False), block, 224, mean, std)
