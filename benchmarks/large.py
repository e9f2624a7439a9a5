"""Images larger than a model was trained at: time and memory by their size, all at once and on overlapping windows.

    python benchmarks/large.py [--device auto] [--quick] [--dtype bf16] [--batch 4]
    python benchmarks/large.py --figure

The first: one evaluation of the denoiser and one of the decoder of Stable Diffusion v1 with random weights, each once after a
warm-up at 512x512; windows of 512x512, D's with half of that as overlap and --batch of them per call, the decoder's with a quarter.
Writes results/large-<device>.md row by row. --quick: networks of a tenth and a quarter of the width.
The second: 256x256 images by the model `tiny`, which was trained at 64x64; writes results/large-tiny.png.
"""

import argparse
import platform
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from sampling import DTYPES, PeakMemory, now, random_model
from tqdm import tqdm

from ldm.checkpoints import load_model
from ldm.constraints import latent_inpainting
from ldm.data.emoji import sample_emoji
from ldm.denoisers import LatentDenoiser
from ldm.fast_sampler import fast_sampler
from ldm.images import to_pil
from ldm.inpainting import blend
from ldm.newton_sampler import sample
from ldm.util import ROOT, resolve_device

SIZES = ((512, 512), (512, 1024), (1024, 1024), (512, 2048), (1024, 2048))


def costs(work, memory, device):
    """(seconds, MiB above the weights) of work(), as text."""
    memory.restart()
    start = now(device)
    try:
        with torch.inference_mode():
            work()
    except MemoryError:
        return "out of memory", ""
    return f"{now(device) - start:.3g}", f"{memory():.0f}"


def table(args, device):
    model = random_model(DTYPES[args.dtype], device, args.quick)
    D, autoencoder = LatentDenoiser(model, "a photograph of a lake"), model.first_stage_model
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    path = args.out / f"large-{device.type}{'-quick' if args.quick else ''}.md"
    lines = [f"`python {' '.join(['benchmarks/large.py', *sys.argv[1:]])}` on {name} ({platform.machine()}), torch "
             f"{torch.__version__}; {'small networks' if args.quick else 'Stable Diffusion v1'}, {args.dtype}, one image, "
             "without guidance", "", "| height x width | | windows of D | D, s | D, MiB | decoder, s | decoder, MiB |",
             "|---" * 7 + "|"]  # fmt: skip
    with torch.inference_mode():  # warm-up
        D(torch.zeros(1, 4, 64, 64, device=device), 500)
    memory = PeakMemory(device)
    for height, width in tqdm(SIZES, "sizes"):
        x = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0)).to(device)
        for windows in (False, True):
            if windows and (height, width) == (512, 512):
                continue  # one window: the same
            D.tile(64 if windows else None, overlap=0.5, batch=args.batch)
            autoencoder.tile(512 if windows else None)
            count = (height // 256 - 1) * (width // 256 - 1) if windows else ""
            cells = *costs(lambda: D(x, 500), memory, device), *costs(lambda: model.decode(x), memory, device)  # noqa: B023
            lines.append(f"| {height} x {width} | {'windows' if windows else 'all at once'} | {count} | {' | '.join(cells)} |")
            path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def seam(images, borders):
    """Mean step from pixel to pixel across the borders, over that elsewhere; both between blocks of the decoder (4 pixels)."""
    steps = sum(images.diff(dim=d).abs().mean(dim=(0, 1, 5 - d)) for d in (2, 3))[3::4]
    at = torch.zeros(len(steps), dtype=bool)
    at[[b // 4 - 1 for b in borders]] = True
    return (steps[at].mean() / steps[~at].mean()).item()


def figure(args, device):
    """256x256 pixels, of which stripes are missing, in one call; and in numbers, the seams of samples without any constraint."""
    model = load_model("tiny", device=device)
    images = sample_emoji()[0][:16].to(device)
    sheet = images.unflatten(0, (4, 4)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[None]  # [1, 3, 256, 256]
    at = torch.arange(256)
    mask = (((at[:, None] + at) % 64) >= 12).float()[None, None].to(device)
    constraint = latent_inpainting(model, sheet, mask)

    def restored(size):
        D = LatentDenoiser(model, "").tile(size, batch=7)
        *_, state = fast_sampler(D, constraint, constraint.y.shape, [0], device=device)
        return blend(model.decode(state.x_t), sheet, mask, poisson=True)

    def sampled(overlap):
        D = LatentDenoiser(model, args.prompt, guidance=3.0).tile(16, overlap, batch=7)
        return model.decode(sample(D, None, (1, 4, 64, 64), [0], device=device).x_t)

    print(
        f'"{args.prompt}", step at the borders of windows over that elsewhere: {seam(sampled(0.0), (64, 128, 192)):.2f} without '
        f"overlap, {seam(sampled(0.5), range(32, 256, 32)):.2f} with half a window's"
    )
    panels = {"known": sheet * mask, "all at once": restored(None), "windows of 64, overlap 32": restored(16)}
    axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")[1]
    for axis, (title, image) in zip(axes, panels.items(), strict=True):
        axis.axis("off")
        axis.imshow(to_pil(image[0].clamp(-1, 1)))
        axis.set_title(title, fontsize=10)
    path = args.out / "large-tiny.png"
    plt.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(256).save(path)  # a third of the size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights; default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch", type=int, default=4, help="windows per call of the U-Net")
    parser.add_argument("--figure", action="store_true")
    parser.add_argument("--prompt", default="rose", help="of the figure's samples")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    device = resolve_device(args.device)
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    args.out.mkdir(parents=True, exist_ok=True)
    figure(args, device) if args.figure else table(args, device)


if __name__ == "__main__":
    main()
