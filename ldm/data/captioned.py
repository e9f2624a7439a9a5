"""Images with captions: the base class, a user's own folder, and what a latent diffusion model makes of them in advance."""

import hashlib
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.captions import find_captions
from ldm.images import from_uint8, on_white, open_image
from ldm.util import atomic_write


class Captioned(Dataset):
    """Subclasses give `item(i)`, image i with its caption, and `groups`, lists of image numbers: item g of the dataset is
    one image of groups[g], drawn anew every time."""

    def __init__(self, groups):
        self.groups = groups

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, i):
        group = self.groups[i]
        return self.item(group[torch.randint(len(group), ())] if len(group) > 1 else group[0])


class CaptionedFolder(Captioned):
    """(image [3, size, size] in [-1, 1], caption) of a folder and its subfolders: image.png next to image.txt, or a captions.csv
    with lines `file,caption` (see `find_captions`). Images are read as everywhere (ldm/images.py): upright, on white, their first
    frame. They are cropped to their centre square and reduced to size x size.

    A file that cannot be used is left out with a warning that names it: an image that is unreadable, smaller than size x size or
    without caption, a file of another kind, a line of a table. One more warning counts them. The last twentieth of the images by
    name is for validation (train=False). ValueError where the folder is missing or fewer than two images are left.
    """

    def __init__(self, folder, size=64, train=True):
        self.folder, self.size = Path(folder).expanduser(), size
        if not self.folder.is_dir():
            raise ValueError(f"data.folder = {folder}: there is no such folder")
        captions, left_out = find_captions(self.folder)
        self.images, self.captions = [], []
        for path, caption in tqdm(captions.items(), "reading images", delay=2):
            try:
                self.images.append(self.read(path))
                self.captions.append(caption)
            except ValueError as error:
                kind = "too small" if "pixels, at least" in str(error) else "unreadable"
                left_out.append((path, kind, str(error).removeprefix(f"image = {str(path)!r}: ")))
        for path, _, reason in left_out:
            warnings.warn(f"{path} is left out: {reason}", stacklevel=2)
        kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(kind for _, kind, _ in left_out).items())
        summary = f"data.folder = {folder} has {len(self.images)} usable images with captions" + (
            f"; left out are {kinds}" * bool(kinds)
        )
        if len(self.images) < 2:
            raise ValueError(f"{summary}: at least two are needed, as name.png with name.txt, or with a captions.csv of lines "
                             "`file,caption`")  # fmt: skip
        if left_out:
            warnings.warn(summary, stacklevel=2)
        held_out = max(1, len(self.images) // 20)
        cut = slice(None, -held_out) if train else slice(-held_out, None)
        self.images, self.captions = torch.stack(self.images[cut]), self.captions[cut]
        super().__init__([[i] for i in range(len(self.captions))])

    def read(self, path):
        """[3, size, size] uint8. ValueError for an image that is unreadable or too small."""
        image = on_white(open_image(path)).convert("RGB")
        if min(image.size) < self.size:
            raise ValueError(f"it has {image.width}x{image.height} pixels, at least {self.size}x{self.size} are needed")
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def item(self, i):
        return from_uint8(self.images[i]), self.captions[i]


class Encoded(Captioned):
    """(latent mean [C, h, w], tokens [M, D]) of a captioned dataset's images; `mirrored`: half of all looks see the mirror image.

    encode_images: [B, 3, H, W] -> [B, C, h, w]; encode_prompts: list of strings -> [B, M, D]. Everything is computed once, and
    held in memory in float16. file: a safetensors file that it is read from if it is there, and written to otherwise; its name
    is to depend on all that it is made of (`fingerprint`).
    """

    def __init__(self, dataset, encode_images, encode_prompts, batch=64, mirrored=True, file=None):
        super().__init__(dataset.groups)
        self.mirrored = mirrored
        if file is not None and Path(file).is_file():
            stored = load_file(file)
        else:
            stored = encode(dataset, encode_images, encode_prompts, batch)
            if file is not None:
                with atomic_write(file) as temporary:
                    save_file(stored, temporary)
        self.latents, self.tokens, self.caption = stored["latents"], stored["tokens"], stored["caption"].tolist()

    def item(self, i):
        mirror = torch.randint(2, ()) if self.mirrored else 0
        return self.latents[i, mirror].float(), self.tokens[self.caption[i]].float()


@torch.no_grad()
def encode(dataset, encode_images, encode_prompts, batch):
    """{latents [N, 2, C, h, w] of all images and their mirror images, tokens [K, M, D] of the different captions, caption [N]: the
    number of each image's caption among them}."""
    number = max(i for group in dataset.groups for i in group) + 1
    latents, captions = [], []
    for start in tqdm(range(0, number, batch), "encoding images", delay=2):
        images, texts = zip(*(dataset.item(i) for i in range(start, min(start + batch, number))), strict=True)
        x = torch.stack(images)
        latents.append(encode_images(torch.cat([x, x.flip(3)])).unflatten(0, (2, -1)).transpose(0, 1).half().cpu())
        captions += texts
    unique = list(dict.fromkeys(captions))
    place = {caption: i for i, caption in enumerate(unique)}
    parts = [unique[i : i + batch] for i in range(0, len(unique), batch)]
    tokens = [encode_prompts(part).half().cpu() for part in tqdm(parts, "encoding captions", delay=2)]
    return {"latents": torch.cat(latents).contiguous(), "tokens": torch.cat(tokens).contiguous(),
            "caption": torch.tensor([place[caption] for caption in captions])}  # fmt: skip


def fingerprint(dataset, *networks):
    """A string that depends on every image and caption of a captioned dataset, and on the weights of the networks."""
    digest = hashlib.sha256()
    for i in range(max(i for group in dataset.groups for i in group) + 1):
        image, caption = dataset.item(i)
        digest.update(image.contiguous().numpy().tobytes())
        digest.update(caption.encode() + b"\0")
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
