"""How few evaluations does a constraint need?

    python benchmarks/few_steps.py [--budgets 4 8 12] [--images 32] [--model tiny-flow]

The flow as it is, not distilled, on the held-out emoji of assets/: the right half missing (constraint on latents), and x4
super-resolution (through the decoder). Writes results/few_steps.md, one table per task.

fast             its levels and J, where three diffusion steps fit into the budget
fast, no J       projections with most of the noise drawn anew; of the decoded image, encoded again, where there is a decoder
newton           one inner step at each diffusion step
LATINO           denoise, proximal step on the image, all noise anew; decoder and encoder forwards only
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from ldm.baselines import latino
from ldm.checkpoints import load_model
from ldm.comparison import METHODS, Task, run
from ldm.data.emoji import sample_emoji
from ldm.denoisers import LatentDenoiser
from ldm.fast_sampler import fast_sampler
from ldm.metrics import bootstrap, interval
from ldm.problems import label
from ldm.table import table_head
from ldm.util import resolve_device

MEASURES = ("residual", "psnr", "ssim", "lpips")


def without_J(n, task):
    return fast_sampler, dict(steps=n, late=float("inf"), **task.noise)


CHOICES = {
    "fast": METHODS["fast"],
    "fast, no J": without_J,
    "newton": METHODS["newton"],
    "LATINO": lambda n, task: (latino, dict(steps=n, encode=task.encode, **task.noise)),
}


def cell(values):
    low, high = interval(values.double()[bootstrap(len(values))].mean(1))
    return f"{values.mean():.3g} [{low:.3g}, {high:.3g}]"


def table(task, budgets, device, batch):
    """The lines of a task's table, cheapest first."""
    lines = [f"## {label(task.name)}", "", *table_head("method | evaluations | s per image", MEASURES)]
    for n, (name, choose) in (bar := tqdm([(n, item) for n in budgets for item in CHOICES.items()])):
        bar.set_description(f"{task.name}, {name}, {n}")
        try:
            chosen = choose(n, task)
        except ValueError:  # the budget is too small
            continue
        x, costs = run(task, *chosen, batch, device)
        values = task.measure(task.to_images(x))
        cells = [name, f"{costs['nfe_forward']:.0f}", f"{costs['seconds']:.2f}", *(cell(values[m]) for m in MEASURES)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=int, default=[4, 8, 12], metavar="N")
    parser.add_argument("--tasks", nargs="+", default=["half", "sr4"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--model", default="tiny-flow")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    device = resolve_device(args.device)
    model, images = load_model(args.model, device=device), sample_emoji()[0][: args.images].to(device)
    shape = (model.channels, model.image_size, model.image_size)
    note = "Mean [95 % bootstrap interval over the images], without prompts. Seconds: of the CPU, or a GPU's wall time."
    lines = [f"# Few evaluations, {args.model}, {len(images)} images", "", note]
    for name in args.tasks:
        lines += ["", *table(Task(name, images, LatentDenoiser(model, ""), shape, model), args.budgets, device, args.batch)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "few_steps.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
