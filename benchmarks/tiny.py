"""Quality of the tiny models, as their card reports it:

    python benchmarks/tiny.py [--parts autoencoder clip judge parsers generation] [--models tiny tiny-flow] [--captions 256]
                              [--steps 50] [--guidance 3] [--autoencoder FILE] [--out checkpoints/tiny]

Measures the autoencoder's reconstruction, CLIP's retrieval, the judge's and the parsers' accuracy on the held-out images, and the
generated images in two ways: by that CLIP, whose text tower guided them (rank of the right caption among those of all training
names, and kernel distance, KID, in its image features), and by the judge, which had no part in them (right name among its first
five, KID in its features). Needs the captioned images (make data-emoji) and, for LPIPS, AlexNet's weights (make data-lpips). Writes
quality.json, where parts that are not measured keep their figures, and the sheets of samples.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

from ldm.checkpoints import load_model
from ldm.data.emoji import FIRST_STYLES, Emoji, ParsedEmoji, sample_emoji
from ldm.data.regions import CLASSES, by_rules
from ldm.denoisers import LatentDenoiser
from ldm.images import from_uint8
from ldm.metrics import confusion, kernel_distance, lpips_distance, lpips_weights, mean_iou, psnr, ssim
from ldm.modules.encoders.modules import bpe_tokenizer
from ldm.newton_sampler import sample
from ldm.util import ROOT, resolve_device

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SHEET = """red apple, strawberry, tangerine, lemon, watermelon, grapes, cherries, ear of maize,
hamburger, slice of pizza, hot dog, doughnut, birthday cake, ice cream, hot beverage, beer mug,
dog face, cat face, tiger face, panda face, frog face, octopus, snail, lady beetle,
honeybee, turtle, elephant, whale, butterfly, cactus, sunflower, mushroom,
grinning face, smiling face with sunglasses, crying face, loudly crying face, angry face, skull, ghost, robot face,
alien monster, pile of poo, thumbs up sign, raised hand, clapping hands sign, eyes, fire, snowman without snow,
rocket, airplane, automobile, police car, bicycle, tent, house with garden, european castle,
soccer ball, basketball and hoop, guitar, trumpet, blue heart, crescent moon, umbrella with rain drops, wrapped present"""


@torch.inference_mode()
def in_batches(function, images, device, batch=128):
    return torch.cat([function(x.to(device)).cpu() for x in images.split(batch)])


class Clip:
    """The tiny CLIP: features of images, and ranks of captions."""

    def __init__(self, device):
        self.clip, self.device = load_model("tiny-clip", device=device), device
        self.tokenizer = bpe_tokenizer(ROOT / "configs/tiny/bpe.txt.gz")

    def features(self, images):
        """[N, 3, 64, 64] -> [N, 128], of unit length."""
        return in_batches(lambda x: self.clip.encode_image(x, normalize=True), images, self.device)

    def ranks(self, features, captions, candidates):
        """For each image, how many of the candidates (list of strings) fit better than its own caption. [N]"""
        ids = self.tokenizer(list(candidates), self.clip.context_length).to(self.device)
        with torch.inference_mode():
            text = self.clip.encode_text(ids, normalize=True).cpu()
        scores = features @ text.T
        place = {caption: i for i, caption in enumerate(candidates)}
        own = scores.gather(1, torch.tensor([place[caption] for caption in captions])[:, None])
        return (scores > own).sum(1)


class Judge:
    """The tiny judge: features of images, and whether the right name is among its first."""

    def __init__(self, device):
        self.network, self.device = load_model("tiny-judge", device=device), device
        self.place = {name: i for i, name in enumerate(self.network.names)}

    def features(self, images):
        """[N, 3, 64, 64] -> [N, 256]."""
        return in_batches(self.network.features, images, self.device)

    def right(self, images, names, first=5):
        """Which of the images' names, all known to the judge, are among its first. [N] of bool"""
        logits = in_batches(lambda x: self.network(x)[0], images, self.device)
        return (logits.topk(first).indices == torch.tensor([self.place[name] for name in names])[:, None]).any(1)

    def category(self, images, categories):
        """Which of the categories are right. [N] of bool"""
        found = in_batches(lambda x: self.network(x)[1].argmax(1), images, self.device)
        return found == torch.tensor([self.network.categories.index(category) for category in categories])


def share(condition):
    return round(condition.float().mean().item(), 4)


def reconstruction(autoencoder, images, device):
    """Means of PSNR, SSIM and, where its weights are there, LPIPS of the reconstruction from the posterior's mean."""
    again = in_batches(lambda x: autoencoder.decode(autoencoder.encode(x).mode()).clamp(-1, 1), images, device)
    figures = {"psnr": psnr(again, images).mean().item(), "ssim": ssim(again, images).mean().item()}
    if lpips_weights() is None:
        print("LPIPS is left out: AlexNet's weights are missing (make data-lpips)")
    else:
        figures["lpips_alex"] = lpips_distance(again, images).mean().item()
    return {"images": len(images), **{k: round(v, 4) for k, v in figures.items()}}


def smoothness(autoencoder, images, device, by=0.05):
    """How far decoded images go, root mean square in [-1, 1], when white noise of `by` standard deviations of the latents moves
    them: how well a mask or a difference quotient in the latents works with this decoder."""
    z = in_batches(lambda x: autoencoder.encode(x).mode(), images, device)
    moved = z + by * z.std() * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    a, b = (in_batches(lambda z: autoencoder.decode(z).clamp(-1, 1), latents, device) for latents in (z, moved))
    return round((a - b).square().flatten(1).mean(1).sqrt().mean().item(), 4)


def retrieval(clip, images, names):
    """Shares of images whose own name is among the first 1, 10 and 5 % of all the names."""
    candidates = list(dict.fromkeys(names))
    ranks = clip.ranks(clip.features(images), names, candidates)
    return {
        "names": len(candidates),
        "top_1": share(ranks < 1),
        "top_10": share(ranks < 10),
        "top_5_percent": share(ranks < 0.05 * len(candidates)),
    }


def generate(model, captions, steps, guidance, device, batch=64):
    """One image [3, 64, 64] for each caption, seeds 0, 1, 2 ..."""
    samples, shape = [], (model.channels, model.image_size, model.image_size)
    for start in tqdm(range(0, len(captions), batch), f"{steps} steps", leave=False):
        part = captions[start : start + batch]
        D = LatentDenoiser(model, part, guidance)
        z = sample(D, None, (len(part), *shape), range(start, start + len(part)), steps=steps, device=device).x_t
        with torch.inference_mode():
            samples.append(model.decode(z).clamp(-1, 1).cpu())
    return torch.cat(samples)


def draw_sheet(images, captions, path):
    """Eight in a row, each with its caption."""
    fig, axes = plt.subplots(-(-len(captions) // 8), 8, figsize=(10, 11.2))
    for ax, image, caption in zip(axes.flat, images, captions, strict=True):
        ax.imshow((image.permute(1, 2, 0) + 1) / 2, interpolation="lanczos")
        ax.set_title(caption if len(caption) < 20 else caption.replace(" with ", "\nwith ").replace(" and ", "\nand "),
                     fontsize=6.5, y=-0.06, va="top")  # fmt: skip
        ax.set_axis_off()
    fig.subplots_adjust(0.01, 0.03, 0.99, 0.995, wspace=0.08, hspace=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def measure_autoencoder(args, device):
    """Both held-out sets in all styles, the held-out names in the first two styles, and the sample."""
    config = None if args.autoencoder == "tiny-autoencoder" else ROOT / "configs/tiny/autoencoder.yaml"
    autoencoder = load_model(args.autoencoder, config, device=device)
    sets = {key: from_uint8(Emoji(args.data, train=False, **options).images) for key, options in
            {"names": {}, "pairs": {"held_out": "pairs"}, "held_out": {"styles": FIRST_STYLES}}.items()}  # fmt: skip
    sets["sample"] = sample_emoji()[0]
    return {key: reconstruction(autoencoder, images, device) | {"moved_by_5_percent": smoothness(autoencoder, images, device)}
            for key, images in sets.items()}  # fmt: skip


def measure_clip(args, device):
    sets = {key: Emoji(args.data, train=key == "training", styles=FIRST_STYLES) for key in ("held_out", "training")}
    return {key: retrieval(Clip(device), from_uint8(data.images), data.names) for key, data in sets.items()}


def measure_judge(args, device):
    """Of held-out names, which the judge cannot know, the category; of held-out drawings of known names the name too."""
    judge, figures = Judge(device), {}
    for key in ("names", "pairs"):
        data = Emoji(args.data, train=False, held_out=key)
        images = from_uint8(data.images)
        figures[key] = {"images": len(images), "category": share(judge.category(images, data.categories))}
        if key == "pairs":
            figures[key] |= {f"top_{first}": share(judge.right(images, data.names, first)) for first in (1, 5)}
    return figures


def measure_parsers(args, device):
    """Of all pixels of a held-out set: the classes' mean intersection over union, each class's, and the share that is right."""
    figures = {}
    for name, parse in {"tiny-parser": load_model("tiny-parser", device=device).labels, "by_rules": by_rules}.items():
        figures[name] = {}
        for key in ("names", "pairs"):
            data = ParsedEmoji(args.data, train=False, held_out=key)
            found = in_batches(parse, from_uint8(data.images), device, batch=32)
            counts = confusion(found, data.regions.long(), len(CLASSES)).sum(0)
            both = counts.diagonal()
            each = (both / (counts.sum(0) + counts.sum(1) - both)).tolist()
            figures[name][key] = {"images": len(found), "miou": round(mean_iou(counts).item(), 4),
                                  "pixels": round((both.sum() / counts.sum()).item(), 4),
                                  "iou": {c: round(v, 3) for c, v in zip(CLASSES, each, strict=True)}}  # fmt: skip
    return figures


def measure_generation(args, device):
    """One image of each of the first captions in a random order of the training names, so without skin tones."""
    train, held_out = (Emoji(args.data, train=part, styles=FIRST_STYLES) for part in (True, False))
    pairs = Emoji(args.data, train=False, held_out="pairs")
    clip, judge = Clip(device), Judge(device)
    names = list(dict.fromkeys(train.names))
    first = torch.tensor([train.names.index(name) for name in names])
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    captions = [names[i] for i in order[: args.captions]]
    real, unseen, drawings = (from_uint8(x) for x in (train.images[first[order]], held_out.images, pairs.images))
    halves, unseen_by_clip, unseen_by_judge = clip.features(real), clip.features(unseen), judge.features(unseen)
    subset = min(args.captions, len(names) // 2, len(unseen))
    distance = lambda a, b: [round(x, 4) for x in kernel_distance(a, b, subset_size=subset)]  # noqa: E731
    n = len(captions)

    def figures(images):
        features = clip.features(images)
        ranks = clip.ranks(features, captions, names)
        return {
            "top_5_percent": share(ranks < 0.05 * len(names)),
            "top_1": share(ranks < 1),
            "median_rank": ranks.median().item() + 1,
            "kid_to_held_out": distance(features, unseen_by_clip),
            "judge_top_5": share(judge.right(images, captions)),
            "judge_kid_to_held_out": distance(judge.features(images), unseen_by_judge),
        }

    found = {
        "captions": n, "steps": args.steps, "guidance": args.guidance,
        "real": figures(real[:n]) | {"kid_between_halves_of_training": distance(halves[::2], halves[1::2])},
        "held_out_pairs": {"judge_top_5": share(judge.right(drawings, pairs.names))},
    }  # fmt: skip
    for name in args.models:
        model = load_model(name, device=device)
        found[name] = figures(generate(model, captions, args.steps, args.guidance, device))
        sheet = [caption.strip() for caption in SHEET.split(",")]
        images = generate(model, sheet, args.steps, args.guidance, device)
        found[name]["judge_top_5_of_the_sheet"] = share(judge.right(images, sheet))
        draw_sheet(images, sheet, args.out / f"samples-{name}.png")
    return found


PARTS = {
    "autoencoder": measure_autoencoder,
    "clip": measure_clip,
    "judge": measure_judge,
    "parsers": measure_parsers,
    "generation": measure_generation,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--autoencoder", default="tiny-autoencoder", help="or a file with other weights of it")
    parser.add_argument("--models", nargs="*", default=["tiny", "tiny-flow"])
    parser.add_argument("--captions", type=int, default=256, help="training captions to generate images for")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--data", default="data", help="folder of emoji/emoji.npz")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/tiny"))
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quality.json"
    quality = json.loads(path.read_text()) if path.is_file() else {}
    for part in args.parts:
        quality[part] = PARTS[part](args, resolve_device(args.device))
        path.write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality, indent=2))


if __name__ == "__main__":
    main()
