"""The captioned emoji: SVG drawings, all styles from small packages, what is held out, and what can go wrong."""

import hashlib
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from ldm.data import emoji
from ldm.data.emoji import Emoji, ParsedEmoji, held_out_names, held_out_pairs, sample_emoji
from ldm.data.iconify import bare, draw, read_icons
from ldm.data.regions import CLASSES, families, regions
from ldm.util import ROOT

NAMES = ("HEDGEHOG", "GRINNING FACE", "TIGER", "CRICKET")  # the first is held out
CODES = ("1f994", "1f600", "1f405", "1f997")


def archive(path, files):
    with tarfile.open(path, "w:gz") as tgz:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tgz.addfile(member, io.BytesIO(data))


def icons(names, characters=None, color="#f00", **data):
    body = {"body": f'<path fill="{color}" d="M0 0h8v16H0z"/>'}
    content = {"icons": {name: body for name in names}, **data}
    return {"icons.json": json.dumps(content).encode(), "chars.json": json.dumps(characters or {}).encode()}


def image(color, kind):
    data = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(data, kind, lossless=True)
    return data.getvalue()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with packages of the real ones' form, of four names, and their checksums."""
    folder = tmp_path / "emoji"
    folder.mkdir()
    slugs = dict(zip(CODES, ("hedgehog", "grinning-face", "tiger", "cricket"), strict=True))
    common = {"category": "Animals & Nature", "subcategory": "any", "has_img_google": True}
    entries = [{**common, "name": name, "short_name": name.lower(), "sort_order": i, "image": f"{CODES[i]}.png"}
               for i, name in enumerate(NAMES)]  # fmt: skip
    content = {
        "noto": {"emoji.json": json.dumps(entries).encode()} | {f"img/google/64/{c}.png": image("white", "png") for c in CODES},
        "fluent": {f"assets/{c}.webp": image("blue", "webp") for c in CODES[:2]},
        "noto-v1": icons(["tiger"]),
        "fluent-flat": icons(slugs.values(), slugs, "#0f0"),
        "twemoji": icons(slugs.values(), slugs, "#ff0"),
        "emojione": icons(["hedgehog", "cricket", "older-name"], aliases={"tiger": {"parent": "older-name"}}),
    }
    styles = {}
    for style, (package, name, _) in emoji.STYLES.items():
        archive(folder / name, content[style])
        styles[style] = (package, name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(emoji, "STYLES", styles)
    return tmp_path


def test_icons_are_read_with_their_aliases_and_drawn(tmp_path):
    parts = icons(["a", "b"], {"2764-FE0F": "a"}, width=16, height=16,
                  aliases={"c": {"parent": "a"}, "mirrored": {"parent": "a", "hFlip": True}})  # fmt: skip
    archive(tmp_path / "x.tgz", parts)
    drawings, characters = read_icons(tmp_path / "x.tgz")
    assert set(drawings) == {"a", "b", "c"} and characters == {"2764": "a"} == {bare("2764-fe0f"): "a"}
    pixels = np.asarray(draw(drawings["c"], 32))
    assert pixels.shape == (32, 32, 4) and pixels[5, 10].tolist() == [255, 0, 0, 255] and pixels[5, 20, 3] == 0
    assert np.array_equal(pixels, np.asarray(draw(drawings["c"], 32)))


def test_all_styles_are_built_and_the_same_again(root):
    path = emoji.build(root)
    again = path.read_bytes()
    train, names = Emoji(root), Emoji(root, train=False)
    parts = train, names, Emoji(root, train=False, held_out="pairs")
    drawn = sorted((name, style) for part in parts for name, style in zip(part.names, part.styles.tolist(), strict=True))
    of_name = {"cricket": (0, 3, 4), "grinning face": (0, 1, 3, 4), "hedgehog": (0, 1, 3, 4, 5), "tiger": (0, 2, 3, 4, 5)}
    assert drawn == [(name, style) for name, styles in of_name.items() for style in styles]
    assert set(names.names) == {"hedgehog"} and set(train.categories) == {"Animals & Nature"}
    x, caption = names[names.styles.tolist().index(4)]
    assert caption == "hedgehog" and x[:, 30, 10].tolist() == [1, 1, -1] and x[:, 30, 50].tolist() == [1, 1, 1]
    assert set(Emoji(root, styles=("noto", "twemoji")).styles.tolist()) == {0, 4}
    emoji.build(root)
    with np.load(io.BytesIO(again)) as one, np.load(path) as two:
        assert all(np.array_equal(one[key], two[key]) for key in one)


def test_regions_are_the_drawing_s_colours(root):
    """By the colours of shapes and alpha, whatever the size; edges, half blended, are no region; white is not the background."""
    rgb = {"black": "#111 #444", "white": "#fff #999", "red": "#d00 #f66", "yellow": "#fc0 #f80 #fdb", "green": "#0a0 #bd8",
           "blue": "#08f #124f80", "purple": "#90f #e0c", "brown": "#852 #964b00"}  # fmt: skip
    for name, colours in rgb.items():
        for colour in colours.split():
            assert CLASSES[families(np.array(ImageColor.getrgb(colour), np.uint8))] == name, colour
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="16" cy="16" r="13" fill="#fc0"/>'
           '<circle cx="16" cy="16" r="5" fill="#fff"/></svg>')  # fmt: skip
    y, x = np.mgrid[:64, :64] + 0.5 - 32
    exact = np.where(np.hypot(x, y) < 10, CLASSES.index("white"), np.where(np.hypot(x, y) < 26, CLASSES.index("yellow"), 0))
    for size in (64, 128, 256):
        found = regions(draw(svg, size))
        assert found.dtype == np.uint8 and (found != exact).mean() < 0.02 and set(np.unique(found)) == set(np.unique(exact))
    emoji.build(root)
    parsed, plain = ParsedEmoji(root, train=False), Emoji(root, train=False)
    image, labels = parsed[plain.styles.tolist().index(4)]  # twemoji's: the left half is yellow
    assert len(parsed) == len(plain) and torch.equal(image, plain[plain.styles.tolist().index(4)][0])
    assert labels.dtype == torch.int64 and torch.equal(labels, (torch.arange(64) < 32).expand(64, 64) * CLASSES.index("yellow"))


def test_held_out_pairs_follow_their_rule():
    names = np.array([f"thing {i // 5}" for i in range(2000)])
    styles = np.array([i % 5 for i in range(2000)])
    held = held_out_pairs(names, styles)
    of_name = held.reshape(400, 5).sum(1)
    assert set(of_name) == {0, 1} and 0.1 < of_name.mean() < 0.18 and not held[styles < emoji.DRAWN].any()
    order = np.random.default_rng(0).permutation(2000)
    assert np.array_equal(held_out_pairs(names[order], styles[order]), held[order])


@pytest.mark.parametrize("fault", ["missing package", "wrong checksum", "full disk"])
def test_bad_data_ends_in_one_sentence_with_nothing_half_written(root, fault, monkeypatch, capsys):
    folder = root / "emoji"
    package, name, _ = emoji.STYLES["twemoji"]
    if fault == "missing package":
        (folder / name).unlink()
        monkeypatch.setenv("PATH", "")
    if fault == "wrong checksum":
        (folder / name).write_bytes(b"something else")
    if fault == "full disk":

        def full(file, **arrays):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez_compressed", full)
    before = {p.name for p in folder.iterdir()}
    monkeypatch.setattr(sys, "argv", ["emoji", "--root", str(root)])
    with pytest.raises(SystemExit) as end:
        emoji.main()
    said = {"missing package": f"run `npm pack {package}`", "wrong checksum": "delete it", "full disk": "No space left"}[fault]
    assert said in end.value.code and "was not prepared" in end.value.code and "\n" not in end.value.code
    assert {p.name for p in folder.iterdir()} == before


def test_data_of_an_earlier_version_and_wrong_parts_say_so(tmp_path, monkeypatch):
    (tmp_path / "emoji").mkdir()
    np.savez(tmp_path / "emoji/emoji.npz", names=np.array(["a"]))
    with pytest.raises(ValueError, match="earlier version.*make data-emoji"):
        Emoji(tmp_path)
    everything = dict.fromkeys(("names", "captions", "categories"), np.array(["a"])) | {"styles": np.array([0])}
    sheet = np.frombuffer(image("white", "png"), np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(emoji, "COLUMNS", 1)
        np.savez(tmp_path / "emoji/emoji.npz", sheet=sheet, **everything)
        with pytest.raises(ValueError, match="earlier version, without regions.*make data-emoji"):
            ParsedEmoji(tmp_path)
    with pytest.raises(ValueError, match="held_out = 'both': give 'names' or 'pairs'"):
        Emoji(tmp_path, held_out="both")
    with pytest.raises(FileNotFoundError, match="make data-emoji"):
        Emoji(tmp_path / "nowhere")


def test_an_item_by_name_is_any_of_its_drawings(root):
    emoji.build(root)
    data = Emoji(root, train=False, by_name=True)
    torch.manual_seed(0)
    assert len(data) == 1 and len({tuple(data[0][0][:, 30, 10].tolist()) for _ in range(40)}) == 5


def test_the_card_names_every_package():
    card = (ROOT / "checkpoints/tiny/README.md").read_text()
    assert all(package in card for package, *_ in emoji.STYLES.values())


def test_the_sample_of_pairs_is_chosen_by_its_rule():
    images, names = sample_emoji("pairs")
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    assert images.shape == (32, 3, 64, 64) and digests == sorted(digests) and int(digests[-1][:2], 16) < 36
    known = (ROOT / "configs/tiny/names.txt").read_text().splitlines()
    assert set(names) <= set(known) and not set(names) & set(held_out_names())
    with pytest.raises(ValueError, match="held_out = 'styles': give 'names' or 'pairs'"):
        sample_emoji("styles")
