"""What the models of this repository are trained for: one Lightning module per task, named by a config's `training.target`.

A task takes the model and its own settings, and says what the loss of a batch is. `ldm/train.py` runs it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.data.captioned import Encoded, fingerprint
from ldm.denoisers import PREDICTIONS, Denoiser, LatentDenoiser
from ldm.images import grid, save_image
from ldm.metrics import confusion, lpips_distance, lpips_loss, mean_iou, psnr, ssim
from ldm.modules.encoders.modules import bpe_tokenizer
from ldm.newton_sampler import sample


class Training(pl.LightningModule):
    """What all tasks share: AdamW, linear warm-up, and one of two courses of the learning rate.

    decay=None  a cosine to zero at the last step, which is to be known from the beginning
    decay=n     constant, then linear to zero within the n steps from step `decay_from` on, which end the training (Hägele et al.
                2024, "warm-up, stable, decay"). decay_from=None: they begin when the held-out loss has not fallen at `patience`
                checks in a row (None: never), so that a training goes on over as many sittings as it gains from

    `sets` are the names of the held-out sets, in the order of the validation loaders, and `cache` a folder for what is computed
    from the data in advance; ldm/train.py sets both.
    """

    sets: Sequence[str] = ("",)
    cache: Path | None = None

    def __init__(
        self,
        model: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: int = 200,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.99),
        decay: int | None = None,
        decay_from: int | None = None,
        patience: int | None = None,
    ):
        super().__init__()
        self.model = model
        self.lr, self.weight_decay, self.warmup, self.seed, self.betas = lr, weight_decay, warmup, seed, betas
        self.decay, self.decay_from, self.patience = decay, decay_from, patience
        self.best, self.waited = math.inf, 0  # the lowest held-out loss, and the checks since

    def configure_optimizers(self) -> dict[str, Any]:
        total = self.trainer.estimated_stepping_batches
        first, second = self.betas  # a list in a config
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, (first, second), weight_decay=self.weight_decay)

        def factor(step: int) -> float:
            if self.decay is None:
                course = 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
            else:
                course = 1.0 if self.decay_from is None else 1 - min(max(step - self.decay_from, 0) / self.decay, 1)
            return min((step + 1) / self.warmup, course)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_validation_end(self) -> None:
        """Begin the decay where the held-out loss, the mean over the sets, has stopped falling."""
        losses = [value.item() for name, value in self.trainer.callback_metrics.items() if name.startswith("val_loss")]
        if self.patience is None or not losses:
            return
        loss = sum(losses) / len(losses)
        self.best, self.waited = (loss, 0) if loss < self.best else (self.best, self.waited + 1)
        if self.waited >= self.patience and self.decay_from is None:
            self.decay_from = self.global_step

    def on_train_batch_end(self, *args: Any) -> None:
        if self.decay is not None and self.decay_from is not None and self.global_step >= self.decay_from + self.decay:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["course"] = {"best": self.best, "waited": self.waited, "decay_from": self.decay_from}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        course = checkpoint.get("course", {"best": math.inf, "waited": 0, "decay_from": None})
        self.best, self.waited = course["best"], course["waited"]
        self.decay_from = course["decay_from"] if self.decay_from is None else self.decay_from

    def prepare(self, dataset: Dataset, train: bool) -> Dataset:
        """What the loaders read instead of a dataset (train: the training set, the first one that is prepared)."""
        return dataset

    def log_held_out(self, name: str, value: Tensor, which: int) -> None:
        """Log what was measured on held-out set number `which`, as `name` or, where the sets have names, `name_set`."""
        name = "_".join(filter(None, (name, self.sets[which])))
        self.log(name, value, prog_bar=True, sync_dist=True, add_dataloader_idx=False)

    def generator(self, step: int) -> torch.Generator:
        """Random numbers that depend on the step alone, so that a resumed run draws what an uninterrupted one would have."""
        return torch.Generator().manual_seed((self.seed + self.global_rank) * 10_000_019 + step)


class DiffusionTraining(Training):
    """Ho et al. 2020, eq. 14: the network's prediction at a random time, mean squared error.

    weight_cap: noise predictions are weighted by min(1 / alpha_t^2, weight_cap). 1 is that equation; a high cap is the error of
    v (Salimans & Ho 2022), which counts high noise levels, where the composition is decided, as much as low ones.
    draws: how many times and noises each held-out image gets at a check; with one, the loss moves by several per cent.
    times: arguments of the schedule's `random_times`, such as {mean: 0} for log-normal times; {}: the schedule's default.
    """

    def __init__(self, model: Any, weight_cap: float = 1.0, draws: int = 1, times: dict[str, float] | None = None, **kwargs: Any):
        super().__init__(model, **kwargs)
        self.weight_cap, self.draws, self.times = weight_cap, draws, times or {}

    def loss(self, x0: Tensor, generator: torch.Generator, *conditions: Tensor) -> Tensor:
        ddpm = self.model
        t = ddpm.schedule.random_times(len(x0), generator, **self.times).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x_t, alpha, sigma = ddpm.schedule.add_noise(x0, t, noise)
        target = PREDICTIONS[ddpm.parameterization][1](x0, noise, alpha, sigma)
        error = (ddpm(x_t, t, *conditions) - target).square()
        weight = (alpha**-2).clamp(max=self.weight_cap) if ddpm.parameterization == "eps" else 1.0
        return (weight * error).mean()

    def held_out_loss(self, i: int, which: int, x0: Tensor, *conditions: Tensor) -> None:
        """Log the loss of batch i of a held-out set, of the same times and noises at every check."""
        losses = [self.loss(x0, self.generator(-1 - i * self.draws - j), *conditions) for j in range(self.draws)]
        self.log_held_out("val_loss", torch.stack(losses).mean(), which)

    def training_step(self, batch: Sequence[Any], _: int) -> Tensor:
        loss = self.loss(batch[0], self.generator(self.global_step))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Any], i: int, dataloader_idx: int = 0) -> None:
        self.held_out_loss(i, dataloader_idx, batch[0])
        if i == dataloader_idx == 0 and self.trainer.is_global_zero:
            ddpm = self.model
            D = Denoiser(ddpm.network, ddpm.schedule, ddpm.parameterization)
            shape = (64, ddpm.channels, ddpm.image_size, ddpm.image_size)
            x0 = sample(D, None, shape, range(64), steps=20, device=self.device).x0
            save_image(grid(x0, 8), Path(self.trainer.default_root_dir) / f"samples_{self.global_step:06d}.png", scale=2)


class TextToImageTraining(DiffusionTraining):
    """The U-Net of a LatentDiffusion on latents and captions, both encoded in advance by its frozen parts; captions are left
    out with the probability `drop`, for guidance (Ho & Salimans 2022)."""

    def __init__(self, model: Any, drop: float = 0.1, prompts: Sequence[str] = ("",), **kwargs: Any):
        super().__init__(model, **kwargs)
        self.drop, self.prompts = drop, list(prompts)
        model.first_stage_model.requires_grad_(False)
        model.cond_stage_model.requires_grad_(False)

    def prepare(self, dataset: Dataset, train: bool) -> Dataset:
        """The encoded dataset, from the cache if it has been encoded before. The training set's latents set the scale_factor that
        brings them to unit variance, unless the model has begun with another one's."""
        model = self.model
        encode = lambda x: model.first_stage_model.encode(x.to(self.device)).mode()  # noqa: E731
        file = None
        if self.cache is not None:
            file = self.cache / f"{fingerprint(dataset, model.first_stage_model, model.cond_stage_model)}.safetensors"
        encoded = Encoded(dataset, encode, model.encode_prompts, mirrored=train, file=file)
        if train and self.model.scale_factor == 1:
            self.model.scale_factor.fill_(1 / encoded.latents.float().std())
        encoded.latents *= float(self.model.scale_factor)
        with torch.no_grad():
            self.empty = self.model.encode_prompts("")
        return encoded

    def training_step(self, batch: Sequence[Any], _: int) -> Tensor:
        z, tokens = batch
        generator = self.generator(self.global_step)
        dropped = torch.rand(len(z), 1, 1, generator=generator).to(z) < self.drop
        loss = self.loss(z, generator, torch.where(dropped, self.empty.to(z), tokens))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Any], i: int, dataloader_idx: int = 0) -> None:
        self.held_out_loss(i, dataloader_idx, *batch)
        if i == dataloader_idx == 0 and self.trainer.is_global_zero:
            model, n = self.model, len(self.prompts)
            D = LatentDenoiser(model, self.prompts, guidance=3.0)
            z = sample(D, None, (n, *batch[0].shape[1:]), range(n), steps=20, device=self.device).x_t
            sheet = grid(model.decode(z).clamp(-1, 1), 8)
            save_image(sheet, Path(self.trainer.default_root_dir) / f"samples_{self.global_step:06d}.png", scale=2)


class AutoencoderTraining(Training):
    """Kingma & Welling 2014: mean absolute error of the reconstruction, plus ssim_weight (1 - SSIM), plus lpips_weight LPIPS (as
    Rombach et al. 2022 do), plus kl_weight times the KL divergence of the posterior from the standard normal per latent number.
    Images are mirrored at random. LPIPS needs AlexNet's weights (make data-lpips).

    decoder_only: leave the encoder as it is, and so the latents, that a U-Net may have been trained on already.
    """

    def __init__(
        self,
        model: Any,
        kl_weight: float = 1e-5,
        ssim_weight: float = 0.0,
        lpips_weight: float = 0.0,
        decoder_only: bool = False,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        self.kl_weight, self.ssim_weight, self.lpips_weight = kl_weight, ssim_weight, lpips_weight
        if decoder_only:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)

    def training_step(self, batch: Sequence[Any], _: int) -> Tensor:
        generator = self.generator(self.global_step)
        mirrored = torch.rand(len(batch[0]), 1, 1, 1, generator=generator).to(batch[0]) < 0.5
        x = torch.where(mirrored, batch[0].flip(3), batch[0])
        posterior = self.model.encode(x)
        reconstruction = self.model.decode(posterior.sample(generator))
        loss = F.l1_loss(reconstruction, x) + self.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        if self.ssim_weight:
            loss += self.ssim_weight * (1 - structural_similarity_index_measure(reconstruction, x, data_range=2.0))
        if self.lpips_weight:
            loss += self.lpips_weight * lpips_loss(reconstruction, x).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Any], i: int, dataloader_idx: int = 0) -> None:
        x = batch[0]
        reconstruction = self.model(x)[0].clamp(-1, 1)
        self.log_held_out("val_psnr", psnr(reconstruction, x).mean(), dataloader_idx)
        self.log_held_out("val_ssim", ssim(reconstruction, x).mean(), dataloader_idx)
        if self.lpips_weight:
            self.log_held_out("val_lpips", lpips_distance(reconstruction, x).mean(), dataloader_idx)
        if i == dataloader_idx == 0 and self.trainer.is_global_zero:
            sheet = grid(torch.cat([x[:8], reconstruction[:8]]), 8)
            save_image(sheet, Path(self.trainer.default_root_dir) / f"samples_{self.global_step:06d}.png", scale=2)


class ClipTraining(Training):
    """Radford et al. 2021: each image finds its own caption among the batch's and the reverse, by cross-entropy. Images are
    turned, scaled and shifted a little, each in its own way."""

    def __init__(self, model: Any, vocabulary: str | None = None, **kwargs: Any):
        super().__init__(model, **kwargs)
        self.tokenizer = bpe_tokenizer(vocabulary)

    def loss(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenizer(list(captions), self.model.context_length).to(images.device)
        of_image, of_text, scale = self.model(images, ids)
        logits, own = scale * of_image @ of_text.T, torch.arange(len(ids), device=images.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2, logits

    def training_step(self, batch: Sequence[Any], _: int) -> Tensor:
        images, captions = batch
        loss = self.loss(jitter(images, self.generator(self.global_step)), captions)[0]
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Any], _: int, dataloader_idx: int = 0) -> None:
        loss, logits = self.loss(*batch)
        accuracy = (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()
        self.log_held_out("val_loss", loss, dataloader_idx)
        self.log_held_out("val_accuracy", accuracy, dataloader_idx)


def jitter(
    images: Tensor,
    generator: torch.Generator,
    turn: float = 0.15,
    scale: float = 0.15,
    shift: float = 0.1,
    padding: str = "border",
) -> Tensor:
    """Images [B, C, H, W], each turned by up to `turn` radians, scaled and shifted (fractions of the size), the border extended or
    (padding="zeros") zeros around."""
    most = torch.tensor([[turn], [scale], [shift], [shift]])
    angle, zoom, dx, dy = most * (2 * torch.rand(4, len(images), generator=generator) - 1)
    cos, sin = (1 + zoom) * angle.cos(), (1 + zoom) * angle.sin()
    theta = torch.stack([cos, -sin, 2 * dx, sin, cos, 2 * dy], dim=1).view(-1, 2, 3).to(images)
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode=padding, align_corners=False)


class ClassifierTraining(Training):
    """Cross-entropy on digits shifted by up to two pixels."""

    def training_step(self, batch: Sequence[Any], _: int) -> Tensor:
        x, y = batch
        dy, dx = torch.randint(-2, 3, (2,), generator=self.generator(self.global_step)).tolist()
        loss = F.cross_entropy(self.model(x.roll((dy, dx), dims=(2, 3))), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Any], _: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log_held_out("val_accuracy", (self.model(x).argmax(1) == y).float().mean(), dataloader_idx)


class JudgeTraining(Training):
    """Cross-entropy of the name, with smoothed labels, and of the category. Images are disturbed in other ways than those of
    ClipTraining. Of held-out names the category alone can be right."""

    def training_step(self, batch: Sequence[Any], _: int) -> Tensor:
        images, names, categories = batch
        name, category = self.model(disturb(images, self.generator(self.global_step)))
        own, of = self.labels(names, categories)
        loss = F.cross_entropy(name, own, label_smoothing=0.1) + 0.5 * F.cross_entropy(category, of)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Any], _: int, dataloader_idx: int = 0) -> None:
        images, names, categories = batch
        name, category = self.model(images)
        own, of = self.labels(names, categories)
        right = name.topk(5).indices == own[:, None]
        scores = {"val_top_1": right[:, 0], "val_top_5": right.any(1), "val_category": category.argmax(1) == of}
        for key, values in scores.items():
            self.log_held_out(key, values.float().mean(), dataloader_idx)

    def labels(self, names: Sequence[str], categories: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Their places in the model's lists; of a name that is not there, -100, which no loss counts."""
        place = {name: i for i, name in enumerate(self.model.names)}
        own, of = [place.get(name, -100) for name in names], [self.model.categories.index(c) for c in categories]
        return torch.tensor(own, device=self.device), torch.tensor(of, device=self.device)


class ParserTraining(Training):
    """Cross-entropy of each pixel's class. Images are mirrored at random, a share `blur` of them blurred by 3 x 3 pixels, and noise
    of a standard deviation between 0 and `noise` added: a decoder's images are less sharp than drawings."""

    def __init__(self, model: Any, blur: float = 0.5, noise: float = 0.05, **kwargs: Any):
        super().__init__(model, **kwargs)
        self.blur, self.noise = blur, noise

    def training_step(self, batch: Sequence[Any], _: int) -> Tensor:
        images, labels = batch
        generator = self.generator(self.global_step)
        draw = lambda *shape: torch.rand(len(images), *shape, generator=generator).to(images)  # noqa: E731
        mirrored = draw(1, 1) < 0.5
        x = torch.where(mirrored[:, None], images.flip(3), images)
        x = torch.where(draw(1, 1, 1) < self.blur, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), x)
        x = x + self.noise * draw(1, 1, 1) * torch.randn(x.shape, generator=generator).to(x)
        loss = F.cross_entropy(self.model(x), torch.where(mirrored, labels.flip(2), labels))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Any], _: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        logits = self.model(images)
        self.log_held_out("val_loss", F.cross_entropy(logits, labels), dataloader_idx)
        self.log_held_out("val_miou", mean_iou(confusion(logits.argmax(1), labels, logits.shape[1]).sum(0)), dataloader_idx)


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] on white, each in its own way: mirrored, turned, scaled and shifted with white around,
    blurred, and with brightness, contrast, saturation and a little of the hue changed."""
    n = len(images)
    draw = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator).to(images)  # noqa: E731
    x = torch.where(draw(0, 1) < 0.5, images.flip(3), images)
    x = 1 - jitter(1 - x, generator, turn=0.35, scale=0.3, shift=0.12, padding="zeros")
    share = draw(0, 1)
    x = torch.where(share < 0.4, x, (2 * share - 0.8).clamp(max=1) * F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
                    + (1.8 - 2 * share).clamp(min=0) * x)  # fmt: skip
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * draw(0.5, 1.4)
    angle = draw(-0.3, 0.3)  # Rodrigues: a turn about the grey axis
    x = x * angle.cos() + (x.roll(1, 1) - x.roll(-1, 1)) * angle.sin() / 3**0.5 + grey * (1 - angle.cos())
    return (x * draw(0.7, 1.1) + draw(-0.15, 0.1)).clamp(-1, 1)
