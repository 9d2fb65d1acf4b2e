"""pCN and HMC against the closed form of a Gaussian posterior, in x and in the z of a linear generator.

Chains are independent of each other: statistical checks are z-scores over chains, |z| < 4.5 (a correct method fails one of some dozens
once in thousands of seeds)."""

import math

import pytest
import torch
from conftest import make_gaussian, make_mixture

from priors import GaussianPrior, GeneratorPrior
from rtb_inverse import GaussianNoise, InverseProblem, Reward
from rtb_inverse.baselines import hmc, pcn
from rtb_inverse.distributions import GaussianStep

D = torch.float64
METHODS = {"pcn": (pcn, {}), "hmc": (hmc, {"leaps": 3}), "mala": (hmc, {"leaps": 1})}
A = torch.tensor([[1.0, 0.5, -0.5, 0.2], [0.0, 1.0, 0.3, -1.0]], dtype=D)
STD = 0.5


def problem() -> InverseProblem:
    return InverseProblem(lambda x: x.flatten(1) @ A.T.to(x), GaussianNoise(torch.tensor(STD, dtype=D)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("exact_start", [True, False], ids=["from exact draws", "from the prior"])
def test_the_posterior_of_a_gaussian(name, exact_start, generator, assert_mean):
    """Two observations at once; exact draws stay exact, those of the prior become it."""
    method, options = METHODS[name]
    prior, n = make_gaussian(), 2000
    y = torch.tensor([[1.5, -1.0], [-0.5, 2.0]], dtype=D)
    exact = prior.posterior(A, STD, y)
    start = exact.distribution.sample((n,), generator) if exact_start else None
    steps = {"steps": 4, "burn_in": 0, "step_size": 0.6} if exact_start else {"steps": 60, "burn_in": 60}
    draws = method(prior, problem(), y, n, generator, start=start, **steps, **options)
    assert draws.x.shape == (n, 2, 1, 2, 2) and not draws.log_w.any()
    if exact_start:
        moved = (draws.x != start).flatten(2).any(-1).double().mean()
        assert float(moved) > 0.3
    x, mean = draws.x.flatten(2), exact.mean.flatten(1)
    assert_mean(x, mean)
    centred = x - mean
    assert_mean(torch.einsum("nbi,nbj->nbij", centred, centred), exact.covariance.expand(2, 4, 4))


@pytest.mark.parametrize("law", ["prior", "laplace"])
@pytest.mark.parametrize("name", METHODS)
def test_in_the_noise_space_of_a_generator(name, law, generator, assert_mean):
    """x = W z + c: the draws of x have the closed-form posterior."""
    method, options = METHODS[name]
    options = options | {"law": law}
    W, c = torch.randn((4, 3), generator=generator, dtype=D), torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=D)
    prior = GeneratorPrior(lambda z: z @ W.T.to(z) + c.to(z), 3, dtype=D)
    y = torch.tensor([[0.7, -0.3]], dtype=D)
    exact = GaussianPrior(c, W @ W.T + 1e-9 * torch.eye(4, dtype=D)).posterior(A, STD, y)
    draws = method(prior, InverseProblem(A, GaussianNoise(torch.tensor(STD, dtype=D))), y, 2000, generator, steps=60, burn_in=80, **options)
    assert_mean(draws.x[:, 0], exact.mean[0])
    centred = draws.x[:, 0] - exact.mean[0]
    assert_mean(torch.einsum("ni,nj->nij", centred, centred), exact.covariance)


@pytest.mark.parametrize("name", METHODS)
def test_by_the_laplace_approximation_of_a_curved_posterior(name, generator, assert_mean):
    """Two observations of a curved x = f(z), whose posteriors are no Gaussians, against a sum over a grid."""
    method, options = METHODS[name]
    prior = GeneratorPrior(lambda z: z + 0.3 * (z[:, :1] * z[:, 1:]).expand_as(z), 2, dtype=D)
    problem = InverseProblem(A[:, :2], GaussianNoise(torch.tensor(STD, dtype=D)), (2,))
    y = torch.tensor([[1.5, -1.0], [-0.5, 2.0]], dtype=D)
    z = torch.cartesian_prod(*(torch.linspace(-6, 6, 601, dtype=D),) * 2)
    weight = (problem.log_likelihood(prior.decode(z)[:, None], y) - 0.5 * z.square().sum(-1)[:, None]).softmax(0)
    mean, square = (torch.einsum("gb,gd->bd", weight, f) for f in (prior.decode(z), prior.decode(z) ** 2))
    draws = method(prior, problem, y, 2000, generator, law="laplace", steps=60, burn_in=60, **options)
    assert_mean(draws.x, mean)
    assert_mean(draws.x**2, square)


def test_where_y_says_much_the_laplace_approximation_makes_longer_steps(generator):
    prior = GeneratorPrior(lambda z: z + 0.02 * z.sin(), 4, dtype=D)
    problem, y = InverseProblem(A, GaussianNoise(torch.tensor(0.02, dtype=D))), torch.tensor([[1.5, -1.0]], dtype=D)
    known = {law: pcn(prior, problem, y, 20, generator, law=law, steps=400, burn_in=400).info for law in ("prior", "laplace")}
    assert float(known["laplace"]["effective_draws"]) > 5 * float(known["prior"]["effective_draws"])
    assert float(known["laplace"]["r_hat"]) < 1.05 < float(known["prior"]["r_hat"])


@pytest.mark.parametrize("basis", [False, True])
def test_times_covariance(basis, generator):
    scale = torch.rand((4,), generator=generator, dtype=D) + 0.5
    V = torch.linalg.qr(torch.randn((4, 2), generator=generator, dtype=D))[0] if basis else None
    ratio = torch.tensor([0.3, 2.0], dtype=D) if basis else None
    law = GaussianStep(torch.zeros(4, dtype=D), scale, 1, V, ratio)
    middle = torch.eye(4, dtype=D) if V is None else torch.eye(4, dtype=D) + V @ (ratio**2 - 1).diag() @ V.T
    v = torch.randn((5, 4), generator=generator, dtype=D)
    torch.testing.assert_close(law.times_covariance(v), v @ (scale.diag() @ middle @ scale.diag()))


def test_a_leap_without_likelihood_is_always_accepted(generator):
    """The prior's part is solved exactly; so is the acceptance of pcn."""
    flat = Reward(lambda x: 0 * x.flatten(1).sum(1))
    for method, options in METHODS.values():
        draws = method(make_gaussian(), flat, None, 50, generator, steps=5, burn_in=0, step_size=1.0, **options)
        assert float(draws.info["acceptance"]) == 1


@pytest.mark.parametrize(("name", "goal"), [("pcn", 0.25), ("hmc", 0.7)])
def test_burn_in_finds_the_step_size_of_each_observation(name, goal, generator):
    method, options = METHODS[name]
    y = torch.tensor([[0.0, 0.0], [6.0, 6.0]], dtype=D)
    sharp = InverseProblem(lambda x: x.flatten(1) @ A.T.to(x), GaussianNoise(torch.tensor(0.05, dtype=D)))
    draws = method(make_gaussian(), sharp, y, 200, generator, steps=50, burn_in=200, **options)
    assert float((draws.info["acceptance"] - goal).abs().max()) < 0.15
    assert draws.info["step_size"].shape == (2,) and draws.info["r_hat"].shape == (2,)


def test_kept_states_and_evaluations(generator):
    draws = pcn(make_gaussian(), problem(), torch.zeros((2, 2), dtype=D), 3, generator, steps=40, burn_in=8, kept=4)
    assert draws.x.shape[:2] == (12, 2) and draws.info["evaluations"] == 12
    draws = hmc(make_gaussian(), problem(), torch.zeros((2, 2), dtype=D), 3, generator, steps=40, burn_in=0, kept=4, leaps=4)
    assert draws.info["evaluations"] == 40


def test_a_chain_that_starts_where_y_is_impossible_gets_out(generator):
    positive = Reward(lambda x: torch.where(x.flatten(1)[:, 0] > 0, 0.0, -math.inf))
    for steps in (2, 40):
        draws = pcn(make_gaussian(), positive, None, 100, generator, steps=steps, burn_in=0, step_size=0.8)
        assert torch.equal(draws.log_w.isneginf(), draws.x.flatten(2)[..., 0] <= 0)
        assert bool(draws.log_w.isneginf().any()) == (steps == 2)
    never = Reward(lambda x: torch.full_like(x.flatten(1)[:, 0], -math.inf))
    with pytest.raises(ValueError, match="no draw is possible"):
        pcn(make_gaussian(), never, None, 5, generator, steps=2, burn_in=0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"step_size": 0.0}, "step_size"), ({"step_size": 2.0}, "step_size"), ({"step_size": math.nan}, "step_size"),
        ({"kept": 0}, "kept"), ({"kept": 99}, "kept"), ({"steps": 0}, "steps"), ({"burn_in": -1}, "burn_in"), ({"n": 0}, "n must"),
        ({"start": torch.zeros(2, 1, 3, dtype=D)}, "start"), ({"y": torch.full((1, 2), math.nan, dtype=D)}, "y must"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", [pcn, hmc])
def test_bad_arguments(method, arguments, named):
    arguments = {"y": torch.zeros((1, 2), dtype=D), "n": 2, "steps": 5, "burn_in": 0} | arguments
    with pytest.raises(ValueError, match=named):
        method(make_gaussian(), problem(), **arguments)


def test_priors_and_operators_that_do_not_serve():
    y = torch.zeros((1, 2), dtype=D)
    matrix = InverseProblem(A[:, :3], GaussianNoise(torch.tensor(STD, dtype=D)))
    with pytest.raises(ValueError, match=r"prior must have a Gaussian x_0 for pcn.*GaussianMixturePrior"):
        pcn(make_mixture(), matrix, y, 2)
    for method in (pcn, hmc):
        with pytest.raises(TypeError, match="prior must be a Prior"):
            method(3, matrix, y, 0)
    with pytest.raises(ValueError, match="differentiable operator for hmc"):
        hmc(make_gaussian(), InverseProblem(lambda x: x.detach().flatten(1) @ A.T.to(x), GaussianNoise(0.5)), y, 2)
    for method in (pcn, hmc):
        with pytest.raises(ValueError, match=r"law='laplace' needs a prior x_0 ~ N\(0, I\).*expected law='prior' here"):
            method(make_gaussian(), problem(), y, 2, law="laplace")
        with pytest.raises(ValueError, match="law must be one of prior, laplace, got 'best'"):
            method(make_gaussian(), problem(), y, 2, law="best")
    wrong = InverseProblem(lambda x: x.flatten(1).log(), GaussianNoise(0.5), shape=None)
    with pytest.raises(ValueError):
        pcn(make_gaussian(), wrong, torch.zeros((1, 4), dtype=D), 2)
