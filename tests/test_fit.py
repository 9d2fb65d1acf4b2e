"""Fits that end: against the exact posterior of a mixture, for one observation, for a reward; and the same again from the same seed.

The bounds leave room above what three mixtures and operators gave (mean multiple of the floor 1.1 to 1.6 from 4 to 12, median |log Z error|
0.007 to 0.009, effective share of draws 0.86 to 0.90 where the oracle had 0.77 to 0.89); everything is seeded."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer

from priors import GaussianMixturePrior, GaussianPrior
from rtb_inverse.chains import Prior, path_log_prob, rollout
from rtb_inverse.corrections import importance
from rtb_inverse.data import ObservationData
from rtb_inverse.diagnostics import effective_sample_size, elbo, sliced_wasserstein
from rtb_inverse.evaluation import simulate_observations
from rtb_inverse.guidance import CovarianceGuidance
from rtb_inverse.lightning import PosteriorTraining, fit
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward

NOISE, DRAWS, HELD_OUT = 0.5, 512, 20


class Oracle(Prior):
    """The best Gaussian chain of those steps: the exact posterior's denoiser, and its error in the analytic variance."""

    def __init__(self, prior: GaussianMixturePrior, exact: GaussianMixturePrior):
        super().__init__(prior.shape, prior.schedule, prior.steps, prior.eta, "analytic", prior.min_std)
        self.prior, self.exact = prior, exact

    def initial(self, sample_shape):
        return self.prior.initial(sample_shape)

    def denoise(self, x_t, t):
        return self.exact.denoise(x_t, t)

    def denoiser_error(self, t):
        return self.exact.denoiser_error(t)


def oracle_ess(prior, problem, A, y, n: int, generator) -> float:
    """Mean share of effective draws over observations."""
    shares = []
    for observation in y:
        paths = rollout(Oracle(prior, prior.posterior(A, NOISE, observation)), n, None, generator)
        log_w = path_log_prob(prior, paths) + problem.log_likelihood(paths.x_0, observation[None]) - paths.log_prob
        shares.append(float(effective_sample_size(log_w)) / n)
    return sum(shares) / len(shares)


def multiple_of_the_floor(posterior: Posterior, exact: GaussianMixturePrior, y: torch.Tensor) -> torch.Tensor:
    """Sliced Wasserstein distance of draws to exact ones over that of two exact sets, by observation; both averaged over four pairs."""
    generator = torch.Generator().manual_seed(7)

    def distance(a, b):
        return sliced_wasserstein(a, b, generator=torch.Generator().manual_seed(1))

    truths = [exact.distribution.sample((DRAWS,), generator) for _ in range(4)]
    draws = posterior.sample(y, DRAWS, generator).x
    floor = sum(distance(truths[i], truths[j]) for i, j in ((0, 1), (2, 3), (0, 2), (1, 3)))
    return sum(distance(draws, truth) for truth in truths) / floor


@pytest.fixture(scope="module")
def trained():
    """The prior, the operator, held-out observations; the multiple of the floor of the prior and after a fit, and the fitted posterior."""
    prior, generator = GaussianMixturePrior.random(2, 6, 0, steps=20), torch.Generator().manual_seed(100)
    A = torch.randn((1, 2), generator=generator)
    posterior = Posterior(prior, InverseProblem(A, GaussianNoise(NOISE)), width=128)
    assert posterior.start == "guided"
    y = posterior.problem.simulate(prior.sample(HELD_OUT, generator), generator)
    exact = prior.posterior(A, NOISE, y)
    before = multiple_of_the_floor(Posterior(prior, posterior.problem, "prior", width=8), exact, y)
    fit(posterior, 300, progress=False, warm_start=0.9, lr=4e-3, states=1024)
    return prior, A, y, before, multiple_of_the_floor(posterior, exact, y), posterior


def test_draws_come_near_the_exact_posterior(trained):
    *_, before, after, _ = trained
    assert before.shape == after.shape == (HELD_OUT,)
    assert float(before.mean()) > 5  # y says something
    assert float(after.mean()) < 2.2
    assert float(after.median()) < 1.6


def test_evidence_of_a_fitted_posterior(trained):
    prior, A, y, _, _, posterior = trained
    draws = importance(posterior, y, 1024, torch.Generator().manual_seed(3))
    truth = prior.log_evidence(A, NOISE, y)
    assert float((draws.log_z - truth).abs().median()) < 0.05
    z = (draws.log_z - truth) / draws.log_z_error
    assert float(z.abs().max()) < 4.5  # and the error says how far
    assert bool((elbo(draws.log_w) < truth + 4.5 * draws.log_w.std(0) / 1024**0.5).all())
    # an untrained log Z is 0 for all y; the learned one follows
    learned = posterior.log_evidence(y).detach()
    assert float((learned - truth).abs().mean()) < 0.25 * float(truth.abs().mean())


def test_paths_are_as_effective_as_the_oracles(trained):
    prior, A, y, _, _, posterior = trained
    generator = torch.Generator().manual_seed(4)
    ours = float(importance(posterior, y, 1024, generator).ess.mean()) / 1024
    theirs = oracle_ess(prior, posterior.problem, A, y, 512, generator)
    assert 0.6 < theirs < 1
    assert ours > 0.8 * theirs


def test_paths_of_the_joint_bound_the_evidence_from_above(trained):
    """EUBO on (path, y) of the prior's roll-outs: at least log Z on average, and near it after a fit."""
    prior, A, _, _, _, posterior = trained
    held = simulate_observations(posterior, 400, torch.Generator().manual_seed(5))
    log_w = (
        path_log_prob(prior, held.paths) + posterior.log_likelihood(held.paths.x_0, held.y) - path_log_prob(posterior, held.paths).detach()
    )
    gap = log_w[0] - prior.log_evidence(A, NOISE, held.y)
    error = float(gap.std()) / 20
    assert -3 * error < float(gap.mean()) < 0.5


def gain(posterior: Posterior, y, train) -> float:
    """How many standard errors `train` moves the ELBO up."""

    def log_w():
        return importance(posterior, y, 1000, torch.Generator().manual_seed(9)).log_w[:, 0]

    before = log_w()
    train()
    after = log_w()
    return float((after.mean() - before.mean()) / (before.var() / 1000 + after.var() / 1000).sqrt())


SMALL = {"progress": False, "states": 128, "lr": 4e-3, "lr_rtb": 2e-3, "pool_start": 256, "ema_decay": 0.98}


@pytest.mark.parametrize(("objective", "warm_start"), [("vargrad", 0.0), ("rtb", 0.0), ("wake_sleep", 0.0), ("rtb", 1.0)])
def test_one_observation(objective, warm_start):
    prior = GaussianMixturePrior.random(2, 3, 1, steps=8)
    posterior = Posterior(prior, InverseProblem(torch.tensor([[0.6, 0.8]]), GaussianNoise(1.0)), "prior", width=32)
    y = torch.tensor([2.0])
    options = {"warm_start": warm_start, "objective": objective, "draws": 32}
    assert gain(posterior, y[None], lambda: fit(posterior, 100, y=y, **options, **SMALL)) > 5


@pytest.mark.parametrize("objective", ["vargrad", "rtb", "wake_sleep"])
def test_log_z_starts_where_the_first_estimates_are(objective):
    """A constant reward and a Gaussian prior, whose steps are Gaussian: every path has the weight Z."""
    prior = GaussianPrior(torch.zeros(2), torch.eye(2), steps=5)
    posterior = Posterior(prior, Reward(lambda x: x[..., 0] * 0 - 300.0), start="prior", width=16)
    fit(posterior, 1, progress=False, warm_start=0.0, objective=objective, bounds=0)
    assert float(posterior.log_evidence(None).detach()) == pytest.approx(-300, abs=1e-3)


def test_a_wake_sleep_buffer_is_never_a_few_draws():
    """A reward that one draw of 256 has all of: what enters has the effective sample size of a tenth, hence about so many different ones
    at least (by its plain weights: 2)."""
    prior = GaussianPrior(torch.zeros(2), torch.eye(2), steps=5)
    posterior = Posterior(prior, Reward(lambda x: -1e4 * x.square().sum(-1)), start="prior", width=16)
    module = PosteriorTraining(posterior, warm_start=1.0, pool_start=256, bounds=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=1, accelerator="cpu", **quiet).fit(module, ObservationData())
    assert len(module.store.x_0[0, :256].unique(dim=0)) >= 25


@pytest.mark.parametrize("warm_start", [0.0, 1.0], ids=["rtb alone", "wake-sleep alone"])
def test_a_reward(warm_start):
    """exp(-|x - c|^2 / 2) is the likelihood of y = x + n at y = c: the exact evidence is known."""
    prior = GaussianMixturePrior.random(2, 3, 1, steps=8)
    centre = torch.tensor([1.0, -1.0])
    posterior = Posterior(prior, Reward(lambda x: -(x - centre).square().sum(-1) / 2), width=32)
    options = {"warm_start": warm_start, "draws": 64}
    assert gain(posterior, None, lambda: fit(posterior, 120, **options, **SMALL)) > 5
    draws = importance(posterior, None, 4000, torch.Generator().manual_seed(2))
    truth = prior.log_evidence(torch.eye(2), 1.0, centre) + torch.tensor(2 * torch.pi).log()
    assert abs(float((draws.log_z - truth) / draws.log_z_error)) < 4.5


# Seeds


def weights_after(steps: int, seed: int, global_seed: int, **options) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(global_seed)
        posterior = Posterior(GaussianMixturePrior.random(2, 3, 1, steps=4), InverseProblem(torch.eye(2), GaussianNoise(1.0)), width=16)
        fit(posterior, steps, seed, progress=False, warm_start=0.7, states=16, pool_start=32, slots=8, refresh=3, **options)
    return {name: value.clone() for name, value in posterior.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"y": torch.zeros(2), "objective": "rtb"}], ids=["amortised", "one observation"])
def test_the_seed_decides_all(options):
    """Whatever the state of torch's global generator."""
    first, again, other = (weights_after(12, *seeds, **options) for seeds in ((5, 0), (5, 1), (6, 0)))
    for name, value in first.items():
        assert torch.equal(again[name], value), name
    assert not torch.equal(other["network.last.weight"], first["network.last.weight"])
    assert not torch.equal(other["log_z.bias"], first["log_z.bias"])


class Noted:
    """What each training step leaves behind: trained parameters, learning rates, how many steps the optimiser's moments hold."""

    def __init__(self, monkeypatch):
        self.weights, self.rates, self.ages = [], [], []
        original = PosteriorTraining.training_step

        def training_step(module, batch, index):
            original(module, batch, index)
            optimizer = module.optimizers().optimizer
            self.weights.append([p.detach().clone() for p in module.posterior.trainable()])
            self.rates.append([group["lr"] for group in optimizer.param_groups])
            self.ages.append(int(optimizer.state[module.posterior.log_scale]["step"]))

        monkeypatch.setattr(PosteriorTraining, "training_step", training_step)


def test_what_a_fit_leaves_is_the_average(monkeypatch):
    """avg <- d avg + (1 - d) parameter, d = min(decay, (1 + n) / (10 + n)), over all steps, in place of the last weights."""
    posterior = Posterior(GaussianMixturePrior.random(2, 3, 1, steps=4), InverseProblem(torch.eye(2), GaussianNoise(1.0)), width=16)
    average = [p.detach().clone() for p in posterior.trainable()]
    noted = Noted(monkeypatch)
    fit(posterior, 15, progress=False, states=16, pool_start=32, slots=8, warm_start=0.6, ema_decay=0.5, line_search=False)
    for n, weights in enumerate(noted.weights):
        d = min(0.5, (1 + n) / (10 + n))
        average = [d * a + (1 - d) * w for a, w in zip(average, weights, strict=True)]
    for ours, theirs, last in zip(posterior.trainable(), average, noted.weights[-1], strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours, last)


def test_each_phase_starts_afresh(monkeypatch):
    """New moments, and a warm-up and a fall of the learning rates below their peaks."""
    posterior = Posterior(GaussianMixturePrior.random(2, 3, 1, steps=4), InverseProblem(torch.eye(2), GaussianNoise(1.0)), width=16)
    noted = Noted(monkeypatch)
    fit(posterior, 20, progress=False, states=16, pool_start=32, slots=8, warm_start=0.6, lr=1e-3, lr_rtb=1e-4)
    assert noted.ages == [*range(1, 13), *range(1, 9)]
    rates = [min(group) for group in noted.rates]
    for phase, peak in ((rates[:12], 1e-3), (rates[12:], 1e-4)):
        assert phase[0] < max(phase)
        assert 0.3 * peak < max(phase) <= peak
        assert phase[-1] < 0.2 * peak


def test_training_leaves_the_prior_alone():
    prior = GaussianMixturePrior.random(2, 3, 1, steps=4)
    held = {name: value.clone() for name, value in prior.state_dict().items()}
    posterior = Posterior(prior, InverseProblem(torch.eye(2), GaussianNoise(1.0)), width=16)
    start = {name: value.clone() for name, value in posterior.weights().items()}
    fit(posterior, 12, progress=False, warm_start=0.5, states=16, pool_start=32, slots=8)
    assert all(torch.equal(prior.state_dict()[name], value) for name, value in held.items())
    moved = {name for name, value in posterior.weights().items() if not torch.equal(value, start[name])}
    assert {name for name, p in posterior.named_parameters() if p.requires_grad} <= moved
    assert not [name for name in moved if name.startswith("problem.")]


# Several devices

TWO_PROCESSES = """
from pathlib import Path

import torch
from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Posterior, fit

if __name__ == "__main__":
    posterior = Posterior(GaussianMixturePrior.random(2, steps=5), InverseProblem(torch.ones(1, 2), GaussianNoise(0.5)), width=16)
    options = {"devices": 2, "strategy": "ddp", "accelerator": "cpu"}
    fit(posterior, 6, warm_start=0.5, states=16, observations=2, draws=4, progress=False, trainer=options)
    sums = [round(float(p.detach().double().sum()), 12) for p in (*posterior.trainable(), *posterior.log_z.parameters())]
    Path(f"weights_{torch.distributed.get_rank()}").write_text(str(sums))
"""


def test_two_processes_keep_the_same_weights(tmp_path):
    """Each sees its own pairs and paths; their gradients are averaged, those of the chunks too."""
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ((tmp_path / f"weights_{rank}").read_text() for rank in (0, 1))
    assert one == two and len(one) > 100


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_is_refused(precision):
    posterior = Posterior(GaussianMixturePrior.random(2, steps=3), InverseProblem(torch.ones(1, 2), GaussianNoise(0.5)), width=16)
    with pytest.raises(ValueError, match=f"precision must be 32, 64 or bf16-mixed, got '{precision}'"):
        fit(posterior, 2, progress=False, trainer={"precision": precision})


def test_in_bf16_mixed_the_networks_alone_are(make_prior, monkeypatch):
    """Under Lightning's autocast states, guide and densities keep their dtype; roll-outs for the pool, before the first step, are in full,
    and after training nothing is left of it."""
    prior, seen = make_prior("unet2d"), []
    problem = InverseProblem(lambda x: x.flatten(1)[:, :2], GaussianNoise(0.3))
    posterior = Posterior(prior, problem)
    assert posterior.exact_end and isinstance(posterior.guide, CovarianceGuidance)

    def note(module, args, output):
        seen.append((torch.is_autocast_enabled("cpu"), output.sample.dtype))

    guided = type(posterior.guide).forward

    def forward(guide, *args):
        assert not torch.is_autocast_enabled("cpu") and args[0].dtype == torch.float32
        return guided(guide, *args)

    monkeypatch.setattr(type(posterior.guide), "forward", forward)
    for network in (posterior.network.network, prior.network):
        network.register_forward_hook(note)
    options = {"states": 16, "pool_start": 16, "slots": 4, "draws": 2, "warm_start": 0.5, "bounds": 0, "line_search": False}
    fit(posterior, 3, progress=False, trainer={"precision": "bf16-mixed"}, **options)
    first = seen.index((True, torch.bfloat16))
    assert set(seen[:first]) == {(False, torch.float32)} and set(seen[first:]) == {(True, torch.bfloat16)} and prior.autocast is None
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in posterior.parameters())
