"""Off the CPU: the same numbers from the same seeds, and all that a posterior can do, on a GPU and on a device with a GPU's rules."""

import copy

import pytest
import torch
from accelerator import ThereAccelerator
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils._pytree import tree_leaves

from priors import DiffusersPrior, GeneratorPrior, RandomField
from rtb_inverse import (
    BernoulliNoise,
    GaussianNoise,
    InverseProblem,
    NoiseRange,
    PoissonNoise,
    Posterior,
    evaluate,
    fit,
    importance,
    refine,
    renoise_mcmc,
    rollout,
    simulate_observations,
    smc,
)  # fmt: skip
from rtb_inverse.baselines import deepinv_sampler, dps, fps_smc, hmc, pcn, twisted
from rtb_inverse.chains import Trajectory, renoise
from rtb_inverse.data import ObservationData
from rtb_inverse.evaluation import judge
from rtb_inverse.lightning import PosteriorTraining, quiet
from rtb_inverse.training import score
from tasks import (
    AmbiguousObjects,
    ClassConstraint,
    ClassReward,
    CompressedSensing,
    Deblurring,
    Inpainting,
    InverseScattering,
    Lensing,
    LensingFamily,
    LowDoseCT,
    NavierStokes,
    PhaseRetrieval,
)  # fmt: skip
from tasks.exact import exact_problem

IMAGE = (1, 8, 8)


def classifier():
    layer, generator = torch.nn.utils.skip_init(nn.Linear, 64, 5), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return nn.Sequential(nn.Flatten(), layer)


ON_IMAGES = {
    "inpainting": lambda: Inpainting(IMAGE, "half"),
    "deblurring": lambda: Deblurring(IMAGE, size=5),
    "phase retrieval": lambda: PhaseRetrieval(IMAGE),
    "counts": lambda: InverseProblem(lambda x: (x + 2).relu() + 0.1, PoissonNoise(gain=10, background=1.0), IMAGE),
    "noise range": lambda: NoiseRange(Inpainting(IMAGE, noise_std=1.0), 0.05, 0.5),
    "lenses": lambda: LensingFamily(Lensing(IMAGE, pixels=12, noise_std=0.1, sky=-1.0)),
    "class": lambda: ClassConstraint(classifier(), IMAGE),
    "low-dose ct": lambda: LowDoseCT(IMAGE),
    "scattering": lambda: InverseScattering(IMAGE),
}
ELSE = {
    "gmm2": lambda: exact_problem("gmm2", steps=4),
    "abs2": lambda: exact_problem("abs2", steps=4),
    "gp_blur": lambda: exact_problem("gp_blur", steps=4),
    "diffraction": lambda: AmbiguousObjects.letters(steps=4),
}
DECODED = {
    "generator": lambda: (GeneratorPrior(lambda z: z.exp(), 3, steps=4), InverseProblem(lambda x: x[..., :2], GaussianNoise(0.3))),
    "flow": lambda: (RandomField(16, steps=4), NavierStokes((1, 16, 16), time=0.5, steps=8, factor=2, noise_std=0.3)),
}


def scene(name, make_prior):
    """The prior and the problem, here."""
    if name in ON_IMAGES:
        return make_prior("unet2d"), ON_IMAGES[name]()
    if name in DECODED:
        return DECODED[name]()
    exact = ELSE[name]()
    return exact.prior, exact.problem


def trainer(device):
    return {"accelerator": ThereAccelerator() if device.type == "meta" else "gpu"}


SMALL = {"pool": 8, "pool_start": 8, "states": 4, "draws": 2, "observations": 2, "slots": 4, "bounds": 2}
METHODS = {
    "draws": lambda q, y, g: q.sample(y, 4, g),
    "importance": lambda q, y, g: importance(q, y, 4, g),
    "smc": lambda q, y, g: smc(q, y, 4, g),
    "re-noising": lambda q, y, g: renoise_mcmc(q, y, 4, g, sweeps=2),
    "refine": lambda q, y, g: refine(q, y, 4, g, rounds=1),
    "dps": lambda q, y, g: dps(q.prior, q.problem, y, 4, g),
}


@pytest.mark.parametrize("name", [*ON_IMAGES, *ELSE, *DECODED])
def test_what_a_posterior_does(name, make_prior, elsewhere, generator):
    """The same estimates and densities as here, and every method, of a y and with a generator that are there or on the CPU."""
    prior, problem = scene(name, make_prior)
    here = Posterior(prior, problem)
    held = simulate_observations(here, 2, generator)
    there, y = copy.deepcopy(here).to(elsewhere), held.y.to(elsewhere)
    paths = Trajectory(held.paths.x.to(elsewhere), held.paths.times, y)
    for found, expected in zip(score(there, paths), score(here, held.paths), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)
    for number, (method, run) in enumerate(METHODS.items()):
        if method == "dps" and not (problem.differentiable and prior.differentiable):
            continue
        g = torch.Generator("cpu" if number % 2 else elsewhere).manual_seed(0)
        particles = run(there, held.y if number % 3 else y, g)
        assert particles.x.device.type == particles.log_w.device.type == elsewhere.type, method
    numbers = evaluate(there, simulate_observations(there, 10, generator), 4, generator).numbers
    assert torch.isfinite(torch.tensor(numbers["elbo"].value))


@pytest.mark.parametrize("name", ELSE)
def test_exact_answers(name, elsewhere, generator):
    exact = ELSE[name]()
    y = exact.problem.simulate(exact.prior.sample(2, generator), generator)
    expected = exact.log_evidence(y)
    exact.prior.to(elsewhere), exact.problem.to(elsewhere)
    if name != "diffraction":  # its evidence is estimated
        torch.testing.assert_close(exact.log_evidence(y.to(elsewhere)).cpu(), expected)
    assert exact.draws(y.to(elsewhere), 4, generator).device.type == elsewhere.type


@pytest.mark.parametrize("name", ["inpainting", "gmm2", "generator"])
def test_rivals(name, make_prior, elsewhere, generator):
    prior, problem = scene(name, make_prior)
    y = problem.bind(prior.data_shape).simulate(prior.decode(prior.sample(2, generator)), generator)
    prior.to(elsewhere)
    rivals = {"inpainting": (fps_smc, twisted), "gmm2": (fps_smc, twisted), "generator": (pcn, hmc)}[name]
    for rival in rivals:
        more = {"steps": 4} if rival in (pcn, hmc) else {}
        assert rival(prior, problem, y, 4, generator, **more).x.device.type == elsewhere.type


@pytest.mark.parametrize("name", ["inpainting", "deblurring", "gmm2", "generator"])
def test_training(name, make_prior, elsewhere, generator):
    """`fit` leaves the posterior where it was."""
    prior, problem = scene(name, make_prior)
    posterior = Posterior(prior.to(elsewhere), problem)
    fit(posterior, 4, warm_start=0.5, progress=False, trainer=trainer(elsewhere), **SMALL)
    y = simulate_observations(posterior, 1, generator).y
    fit(posterior, 2, y=y.cpu(), progress=False, trainer=trainer(elsewhere), **SMALL)
    assert {parameter.device.type for parameter in posterior.parameters()} == {elsewhere.type}
    assert posterior.sample(y, 2, generator).x.device.type == elsewhere.type


def test_lightning_takes_a_posterior_elsewhere(make_prior, elsewhere, tmp_path, generator):
    """Made here, trained, judged, used and resumed there, as by the command line; `fit` brings it back."""
    prior, problem = make_prior("unet2d"), Inpainting(IMAGE, "half")
    y = problem.simulate(prior.sample(2, generator), generator)

    def module():
        return PosteriorTraining(Posterior(prior, problem), output=str(tmp_path), warm_start=0.5, test_draws=4, **SMALL)

    quietly = {"devices": 1, "logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
    with quiet():
        Trainer(max_steps=4, callbacks=[saves], **quietly, **trainer(elsewhere)).fit(trained := module(), ObservationData())
        Trainer(**quietly, **trainer(elsewhere)).test(trained, ObservationData(simulated=10), verbose=False)
        (draws,) = Trainer(**quietly, **trainer(elsewhere)).predict(trained, ObservationData(y=y))
        assert draws.x.shape == (4, 2, *IMAGE) and (tmp_path / "report_simulated.json").is_file()
        more = Trainer(max_steps=6, max_epochs=2, enable_checkpointing=False, **quietly, **trainer(elsewhere))
        more.fit(module(), ObservationData(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert more.global_step == 6
    posterior = fit(Posterior(prior, problem), 2, progress=False, trainer=trainer(elsewhere), **SMALL)
    assert posterior.gate.device.type == "cpu"


def test_a_problem_moves_to_its_prior(make_prior, elsewhere, generator):
    prior = make_prior("unet2d").to(elsewhere)
    mask = torch.ones(IMAGE, device=elsewhere)
    of_a_function = InverseProblem(lambda x: x * mask, BernoulliNoise())  # neither has a tensor of its own to tell where it lies
    for problem in (
        Inpainting(IMAGE, "half"), CompressedSensing(IMAGE), InverseProblem(lambda x: x * mask, GaussianNoise(0.1)), of_a_function,
        ClassConstraint(classifier()), InverseProblem(classifier(), BernoulliNoise()),
    ):  # fmt: skip
        posterior = Posterior(prior, problem)
        assert {tensor.device.type for tensor in (*posterior.parameters(), *posterior.buffers())} == {elsewhere.type}
        y = problem.simulate(prior.sample(1, generator), generator).cpu()
        dps(prior, problem.to("cpu"), y, 2, generator)
    assert Posterior(prior, ClassReward(classifier(), 1)).sample(None, 2, generator).x.device.type == elsewhere.type


def test_two_posteriors_share_a_problem(make_prior, elsewhere, generator):
    problem = Inpainting(IMAGE, "half")
    here, there = Posterior(make_prior("unet2d"), problem), Posterior(make_prior("unet2d").to(elsewhere), problem)
    for posterior in (here, there, here):
        assert posterior.sample(torch.zeros(1, 32), 2, generator).x.device.type == posterior.gate.device.type
    refused = Inpainting((1, 4, 4))
    with pytest.raises(ValueError, match="problem is for x of shape"):
        Posterior(there.prior, refused)
    assert refused.noise.std.device.type == "cpu"


def test_what_lies_here_is_taken_there(make_prior, elsewhere, generator):
    """Images, held-out data and truths of the CPU, once all else is elsewhere."""
    prior, problem, lenses = make_prior("unet2d").to(elsewhere), Inpainting(IMAGE, "half"), ON_IMAGES["lenses"]()
    posterior = Posterior(prior, problem)
    image = torch.randn((3, *IMAGE), generator=generator)
    assert torch.equal(problem.observed(image), image[..., :4, :].flatten(1))
    assert prior.measure_error(image.repeat(8, 1, 1, 1), generator=generator).denoiser_error(prior.times[1]).device.type == elsewhere.type
    y = problem.observed(image)
    assert "psnr" in judge(problem, lambda: importance(posterior, y, 4, generator), y, image, generator)[1]
    lenses.to(elsewhere)
    v = lenses.split(lenses.simulate(image.to(elsewhere), generator))[1]
    assert lenses.several(v).device.type == elsewhere.type


def test_deepinv_takes_a_generator_that_lies_here(make_prior, elsewhere, generator):
    prior, problem = make_prior("unet2d").to(elsewhere), Inpainting(IMAGE, "half")
    for name in ("dps", "pigdm"):
        assert deepinv_sampler(name, prior, problem, torch.zeros(1, 32), 2, generator, steps=4).x.device.type == elsewhere.type


def test_guides_are_moved_once(make_prior, elsewhere, generator):
    """A posterior that was used here and moved keeps what its guide knows there, not here."""
    for problem in (Deblurring(IMAGE, size=5), PhaseRetrieval(IMAGE)):
        posterior = Posterior(make_prior("unet2d"), problem)
        y = problem.simulate(posterior.prior.sample(1, generator), generator)
        posterior.sample(y, 2, generator), posterior.to(elsewhere).sample(y, 2, generator)
        kept = posterior.guide._known if isinstance(problem, Deblurring) else posterior.guide._roots
        assert {key[-1].type for key in kept} == {"cpu", elsewhere.type}
        assert all(leaf.device.type == key[-1].type for key, value in kept.items() for leaf in tree_leaves(value))


@pytest.mark.gpu
def test_a_convolution_is_affine_on_a_gpu():
    kernel = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(0)).cuda() / 25
    problem = InverseProblem(lambda x: nn.functional.conv2d(x, kernel, padding=2), GaussianNoise(0.1))
    assert problem.bind((1, 28, 28), torch.randn(3, 1, 28, 28).cuda()).linear


@pytest.mark.gpu
def test_a_sparse_operator():
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=4).to("cuda")
    posterior = Posterior(prior, Lensing(IMAGE, pixels=12, noise_std=0.1, sky=-1.0))
    assert posterior.sample(torch.zeros(1, 1, 12, 12), 2).x.device.type == "cuda"


def test_an_observation_with_its_level_or_its_lens(make_prior, elsewhere, generator):
    """Made of a measurement that is here, by a problem that has moved."""
    prior = make_prior("unet2d").to(elsewhere)
    level, lens = ON_IMAGES["noise range"](), ON_IMAGES["lenses"]()
    for problem, measurement, of in ((level, torch.zeros(1, 48), 0.2), (lens, torch.zeros(1, 1, 12, 12), [1.0, 0.8, 0.0, 0.0, 0.0])):
        posterior = Posterior(prior, problem)
        y = problem.observation(measurement, of)
        assert posterior.sample(y, 2, generator).x.device.type == elsewhere.type


def test_an_operator_that_lies_elsewhere_is_told_from_a_broken_one(elsewhere):
    mask = torch.ones(IMAGE, device=elsewhere)
    with pytest.raises(ValueError, match=r"operator failed on x of shape .*device.*torch.float32 on cpu"):
        InverseProblem(lambda x: x * mask, GaussianNoise(0.1), IMAGE)


def test_what_a_prior_measures(make_prior, elsewhere, generator):
    prior = make_prior("unet2d", measured=False).to(elsewhere)
    prior.measure_error(generator=generator).keep_draws(256, generator)
    assert prior.draws.device.type == prior.denoiser_error(prior.times[1]).device.type == elsewhere.type
    assert Posterior(prior, Inpainting(IMAGE, "half")).sample(torch.zeros(2, 32), 2, generator).x.device.type == elsewhere.type


MADE = {
    "box": lambda: Inpainting(IMAGE),
    "random mask": lambda: Inpainting(IMAGE, "random", seed=1),
    "gmm": lambda: exact_problem("gmm10").problem,
}


@pytest.mark.parametrize("name", MADE)
def test_made_where_another_device_is_the_default(name, elsewhere, generator):
    """`torch.set_default_device` changes where a problem lies, not what it is: as of other tasks with their tests, of what these lack."""
    here = MADE[name]()
    with elsewhere:
        there = MADE[name]()
    x = torch.randn((3, *here.shape), generator=generator) if here.shape else torch.randn((3, 10), generator=generator)
    torch.testing.assert_close(there.to(elsewhere)(x.to(elsewhere)).cpu(), here(x))


@pytest.mark.parametrize("breach", [
    lambda x: x + torch.ones(3), lambda x: torch.cat([x, torch.ones(1)]), lambda x: torch.arange(3.0)[x > 1], lambda x: x.numpy(),
    lambda x: torch.arange(3.0).index_select(0, x.long()), lambda x: x @ torch.ones(3, 3),
    lambda x: torch.randn(3, generator=torch.Generator().manual_seed(0), device=x.device),
    lambda x: torch.randn(3, generator=torch.Generator(x.device).manual_seed(0)),
])  # fmt: skip
def test_the_rules(breach, elsewhere):
    """What a GPU refuses is refused there too, and what it takes is taken."""
    x = torch.arange(3.0).to(elsewhere)
    with pytest.raises((RuntimeError, TypeError)):
        breach(x)
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4] and x[torch.tensor([2, 0])].tolist() == [2, 0] and float(x.sum()) == 3


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
def test_times_on_the_cpu_serve_states_elsewhere(call, kind, make_prior, elsewhere):
    prior = GeneratorPrior(lambda z: z.exp(), 3) if kind == "generator" else make_prior(kind)
    prior.to(elsewhere)
    x = torch.zeros((2, 1, *prior.shape), **prior._options())
    found = CALLS[call](prior, x, prior.times[1], prior.times[2])
    assert found is None or found.device.type == elsewhere.type


@pytest.mark.gpu
def test_training_in_half_precision():
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=6).to("cuda")
    posterior = Posterior(prior, Inpainting(prior.shape, "half"))
    fit(posterior, 4, progress=False, trainer={"precision": "bf16-mixed", "accelerator": "gpu"}, **SMALL)
    held = simulate_observations(posterior, 4)
    assert torch.isfinite(torch.tensor(evaluate(posterior, held, 8).numbers["elbo"].value))
