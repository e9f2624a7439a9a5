"""The noise levels of diffusers' schedulers, from their configs, for the single steps of our sampler: DDIM and Euler.

A multistep solver would carry a history from before a constraint's step. The steps end at the clean image (alpha 1, sigma 0), as
diffusers does with set_alpha_to_one.
"""

import copy

import diffusers
import torch

from ldm.denoisers import PREDICTIONS
from ldm.schedules import CLEAN, DiffusionSchedule, FlowSchedule, make_beta_schedule

# Schedulers of one and the same diffusion, x_t = alpha_t x_0 + sigma_t eps with trained betas, by the solvers they bring along.
DIFFUSION_SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler",
)  # fmt: skip
# Of models that were distilled to a few steps: they know only the times that these take.
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names: ours
REVERSED = "-velocity"  # x0 - eps: the sign of InstaFlow and of Liu et al. 2023, against eps - x0 of SD3, Flux and FlowSchedule


class PipelineSchedule(DiffusionSchedule):
    """The betas of a pipeline's scheduler, visited at the times that diffusers' DDIMScheduler takes by its config; with a scheduler
    of few-step models at that scheduler's own times."""

    def __init__(self, scheduler):
        super().__init__(exact_betas(scheduler))
        if type(scheduler).__name__ in FEW_STEP_SCHEDULERS:
            self.grid, self.most = copy.deepcopy(scheduler), scheduler.config.original_inference_steps
            self.resolution = self.most
        else:
            spacing = {name: scheduler.config[name] for name in ("timestep_spacing", "steps_offset") if name in scheduler.config}
            self.grid, self.most = diffusers.DDIMScheduler(len(self), **spacing), len(self)

    def levels(self, steps):
        """The steps + 1 levels that a sampler visits, noisy to clean; the last one is `CLEAN`."""
        if int(steps) != steps or not 1 <= steps <= self.most:
            raise ValueError(f"steps = {steps}: give an integer from 1 to {self.most}, the number of training steps")
        self.grid.set_timesteps(int(steps))
        return [self.level(min(t, len(self) - 1)) for t in self.grid.timesteps.tolist()[:steps]] + [CLEAN]


def exact_betas(scheduler):
    """Its betas [T], which are float32; in float64 where they come from a formula, as everywhere here."""
    config, formulas = scheduler.config, {"scaled_linear": "linear", "linear": "sqrt_linear"}  # diffusers' names: ours
    if config.beta_schedule in formulas:
        exact = make_beta_schedule(formulas[config.beta_schedule], len(scheduler.betas), config.beta_start, config.beta_end)
        if torch.allclose(exact.float(), scheduler.betas, rtol=1e-4, atol=0):  # neither trained_betas nor rescaled ones
            return exact
    return scheduler.betas


class PipelineFlowSchedule(FlowSchedule):
    """The flow of a scheduler with flow's sigmas, at those that set_timesteps(scheduler, steps) sets it to."""

    def __init__(self, scheduler, set_timesteps):
        super().__init__(scale=scheduler.config.num_train_timesteps)
        self.scheduler, self.set_timesteps = copy.deepcopy(scheduler), set_timesteps

    def levels(self, steps):
        """The steps + 1 levels that a sampler visits, noisy to clean; the last one is `CLEAN`."""
        if int(steps) != steps or steps < 1:
            raise ValueError(f"steps = {steps}: give a positive integer")
        self.set_timesteps(self.scheduler, int(steps))
        return [self.level(min(self.scale * s, self.scale)) for s in self.scheduler.sigmas.tolist()[:-1]] + [CLEAN]


def dynamic_shift(config, tokens):
    """mu of Esser et al. 2024, linear in the number of tokens; None where the config's shift is fixed."""
    if not config.get("use_dynamic_shifting"):
        return None
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (most - base) * (tokens - first) / (last - first)


def is_flow(scheduler):
    """Whether its noise levels are those of a flow, by its class or its config."""
    flow_sigmas = scheduler.config.get("use_flow_sigmas") and scheduler.config.prediction_type == "flow_prediction"
    return type(scheduler).__name__ == FLOW_SCHEDULER or bool(flow_sigmas)


def read_scheduler(scheduler, prediction, set_timesteps):
    """(schedule, what the network predicts by the names of ldm.denoisers, whether its sign is the reverse).

    prediction     instead of the config's, or None
    set_timesteps  of a flow, see PipelineFlowSchedule

    ValueError, naming it, for what is not supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in (FLOW_SCHEDULER, *FEW_STEP_SCHEDULERS, *DIFFUSION_SCHEDULERS):
        known = ", ".join((FLOW_SCHEDULER, *FEW_STEP_SCHEDULERS, *DIFFUSION_SCHEDULERS))
        raise ValueError(f"scheduler {name} is not supported; known are {known}")
    if prediction is not None and prediction not in (*PREDICTIONS, REVERSED):
        raise ValueError(f"prediction = {prediction!r}: known are {', '.join(map(repr, (*PREDICTIONS, REVERSED)))}")
    flow = is_flow(scheduler)
    velocity = (prediction or "velocity" if flow else prediction) in ("velocity", REVERSED)
    if flow:
        if not velocity:
            raise ValueError(f"prediction = {prediction!r}: with {name} it is 'velocity' or {REVERSED!r}")
        for option in ("invert_sigmas", "stochastic_sampling"):
            if config.get(option):
                raise ValueError(f"{option} = {config[option]!r} in the config of {name} is not supported")
        return PipelineFlowSchedule(scheduler, set_timesteps), "velocity", prediction == REVERSED
    if velocity:  # a rectified flow made of a diffusion model, whose scheduler is a relic
        return FlowSchedule(scale=config.num_train_timesteps), "velocity", prediction == REVERSED
    if prediction is None and config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type = {config.prediction_type!r} in the config of {name} is not supported; known are "
            f"{', '.join(map(repr, PREDICTION_TYPES))}"
        )
    return PipelineSchedule(scheduler), prediction or PREDICTION_TYPES[config.prediction_type], False
