"""Measure a method of constrained sampling on a folder of pictures, on one or more devices (Lightning):

    python -m ldm.evaluate data=/folder [model=sd-v1-4.ckpt] [task=half] [method=newton] [key=value ...]

    data         folder of pictures of any size; their middle square, reduced or enlarged to what the model takes, is the truth
    model        tiny          a shipped model or the path of a .ckpt or .safetensors file; config, prediction: as of `load_model`
    task         half          half, hole, strokes, sparse, sr4, sr8 ..., blur: see ldm/comparison.py
    method       newton        newton, fast, DPS ...: METHODS in ldm/comparison.py
    budget       220           network evaluations, a backward pass counted as one more; 220 with newton are the paper's settings
    prompt       ""            of all pictures, with guidance=1
    limit                      the first so many pictures by name
    batch        4             pictures at a time; blocks of so many go to the devices in turn, so that no result depends on these
    devices      1             how many, or "auto": all; accelerator=auto, nodes=1, precision=32 (16, bf16: the weights')
    out          outputs/evaluate

Picture i, by name, has the seed i. Every block's measures and pictures are written to OUT/MODEL-TASK-METHOD-BUDGET/ as soon as they
are there; the same command after an interruption goes on. At last one row is added to OUT/evaluate.csv, with the columns of
benchmarks/compare.py, and OUT/evaluate.md shows all rows. To measure a row anew, delete its line and its folder. KID is measured in
AlexNet's last convolution, to the folder's own pictures; LPIPS and KID need AlexNet's weights (make data-lpips) and are left out
without them. With several nodes OUT has to be on all of them.
"""

import argparse
import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoints import load_model
from ldm.comparison import LABELS, METHODS, Task, intervals, large, operator, run, step_memory, unconstrained
from ldm.data.captioned import PICTURES
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.images import load_image, save_image
from ldm.metrics import alexnet_features, lpips_weights
from ldm.newton_sampler import H, newton_sampler
from ldm.solver import fast_sampler
from ldm.table import KEY, append_row, in_table, markdown, read_rows
from ldm.util import atomic_write

DEFAULTS = {"data": None, "model": "tiny", "config": None, "prediction": None, "task": "half", "method": "newton", "budget": 220,
            "prompt": "", "guidance": 1.0, "limit": None, "batch": 4, "devices": 1, "accelerator": "auto", "nodes": 1,
            "precision": 32, "out": "outputs/evaluate"}  # fmt: skip
PRECISIONS = {"32": None, "16": torch.float16, "bf16": torch.bfloat16}
FEATURES = "the means of AlexNet's last convolution, to the pictures themselves"


class Blocks(Dataset):
    """(numbers [n], pictures [n, C, size, size] in [-1, 1]) of `batch` files at a time; `numbers`: the blocks that are to do."""

    def __init__(self, files, batch, size, channels, numbers):
        self.files, self.batch, self.size, self.channels, self.numbers = files, batch, size, channels, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        first = self.numbers[i] * self.batch
        numbers = range(first, min(first + self.batch, len(self.files)))
        read = lambda path: load_image(path, (self.size, self.size), self.channels, crop=True)  # noqa: E731
        return list(numbers), torch.cat([read(self.files[j]) for j in numbers])


class Evaluation(pl.LightningModule):
    """Samples blocks, and leaves each with its measures in `folder`."""

    def __init__(self, model, settings, files, folder):
        super().__init__()
        self.model, self.settings, self.files, self.folder = model, settings, files, folder
        self.latent = hasattr(model, "first_stage_model")
        self.shape = (model.channels, model.image_size, model.image_size)
        self.size = model.image_size * (model.first_stage_model.downsampling if self.latent else 1)
        self.picture_channels = 3 if self.latent else model.channels

    def task(self, images, numbers, D):
        return Task(self.settings["task"], images, D, self.shape, self.model if self.latent else None, numbers)

    def chosen(self, task):
        """(sampler, settings), or a ValueError where the method does not apply to the task."""
        method = METHODS[self.settings["method"]]
        chosen = method(self.settings["budget"], task)
        if chosen is None:
            raise ValueError(
                f"method = {method.name} does not apply to task = {task.name} with this model: it takes {method.takes[0]}"
            )
        sampler, settings = chosen
        if sampler in (newton_sampler, fast_sampler):
            settings["h"] = H[PRECISIONS[str(self.settings["precision"])] or torch.float32]
        return sampler, settings

    def check(self):
        """What predict_step would find out, before it: ValueError for a task or method that does not fit."""
        _, settings = self.chosen(self.task(torch.zeros(1, self.picture_channels, self.size, self.size), [0], self.model))
        self.model.schedule.levels(settings["steps"])

    def predict_step(self, block, _):
        numbers, images = block
        model, prompt = self.model, self.settings["prompt"]
        D = LatentDenoiser(model, prompt, self.settings["guidance"]) if self.latent else Denoiser(
            model.network, model.schedule, model.parameterization)  # fmt: skip
        task = self.task(images, numbers, D)
        chosen = self.chosen(task)
        x, costs = run(task, *chosen, len(images), self.device)
        if numbers[0] == 0:
            costs |= dict(memory=step_memory(task, *chosen, self.device),
                          memory_plain=step_memory(task, unconstrained, dict(newton_steps=0), self.device))  # fmt: skip
        pictures, nothing = task.pictures(x), torch.full((len(x),), float("nan"))
        of = lambda v: alexnet_features(large(v)) if lpips_weights() else nothing[:, None]  # noqa: E731
        values = task.measure(pictures) | dict(accuracy=nothing, features=of(pictures), reference=of(images))
        for j, picture in zip(numbers, pictures, strict=True):
            save_image(picture, self.folder / f"{self.files[j].stem}.png")
        with atomic_write(self.folder / f"{numbers[0] // self.settings['batch']}.pt") as temporary:
            torch.save(dict(costs=costs, values=values), temporary)
        return numbers

    def on_predict_end(self):
        self.trainer.strategy.barrier()


def gather(folder, blocks):
    """The costs and measures of a row from the blocks in a folder."""
    parts = [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(blocks)]
    values = {k: torch.cat([part["values"][k] for part in parts]) for k in parts[0]["values"]}
    counts = torch.tensor([len(part["values"]["psnr"]) for part in parts]).double()
    costs = {k: (torch.tensor([part["costs"][k] for part in parts]).double() @ counts / counts.sum()).item()
             for k in ("nfe_forward", "nfe_backward", "seconds")}  # fmt: skip
    costs |= {k: parts[0]["costs"][k] for k in ("memory", "memory_plain")}
    return costs | intervals(values, values.pop("reference"))


def read_settings(overrides):
    """The settings of a command line's key=value words, checked. Returns (settings, files)."""
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{' '.join(overrides)}: give key=value ({str(error).splitlines()[0]})") from None
    if unknown := [key for key in given if key not in DEFAULTS]:
        raise ValueError(f"{unknown[0]}: known are {', '.join(DEFAULTS)}")
    s = DEFAULTS | given
    if s["method"] not in METHODS:
        raise ValueError(f"method = {s['method']}: known are {', '.join(METHODS)}")
    operator(s["task"], 64)
    for key, least in {"budget": 20, "batch": 1, "nodes": 1, **({"limit": 2} if s["limit"] is not None else {})}.items():
        if not isinstance(s[key], int) or s[key] < least:
            raise ValueError(f"{key} = {s[key]}: give an integer >= {least}")
    if str(s["precision"]) not in PRECISIONS:
        raise ValueError(f"precision = {s['precision']}: known are {', '.join(PRECISIONS)}")
    if s["data"] is None:
        raise ValueError("data is missing: give data=/folder of pictures")
    if not Path(s["data"]).is_dir():
        raise ValueError(f"data = {s['data']}: there is no such folder")
    files = sorted(path for path in Path(s["data"]).iterdir() if path.suffix.lower() in PICTURES)[: s["limit"]]
    if len(files) < 2:
        raise ValueError(f"data = {s['data']} has {len(files)} pictures ({', '.join(sorted(PICTURES))}): at least two are needed")
    return s, files


def prepare(folder, settings, files):
    """The folder of this row, which remembers its settings: ValueError where it was made with others."""
    left_out = ("devices", "accelerator", "nodes", "out")  # results do not depend on these
    mine = {k: v for k, v in settings.items() if k not in left_out} | {"files": [path.name for path in files]}
    path = folder / "settings.json"
    if path.is_file():
        theirs = json.loads(path.read_text())
        if changed := [k for k in mine if theirs.get(k) != mine[k]]:
            raise ValueError(f"{folder} holds results with another {changed[0]}: delete it or give another out")
    else:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(mine, indent=2) + "\n")


def evaluate(settings, files):
    """Sample, measure, and write the row of these settings (of `read_settings`). Returns the path of the table."""
    out = Path(settings["out"])
    key = {k: settings.get(k) for k in KEY} | dict(model=Path(settings["model"]).stem, images=len(files))
    folder = out / "-".join(str(key[k]) for k in KEY[:4]).replace(" ", "_")
    dtype = PRECISIONS[str(settings["precision"])]
    model = load_model(settings["model"], settings["config"], "cpu", dtype, settings["prediction"])
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model = {settings['model']} is a diffusers pipeline: give a shipped model, .ckpt or .safetensors")
    evaluation = Evaluation(model, settings, files, folder)
    evaluation.check()
    prepare(folder, settings, files)
    blocks = -(-len(files) // settings["batch"])
    left = [i for i in range(blocks) if not (folder / f"{i}.pt").is_file()]
    if left:
        trainer = pl.Trainer(
            accelerator=settings["accelerator"], devices=settings["devices"], num_nodes=settings["nodes"],
            inference_mode=False, logger=False, enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
        dataset = Blocks(files, settings["batch"], evaluation.size, evaluation.picture_channels, left)
        trainer.predict(evaluation, DataLoader(dataset, batch_size=None), return_predictions=False)
        if not trainer.is_global_zero:
            return None
    path = out / "evaluate.csv"
    if not in_table(path, key):
        append_row(path, key | gather(folder, blocks))
    text = "\n".join(markdown(read_rows(path), out.name, FEATURES, LABELS)) + "\n"
    with atomic_write(out / "evaluate.md") as temporary:
        temporary.write_text(text)
    print(text)
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="key=value")
    try:
        evaluate(*read_settings(parser.parse_args(argv).settings))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"ldm.evaluate: {error}")


if __name__ == "__main__":
    main()
