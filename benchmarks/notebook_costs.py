"""What the notebooks take with a model as large as Stable Diffusion v1: work, memory, and whether they reach their end.

    python benchmarks/notebook_costs.py                 writes results/notebooks.csv, prints the table of benchmarks/README.md
    python benchmarks/notebook_costs.py --run [NAME ...] [--size 256] [--device cuda]
                                                        two diffusion steps; adds rows to results/notebooks-run.csv

The first runs every cell of a notebook with its defaults, but with stand-ins for U-Net, encoder and decoder that cost nothing, and
counts what goes through them. These counts times the FLOP of one sample at 512x512, over an assumed speed, are the seconds. The
memory is `ldm.memory.expected_peak` of the largest batch that was seen. Both are estimates: CLIP's arithmetic and what a GPU takes
for itself are left out. The second runs them at full width with random weights, each in a process of its own, whose memory and
seconds are measured: on a CPU the resident memory and the processor's time, on a GPU what torch reserved there and the clock.
"""

import argparse
import csv
import dataclasses
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import nbformat
import open_clip
import torch
import yaml
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders import vae
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from omegaconf import OmegaConf
from torch.nn.functional import avg_pool2d, interpolate
from torch.utils.flop_counter import FlopCounterMode

from ldm import inpainting, profiles
from ldm.memory import expected_peak
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import ROOT, atomic_write, instantiate_from_config, load_config

RESULTS = ROOT / "benchmarks/results"
NOTEBOOKS = {name: ROOT / folder / f"{name}.ipynb" for folder, names in {
    "stable-diffusion": ("inpaint", "superres", "superres_vae_newton", "style", "jacobian_analysis", "jacobian_exact_vs_gd"),
    "notebooks": ("diffusers_inpaint",)}.items() for name in names}  # fmt: skip
EXPORTED = ("diffusers_inpaint",)  # which take a folder of diffusers
TWO_STEPS = dict.fromkeys(NOTEBOOKS, dict(prompts="a lake", steps=2, newton_steps=1)) | {  # of --run
    "jacobian_analysis": dict(prompts="a lake", steps=2, newton_steps=1, times=[700], krylov=2, factors=[1.5]),
    "jacobian_exact_vs_gd": dict(prompt="a lake", seeds=[0, 1], times=None),
}
FULL, SMALL = dict(model_channels=320, ch=128, layers=12), dict(model_channels=32, ch=32, layers=1)
CLASSES = {UNetModel: "U-Net", UNet2DConditionModel: "U-Net", Encoder: "encoder", Decoder: "decoder", vae.Encoder: "encoder",
           vae.Decoder: "decoder"}  # fmt: skip
CHEAP = {UNetModel: lambda x: x / 2, UNet2DConditionModel: lambda x: UNet2DConditionOutput(x / 2)}
CHEAP |= dict.fromkeys((Encoder, vae.Encoder), lambda x: avg_pool2d(torch.cat([x, x, x[:, :2]], 1), 8))
CHEAP |= dict.fromkeys((Decoder, vae.Decoder), lambda z: interpolate(z[:, :3], scale_factor=8))
SPEED = 20  # TFLOP/s, an assumption: in float32 without TF32, of a card of 24 GB


# ---- models of random weights


def config_of(name, size, model_channels, ch, layers):
    """Stable Diffusion v1's config for a notebook. Where the model is exported to diffusers, the text encoder is OpenCLIP's, of the
    same size: only such models can be."""
    config = OmegaConf.to_container(load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml"))
    params = config["model"]["params"]
    params["image_size"] = params["unet_config"]["params"]["image_size"] = size // 8
    params["unet_config"]["params"]["model_channels"] = model_channels
    params["first_stage_config"]["params"]["ddconfig"] |= dict(ch=ch, resolution=size)
    params["cond_stage_config"]["params"] = {"text_config": {"num_hidden_layers": layers}}
    if name in EXPORTED:
        text = dict(arch="ViT-L-14", text_config=dict(layers=layers))
        params["cond_stage_config"] = dict(target="ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", params=text)
    return config


def without_data(name, size=512, **scale):
    with torch.device("meta"):
        return instantiate_from_config(config_of(name, size, **scale)["model"])


def clip_without_data():
    """The image encoder of CLIP ViT-B/16, by the names of the whole."""
    config = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        clip = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=True)
    return torch.nn.ModuleDict({"visual": clip.visual})


def parts_of(model):
    return {"U-Net": model.unet, "encoder": model.first_stage_model.encoder, "decoder": model.first_stage_model.decoder}


def checkpoint(name, folder, size, **scale):
    """What a notebook has to be given for a model of random weights, and `clip`, the path of such a CLIP. Those that are in the
    folder already are not written again."""
    from ldm.export_diffusers import export  # takes seconds to import
    from ldm.weights import save_weights

    folder = Path(folder) / (name if name in EXPORTED else "v1")
    folder.mkdir(parents=True, exist_ok=True)
    path, config_path, clip_path = (folder / file for file in ("model.safetensors", "model.yaml", "clip.safetensors"))
    if not path.is_file():
        config_path.write_text(yaml.safe_dump(config_of(name, size, **scale)))
        save_weights(random(without_data(name, size, **scale)), path, torch.float16)
        if name in EXPORTED:
            export(path, folder, config_path)
    given = dict(model_name=str(folder if name in EXPORTED else path))
    if name not in EXPORTED and (size, scale) != (512, FULL):
        given["config"] = str(config_path)
    if scale == SMALL:
        return given | dict(clip="tiny-clip")
    if not clip_path.is_file():
        save_weights(random(clip_without_data()), clip_path, torch.float32)
    return given | dict(clip=str(clip_path))


def filled(model, fill=torch.empty):
    """A module on the device "meta" with parameters fill(shape) on the CPU; those of one dimension: norms are the identity."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            plain = torch.ones if name == "weight" else torch.zeros
            setattr(module, name, torch.nn.Parameter((fill if p.ndim > 1 else plain)(p.shape), requires_grad=False))
    return model.eval()


def random(model):
    """The same with weights from seed 0 that keep activations of order 1."""
    generator = torch.Generator().manual_seed(0)
    return filled(model, lambda shape: torch.empty(shape).normal_(0, shape[1:].numel() ** -0.5, generator=generator))


# ---- running a notebook's cells


def run_cells(path, **parameters):
    """The cells of a notebook in this process, as if its cell of parameters had these. Returns the namespace."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    namespace = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, namespace)  # noqa: S102
            if "parameters" in cell.metadata.get("tags", []):
                assert set(parameters) <= set(namespace), f"no parameters: {set(parameters) - set(namespace)}"
                namespace |= parameters
    return namespace


@contextmanager
def counting(parts, cheap):
    """(samples that went through each part, most at a time), by (part, whether with a graph for a backward pass). Shipped models
    that a notebook looks at as well have other numbers of tensors than `parts`, and do not count.

    cheap: instead of computing, each part gives a simple function of its input, of the right shape."""
    layers = {name: sum(1 for _ in part.parameters()) for name, part in parts.items()}
    total, most, forwards = Counter(), Counter(), {cls: cls.forward for cls in CLASSES}

    def counted(cls, part):
        def forward(self, x, *args, **kwargs):
            if sum(1 for _ in self.parameters()) != layers[part]:
                return forwards[cls](self, x, *args, **kwargs)
            key = part, bool(torch.is_grad_enabled() and x.requires_grad)
            total[key] += len(x)
            most[key] = max(most[key], len(x))
            return CHEAP[cls](x) if cheap else forwards[cls](self, x, *args, **kwargs)

        return forward

    try:
        for cls, part in CLASSES.items():
            cls.forward = counted(cls, part)
        yield total, most
    finally:
        for cls, forward in forwards.items():
            cls.forward = forward


def run(name, given, folder, cheap, size=512, device="cpu", **scale):
    """(number of samples, what `counting` gives) of a run to its end on a model that `checkpoint` wrote."""
    cwd, given = Path.cwd(), dict(given)
    profiles.KINDS["sd-v1"] = dataclasses.replace(profiles.KINDS["sd-v1"], clip=given.pop("clip"))
    os.chdir(NOTEBOOKS[name].parent)
    try:
        with counting(parts_of(without_data(name, size, **scale)), cheap) as counts:
            names = run_cells(NOTEBOOKS[name], **given, device=device, out=f"{folder}/out")
    finally:
        os.chdir(cwd)
    if not Path(folder, "out/summary.txt").is_file() or not any(Path(folder, "out").rglob("*.png")):
        raise RuntimeError(f"{name} has not written its summary and images")
    seeds = names["p"].seeds if "p" in names else names.get("noise_seeds", names.get("own"))
    return len(seeds), *counts


# ---- the estimate


def counted(name):
    """What `run` gives for the defaults, without the networks' work and the filling of seams."""
    inpainting.harmonic_fill = lambda values, *_, **__: values
    with tempfile.TemporaryDirectory() as folder:
        return run(name, checkpoint(name, folder, 512, **SMALL), folder, True, **SMALL)


def flop():
    """{(part, with a graph): FLOP of one sample at 512x512}, with the backward pass to the input where there is a graph."""
    parts, found = parts_of(without_data("inpaint", **FULL).eval().requires_grad_(False)), {}
    with torch.device("meta"):
        inputs = {"U-Net": (torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)),
                  "encoder": (torch.empty(1, 3, 512, 512),), "decoder": (torch.empty(1, 4, 64, 64),)}  # fmt: skip
    for part, (x, *others) in inputs.items():
        for graph in (False, True):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(graph):
                out = parts[part](x.requires_grad_(graph), *others)
                if graph:
                    out.sum().backward()
            found[part, graph] = counter.get_total_flops()
    return found


def gibibytes(name, most, size=512, dtype=torch.float32):
    """`expected_peak` of a run: the weights, CLIP's too, and the hungriest of what goes through the parts at a time."""
    from ldm.denoisers import LatentDenoiser

    model = filled(without_data("inpaint", size, **FULL), lambda shape: torch.empty(shape, dtype=dtype)).to(dtype)  # any values
    D, context = LatentDenoiser(model, ""), torch.zeros(1, 77, 768)
    parts = {"U-Net": lambda x: model.network(x, torch.zeros(len(x)), context.expand(len(x), -1, -1)),
             "encoder": model.encode, "decoder": model.decode}  # fmt: skip

    def each(_):
        for (part, graph), n in most.items():
            x = torch.zeros((n, 3, size, size) if part == "encoder" else (n, 4, size // 8, size // 8), requires_grad=graph)
            with torch.set_grad_enabled(graph):
                out = parts[part](x)
                if graph:
                    out.sum().backward()
            del out, x

    clip = clip_without_data() if "load_clip_vision" in NOTEBOOKS[name].read_text() else torch.nn.Identity()
    return sum(p.nbytes for p in clip.parameters()) / 2**30 + expected_peak(D, each, (1, 4, size // 8, size // 8), model)


def estimate(name, work):
    """A row of results/notebooks.csv."""
    samples, total, most = counted(name)
    return {"notebook": name, "samples": samples, "evaluations": total["U-Net", False], "with backward": total["U-Net", True],
            "decodings": total["decoder", False], "with backward, of the decoder": total["decoder", True],
            "encodings": total["encoder", False] + total["encoder", True],
            "TFLOP": round(sum(n * work[key] for key, n in total.items()) / 1e12),
            "GiB": f"{gibibytes(name, most):.1f}"}  # fmt: skip


def table(rows):
    """The rows of results/notebooks.csv as Markdown."""
    columns = ["notebook", "samples", "U-Net: evaluations", "with a backward pass", "decoder: images", "with a backward pass",
               "encoder: images", "TFLOP", f"seconds at {SPEED} TFLOP/s", "GiB"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * 9 + "|"]
    for row in rows:
        *counts, tera, memory = row.values()
        lines.append(f"| {' | '.join(map(str, counts))} | {tera} | {int(tera) / SPEED:.0f} | {memory} |")
    return "\n".join(lines)


# ---- the run at full width


def measure(name, given, folder, size, dtype, device):
    """A row of results/notebooks-run.csv; in a process that has done nothing else."""
    cuda = device != "cpu"
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    samples, total, most = run(name, given | {"dtype": dtype}, folder, False, size, device, **FULL)
    seconds = clock() - start
    peak = torch.cuda.max_memory_reserved() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"notebook": name, "device": torch.cuda.get_device_name() if cuda else "CPU", "size": size, "dtype": dtype,
            "samples": samples, "evaluations": total["U-Net", False], "with backward": total["U-Net", True],
            "seconds": round(seconds), "GiB": f"{peak:.1f}",
            "expected GiB": f"{gibibytes(name, most, size, getattr(torch, dtype)):.1f}"}  # fmt: skip


def measured(name, models, size=512, dtype="float32", device="cpu"):
    """`measure` of the shortest run, TWO_STEPS. models: the folder of checkpoints."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool, tempfile.TemporaryDirectory() as folder:
        given = pool.apply(checkpoint, (name, models, size), FULL) | TWO_STEPS[name]
        given |= dict(mode="difference") if device == "cpu" else {}  # forward mode is slow on a CPU
        return pool.apply(measure, (name, given, folder, size, dtype, device))


def read(path):
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NOTEBOOKS)}; default: all")
    parser.add_argument("--run", action="store_true", help="at full width, with two diffusion steps")
    parser.add_argument("--size", type=int, default=512, help="of --run: side of the images in pixels, 256 or 512")
    parser.add_argument("--dtype", default="float32", help="of --run: of the weights")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of --run")
    parser.add_argument("--models", help="of --run: the folder to keep the random checkpoints in, one for each size")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NOTEBOOKS):
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(NOTEBOOKS)}")
    path = RESULTS / ("notebooks-run.csv" if args.run else "notebooks.csv")
    work = None if args.run else flop()
    with tempfile.TemporaryDirectory() as models:
        for name in args.names or NOTEBOOKS:
            row = measured(name, args.models or models, args.size, args.dtype, args.device) if args.run else estimate(name, work)
            print(row, file=sys.stderr, flush=True)
            key = [column for column in ("notebook", "device", "size", "dtype") if column in row]
            others = [other for other in read(path) if any(other[column] != str(row[column]) for column in key)]
            write(path, sorted([*others, row], key=lambda row: [*NOTEBOOKS].index(row["notebook"])))
    if not args.run:
        print(table(read(path)))


if __name__ == "__main__":
    main()
