import pytest
from common import PIXELS, randomised, smooth_gaussian

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
