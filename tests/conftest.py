import pytest
from common import PIXELS, randomised, smooth_gaussian

from ldm.data.mnist import sample_digits
from ldm.schedules import DiffusionSchedule, make_beta_schedule
from ldm.util import instantiate_from_config


@pytest.fixture
def schedule():
    return DiffusionSchedule(make_beta_schedule("sqrt_linear", 1000))


@pytest.fixture
def gaussian(schedule):
    return smooth_gaussian(schedule)


@pytest.fixture
def pixels():
    """A small pixel model at random weights."""
    return randomised(instantiate_from_config(PIXELS))


@pytest.fixture
def digits_folder(tmp_path):
    """MNIST's files, filled with the repository's digits again and again; those for training are empty."""
    images, labels = sample_digits()
    images = ((images[:, 0, 2:30, 2:30] + 1) * 127.5).round().byte().repeat(11, 1, 1)
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, data in (("images-idx3", images), ("labels-idx1", labels.byte().repeat(11))):
        head = bytes([0, 0, 8, data.ndim]) + b"".join(n.to_bytes(4, "big") for n in data.shape)
        (raw / f"t10k-{part}-ubyte").write_bytes(head + data.numpy().tobytes())
        (raw / f"train-{part}-ubyte").touch()
    return tmp_path
