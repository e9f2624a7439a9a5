"""Constrained sampling from pre-trained diffusion models by inexact Newton steps: forward passes only.

Graikos, Jojic, Samaras, "Fast constrained sampling in pre-trained diffusion models", NeurIPS 2025, arXiv 2410.18804.

    from ldm import LatentDenoiser, latent_inpainting, load_model, sample

What most people use can be imported from here. It is found in its module when it is first asked for, so that `import ldm` itself
takes no time. A function that has its module's name (`newton_sampler`) wins: `from ldm.newton_sampler import ...` still works.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # the table below once more, for type checkers and editors; a test compares the two
    from ldm.checkpoints import load_model as load_model
    from ldm.constraints import LinearConstraint as LinearConstraint
    from ldm.constraints import latent_inpainting as latent_inpainting
    from ldm.denoisers import Denoiser as Denoiser
    from ldm.denoisers import LatentDenoiser as LatentDenoiser
    from ldm.diffusers_models import from_diffusers as from_diffusers
    from ldm.fast_sampler import fast_sampler as fast_sampler
    from ldm.images import load_image as load_image
    from ldm.images import save_image as save_image
    from ldm.inpainting import blend as blend
    from ldm.inpainting import make_mask as make_mask
    from ldm.newton_sampler import newton_sampler as newton_sampler
    from ldm.newton_sampler import sample as sample
    from ldm.show import show as show
    from ldm.util import resolve_device as resolve_device

EXPORTS = {  # name: its module
    "Denoiser": "denoisers",
    "LatentDenoiser": "denoisers",
    "LinearConstraint": "constraints",
    "blend": "inpainting",
    "fast_sampler": "fast_sampler",
    "from_diffusers": "diffusers_models",
    "latent_inpainting": "constraints",
    "load_image": "images",
    "load_model": "checkpoints",
    "make_mask": "inpainting",
    "newton_sampler": "newton_sampler",
    "resolve_device": "util",
    "sample": "newton_sampler",
    "save_image": "images",
    "show": "show",
}


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"ldm.{EXPORTS[name]}"), name)
    except ModuleNotFoundError as error:
        advice = "`pip install '.[all]'` in the repository's folder installs all that it can use"
        raise ModuleNotFoundError(f"ldm.{name} needs {error.name}, which is not installed: {advice}", name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *EXPORTS})


class _Package(ModuleType):
    """Python binds each imported module to its package. A module does not take the place of the function of its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
