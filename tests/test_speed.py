"""What is about machines: compiled, half-precision and graph-captured runs give the same as the plain one, and memory that ends is
one sentence."""

import re

import pytest
import torch
from pipelines import build, denoiser
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.checkpoints import load_model
from ldm.constraints import latent_inpainting
from ldm.data.emoji import sample_emoji
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.diffusers_models import from_diffusers
from ldm.fast_sampler import fast_sampler
from ldm.inpainting import make_mask
from ldm.newton_sampler import newton_sampler, sample
from ldm.sampling import H, _differentiates_any_group_norm, jvp

PROMPTS = ["hedgehog", "penguin"]
SHAPE = (2, 4, 16, 16)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


def problem(model, guidance=3.0, device="cpu"):
    """(D, constraint): the right half of two images is missing."""
    images = sample_emoji()[0][6:8].to(device)
    constraint = latent_inpainting(model, images, make_mask("right", (64, 64)).to(device))
    return LatentDenoiser(model, PROMPTS, guidance), constraint


def x_t(device="cpu", seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(device)


def runs(D, constraint, device="cpu", **options):
    """The ends of the paper's loop, cut to two diffusion steps, and of the fast solver, cut to six."""
    common = dict(shape=SHAPE, seeds=[0, 1], device=device, **options)
    *_, last = fast_sampler(D, constraint, steps=6, **common)
    return sample(D, constraint, steps=2, **common), last


def relative(a, b):
    return ((a.cpu() - b.cpu()).norm() / b.cpu().norm()).item()


# ---------------------------------------------------------------------------------------------------- compiled


def test_compiled_runs_agree_and_nothing_is_compiled_again(tiny):
    """Traced by dynamo, whose guards decide on recompilation; run by the backend that needs no C compiler."""
    torch.compiler.reset()  # what other tests compiled of the same code counts for its limits
    D, constraint = problem(tiny)
    plain = runs(D, constraint)
    with torch.inference_mode():
        x0 = D(x_t(), 500)
    D.compile(backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(D(x_t(), 500), x0, rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = runs(D, constraint)  # other times, inner steps and probes
        other = LatentDenoiser(tiny, ["taco", "violin"], guidance=2.0).compile(backend="aot_eager", fullgraph=True)
        with torch.inference_mode():
            other(x_t(), 300)
            with pytest.raises(RuntimeError, match="[Rr]ecompil"):  # the proof that this test can fail
                D(x_t()[..., :8], 500)
    for a, b in zip(compiled, plain, strict=True):
        assert a.nfe == b.nfe and relative(a.x_t, b.x_t) < 1e-4


@pytest.mark.slow
def test_compiled_by_inductor(tiny):
    """Rounding differs in the sixth digit, and differences of length h = .005 magnify it: D to 1e-4, whole runs to 2e-2."""
    D, constraint = problem(tiny)
    with torch.inference_mode():
        x0 = D(x_t(), 500)
    plain = runs(D, constraint)
    D.compile()
    with torch.inference_mode():
        torch.testing.assert_close(D(x_t(), 500), x0, rtol=1e-4, atol=1e-4)
    for a, b in zip(runs(D, constraint), plain, strict=True):
        assert a.nfe == b.nfe and relative(a.x_t, b.x_t) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_differentiation_of_a_compiled_network(dtype):
    D, v = problem(load_model("tiny", device="cpu", dtype=dtype))[0], x_t(seed=1)
    exact = jvp(D, x_t(), 500, v, mode="forward-ad")
    D.compile(backend="aot_eager")
    rounding = {} if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(jvp(D, x_t(), 500, v, mode="forward-ad"), exact, **rounding)


def test_a_result_is_not_overwritten_by_the_next(schedule, monkeypatch):
    """A CUDA graph writes each result to the same memory; here a stand-in for one does."""
    memory = torch.empty(1, 1, 4, 4)
    monkeypatch.setattr(torch, "compile", lambda network, **_: lambda x, t: memory.copy_(network(x, t)))
    D = Denoiser(lambda x, t: 2 * x, schedule, "x0").compile(mode="reduce-overhead")
    x0 = D(torch.ones(1, 1, 4, 4), 500)
    D(torch.zeros(1, 1, 4, 4), 500)
    assert (x0 == 2).all()


# ---------------------------------------------------------------------------------------------------- half precision


def agrees(half, tiny, device):
    """Half precision against float32: D to 3 %; J e by forward-mode differentiation to 5 %, by differences of the length h that the
    dtype needs to a cosine of 0.9; whole runs by the former to 8 % (paper's loop) and 15 % (fast solver). NFE are the same."""
    (D, constraint), (D_half, _) = problem(tiny, device=device), problem(half, device=device)
    x, dtype = x_t(device), next(half.parameters()).dtype
    with torch.inference_mode():
        x0, x0_half = D(x, 500), D_half(x, 500)
        e = constraint(x0)[0]
        exact, rounded = (jvp(d, x, 500, e, mode="forward-ad") for d in (D, D_half))
        difference = jvp(D_half, x, 500, e, x0_half, h=H[dtype])
    assert relative(x0_half, x0) < 0.03 and relative(rounded, exact) < 0.05
    assert torch.cosine_similarity(difference.flatten(1), exact.flatten(1)).min() > 0.9
    plain, lower = (runs(d, constraint, device, mode="forward-ad") for d in (D, D_half))
    for a, b, tolerance in zip(lower, plain, (0.08, 0.15), strict=True):
        assert a.nfe == b.nfe and relative(a.x_t, b.x_t) < tolerance


def test_bf16_agrees_with_fp32(tiny):
    agrees(load_model("tiny", device="cpu", dtype=torch.bfloat16), tiny, "cpu")


# ---------------------------------------------------------------------------------------------------- memory

MESSAGES = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
            RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory")]  # fmt: skip


def failing(error):
    def network(*_):
        raise error

    return network


@pytest.mark.parametrize("error", MESSAGES, ids=lambda e: str(e)[:12])
def test_memory_that_ends_is_one_sentence(schedule, error):
    D = Denoiser(failing(error), schedule)
    with pytest.raises(MemoryError, match=r"x_t of shape \[1, 4, 8, 8\] is too much for the memory of cpu.* D.tile\(size\)") as e:
        sample(D, None, (1, 4, 8, 8), [0])
    assert "\n" not in str(e.value)


def test_a_tensor_that_really_does_not_fit(schedule):
    with pytest.raises(MemoryError, match="fewer samples"):
        sample(Denoiser(lambda x, t: torch.empty(2**50), schedule), None, (1, 4, 8, 8), [0])


def test_the_autoencoder_asks_for_tiles(tiny, monkeypatch):
    monkeypatch.setattr(tiny.first_stage_model, "_decode", failing(MESSAGES[0]))
    with pytest.raises(MemoryError, match=r"\[2, 4, 16, 16\] is too much for the autoencoder.*first_stage_model.tile\(\)"):
        tiny.decode(x_t())


def test_other_errors_stay_what_they_are(schedule):
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("context is missing")):
        with pytest.raises(type(error), match=re.escape(str(error))):
            Denoiser(failing(error), schedule)(torch.zeros(1, 4, 8, 8), 500)


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["tiny", "sd", "sdxl", "sd3", "flux"])
def test_forward_mode_in_half_precision_on_a_pretended_gpu(family, dtype, monkeypatch):
    """The dtypes of every operation as on a GPU, by tensors without data. There the norms' tangents are float32 by themselves."""
    if family == "tiny":
        model = load_model("tiny", device="cpu", dtype=dtype)
        D = LatentDenoiser(model, PROMPTS, guidance=3.0)
        modules = [model]
    else:
        pipe = build(family)
        modules = [module.to(dtype) for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
        D = denoiser(from_diffusers(pipe, size=(16, 16)))
    _differentiates_any_group_norm()  # by real tensors
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            torch.nn.Module.to(module, "cuda")
        D.condition, D.negative = D.condition.to("cuda"), D.negative.to("cuda")
        x = torch.zeros(2, 4, 8, 8, device="cuda")
        product = jvp(D, x, 500, x, mode="forward-ad")
    assert D.arithmetic == str(dtype).removeprefix("torch.")
    assert (product.device.type, product.dtype, product.shape) == ("cuda", torch.float32, x.shape)


@pytest.fixture
def cuda_tiny(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return load_model("tiny", device="cuda")


@pytest.mark.gpu
def test_cuda_graphs_agree(cuda_tiny):
    D, constraint = problem(cuda_tiny, device="cuda")
    x = x_t("cuda")
    with torch.inference_mode():
        x0 = D(x, 500)
    plain = runs(D, constraint, device="cuda")
    D.compile(mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(3):  # plainly, recorded, replayed
            torch.testing.assert_close(D(x, 500), x0, rtol=1e-4, atol=1e-4)
        first = D(x, 500)
        D(x, 200)
        torch.testing.assert_close(first, x0, rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        captured = runs(D, constraint, device="cuda")
    for a, b in zip(captured, plain, strict=True):
        assert a.nfe == b.nfe and relative(a.x_t, b.x_t) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(cuda_tiny, dtype):
    agrees(load_model("tiny", device="cuda", dtype=dtype), cuda_tiny, "cuda")


@pytest.mark.gpu
def test_the_host_waits_once_per_run_or_step(cuda_tiny):
    """CUDA's own alarm: the fast solver waits at its end only, the paper's loop once per diffusion step, for the check of NaN."""
    D, constraint = problem(cuda_tiny, device="cuda")
    runs(D, constraint, device="cuda")  # what is done once
    states = fast_sampler(D, constraint, SHAPE, [0, 1], steps=6, device="cuda")
    paper = newton_sampler(D, constraint, SHAPE, [0, 1], steps=2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(states)
        with pytest.raises(RuntimeError, match="synchron"):
            next(paper)
    finally:
        torch.cuda.set_sync_debug_mode("default")
