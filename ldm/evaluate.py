"""Measure a method of constrained sampling on a folder of images, on one or more devices (Lightning):

    python -m ldm.evaluate data=/folder [model=sd-v1-4.ckpt] [task=half] [method=newton] [key=value ...]
    python -m ldm.evaluate --preset daps data=/folder [--quick] [key=value ...]      a whole table, of configs/evaluate
    python -m ldm.evaluate data=/folder lr=[.05,.1,.2] guidance=[1,3]                a row for each combination

Every image is read before the first is sampled. Image i, by name, has the seed i. Each block's measures and images are written to
OUT/MODEL-TASK-METHOD-BUDGET/ as soon as they are there, and the same command goes on after an interruption: a block stays valid as
long as the content of its images, the weights and the settings that count are the same. At last the row of OUT/evaluate.csv is
written, with the columns of benchmarks/compare.py, and OUT/evaluate.md shows all rows. To measure a row anew, delete its folder.

KID is measured in AlexNet's last convolution, to the folder's own images. LPIPS and KID need AlexNet's weights (make data-lpips),
and are left out without them; FID and the usual KID need those of Inception v3 (inception=FILE). Nothing is fetched. Runs of more
than a minute begin with the seconds and GiB that they will take. With several nodes OUT has to be on all of them.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoints import is_pipeline, load_model, locate, read_config
from ldm.commands import option, options_help, read_options
from ldm.comparison import LABELS, METHODS, Sampler, Task, intervals, large, run_best, step_memory, unconstrained
from ldm.data.captions import find_captions
from ldm.denoisers import Denoiser
from ldm.images import EXTENSIONS, load_image, save_image
from ldm.memory import expected_peak
from ldm.metrics import alexnet_features, inception_features, lpips_weights
from ldm.models.diffusion.ddpm import DDPM
from ldm.presets import preset_words, presets, sweep
from ldm.problems import PROBLEMS, label, problem
from ldm.profiles import denoiser
from ldm.sampling import DenoiserLike
from ldm.table import KEY, markdown, put_row, read_rows
from ldm.util import atomic_write, resolve_path

PRECISIONS = {"32": None, "16": torch.float16, "bf16": torch.bfloat16}
FEATURES = "the means of AlexNet's last convolution, to the images themselves"


@dataclass(frozen=True)
class Settings:
    """What a row depends on, and how it is computed."""

    data: Path | None = option(None, "folder of images of any size; their middle square, resized to the model's size, is the truth")
    model: str = option("tiny", "a shipped model, or the path of a .ckpt or .safetensors file or of a diffusers pipeline's folder")
    config: Path | None = option(None, "as of load_model: a yaml file")
    prediction: str | None = option(None, "as of load_model: eps or v")
    task: str = option("half", f"{', '.join(PROBLEMS)}; with other noise: sr4@0.05. See ldm/problems.py")
    method: str = option("newton", ", ".join(METHODS), choices=METHODS)
    budget: int = option(220, "network evaluations, a backward pass is one more; the paper's: 220 with newton", least=20)
    runs: int = option(1, "samples per image, of which the one that fits the measurement best counts", least=1)
    prompt: str = option("", "of all images; with a class-conditional model the number of the class")
    captions: str = option(
        "no", "yes: each image's own prompt, in image.txt or a captions.csv of lines file,caption", ("no", "yes")
    )
    guidance: float = option(1.0, "classifier-free guidance scale of the prompt; 1: none")
    lr: float | None = option(None, "step length of newton and gradient, instead of the paper's")
    steps: int | None = option(None, "diffusion steps, instead of those that follow from the budget", least=1)
    newton_steps: int | None = option(None, "inner steps of newton, likewise", least=0)
    inception: Path | None = option(None, "weights-inception-2015-12-05-6726825d.pth, for FID and KID")
    precision: str = option("32", "of the weights: 32, 16 or bf16", choices=PRECISIONS)
    limit: int | None = option(None, "only the first so many images by name", least=2)
    on_error: str = option("stop", "of an image that cannot be read: stop before the first sample, or skip it", ("stop", "skip"))
    batch: int = option(4, "images at a time; blocks of so many go to the devices in turn", least=1)
    devices: str = option("1", "how many, or auto: all")
    accelerator: str = option("auto", "Lightning's: auto, gpu, cpu ...")
    nodes: int = option(1, "number of machines", least=1)
    out: Path = option(Path("outputs/evaluate"), "folder of the results")

    def that_count(self) -> dict[str, Any]:
        """Those that change a sample, apart from the images and the weights."""
        names = ("task", "method", "budget", "runs", "prompt", "guidance", "precision", "prediction", "lr", "steps", "newton_steps")
        return {name: vars(self)[name] for name in names}

    @property
    def own(self) -> dict[str, float]:
        """The sampler's settings that take the place of the method's."""
        return {name: value for name in ("lr", "steps", "newton_steps") if (value := vars(self)[name]) is not None}


@dataclass(frozen=True)
class Input:
    """An image of the folder: its place among all of them by name, path, sha256 of the file, name of its result, and prompt."""

    number: int
    path: Path
    sha256: str
    result: str
    prompt: str


class Blocks(Dataset):
    """(i, images [n, C, size, size] in [-1, 1]) of each block, a list of `Input`s."""

    def __init__(self, blocks: "list[list[Input]]", size: int, channels: int):
        self.blocks, self.size, self.channels = blocks, size, channels

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        size = (self.size, self.size)
        return i, torch.cat([load_image(one.path, size, self.channels, crop=True) for one in self.blocks[i]])


class Evaluation(pl.LightningModule):
    """Samples `blocks`, and leaves each with its measures in `folder`. Memory is measured on the block with the image `first`."""

    def __init__(self, model: Any, settings: Settings):
        super().__init__()
        self.model, self.settings = model, settings
        self.folder, self.first, self.blocks = settings.out, 0, list[list[Input]]()
        self.latent = model.downsampling > 1
        self.shape = (model.channels, model.image_size, model.image_size)
        self.size = model.image_size * model.downsampling
        self.image_channels = 3 if self.latent else model.channels

    def task(self, images: Tensor, numbers: Sequence[int], D: DenoiserLike) -> Task:
        return Task(self.settings.task, images, D, self.shape, self.model if self.latent else None, numbers)

    def chosen(self, task: Task) -> tuple[Sampler, dict[str, Any]]:
        """(sampler, settings), or a ValueError where the method does not apply to the task."""
        method = METHODS[self.settings.method]
        chosen = method(self.settings.budget, task)
        if chosen is None:
            raise ValueError(
                f"method = {method.name} does not apply to task = {task.name} with this model: it takes {method.takes[0]}"
            )
        sampler, settings = chosen
        for name, value in self.settings.own.items():
            if name not in settings:
                raise ValueError(f"{name} = {value}: method = {method.name} has {', '.join(settings)}")
        return sampler, settings | self.settings.own

    def denoiser(self, inputs: list[Input]) -> Denoiser:
        """D with the prompts of these inputs."""
        prompts = [one.prompt for one in inputs]
        return denoiser(self.model, prompts if len(set(prompts)) > 1 else prompts[0], self.settings.guidance)

    def check(self) -> None:
        """What predict_step would find out, before it: ValueError for a task or method that does not fit."""
        D = Denoiser(self.model.network, self.model.schedule, self.model.parameterization)
        _, settings = self.chosen(self.task(torch.zeros(1, self.image_channels, self.size, self.size), [0], D))
        self.model.schedule.levels(settings["steps"])
        asked = "captions = yes" if self.settings.captions == "yes" else f"prompt = {self.settings.prompt!r}"
        if not self.model.conditional and asked != "prompt = ''":
            raise ValueError(f"{asked}: model = {self.settings.model} takes no prompts")
        if self.settings.captions == "no":
            self.denoiser([Input(0, Path(), "", "", self.settings.prompt)])  # a wrong label is known here
        if self.settings.inception:
            inception_features(torch.zeros(1, 3, 64, 64), self.settings.inception)

    def on_predict_start(self) -> None:
        """Says what is to come, if it is more than a minute: by one timed evaluation, and the same code on tensors without data."""
        if not isinstance(self.model, torch.nn.Module):  # a pipeline, which Lightning does not move
            self.model.pipeline.to(self.device)
        inputs, shape = self.blocks[0], (len(self.blocks[0]), *self.shape)
        images = torch.zeros(len(inputs), self.image_channels, self.size, self.size, device=self.device)
        task = self.task(images, [one.number for one in inputs], D := self.denoiser(inputs))
        x_t, t = torch.zeros(shape, device=self.device), D.schedule.levels(20)[10].t
        for _ in range(2):  # the first may compile
            begin = time.perf_counter()
            with torch.inference_mode():
                D(x_t, t).sum().item()
        turns = -(-len(self.blocks) // self.trainer.world_size)
        seconds = (time.perf_counter() - begin) * self.settings.budget * self.settings.runs * turns
        if seconds > 60:
            peak = expected_peak(D, task.constraint(), shape, self.model)
            self.print(f"about {seconds:,.0f} s on {self.trainer.world_size} device(s) and {peak:.1f} GiB on each, not counted the "
                       "decoder's time and the graphs of methods that back-propagate")  # fmt: skip

    def predict_step(self, block: tuple[int, Tensor], _: int) -> int:
        i, images = block
        inputs, numbers = self.blocks[i], [one.number for one in self.blocks[i]]
        task = self.task(images, numbers, self.denoiser(inputs))
        chosen = self.chosen(task)
        x, costs = run_best(task, *chosen, len(images), self.device, self.settings.runs)
        memory: dict[str, float | None] = {}
        if inputs[0].number == self.first:
            few = self.task(images[:8], numbers[:8], self.denoiser(inputs[:8]))
            plain = step_memory(few, unconstrained, dict(newton_steps=0), self.device)
            memory = dict(memory=step_memory(few, *chosen, self.device), memory_plain=plain)
        results, nothing = task.to_images(x), torch.full((len(x),), float("nan"))
        of = lambda v: alexnet_features(large(v)) if lpips_weights() else nothing[:, None]  # noqa: E731
        values = task.measure(results) | dict(accuracy=nothing, features=of(results), reference=of(images))
        if weights := self.settings.inception:
            values |= dict(inception=inception_features(results, weights), inception_reference=inception_features(images, weights))
        for one, image in zip(inputs, results, strict=True):
            save_image(image, self.folder / one.result)
        with atomic_write(block_file(self.folder, inputs)) as temporary:
            torch.save(dict(costs=costs | memory, values=values, inputs=content(inputs)), temporary)
        return i

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier()


# ---- inputs


def read_inputs(settings: Settings, size: int, channels: int) -> list[Input]:
    """The `Input`s of a row, each file read and decoded once. What cannot be read is left out with a printed line (on_error=skip),
    or a ValueError. Fewer than two images are a ValueError too."""
    folder = cast(Path, settings.data)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)[: settings.limit]
    names, inputs, broken = result_names(paths), [], []
    captions = find_captions(folder)[0] if settings.captions == "yes" else dict.fromkeys(paths, settings.prompt)
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        try:
            load_image(path, (size, size), channels, crop=True)
            if path not in captions:
                raise ValueError(f"{path} has no caption, neither in {path.stem}.txt nor in a captions.csv")
            inputs.append(Input(number, path, sha256(path), name, captions[path]))
        except (ValueError, OSError) as error:
            broken.append(str(error))
    if broken and settings.on_error == "stop":
        more = f" (and {len(broken) - 1} more)" if broken[1:] else ""
        raise ValueError(f"{broken[0]}{more}; on_error=skip leaves such files out")
    for reason in broken:
        print(f"left out: {reason}")
    if len(inputs) < 2:
        found = f"{len(inputs)} usable images ({', '.join(EXTENSIONS)})"
        raise ValueError(f"data = {settings.data} has {found}: at least two are needed")
    return inputs


def result_names(paths: Sequence[Path]) -> list[str]:
    """A PNG file's name for the result of each path: the stem, with a number before it where two stems are the same."""
    stems = [path.stem for path in paths]
    distinct = len({stem.casefold() for stem in stems}) == len(stems)
    return [f"{stem}.png" if distinct else f"{i}-{stem}.png" for i, stem in enumerate(stems)]


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def content(inputs: list[Input]) -> list[list]:
    """What a block is valid for."""
    return [[one.number, one.sha256, one.result, one.prompt] for one in inputs]


def block_file(folder: Path, inputs: list[Input]) -> Path:
    return folder / f"{inputs[0].number}.pt"


def block_of(folder: Path, inputs: list[Input]) -> dict[str, Any] | None:
    """The measured block of these inputs, or None where there is none, or one of files with another content."""
    path = block_file(folder, inputs)
    block = torch.load(path, weights_only=True) if path.is_file() else None
    return block if block and block["inputs"] == content(inputs) else None


def complete(block: dict[str, Any] | None, settings: Settings) -> bool:
    """Whether a block has what is asked for."""
    return block is not None and ("inception" in block["values"] or not settings.inception)


# ---- the row


def gather(folder: Path, blocks: list[list[Input]]) -> dict[str, float]:
    """The costs and measures of a row from its blocks."""
    parts = [part for inputs in blocks if (part := block_of(folder, inputs))]
    values = {k: torch.cat([part["values"][k] for part in parts]) for k in parts[0]["values"]}
    counts = torch.tensor([len(inputs) for inputs in blocks]).double()
    costs = {k: (torch.tensor([part["costs"][k] for part in parts]).double() @ counts / counts.sum()).item()
             for k in ("nfe_forward", "nfe_backward", "seconds")}  # fmt: skip
    costs |= {k: parts[0]["costs"].get(k) for k in ("memory", "memory_plain")}
    return costs | intervals(values, values.pop("reference"))


def read_settings(words: Sequence[str]) -> Settings:
    """The `Settings` of a command line's words key=value, checked."""
    settings = read_options(Settings, words)
    problem(settings.task)
    if settings.lr is not None and not settings.lr > 0:
        raise ValueError(f"lr = {settings.lr}: give a positive number")
    if settings.data is None:
        raise ValueError("data is missing: give data=/folder of images")
    if not settings.data.is_dir():
        raise ValueError(f"data = {settings.data}: there is no such folder")
    return settings


def origin(settings: Settings) -> dict[str, Any]:
    """What a folder of results is valid for, apart from the images: the settings that count, and the model's files by content."""
    if is_pipeline(settings.model):
        files = sorted(path for path in Path(settings.model).expanduser().rglob("*") if path.is_file())
        return settings.that_count() | {"weights": [sha256(file) for file in files], "config": None}
    weights, config = locate(settings.model, settings.config)
    config, parts = read_config(config) if config else (None, {})
    files = [weights, *(resolve_path(part["path"]) for part in parts.values())]
    return settings.that_count() | {"weights": [sha256(file) for file in files], "config": config}


def name_of(model: str) -> str:
    """The model's in the table: of a file without its ending, of a folder with all dots."""
    return Path(model).name if is_pipeline(model) else Path(model).stem


def prepare(folder: Path, mine: dict[str, Any]) -> None:
    """The folder of this row, which remembers its origin: ValueError where its results have another one."""
    path = folder / "settings.json"
    if not path.is_file():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(mine, indent=2) + "\n")
    theirs = json.loads(path.read_text())
    if changed := [k for k in mine if theirs.get(k) != mine[k]]:
        raise ValueError(f"{folder} holds results with another {changed[0]}: delete it or give another out")


def evaluate(settings: Settings, swept: Sequence[str] = ()) -> Path | None:
    """Sample, measure, and write the row of these settings, which has the values of `swept` names in its method's name. Returns the
    path of the table, None on all machines but the first."""
    out = settings.out
    model = load_model(settings.model, settings.config, "cpu", PRECISIONS[settings.precision], settings.prediction)
    if isinstance(model, torch.nn.Module) and not isinstance(model, DDPM):
        kind = type(model).__name__
        raise ValueError(f"model = {settings.model} is a {kind}: give a diffusion model, a shipped one or your own")
    evaluation = Evaluation(model, settings)
    evaluation.check()
    inputs = read_inputs(settings, evaluation.size, evaluation.image_channels)
    names = [*settings.own, *(name for name in swept if name not in (*KEY, *settings.own))]
    method = " ".join([settings.method, *(f"{name}={vars(settings)[name]}" for name in names)])
    key = {k: asdict(settings).get(k) for k in KEY} | dict(model=name_of(settings.model), method=method, images=len(inputs))
    evaluation.folder = folder = out / "-".join(str(key[k]) for k in KEY[:4]).replace(" ", "-")
    evaluation.first = inputs[0].number
    prepare(folder, origin(settings))
    blocks = [inputs[i : i + settings.batch] for i in range(0, len(inputs), settings.batch)]
    evaluation.blocks = [block for block in blocks if not complete(block_of(folder, block), settings)]
    if evaluation.blocks:
        trainer = pl.Trainer(
            accelerator=settings.accelerator, devices=int(settings.devices) if settings.devices.isdigit() else settings.devices,
            num_nodes=settings.nodes, inference_mode=False, logger=False, enable_checkpointing=False,
            enable_model_summary=False)  # fmt: skip
        dataset = Blocks(evaluation.blocks, evaluation.size, evaluation.image_channels)
        trainer.predict(evaluation, DataLoader(dataset, batch_size=None), return_predictions=False)
        if not trainer.is_global_zero:
            return None
    path = out / "evaluate.csv"
    put_row(path, key | gather(folder, blocks))
    rows = read_rows(path)
    text = "\n".join(markdown(rows, out.name, FEATURES, LABELS | {row["task"]: label(row["task"]) for row in rows})) + "\n"
    with atomic_write(out / "evaluate.md") as temporary:
        temporary.write_text(text)
    print(text)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"settings, with their defaults:\n\n{options_help(Settings)}")  # fmt: skip
    parser.add_argument("settings", nargs="+", metavar="key=value")
    parser.add_argument("--preset", help=f"a yaml file, or one of {', '.join(presets())}")
    parser.add_argument("--quick", action="store_true", help="the preset on a shipped model and two images")
    args = parser.parse_args(argv)
    try:
        for row in preset_words(args.preset, args.quick) if args.preset else [[]]:
            for words, swept in sweep([*row, *args.settings]):
                evaluate(read_settings(words), swept)
    except (ValueError, FileNotFoundError, FloatingPointError, MemoryError) as error:
        sys.exit(f"ldm.evaluate: {error}")


if __name__ == "__main__":
    main()
