"""Bad input of scientists: each gets one clear error that names the argument, says what it was and what is expected.

Lenses and exposures that physics forbids, an operator or a reward that loses its batch, generators and autoencoders that do not fit, and a
decoder without a gradient where a guide asks for one.
"""

import re

import pytest
import torch
from conftest import Coarse, make_network, make_scheduler
from diffusers import AutoencoderKL, VQModel

from priors import GaussianMixturePrior, GeneratorPrior, LatentPrior
from rtb_inverse.baselines import dps
from rtb_inverse.noise import PoissonNoise
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward
from tasks import Lensing, LensingFamily, LowDoseCT

NAN, SHAPE = float("nan"), (1, 8, 8)
PRIOR = GaussianMixturePrior.random(3, 3, 0, torch.float64, steps=3)
W = torch.tensor([[1.0, 0.5], [0.0, 1.0]])


def lensing(**options) -> Lensing:
    return Lensing(SHAPE, 16, **options)


def behind(einstein_radius=1.0, axis_ratio=0.8, angle=1.0, g_1=0.0, g_2=0.0) -> torch.Tensor:
    """An observation behind that lens."""
    return LensingFamily(lensing()).observation(torch.zeros((1, 1, 16, 16)), [einstein_radius, axis_ratio, angle, g_1, g_2])


def ct(**options) -> LowDoseCT:
    return LowDoseCT(SHAPE, 4, **options)


def posterior(operator, **options) -> Posterior:
    return Posterior(PRIOR, InverseProblem(operator, GaussianNoise(0.5), **options), width=8)


def reward(log_reward) -> Posterior:
    return Posterior(PRIOR, Reward(log_reward), width=8)


def latent(scaling_factor=None, kind=VQModel) -> LatentPrior:
    """A prior in the latents of an autoencoder whose config has no scaling factor."""
    config = {"scaling_factor": None, "latent_channels": 1, "norm_num_groups": 4, "block_out_channels": (8,)}
    return LatentPrior(make_network("unet2d"), make_scheduler(), kind(1, 1, **config), scaling_factor=scaling_factor)


CASES = {
    # lenses
    "no Einstein radius": (lambda: lensing(einstein_radius=0), "einstein_radius must be a finite number above 0, got 0"),
    "Einstein radius below 0": (lambda: lensing(einstein_radius=-1.0), "einstein_radius must be a finite number above 0, got -1.0"),
    "Einstein radius NaN": (lambda: lensing(einstein_radius=NAN), "einstein_radius must be a finite number above 0, got nan"),
    "axis ratio 0": (lambda: lensing(axis_ratio=0), "axis_ratio must be in (0, 1], got 0"),
    "axis ratio above 1": (lambda: lensing(axis_ratio=1.2), "axis_ratio must be in (0, 1], got 1.2"),
    "axis ratio NaN": (lambda: lensing(axis_ratio=NAN), "axis_ratio must be in (0, 1], got nan"),
    "shear of modulus above 1": (lambda: lensing(shear=(0.8, 0.7)), "shear must be of modulus below 1, got (0.8, 0.7)"),
    "shear of modulus 1": (lambda: lensing(shear=(0.0, -1.0)), "shear must be of modulus below 1, got (0.0, -1.0)"),
    "shear NaN": (lambda: lensing(shear=(NAN, 0.0)), "first element of shear must be a finite number, got nan"),
    "one number for shear": (lambda: lensing(shear=0.1), "shear must be two finite numbers, got 0.1"),
    "angle NaN": (lambda: lensing(angle=NAN), "angle must be a finite number, got nan"),
    "centre NaN": (lambda: lensing(centre=(0.0, NAN)), "second element of centre must be a finite number, got nan"),
    "family from Einstein radius 0": (
        lambda: LensingFamily(lensing(), einstein_radius=(0.0, 1.0)),
        "einstein_radius must be a range within (0, inf], got (0.0, 1.0)",
    ),
    "family of axis ratios above 1": (
        lambda: LensingFamily(lensing(), axis_ratio=(0.5, 1.1)),
        "axis_ratio must be a range within (0, 1], got (0.5, 1.1)",
    ),
    "an observation's lens out of range": (lambda: behind(axis_ratio=1.2), "its axis_ratio in [0.6, 0.95], got 1.2"),
    "an observation's lens NaN": (lambda: behind(g_1=NAN), "y must be finite, got NaN or infinity in 1 of 261"),
    # exposures
    "photons 0": (lambda: ct(photons=0), "photons must be a finite number above 0, got 0"),
    "photons below 0": (lambda: ct(photons=-200.0), "photons must be a finite number above 0, got -200.0"),
    "photons NaN": (lambda: ct(photons=NAN), "photons must be a finite number above 0, got nan"),
    "background below 0": (lambda: ct(background=-1.0), "background must be a finite number of at least 0, got -1.0"),
    "attenuation below 0": (lambda: ct(attenuation=-8.0), "attenuation must be a finite number above 0, got -8.0"),
    "gain below 0": (lambda: PoissonNoise(-1.0), "gain must be finite and above 0, got -1.0"),
    "gain 0": (lambda: PoissonNoise(0), "gain must be finite and above 0, got 0.0"),
    "rates of a background below 0": (lambda: PoissonNoise(1.0, -1.0), "background must be finite and at least 0, got -1.0"),
    "counts below 0": (lambda: ct().check_y(-torch.ones((1, *ct().y_shape))), "y must be counts, 0, 1, 2, ..., for PoissonNoise, got -1"),
    # operators
    "operator of the first element": (
        lambda: posterior(lambda x: x[:1]),
        "operator must map a batch (M, *shape) to a batch (M, *y_shape): on x of shape (3, 3) it gave (1, 3)",
    ),
    "operator of the mean": (
        lambda: posterior(lambda x: x.mean(0, keepdim=True)),
        "operator must map a batch (M, *shape) to a batch (M, *y_shape): on x of shape (3, 3) it gave (1, 3)",
    ),
    "operator of the mean, as long as the batch by chance": (
        lambda: posterior(lambda x: x.mean(0)),
        "operator must keep the batch: on 3 and 1 elements it gave (3,) and (3,)",
    ),
    "operator for a batch of 3": (
        lambda: posterior(lambda x: x[:1].expand(3, -1)),
        "operator must keep the batch: on 3 and 1 elements it gave (3, 3) and (3, 3)",
    ),
    "operator that transposes": (
        lambda: posterior(lambda x: x.T),
        "operator must keep the batch: on 3 and 1 elements it gave (3, 3) and (3, 1)",
    ),
    # generators and autoencoders
    "generator of another latent": (
        lambda: GeneratorPrior(lambda z: z @ W, 3),
        "generator must take z of shape (M, 3), got RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x2)",
    ),
    "generator of latent images": (
        lambda: GeneratorPrior(torch.nn.ConvTranspose2d(4, 1, 4), (3, 2, 2)),
        "generator must take z of shape (M, 3, 2, 2), got RuntimeError: ",
    ),
    "generator of the first latent": (
        lambda: GeneratorPrior(lambda z: z[:1] @ W, 2),
        "generator must keep the batch, (M, *data_shape) for M z's, got (1, 2) for 2 of them",
    ),
    "no scaling factor": (latent, "scaling_factor must be given, got None: the autoencoder's config has none"),
    "no scaling factor of a VAE": (
        lambda: latent(kind=AutoencoderKL),
        "scaling_factor must be given, got None: the autoencoder's config has none",
    ),
    "scaling factor 0": (lambda: latent(0.0), "scaling_factor must be a finite number above 0, got 0.0"),
    "scaling factor NaN": (lambda: latent(NAN), "scaling_factor must be a finite number above 0, got nan"),
    # rewards
    "reward of the whole batch": (
        lambda: reward(lambda x: x.sum()),
        "log_reward must map a batch (M, *shape) to a batch (M, *y_shape): on x of shape (3, 3) it gave ()",
    ),
    "reward as a column": (
        lambda: reward(lambda x: x.sum(-1, keepdim=True)),
        "log_reward must give one number per x: on a batch of 3 it gave shape (3, 1), expected (3,)",
    ),
    "reward per element": (
        lambda: reward(lambda x: -(x**2)),
        "log_reward must give one number per x: on a batch of 3 it gave shape (3, 3), expected (3,)",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_clear_error(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


# A decoder without a gradient

DECODERS = {"under no_grad": torch.no_grad()(lambda z: z @ W), "detached": lambda z: (z @ W).detach()}
SEEN = InverseProblem(torch.tensor([[1.0, 1.0]]), GaussianNoise(0.1))


@pytest.fixture(params=DECODERS)
def f(request):
    return DECODERS[request.param]


class Decoded(Coarse):
    """A chain whose draws are not exact, and x = f(z)."""

    def __init__(self, f):
        super().__init__(2)
        self.f = f

    def decode(self, x_0):
        return self.f(x_0.float()).to(x_0)


def test_a_guide_through_a_decoder_without_gradient(f):
    """Asked for, it is refused; not asked for, the posterior starts at the prior."""
    with pytest.raises(ValueError, match=r"start='guided' needs a differentiable operator \(and decode\) .*; expected start='prior' here"):
        Posterior(Decoded(f), SEEN, "guided", width=8)
    assert Posterior(Decoded(f), SEEN, width=8).start == "prior"
    assert Posterior(Decoded(lambda z: z @ W), SEEN, width=8).start == "guided"


def test_a_generator_without_gradient_is_guided_by_its_own_draws(f):
    """Draws of z are exact and cheap: weighed by the likelihood they guide without any gradient. DPS, which needs one, says so."""
    prior = GeneratorPrior(f, 2, steps=4)
    guided, plain = Posterior(prior, SEEN, width=8), Posterior(prior, SEEN, "prior", width=8)
    assert guided.start == "guided" and guided.guide is None and guided.references is not None
    y = torch.tensor([[3.0]])
    near, far = (SEEN.log_likelihood(p.sample(y, 64, torch.Generator().manual_seed(0)).x, y).mean() for p in (guided, plain))
    assert float(near) > float(far) + 100
    with pytest.raises(ValueError, match="prior must have a differentiable decode for dps, got one whose x carries no gradient"):
        dps(prior, SEEN, y, 2)
