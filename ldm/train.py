"""Train a model of this repository from its config, on Lightning:

    python -m ldm.train --config configs/mnist/unet.yaml [key=value ...]

A config has four parts: `model` (the network), `data` (a Dataset with the argument `train`; under `validation` the names and
further arguments of its held-out sets), `training` (a task of ldm/training.py) and `trainer` (the arguments of Lightning's Trainer:
devices, max_steps, max_time ...). It may have `parts`, the files of those parts of the model that were trained before, `init`, the
weights to start from, and `begin`, another run's checkpoint to go on from. `compile: true` compiles the network, which takes a
minute and pays on a GPU. The command line sets any value; text stays text, whatever is in it:

    trainer.max_time=00:01:00:00   a time budget of an hour, after which it saves and ends
    init=checkpoints/tiny/unet.safetensors                   fine-tuning
    begin=runs/tiny_unet/last.ckpt --name end training.params.decay_from=9000    the final decay of a run that may go on later
    data.folder=/path              your own captioned images (ldm/data/captioned.py) instead of the config's

Everything is written to runs/<name>/: checkpoints, metrics (one version_N/metrics.csv for each start), sample sheets, and at the
end weights.safetensors, the averaged weights in float16. The same command after a kill resumes from the last checkpoint.
"""

import argparse
import inspect
import itertools
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ldm.commands import check_keys, override
from ldm.util import instantiate_from_config, load_config, moved, resolve_path
from ldm.weights import load_parts, save_weights

KEYS = "model data training trainer parts init begin batch_size num_workers checkpoint_every ema compile".split()  # of a config
# Configs of version 0.1 name the tasks as ldm.train.DiffusionTraining ...
__getattr__ = moved(
    "ldm.train",
    "ldm.training",
    "Training DiffusionTraining TextToImageTraining AutoencoderTraining ClipTraining ClassifierTraining jitter",
)


class Batches:
    """The endless sequence of training batches, each a list of indices that depends on its step alone: a resumed run goes on
    with the batches that an uninterrupted one would have had. Random draws inside the dataset follow them, without workers.
    Of several processes each gets its own part of an epoch."""

    def __init__(self, n, batch_size, seed, start=0, rank=0, world=1):
        self.n, self.batch_size, self.seed, self.start, self.rank, self.world = n, batch_size, seed, start, rank, world
        if n // world < batch_size:
            raise ValueError(f"batch_size = {batch_size}, but the dataset has {n} items for {world} process(es): give less")

    def __iter__(self):
        per_epoch = self.n // self.world // self.batch_size
        for step in itertools.count(self.start):
            epoch, i = divmod(step, per_epoch)
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            torch.manual_seed((self.seed * self.world + self.rank) * 10_000_019 + step)
            own = order[self.rank :: self.world]
            yield own[i * self.batch_size : (i + 1) * self.batch_size].tolist()


class Checkpoints(pl.Callback):
    """The file that a run resumes from, written every `every` steps, at the end, and where the training breaks off. It is written
    after the check of its step, so that a resumed run neither repeats nor omits one."""

    def __init__(self, path, every):
        self.path, self.every, self.saved = path, every, None

    def on_train_start(self, trainer, task):
        self.saved = trainer.global_step
        # Checks go by the batches begun, and the one that broke off does not count.
        trainer.fit_loop.epoch_loop.batch_progress.total.ready = trainer.global_step * trainer.accumulate_grad_batches

    def on_train_batch_start(self, trainer, *_):
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # the log's steps: one too many after resuming
        if trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_epoch_end(self, trainer, _):
        self.save(trainer)

    def on_exception(self, trainer, *_):
        if not trainer.validating and self.saved is not None:  # in a check, the averaged weights are in the network's place
            self.save(trainer)

    def save(self, trainer):
        if self.saved != trainer.global_step:
            self.saved = trainer.global_step
            part = self.path.with_name(f".{self.path.name}.part")  # of all processes the first one writes
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                part.replace(self.path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a yaml file under configs/")
    parser.add_argument("--name", help="name of the run; default: the config's path")
    parser.add_argument("--fresh", action="store_true", help="start anew even if the run has a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the config's")
    args = parser.parse_args(argv)
    args.config = args.config.expanduser()
    if not args.config.is_file():
        parser.error(f"--config {args.config}: no such file")
    try:
        config = override(OmegaConf.to_container(load_config(args.config), resolve=True), args.overrides)
        check_config(config)
    except ValueError as error:
        parser.error(str(error))
    run = Path("runs") / (args.name or "_".join(args.config.with_suffix("").parts[-2:]))
    train(config, run, resume=not args.fresh)


def check_config(config):
    """ValueError, which suggests the right one, for keys that no part of the training would read."""
    check_keys(config, KEYS, "")
    check_keys(config["data"], ("target", "params", "folder", "size", "validation"), "data.")
    check_keys(config["trainer"], inspect.signature(pl.Trainer).parameters, "trainer.")
    for part in ("model", "training"):
        check_keys(config[part], ("target", "params"), f"{part}.")


def train(config, run, resume=True):
    """Train what `config` (a dict) describes; everything is written below the folder `run`. Returns the path of the weights."""
    run = Path(run)
    seed = config["training"].get("params", {}).get("seed", 0)
    pl.seed_everything(seed)
    data, batch_size, workers = config["data"], config.get("batch_size", 128), config.get("num_workers", 0)
    if data.get("folder"):
        data = {"target": "ldm.data.captioned.CaptionedFolder", "params": {"folder": data["folder"], "size": data.get("size", 64)}}
    sets = data.get("validation") or {"": {}}
    dataset = instantiate_from_config(data, train=True)
    held_out = [instantiate_from_config(data, train=False, **(options or {})) for options in sets.values()]
    model = instantiate_from_config(config["model"]).to(memory_format=torch.channels_last)
    if config.get("compile") and not hasattr(model, "network"):
        raise ValueError("compile = true: only diffusion models have a network to compile, leave it out")
    parts = config.get("parts") or {}
    init = {"": {"path": config["init"]}} if config.get("init") else {}
    if parts or init:
        load_parts(model, parts | init)
    task = instantiate_from_config(config["training"], model=model)
    task.sets, task.cache = tuple(sets), run.parent / "encoded"
    callbacks = [
        # Not Lightning's EMAWeightAveraging: one parameter after the other would take a GPU longer than the step itself.
        # Buffers are copied, not averaged: a text encoder's mask holds -inf.
        WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(config.get("ema", 0.999))),
        LearningRateMonitor("step"),
        Checkpoints(run / "last.ckpt", config.get("checkpoint_every", 250)),
    ]
    trainer = pl.Trainer(
        default_root_dir=run, callbacks=callbacks, logger=CSVLogger(run, name="metrics"), enable_checkpointing=False,
        **{"log_every_n_steps": 25, "num_sanity_val_steps": 0, "max_epochs": -1, "check_val_every_n_epoch": None,
           "use_distributed_sampler": False, **config["trainer"]},
    )  # fmt: skip
    task.to(trainer.strategy.root_device)  # which encodes the data in advance
    dataset, *held_out = [task.prepare(part, i == 0) for i, part in enumerate([dataset, *held_out])]
    last, start = run / "last.ckpt" if resume else None, 0
    if last is None or not last.exists():
        last = resolve_path(config["begin"]) if config.get("begin") else None
    if last:
        start = torch.load(last, map_location="meta", weights_only=True)["global_step"]
        print(f"resuming from {last}, step {start} (--fresh starts anew)")
        start *= config["trainer"].get("accumulate_grad_batches", 1)  # steps -> batches
    batches = Batches(len(dataset), batch_size, seed, start, trainer.global_rank, trainer.world_size)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    val = [DataLoader(part, min(batch_size, len(part)), num_workers=workers, drop_last=True) for part in held_out]
    if config.get("compile"):
        model.network.compile(dynamic=False)
    trainer.fit(task, loader, val, ckpt_path=last, weights_only=True)
    # WeightAveraging has copied the averaged weights into the model by now.
    weights = run / "weights.safetensors"
    if trainer.is_global_zero:
        save_weights(task.model, weights, torch.float16, without=parts)
        print(f"{trainer.global_step} steps; averaged weights in {weights}")
    return weights


if __name__ == "__main__":
    main()
