"""Captioned emoji as 64 x 64 images on white: the same things in six drawing styles.

    python -m ldm.data.emoji          (make data-emoji)

fetches the npm packages of `STYLES` into data/emoji, verifies them and builds data/emoji/emoji.npz from them. `sample_emoji`
gives the few held-out images that lie in the repository.
"""

import argparse
import gzip
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from tqdm import tqdm

from ldm.data.captioned import Captioned
from ldm.data.iconify import bare, draw, members, read_icons
from ldm.data.packages import fetch
from ldm.data.regions import regions
from ldm.images import from_uint8, grid, load_image, on_white, save_image
from ldm.util import ROOT, atomic_write

STYLES = {  # npm's name, file, sha256; in the order of Emoji.styles. Licences are in checkpoints/tiny/README.md
    "noto": ("emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz",
             "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
               "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "noto-v1": ("@iconify-json/noto-v1@1.2.5", "iconify-json-noto-v1-1.2.5.tgz",
                "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "iconify-json-fluent-emoji-flat-1.2.6.tgz",
                    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "iconify-json-twemoji-1.2.5.tgz",
                "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "emojione": ("@iconify-json/emojione@1.2.3", "iconify-json-emojione-1.2.3.tgz",
                 "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
}  # fmt: skip
DRAWN = 2  # the first of the styles that come as SVG
FIRST_STYLES = ("noto", "fluent")  # those of CLIP's training
MISNAMED = {("emojione", "cricket")}  # a bat and a ball, under the insect's name
HELD_OUT = ROOT / "configs/tiny/held_out_names.txt"
LEFT_OUT = {"Flags", "Component", "keycap", "alphanum"}  # categories and subcategories: flags, letters, colour swatches
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
# Held-out images that come with the repository, by `python -m ldm.data.emoji --sample`.
SAMPLES = {"names": ROOT / "assets/emoji_held_out.png", "pairs": ROOT / "assets/emoji_pairs.png"}
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
SAMPLE_PAIRS = (  # the first 32 by `write_samples`' rule
    "fire engine", "test tube", "railway track", "arrow pointing rightwards then curving upwards", "electric torch",
    "family: man, man, girl, boy", "metro", "lock", "no pedestrians", "left right arrow", "fireworks", "grimacing face",
    "man student", "safety pin",
    "clockwise rightwards and leftwards open circle arrows", "open book", "smiling cat face with heart-shaped eyes",
    "crown", "bath", "transgender symbol", "globe with meridians", "gloves", "kiss mark", "family: man, girl", "microscope",
    "clinking beer mugs", "grey heart", "airplane", "prayer beads", "hair pick", "genie", "clock face four oclock",
)  # fmt: skip
SIZE, COLUMNS = 64, 128  # of an image in pixels; of the sheet in images


class Emoji(Captioned):
    """(image [3, 64, 64] in [-1, 1], caption) of the names in `train`, or with train=False of what is held out.

    root      folder that holds emoji/emoji.npz; FileNotFoundError says how to make it
    held_out  of train=False: "names", all drawings of the names in configs/tiny/held_out_names.txt, or "pairs", the single
              drawings of known names that `held_out_pairs` chooses
    by_name   an item is a name, and every look at it draws one of its images: otherwise people in all skin tones are half
              of the images, though a fifth of the names
    styles    names out of STYLES, only these; None: all
    `names[i]` is the caption of image i without the skin tone, `styles[i]` the place of its style in STYLES, `categories[i]` its
    group in Unicode's list, such as "Food & Drink".
    """

    def __init__(self, root="data", train=True, by_name=False, held_out="names", styles=None):
        path, make = Path(root) / "emoji" / "emoji.npz", f"`python -m ldm.data.emoji --root {root}` (make data-emoji) makes it"
        if held_out not in ("names", "pairs"):
            raise ValueError(f"held_out = {held_out!r}: give 'names' or 'pairs'")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {make}")
        with np.load(path, allow_pickle=False) as file:
            if "categories" not in file:
                raise ValueError(f"{path} is of an earlier version, with fewer styles: {make} anew")
            names, captions, style, categories = (file[key] for key in ("names", "captions", "styles", "categories"))
            sheet = np.asarray(Image.open(io.BytesIO(file["sheet"].tobytes())))  # [rows * 64, columns * 64, 3]
        rows = sheet.shape[0] // SIZE
        images = sheet.reshape(rows, SIZE, COLUMNS, SIZE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIZE, SIZE)
        unknown = np.isin(names, held_out_names())
        pair = held_out_pairs(names, style) & ~unknown
        wanted = np.isin(style, [list(STYLES).index(name) for name in styles or STYLES])
        chosen = np.flatnonzero((~(unknown | pair) if train else unknown if held_out == "names" else pair) & wanted)
        self.path, self.chosen = path, chosen  # places of the images in the file
        self.images = torch.from_numpy(images[chosen])  # [N, 3, 64, 64] uint8
        self.names, self.captions, self.categories = (x[chosen].tolist() for x in (names, captions, categories))
        self.styles = torch.from_numpy(style[chosen])
        groups = {}
        for i, name in enumerate(self.names):
            groups.setdefault(name if by_name else i, []).append(i)
        super().__init__(list(groups.values()))

    def item(self, i):
        return from_uint8(self.images[i]), self.captions[i]


class LabelledEmoji(Emoji):
    """(image, name, category): what the judge learns from."""

    def item(self, i):
        return from_uint8(self.images[i]), self.names[i], self.categories[i]


class ParsedEmoji(Emoji):
    """(image, labels [64, 64], numbers of ldm.data.regions.CLASSES): what the parsers learn from."""

    def __init__(self, root="data", *args, **kwargs):
        super().__init__(root, *args, **kwargs)
        with np.load(self.path, allow_pickle=False) as file:
            if "regions" not in file:
                raise ValueError(f"{self.path} is of an earlier version, without regions: `python -m ldm.data.emoji --root {root}` "
                                 "(make data-emoji) makes it anew")  # fmt: skip
            self.regions = torch.from_numpy(file["regions"][self.chosen])  # [N, 64, 64] uint8

    def item(self, i):
        return from_uint8(self.images[i]), self.regions[i].long()


def sample_emoji(held_out="names"):
    """32 held-out images: (images [32, 3, 64, 64] in [-1, 1], captions). Of "names", 16 in Noto's style, then in Fluent 3D's; of
    "pairs", drawings of 32 names that are known in other styles."""
    if held_out not in SAMPLES:
        raise ValueError(f"held_out = {held_out!r}: give 'names' or 'pairs'")
    images = load_image(SAMPLES[held_out]).unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)[0].permute(1, 2, 0, 3, 4).flatten(0, 1)
    return images, [*SAMPLE_NAMES] * 2 if held_out == "names" else [*SAMPLE_PAIRS]


def held_out_names():
    return HELD_OUT.read_text().splitlines()


def held_out_pairs(names, styles):
    """Which images [N] are drawings set aside although their names are known. The rule: of every name whose sha256 begins with a
    byte below 36 (a tenth of those known), one of the drawings in the SVG styles, in all skin tones; which one, the second byte
    says, modulo their number."""
    drawn = {}
    for name, style in zip(names, styles, strict=True):
        if style >= DRAWN:
            drawn.setdefault(str(name), set()).add(int(style))
    pairs = set()
    for name, of_name in drawn.items():
        first, second, *_ = hashlib.sha256(name.encode()).digest()
        if first < 36:
            pairs.add((name, sorted(of_name)[second % len(of_name)]))
    return np.array([(str(name), int(style)) in pairs for name, style in zip(names, styles, strict=True)], bool)


def readable(entry):
    """The name of an entry of emoji.json as a caption: "HEAVY BLACK HEART" (a red one, in Unicode's words) -> "heart"."""
    name, short = entry["name"].lower(), entry["short_name"].replace("-", "_").split("_")
    words = name.split()
    while len(words) > 1 and words[0] in ("black", "white", "heavy") and words[0] not in short:
        words.pop(0)  # Unicode's "filled" and "outlined", not colours
    return " ".join(words)


def entries(emoji):
    """(name, caption, category, image's file name) of all that is used of emoji.json, skin tones included."""
    seen = set()
    for entry in sorted(emoji, key=lambda e: e["sort_order"]):
        name = readable(entry)
        if {entry["category"], entry["subcategory"]} & LEFT_OUT or name in seen or not entry["has_img_google"]:
            continue
        seen.add(name)
        yield name, name, entry["category"], entry["image"]
        for tones, variation in entry.get("skin_variations", {}).items():
            tones = " and ".join(dict.fromkeys(TONES[tone] for tone in tones.split("-")))
            caption = f"{name}, {tones} skin tone{'s' if ' and ' in tones else ''}"
            yield name, caption, entry["category"], variation["image"]


def pixels(image):
    """A PIL image -> [64, 64, 3] uint8, composited on white, reduced by Lanczos."""
    image = on_white(image.convert("RGBA"))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS) if image.size != (SIZE, SIZE) else image)


def build(root="data"):
    """Make emoji/emoji.npz under `root`: all images on one lossless sheet, with names, captions, styles, categories and regions."""
    folder = Path(root) / "emoji"
    noto, fluent, *drawn = (fetch(["npm", "pack", package], *file, folder) for package, *file in STYLES.values())
    emoji = json.loads(members(noto, "package")["emoji.json"])
    noto, fluent = members(noto, "package/img/google/64"), members(fluent, "package/assets")
    drawn = [read_icons(path) for path in drawn]
    known = {}  # code points -> the names that any of the packages has for them
    for _, characters in drawn:
        for code, name in characters.items():
            known.setdefault(code, {})[name] = None
    labels, images, parts = [], [], []
    for name, caption, category, file in tqdm(list(entries(emoji)), "preparing"):
        found = [noto.get(file), fluent.get(file.replace(".png", ".webp"))]
        found = [data and Image.open(io.BytesIO(data)) for data in found]
        for icons, _ in drawn:
            svg = next((icons[own] for own in known.get(bare(file[: -len(".png")]), ()) if own in icons), None)
            found.append(svg and draw(svg, 2 * SIZE))
        for style, image in enumerate(found):
            if image is not None and (list(STYLES)[style], name) not in MISNAMED:
                images.append(pixels(image))
                parts.append(regions(image))
                labels.append((name, caption, style, category))
    names, captions, styles, categories = map(np.array, zip(*labels, strict=True))
    rows = -(-len(images) // COLUMNS)
    sheet = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, COLUMNS, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(rows * SIZE, COLUMNS * SIZE, 3)
    data = io.BytesIO()
    Image.fromarray(sheet).save(data, "webp", lossless=True, quality=60, method=4)
    with atomic_write(folder / "emoji.npz") as temporary:
        np.savez_compressed(temporary, sheet=np.frombuffer(data.getvalue(), np.uint8), names=names, captions=captions,
                            styles=styles.astype(np.uint8), categories=categories, regions=np.stack(parts))  # fmt: skip
    return folder / "emoji.npz"


def write_samples(root="data", paths=SAMPLES):
    """The sheets that `sample_emoji` reads, four rows of eight. Of the pairs those without a skin tone whose names' sha256 are the
    lowest."""
    names, pairs = Emoji(root, train=False), Emoji(root, train=False, held_out="pairs")
    drawn = list(zip(names.names, names.styles.tolist(), strict=True))
    plain = [i for i, caption in enumerate(pairs.captions) if caption == pairs.names[i]]
    first = sorted(plain, key=lambda i: hashlib.sha256(pairs.names[i].encode()).hexdigest())[:32]
    chosen = {"names": names.images[[drawn.index((name, style)) for style in range(DRAWN) for name in SAMPLE_NAMES]],
              "pairs": pairs.images[first]}  # fmt: skip
    return [save_image(grid(from_uint8(images), 8, gap=0), paths[of]) for of, images in chosen.items()]


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
    parser.add_argument("--sample", action="store_true", help="also write the repository's samples of held-out images")
    args = parser.parse_args()
    try:
        path = build(args.root)
    except (OSError, ValueError) as error:  # not fetched, another file than expected, no space left
        sys.exit(f"{args.root}/emoji was not prepared: {error}")
    if args.sample:
        print(*write_samples(args.root))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    for part, options in {
        "training": {},
        **{f"held-out {of}": dict(train=False, held_out=of) for of in ("names", "pairs")},
    }.items():
        data = Emoji(path.parents[1], **options)
        counts = ", ".join(
            f"{style} {n}" for style, n in zip(STYLES, data.styles.bincount(minlength=len(STYLES)).tolist(), strict=True)
        )
        print(f"{part}: {len(data)} images of {len(set(data.names))} names ({counts})")


if __name__ == "__main__":
    main()
