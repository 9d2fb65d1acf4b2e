"""What callers try who know the public names only: from another folder, with parts of their own, in the wrong order."""

import shutil

import pytest
import torch
from jsonargparse import ArgumentParser

from priors import DiffusersPrior, DigitGenerator, GaussianPrior, GeneratorPrior, MNISTClassifier, held_out_digits
from rtb_inverse import (
    GaussianNoise,
    InverseProblem,
    Posterior,
    Reward,
    evaluate,
    importance,
    networks,
    objectives,
    refine,
    renoise_mcmc,
    simulate_observations,
    smc,
)
from rtb_inverse.baselines import dps, fps_smc, psld, twisted
from rtb_inverse.chains import renoise, rollout
from tasks import Inpainting

D = torch.float64


def white(steps=8):
    return GaussianPrior(torch.zeros(2, dtype=D), torch.eye(2, dtype=D), steps=steps)


def test_shipped_folders_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DiffusersPrior.from_pretrained("priors/digits").shape == (1, 8, 8)
    assert DigitGenerator.prior("priors/digits_vae").data_shape == (1, 8, 8)
    assert not MNISTClassifier.from_pretrained("priors/mnist_classifier").training
    with pytest.raises(FileNotFoundError, match="no folder 'priors/no/such'"):
        DiffusersPrior.from_pretrained("priors/no/such")
    (tmp_path / "priors" / "digits").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"priors/digits has no scheduler_config\.json"):  # one's own folder comes first
        DiffusersPrior.from_pretrained("priors/digits")


def test_a_prior_without_its_error_is_warned_of_and_measured(tmp_path):
    """Eight held-out digits, a box hidden: measured on its own draws it is hundreds of nats better."""
    folder = shutil.copytree("priors/digits", tmp_path / "digits")
    for file in ("denoiser_error.safetensors", "draws.safetensors"):
        (folder / file).unlink()
    prior, problem = DiffusersPrior.from_pretrained(folder), Inpainting((1, 8, 8))
    y = problem.simulate(held_out_digits()[:8], torch.Generator().manual_seed(0))

    def elbo():
        return importance(Posterior(prior, problem), y, 8, torch.Generator().manual_seed(1)).log_w.mean(0)

    with pytest.warns(UserWarning, match=r"prior's error is not known: .* prior\.measure_error\(\) measures it"):
        before = elbo()
    gain = (prior.measure_error(knots=16) and elbo()) - before
    assert float(gain.mean()) > 50 and float(gain.mean() / gain.std()) * 8**0.5 > 4


def test_a_network_sees_no_more_states_at_once_than_fit(monkeypatch, generator):
    """Of 48 states of 64 elements 10 at a time; all of them where gradients are asked for."""
    prior, seen, x = DiffusersPrior.from_pretrained("priors/digits", steps=2), [], torch.randn((6, 8, 1, 8, 8), generator=generator)
    prior.network.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    with torch.no_grad():
        whole = prior.denoise(x, prior.times[:1])
        monkeypatch.setattr(networks, "AT_ONCE", 640)
        torch.testing.assert_close(prior.denoise(x, prior.times[:1]), whole, rtol=1e-5, atol=1e-5)
    prior.denoise(x, prior.times[:1])
    assert seen == [48, 10, 10, 10, 10, 8, 48]


def test_a_decode_that_is_assigned_counts(generator):
    class Decoded(GaussianPrior):
        def decode(self, x_0):
            return x_0.exp()

    assigned, mean = white(), torch.zeros(2, dtype=D)
    assigned.decode = torch.exp
    y = torch.tensor([[1.5, 0.4]], dtype=D)
    log_z = [
        importance(Posterior(prior, InverseProblem(lambda x: x, GaussianNoise(0.2))), y, 64, torch.Generator().manual_seed(0)).log_z
        for prior in (assigned, Decoded(mean, torch.eye(2, dtype=D), steps=8))
    ]
    assert assigned.decodes and not white().decodes
    torch.testing.assert_close(*log_z)


class Squared(InverseProblem):
    """A subclass that is its own operator, of another shape than x."""

    def __init__(self):
        super().__init__(None, GaussianNoise(0.3))

    def forward(self, x):
        return x[..., :1] ** 2 / 4


def test_a_subclass_that_overrides_forward_is_its_own_operator():
    y = torch.tensor([[1.0]], dtype=D)
    problems = Squared(), InverseProblem(lambda x: x[..., :1] ** 2 / 4, GaussianNoise(0.3))
    log_z = [importance(Posterior(white(), problem), y, 64, torch.Generator().manual_seed(0)).log_z for problem in problems]
    assert [problem.linear for problem in problems] == [False, False] and problems[0].y_shape == (1,)
    torch.testing.assert_close(*log_z)


def test_objectives_broadcast_nothing():
    q, z = torch.randn((3, 3), generator=torch.Generator().manual_seed(0)), torch.zeros(3)
    for arguments, message in (
        ((q, q, q, z[:, None]), r"log_z must have shape \(B,\), \(3,\), got \(3, 1\)"),
        ((q, q[0], q, z), r"log_p must have shape \(N, B\), as log_q, \(3, 3\), got \(3,\)"),
        ((q, q, q[:, :1], z), r"log_lik must have shape \(N, B\), as log_q, \(3, 3\), got \(3, 1\)"),
        ((q[0], q[0], q[0], z), r"log_q must have shape \(N, B\)"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.rtb(*arguments)
    with pytest.raises(ValueError, match="log_lik must have shape"):
        objectives.vargrad(q, q, z)
    with pytest.raises(ValueError, match="log_w must have shape"):
        objectives.wake_sleep(q, z)


def test_a_report_reads_in_one_glance(generator):
    posterior = Posterior(white(), Inpainting((2,), mask=torch.tensor([True, False]), noise_std=0.5))
    report = evaluate(posterior, simulate_observations(posterior, 3, generator), 8, generator)
    assert report["elbo"] == report.numbers["elbo"] and len(repr(report)) < 2000
    assert f"coverage_90  {report['coverage_90']} (calibrated: 0.778)" in str(report)


POSTERIOR = r"posterior must be a Posterior, got GaussianPrior; Posterior\(prior, problem\) makes one"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        *((lambda f=f: f(white(), torch.ones((1, 1))), TypeError, POSTERIOR) for f in (importance, smc, renoise_mcmc, refine, evaluate)),
        (lambda: simulate_observations(white(), 3), TypeError, POSTERIOR),
        *(
            (lambda f=f: f(Posterior(white(), InverseProblem(torch.eye(2), GaussianNoise(1.0))), torch.ones((1, 2)), 8), TypeError,
             "prior must be a Prior, got Posterior") for f in (dps, fps_smc, psld, twisted)
        ),
        (lambda: rollout(white(), 3, generator=42), TypeError, r"generator must be a torch\.Generator, .* got 42"),
        (lambda: Inpainting((4,)).simulate(torch.zeros((1, 4)), 42), TypeError, r"generator must be a torch\.Generator, .* got 42"),
        (lambda: rollout(white(), 4, level=2), ValueError, "level must be at most the 8 steps .* all of them without a start, got 2"),
        (lambda: rollout(white(), 4, level=9), ValueError, "level must be at most the 8 steps"),
        (
            lambda: rollout(white(), 2, start=torch.zeros((5, 1, 2), dtype=D), level=2),
            ValueError, r"start must have shape \(n, B, \*shape\), \(2, 1, 2\), got \(5, 1, 2\)",
        ),
        (
            lambda: Posterior(white(), Inpainting((2,), mask=torch.tensor([True, False]))).log_z(torch.zeros((1, 1))),
            ValueError, r"condition must be what the network sees of y, 2 numbers each, got 1; posterior\.log_evidence\(y\) takes y",
        ),
        (lambda: renoise(white(), torch.zeros((1, 2)), from_level=9), ValueError, "from_level and to_level must be levels"),
    ],
)  # fmt: skip
def test_a_wrong_call_gets_one_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("owner", "name", "others"),
    [
        (InverseProblem, "operator", {"noise": {"class_path": "rtb_inverse.GaussianNoise", "init_args": {"std": 0.1}}}),
        (Reward, "log_reward", {}),
        (GeneratorPrior, "generator", {"shape": [4]}),
    ],
)
def test_a_module_may_be_what_yaml_gives(owner, name, others):
    """By the parser of the command line."""
    parser, clipped = ArgumentParser(exit_on_error=False), {"class_path": "torch.nn.Threshold", "init_args": {"threshold": 0, "value": 0}}
    parser.add_class_arguments(owner, "it", fail_untyped=False)
    made = parser.instantiate_classes(parser.parse_object({"it": {name: clipped, **others}})).it
    x = torch.randn((3, 4), generator=torch.Generator().manual_seed(0))
    held = made.generator if owner is GeneratorPrior else made.operator
    assert type(made) is owner and torch.equal(held(x), x.clamp_min(0))
