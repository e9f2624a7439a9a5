"""The benchmark of known posteriors: exact draws pass it, and an interrupted run goes on."""

import posterior
import pytest
import torch
from common import matrix

from ldm.comparison import Method
from ldm.mixture import Mixture, sliced_wasserstein
from ldm.sampling import State


def oracle(D, constraint, shape, seeds, noise, exact):
    """A "method" that draws from the posterior."""
    x = exact.sample(shape[0], torch.Generator().manual_seed(9)).view(shape).float()
    yield State(1, 0, x, x, None, 0)


def test_the_problems_are_cardoso_s():
    for d_y in (1, 2, 4):
        problem, exact = posterior.mixture_problem(8, d_y, 3)
        A = problem.A.rows
        assert A.shape == (d_y, 8) and torch.linalg.svdvals(A).max() <= 1 and 0 < problem.sigma_y <= posterior.SCALE
        assert sorted(set((problem.D.prior.means / posterior.SCALE).round().flatten().tolist())) == [-16, -8, 0, 8, 16]
        y, s = problem.y.flatten(), problem.sigma_y
        x = exact.sample(4000, torch.Generator().manual_seed(0))
        expected = exact.weights @ (exact.means @ A.T - y).square() + (A @ exact.cov @ A.T).diagonal()
        assert torch.allclose((x @ A.T - y).square().mean(0), expected, rtol=0.2) and s > 0


def test_exact_draws_score_as_exact_draws():
    problem, exact = posterior.mixture_problem(8, 2, 0)
    method = Method("oracle", oracle, lambda n, task: dict(exact=exact))
    x, forward, backward = problem.sample(method, 10, 1024, 0)
    truth, other = (exact.sample(1024, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert sliced_wasserstein(x, truth) < 2 * sliced_wasserstein(other, truth) and (forward, backward) == (0, 0)


def test_quick_runs_go_on_where_they_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--quick", "--parts", "mixture", "--methods", "particles-16", "fast", "DPS", "DDNM"]
    out = tmp_path / "outputs/posterior-quick"
    posterior.main([*arguments, "--seconds", "0"])
    assert not (out / "posterior.csv").is_file()
    posterior.main(arguments)
    rows = posterior.read(out / "posterior.csv")
    assert len(rows) == 12 and all(0 < float(row["distance"]) < 20 and posterior.nfe(row) <= 44 for row in rows)
    posterior.main([*arguments, "--report"])
    posterior.main(arguments)
    assert posterior.read(out / "posterior.csv") == rows and (out / "posterior.png").is_file()
    assert "| fast, 16 particles | 44 | 44 |" in (out / "posterior.md").read_text()


def test_coverage_of_a_gaussian_image():
    """Exact samples cover their nominal share: to .06 over four truths, whose pixels are correlated."""
    prior = posterior.image_prior()
    method = Method("oracle", oracle, lambda n, task: dict(exact=given))
    inside = []
    A, sigma_y = posterior.image_operators()["half"]
    known = A.mask.flatten() > 0
    rows = torch.eye(1024, dtype=torch.float64)[known]
    for seed in range(4):
        problem = posterior.Problem(prior, A, (1, 32, 32), sigma_y, seed)
        given = prior.posterior(rows, problem.y.flatten()[known], sigma_y)
        x, *_ = problem.sample(method, 44, 39, seed)
        inside.append(posterior.covered(x, problem.truth, ~known))
    inside = torch.tensor(inside).mean(0)
    assert abs(inside[0] - 0.5) < 0.08 and abs(inside[1] - 0.8) < 0.08


@pytest.mark.parametrize("shift, expected", [(0.0, None), (0.5, 0.5)])
def test_w2_of_exact_draws_is_that_of_their_row_and_of_moved_ones_the_move(shift, expected):
    A, _ = posterior.image_operators(8)["noisy blur"]

    def settings(n, task):
        exact = posterior.image_prior(8).posterior(matrix(A), task.y.flatten(), task.sigma_y)
        return dict(exact=Mixture(exact.weights, exact.means + shift, exact.cov))

    row = posterior.w2_row("noisy blur", Method("oracle", oracle, settings), 44, 2)
    assert row["exact"] < 0.06 and row["distance"] == pytest.approx(expected or row["exact"], rel=0.2)


def test_a_budget_out_of_range_is_refused():
    with pytest.raises(SystemExit):
        posterior.main(["--budgets", "5"])
