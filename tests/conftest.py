import pytest
from common import smooth_gaussian

from ldm.schedules import DiffusionSchedule, make_beta_schedule


@pytest.fixture
def schedule():
    return DiffusionSchedule(make_beta_schedule("sqrt_linear", 1000))


@pytest.fixture
def gaussian(schedule):
    return smooth_gaussian(schedule)
