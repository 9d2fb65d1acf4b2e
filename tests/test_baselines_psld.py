"""Latent DPS with gluing, against a loop by hand, closed forms of its parts, and the shipped latents."""

from itertools import pairwise

import pytest
import torch

from priors import GaussianPrior, LatentPrior
from rtb_inverse import GaussianNoise, InverseProblem, Reward
from rtb_inverse.baselines import dps, psld, tuned
from rtb_inverse.baselines.psld import pull_back
from rtb_inverse.diagnostics import Estimate, crps
from rtb_inverse.distributions import draw
from tasks import Denoising, Inpainting, SuperResolution

D = torch.float64
MATRIX = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.4, 1.0]], dtype=D)
SETTING = {"zeta": 0.3, "gamma": 0.2}


class Curved(GaussianPrior):
    """Images of three pixels by two latents. What encodes is no exact inverse of what decodes, as in any autoencoder."""

    def __init__(self):
        super().__init__(torch.zeros(2, dtype=D), torch.eye(2, dtype=D) + 0.5, steps=4)

    def decode(self, x_0):
        return torch.stack([x_0[..., 0], x_0[..., 1], x_0.prod(-1)], -1)

    def encode(self, x):
        return 0.9 * x[..., :2].sin()


def problem(noise_std: float = 0.1) -> InverseProblem:
    return InverseProblem(MATRIX, GaussianNoise(noise_std))


def test_psld_is_the_hand_written_loop():
    """Draw by draw, and by central differences in place of autograd."""
    prior, y = Curved(), torch.tensor([[0.4, -0.3], [1.0, 2.0]], dtype=D)
    particles = psld(prior, problem(), y, 3, torch.Generator().manual_seed(1), **SETTING)
    generator = torch.Generator().manual_seed(1)
    z = draw(prior.initial((3, 2)), generator)
    for t, s in pairwise(prior.times):
        unguided = draw(prior.transition(z, t, s), generator)
        slopes = torch.stack([torch.stack([slope(prior, z[i, b], t, y[b]) for b in range(2)]) for i in range(3)])
        z = unguided - slopes
    torch.testing.assert_close(particles.x, prior.decode(z), rtol=1e-6, atol=1e-6)
    assert float(slopes.abs().min()) > 1e-4 and torch.equal(particles.log_w, torch.zeros((3, 2), dtype=D))


def slope(prior, z_t, t, y, h=1e-6):
    """Of one latent (2,) and one y (2,); the length of the step down the residual is held fixed at z_t."""
    z_0 = prior.denoise(z_t[None], t)[0]
    back = MATRIX.T @ (y - MATRIX @ prior.decode(z_0))
    ratio = back.square().sum() / (MATRIX @ back).square().sum()

    def distance(z_t):
        z_0 = prior.denoise(z_t[None], t)[0]
        x_0 = prior.decode(z_0)
        r = y - MATRIX @ x_0
        return 2 * SETTING["zeta"] * r.norm() + SETTING["gamma"] * (z_0 - prior.encode(x_0 + ratio * MATRIX.T @ r)).norm()

    return torch.stack([(distance(z_t + h * e) - distance(z_t - h * e)) / (2 * h) for e in torch.eye(2, dtype=D)])


def test_without_gluing_it_is_dps():
    prior, y = Curved(), torch.tensor([[0.4, -0.3]], dtype=D)
    ours = psld(prior, problem(), y, 5, torch.Generator().manual_seed(0), zeta=0.3, gamma=1e-300).x
    torch.testing.assert_close(ours, dps(prior, problem(), y, 5, torch.Generator().manual_seed(0), zeta=0.3).x)


@pytest.mark.parametrize("task", [Denoising((1, 8, 8)), Inpainting((1, 8, 8), "half"), SuperResolution((1, 8, 8), 2, "area")])
def test_the_glued_image_agrees_with_y_where_a_is_orthogonal(task, generator):
    x, y = torch.randn((2, 3, 1, 8, 8), generator=generator), torch.randn((3, *task.y_shape), generator=generator)
    glued = x + pull_back(task, x, y - task(x))
    torch.testing.assert_close(task(glued), y.expand(2, *y.shape), rtol=1e-4, atol=1e-4)


def test_at_the_observation_itself_nothing_is_pulled_back():
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=D)
    task = problem().bind((3,))
    assert torch.equal(pull_back(task, x, torch.zeros((1, 2), dtype=D)), torch.zeros((1, 3), dtype=D))


def test_the_tuned_setting_is_the_nearest(generator):
    prior, task = Curved(), problem().bind((3,))
    x = prior.decode(prior.sample(4, generator))
    y = task.simulate(x, generator)
    settings = [{"zeta": 1e300, "gamma": 0.1}, {"zeta": 0.01, "gamma": 0.1}, {"zeta": 0.3, "gamma": 0.1}]

    def off(setting):
        return float(crps(psld(prior, task, y, 16, torch.Generator().manual_seed(2), **setting).x, x).mean())

    found = tuned(psld, prior, task, x, y, settings, 16, torch.Generator().manual_seed(2))
    assert found == settings[2] and off(found) < off(settings[1])
    with pytest.raises(ValueError, match=r"setting must be given that does not diverge, got zeta = 1e\+300 and gamma = 0.1"):
        tuned(psld, prior, task, x, y, settings[:1], 16, generator)
    with pytest.raises(ValueError, match="setting must be given that does not diverge, got none"):
        tuned(psld, prior, task, x, y, [], 16, generator)


@pytest.mark.slow
def test_on_the_shipped_latents_it_comes_nearer_to_y(generator):
    """Chi-squared of four observations, a box hidden, without guidance and with it: |z| > 3 of the difference."""
    prior = LatentPrior.from_pretrained("priors/mnist_latent", steps=10)
    task = Inpainting(prior.data_shape, "box", noise_std=0.1).bind(prior.data_shape)
    y = task.simulate(prior.decode(prior.sample(4, generator)), generator)
    guided = psld(prior, task, y, 4, generator, zeta=0.3, gamma=0.1).x
    far = [task.residual(x, y).flatten(2).square().mean((0, 2)) for x in (prior.decode(prior.sample(16, generator))[:, None], guided)]
    gain = Estimate.of(far[0] - far[1])
    assert gain.value > 3 * gain.error


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gamma": 0.0}, "gamma must be a finite number above 0, got 0.0"),
        ({"zeta": float("nan")}, "zeta must be a finite number above 0, got nan"),
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"y": torch.ones(2, dtype=D)}, r"y must have shape \(B, 2\), got \(2,\)"),
        ({"problem": InverseProblem(lambda x: x**2, GaussianNoise(0.1)), "y": torch.ones((1, 3), dtype=D)}, "problem must be linear"),
        ({"problem": Reward(lambda x: x.sum(-1)), "y": None}, "problem must be linear under Gaussian noise for psld"),
        ({"prior": GaussianPrior(torch.zeros(3, dtype=D), torch.eye(3, dtype=D))}, "prior must have encode, .* got a GaussianPrior"),
        ({"zeta": 1e300}, "must be finite"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_clear_error(changed, message):
    with pytest.raises(ValueError, match=message):
        psld(**{"prior": Curved(), "problem": problem(), "y": torch.ones((1, 2), dtype=D), "n": 2, **changed})


def test_a_prior_is_no_problem():
    with pytest.raises(TypeError, match="prior must be a Prior, got InverseProblem"):
        psld(problem(), problem(), torch.ones((1, 2)))
