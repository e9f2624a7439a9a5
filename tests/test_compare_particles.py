"""The benchmark of particles on images: its two measures, and an interrupted run goes on."""

import compare_particles as bench
import pytest
import torch

from ldm.metrics import bootstrap


def test_crps_is_lowest_for_exact_samples_and_spread_is_unbiased():
    """Truths of N(0, 1), 4 samples each: the CRPS of N(0, 1) is 1 / sqrt(pi) = .564, that of N(0, s^2) and N(b, 1) is larger."""
    g = torch.Generator().manual_seed(0)
    truth, x = torch.randn(64, 1, 16, 16, generator=g), torch.randn(64, 4, 1, 16, 16, generator=g)
    pairs = (x[:, :, None] - x[:, None]).abs().flatten(3).mean(3).sum((1, 2)) / 12  # mean |x_i - x_j|, i != j
    direct = (x - truth[:, None]).abs().flatten(1).mean(1) - pairs / 2
    assert torch.allclose(bench.crps(x, truth), direct, atol=1e-5)
    exact = bench.crps(x, truth).mean()
    assert abs(exact - torch.pi**-0.5) < 0.02
    assert all(bench.crps(other, truth).mean() > exact + 0.02 for other in (0.5 * x, 2 * x, x + 0.5))
    assert abs(bench.spread(x).square().mean() - 1) < 0.02 and bench.spread(x[:, :1].repeat(1, 4, 1, 1, 1)).max() == 0


def test_intervals_are_over_images_and_differences_paired():
    ours, theirs = torch.rand(8).double(), torch.rand(6).double()
    row = bench.row_of(dict(psnr=ours), dict(psnr=theirs))
    assert row["psnr"] == ours.mean() and abs(row["psnr_minus"] - (ours[:6] - theirs).mean()) < 1e-12
    assert row["psnr_low"] == torch.quantile(ours[bootstrap(8)].mean(1), 0.025)
    assert "psnr_minus" not in bench.row_of(dict(psnr=ours), None)


def test_rows_are_made_once_and_compared_with_fast(digits_folder, monkeypatch):
    monkeypatch.chdir(digits_folder)
    arguments = "--tasks sr4 --budgets 8 --images 2 --samples 2 --device cpu --out out --data".split() + [str(digits_folder)]
    bench.main(arguments)
    rows = bench.read(digits_folder / "out/compare_particles.csv")
    assert [row["method"] for row in rows] == ["fast", "particles-4", "weighted-4"]
    assert all(float(row["nfe"]) <= 8 for row in rows) and float(rows[1]["spread"]) > float(rows[2]["spread"]) >= 0
    assert rows[0]["lpips_minus"] == "" and float(rows[1]["psnr_minus_low"]) <= float(rows[1]["psnr_minus_high"])
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("sampled again"))
    bench.main(arguments)
    assert "minus fast" in (digits_folder / "out/compare_particles.md").read_text()
    with pytest.raises(SystemExit):
        bench.main(["--samples", "1"])
