"""Other people's implementations on our networks: azula (probabilists/azula) and deepinv, as further methods of compare.py.

Each is a generator of `State` with the arguments of ldm/baselines.py and the package's own defaults. Here is only what stands
between two interfaces: D and its schedule as theirs, our operator as theirs, and their random numbers from one generator per
sample, so that samples never mix and begin at the same noise as with the other methods. Both come with requirements.txt.

Left out, with the reason:
    azula JFPS              needs a covariance of the images
    azula TDS               a population of particles for each image, weighted against each other
    deepinv MMPS            its conjugate gradients stop by a tolerance: no fixed number of evaluations (azula's has one)
    deepinv on latents      DiffPIR and DPS clip x0 to [-1, 1], as images are; latents are not
    through a decoder       all but DPS and MMPS: they need a linear A (RePaint: a mask; DDRM: singular values)
"""

from importlib.util import find_spec
from itertools import pairwise

import torch
from torch.overrides import TorchFunctionMode

from ldm.comparison import NO_DECODER, ONLY_MASKS, Method, is_flow
from ldm.operators import Mask
from ldm.sampling import CountedDenoiser, State, forward_differentiable, seeded_noise
from ldm.schedules import CLEAN

LEAST_NOISE = 1e-3  # standard deviation that stands for noise-free measurements: their formulas divide by it

# ---- azula: everything as vectors [B, D], which its linear solvers ask for


def azula(kind):
    """A method of azula.guidance by its name here: a sampler with the arguments of ldm/baselines.py.

    "DPS"      one forward and one backward evaluation of D per step
    "PGDM"     the same
    "TMPD"     one and two
    "MMPS"     one and 1 + `iterations` (GMRES, default 1)
    "DiffPIR"  one forward evaluation; one GMRES iteration on A
    "RePaint"  `iterations` forward evaluations (default 3)

    The levels are ours; the steps between them ancestral (DDPM), but DDIM for PGDM and RePaint, as azula's classes have them.
    """

    def sampler(D, constraint, shape, seeds, steps, sigma_y=0.0, device="cpu", dtype=torch.float32, **settings):
        D, noise = CountedDenoiser(D), Noise(shape, seeds, device, dtype)
        make = _azula_samplers()[kind]
        vectors = [lambda x: x.view(shape), lambda x: x.flatten(1)]
        run = make(_azula_denoiser(D, *vectors), constraint, *_vector_measurement(constraint, *vectors), sigma_y, **settings)
        x, levels = noise.draw().flatten(1), D.schedule.levels(steps)
        times = torch.tensor([-1.0 if level is CLEAN else level.t for level in levels], dtype=torch.float64)
        for i, (t, s) in enumerate(pairwise(times)):
            with noise, torch.inference_mode(False), forward_differentiable():
                x = run.step(x, t, s).detach()
            yield State(i + 1, t.item(), x.view(shape), x.view(shape), None, D.calls)

    return sampler


def _vector_measurement(constraint, image, vector):
    """y [B, M], A and A^+ on vectors."""
    pixels = constraint.pixels if constraint.through_decoder else constraint
    decode = constraint.decode if constraint.through_decoder else lambda x: x
    y = pixels.A.measured(pixels.y)
    A = lambda x: vector(pixels.A(decode(image(x))))  # noqa: E731
    return vector(y), A, lambda v: vector(pixels.A.pseudo_inverse(v.view(y.shape)))


def _azula_denoiser(D, image, vector):
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import Schedule

    class Levels(Schedule):
        def __call__(self, t):
            level = CLEAN if t < 0 else D.schedule.level(t.item())
            alpha = max(level.alpha, 1e-3)  # a flow begins at 0, which their formulas divide by
            return tuple(torch.tensor(v, dtype=torch.float64) for v in (alpha, level.sigma))

    class Wrapped(Denoiser):
        schedule = Levels()

        def forward(self, x_t, t):
            return DiracPosterior(vector(D(image(x_t), t.item())))

    return Wrapped()


def _azula_samplers():
    from azula import guidance
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler

    class DPS(guidance.DPSSampler):
        """azula takes the norm of y - A(x0) over the whole batch; by this step size it is that of each sample: a batch of one."""

        @property
        def zeta(self):
            return self._zeta * self.norms.norm() / self.norms.clamp_min(1e-12)

        @zeta.setter
        def zeta(self, value):
            self._zeta, A = value, self.A

            def remembering(x):
                out = A(x)
                self.norms = (self.y - out).detach().norm(dim=1, keepdim=True)
                return out

            self.A = remembering

    variance = lambda sigma_y: torch.tensor(max(sigma_y, LEAST_NOISE) ** 2)  # noqa: E731
    covariance = lambda sigma_y: IsotropicCovariance(variance(sigma_y))  # noqa: E731
    return {
        "DPS": lambda d, c, y, A, A_inv, s, **k: DPS(d, y, A, **k),
        "PGDM": lambda d, c, y, A, A_inv, s, **k: guidance.PGDMSampler(d, y, A, A_inv, **k),
        "TMPD": lambda d, c, y, A, A_inv, s, **k: DDPMSampler(guidance.TMPDenoiser(d, y, A, variance(s), **k)),
        "MMPS": lambda d, c, y, A, A_inv, s, **k: DDPMSampler(guidance.MMPSDenoiser(d, y, A, covariance(s), **k)),
        "DiffPIR": lambda d, c, y, A, A_inv, s, **k: DDPMSampler(guidance.DiffPIRDenoiser(d, y, A, variance(s), **k)),
        "RePaint": lambda d, c, y, A, A_inv, s, **k: guidance.RePaintSampler(d, y, A(torch.ones_like(y)) > 0, **k),
    }


# ---- deepinv: images in [0, 1], noise levels as sigma / alpha in the same units, operators by their singular values


def deepinv(kind):
    """A method of deepinv.sampling by its name here: a sampler with the arguments of ldm/baselines.py, for LinearConstraint.

    "DPS"      one forward and one backward evaluation of D per step; with "annealed" guidance, which the default weight of 1 is
               meant for (with deepinv's default guidance, that weight hardly guides at all: tests/test_foreign.py)
    "PiGDM"    the same, in deepinv's PosteriorDiffusion with the same levels and ancestral steps as its DPS; never compiled, since
               torch.compile, met inside the torch.func.vjp that it uses, gives up a network for good
    "DiffPIR"  one forward evaluation per step
    "DDRM"     the same

    The levels are deepinv's own (those of Ho et al. 2020); D is asked at the nearest level of its schedule. Everything is float32
    (DPS and PiGDM: float64 between the evaluations), and there is one State, at the end.
    """

    def sampler(D, constraint, shape, seeds, steps, sigma_y=0.0, device="cpu", dtype=torch.float32, **settings):
        D, noise = CountedDenoiser(D), Noise(shape, seeds, device, dtype)
        sigma_y = max(sigma_y, LEAST_NOISE) / 2
        y = (constraint.A.measured(constraint.y).float() + constraint.A(torch.ones(shape, device=device))) / 2
        run = _deepinv_samplers(_deepinv_denoiser(D), steps, sigma_y, device, settings)[kind]()
        physics = _physics(constraint.A, shape, sigma_y, device)
        stance = torch.compiler.set_stance("force_eager" if kind == "PiGDM" else "default")
        with noise, stance, torch.inference_mode(False), torch.no_grad():
            x = (2 * run(y, physics) - 1).to(dtype)
        yield State(steps, 0, x, x, constraint.residual(x), D.calls)

    return sampler


def _deepinv_denoiser(D):
    from deepinv.models import Denoiser

    levels = D.schedule.levels(min(len(D.schedule), 1000))[:-1]
    ratios = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64).log()

    class Wrapped(Denoiser):
        def forward(self, x, sigma, *args, **kwargs):
            sigma = torch.as_tensor(sigma, dtype=torch.float64).flatten()[0].clamp_min(1e-12)
            level = levels[(ratios - (2 * sigma).log()).abs().argmin()]
            return (D(level.alpha * (2 * x - 1), level.t) + 1) / 2

    return Wrapped()


def _physics(A, shape, sigma_y, device):
    """deepinv's operator with singular values: a mask's are itself; of R x C^T, those of R and C are known."""
    import deepinv as dinv

    noise = dinv.physics.GaussianNoise(sigma_y)
    if isinstance(A, Mask):
        mask = A.mask.float().expand(1, *shape[1:])
        return dinv.physics.DecomposablePhysics(mask=mask, noise_model=noise, device=device)
    (U, s, Vt), (U2, s2, V2t) = (torch.linalg.svd(m.double()) for m in (A.rows, A.columns))
    U, Vt, U2, V2t = (m.to(device, torch.float32) for m in (U, Vt, U2, V2t))
    (H, W), (h, w) = shape[2:], (len(U), len(U2))
    values = torch.zeros(1, *shape[1:], device=device)
    values[..., : len(s), : len(s2)] = torch.outer(s, s2).to(values)
    return dinv.physics.DecomposablePhysics(
        U=lambda z: U @ z[..., :h, :w] @ U2.T,
        U_adjoint=lambda y: torch.nn.functional.pad(U.T @ y @ U2, (0, W - w, 0, H - h)),
        V=lambda z: Vt.T @ z @ V2t, V_adjoint=lambda x: Vt @ x @ V2t.T,
        mask=values, noise_model=noise, device=device)  # fmt: skip


def _deepinv_samplers(denoiser, steps, sigma_y, device, settings):
    import deepinv as dinv

    def pigdm():
        s = dinv.sampling
        times = torch.linspace(1, 0, steps + 1, device=device, dtype=torch.float64)
        return s.PosteriorDiffusion(
            s.PiGDMDataFidelity(**settings), denoiser, s.VariancePreservingDiffusion(alpha=1.0, device=device),
            s.DDPMSolver(times), device=device)  # fmt: skip

    return {
        "DPS": lambda: dinv.sampling.DPS(
            denoiser, num_steps=steps + 1, device=device, **{"guidance": "annealed"} | settings),
        "PiGDM": pigdm,
        "DiffPIR": lambda: dinv.sampling.DiffPIR(
            denoiser, dinv.optim.data_fidelity.L2(), sigma=sigma_y, max_iter=steps, device=device, **settings),
        "DDRM": lambda: dinv.sampling.DDRM(denoiser, sigmas=torch.linspace(1, 0, steps).tolist(), **settings),
    }  # fmt: skip


# ---- what both need


class Noise(TorchFunctionMode):
    """Inside `with Noise(...)`, whatever draws normal numbers of a batch draws sample i from its own generator with seeds[i]."""

    def __init__(self, shape, seeds, device, dtype):
        super().__init__()
        self.draw = seeded_noise(shape, seeds, device, dtype)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.randn, torch.randn_like, torch.Tensor.normal_):
            return self.draw().to(out).view(out.shape)
        return out


ONLY_PIXELS = "only diffusion models of pixels", lambda task: task.linear and task.first_stage is None and not is_flow(task)
OTHERS = {
    method.name: method
    for method in (
        Method("azula-DPS", azula("DPS"), lambda n, task: dict(steps=n // 2), label="azula DPS"),
        Method("azula-PGDM", azula("PGDM"), lambda n, task: dict(steps=n // 2), NO_DECODER, "azula PGDM"),
        Method("azula-TMPD", azula("TMPD"), lambda n, task: dict(steps=n // 3, **task.noise), NO_DECODER, "azula TMPD"),
        Method("azula-MMPS", azula("MMPS"), lambda n, task: dict(steps=n // 3, sigma_y=task.sigma_y), label="azula MMPS"),
        Method("azula-DiffPIR", azula("DiffPIR"), lambda n, task: dict(steps=n, **task.noise), NO_DECODER, "azula DiffPIR"),
        Method("azula-RePaint", azula("RePaint"), lambda n, task: dict(steps=n // 3), ONLY_MASKS, "azula RePaint"),
        Method("deepinv-DPS", deepinv("DPS"), lambda n, task: dict(steps=n // 2, **task.noise), ONLY_PIXELS, "deepinv DPS"),
        Method("deepinv-PiGDM", deepinv("PiGDM"), lambda n, task: dict(steps=n // 2, **task.noise), ONLY_PIXELS, "deepinv PiGDM"),
        Method("deepinv-DiffPIR", deepinv("DiffPIR"), lambda n, task: dict(steps=n, **task.noise), ONLY_PIXELS, "deepinv DiffPIR"),
        Method("deepinv-DDRM", deepinv("DDRM"), lambda n, task: dict(steps=n, **task.noise), ONLY_PIXELS, "deepinv DDRM"),
    )
}
MISSING = [package for package in ("azula", "deepinv") if find_spec(package) is None]
