"""One evaluation of the Stable Diffusion v1 U-Net, forward and with the backward pass to its input, ours next to diffusers':

    python benchmarks/unet.py [--device auto] [--quick]

Both have the same random weights and get the same input; each case runs in a process of its own, which prints its time
(the least of --repeats) and its peak memory above the loaded weights. The cases are run --rounds times in turn. Writes
benchmarks/results/unet-<device>.md. --quick is a small network that shows in seconds that everything works.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from ldm.util import ROOT, instantiate_from_config, load_config, resolve_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def on_meta(quick):
    """The U-Net of Stable Diffusion v1, or a tenth as wide, without memory."""
    config = load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params.unet_config
    if quick:
        config.params.model_channels = 32
    with torch.device("meta"):
        return instantiate_from_config(OmegaConf.to_container(config))


def build(library, dtype, device, quick):
    """The U-Net (x [B, 4, H, W], t [B], context [B, 77, 768]) -> [B, 4, H, W] of `library` with weights from seed 0."""
    ours = on_meta(quick)
    width = ours.model_channels
    ours = ours.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in ours.named_parameters():
        if p.ndim == 1:
            p.fill_(float(name.endswith("weight")))  # norms are the identity, biases zero
        else:
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
    if library == "ours":
        return ours.to(memory_format=torch.channels_last)  # as load_model gives it

    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        theirs = UNet2DConditionModel(block_out_channels=(width, 2 * width, 4 * width, 4 * width), cross_attention_dim=768,
                                      attention_head_dim=8, layers_per_block=2)  # fmt: skip
    state = {f"model.diffusion_model.{k}": v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(state, theirs.config), assign=True)
    theirs = theirs.eval().requires_grad_(False)
    if library == "diffusers, channels-last":
        theirs = theirs.to(memory_format=torch.channels_last)
    return lambda x, t, context: theirs(x.to(dtype), t, context.to(dtype)).sample.to(x.dtype)


class PeakMemory:
    """MiB above what was allocated at the start: on CUDA by torch's allocator, on Linux by the process's resident set."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self.start = self.status("VmRSS")

    def status(self, key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 2**10

    def __call__(self):
        peak = torch.cuda.max_memory_allocated() if self.cuda else self.status("VmHWM")
        return (peak - self.start) / 2**20


def measure(case):
    """One case, in a process of its own: prints seconds, MiB and a checksum of the output."""
    device, dtype = torch.device(case["device"]), DTYPES[case["dtype"]]
    with torch.no_grad():
        unet = build(case["library"], dtype, device, case["quick"])
    if case["compile"]:
        unet = torch.compile(unet)
    draws = torch.Generator().manual_seed(1)
    size, batch = case["size"], case["batch"]
    x = torch.randn(batch, 4, size, size, generator=draws).to(device)
    context = torch.randn(batch, 77, 768, generator=draws).to(device)
    t = torch.full((batch,), 500, device=device)

    def forward():
        with torch.inference_mode():
            return unet(x, t, context)

    def with_backward():
        x_t = x.clone().requires_grad_()
        out = unet(x_t, t, context)
        torch.autograd.grad(out, x_t, out)
        return out.detach()

    run = {"forward": forward, "with backward": with_backward}[case["mode"]]
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if case["compile"]:
        run()  # the compilation's memory is not the network's
    memory = PeakMemory(device)
    out = run()  # also the warm-up
    sync()
    peak = memory()
    seconds = []
    for _ in range(case["repeats"]):
        start = time.perf_counter()
        run()
        sync()
        seconds.append(time.perf_counter() - start)
    print("RESULT", json.dumps({"seconds": min(seconds), "MiB": peak, "checksum": out.float().std().item()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a tenth of the width, 32x32 latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="timed evaluations per process; default 20 on a GPU, 2 on a CPU")
    parser.add_argument("--rounds", type=int, default=2, help="processes per case")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return measure(args.case)

    device = resolve_device(args.device)
    gpu = device.type == "cuda"
    if not gpu and not Path("/proc/self/clear_refs").exists():
        parser.error(f"--device {args.device}: without CUDA, peak memory is measured on Linux only")
    common = {"device": device.type, "quick": args.quick, "batch": args.batch, "size": 32 if args.quick else 64,
              "repeats": args.repeats or (20 if gpu else 2)}  # fmt: skip
    kinds = [("fp32", False), ("bf16", False), ("bf16", True)] if gpu else [("fp32", False)]
    libraries = ("diffusers", "diffusers, channels-last", "ours")
    cases = [(d, c, m, lib) for d, c in kinds for m in ("forward", "with backward") for lib in libraries]
    results = {}
    for case in tqdm(cases * args.rounds, "cases", unit="process"):
        dtype, compiled, mode, library = case
        spec = {**common, "dtype": dtype, "compile": compiled, "mode": mode, "library": library}
        command = [sys.executable, __file__, "--case", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"the case {spec} failed:\n{done.stderr}")
        results.setdefault(case, []).append(json.loads(done.stdout.split("RESULT")[-1]))

    best = {case: {k: min(r[k] for r in runs) for k in ("seconds", "MiB")} for case, runs in results.items()}
    for dtype, _, _, _ in cases:  # the same weights really were loaded
        sums = [r["checksum"] for (d, *_), runs in results.items() if d == dtype for r in runs]
        assert max(sums) - min(sums) < (0.05 if dtype == "bf16" else 1e-3) * max(sums), sums
    table = report(best, kinds, args.quick)
    name = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    import diffusers

    text = (f"`python {' '.join(['benchmarks/unet.py', *sys.argv[1:]])}` on {name}, torch {torch.__version__}, diffusers "
            f"{diffusers.__version__}, batch {args.batch}, latents {common['size']}x{common['size']}, "
            f"{'a U-Net of 32 channels' if args.quick else 'the U-Net of Stable Diffusion v1'}\n\n{table}\n")  # fmt: skip
    print(text)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"unet-{device.type}.md"
        path.write_text(text)
        print("written to", path)


def report(best, kinds, quick):
    rows = ["| weights | pass | library | s | ours / it | MiB above the weights | ours / it |", "|---|---|---|---|---|---|---|"]
    for dtype, compiled in kinds:
        kind = dtype + (", compiled" if compiled else "")
        for mode in ("forward", "with backward"):
            ours = best[dtype, compiled, mode, "ours"]
            for library in ("ours", "diffusers", "diffusers, channels-last"):
                it = best[dtype, compiled, mode, library]
                rows.append(f"| {kind} | {mode} | {library} | {it['seconds']:.3g} | {ours['seconds'] / it['seconds']:.2f} | "
                            f"{it['MiB']:.0f} | {ours['MiB'] / it['MiB']:.2f} |")  # fmt: skip
    for dtype, compiled in kinds:
        forward, backward = (best[dtype, compiled, mode, "ours"] for mode in ("forward", "with backward"))
        weights = sum(p.numel() for p in on_meta(quick).parameters()) * DTYPES[dtype].itemsize / 2**20
        kind = dtype + (", compiled" if compiled else "")
        rows.append(f"\nForward only / with backward ({kind}): time {forward['seconds'] / backward['seconds']:.2f}, memory above "
                    f"the weights {forward['MiB'] / backward['MiB']:.2f}, memory with the weights "
                    f"{(forward['MiB'] + weights) / (backward['MiB'] + weights):.2f}")  # fmt: skip
    return "\n".join(rows)


if __name__ == "__main__":
    main()
