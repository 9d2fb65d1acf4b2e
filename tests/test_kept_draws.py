"""Kept draws of a network's prior: the regression and the weights by hand, what they may change and what not, and that they help."""

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression

import rtb_inverse.kept_draws
from priors import DiffusersPrior
from rtb_inverse import GaussianNoise, InverseProblem, PoissonNoise, Posterior, importance, path_log_prob, rollout, simulate_observations
from rtb_inverse.kept_draws import KeptDraws, KernelRegression, worth
from tasks import SuperResolution

KIND = "pixels"


def sums(noise_std=0.5) -> InverseProblem:
    return InverseProblem(lambda x: x.flatten(1)[:, ::2] + x.flatten(1)[:, 1::2], GaussianNoise(noise_std))


def counts() -> InverseProblem:
    return InverseProblem(lambda x: (x + 3).clamp_min(0.1).flatten(1), PoissonNoise(gain=2.0))


@pytest.fixture
def prior(make_prior):
    return make_prior(KIND, steps=6)


@pytest.fixture
def posterior(prior):
    """With shares and tempers of every kind."""
    posterior = Posterior(prior, sums())
    generator = torch.Generator().manual_seed(3)
    draws = posterior.hold_references(prior.sample(17, generator))
    pairs = prior.sample(13, generator)
    draws.regression.fit(posterior.problem.simulate(pairs, generator), pairs.flatten(1))
    draws.regressed.copy_(torch.tensor([0.0, 0.3, 0.0, 0.2, 0.0, 0.6]))
    draws.share.copy_(torch.tensor([0.0, 0.0, 0.2, 0.5, 0.0, 1.0]))
    draws.temper.copy_(torch.tensor([0.0, 0.0, 1.0, 0.1, 0.0, 0.01]))
    return posterior


def by_hand(posterior, x_t, k, y, estimate):
    """Of one state."""
    draws, problem = posterior.draws, posterior.problem
    estimate = estimate + draws.regressed[k] * (draws.regression(y.reshape(1, -1)).reshape(x_t.shape) - estimate)
    alpha, sigma = (float(c) for c in posterior.schedule.alpha_sigma(posterior.times[posterior.steps - 1 - k]))
    log_w = [-(x_t - alpha * x).square().sum() / (2 * sigma**2) + draws.temper[k] * problem.log_likelihood(x, y) for x in draws.x]
    weights = torch.stack(log_w).softmax(0)
    mean = sum(w * x for w, x in zip(weights, draws.x, strict=True))
    return estimate + draws.share[k] * (mean - estimate)


@pytest.mark.parametrize("at_once", [2**21, 20, 1])
def test_each_state_is_moved_by_its_own_weights(posterior, at_once, generator, monkeypatch):
    """Of any batch of draws, observations and steps, in parts of any size."""
    monkeypatch.setattr(rtb_inverse.kept_draws, "AT_ONCE", at_once)
    draws, shape = posterior.draws, posterior.shape
    y = posterior.problem.simulate(draws.x[:2], generator)
    x_t, estimate = torch.randn((2, 3, 2, *shape), generator=generator)
    k = torch.tensor([[2], [5], [0]])
    t = posterior.times.flip(0)[k + 1]
    found = draws(x_t, t, k, *draws.told(posterior.problem, y), estimate)
    for n in range(3):
        for b in range(2):
            expected = by_hand(posterior, x_t[n, b], int(k[n]), y[b], estimate[n, b])
            torch.testing.assert_close(found[n, b], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[2], estimate[2])  # shares of 0


@pytest.mark.parametrize("make", [sums, lambda: InverseProblem(torch.eye(32)[:3], GaussianNoise(torch.tensor([0.1, 1.0, 3.0])))])
def test_likelihoods_up_to_a_term_of_y(make, prior, generator):
    problem = make().bind(prior.shape)
    draws = KeptDraws(prior, prior.sample(16, generator), problem)
    y = problem.simulate(draws.x[:4], generator)
    off = draws.log_likelihood(problem, y) - problem.log_likelihood(draws.x[:, None], y)
    torch.testing.assert_close(off, off[:1].expand_as(off), rtol=1e-3, atol=1e-2)


def test_counts_are_told_by_the_regression_alone(prior, generator):
    prior.keep_draws(200, generator)
    posterior = Posterior(prior, counts())
    assert posterior.draws.regressed[-1] > 0 and posterior.draws.share.max() == 0
    y = posterior.problem.simulate(prior.draws[:2], generator)
    paths = rollout(posterior, 5, y, generator)
    torch.testing.assert_close(path_log_prob(posterior, paths, 4), paths.log_prob, rtol=1e-3, atol=1e-2)
    posterior.draws.regressed.zero_()
    assert (path_log_prob(posterior, paths) - paths.log_prob).abs().min() > 1e-3  # it had moved the steps


def test_paths_are_scored_as_they_were_drawn(posterior, generator):
    y = posterior.problem.simulate(posterior.draws.x[:2], generator)
    paths = rollout(posterior, 5, y, generator)
    with torch.no_grad():
        for chunk_size in (None, 4):
            torch.testing.assert_close(path_log_prob(posterior, paths, chunk_size), paths.log_prob, rtol=1e-3, atol=1e-2)
    plain = Posterior(posterior.prior, posterior.problem)
    assert not torch.allclose(*(rollout(p, 5, y, torch.Generator().manual_seed(0)).x_0 for p in (plain, posterior)))


def test_the_guide_makes_a_reference_fit_y(posterior, generator):
    """Where the share is 1, the estimate is the guide's from the draws' weighted mean; where the shares are 0, from the network's."""
    posterior.local_gate = None
    y = posterior.problem.simulate(posterior.draws.x[:2], generator)
    x_t = torch.randn((3, 2, *posterior.shape), generator=generator)
    ascending = posterior.times.flip(0)[1:]
    with torch.no_grad():
        for k in (5, 0):
            t, log_lik = ascending[k], posterior.draws.log_likelihood(posterior.problem, y)
            found, _, _ = posterior.denoise(x_t, t, y)
            draws, posterior.draws = posterior.draws, None
            first, _, update = posterior.denoise(x_t, t, y)
            posterior.draws = draws
            start = first - posterior.gate[k] * update.delta
            if k == 5:
                flat = x_t.flatten(0, 1)
                weight = posterior.draws.temper[k] * log_lik.T.repeat(3, 1)
                start = posterior.draws.weighted(flat, t.expand(6), weight).reshape(x_t.shape)
            moved = start + posterior.guide(start, y, posterior.error(t), posterior.guide.at(x_t, t)).delta
            torch.testing.assert_close(found, moved, rtol=1e-4, atol=1e-4)


def test_a_draw_does_not_tell_itself(prior, generator):
    """Draws that say which other one they are a copy of are told; draws far from one another, in every direction, are not."""
    far = 30 * torch.randn((20, *prior.shape), generator=generator)
    copies = Posterior(prior, sums(0.1), references=far.repeat(2, 1, 1))
    assert copies.draws.share[-1] > 0.9
    alone = Posterior(prior, sums(0.1), references=far)
    assert alone.draws.share[-1] < 0.3


def test_what_y_says_is_found_once(posterior, generator, monkeypatch):
    """And anew where y is another, or has changed in place, or the draws' state is loaded."""
    draws, problem, asked = posterior.draws, posterior.problem, []
    y = problem.simulate(draws.x[:2], generator)
    found = KeptDraws.tell
    monkeypatch.setattr(KeptDraws, "tell", lambda *of: asked.append(1) or found(*of))
    rollout(posterior, 2, y, generator)
    rollout(posterior, 2, y.clone(), generator)
    assert len(asked) == 1
    for count, other in enumerate((y.add_(1.0), y[:1], y[:1].double()), 2):
        draws.to(other.dtype), problem.to(other.dtype)
        torch.testing.assert_close(draws.told(problem, other), found(draws, problem, other))
        assert len(asked) == count
    draws.load_state_dict({name: 2 * value for name, value in draws.state_dict().items()})
    torch.testing.assert_close(draws.told(problem, other), found(draws, problem, other))


@pytest.mark.parametrize("pairs", [12, 300])
def test_the_regression_is_kernel_ridge(pairs, generator):
    """With the width and a ridge that it tries, as scikit-learn has it; and of enough pairs it predicts others better than a line."""
    x = torch.rand((2 * pairs, 1), generator=generator, dtype=torch.float64) * 4 - 2
    y = torch.cat([x, x.square()], 1) + 0.05 * torch.randn((2 * pairs, 2), generator=generator, dtype=torch.float64)
    x = torch.cat([(3 * x).sin(), x], 1)
    regression = KernelRegression(pairs, 2, 2, dtype=torch.float64).fit(y[:pairs], x[:pairs])
    gamma, mean = 1 / float(regression.width), x[:pairs].mean(0)
    found = regression(y[pairs:])
    ways = [KernelRidge(alpha=a, kernel="rbf", gamma=gamma).fit(y[:pairs], x[:pairs] - mean) for a in rtb_inverse.kept_draws.RIDGES]
    off = [float((found - mean - torch.from_numpy(way.predict(y[pairs:]))).abs().max()) for way in ways]
    assert min(off) < 1e-9
    if pairs > 100:
        line = LinearRegression().fit(y[:pairs], x[:pairs]).predict(y[pairs:])
        assert (found - x[pairs:]).square().mean() < 0.5 * (torch.from_numpy(line) - x[pairs:]).square().mean()


def test_the_regression_of_equal_observations_is_the_mean(generator):
    """A y that says nothing, the same for every x."""
    x = torch.randn((20, 3), generator=generator)
    regression = KernelRegression(20, 2, 3).fit(torch.ones(20, 2), x)
    torch.testing.assert_close(regression(torch.ones(1, 2))[0], x.mean(0), rtol=1e-3, atol=1e-3)


def test_a_share_is_the_least_squares_one_and_0_unless_clear(generator):
    off, noise = torch.randn((2, 100, 3), generator=generator)
    move = 0.5 * off + noise
    share, gain = worth(off, move)
    least = [float((off - s * move).square().sum()) for s in (share - 0.01, share, share + 0.01)]
    assert share > 0 and gain > 0 and min(least) == least[1]
    assert worth(off, noise) == worth(off, -move) == (0.0, 0.0)
    assert worth(off, 0.2 * off)[0] == 1.0  # never beyond


def test_saved_and_loaded(posterior, generator, tmp_path):
    """Nothing is measured again."""
    y = posterior.problem.simulate(posterior.draws.x[:2], generator)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path, problem=sums())
    for name, value in posterior.draws.state_dict().items():
        assert torch.equal(loaded.draws.state_dict()[name], value), name
    x = [p.sample(y, 3, torch.Generator().manual_seed(0)).x for p in (posterior, loaded)]
    assert torch.equal(*x)


def test_kept_draws_are_the_default_references(prior):
    """Measured twice, the same; False for none, and none of a posterior that starts at the prior."""
    prior.keep_draws(40, torch.Generator().manual_seed(4))
    first, second = Posterior(prior, sums()), Posterior(prior, sums(), references=prior.draws.clone())
    assert torch.equal(first.draws.x, second.draws.x) and torch.equal(first.draws.share, second.draws.share)
    assert first.draws.x.shape == (40, *prior.shape) and ((first.draws.share >= 0) & (first.draws.share <= 1)).all()
    assert Posterior(prior, sums(), references=False).draws is None and Posterior(prior, sums(), start="prior").draws is None


@pytest.mark.slow
def test_they_tighten_the_bound_of_super_resolution(generator):
    """Of 8x8 digits, untrained, 24 observations: the ELBO grows by more than 3 standard errors of the paired differences (about 1 nat)."""
    prior = DiffusersPrior.from_pretrained("priors/digits")
    problem = SuperResolution(prior.shape, 4, noise_std=0.1)
    plain, helped = Posterior(prior, problem, references=False), Posterior(prior, problem)
    assert helped.draws.regressed[-1] > 0.5 and helped.draws.share[-1] > 0.3 and helped.draws.regressed[0] == 0
    y = simulate_observations(plain, 24, generator).y
    elbo = [importance(p, y, 16, torch.Generator().manual_seed(1)).log_w.mean(0) for p in (plain, helped)]
    gain = elbo[1] - elbo[0]
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (KIND, {"references": 8}, TypeError, "references must be a torch.Tensor, got int"),
        (KIND, {"references": True, "start": "prior"}, ValueError, "references need a guided start .*, got start='prior' here"),
        ("mixture", {"references": True}, ValueError, "references need a guided start and the prior's own network, got start='guided'"),
        (KIND, {"references": torch.zeros(15, 2, 16)}, ValueError, "references must hold at least 16 draws, got 15"),
        (KIND, {"references": torch.zeros(4, 3)}, ValueError, r"references must have shape \(B, .*, got \(4, 3\)"),
        (KIND, {"references": torch.full((2, 2, 16), torch.nan)}, ValueError, "references must be finite"),
    ],
)  # fmt: skip
def test_bad_references_get_one_clear_error(kind, options, error, message, make_prior):
    prior = make_prior(kind, steps=3)
    problem = sums() if kind == KIND else InverseProblem(torch.eye(3, dtype=torch.float64), GaussianNoise(0.5))
    with pytest.raises(error, match=message):
        Posterior(prior, problem, **options)


def test_a_prior_keeps_draws_and_ships_them(prior, tmp_path):
    """In half precision; without any, asking for them is an error, and a damaged file is one too."""
    with pytest.raises(ValueError, match=r"references=True needs a prior that keeps draws, got one without: prior.keep_draws\(4096\)"):
        Posterior(prior, sums(), references=True)
    x = prior.keep_draws(20, torch.Generator().manual_seed(1)).draws
    assert torch.equal(Posterior(prior, sums(), references=True).draws.x, x) and Posterior(prior, sums(), references=False).draws is None
    prior.save_pretrained(tmp_path)
    loaded = DiffusersPrior.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.draws, x, rtol=1e-3, atol=1e-3)
    (tmp_path / "draws.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"draws\.safetensors"):
        DiffusersPrior.from_pretrained(tmp_path)


def test_the_shipped_draws():
    prior = DiffusersPrior.from_pretrained("priors/digits")
    assert prior.draws.shape == (4096, 1, 8, 8) and float(prior.draws.abs().max()) < 2
    assert len(prior.draws.unique(dim=0)) == 4096
