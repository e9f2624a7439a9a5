"""Settings that depend on the model and the task: step sizes, guidance, number of samples, prompts, CLIP block. One table for all.

model = load_model(model_name)
p = profile(model, "inpainting", steps=None, lr=0.2)      # None: from the table; anything else wins
D = denoiser(model, p.prompts, p.guidance)
state = sample(D, constraint, shape, p.seeds, **p.sampler)
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.newton_sampler import PAPER
from ldm.parameters import numbers, samples
from ldm.sampling import check_eta
from ldm.schedules import DiffusionSchedule

SMALL = 128  # models of fewer pixels a side are of the kind "tiny"
PHRASES = ("a lighthouse on a cliff", "a fox in the forest", "a bowl of fruit", "an old bicycle")
NAMES = ("red apple", "dog face", "rocket", "house with garden", "tiger face", "strawberry", "octopus", "soccer ball")


@dataclass(frozen=True)
class Kind:
    """What a kind of model needs, whatever the task."""

    samples: int  # of one's own image, unless prompts or seeds say how many
    batch: int = 1  # samples at once where the decoder's gradient is taken, on a card of 24 GB (SDXL, SD3 and Flux in 16 bits)
    guidance: float = 1.0  # classifier-free guidance s; the paper's w is s - 1
    text: bool = True  # whether the model takes prompts
    clip: str = "openai"  # whose features are the style
    subjects: tuple[str, ...] = PHRASES  # prompts for style that the model can draw


KINDS = {
    "tiny": Kind(samples=4, batch=16, guidance=3.0, clip="tiny-clip", subjects=NAMES),
    "tiny-flow": Kind(samples=4, batch=16, guidance=3.0, clip="tiny-clip", subjects=NAMES),
    "sd-v1": Kind(samples=1, guidance=3.0),
    "sd-v2": Kind(samples=1, guidance=3.0),
    "sdxl": Kind(samples=1, guidance=5.0),
    "sd3": Kind(samples=1, guidance=5.0),
    "flux": Kind(samples=1, guidance=1.0),  # guidance is an input of its network
    "ldm": Kind(samples=4, text=False),  # latent diffusion without text
    "pixels": Kind(samples=4, batch=4, text=False),
    "mnist": Kind(samples=16, batch=64, text=False, clip="tiny-clip"),
}
BLOCK = 2  # of CLIP, the paper's

# Where another setting than the paper's was measured to be better: (kind, task).
OWN: dict[tuple[str, str], dict[str, Any]] = {
    # With the paper's the reference drowns the small model's prompt, and where D is still a blur its guidance makes confetti.
    ("tiny", "style"): dict(lr=(0.15, 0.04), free=0.3, enough=0.5),
    ("tiny-flow", "style"): dict(lr=(0.1, 0.03), free=0.3, enough=0.5),
    # LPIPS of the right half of 24 unseen drawings with their names as prompts: .133 at 1.5, .148 at 2, .153 at 3; no prompt: .151.
    ("tiny", "inpainting"): dict(guidance=1.5),
    ("tiny-flow", "inpainting"): dict(lr=(0.5, 0.05)),
}


@dataclass(frozen=True)
class Profile:
    """The settings of one model for one task."""

    kind: str  # a key of KINDS
    task: str  # a key of ldm.newton_sampler.PAPER
    size: int  # side of the model's images in pixels
    prompts: list[str]  # one per sample
    seeds: list[int]  # one per sample
    batch: int
    guidance: float
    steps: int
    newton_steps: int
    lr: float | tuple[float, ...]
    eta: float | str
    clip: str
    block: int
    free: float  # style: fraction of the diffusion steps, the first ones, without guidance; 0 in the paper
    enough: float  # style: fraction of the unguided loss at which a sample rests; 0 in the paper

    @property
    def parts(self) -> list[slice]:
        """The samples in portions of `batch`."""
        return [slice(i, i + self.batch) for i in range(0, len(self.seeds), self.batch)]

    @property
    def sampler(self) -> dict[str, Any]:
        """The keyword arguments of `newton_sampler`: steps, newton_steps, lr and eta."""
        return {name: value for name, value in asdict(self).items() if name in ("steps", "newton_steps", "lr", "eta")}


def profile(
    model: Any,
    task: str,
    prompts: str | Sequence[str] | None = None,
    seeds: int | str | Sequence[int] | None = None,
    count: int | None = None,
    words: Sequence[str] | None = None,
    **given: Any,
) -> Profile:
    """The settings for `model` (of `load_model` or `from_diffusers`) and `task`, a key of PAPER: "inpainting", "super-resolution",
    "style" or "convergence".

    prompts, seeds  as `ldm.parameters.samples` takes them
    words           prompts of example images, one each, which count where prompts is None; None: for style the kind's subjects,
                    otherwise no words
    count           how many samples there are; None: as many as prompts or seeds in a list, otherwise as words, of which there are
                    several, otherwise the kind's number
    given           batch, guidance, steps, newton_steps, lr, eta, clip, block, free, enough: None is the table's value, anything
                    else wins

    The step sizes are the paper's (PAPER), but for those in OWN. A flow has no betas to make the paper's noise of: eta = 0.
    ValueError for another task or setting.
    """
    if task not in PAPER:
        raise ValueError(f"task = {task!r}: known are {', '.join(map(repr, PAPER))}")
    if unknown := set(given) - {f.name for f in fields(Profile)[5:]}:
        raise ValueError(f"{', '.join(sorted(unknown))}: a profile has {', '.join(f.name for f in fields(Profile)[5:])}")
    name = kind_of(model)
    kind = KINDS[name]
    default = {key: value for key, value in PAPER[task].items() if key != "h"}
    default |= dict(batch=kind.batch, guidance=1.0 if task == "super-resolution" else kind.guidance, clip=kind.clip, block=BLOCK)
    default |= dict(free=0.0, enough=0.0) | OWN.get((name, task), {})
    if not isinstance(model.schedule, DiffusionSchedule):
        default["eta"] = 0.0
    settings = default | {key: value for key, value in given.items() if value is not None}
    settings["lr"] = numbers(settings["lr"])
    check_eta(settings["eta"])
    for key in ("free", "enough"):
        if not 0 <= settings[key] < 1:
            raise ValueError(f"{key} = {settings[key]}: give a fraction, from 0 to less than 1")
    if words is None:
        words = list(kind.subjects) if task == "style" and kind.text and prompts is None else [""]
    texts, seeds = samples(prompts, seeds, count, len(words) if len(words) > 1 else kind.samples)
    if prompts is None and kind.text:
        texts = [words[i % len(words)] for i in range(len(seeds))]
    return Profile(name, task, model.image_size * model.downsampling, texts, seeds, **settings)


def denoiser(
    model: Any, prompts: str | Sequence[str] = "", guidance: float = 1.0, negative_prompts: str | Sequence[str] | None = None
) -> Denoiser:
    """D of a model for prompts (one per sample, or one for all), or of an unconditional one, for which they are all empty."""
    if model.conditional:
        return LatentDenoiser(model, prompts, guidance, negative_prompts)
    if any([prompts] if isinstance(prompts, str) else prompts):
        raise ValueError(f"prompts = {prompts!r}: this model is unconditional, leave them out")
    return Denoiser(model.network, model.schedule, model.parameterization, model)


def kind_of(model: Any) -> str:
    """The key of KINDS that a model belongs to, by its class, its size and the width of its text."""
    size = model.image_size * model.downsampling
    if isinstance(model, LatentDiffusion):
        from ldm.modules.encoders.modules import TextEncoder  # takes a second to import

        if not isinstance(model.cond_stage_model, TextEncoder):
            return "ldm"
        width = model.unet.context_dim
    elif isinstance(model, DDPM):
        return "mnist" if model.channels == 1 else "pixels"
    else:
        from ldm import diffusers_models as families  # of which the model is

        if isinstance(model, families.Pixels):
            return "mnist" if model.channels == 1 else "pixels"
        guided = "flux" if type(model.pipeline).__name__ == "Flux2Pipeline" else "sd3"  # by its input, or by us
        classes = {families.StableDiffusionXL: "sdxl", families.StableDiffusion3: "sd3", families.Flux: "flux",
                   families.TextToImage: guided}  # fmt: skip
        if size >= SMALL and type(model) in classes:
            return classes[type(model)]
        width = 0 if type(model) in classes else model.net.config.cross_attention_dim
    if size < SMALL:
        return "tiny-flow" if model.parameterization == "velocity" else "tiny"
    return "sd-v2" if width == 1024 else "sd-v1"
