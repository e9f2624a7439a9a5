"""Quality of an MNIST model's unconditional samples, as its card reports it:

    python mnist/quality.py [--model mnist] [--samples 1000] [--steps 50] [--eta 0 1] [--out checkpoints/mnist]

A classifier (shipped, trained by configs/mnist/classifier.yaml) judges the samples; kernel distances (KID) are in its
features, to the 10,000 test digits, next to those of as many training digits. The background is the frame of two pixels that is
black in all digits: how far samples are from it, as a root mean square in [-1, 1]. All that for each eta. Needs the MNIST data.
Writes quality.json and samples.png, samples of the last eta.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoints import load_model
from ldm.data.mnist import MNIST
from ldm.denoisers import Denoiser
from ldm.images import from_uint8, grid, save_image
from ldm.metrics import judge_digits, kernel_distance
from ldm.newton_sampler import sample
from ldm.util import resolve_device


def background_rms(images):
    """Of images [N, 1, 32, 32] in [-1, 1], the root mean square distance from black of the two outermost pixels on each side."""
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    return (images[:, 0, frame] + 1).square().mean().sqrt().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist", help="a shipped model or a path")
    parser.add_argument("--config", help="the model's yaml, where it is given by a path")
    parser.add_argument("--data", default="data", help="folder of the MNIST files")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 1.0], help="0: deterministic, 1: ancestral noise")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/mnist"))
    args = parser.parse_args()

    device = resolve_device(args.device)
    model = load_model(args.model, config=args.config, device=device)
    classifier = load_model("mnist-classifier", device=device)
    test, train = MNIST(args.data, train=False), MNIST(args.data, train=True)
    D = Denoiser(model.network, model.schedule, model.parameterization)
    seeds = list(range(args.samples))
    batches = [seeds[i : i + args.batch] for i in range(0, args.samples, args.batch)]
    reference, p_test = judge_digits(classifier, from_uint8(test.images), device)
    real, _ = judge_digits(classifier, from_uint8(train.images[: args.samples]), device)
    by_eta = {}
    for eta in args.eta:
        samples = torch.cat([
            sample(D, None, (len(b), 1, 32, 32), b, steps=args.steps, eta=eta, device=device).x_t.cpu()
            for b in tqdm(batches, desc=f"{args.steps} steps, eta = {eta:g}")
        ])  # fmt: skip
        fake, p = judge_digits(classifier, samples, device)
        by_eta[f"{eta:g}"] = {
            "top_probability_at_least_0.9": round((p.amax(1) >= 0.9).float().mean().item(), 4),
            "kid_to_test": [round(v, 4) for v in kernel_distance(fake, reference)],
            "background_rms": round(background_rms(samples), 4),
            "share_of_each_digit": [round(v, 3) for v in (torch.bincount(p.argmax(1), minlength=10) / len(p)).tolist()],
        }
    quality = {
        "samples": args.samples,
        "ddim_steps": args.steps,
        "samples_by_eta": by_eta,
        "classifier_test_accuracy": round((p_test.argmax(1) == test.labels).float().mean().item(), 4),
        "test_digits_top_probability_at_least_0.9": round((p_test.amax(1) >= 0.9).float().mean().item(), 4),
        "kid_training_digits_to_test": [round(v, 4) for v in kernel_distance(real, reference)],
    }
    print(json.dumps(quality, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print("samples:", save_image(grid(samples[:100], 10), args.out / "samples.png", scale=2))


if __name__ == "__main__":
    main()
