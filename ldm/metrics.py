"""Measures of picture and sample quality: thin over torchmetrics and lpips."""

import functools
import warnings
from pathlib import Path

import lpips
import torch
from safetensors.torch import load_file
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.util import ROOT


def psnr(x, reference):
    """Peak signal-to-noise ratio in dB of pictures x [B, C, H, W] in [-1, 1] (clipped to it), against the reference. [B]"""
    return peak_signal_noise_ratio(*_unit_range(x, reference), data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(x, reference):
    """Structural similarity (Wang et al. 2004: Gaussian window, std 1.5) of pictures in [-1, 1], 1 if equal. [B]"""
    return structural_similarity_index_measure(*_unit_range(x, reference), data_range=1.0, reduction="none")


def lpips_distance(x, reference):
    """LPIPS (Zhang et al. 2018, version 0.1, AlexNet) of pictures x [B, 3, H, W] in [-1, 1] against the reference, 0 if equal. [B]

    FileNotFoundError, with the command that fetches them, where AlexNet's weights are missing.
    """
    x, reference = (images.detach().float().clamp(-1, 1) for images in (x, reference))
    with torch.no_grad():
        return _lpips(x.device)(x, reference).flatten()


def lpips_weights():
    """The path of AlexNet's weights, data/lpips/alexnet.safetensors here or in the repository; None where they are missing."""
    candidates = [folder / "data/lpips/alexnet.safetensors" for folder in (Path(), ROOT)]
    return next((path for path in candidates if path.is_file()), None)


def kernel_distance(features, reference, subsets=100, subset_size=1000, seed=0):
    """Kernel distance (KID, Binkowski et al. 2018: unbiased MMD^2, kernel (x.y/d + 1)^3) between two sets of features.

    features [N, d], reference [M, d] of any network. Means over `subsets` random subsets of `subset_size` (at most N, M) of each.
    Returns (mean, standard deviation over the subsets), floats; near 0 (and then of either sign) for equal distributions.
    """
    subset_size = min(subset_size, len(features), len(reference))
    metric = KernelInceptionDistance(_Precomputed(features.shape[1]), subsets=subsets, subset_size=subset_size)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchmetrics draws the subsets from the global generator
        mean, std = metric.compute()
    return mean.item(), std.item()


@functools.lru_cache(maxsize=1)
def _lpips(device):
    path = lpips_weights()
    if path is None:
        raise FileNotFoundError("LPIPS needs AlexNet's weights, data/lpips/alexnet.safetensors: `python -m ldm.data.alexnet` "
                                "(make data-lpips) fetches them, 64 MB")
    with warnings.catch_warnings():  # of torchvision, about how lpips calls it
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # its calibrated weights come with the package
    layers = {index: layer for part in network.net.children() for index, layer in part.named_children()}
    for name, tensor in load_file(path).items():
        _, index, kind = name.split(".")
        getattr(layers[index], kind).data.copy_(tensor)
    return network.to(device).requires_grad_(False)


def _unit_range(*images):
    return [(x.detach().float().clamp(-1, 1) + 1) / 2 for x in images]


class _Precomputed(torch.nn.Module):
    """What torchmetrics takes for a feature network where the features are given."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features
