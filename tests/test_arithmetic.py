"""Jacobian products in the arithmetic that a network really has, on `tiny`: |J e - exact| <= 0.05 |exact| for every default.

TF32 exists on GPUs only. Here it is simulated: the operands of convolutions and matrix products are rounded to 10 bits,
unless the precision is set to "ieee", which is what the denoiser does.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.checkpoints import load_model
from ldm.constraints import latent_inpainting
from ldm.data.emoji import sample_emoji
from ldm.denoisers import LatentDenoiser, full_precision
from ldm.masks import make_mask
from ldm.sampling import ARITHMETIC, jvp, seeded_noise

TIMES = (900, 500, 100)


class SimulatedTF32(TorchDispatchMode):
    CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)
    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default)

    def __init__(self):
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        rooms = {self.CONVOLUTIONS: torch.backends.cudnn.conv, self.PRODUCTS: torch.backends.cuda.matmul}
        for functions, room in rooms.items():
            if func in functions and room.fp32_precision != "ieee":
                self.rounded += 1
                args = [self.round(a) if torch.is_tensor(a) else a for a in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def round(x):
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)  # to nearest, ties to even


@pytest.fixture(scope="module")
def point():
    """(captions, error directions and x_t for each time) of two held-out emoji, the exact J e in float64."""
    model = load_model("tiny", device="cpu")
    images, captions = (x[:2] for x in sample_emoji())
    constraint = latent_inpainting(model, images, make_mask("right", (64, 64)))
    z = model.encode(images)
    D, exact = LatentDenoiser(model.double(), captions, guidance=3.0), {}
    for t in TIMES:
        _, alpha, sigma = D.schedule.level(t)
        x_t = (alpha * z + sigma * seeded_noise(z.shape, (t, t + 1))()).double()
        e = constraint(D(x_t, t).float())[0].double()
        exact[t] = x_t, e, jvp(D, x_t, t, e, mode="forward-ad")
    return captions, exact


def errors(D, exact):
    found = {}
    for t, (x_t, e, wanted) in exact.items():
        product = jvp(D, x_t.float(), t, e.float()).double()
        found[t] = ((product - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max().item()
    return found


class AsOnCuda(LatentDenoiser):
    """What D would say of itself on a GPU."""

    @property
    def arithmetic(self):
        return "tf32" if self.tf32 else super().arithmetic


@pytest.mark.parametrize("tf32", [False, True])
def test_the_defaults_under_tf32(point, tf32):
    captions, exact = point
    D = AsOnCuda(load_model("tiny", device="cpu"), captions, guidance=3.0, tf32=tf32)
    with SimulatedTF32() as mode:
        found = errors(D, exact)
    assert (mode.rounded > 0) == tf32  # the denoiser turns TF32 off, unless it is asked for
    assert ARITHMETIC[D.arithmetic].mode == ("forward-ad" if tf32 else "difference")
    assert max(found.values()) <= 0.05, found


def test_differences_drown_in_tf32(point):
    """Why the denoiser turns it off: with h = 0.005 the error is of the size of J e, and the simulation shows it."""
    captions, exact = point
    D = AsOnCuda(load_model("tiny", device="cpu"), captions, guidance=3.0, tf32=True)
    with SimulatedTF32():
        for t in (900, 100):
            x_t, e, wanted = exact[t]
            product = jvp(D, x_t.float(), t, e.float(), h=0.005, mode="difference").double()
            assert (product - wanted).norm() > 0.2 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_defaults_by_the_weights_dtype(point, dtype):
    captions, exact = point
    D = LatentDenoiser(load_model("tiny", device="cpu", dtype=dtype), captions, guidance=3.0)
    assert D.arithmetic == str(dtype).removeprefix("torch.")
    found = errors(D, exact)
    assert max(found.values()) <= 0.05, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_the_defaults_on_a_gpu(point, dtype, tf32):
    captions, exact = point
    D = LatentDenoiser(load_model("tiny", device="cuda", dtype=dtype), captions, guidance=3.0, tf32=tf32)
    found = errors(D, {t: tuple(x.cuda() for x in values) for t, values in exact.items()})
    assert max(found.values()) <= 0.05, found


def test_full_precision_leaves_everything_as_it_was():
    rooms = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [room.fp32_precision for room in rooms]
    with pytest.raises(KeyError), full_precision():
        assert {room.fp32_precision for room in rooms} == {"ieee"}
        raise KeyError
    assert [room.fp32_precision for room in rooms] == before
    assert torch.backends.cudnn.allow_tf32 in (True, False)  # the older way to ask still answers


def test_equal_prompts_take_no_doubled_batch(point):
    sizes = []
    model = load_model("tiny", device="cpu")
    model.network.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    x = torch.zeros(2, 4, 16, 16)
    for prompt, guidance, negative in (("", 3.0, None), ("a cat", 3.0, "a cat"), ("a cat", 1.0, None), ("a cat", 3.0, None)):
        LatentDenoiser(model, prompt, guidance, negative)(x, 500)
    assert sizes == [2, 2, 2, 4]
