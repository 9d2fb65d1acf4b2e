"""Where tensors lie: states on one device and times on another, as on a GPU, whose grids stay on the CPU."""

import pytest
import torch

from priors import DiffusersPrior, GeneratorPrior
from rtb_inverse import Posterior, evaluate, fit, importance, renoise_mcmc, simulate_observations, smc
from rtb_inverse.baselines import dps
from rtb_inverse.chains import renoise, rollout
from tasks import Inpainting

CALLS = {
    "initial": lambda prior, x, t, s: prior.initial((2, 1)).sample(),
    "denoise": lambda prior, x, t, s: prior.denoise(x, t),
    "transition": lambda prior, x, t, s: prior.transition(x, t, s).log_prob(x),
    "error": lambda prior, x, t, s: prior.denoiser_error(prior.times[:-1]),
    "covariance": lambda prior, x, t, s: prior.denoiser_covariance(t),
    "add_noise": lambda prior, x, t, s: prior.schedule.add_noise(x, x, t),
    "rollout": lambda prior, x, t, s: rollout(prior, 2).x,
    "renoise": lambda prior, x, t, s: renoise(prior, x),
}


@pytest.mark.parametrize("kind", ["mixture", "gaussian", "unet2d", "unet1d", "generator"])
@pytest.mark.parametrize("call", CALLS)
def test_times_on_the_cpu_serve_states_elsewhere(call, kind, make_prior):
    """The meta device has a GPU's rules for what may meet what, and no numbers."""
    prior = GeneratorPrior(lambda z: z.exp(), 3) if kind == "generator" else make_prior(kind)
    prior.denoiser_error(prior.times[1])  # measured where it is cheap
    prior.to("meta")
    x = torch.zeros((2, 1, *prior.shape), **prior._options())
    found = CALLS[call](prior, x, prior.times[1], prior.times[2])
    assert found is None or found.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_from_fit_to_report_on_a_gpu(precision):
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=6).to("cuda")
    posterior, generator = Posterior(prior, Inpainting(prior.shape, "half").to("cuda")), torch.Generator("cuda").manual_seed(0)
    options = {"warm_start": 0.5, "pool": 64, "pool_start": 64, "trainer": {"precision": precision, "accelerator": "gpu"}}
    fit(posterior, 4, progress=False, **options)
    held = simulate_observations(posterior, 4, generator)
    for method in (importance, smc, renoise_mcmc):
        assert method(posterior, held.y, 8, generator).x.device.type == "cuda"
    dps(prior, posterior.problem, held.y, 4, generator)
    assert torch.isfinite(torch.tensor(evaluate(posterior, held, 8, generator).numbers["elbo"].value))
