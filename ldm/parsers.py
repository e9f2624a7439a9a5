"""Segmenters as parsers: images [B, 3, H, W] in [-1, 1] -> logits [B, K, H, W] of K classes, differentiable, for
`ldm.guidance.parsing_distance`. SegFormer and CLIPSeg are those of transformers; their files are on this machine, nothing is
downloaded. The parser of emoji is `load_model("tiny-parser")`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPSegForImageSegmentation, SegformerForSemanticSegmentation

from ldm.models.bisenet import FACE, BiSeNet
from ldm.tensor_files import one_line, some
from ldm.util import resolve_device

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, where preprocessor_config.json says nothing
FACE_SIZE = 512  # of the images that BiSeNet was trained on


class Parser:
    """A segmenter. network: normalised images -> logits of any size; classes: their names, in the order of the logits; size: the
    side of the images that the network sees, None: their own."""

    def __init__(
        self, network: Callable[[Tensor], Tensor], classes: Sequence[str], size: int | None, mean=MEAN, std=STD, device=None
    ):
        self.network, self.classes, self.size = network, list(classes), size
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        x = images
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        logits = self.network(((x + 1) / 2 - self.mean) / self.std)
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)

    def labels(self, images: Tensor) -> Tensor:
        """The most likely class of each pixel, [B, H, W]: what an example image asks for."""
        with torch.no_grad():
            return self(images).argmax(1)


def load_parser(path: str | Path, classes: Sequence[str] | None = None, device: str | torch.device = "auto") -> Parser:
    """The parser of a folder that transformers has saved a SegFormer or a CLIPSeg to, or of a BiSeNet's file (.pth, .safetensors).

    classes: for CLIPSeg what to look for, in words, at least two ("a dog", "background"); a SegFormer has its own; of a BiSeNet
    their names, None: the 19 of faces (ldm.models.bisenet.FACE). ValueError for other models and classes and missing files.
    """
    folder, device = Path(path).expanduser(), resolve_device(device)
    if folder.is_file():
        return load_bisenet(folder, FACE if classes is None else classes, device)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"path = {str(path)!r}: give a folder with the config.json of a SegFormer or a CLIPSeg, or a BiSeNet's file"
        )
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    stored = folder / "preprocessor_config.json"
    told = json.loads(stored.read_text()) if stored.is_file() else {}
    norm = dict(mean=told.get("image_mean", MEAN), std=told.get("image_std", STD), device=device)
    if kind == "segformer":
        if classes is not None:
            raise ValueError(f"classes = {list(classes)}: a SegFormer has its own, leave them out")
        network = SegformerForSemanticSegmentation.from_pretrained(folder, local_files_only=True)
        network = network.to(device).eval().requires_grad_(False)
        names = [network.config.id2label[i] for i in range(network.config.num_labels)]
        size = told.get("size", {})
        return Parser(lambda x: network(pixel_values=x).logits, names, size.get("height", size.get("shortest_edge")), **norm)
    if kind == "clipseg":
        if classes is None or isinstance(classes, str) or len(classes) < 2:
            raise ValueError(f"classes = {classes!r}: give at least two texts, which CLIPSeg is asked for")
        network = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True)
        network = network.to(device).eval().requires_grad_(False)
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(list(classes), padding=True, return_tensors="pt")
        tokens = {k: tokens[k].to(device) for k in ("input_ids", "attention_mask")}

        def ask(x):  # one question for each class, which are independent
            logits = network(pixel_values=x.repeat_interleave(len(classes), 0),
                             **{name: ids.repeat(len(x), 1) for name, ids in tokens.items()}).logits  # fmt: skip
            return logits.view(len(x), len(classes), *logits.shape[-2:])

        return Parser(ask, classes, network.config.vision_config.image_size, **norm)
    raise ValueError(f"path = {str(path)!r}: its model_type is {kind!r}, known are 'segformer' and 'clipseg'")


def load_bisenet(path: Path, classes: Sequence[str], device: torch.device) -> Parser:
    """The parser of a file with a BiSeNet's state dict. ValueError where it is none, or has other classes or sizes."""
    try:  # older files are no zip archives, which `ldm.tensor_files` takes: torch reads them, tensors only
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"path = {str(path)!r} cannot be read as tensors: {one_line(error)}") from None
    tensors = {str(name).removeprefix("module."): value for name, value in tensors.items()} if isinstance(tensors, dict) else {}
    last = tensors.get("conv_out.conv_out.weight")
    if not torch.is_tensor(last) or "cp.resnet.conv1.weight" not in tensors:
        raise ValueError(f"path = {str(path)!r} is no BiSeNet with the names of face parsing (cp.resnet ...): {some(tensors)}")
    if len(last) != len(classes):
        raise ValueError(f"path = {str(path)!r} has {len(last)} classes, but {len(classes)} names: give classes, one for each")
    with torch.device("meta"):
        expected = BiSeNet(len(classes)).state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # of the training, and not in every file
    wrong = [name for name in {*expected, *tensors} - counters
             if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape]  # fmt: skip
    if wrong:
        raise ValueError(
            f"path = {str(path)!r} is no BiSeNet with a ResNet-18: missing, unknown or of another shape: {some(sorted(wrong))}"
        )
    network = BiSeNet(len(classes))
    network.load_state_dict(tensors, strict=False)
    return Parser(network.to(device).eval().requires_grad_(False), classes, FACE_SIZE, device=device)
