"""Images of four times the side that `tiny` was trained at: windows alone, and tied to a small image of the whole.

    python benchmarks/multiscale.py [--prompts 16] [--first 0] [--device auto]
    python benchmarks/multiscale.py --memory

The first: 256x256 images of every third prompt of the model's sheet, one by one into outputs/multiscale, and not again if it
is there (--first 8 --prompts 4: the ninth to twelfth). Measures all that are there, writes results/multiscale.md.
The second: the expected peak of Stable Diffusion v1 at 2048x2048 (`ldm.memory`), an estimate from tensors without data.
"""

import argparse
from functools import partial

import torch
from large import seam
from notebook_costs import FULL, filled, without_data
from sampling import now
from tiny import SHEET, Clip, Judge
from tqdm import tqdm

from ldm.checkpoints import load_model
from ldm.denoisers import LatentDenoiser
from ldm.fast_sampler import fast_sampler
from ldm.memory import expected_peak
from ldm.metrics import psnr
from ldm.modules.tiling import windows
from ldm.multiscale import Enlargement
from ldm.operators import downsample
from ldm.sampling import State
from ldm.util import ROOT, resolve_device

OUT = ROOT / "outputs/multiscale"
OVERLAP = 0.25
HEAD = "| | CLIP, first 10 | judge, first 5 | windows with it | step at borders | detail | PSNR of A x | NFE | s |"
FORMATS = ("{:.0%}", "{:.0%}", "{:.0%}", "{:.2f}", "{:.3f}", "{:.1f}", "{:.0f}", "{:.0f}")


def rows_of(model, prompt: str, seed: int, device) -> dict:
    """{"small": image [1, 3, 64, 64], and of each row (image [1, 3, 256, 256], NFE, seconds)}."""
    small = model.decode(last(LatentDenoiser(model, prompt, 3.0), None, (1, 4, 16, 16), [seed], steps=24).x_t).clamp(-1, 1)
    big = Enlargement(model, small, 4)
    worded, plain = (LatentDenoiser(model, prompt, s).tile(16, OVERLAP, batch=25) for s in (3.0, 1.0))
    begun = dict(steps=6, start=big.start(plain, 0.4, [seed]))
    runs = {
        "windows": partial(last, worded, None, big.shape, [seed], steps=12),
        "windows, begun at it": partial(last, plain, None, big.shape, [seed], **begun),
        "windows, latents tied": partial(last, plain, big.latent_constraint, big.shape, [seed], steps=12),
        "windows, begun at it and tied": partial(last, plain, big.constraint, big.shape, [seed], **begun),
    }
    found = {"up-sampled": (big.upsampled, 0, 0.0)}
    for name, run in runs.items():
        start = now(device)
        state = run()
        found[name] = (model.decode(state.x_t).clamp(-1, 1), state.nfe, now(device) - start)
    image, *cost = found[name]
    return {"small": small, **found, "the same, then exact": (big.exact(image), *cost)}


def last(*args, **settings) -> State:
    *_, state = fast_sampler(*args, **settings)
    return state


def parts(x):
    """[N, 3, 256, 256] -> the 16 windows without overlap of each, [16 N, 3, 64, 64]."""
    return x.unflatten(3, (4, 64)).unflatten(2, (4, 64)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def measured(runs, prompts, device) -> list[str]:
    """Lines of the table. In turn: is the prompt among CLIP's first ten names, and the judge's first five, for the image A x; the
    share of the 16 windows that have it among CLIP's first ten; the step across borders of windows over that elsewhere; the root
    mean square of what A does not see; the PSNR of A x against the small image; evaluations of D; seconds."""
    clip, judge, A = Clip(device), Judge(device), downsample((256, 256), 4)
    rows = [name for name in runs[0] if name != "small"]
    large = torch.cat([run[name][0].float() for name in rows for run in runs])
    small = torch.cat([run["small"].float() for run in runs]).repeat(len(rows), 1, 1, 1)
    seen, captions = A(large).clamp(-1, 1), prompts * len(rows)
    everything = torch.cat([seen, parts(large)])
    ranks = clip.ranks(clip.features(everything), captions + [c for c in captions for _ in range(16)], list(judge.place))
    found = (ranks < 10).float()
    borders = sorted({4 * b for i, _ in windows(64, 16, int(OVERLAP * 16)) for b in (i, i + 16)} - {0, 256})
    columns = [
        *(found[: len(large)], judge.right(seen, captions).float(), found[len(large) :].view(-1, 16).mean(1)),
        torch.tensor([seam(x[None], borders) for x in large]),
        (large - A.pseudo_inverse(A(large))).flatten(1).square().mean(1).sqrt(),
        psnr(seen, small),
        *(torch.tensor([run[name][i] for name in rows for run in runs], dtype=torch.float) for i in (1, 2)),
    ]
    means = torch.stack(columns, 1).unflatten(0, (len(rows), -1)).mean(1).tolist()
    return [
        f"| {name} | {' | '.join(f.format(x) for f, x in zip(FORMATS, row, strict=True))} |"
        for name, row in zip(rows, means, strict=True)
    ]


def memory():
    """U-Net on four windows of 512x512 at a time, encoder and decoder in tiles of 512x512, 16 bits."""
    model = filled(without_data("inpaint", **FULL), lambda shape: torch.empty(shape, dtype=torch.bfloat16)).to(torch.bfloat16)
    model.first_stage_model.tile(512)
    big = Enlargement(model, torch.zeros(1, 3, 512, 512), 4)
    D = LatentDenoiser(model, "").tile(64, OVERLAP, batch=4)
    for name, constraint in {"no tie, or latents tied": None, "tied": big.constraint}.items():
        print(f"{name}: {expected_peak(D, constraint, big.shape, model):.1f} GiB")


@torch.inference_mode()
def sampled(args):
    model, sheet = load_model("tiny", device=args.device), [name.strip() for name in SHEET.split(",")][::3]
    OUT.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(args.first, min(args.first + args.prompts, len(sheet))), "prompts"):
        if not (OUT / f"{i}.pt").exists():
            torch.save(rows_of(model, sheet[i], i, args.device), OUT / f"{i}.pt")
    there = [i for i in range(len(sheet)) if (OUT / f"{i}.pt").exists()]
    lines = measured([torch.load(OUT / f"{i}.pt") for i in there], [sheet[i] for i in there], args.device)
    path = ROOT / "benchmarks/results/multiscale.md"
    title = f"`python benchmarks/multiscale.py --prompts {len(there)}`, torch {torch.__version__}"
    path.write_text("\n".join([title, "", HEAD, "|---" * 9 + "|", *lines]) + "\n")
    print(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    args.device = resolve_device(args.device)
    memory() if args.memory else sampled(args)


if __name__ == "__main__":
    main()
