"""The start for priors that are cheap to draw from: against closed forms, brute force and the exact posterior."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from priors import GaussianMixturePrior, GeneratorPrior
from rtb_inverse.chains import Prior, path_log_prob, rollout
from rtb_inverse.checkpoints import load_weights
from rtb_inverse.diagnostics import effective_sample_size
from rtb_inverse.guidance import LocalGuidance
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.references import References

D = torch.float64


def linear_problem(d: int, m: int = 2, std: float = 0.5, dtype=D) -> InverseProblem:
    matrix = torch.randn((m, d), generator=torch.Generator().manual_seed(5), dtype=dtype) / d**0.5
    return InverseProblem(matrix, GaussianNoise(torch.tensor(std, dtype=dtype)))


# Local covariance


@pytest.mark.parametrize("batched", [False, True])
def test_local_covariance_is_that_of_the_exact_transition(batched, schedule, generator):
    prior = GaussianMixturePrior.random(3, 4, 0, D, steps=5, schedule=schedule)
    if batched:
        problem = linear_problem(3)
        prior = prior.posterior(problem.operator.matrix, problem.noise.std, torch.randn((2, 2), generator=generator, dtype=D))
    rows, t = torch.randn((2, 3), generator=generator, dtype=D), prior.times[2]
    x_t = torch.randn((6, 2, 3), generator=generator, dtype=D)
    with torch.no_grad():
        closed, derived = prior.local_covariance(x_t, t, rows), Prior.local_covariance(prior, x_t, t, rows)
    assert closed.shape == (6, 2, 3, 2)
    torch.testing.assert_close(closed, derived)


def test_local_guidance_is_exact_for_a_gaussian(schedule, generator):
    d, beta = 3, 2.0
    prior = GaussianMixturePrior.random(d, 1, 0, D, steps=6, schedule=schedule)
    problem = linear_problem(d).bind((d,))
    y = torch.randn((4, 2), generator=generator, dtype=D)
    exact = prior.posterior(problem.operator.matrix, problem.noise.std / math.sqrt(beta), y)
    guide = LocalGuidance(problem, prior.local_covariance, beta)
    for t in prior.times[:-1]:
        x_t = torch.randn((5, 4, d), generator=generator, dtype=D)
        plain = prior.denoise(x_t, t)
        torch.testing.assert_close(plain + guide(plain, y, None, guide.at(x_t, t)).delta, exact.denoise(x_t, t), atol=1e-7, rtol=1e-6)


# References


@pytest.mark.parametrize("shape", [(), (5,), (40,)], ids=["pairs", "draws", "draws that share what y allows"])
def test_references_weigh_the_priors_draws(shape, generator):
    prior = GaussianMixturePrior.random(2, 4, 0, D, steps=5)
    problem = InverseProblem(torch.abs, GaussianNoise(torch.tensor(0.7, dtype=D)))
    posterior = Posterior(prior, problem, beta=1.5, width=8)
    references, y = posterior.references, torch.randn((3, 2), generator=generator, dtype=D).abs()
    k = torch.tensor([4, 3, 4])
    t = prior.times.flip(0)[k + 1]
    x_t = torch.randn((*shape, 3, 2), generator=generator, dtype=D)
    got = references(x_t, t, posterior._likelihood_of(references, y), torch.tensor([True, True, False]))
    for b in range(2):
        alpha, sigma = prior.schedule.alpha_sigma(t[b])
        for index in [()] if not shape else [(0,), (4,)]:
            near = MultivariateNormal(x_t[*index, b], sigma**2 * torch.eye(2, dtype=D)).log_prob(alpha * references.x)
            seen = MultivariateNormal(y[b], 0.49 * torch.eye(2, dtype=D)).log_prob(references.x.abs())
            torch.testing.assert_close(got[*index, b], (near + 1.5 * seen).softmax(0) @ references.x)
    assert not got[..., 2, :].any()


def test_draws_that_y_rules_out_are_left_out(generator):
    """Alike whether a state comes alone, with weight 0, or among many of its y, from which those draws are gathered."""
    prior = GaussianMixturePrior.random(3, 4, 0, D, steps=5)
    posterior = Posterior(prior, linear_problem(3, std=0.1), width=8)
    references, y = posterior.references, torch.randn((2, 2), generator=generator, dtype=D)
    log_likelihood = posterior._likelihood_of(references, y)
    kept = log_likelihood > log_likelihood.amax(0) - 20
    assert bool((kept.double().mean(0) < 0.5).all())
    x_t, t, wanted = torch.randn((40, 2, 3), generator=generator, dtype=D), prior.times[1], torch.tensor(True)
    together = references(x_t, t, log_likelihood, wanted)
    torch.testing.assert_close(references(x_t[:1], t, log_likelihood, wanted), together[:1])
    every = (log_likelihood + torch.where(kept, 0.0, -torch.inf)).T
    alpha, sigma = prior.schedule.alpha_sigma(t)
    near = MultivariateNormal(x_t[:, :, None], sigma**2 * torch.eye(3, dtype=D)).log_prob(alpha * references.x)
    torch.testing.assert_close(together, (near + every).softmax(-1) @ references.x)


def test_references_take_part_where_modes_are_undecided_only():
    posterior = Posterior(GaussianMixturePrior.random(10, 8, 0, steps=20), linear_problem(10, dtype=torch.float32), width=8)
    share = posterior.references.share  # the last step first
    assert bool((share[-3:] > 0.9).all()) and not share[:10].any()


def test_what_is_left_of_the_error_is_measured():
    """For a Gaussian everything is known: nothing to add for references, and the variances of the exact posterior."""
    d = 3
    prior, problem = GaussianMixturePrior.random(d, 1, 0, D, steps=6), linear_problem(d)
    posterior = Posterior(prior, problem, width=8)
    exact = prior.posterior(problem.operator.matrix, problem.noise.std, torch.zeros(2, dtype=D))
    references = posterior.references
    assert not references.share.any()
    for k, t in enumerate(prior.times[:-1].flip(0)):
        update = references.left(torch.tensor(k), torch.zeros(1, d, dtype=D))
        alpha, sigma = prior.schedule.alpha_sigma(t)
        C = torch.linalg.inv(torch.linalg.inv(exact.covariances[0]) + alpha**2 / sigma**2 * torch.eye(d, dtype=D))
        along = (update.basis.T @ C @ update.basis).diagonal()
        # variances from 512 draws: a relative standard error of sqrt(2 / 512) = 0.0625 each
        assert float((update.level * update.shrink / along - 1).abs().max()) < 4.5 * 0.0625
        assert float(abs(update.level / (C.trace() - along.sum()) - 1)) < 4.5 * 0.0625


@pytest.mark.parametrize("operator", ["matrix", torch.abs, lambda x: x.detach().abs()], ids=["matrix", "abs", "not differentiable"])
def test_the_untrained_start_is_near_the_posterior(operator, generator):
    prior = GaussianMixturePrior.random(2, 25, 0, steps=40)
    problem = linear_problem(2, 1, dtype=torch.float32) if operator == "matrix" else InverseProblem(operator, GaussianNoise(0.5))
    posterior = Posterior(prior, problem, width=8)
    assert posterior.start == "guided"
    y = posterior.problem.simulate(prior.sample(8, generator), generator)

    def judged(chain) -> tuple[torch.Tensor, torch.Tensor]:
        paths = rollout(chain, 256, y, generator)
        log_w = path_log_prob(prior, paths) + posterior.log_likelihood(paths.x_0, y) - paths.log_prob
        return effective_sample_size(log_w) / 256, Particles(paths.x_0, log_w).log_z - log_w.mean(0)

    ess, gap = judged(posterior)
    posterior.references = None  # the Gaussian update alone
    ess_alone, gap_alone = judged(posterior)
    assert float(ess.mean()) > 0.6 and float(gap.mean()) < 0.3
    assert float(gap.mean()) < 0.5 * float(gap_alone.mean()) and bool(ess.mean() > ess_alone.mean())


def test_an_operator_that_sees_all_of_x(generator):
    prior = GaussianMixturePrior.random(2, 3, 1, steps=4)
    posterior = Posterior(prior, InverseProblem(torch.eye(2), GaussianNoise(1.0)), width=8)
    y = posterior.problem.simulate(prior.sample(8, generator), generator)
    paths = rollout(posterior, 64, y, generator)
    log_w = path_log_prob(prior, paths) + posterior.log_likelihood(paths.x_0, y) - paths.log_prob
    assert float(effective_sample_size(log_w).mean()) > 32


def test_an_observation_that_no_draw_allows():
    posterior = Posterior(GaussianMixturePrior.random(2, 4, 0, D, steps=5), linear_problem(2), width=8)
    references, x_t, t = posterior.references, torch.zeros((1, 2), dtype=D), posterior.times[1]
    none, all_alike = torch.full((len(references.x), 1), -torch.inf, dtype=D), torch.zeros((len(references.x), 1), dtype=D)
    wanted = torch.tensor(True)
    assert torch.equal(references(x_t, t, none, wanted), references(x_t, t, all_alike, wanted))


def test_references_are_saved(tmp_path, generator):
    posterior = Posterior(GaussianMixturePrior.random(2, 3, 0, steps=3), linear_problem(2, dtype=torch.float32), width=8)
    posterior.references.x.add_(0.5)  # as if drawn by another version
    posterior.references.share.fill_(0.25)
    posterior.save_pretrained(tmp_path)
    assert "references.x" in load_weights(tmp_path / "diffusion_pytorch_model.safetensors")
    again = Posterior.from_pretrained(tmp_path)
    assert torch.equal(again.references.x, posterior.references.x) and torch.equal(again.references.share, posterior.references.share)


@pytest.mark.parametrize("kind", ["mixture", "generator"])
def test_other_draws_are_decoded_and_seen_anew(kind, generator):
    """Those of another dtype or device are others: what the operator made of the first ones is forgotten."""
    prior = GaussianMixturePrior.random(2, 3, 0, steps=3) if kind == "mixture" else GeneratorPrior(lambda z: z.exp(), 2)
    posterior = Posterior(prior, linear_problem(2, dtype=torch.float32), width=8)
    y = torch.zeros((1, *posterior.problem.y_shape))
    references = References(prior, size=64), References(prior, size=64)
    references[1].x.copy_(torch.randn((64, 2), generator=generator))
    references[0].log_likelihood(posterior.problem, y), references[0].told(posterior.problem, y)  # both are kept
    references[0].load_state_dict(references[1].state_dict())
    x = references[1].x
    torch.testing.assert_close(references[0].told(posterior.problem, y)[0], posterior.problem.log_likelihood(prior.decode(x)[:, None], y))
    assert torch.equal(references[0].data, prior.decode(x))


def test_no_references_without_exact_draws(unet2d_prior):
    assert Posterior(unet2d_prior, InverseProblem(torch.square, GaussianNoise(0.1))).references is None
    prior = GaussianMixturePrior.random(2, 3, 0, steps=3)
    assert Posterior(prior, InverseProblem(torch.square, GaussianNoise(0.1)), start="prior", width=8).references is None
