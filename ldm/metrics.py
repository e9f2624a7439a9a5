"""Measures of sample quality: thin over torchmetrics."""

import torch
from torchmetrics.image.kid import KernelInceptionDistance


class _Precomputed(torch.nn.Module):
    """What torchmetrics takes for a feature network where the features are given."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


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
