"""Whole constrained runs at the size of Stable Diffusion v1: seconds, memory, and what share of the machine's arithmetic is used.

    python benchmarks/sampling.py [--device auto] [--quick] [--minutes 8] [--only PATTERN] [--steps N]

Random weights do the same work as trained ones. Each group (dtype, eager or compiled, batch, guidance off or on) runs plain
sampling (20 evaluations), the paper's loop (220), the default fast solver, and gradient steps J^T e with as many inner steps as the
paper's loop, each once after a warm-up: the right half of a 512x512 image is missing. Guidance on doubles the network's batch.
The groups go by importance; a run that would not end within --minutes is left out, and said to be. Writes
results/sampling-<device>.csv and .md. What the compiler made is kept by PyTorch, so that a second call gets further.

--quick: a U-Net and an autoencoder of a tenth and a quarter of the width, 128x128, 5 steps, in less than 3 minutes on a CPU.
--only: groups whose name ("bf16, compiled, batch 1, guidance off") matches this regular expression.
--profile: instead of runs, what one evaluation's time is spent on, into results/profile-<device>.md.
--steps: so many diffusion steps instead of 20 (24 for the fast solver, which gets 1.2 times as many).
"""

import argparse
import csv
import ctypes
import gc
import platform
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ldm.baselines import gradient_steps
from ldm.constraints import latent_inpainting
from ldm.denoisers import LatentDenoiser
from ldm.fast_sampler import fast_sampler
from ldm.inpainting import make_mask
from ldm.newton_sampler import newton_sampler
from ldm.util import ROOT, instantiate_from_config, load_config, resolve_device

COMPILATION = 120  # seconds, about, that a group's compilation needs: it is not begun later
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("plain", "newton", "fast", "gradient")


class Group(NamedTuple):
    dtype: str
    compiled: bool
    batch: int
    guided: bool

    def __str__(self):
        return (f"{self.dtype}, {'compiled' if self.compiled else 'eager'}, batch {self.batch}, "
                f"guidance {'on' if self.guided else 'off'}")  # fmt: skip


GROUPS = [  # the most important first
    Group(dtype, compiled, batch, guided)
    for dtype, compiled, batch in (("bf16", False, 1), ("bf16", True, 1), ("fp32", False, 1), ("bf16", False, 4), ("bf16", True, 4),
                                   ("fp32", False, 4), ("fp32", True, 1), ("fp32", True, 4))
    for guided in (False, True)
]  # fmt: skip


def build(device, quick=False):
    """Stable Diffusion v1 as its config has it."""
    config = OmegaConf.to_container(load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml").model)
    if quick:
        config["params"]["unet_config"]["params"]["model_channels"] = 32
        config["params"]["first_stage_config"]["params"]["ddconfig"]["ch"] = 32
        config["params"]["cond_stage_config"]["params"] = {"text_config": {"num_hidden_layers": 1}}
    with torch.device(device):
        return instantiate_from_config(config).eval().requires_grad_(False)


def random_model(dtype, device, quick=False):
    """The same with weights from seed 0, none of them zero."""
    model, generator = build(device, quick), torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:  # norms are the identity and biases small already
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
    return model.to(device=device, dtype=dtype, memory_format=torch.channels_last)


def now(device):
    """Seconds, after all work is done: of the clock, but of a CPU's single thread its own, other programs not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


class PeakMemory:
    """MiB since the beginning: on CUDA what torch reserved, CUDA graphs' own pools included; on Linux the resident set."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        gc.collect()
        self.restart()
        self.start = torch.cuda.memory_reserved() if self.cuda else self._status("VmRSS")

    def restart(self):
        """The peak starts anew, above what there was at the beginning."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what is free, so that using it again counts
            Path("/proc/self/clear_refs").write_text("5")

    def _status(self, key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 2**10

    def __call__(self):
        return ((torch.cuda.max_memory_reserved() if self.cuda else self._status("VmHWM")) - self.start) / 2**20


def matrix_rate(device):
    """FLOP / s of one large bfloat16 matrix product: the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(10):
        start = now(device)
        a @ b
        seconds.append(now(device) - start)
    return 2 * n**3 / min(seconds)


def network_flop(quick, size):
    """FLOP of the U-Net for one sample: (forward, forward and backward to its input), counted without computing."""
    unet = build("meta", quick).network
    x = torch.empty(1, 4, size, size, device="meta", requires_grad=True)
    t, context = torch.empty(1, device="meta"), torch.empty(1, 77, 768, device="meta")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        unet(x, t, context)
    with FlopCounterMode(display=False) as both:
        unet(x, t, context).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


class Problem:
    """The right half of a random image is missing: denoiser, constraint and the four samplers."""

    def __init__(self, model, group, pixels, device, steps):
        self.model, self.group, self.device, self.steps = model, group, device, steps
        generator = torch.Generator().manual_seed(1)
        self.image = torch.rand(group.batch, 3, pixels, pixels, generator=generator).to(device) * 2 - 1
        self.mask = make_mask("right", (pixels, pixels)).to(device)
        self.shape = (group.batch, 4, pixels // 8, pixels // 8)

    def prepare(self, method):
        """(D, constraint): the text and the image are encoded."""
        on = self.group.guided
        D = LatentDenoiser(self.model, "a photograph of a lake" if on else "", guidance=3.0 if on else 1.0)
        if self.group.compiled:
            D.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        return D, None if method == "plain" else latent_inpainting(self.model, self.image, self.mask)

    def states(self, method, D, constraint):
        steps = {} if self.steps is None else {"steps": max(3, round(1.2 * self.steps)) if method == "fast" else self.steps}
        sampler = {"plain": newton_sampler, "newton": newton_sampler, "fast": fast_sampler, "gradient": gradient_steps}[method]
        return sampler(D, constraint, self.shape, range(self.group.batch), **steps)


def measure(problem, method, flop, rate, memory, deadline):
    """What one row says of a run, or None where the run would end after the deadline."""
    group, device = problem.group, problem.device
    D, constraint = problem.prepare(method)
    states = problem.states(method, D, constraint)
    if group.compiled:
        next(states)  # the compiler's memory is not the network's
    memory.restart()
    for _ in zip(range(2 if group.compiled else 1), states):  # noqa: B905
        pass  # one diffusion step needs the memory of all; with CUDA graphs, one to warm up and one to record
    start, peak = now(device), memory()
    with torch.inference_mode():
        D(torch.zeros(problem.shape, device=device), 500)
    steps = problem.steps or 20
    evaluations = {"plain": 1, "newton": 11, "fast": 2.2, "gradient": 18}[method] * steps  # about, a backward pass as one or two
    if now(device) + evaluations * (now(device) - start) > deadline:
        return None

    start = now(device)
    D, constraint = problem.prepare(method)
    begun = now(device)
    for state in problem.states(method, D, constraint):  # noqa: B007
        pass
    ended = now(device)
    with torch.inference_mode():
        problem.model.decode(state.x_t)
    seconds, whole = (ended - begun) / group.batch, (now(device) - start) / group.batch
    weights = sum(p.numel() * p.itemsize for p in problem.model.parameters()) / 2**20
    backward = 5 * steps if method == "gradient" else 0
    work = ((state.nfe - backward) * flop[0] + backward * flop[1]) * (2 if group.guided else 1)
    return {"NFE": state.nfe, "backward": backward, "s / image": seconds, "end to end": whole,
            "passes / s": (state.nfe + backward) / seconds, "MiB": peak, "GiB": (peak + weights) / 2**10,
            "of bf16 rate": work / seconds / rate}  # fmt: skip


def add_ratios(rows):
    """To plain sampling and to the gradient method of the same group, where they were measured."""
    for row in rows:
        for other, keys in {"plain": ("s / image", "GiB"), "gradient": ("s / image", "MiB", "GiB")}.items():
            for key in keys:
                value = next((row[key] / r[key] for r in rows if r["method"] == other), "")
                row[f"{key.removesuffix(' / image')} / {other}"] = value


def write(path, head, rows, left_out):
    """The table as .csv and as .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in row.values())} |")
    missing = f"Left out, for want of time: {'; '.join(left_out)}.\n\n" if left_out else ""
    path.with_suffix(".md").write_text(f"{head}\n\n{LEGEND}\n\n{missing}" + "\n".join(lines) + "\n")


LEGEND = """NFE: evaluations of the denoiser per image. s / image: sampling alone; end to end: with the encoding of text and known
image, and the decoding. passes / s: forward and backward passes of one image. MiB: sampling's peak memory above the weights; GiB:
with the weights of U-Net, autoencoder and text encoder. of bf16 rate: the U-Net's floating-point operations per second over those
of one large bfloat16 matrix product in the same run. The last columns are ratios to plain sampling and to the gradient method."""


PARTS = {  # what could be computed once per step or once per run, by the names of the U-Net's modules
    "time embedding": r"time_embed|.*emb_layers", "keys and values of the text": r".*attn2\.to_[kv]",
}  # fmt: skip


def profile(device, quick):
    """Lines of a table: what one evaluation, batch 1, spends its time on."""
    lines = ["| dtype | s | " + " | ".join([*PARTS, *OPERATIONS]) + " |", "|---" * (2 + len(PARTS) + len(OPERATIONS)) + "|"]
    for name, dtype in DTYPES.items():
        model = random_model(dtype, device, quick)
        D, x = LatentDenoiser(model, ""), torch.zeros(1, 4, *[16 if quick else 64] * 2, device=device)
        with torch.inference_mode():
            D(x, 500)
            start = now(device)
            D(x, 500)
            seconds = now(device) - start
            for part, pattern in PARTS.items():
                for path, module in model.unet.named_modules():
                    if re.fullmatch(pattern, path):
                        module.forward = record_function(part)(module.forward)
            with torch.profiler.profile() as profiler:
                D(x, 500)
        events = {e.key: (e.device_time_total or e.cpu_time_total) for e in profiler.key_averages()}
        kernels = {e.key: (e.self_device_time_total or e.self_cpu_time_total) for e in profiler.key_averages()}
        shares = [events[key] for key in [*PARTS, *OPERATIONS.values()]]
        lines.append(f"| {name} | {seconds:.3g} | " + " | ".join(f"{v / sum(kernels.values()):.2%}" for v in shares) + " |")
        del model, D
    return lines


OPERATIONS = {"convolutions": "aten::conv2d", "linear layers": "aten::linear", "attention": "aten::scaled_dot_product_attention"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small networks, 128x128")
    parser.add_argument("--minutes", type=float, help="time for all runs; default 8, with --quick 2.5")
    parser.add_argument("--only", default="", help="groups whose name matches this")
    parser.add_argument("--profile", action="store_true", help="of one evaluation")
    parser.add_argument("--steps", type=int, help="diffusion steps; default 20, with --quick 5")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    device = resolve_device(args.device)
    if device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        parser.error(f"--device {args.device}: without CUDA, peak memory is measured on Linux only")
    began = now(device)
    name = f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    where = f"`python {' '.join(['benchmarks/sampling.py', *sys.argv[1:]])}` on {name}, torch {torch.__version__}"
    if args.profile:
        path = args.out / f"profile-{device.type}{'-quick' if args.quick else ''}.md"
        path.write_text("\n".join([f"{where}; shares of one evaluation's time", "", *profile(device, args.quick)]) + "\n")
        return print(path.read_text())
    deadline = began + 60 * (args.minutes or (2.5 if args.quick else 8))
    pixels = 128 if args.quick else 512
    args.steps = args.steps or (5 if args.quick else None)
    flop, rate = network_flop(args.quick, pixels // 8), matrix_rate(device)
    torch._dynamo.config.recompile_limit = 32  # shapes and grad modes of all groups are specialised

    size = f"{'small networks' if args.quick else 'Stable Diffusion v1'}, {pixels}x{pixels}"
    head = (f"{where}; one bfloat16 matrix product: {rate / 1e12:.3g} TFLOP/s; {size}, {flop[0] / 1e9:.4g} GFLOP per evaluation, "
            f"{flop[1] / 1e9:.4g} with the backward pass")  # fmt: skip
    path = args.out / f"sampling-{device.type}{'-quick' if args.quick else ''}"

    rows, left_out, problem, model, loaded = [], [], None, None, None
    groups = [g for g in GROUPS if re.search(args.only, str(g))]
    if args.quick:  # compilation takes longer than all the rest
        groups.sort(key=lambda g: g.compiled)
    for group in tqdm(groups, "groups"):
        if now(device) + group.compiled * COMPILATION > deadline:
            left_out.append(str(group))
            continue
        if loaded != group.dtype:
            problem = model = None  # before the next one
            model, loaded = random_model(DTYPES[group.dtype], device, args.quick), group.dtype
        torch.compiler.reset()  # graphs of other shapes keep their memory
        memory, problem, own = PeakMemory(device), Problem(model, group, pixels, device, args.steps), []
        for method in KINDS:
            row = measure(problem, method, flop, rate, memory, deadline)
            if row is None:
                left_out.append(f"{group}, {method}")
            else:
                own.append({**group._asdict(), "method": method} | row)
        add_ratios(own)
        rows += own
        if rows:
            write(path, head, rows, left_out)  # after each group, in case of an interruption
    if not rows:
        parser.error(f"--minutes {args.minutes}, --only {args.only!r}: no run fits")
    write(path, head, rows, left_out)
    print(path.with_suffix(".md").read_text())
    print(f"{now(device) - began:.0f} s; written to {path}.md and .csv")


if __name__ == "__main__":
    main()
