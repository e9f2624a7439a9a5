"""Pictures with captions: the base class, a user's own folder, and what a latent diffusion model makes of them in advance."""

import csv
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.images import from_uint8

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Captioned(Dataset):
    """Subclasses give `item(i)`, picture i with its caption, and `groups`, lists of picture numbers: item g of the dataset is
    one picture of groups[g], drawn anew every time."""

    def __init__(self, groups):
        self.groups = groups

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, i):
        group = self.groups[i]
        return self.item(group[torch.randint(len(group), ())] if len(group) > 1 else group[0])


class CaptionedFolder(Captioned):
    """(picture [3, size, size] in [-1, 1], caption) of a folder: picture.png beside picture.txt, or a captions.csv with lines
    `file,caption`. Pictures are cropped to their centre square and reduced to size x size.

    A picture that is unreadable, smaller than size x size or without caption is left out with a warning that names it. Grey,
    palette and transparent pictures are converted, on white. The last twentieth of the files by name are for validation
    (train=False). ValueError where the folder is missing or nothing is left.
    """

    def __init__(self, folder, size=64, train=True):
        self.folder, self.size = Path(folder), size
        if not self.folder.is_dir():
            raise ValueError(f"data.folder = {folder}: there is no such folder")
        table = self.folder / "captions.csv"
        if table.is_file():
            with open(table, newline="", encoding="utf-8") as file:
                captions = {row[0]: row[1].strip() for row in csv.reader(file) if len(row) == 2}
        else:
            texts = {p.stem: p for p in self.folder.glob("*.txt")}
            captions = {}
        self.pictures, self.captions = [], []
        for path in tqdm(sorted(p for p in self.folder.iterdir() if p.suffix.lower() in PICTURES), "reading pictures", delay=2):
            caption = (
                captions.get(path.name)
                if table.is_file()
                else (texts[path.stem].read_text(encoding="utf-8").strip() if path.stem in texts else None)
            )
            if caption is None:
                where = "captions.csv has no line for it" if table.is_file() else f"there is no {path.stem}.txt"
                warnings.warn(f"{path} is left out: no caption, {where}", stacklevel=2)
                continue
            try:
                picture = self.read(path)
            except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
                warnings.warn(f"{path} is left out: {error}", stacklevel=2)
                continue
            self.pictures.append(picture)
            self.captions.append(caption)
        if len(self.pictures) < 2:
            raise ValueError(
                f"data.folder = {folder} has {len(self.pictures)} usable pictures with captions: at least two are "
                "needed, as name.png with name.txt, or with a captions.csv of lines `file,caption`"
            )
        held_out = max(1, len(self.pictures) // 20)
        cut = slice(None, -held_out) if train else slice(-held_out, None)
        self.pictures, self.captions = torch.stack(self.pictures[cut]), self.captions[cut]
        super().__init__([[i] for i in range(len(self.captions))])

    def read(self, path):
        """[3, size, size] uint8."""
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGBA")
        if min(image.size) < self.size:
            raise ValueError(f"it has {image.width}x{image.height} pixels, at least {self.size}x{self.size} are needed")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(self.size, self.size, 3).permute(2, 0, 1)

    def item(self, i):
        return from_uint8(self.pictures[i]), self.captions[i]


class Encoded(Captioned):
    """(latent mean [C, h, w], tokens [M, D]) of a captioned dataset's pictures, each also mirrored: half of all looks.

    encode_images: [B, 3, H, W] -> [B, C, h, w]; encode_prompts: list of strings -> [B, M, D]. Everything is computed once, and
    held in memory in float16.
    """

    @torch.no_grad()
    def __init__(self, dataset, encode_images, encode_prompts, batch=64):
        super().__init__(dataset.groups)
        number = max(i for group in dataset.groups for i in group) + 1
        latents, captions = [], []
        for start in tqdm(range(0, number, batch), "encoding pictures", delay=2):
            pictures, texts = zip(*(dataset.item(i) for i in range(start, min(start + batch, number))), strict=True)
            x = torch.stack(pictures)
            latents.append(encode_images(torch.cat([x, x.flip(3)])).unflatten(0, (2, -1)).transpose(0, 1).half().cpu())
            captions += texts
        self.latents = torch.cat(latents)  # [N, 2, C, h, w]
        unique = list(dict.fromkeys(captions))
        place = {caption: i for i, caption in enumerate(unique)}
        self.caption = [place[caption] for caption in captions]
        parts = [unique[i : i + batch] for i in range(0, len(unique), batch)]
        self.tokens = torch.cat([encode_prompts(part).half().cpu() for part in tqdm(parts, "encoding captions", delay=2)])

    def item(self, i):
        return self.latents[i, torch.randint(2, ())].float(), self.tokens[self.caption[i]].float()
