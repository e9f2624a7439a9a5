"""Losses of what an image shows, functions x0 [B, ...] -> [B] for `ldm.constraints.LossConstraint`."""

import torch

from ldm.images import check_image


def gram(tokens):
    """Gram matrix of features over the places of an image (Gatys et al. 2016): F^T F / N, tokens F [B, N, C] -> [B, C, C]."""
    return tokens.transpose(1, 2) @ tokens / tokens.shape[1]


def gram_distance(features, decode, reference):
    """The loss |G(features(decode(x0))) - G(features(reference))|_F, Frobenius norm of the difference of Gram matrices. A function
    x0 [B, ...] -> [B] for LossConstraint: style guidance.

    features: images in [-1, 1] -> tokens [B, N, C], such as `ldm.clip.ClipVision`; reference: [B or 1, 3, H, W].
    """
    with torch.no_grad():
        wanted = gram(features(check_image(reference, "reference")))

    def loss(x0):
        if len(wanted) not in (1, len(x0)):
            raise ValueError(f"reference has {len(wanted)} images, but x0 has {len(x0)} samples: give one for each, or one for all")
        return torch.linalg.matrix_norm(gram(features(decode(x0))) - wanted)

    return loss
