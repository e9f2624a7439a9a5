"""What the notebooks under stable-diffusion/ do, measured on more images than they show:

    python benchmarks/tasks.py [--tasks inpainting flow superres style] [--images 64] [--out benchmarks/results]

inpainting  the right half of held-out images is missing, seeds 0 to 3 in turn; the paper's loop with the constraint on latents
            and on decoded pixels, the fast solver in VAE space (no backward pass), and the projection without Jacobian
            (x0 + A^T r) at as many evaluations as the loop
flow        the same with the rectified flow, `--flow`
superres    four-fold, on a quarter as many images: the decoder's gradient and the encoder's difference, next to bicubic
style       32 training captions, each with a held-out image as reference, with the notebook's settings, guided and unguided; CLIP
            and the judge, which had no part in it, rank the caption among all names

Needs the captioned images (make data-emoji) and, for LPIPS, AlexNet's weights (make data-lpips). Writes tasks.json, after each
method what is there so far: each takes minutes.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny import Clip, Judge, in_batches, share
from torch.nn.functional import interpolate
from tqdm import tqdm

from ldm.checkpoints import load_model
from ldm.clip import load_clip_vision
from ldm.comparison import step_memory
from ldm.constraints import DecodedConstraint, EncoderConstraint, LossConstraint, latent_inpainting
from ldm.data.emoji import FIRST_STYLES, Emoji
from ldm.denoisers import LatentDenoiser
from ldm.fast_sampler import fast_sampler
from ldm.guidance import gram_distance
from ldm.images import from_uint8
from ldm.inpainting import blend, make_mask, reencode
from ldm.metrics import lpips_distance, lpips_weights, psnr, ssim
from ldm.newton_sampler import newton_sampler
from ldm.operators import Mask, downsample
from ldm.profiles import profile
from ldm.sampling import State, seeded_noise
from ldm.util import resolve_device


def first_of_each(dataset):
    """One image number for each (name, style), without skin tones."""
    seen = {}
    for i, key in enumerate(zip(dataset.names, dataset.styles.tolist(), strict=True)):
        seen.setdefault(key, i)
    return list(seen.values())


def run(D, constraint, shape, seeds, device, sampler=newton_sampler, **settings):
    """The last state of the sampler, with a progress bar, and the seconds it took."""
    start, steps = time.perf_counter(), settings.get("steps", 20)
    for state in tqdm(sampler(D, constraint, shape, seeds, device=device, **settings), total=steps, leave=False):  # noqa: B007
        pass
    return state, time.perf_counter() - start


def projection(D, constraint, shape, seeds, device, steps):
    """Without Jacobian (MPGD, DDNM): x0 <- x0 + A^T (y - A x0), then the DDIM step."""
    noise, start = seeded_noise(shape, seeds, device), time.perf_counter()
    x, levels = noise(), D.schedule.levels(steps)
    with torch.inference_mode():
        for now, to in tqdm(list(pairwise(levels)), leave=False):
            x0 = D(x, now.t)
            x0 = x0 + constraint(x0)[0]
            x = D.schedule.step(x, x0, now, to)
    return State(steps, now.t, x, x0, constraint(x0)[1], steps), time.perf_counter() - start


def mean(x):
    return round(x.mean().item(), 4)


def perceptual(x, truth):
    return {"lpips_alex": mean(lpips_distance(x, truth))} if lpips_weights() else {}


def inpainting(model, images, device):
    """Yields its table after each method, as the next two do."""
    mask, seeds = make_mask("right", images.shape[2:]).to(device), [i % 4 for i in range(len(images))]
    latents, A, D = latent_inpainting(model, images, mask), Mask(mask), LatentDenoiser(model, "")
    shape, known = latents.y.shape, slice(0, images.shape[3] // 2)
    pixels, vae = DecodedConstraint(model.decode, A, A(images)), EncoderConstraint(model.decode, model.encode, A, A(images))
    runs = {"fast solver in VAE space": lambda: run(D, vae, shape, seeds, device, fast_sampler, steps=24),
            "paper's loop": lambda: run(D, latents, shape, seeds, device),
            "projection without J": lambda: projection(D, latents, shape, seeds, device, steps=220),
            "paper's loop on decoded pixels": lambda: run(D, pixels, shape, seeds, device)}  # fmt: skip
    with torch.inference_mode():
        own = model.decode(model.encode(images))
    out = {"images": len(images), "autoencoder_known_psnr": mean(psnr(own[..., known], images[..., known]))}
    for name, finish in runs.items():
        state, seconds = finish()
        with torch.inference_mode():
            z = state.x_t
            x, again = model.decode(z), model.decode(reencode(model, z, images, mask))
            final = blend(again.clamp(-1, 1), images, mask)
        out[name] = {"nfe": state.nfe, "residual_on_latents": mean(latents(z)[1]), "seconds": round(seconds, 1),
                     "known_psnr_before_blending": mean(psnr(x[..., known], images[..., known])),
                     "known_psnr_reencoded": mean(psnr(again[..., known], images[..., known])),
                     "known_pixels_bit_equal": torch.equal(final[..., known], images[..., known]),
                     "psnr": mean(psnr(final, images)), **perceptual(final, images)}  # fmt: skip
        yield out


def superres(model, images, device, factor=4):
    side, seeds = images.shape[3], [i % 4 for i in range(len(images))]
    A, D = downsample((side, side), factor), LatentDenoiser(model, "")
    y, shape = A(images), model.encode(images[:1]).shape[1:]
    bicubic = interpolate(y, (side, side), mode="bicubic", align_corners=False).clamp(-1, 1)
    measures = lambda x: {"consistency_psnr": mean(psnr(A(x), y)), "psnr": mean(psnr(x, images)), "ssim": mean(ssim(x, images)),  # noqa: E731
                          **perceptual(x, images)}  # fmt: skip
    out = {"images": len(images), "factor": factor, "bicubic": measures(bicubic)}
    constraints = {"decoder's gradient": lambda part: DecodedConstraint(model.decode, A, y[part]),
                   "encoder's difference": lambda part: EncoderConstraint(model.decode, model.encode, A, y[part])}  # fmt: skip
    for name, of in constraints.items():
        constraint = of(slice(None))
        state, seconds = run(D, constraint, (len(images), *shape), seeds, device, newton_steps=10, lr=0.1)
        with torch.inference_mode():
            x = model.decode(state.x_t).clamp(-1, 1)
        task = SimpleNamespace(images=images, constraint=of, D=D, shape=shape)
        memory = step_memory(task, newton_sampler, dict(newton_steps=1, lr=0.1), device)
        out[name] = {"nfe": state.nfe, "decoder_backward_passes": constraint.backward_passes, "seconds": round(seconds, 1),
                     "memory_of_a_step_mib_per_image": memory and round(memory, 2), **measures(x)}  # fmt: skip
        yield out


def style(model, images, captions, names, device):
    """captions: one for each reference image; names: the captions that are ranked; settings: the notebook's."""
    clip, judge = Clip(device), Judge(device)
    p = profile(model, "style", captions, range(len(captions)))
    D, shape = LatentDenoiser(model, captions, p.guidance), (len(captions), model.channels, model.image_size, model.image_size)
    loss = gram_distance(load_clip_vision(device=device), model.decode, images)
    free = list(tqdm(newton_sampler(D, None, shape, p.seeds, p.steps, device=device), total=p.steps, leave=False))
    with torch.inference_mode():
        before = loss(free[-1].x_t)
    first, constraint = round(p.free * p.steps), LossConstraint(loss, until=p.enough * before)
    start = free[first - 1] if first else None
    guided, seconds = run(D, constraint, shape, p.seeds, device, start=start, **p.sampler)
    out = {"captions": len(captions), "lr": p.lr, "free": p.free, "enough": p.enough, "nfe": first + guided.nfe,
           "decoder_backward_passes": constraint.backward_passes, "seconds": round(seconds, 1)}  # fmt: skip
    with torch.inference_mode():
        after = loss(guided.x_t)
        out["gram_distance"] = {"unguided": mean(before), "guided": mean(after), "falls_by": mean(1 - after / before)}
        for name, z in {"unguided": free[-1].x_t, "guided": guided.x_t}.items():
            x = in_batches(model.decode, z, device).clamp(-1, 1)
            ranks = clip.ranks(clip.features(x), captions, names)
            out[f"caption_in_top_10_percent_{name}"] = share(ranks < 0.1 * len(names))
            out[f"judge_in_top_10_percent_{name}"] = share(judge.right(x, captions, len(names) // 10))
    yield out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=["inpainting", "flow", "superres", "style"])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--flow", default="tiny-flow")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--data", default="data", help="folder of emoji/emoji.npz")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    device = resolve_device(args.device)
    model = load_model(args.model, device=device)
    held_out, train = (Emoji(args.data, train=part, styles=FIRST_STYLES) for part in (False, True))
    order = torch.randperm(len(first_of_each(held_out)), generator=torch.Generator().manual_seed(0))
    images = from_uint8(held_out.images[torch.tensor(first_of_each(held_out))[order]]).to(device)
    names = list(dict.fromkeys(train.names))
    captions = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(1))[: args.images // 2]]
    path = args.out / "tasks.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    tasks = {"inpainting": lambda: inpainting(model, images[: args.images], device),
             "flow": lambda: inpainting(load_model(args.flow, device=device), images[: args.images], device),
             "superres": lambda: superres(model, images[: args.images // 4], device),
             "style": lambda: style(model, images[: args.images // 2], captions, names, device)}  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        for table in tasks[task]():  # it grows
            results[task] = table
            print(task, json.dumps(table, indent=2), flush=True)
            path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
