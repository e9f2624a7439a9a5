"""The problems by name, at the papers' settings; presets of ldm.evaluate."""

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn.functional import avg_pool2d, interpolate

from ldm.comparison import Task, run_best
from ldm.data.emoji import sample_emoji
from ldm.evaluate import main, read_settings
from ldm.images import save_image
from ldm.newton_sampler import newton_sampler
from ldm.nonlinear import NonlinearOperator
from ldm.operators import Mask
from ldm.presets import preset_words, presets
from ldm.problems import PROBLEMS, label, problem
from ldm.table import read_rows

PAPERS = ("sr4-average", "sr8-average", "box", "random70", "random92", "gaussian-blur", "motion-blur", "hdr", "phase-retrieval")


def image(side=256, channels=3):
    return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_masks_have_the_published_sizes():
    for name, unknown in (
        ("box", 128**2),
        ("random70", int(0.7 * 256**2)),
        ("random92", int(0.92 * 256**2)),
        ("half", 256**2 // 2),
    ):
        A = problem(name)[0](256)
        assert isinstance(A, Mask) and (A.mask == 0).sum() == unknown, name
    assert (problem("hole")[0](32).mask == 0).sum() == 14**2
    missing = problem("box")[0](256).mask[0, 0] == 0
    assert missing[64:192, 64:192].all()


def test_resampling_and_blur_are_the_published_ones():
    x = image()
    assert torch.allclose(problem("sr4-average")[0](256)(x), avg_pool2d(x, 4), atol=1e-6)
    for factor in (4, 8, 16):
        expected = interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)
        assert torch.allclose(problem(f"sr{factor}")[0](256)(x), expected, atol=1e-5)
    # Far from the edges, where a kernel of 61 pixels does not reach: DPS' is a Gaussian of std 3 in a window of that size.
    inside, expected = (slice(None), slice(None), slice(30, -30), slice(30, -30)), gaussian_filter(x.numpy(), (0, 0, 3, 3))
    assert torch.allclose(problem("gaussian-blur")[0](256)(x)[inside], torch.tensor(expected)[inside], atol=1e-3)


def test_motion_blur_has_a_kernel_of_61_pixels():
    A, point = problem("motion-blur")[0](256), torch.zeros(1, 1, 256, 256)
    point[..., 128, 128] = 1
    kernel = A(point)
    where = (kernel[0, 0].abs() > 1e-6).nonzero()
    assert abs(kernel.sum() - 1) < 1e-3 and kernel.min() > -1e-6
    assert where.min() >= 128 - 30 and where.max() <= 128 + 30 and len(where) > 20
    x, y = image(64), image(64, 1)
    A = problem("motion-blur")[0](64)
    assert torch.equal(A(x)[:, :1], A(x[:, :1])) and torch.equal(problem("motion-blur")[0](64)(y), A(y))  # the same kernel again
    assert abs((A(x) * x).sum() - (x * A.adjoint(x)).sum()) < 1e-4 * x.square().sum()


def test_names_noise_and_labels():
    assert [problem(name)[1] for name in ("half", "sr4", "sr4@0.05", "motion-blur", "motion-blur@0", "blur")] == [
        0,
        0,
        0.05,
        0.05,
        0,
        0.05,
    ]
    assert all(problem(name)[1] == 0.05 for name in PAPERS)
    assert label("sr4") == "x4 super-resolution" and label("sr16@0.1") == "x16 super-resolution, noise 0.1"
    assert label("hdr@0") == "high dynamic range, factor 2, noise 0"
    for wrong in ("deblur", "sr", "srx", ""):
        with pytest.raises(ValueError, match=f"task = '{wrong}': known are half, hole"):
            problem(wrong)
    for wrong in ("sr4@", "sr4@a", "box@-1", "box@nan"):
        with pytest.raises(ValueError, match=f"task = '{wrong}': after @ give the noise"):
            problem(wrong)


@pytest.mark.parametrize("name", PROBLEMS)
def test_tasks_know_what_they_are(name):
    """Linear or not, on pixels and on latents; a constraint that says how far a sample is from the measurement."""

    class Stage:
        encode = staticmethod(lambda x: x[:, :, ::4, ::4])
        decode = staticmethod(lambda z: z.repeat_interleave(4, 2).repeat_interleave(4, 3))

    class D:
        schedule = None

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels, latents = Task(name, images, D, (3, 64, 64)), Task(name, images, D, (3, 16, 16), Stage)
    nonlinear = isinstance(pixels.A, NonlinearOperator)
    assert pixels.linear != nonlinear and pixels.constraint().linear == pixels.linear
    assert latents.linear == (name in ("half", "hole", "strokes"))
    assert latents.constraint().through_decoder != latents.linear and (latents.encode is None) == latents.linear
    e, residual = pixels.constraint()(images)
    assert e.shape == images.shape
    assert torch.allclose(residual, torch.full((2,), pixels.sigma_y), atol=0.01)


def test_the_best_of_several_runs_counts(gaussian):
    images, cpu = 0.3 * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-3, 3), torch.device("cpu")
    task = Task("phase-retrieval", images, gaussian, (1, 8, 8))
    settings, singles = dict(steps=4, newton_steps=1), []
    for r in range(2):
        task.numbers = [1_000_000 * r + i for i in range(3)]
        singles.append(task.pixels.residual(run_best(task, newton_sampler, settings, 3, cpu, 1)[0]))
    task.numbers = [0, 1, 2]
    best, costs = run_best(task, newton_sampler, settings, 3, cpu, 2)
    assert torch.allclose(task.pixels.residual(best), torch.stack(singles).amin(0)) and not torch.equal(*singles)
    assert costs["nfe_forward"] == 2 * 12 and task.numbers == [0, 1, 2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, one in enumerate(sample_emoji()[0][:2]):
        save_image(one, tmp_path / f"images/{i}.png")
    return tmp_path / "images"


def test_presets_name_what_exists():
    assert presets() == ["daps", "daps-latent", "dps", "paper"]
    for name in presets():
        rows = [read_settings([*words, "data=."]) for words in preset_words(name)]
        assert len(rows) >= 12 and {row.model for row in rows} == {rows[0].model}
        assert all(row.runs == (4 if row.task == "phase-retrieval" else 1) for row in rows)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_runs(preset, folder, tmp_path):
    """On a shipped model, two images and three diffusion steps."""
    main(["--preset", preset, "--quick", f"data={folder}", "accelerator=cpu", "out=results"])
    rows, words = read_rows(tmp_path / "results/evaluate.csv"), preset_words(preset, quick=True)
    assert len(rows) == len(words) and all(float(row["residual"]) >= 0 and float(row["psnr"]) > 0 for row in rows)
    text = (tmp_path / "results/evaluate.md").read_text()
    assert all(f"## {label(row['task'])}" in text for row in rows)


def test_wrong_presets_are_one_sentence(folder, tmp_path):
    (tmp_path / "a.yaml").write_text("task: half")
    for preset, words in (
        ("dsp", "no such file, and known are daps, daps-latent, dps, paper"),
        ("a.yaml", "give a yaml file with common, tasks"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(["--preset", preset, f"data={folder}"])
