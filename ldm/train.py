"""Train a model of this repository from its config, on Lightning:

    python -m ldm.train --config configs/mnist/unet.yaml [key=value ...]

A config has four parts: `model` (the network), `data` (a Dataset with the argument `train`), `training` (one of the tasks
below) and `trainer` (the arguments of Lightning's Trainer: devices, max_steps, max_time ...); and perhaps `parts`, the files of
those parts of the model that were trained before, and `init`, the weights to start from. Any value can be set on the command line:

    trainer.max_time=00:01:00:00   a time budget of an hour, after which it saves and ends
    init=checkpoints/tiny/unet.safetensors                   fine-tuning
    data.folder=/path              your own captioned pictures (ldm/data/captioned.py) instead of the config's

Everything is written to runs/<name>/: checkpoints, metrics (one version_N/metrics.csv for each start), sample sheets, and at the
end weights.safetensors, the averaged weights in float16. The same command after a kill resumes from the last checkpoint.
"""

import argparse
import itertools
import math
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.checkpoints import load_parts, save_weights
from ldm.data.captioned import Encoded
from ldm.denoisers import PREDICTIONS, Denoiser, LatentDenoiser
from ldm.images import grid, save_image
from ldm.modules.encoders.modules import bpe_tokenizer
from ldm.newton_sampler import sample
from ldm.util import instantiate_from_config, load_config


class Training(pl.LightningModule):
    """What all tasks share: AdamW, linear warm-up, then a cosine to zero at the last step."""

    def __init__(self, model, lr=1e-3, weight_decay=0.0, warmup=200, seed=0):
        super().__init__()
        self.model = model
        self.lr, self.weight_decay, self.warmup, self.seed = lr, weight_decay, warmup, seed

    def configure_optimizers(self):
        total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay)

        def factor(step):
            return min((step + 1) / self.warmup, 0.5 * (1 + math.cos(math.pi * min(step / total, 1))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def generator(self, step):
        """Random numbers that depend on the step alone, so that a resumed run draws what an uninterrupted one would have."""
        return torch.Generator().manual_seed((self.seed + self.global_rank) * 10_000_019 + step)


class DiffusionTraining(Training):
    """Ho et al. 2020, eq. 14: the network's prediction at a random time, mean squared error.

    weight_cap: noise predictions are weighted by min(1 / alpha_t^2, weight_cap). 1 is that equation; a high cap is the error of
    v (Salimans & Ho 2022), which counts high noise levels, where the composition is decided, as much as low ones.
    """

    def __init__(self, model, weight_cap=1.0, **kwargs):
        super().__init__(model, **kwargs)
        self.weight_cap = weight_cap

    def loss(self, x0, generator, *conditions):
        ddpm = self.model
        t = ddpm.schedule.random_times(len(x0), generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x_t, alpha, sigma = ddpm.schedule.add_noise(x0, t, noise)
        target = PREDICTIONS[ddpm.parameterization][1](x0, noise, alpha, sigma)
        error = (ddpm(x_t, t, *conditions) - target).square()
        weight = (alpha**-2).clamp(max=self.weight_cap) if ddpm.parameterization == "eps" else 1.0
        return (weight * error).mean()

    def training_step(self, batch, _):
        loss = self.loss(batch[0], self.generator(self.global_step))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, i):
        self.log("val_loss", self.loss(batch[0], self.generator(-1 - i)), prog_bar=True, sync_dist=True)
        if i == 0 and self.trainer.is_global_zero:
            ddpm = self.model
            D = Denoiser(ddpm.network, ddpm.schedule, ddpm.parameterization)
            shape = (64, ddpm.channels, ddpm.image_size, ddpm.image_size)
            x0 = sample(D, None, shape, range(64), steps=20, device=self.device).x0
            save_image(grid(x0, 8), Path(self.trainer.default_root_dir) / f"samples_{self.global_step:06d}.png", scale=2)


class TextToImageTraining(DiffusionTraining):
    """The U-Net of a LatentDiffusion on latents and captions, both encoded in advance by its frozen parts; captions are left
    out with the probability `drop`, for guidance (Ho & Salimans 2022)."""

    def __init__(self, model, drop=0.1, prompts=("",), **kwargs):
        super().__init__(model, **kwargs)
        self.drop, self.prompts = drop, list(prompts)
        model.first_stage_model.requires_grad_(False)
        model.cond_stage_model.requires_grad_(False)

    def prepare(self, dataset, train):
        """The encoded dataset. The training set's latents set the scale_factor that brings them to unit variance, unless the
        model has begun with another one's."""
        encoded = Encoded(dataset, lambda x: self.model.first_stage_model.encode(x).mode(), self.model.encode_prompts)
        if train and self.model.scale_factor == 1:
            self.model.scale_factor.fill_(1 / encoded.latents.float().std())
        encoded.latents *= self.model.scale_factor
        with torch.no_grad():
            self.empty = self.model.encode_prompts("")
        return encoded

    def training_step(self, batch, _):
        z, tokens = batch
        generator = self.generator(self.global_step)
        dropped = torch.rand(len(z), 1, 1, generator=generator).to(z) < self.drop
        loss = self.loss(z, generator, torch.where(dropped, self.empty.to(z), tokens))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, i):
        self.log("val_loss", self.loss(batch[0], self.generator(-1 - i), batch[1]), prog_bar=True, sync_dist=True)
        if i == 0 and self.trainer.is_global_zero:
            model, n = self.model, len(self.prompts)
            D = LatentDenoiser(model, self.prompts, guidance=3.0)
            z = sample(D, None, (n, *batch[0].shape[1:]), range(n), steps=20, device=self.device).x_t
            sheet = grid(model.decode(z).clamp(-1, 1), 8)
            save_image(sheet, Path(self.trainer.default_root_dir) / f"samples_{self.global_step:06d}.png", scale=2)


class AutoencoderTraining(Training):
    """Kingma & Welling 2014: mean absolute error of the reconstruction, plus ssim_weight (1 - SSIM), plus kl_weight times the KL
    divergence of the posterior from the standard normal per latent number. Pictures are mirrored at random.

    decoder_only: leave the encoder as it is, and so the latents, that a U-Net may have been trained on already.
    """

    def __init__(self, model, kl_weight=1e-5, ssim_weight=0.0, decoder_only=False, **kwargs):
        super().__init__(model, **kwargs)
        self.kl_weight, self.ssim_weight = kl_weight, ssim_weight
        if decoder_only:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)

    def training_step(self, batch, _):
        generator = self.generator(self.global_step)
        mirrored = torch.rand(len(batch[0]), 1, 1, 1, generator=generator).to(batch[0]) < 0.5
        x = torch.where(mirrored, batch[0].flip(3), batch[0])
        posterior = self.model.encode(x)
        reconstruction = self.model.decode(posterior.sample(generator))
        loss = F.l1_loss(reconstruction, x) + self.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        if self.ssim_weight:
            loss += self.ssim_weight * (1 - structural_similarity_index_measure(reconstruction, x, data_range=2.0))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, i):
        x = batch[0]
        reconstruction = self.model(x)[0].clamp(-1, 1)
        psnr = -10 * ((reconstruction - x) / 2).square().flatten(1).mean(1).log10()
        self.log("val_psnr", psnr.mean(), prog_bar=True, sync_dist=True)
        if i == 0 and self.trainer.is_global_zero:
            sheet = grid(torch.cat([x[:8], reconstruction[:8]]), 8)
            save_image(sheet, Path(self.trainer.default_root_dir) / f"samples_{self.global_step:06d}.png", scale=2)


class ClipTraining(Training):
    """Radford et al. 2021: each picture finds its own caption among the batch's and the reverse, by cross-entropy. Pictures are
    turned, scaled and shifted a little, each in its own way."""

    def __init__(self, model, vocabulary=None, **kwargs):
        super().__init__(model, **kwargs)
        self.tokenizer = bpe_tokenizer(vocabulary)

    def loss(self, images, captions):
        ids = self.tokenizer(list(captions), self.model.context_length).to(images.device)
        of_image, of_text, scale = self.model(images, ids)
        logits, own = scale * of_image @ of_text.T, torch.arange(len(ids), device=images.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2, logits

    def training_step(self, batch, _):
        images, captions = batch
        loss, _ = self.loss(jitter(images, self.generator(self.global_step)), captions)
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        loss, logits = self.loss(*batch)
        accuracy = (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()
        self.log_dict({"val_loss": loss, "val_accuracy": accuracy}, prog_bar=True, sync_dist=True)


def jitter(images, generator, turn=0.15, scale=0.15, shift=0.1):
    """Images [B, C, H, W], each turned by up to `turn` radians, scaled and shifted (fractions of the size), the border extended."""
    most = torch.tensor([[turn], [scale], [shift], [shift]])
    angle, zoom, dx, dy = most * (2 * torch.rand(4, len(images), generator=generator) - 1)
    cos, sin = (1 + zoom) * angle.cos(), (1 + zoom) * angle.sin()
    theta = torch.stack([cos, -sin, 2 * dx, sin, cos, 2 * dy], dim=1).view(-1, 2, 3).to(images)
    places = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


class ClassifierTraining(Training):
    """Cross-entropy on digits shifted by up to two pixels."""

    def training_step(self, batch, _):
        x, y = batch
        dy, dx = torch.randint(-2, 3, (2,), generator=self.generator(self.global_step)).tolist()
        loss = F.cross_entropy(self.model(x.roll((dy, dx), dims=(2, 3))), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("val_accuracy", (self.model(x).argmax(1) == y).float().mean(), prog_bar=True, sync_dist=True)


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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a yaml file under configs/")
    parser.add_argument("--name", help="name of the run; default: the config's path")
    parser.add_argument("--fresh", action="store_true", help="start anew even if the run has a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the config's")
    args = parser.parse_args(argv)
    if not args.config.is_file():
        parser.error(f"--config {args.config}: no such file")
    config = OmegaConf.merge(load_config(args.config), OmegaConf.from_dotlist(args.overrides))
    run = Path("runs") / (args.name or "_".join(args.config.with_suffix("").parts[-2:]))
    train(OmegaConf.to_container(config, resolve=True), run, resume=not args.fresh)


def train(config, run, resume=True):
    """Train what `config` (a dict) describes; everything is written below the folder `run`. Returns the path of the weights."""
    run = Path(run)
    seed = config["training"].get("params", {}).get("seed", 0)
    pl.seed_everything(seed)
    data, batch_size, workers = config["data"], config.get("batch_size", 128), config.get("num_workers", 0)
    if data.get("folder"):
        data = {"target": "ldm.data.captioned.CaptionedFolder", "params": {"folder": data["folder"], "size": data.get("size", 64)}}
    datasets = [instantiate_from_config(data, train=part) for part in (True, False)]
    model = instantiate_from_config(config["model"]).to(memory_format=torch.channels_last)
    parts = config.get("parts") or {}
    init = {"": {"path": config["init"]}} if config.get("init") else {}
    if parts or init:
        load_parts(model, parts | init)
    task = instantiate_from_config(config["training"], model=model)
    if hasattr(task, "prepare"):
        datasets = [task.prepare(dataset, train) for dataset, train in zip(datasets, (True, False), strict=True)]
    last, start = run / "last.ckpt", 0
    if resume and last.exists():
        start = torch.load(last, map_location="meta", weights_only=True)["global_step"]
        print(f"resuming from {last}, step {start} (--fresh starts anew)")
        start *= config["trainer"].get("accumulate_grad_batches", 1)  # steps -> batches
    callbacks = [
        ModelCheckpoint(run, filename="{step}", every_n_train_steps=config.get("checkpoint_every", 250), save_last=True,
                        enable_version_counter=False, save_on_exception=True),
        EMAWeightAveraging(decay=config.get("ema", 0.999)),
        LearningRateMonitor("step"),
    ]  # fmt: skip
    trainer = pl.Trainer(
        default_root_dir=run, callbacks=callbacks, logger=CSVLogger(run, name="metrics"),
        **{"log_every_n_steps": 25, "num_sanity_val_steps": 0, "max_epochs": -1, "check_val_every_n_epoch": None,
           "use_distributed_sampler": False, **config["trainer"]},
    )  # fmt: skip
    batches = Batches(len(datasets[0]), batch_size, seed, start, trainer.global_rank, trainer.world_size)
    loader = DataLoader(datasets[0], batch_sampler=batches, num_workers=workers)
    val = DataLoader(datasets[1], min(batch_size, len(datasets[1])), num_workers=workers, drop_last=True)
    trainer.fit(task, loader, val, ckpt_path=last if resume and last.exists() else None, weights_only=True)
    # EMAWeightAveraging has copied the averaged weights into the model by now.
    weights = run / "weights.safetensors"
    if trainer.is_global_zero:
        save_weights(task.model, weights, torch.float16, without=parts)
        print(f"{trainer.global_step} steps; averaged weights in {weights}")
    return weights


if __name__ == "__main__":
    main()
