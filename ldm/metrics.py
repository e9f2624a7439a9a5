"""Image and sample quality by torchmetrics and lpips, the features that they are measured in, and bootstrap intervals."""

import functools
import warnings
from pathlib import Path
from typing import NamedTuple

import lpips
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.images import to_uint8
from ldm.models.classifier import DigitClassifier
from ldm.util import ROOT

INCEPTION_LAYER = "2048"  # the usual one: the last pooling


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images x [B, C, H, W] in [-1, 1] (clipped to it), against the reference. [B]"""
    return peak_signal_noise_ratio(*_unit_range(x, reference), data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(x: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004: Gaussian window, std 1.5) of images in [-1, 1], 1 if equal. [B]"""
    return structural_similarity_index_measure(*_unit_range(x, reference), data_range=1.0, reduction="none")


def lpips_distance(x: Tensor, reference: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018, version 0.1, AlexNet) of images x [B, 3, H, W] in [-1, 1] against the reference, 0 if equal. [B]

    FileNotFoundError, with the command that fetches them, where AlexNet's weights are missing.
    """
    x, reference = (images.detach().float().clamp(-1, 1) for images in (x, reference))
    with torch.no_grad():
        return lpips_loss(x, reference)


def lpips_loss(x: Tensor, reference: Tensor) -> Tensor:
    """`lpips_distance` with its gradient, of images that are not clipped. [B]"""
    return _lpips(x.device)(x, reference).flatten()


def confusion(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts of pixels [B, K, K] by the class in labels (rows) and the one that was found (columns), both [B, H, W]."""
    pairs = (labels * classes + found).flatten(1)
    return torch.stack([pair.bincount(minlength=classes**2) for pair in pairs]).view(-1, classes, classes)


def mean_iou(confusion: Tensor) -> Tensor:
    """Intersection over union, the mean over the classes that the labels have: [..., K, K] -> [...]."""
    both, labels, found = confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)
    there = labels > 0
    return (both / (labels + found - both).clamp_min(1) * there).sum(-1) / there.sum(-1).clamp_min(1)


def lpips_weights() -> Path | None:
    """The path of AlexNet's weights, data/lpips/alexnet.safetensors here or in the repository; None where they are missing."""
    candidates = [folder / "data/lpips/alexnet.safetensors" for folder in (Path(), ROOT)]
    return next((path for path in candidates if path.is_file()), None)


def kernel_distance(
    features: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
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


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance (FID, Heusel et al. 2017) between normal distributions fitted to features [N, d] and reference [M, d], which
    are large for few images; NaN for fewer than two."""
    if min(len(features), len(reference)) < 2:
        return float("nan")
    metric = FrechetInceptionDistance(_Precomputed(features.shape[1]))
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute().item()


class KernelParts(NamedTuple):
    """The terms of the kernel distance, so that a bootstrap need not compute the kernels again."""

    within: Tensor  # [N, N] kernels between the features
    across: Tensor  # [N] mean kernel to the reference
    reference: float  # mean kernel between different images of the reference


def kernel_parts(features: Tensor, reference: Tensor) -> KernelParts:
    """KernelParts of features [N, d] and reference [M, d], float64: the kernel of `kernel_distance`, of all images at once."""
    return KernelParts(_kernel(features, features), _kernel(features, reference).mean(1), _kernel_within(reference))


def kid(parts: KernelParts, index: Tensor | None = None) -> float:
    """Kernel distance (unbiased MMD^2) of the images `index` [n], all if None. An image that was drawn more than once is
    not paired with itself."""
    index = torch.arange(len(parts.across)) if index is None else index
    other = index[:, None] != index
    within = (parts.within[index][:, index] * other).sum() / other.sum()
    return (within - 2 * parts.across[index].mean()).item() + parts.reference


def bootstrap(n: int, draws: int = 1000, seed: int = 0) -> Tensor:
    """Indices [draws, n] of n images drawn with replacement; the same for all methods, so that differences are paired."""
    return torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))


def interval(samples: Tensor) -> tuple[float, float]:
    """The 95 % percentile interval (low, high) of bootstrap samples [draws]; samples that are NaN (the KID of one image,
    drawn again and again) are left out."""
    low, high = torch.nanquantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@torch.inference_mode()
def judge_digits(
    classifier: DigitClassifier, images: Tensor, device: str | torch.device = "cpu", batch: int = 500
) -> tuple[Tensor, Tensor]:
    """Features [N, 128] and class probabilities [N, 10] of digits [N, 1, 32, 32] in [-1, 1] by the shipped classifier, which is on
    `device`; the results are on the CPU."""
    features = torch.cat([classifier.features(x.to(device)).cpu() for x in images.split(batch)])
    head = classifier.head
    return features, torch.nn.functional.linear(features, head.weight.cpu(), head.bias.cpu()).softmax(1)


@torch.inference_mode()
def alexnet_features(images: Tensor, batch: int = 64) -> Tensor:
    """Features [N, 256] of images [N, 3, H, W] in [-1, 1], at least 64 x 64, on the CPU: AlexNet's last convolution, averaged
    over positions. FileNotFoundError as in `lpips_distance`."""
    network = _lpips(images.device)
    means = [network.net(network.scaling_layer(x.clamp(-1, 1)))[-1].mean((2, 3)).cpu() for x in images.float().split(batch)]
    return torch.cat(means)


@torch.inference_mode()
def inception_features(images: Tensor, weights: Path, batch: int = 64) -> Tensor:
    """Features [N, 2048] of images [N, 1 or 3, H, W] in [-1, 1], on the CPU, by torch-fidelity's Inception v3 for FID. weights: its
    file, weights-inception-2015-12-05-6726825d.pth. ValueError where it or the package is missing."""
    network = _inception(weights, images.device)
    parts = to_uint8(images).split(batch)
    return torch.cat([network(x.expand(-1, 3, -1, -1).to(images.device)).cpu() for x in parts])


@functools.lru_cache(maxsize=1)
def _inception(weights, device):
    try:
        torch.load(weights, weights_only=True, map_location="meta")  # what follows would execute what is in the file
        network = NoTrainInceptionV3("inception-v3-compat", [INCEPTION_LAYER], str(weights))
    except ModuleNotFoundError:
        raise ValueError("inception needs torch-fidelity: pip install 'ldm[compare]'") from None
    except Exception as error:
        name = "weights-inception-2015-12-05-6726825d.pth"
        raise ValueError(f"inception = {weights} is not the weights of FID's Inception v3, torch-fidelity's {name}: "
                         f"{str(error).splitlines()[0]}") from None  # fmt: skip
    return network.to(device)


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)  # built once, whoever asks first: a training's gradient has to pass it later
def _lpips(device):
    path = lpips_weights()
    if path is None:
        raise FileNotFoundError(
            "LPIPS needs AlexNet's weights, data/lpips/alexnet.safetensors: `python -m ldm.data.alexnet` "
            "(make data-lpips) fetches them, 64 MB"
        )
    with warnings.catch_warnings():  # of torchvision, about how lpips calls it
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # its calibrated weights come with the package
    layers = {index: layer for part in network.net.children() for index, layer in part.named_children()}
    for name, tensor in load_file(path).items():
        _, index, kind = name.split(".")
        layers[index].get_parameter(kind).data.copy_(tensor)
    return network.to(device).requires_grad_(False)


def _kernel(a, b):
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


@functools.lru_cache(maxsize=2)
def _kernel_within(reference):
    kernels, m = _kernel(reference, reference), len(reference)
    return ((kernels.sum() - kernels.diagonal().sum()) / (m * (m - 1))).item()


def _unit_range(*images):
    return [(x.detach().float().clamp(-1, 1) + 1) / 2 for x in images]


class _Precomputed(torch.nn.Module):
    """What torchmetrics takes for a feature network where the features are given."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features
