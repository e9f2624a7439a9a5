"""The old place of ldm/fast_sampler.py, for one more version."""

from ldm.util import moved

__getattr__ = moved("ldm.solver", "ldm.fast_sampler", "fast_sampler steps_for gcr max_norm")
