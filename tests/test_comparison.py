"""The core of the comparison: budgets, tasks, measures, and the table with its paired differences."""

import json
from types import SimpleNamespace

import compare
import compare_report
import compare_tune
import foreign
import pytest
import torch
from common import GaussianDenoiser, draw
from safetensors.torch import save_file

from ldm.checkpoints import load_model
from ldm.comparison import (
    METHODS,
    TASKS,
    EvaluationCounter,
    Task,
    intervals,
    run,
    step_memory,
    unconstrained,
)
from ldm.constraints import DecodedConstraint
from ldm.data.mnist import sample_digits
from ldm.denoisers import Denoiser
from ldm.metrics import alexnet_features, interval, judge_digits, kernel_distance, kernel_parts, kid, lpips_weights
from ldm.newton_sampler import PAPER
from ldm.sampling import DenoiserLike
from ldm.schedules import FlowSchedule
from ldm.table import COLUMNS, append_row, evaluations, in_table, put_row, read_rows

CPU = torch.device("cpu")
FLOWS = ["PnP-Flow", "FlowDPS", "FLAIR"]  # methods for rectified flows only
ALL = METHODS | {name: m for name, m in foreign.OTHERS.items() if name.split("-")[0] not in foreign.MISSING}


class Half(DenoiserLike):
    """The simplest D: x0 = x_t / 2."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, t):
        return x_t / 2


def digits(name, numbers=(0, 1)):
    return Task(name, sample_digits()[0][list(numbers)], SimpleNamespace(schedule=None), (1, 32, 32), numbers=numbers)


@pytest.fixture
def half_task(schedule):
    return lambda name, flow=False: Task(name, sample_digits()[0][:2], Half(FlowSchedule() if flow else schedule), (1, 32, 32))


@pytest.mark.parametrize("budget", [20, 44, 100, 1000])
def test_every_method_keeps_to_its_budget_and_uses_most_of_it(half_task, budget):
    task, flow = half_task("half"), half_task("half", flow=True)
    for name, method in (ALL if budget < 100 else METHODS).items():
        chosen = method(budget, flow if name in FLOWS else task)
        if chosen is None:
            assert name == "PSLD"
            continue
        sampler, settings = chosen
        settings |= dict(langevin_steps=1) if name == "DAPS" else {}  # they cost no evaluation of D
        costs = run(flow if name in FLOWS else task, sampler, settings, 2, CPU)[1]
        nfe = costs["nfe_forward"] + costs["nfe_backward"]
        least = 300 if name == "fast" and budget == 1000 else 11 if name == "RePaint" and budget == 20 else 0.77 * budget
        assert least <= nfe <= budget, (name, nfe)


def test_the_paper_s_loop_at_220_is_the_paper_s(half_task):
    assert METHODS["newton"](220, half_task("half"))[1] == PAPER["inpainting"]


def test_methods_apply_where_they_can(half_task):
    applies = lambda task: {name for name, method in ALL.items() if method(44, task)}  # noqa: E731
    assert set(ALL) - applies(half_task("half")) == {"PSLD", *FLOWS}
    assert set(ALL) - applies(half_task("half", flow=True)) == {"PSLD"} | {name for name in ALL if name.startswith("deepinv")}
    assert set(ALL) - applies(half_task("blur")) == {"PSLD", "RePaint", *FLOWS} | ({"azula-RePaint"} & set(ALL))
    left = {"newton", "newton-eta1", "fast", "gradient", "DPS", "PSLD", "LATINO", "ReSample", "SITCOM"}
    for flow in (False, True):
        task = half_task("sr4", flow)
        task.linear, task.first_stage, task.encode = False, SimpleNamespace(decode=lambda z: z), lambda x: x
        assert applies(task) == left | ({"azula-DPS", "azula-MMPS"} & set(ALL)) | ({"FlowDPS", "FLAIR"} if flow else set())


def test_newer_methods_have_their_papers_settings(half_task):
    """At the evaluations of the papers: DAPS-1K, 20 levels of SITCOM, ReSample's every tenth of 500, PnP-Flow's 100 steps of 5."""
    chosen = lambda name, n, task="half", flow=False: METHODS[name](n, half_task(task, flow))[1]  # noqa: E731
    assert chosen("DAPS", 1000) == dict(steps=200, ode_steps=5, lr=5e-5) and chosen("DAPS", 1000, "sparse")["lr"] == 1e-4
    assert chosen("SITCOM", 1000, "blur") == dict(
        steps=20, gradient_steps=24, lr=pytest.approx(0.025), tolerance=pytest.approx(0.051)
    )
    assert chosen("ReSample", 500)["every"] == 10 and chosen("ReSample", 44)["every"] == 1
    assert chosen("PnP-Flow", 496, flow=True) == dict(steps=124, samples=4, power=0.5)
    powers = dict(strokes=0.5, sr4=0.3, sparse=0.01, blur=0.01)
    assert {task: chosen("PnP-Flow", 100, task, flow=True)["power"] for task in powers} == powers
    weights = chosen("FLAIR", 50, flow=True)["weights"]
    assert len(weights) == 21 and weights[-1] == 0


@pytest.mark.parametrize("name", TASKS)
def test_an_image_is_measured_alike_wherever_it_stands(name):
    both, second = digits(name), digits(name, [1])
    assert torch.equal(both.y[1:], second.y)
    assert (both.sigma_y > 0) == (name == "blur")
    assert both.constraint(slice(1, 2)).y.shape == second.y.shape


def test_latent_tasks_are_put_on_latents_for_masks_only():
    stage = SimpleNamespace(encode=lambda x: x[:, :, ::4, ::4], decode=lambda z: z.repeat_interleave(4, 2).repeat_interleave(4, 3))
    D, images = SimpleNamespace(schedule=None), torch.rand(2, 3, 64, 64) * 2 - 1
    for name in TASKS:
        task = Task(name, images, D, (3, 16, 16), stage)
        assert task.linear == (name in ("half", "hole", "strokes"))
        assert isinstance(task.constraint(), DecodedConstraint) != task.linear
        assert task.noise == {"sigma_y": 0.05 if name == "blur" else 0.0}


def test_a_seed_is_an_image_s_own(gaussian):
    """In whatever batch, and counted from wherever."""
    D = GaussianDenoiser(gaussian.mean, gaussian.cov, gaussian.schedule)
    images = draw(gaussian, 5).clamp(-1, 1)
    task = lambda part, numbers=None: Task("half", images[part], D, (1, 8, 8), numbers=numbers)  # noqa: E731
    sampler, settings = METHODS["fast"](44, task(slice(None)))
    x, _ = run(task(slice(None)), sampler, settings, 2, CPU)
    assert torch.allclose(run(task(slice(None)), sampler, settings, 5, CPU)[0], x, atol=5e-3)
    assert torch.allclose(run(task([3, 1], [3, 1]), sampler, settings, 2, CPU)[0], x[[3, 1]], atol=5e-3)


def test_evaluations_are_counted_per_image(half_task):
    task = half_task("half")
    D = EvaluationCounter(task.D)
    x = torch.randn(3, 1, 32, 32, requires_grad=True)
    torch.autograd.grad(D(x, 5).sum(), x)
    D(x.detach(), 5)
    assert (D.forward, D.backward) == (6, 3)


def test_memory_of_a_step():
    """Of the paper's loop as of plain sampling to a tenth; of a gradient several times that."""
    model = load_model("mnist", device="cpu")
    task = Task("half", sample_digits()[0][:4], Denoiser(model.network, model.schedule, model.parameterization), (1, 32, 32))
    of = lambda name: step_memory(task, *METHODS[name](44, task), CPU)  # noqa: E731
    without = step_memory(task, unconstrained, dict(newton_steps=0), CPU)
    assert 0.1 < without < 3 and without <= of("newton") < 1.1 * without and of("DPS") > 3 * without


# ---- measures


def test_kid_of_all_images_is_torchmetrics_s():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 16, generator=generator), torch.randn(40, 16, generator=generator) + 0.3
    parts = kernel_parts(a, b)
    assert kid(parts) == pytest.approx(kernel_distance(a, b, subsets=1, subset_size=40)[0], rel=1e-4)
    assert kid(kernel_parts(a[:30], b)) == pytest.approx(kid(parts, torch.arange(30)))
    twice = torch.tensor([0, 0, 1, 2])  # image 0 is not paired with itself
    k = parts.within
    pairs = [k[i, j] for p, i in enumerate(twice) for q, j in enumerate(twice) if i != j]
    assert kid(parts, twice) == pytest.approx((sum(pairs) / len(pairs) - 2 * parts.across[twice].mean()).item() + parts.reference)


def test_the_interval_covers_the_mean_about_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        v = torch.randn(60, generator=generator)
        row = intervals({m: v for m in ("residual", "psnr", "ssim", "lpips", "accuracy")} | {"features": v[:, None]}, v[:, None])
        covered += row["psnr_low"] <= 0 <= row["psnr_high"]
    assert 88 <= covered <= 99
    assert interval(torch.tensor([float("nan"), *torch.linspace(0, 1, 101).tolist()])) == pytest.approx((0.025, 0.975))


def test_features_of_the_judges():
    classifier = load_model("mnist-classifier", device="cpu")
    images, labels = sample_digits()
    features, p = judge_digits(classifier, images, batch=30)
    with torch.no_grad():
        assert torch.allclose(p, classifier(images).softmax(1), atol=1e-5) and features.shape == (100, 128)
    assert (p.argmax(1) == labels).float().mean() > 0.97
    if lpips_weights():
        assert alexnet_features(torch.rand(3, 3, 64, 80) * 2 - 1, batch=2).shape == (3, 256)


# ---- the table


def row(task="half", method="fast", budget=44, images=4, seconds=1.0, **values):
    numbers = dict.fromkeys(COLUMNS[5:], 0.5) | dict(seconds=seconds, nfe_forward=float(budget), nfe_backward=0.0) | values
    return dict(model="m", task=task, method=method, budget=budget, images=images) | numbers


def test_rows_are_appended_found_and_removed_by_their_line(tmp_path):
    path = tmp_path / "compare.csv"
    assert read_rows(path) == [] and not in_table(path, dict(task="half"))
    append_row(path, row())
    append_row(path, row(method="newton-eta1", memory=None))
    assert [r["method"] for r in read_rows(path)] == ["fast", "newton-eta1"] and read_rows(path)[1]["memory"] == ""
    key = {k: row()[k] for k in ("model", "task", "method", "budget", "images")}
    assert in_table(path, key) and not in_table(path, key | dict(images=8)) and list(tmp_path.iterdir()) == [path]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    assert not in_table(path, key) and len(read_rows(path)) == 1


def test_rows_of_an_older_table_stay(tmp_path):
    path = tmp_path / "compare.csv"
    path.write_text("model,task,method,budget,images,psnr\nm,half,DPS,44,4,20\n")
    append_row(path, row())
    assert [(r["method"], r["psnr"], r["memory"]) for r in read_rows(path)] == [("DPS", "20", ""), ("fast", "0.5", "0.5")]


def test_the_report_takes_the_most_images_and_pairs_what_both_have(tmp_path):
    """`fast` at 44 against the paper at 220, on the images of both, DPS at equal time and at its dearest, and DDNM at 44."""
    kept = tmp_path / "kept"
    kept.mkdir()
    cost = {("fast", 44): 1.0, ("newton", 220): 5.0, ("newton-tuned", 220): 5.0}
    cost |= {("DDNM", 44): 0.4, ("DDNM", 100): 1.0, ("DPS", 20): 0.5, ("DPS", 44): 0.9, ("DPS", 100): 2.0, ("DPS", 220): 3.0}
    table = [row(method="fast", images=2, psnr=9.0), *(row(method=m, budget=b, seconds=s, images=4 if m == "fast" else 6)
                                                      for (m, b), s in cost.items())]  # fmt: skip
    for r in table:
        append_row(tmp_path / "compare.csv", r)
        n = r["images"]
        better = torch.full((n,), 1.0 if r["method"] == "fast" else 0.0)
        save_file({compare_report.name_of(r): (better + torch.arange(n)).repeat(5, 1).half()}, compare.file_of(kept, r))
    images = compare.gathered(tmp_path / "compare.csv", kept)
    compare_report.report(read_rows(tmp_path / "compare.csv"), "m", SimpleNamespace(features="some features"), tmp_path, images)
    text = (tmp_path / "compare-m.md").read_text()
    assert "# m, 4 to 6 images" in text and "| fast | 4 |" in text and "| fast | 2 |" not in text
    against_paper, against_others = text.split("## fast ")[1:]
    assert "newton, tuned: 220, 5.000 s | 4 |" in against_paper
    assert "newton: 220, 5.000 s | 4 | +1 [+1, +1] worse | +1 [+1, +1] better" in against_paper  # RMSE, PSNR
    assert "DPS: 44, 0.900 s | 4" in against_others and "DPS: 220, 3.000 s | 4" in against_others
    assert "DDNM: 44, 0.400 s | 4" in against_others and "DDNM: 100" not in against_others
    assert "DPS: 20," not in against_others and "DPS: 100" not in against_others
    assert all((tmp_path / f"compare-m{end}.png").is_file() for end in ("", "-seconds", "-ranking"))
    assert not list(kept.iterdir())  # what has been gathered stays, as long as its row does
    (tmp_path / "compare.csv").unlink()
    append_row(tmp_path / "compare.csv", table[0])
    assert list(compare.gathered(tmp_path / "compare.csv", kept)) == [compare_report.name_of(table[0])]


def test_every_method_has_its_place_in_the_figure():
    placed = [m for _, methods in compare_report.FAMILIES.values() for m in methods]
    assert sorted(placed) == sorted([*METHODS, *foreign.OTHERS])
    assert set(placed) == set(compare_report.COLOURS) and set(placed) <= set(compare_report.LABELS)
    assert set(compare_report.BACK_PROPAGATING) <= set(placed)
    assert len(compare_report.LINES) <= 6
    of = [compare_report.plain(m) for methods, _ in compare_report.LINES.values() for m in methods]
    assert set(of) == set(placed) - {"newton-eta1"}  # a tuned setting has the first


def test_a_tuned_method_has_the_best_setting_of_its_task_and_budget_and_as_many_evaluations(tmp_path, half_task):
    task, flow, path = half_task("half"), half_task("half", flow=True), tmp_path / compare_tune.FILE
    for i, setting in enumerate(compare_tune.GRIDS["DPS"]):
        for budget in (44, 100):
            row = dict(model="m", task="half", method="DPS", budget=budget, images=2, setting=json.dumps(setting))
            compare_tune.csv_rows.append(path, row | dict(lpips=abs(i - budget / 20)), compare_tune.COLUMNS)
    tuned = compare_tune.tuned(path, "m")["DPS-tuned"]
    assert tuned(44, task)[1] == dict(steps=22) | compare_tune.GRIDS["DPS"][2]
    assert tuned(100, task)[1] == dict(steps=50) | compare_tune.GRIDS["DPS"][5]
    assert tuned(20, task) is None and compare_tune.tuned(path, "other")["DPS-tuned"](44, task) is None
    for name, settings in compare_tune.GRIDS.items():
        assert len(settings) == 12 and len({json.dumps(s) for s in settings}) == 12
        method = compare_tune.METHODS_HERE[name]
        if name == "PSLD":  # through a decoder only
            continue
        for setting in settings[::3]:
            sampler, chosen = compare_tune.with_setting(method, 44, flow if name in FLOWS else task, setting)
            chosen |= dict(langevin_steps=1) if name == "DAPS" else {}  # they cost no evaluation of D
            _, costs = run(flow if name in FLOWS else task, sampler, chosen, 2, CPU)
            assert 36 <= costs["nfe_forward"] + costs["nfe_backward"] <= 44, (name, chosen)


@pytest.mark.parametrize("options, words", [
    (["--budgets", "10"], "--budgets 10: give 20 to 1000"), (["--images", "1"], "--images 1: give a number from 2 to 1000"),
    (["--models", "tiny", "--images", "200"], "from 2 to 128 for tiny"),
    (["--workers", "2", "--seconds", "8"], "leave --workers out"), (["--tasks", "deblur"], "invalid choice: 'deblur'"),
])  # fmt: skip
def test_wrong_arguments_are_one_sentence(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        compare.main(options)
    assert words in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(foreign, "MISSING", ["azula"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        compare.main(["--methods", "azula-MMPS"])
    assert "--methods azula-MMPS: azula not installed (pip install azula)" in capsys.readouterr().err


def test_the_quick_mode_writes_its_table_and_goes_on(digits_folder, monkeypatch):
    monkeypatch.chdir(digits_folder)
    out = digits_folder / "outputs/compare-quick"
    for again in (False, True):  # the second time there is nothing left to do
        if again:
            monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("sampled again"))
        compare.main(["--quick", "--methods", "fast", "DDNM", "--data", str(digits_folder), "--device", "cpu"])
        table = read_rows(out / "compare.csv")
        assert len(table) == 2 * 2 * 2 and all(float(r["residual"]) < 0.02 for r in table if r["method"] == "fast")
    assert "x4 super-resolution" in (out / "compare-mnist.md").read_text() and (out / "compare-mnist.png").is_file()


def test_workers_share_the_rows_and_seconds_are_filled_in(digits_folder, monkeypatch):
    monkeypatch.chdir(digits_folder)
    options = ["--tasks", "half", "--methods", "fast", "DDNM", "--images", "2", "--data", str(digits_folder), "--device", "cpu"]
    compare.main([*options, "--budgets", "44", "20", "--workers", "2", "--out", "shared"])
    path = digits_folder / "shared/compare.csv"
    table = read_rows(path)
    assert sorted((r["method"], r["budget"]) for r in table) == [(m, b) for m in ("DDNM", "fast") for b in ("20", "44")]
    for r in table:
        put_row(path, r | dict(seconds=None) if r["method"] == "fast" else r)
    compare.main([*options, "--seconds", "2", "--out", "shared"])
    filled = {(r["method"], r["budget"]): r for r in read_rows(path)}
    assert all(filled[key]["seconds"] == r["seconds"] for r in table if (key := (r["method"], r["budget"]))[0] == "DDNM")
    per_evaluation = {float(r["seconds"]) / evaluations(r) for (m, _), r in filled.items() if m == "fast"}
    assert min(per_evaluation) == pytest.approx(max(per_evaluation), rel=1e-3) and min(per_evaluation) > 0


def test_a_row_that_fails_stops_no_other(tmp_path, capsys):
    path, make = tmp_path / "compare.csv", lambda: 1 / 0
    assert not compare.work(path, tmp_path, row(method="DPS"), make) and "ZeroDivisionError" in capsys.readouterr().err
    assert compare.work(path, tmp_path, row(), row) and compare.work(path, tmp_path, row(), make)  # the second: taken already
    assert [r["method"] for r in read_rows(path)] == ["fast"]
