"""Tiny untrained priors and z-scores. Every test seeds its own `torch.Generator`; nothing here touches the global random state for good."""

import os
from contextlib import nullcontext

import pytest
import torch
from accelerator import accelerator
from diffusers import DDPMScheduler, UNet1DModel, UNet2DModel

from priors import DiffusersPrior, GaussianMixturePrior, GaussianPrior
from rtb_inverse.chains import Prior, path_log_prob, rollout
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.schedules import FlowMatching, VarianceExploding, VariancePreserving, expand

# Copies of a network are to be equal bit for bit; MKL rounds by where a matrix lies in memory on some processors, unless told not to.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # read at its first product
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # tiny tensors: more threads only wait for each other

# One of each kind; the variance-preserving one is that of the tiny scheduler below.
SCHEDULES = {
    "vp": VariancePreserving(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type="v_prediction"),
    "ve": VarianceExploding(sigma_min=0.05, sigma_max=20.0),
    "flow": FlowMatching(shift=2.0),
}
PRIORS = ("mixture", "gaussian", "unet2d", "unet1d")


def make_network(kind: str) -> torch.nn.Module:
    """An untrained network with seeded weights, its last convolution drawn wide enough to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in ("unet2d", "colours"):
            c = 1 if kind == "unet2d" else 3
            network = UNet2DModel(
                sample_size=8, in_channels=c, out_channels=c, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
            )  # fmt: skip
            torch.nn.init.normal_(network.conv_out.weight, std=0.3)
            return network
        return UNet1DModel(
            sample_size=16, in_channels=2, out_channels=2, block_out_channels=(32, 32), layers_per_block=1,
            time_embedding_dim=8, extra_in_channels=8,
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D"), up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
        )  # fmt: skip


def make_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )  # fmt: skip


def make_diffusers_prior(kind: str, schedule=None, steps: int = 4, measured: bool = True, dtype=torch.float32, **options) -> DiffusersPrior:
    prior = DiffusersPrior(make_network(kind).to(dtype), schedule or make_scheduler(), steps, **options)
    if measured:
        generator = torch.Generator().manual_seed(1)
        prior.measure_error(torch.randn((16, *prior.shape), generator=generator).to(dtype), 8, generator)
    return prior


def make_mixture(d: int = 3, components: int = 4, steps: int = 4, seed: int = 0, **options) -> GaussianMixturePrior:
    return GaussianMixturePrior.random(d, components, seed, torch.float64, steps=steps, **options)


def make_gaussian(shape=(1, 2, 2), steps: int = 4, seed: int = 0, **options) -> GaussianPrior:
    """A full covariance with eigenvalues in [0.1, 1.1]."""
    generator, d = torch.Generator().manual_seed(seed), torch.Size(shape).numel()
    Q = torch.linalg.qr(torch.randn((d, d), generator=generator, dtype=torch.float64))[0]
    covariance = (Q * (0.1 + torch.rand(d, generator=generator, dtype=torch.float64))) @ Q.T
    return GaussianPrior(torch.randn(shape, generator=generator, dtype=torch.float64), covariance, steps=steps, **options)


def z(samples: torch.Tensor, truth: float) -> float:
    """The mean of the samples less the truth, in its own standard errors."""
    return float((samples.mean() - truth) / samples.std() * samples.numel() ** 0.5)


@pytest.fixture(params=["there", pytest.param("cuda", marks=pytest.mark.gpu)])
def elsewhere(request):
    """A device other than the CPU: one that is not there, with a GPU's rules and numbers; and a GPU."""
    with accelerator() if request.param == "there" else nullcontext(torch.device("cuda")) as device:
        yield device


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_prior():
    """make_prior(kind, schedule=None, steps=4, **options): analytic ones in float64, networks in float32 unless `dtype` is given."""

    def make(kind: str, schedule=None, steps: int = 4, **options):
        if kind == "mixture":
            return make_mixture(schedule=schedule, steps=steps, **options)
        if kind == "gaussian":
            return make_gaussian(schedule=schedule, steps=steps, **options)
        return make_diffusers_prior(kind, schedule, steps, **options)

    return make


@pytest.fixture(params=PRIORS)
def prior(request, make_prior):
    """Each kind of prior in turn."""
    return make_prior(request.param)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    """Each kind of schedule in turn."""
    return SCHEDULES[request.param]


@pytest.fixture
def unet2d_prior():
    return make_diffusers_prior("unet2d")


@pytest.fixture
def unet1d_prior():
    return make_diffusers_prior("unet1d")


@pytest.fixture
def mixture_prior():
    return make_mixture()


@pytest.fixture
def scheduler():
    return make_scheduler()


@pytest.fixture
def assert_mean():
    """assert_mean(samples, expected): the mean over the first axis is `expected` within `limit` of its own standard errors, elementwise.
    At the default limit a correct sampler fails one element in 150,000; the tests make fewer comparisons than that."""

    def check(samples: torch.Tensor, expected, limit: float = 4.5):
        samples = samples.double()
        error = samples.std(0) / len(samples) ** 0.5
        z = (samples.mean(0) - torch.as_tensor(expected, dtype=torch.float64)) / error
        assert bool((error > 0).all()), "the samples do not vary"
        assert float(z.abs().max()) < limit, f"largest |z| = {float(z.abs().max()):.2f}"

    return check


class Coarse(Prior):
    """x_0 ~ N(1, 4 I) with its exact denoiser in a few Gaussian steps of variance "small": a Gaussian chain, but not the exact reversal."""

    def __init__(self, d: int):
        super().__init__((d,), FlowMatching(), 4, variance="small")
        self.register_buffer("zero", torch.zeros(1, dtype=torch.float64))

    def denoise(self, x_t, t):
        alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(t))
        return 1 + 4 * alpha / (4 * alpha**2 + sigma**2) * (x_t - alpha)


def marginal(prior: Coarse) -> tuple[float, float]:
    """Mean and variance of the chain's own x_0, from its affine steps."""
    zero, one = torch.zeros((1, 2), dtype=torch.float64), torch.ones((1, 2), dtype=torch.float64)
    start = prior.initial((1,))
    mean, variance = float(start.mean[0, 0]), float(start.variance[0, 0])
    for t, s in zip(prior.times[:-1], prior.times[1:], strict=True):
        offset = float(prior.transition(zero, t, s).mean[0, 0])
        step = prior.transition(one, t, s)
        slope = float(step.mean[0, 0]) - offset
        mean, variance = offset + slope * mean, slope**2 * variance + float(step.variance[0, 0])
    return mean, variance


MATRIX, NOISE = torch.tensor([[1.0, -0.5]], dtype=torch.float64), 0.5  # of what a mixture is seen by


def mixture_posterior(start: str = "guided") -> Posterior:
    """Untrained, but off the start: no ratio is one by chance."""
    prior = make_mixture(2, steps=6)
    posterior = Posterior(prior, InverseProblem(MATRIX, GaussianNoise(NOISE)), start, width=16)
    with torch.no_grad():
        posterior.log_scale += 0.2
    return posterior


@pytest.fixture
def assert_saved(tmp_path):
    """assert_saved(posterior, y): saved and loaded, it has the same problem, draws and densities."""

    def check(posterior, y):
        posterior.save_pretrained(tmp_path)
        loaded = Posterior.from_pretrained(tmp_path)
        assert type(loaded.problem) is type(posterior.problem) and loaded.problem.config == posterior.problem.config
        paths = rollout(posterior, 2, y, torch.Generator().manual_seed(1))
        assert torch.equal(rollout(loaded, 2, y, torch.Generator().manual_seed(1)).x, paths.x)
        assert torch.equal(path_log_prob(loaded, paths), path_log_prob(posterior, paths))
        assert torch.equal(loaded.log_likelihood(paths.x_0, y), posterior.log_likelihood(paths.x_0, y))

    return check
