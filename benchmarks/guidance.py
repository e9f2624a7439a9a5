"""Guidance by a map of labels: who follows it, and what does it do to the image?

    python benchmarks/guidance.py [--prompts 64] [--evaluations 40] [--methods newton ...] [--quick]

The labels are those of held-out drawings (`held_out_pairs`: other drawings of these things were in the training), the captions are
the prompts of `tiny` at guidance 3, and all methods begin with the same noise. The parser of emoji guides. A second one, by rules
and without weights (`ldm.data.regions.by_rules`), says what came out. Every method has two step lengths and the same number of
evaluations of the network, MPGD half as many for about the same time. One with a prompt and one without count as one, a backward
pass as one more.

unguided   DDIM
newton     the paper's loop, forward only, two inner steps at each diffusion step
gradient   the same loop with J^T e in the place of J e (as FreeDoM)
MPGD       x0 moves along e itself, no Jacobian; one evaluation a step

Images go to outputs/guidance_maps/, eight prompts at a time: the same command goes on after an interruption. The table, of the
prompts that all methods have so far, is in results/guidance.md. Needs the captioned images (make data-emoji). --quick: four
prompts, ten evaluations, printed only.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import Clip
from tqdm import tqdm

from ldm.baselines import gradient_steps, mpgd
from ldm.checkpoints import load_model
from ldm.comparison import EvaluationCounter
from ldm.constraints import LossConstraint
from ldm.data.emoji import FIRST_STYLES, Emoji, ParsedEmoji
from ldm.data.regions import CLASSES, by_rules
from ldm.denoisers import LatentDenoiser
from ldm.guidance import parsing_distance
from ldm.images import from_uint8
from ldm.metrics import bootstrap, confusion, interval, kernel_parts, kid, mean_iou
from ldm.newton_sampler import newton_sampler
from ldm.util import atomic_write, resolve_device

METHODS = {  # name: (sampler, settings for a number of evaluations n, argument of the step length, its values)
    "unguided": (newton_sampler, lambda n: dict(steps=n), None, [0.0]),
    "newton": (newton_sampler, lambda n: dict(steps=n // 5, newton_steps=2), "lr", [0.5, 1.0]),
    "gradient": (gradient_steps, lambda n: dict(steps=n // 5, gradient_steps=2), "lr", [0.5, 1.0]),
    "MPGD": (mpgd, lambda n: dict(steps=n // 2), "scale", [0.2, 0.5]),
}
MEASURES = {"miou": "mIoU, second parser", "pixels": "pixels right", "own": "mIoU, guiding parser",
            "first": "caption in the first 5 %", "kid": "KID"}  # fmt: skip
COSTS = ("forward", "backward", "decoder", "seconds")
GUIDANCE, BATCH = 3.0, 8


class Targets:
    """n held-out drawings of different names in one skin tone: images, captions, labels [n, 64, 64], in a random order."""

    def __init__(self, root, n, device):
        held_out = ParsedEmoji(root, train=False, held_out="pairs")
        order = torch.randperm(len(held_out.names), generator=torch.Generator().manual_seed(0)).tolist()
        plain = {held_out.names[i]: i for i in order if held_out.captions[i] == held_out.names[i]}
        chosen = list(plain.values())[:n]
        if len(chosen) < n:
            raise SystemExit(f"--prompts {n}: there are {len(chosen)} held-out drawings")
        self.captions = [held_out.captions[i] for i in chosen]
        self.images, self.labels = from_uint8(held_out.images[chosen]).to(device), held_out.regions[chosen].long().to(device)


class Measures:
    """What is measured of images; the ranks are among the names of the training."""

    def __init__(self, root, device):
        self.parsers = {"miou": by_rules, "own": load_model("tiny-parser", device=device).labels}
        self.clip = Clip(device)
        self.names = list(dict.fromkeys(Emoji(root).names))
        self.reference = self.clip.features(from_uint8(Emoji(root, train=False, styles=FIRST_STYLES).images))

    def __call__(self, images, targets):
        """{measure: text} of images [n, ...], of the first n targets, with intervals over the images, and their median rank."""
        n, draws, values = len(images), bootstrap(len(images)), {}
        for name, parse in self.parsers.items():
            counts = confusion(parse(images), targets.labels[:n], len(CLASSES)).cpu()
            values[name] = mean_iou(counts)
            if name == "miou":
                values["pixels"] = counts.diagonal(dim1=1, dim2=2).sum(1) / counts.sum((1, 2))
        features = self.clip.features(images)
        ranks = self.clip.ranks(features, targets.captions[:n], self.names)
        values["first"] = (ranks < 0.05 * len(self.names)).float()
        row = {name: cell(value.mean(), value.double()[draws].mean(1)) for name, value in values.items()}
        parts = kernel_parts(features, self.reference)
        row["kid"] = cell(kid(parts), torch.tensor([kid(parts, i) for i in draws[:200]]))
        return row | dict(rank=f"{int(ranks.median()) + 1}")


def cell(value, samples):
    low, high = interval(samples)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def sampled(model, parser, targets, part, sampler, settings):
    """Images of the prompts `part` by a sampler, and its costs in all [4]; seconds of this process, on a GPU wall seconds."""
    clock = time.perf_counter if targets.images.device.type == "cuda" else time.process_time
    start, captions = clock(), targets.captions[part]
    D = EvaluationCounter(LatentDenoiser(model, captions, GUIDANCE))
    constraint = LossConstraint(parsing_distance(parser, model.decode, targets.labels[part]))
    shape, seeds = (len(captions), model.channels, model.image_size, model.image_size), range(part.start, part.stop)
    free = sampler is newton_sampler and "newton_steps" not in settings
    *_, state = sampler(D, None if free else constraint, shape, seeds, device=targets.images.device, **settings)
    with torch.inference_mode():
        images = model.decode(state.x_t).clamp(-1, 1)
    return images, torch.tensor([D.forward, D.backward, constraint.backward_passes * len(captions), clock() - start])


def table(rows, n):
    """The lines of the table of {(method, step length): row}."""
    lines = [f"# Guidance by a map of labels, {n} prompts", "",
             "Mean [95 % bootstrap interval over the images]. Evaluations: of the network, per image, forward + backward. Decoder: "
             "backward passes of decoder and parser. Seconds: of the CPU, or a GPU's wall time. KID: in the tiny CLIP's features, "
             "to the held-out names in the first two styles.", "",
             "| method | step | evaluations | decoder | s per image | " + " | ".join(MEASURES.values()) + " | median rank |",
             "|" + "---|" * (6 + len(MEASURES))]  # fmt: skip
    for (name, value), row in rows.items():
        evaluations = f"{row['forward']:.0f} + {row['backward']:.0f}" if row["backward"] else f"{row['forward']:.0f}"
        costs = [evaluations, f"{row['decoder']:.0f}", f"{row['seconds']:.2f}"] if row["forward"] else [""] * 3
        lines.append(
            "| " + " | ".join([name, f"{value:g}" if value else "", *costs, *(row[m] for m in MEASURES), row["rank"]]) + " |"
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", default="data", help="the folder of emoji/emoji.npz")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=Path, default=Path("outputs/guidance_maps"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    n, evaluations = (4, 10) if args.quick else (args.prompts, args.evaluations)
    device = resolve_device(args.device)
    model, guide = load_model("tiny", device=device), load_model("tiny-parser", device=device)
    targets, measure = Targets(args.data, n, device), Measures(args.data, device)
    found = {(name, value): [] for name in args.methods for value in METHODS[name][3]}
    args.samples.mkdir(parents=True, exist_ok=True)
    for start in range(0, n, BATCH):
        part = slice(start, min(start + BATCH, n))
        for (name, value), parts in (bar := tqdm(found.items(), f"prompts {start} to {part.stop - 1}")):
            bar.set_postfix_str(f"{name} {value:g}")
            path = args.samples / f"{name}-{value:g}-{evaluations}-{start}-{part.stop}.safetensors"
            if not path.is_file():
                sampler, settings, argument, _ = METHODS[name]
                given = settings(evaluations) | ({argument: value} if argument else {})
                images, costs = sampled(model, guide, targets, part, sampler, given)
                with atomic_write(path) as temporary:
                    save_file({"images": images.cpu().contiguous(), "costs": costs}, temporary)
            parts.append(load_file(path))
        done = part.stop
        rows = {("the drawings", 0.0): dict.fromkeys(COSTS, 0) | measure(targets.images[:done], targets)}
        for key, parts in found.items():
            costs = torch.stack([p["costs"] for p in parts]).sum(0) / done
            rows[key] = dict(zip(COSTS, costs.tolist(), strict=True)) | measure(
                torch.cat([p["images"] for p in parts]).to(device), targets
            )
        lines = table(rows, done)
        if not args.quick:
            (args.out / "guidance.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
