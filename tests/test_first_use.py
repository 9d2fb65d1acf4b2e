"""What a newcomer tries: operators of any kind and dtype, shapes and settings that are slightly off. It works, or says why in one line."""

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from priors import DiffusersPrior, GaussianMixturePrior, GaussianPrior, GeneratorPrior
from rtb_inverse import GaussianNoise, InverseProblem, NoiseRange, PoissonNoise, Posterior, Reward, evaluate, fit, importance
from rtb_inverse import simulate_observations as simulated
from tasks import ClassConstraint, Colourisation, Deblurring, Inpainting

D = torch.float64
NORMAL = GaussianPrior(torch.zeros(3), torch.eye(3))
FAR = GaussianPrior(torch.full((2,), 300.0), 25 * torch.tensor([[1.0, 0.3], [0.3, 1.0]]))


@pytest.mark.parametrize(
    "operator", [lambda x: (x - 290).relu(), lambda x: x.clamp(max=305.0), lambda x: 1e3 * x[:, :1] + x[:, 1:].square()]
)
def test_whether_an_operator_is_affine_is_tried_where_the_prior_lives(operator):
    assert not Posterior(FAR, InverseProblem(operator, GaussianNoise(1.0)), width=8).problem.linear
    assert not Posterior(FAR, InverseProblem(operator, GaussianNoise(1.0), shape=(2,)), width=8).problem.linear


def test_each_output_of_an_operator_has_to_be_affine():
    for bent in (lambda x: 1e5 + x**2, lambda x: torch.cat([1e4 * x[:, :1], x[:, 1:].abs()], 1)):
        assert not InverseProblem(bent, GaussianNoise(1.0), shape=(3,)).linear
    for straight in (lambda x: 1e5 + x, lambda x: torch.fft.rfft(x).imag, lambda x: torch.cat([1e4 * x[:, :1], x[:, 1:]], 1)):
        assert InverseProblem(straight, GaussianNoise(1.0), shape=(3,)).linear


def test_an_affine_operator_of_one_prior_is_tried_on_the_next():
    problem = InverseProblem(lambda x: (x - 290).relu(), GaussianNoise(1.0), shape=(2,))
    assert problem.linear  # on x ~ N(0, I), where it is 0
    Posterior(FAR, problem, width=8)
    assert not problem.linear
    said = InverseProblem(lambda x: (x - 290).relu(), GaussianNoise(1.0), shape=(2,), linear=True)
    assert Posterior(FAR, said, width=8).problem.linear


def test_an_operator_need_not_be_defined_where_the_prior_is_not():
    prior = GeneratorPrior(lambda z: z.exp(), 3)
    posterior = Posterior(prior, InverseProblem(lambda x: x.log(), GaussianNoise(0.1)), width=8)
    assert torch.isfinite(posterior.sample(torch.zeros(1, 3), 4, torch.Generator().manual_seed(0)).x).all()
    with pytest.raises(ValueError, match=r"operator's output at x ~ N\(0, I\) must be finite"):
        InverseProblem(lambda x: x.log(), GaussianNoise(0.1), shape=(3,))


def test_an_operator_may_refuse_what_is_not_of_the_prior():
    def positive(x):
        if (x <= 0).any():
            raise ValueError("x must be positive")
        return x.log()

    prior = GeneratorPrior(lambda z: z.exp(), 3)
    with pytest.warns(UserWarning, match="operator refused x .*x must be positive.*taken for one that is not affine"):
        assert not Posterior(prior, InverseProblem(positive, GaussianNoise(0.1)), start="prior", width=8).problem.linear


def test_an_operator_is_tried_in_the_dtype_of_the_prior(generator):
    A = torch.randn((2, 3), generator=generator, dtype=D)
    posterior = Posterior(GaussianMixturePrior.random(3, 3, 0, D), InverseProblem(lambda x: x @ A.T, GaussianNoise(0.1)), width=8)
    assert posterior.sample(torch.zeros(1, 2, dtype=D), 4, generator).x.dtype == D
    with pytest.raises(ValueError, match=r"operator failed on x of shape \(3, 3\): .* \(torch\.float32 on cpu\)"):
        Posterior(NORMAL, InverseProblem(lambda x: x @ A.T, GaussianNoise(0.1)), width=8)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("noise", [GaussianNoise(0.1), PoissonNoise(background=5.0)])
@pytest.mark.parametrize("kind", ["unet2d", "mixture", "gaussian"])
def test_one_number_for_each_x_is_a_measurement(kind, noise, power, make_prior, generator):
    prior = make_prior(kind)
    dims = tuple(range(1, 1 + len(prior.shape)))
    sums = InverseProblem(lambda x: (x**power).sum(dims).abs() if isinstance(noise, PoissonNoise) else (x**power).sum(dims), noise)
    posterior = Posterior(
        prior, sums, width=8, references=torch.randn((32, *prior.shape), generator=generator) if kind == "unet2d" else None
    )
    y = sums.simulate(prior.sample(2, generator), generator)
    assert y.shape == (2,) and torch.isfinite(importance(posterior, y, 4, generator).log_w).all()


def test_draws_in_inference_mode(generator):
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=2)
    posterior = Posterior(prior, InverseProblem(lambda x: torch.fft.rfft2(x).abs(), GaussianNoise(0.1)), references=False)
    y = posterior.problem.simulate(prior.sample(2, generator), generator)
    plain = posterior.sample(y, 2, torch.Generator().manual_seed(1)).x
    with torch.inference_mode():
        assert torch.equal(posterior.sample(y.clone(), 2, torch.Generator().manual_seed(1)).x, plain)


def test_x_of_another_shape_is_refused():
    colours = Colourisation((3, 8, 8))
    for call in (colours, colours.simulate, lambda x: colours.log_likelihood(x, torch.zeros(2, 1, 8, 8))):
        with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 3, 8, 8\), got \(2, 8, 8, 3\)"):
            call(torch.rand(2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 1, 8, 16\), got \(2, 1, 16, 8\)"):
        Deblurring((1, 8, 16), size=3)(torch.rand(2, 1, 16, 8))


def test_a_likelihood_needs_the_shape_of_x():
    problem = InverseProblem(lambda x: x.relu(), GaussianNoise(0.1))
    with pytest.raises(ValueError, match="shape of x is not known yet"):
        problem.log_likelihood(torch.zeros(4, 2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="shape of x is not known yet"):
        NoiseRange(problem, 0.1, 1.0).observation(torch.zeros(2, 3), 0.2)


def small(**options):
    return UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 3, "out_channels": 1}, "network must give as many channels as it takes, 3, got 1$"),
        ({"in_channels": 3, "out_channels": 6}, r"got 6 \(with variances, which the steps here do not take\)"),
        ({"in_channels": 1, "out_channels": 1, "num_class_embeds": 10}, "network must not ask for a class"),
    ],
)
def test_networks_of_another_kind(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusersPrior(small(**options), {"_class_name": "DDPMScheduler"})


def test_a_scheduler_by_its_name():
    with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler or its config, got 'ddpm'"):
        DiffusersPrior(small(in_channels=1, out_channels=1), "ddpm")


def test_a_kernel_may_be_an_array(generator):
    x = torch.rand((2, 1, 8, 8), generator=generator)
    kernels = (np.full((3, 3), 1 / 9), torch.full((3, 3), 1 / 9), [[1 / 9] * 3] * 3)
    first, *others = (Deblurring((1, 8, 8), kernel=kernel)(x) for kernel in kernels)
    assert all(torch.equal(first, other) for other in others)


def test_numbers_may_be_numpys():
    posterior = Posterior(NORMAL, InverseProblem(torch.eye(3), GaussianNoise(np.float32(0.5))), beta=np.float64(1.0))
    assert posterior.sample(torch.zeros(1, 3), np.int64(4)).x.shape == (4, 1, 3)
    assert Inpainting((1, 8, 8), noise_std=torch.tensor(0.1)).config["noise_std"] == pytest.approx(0.1)


@pytest.mark.parametrize("make", [Inpainting, lambda shape, noise_std: Deblurring(shape, size=3, noise_std=noise_std)])
def test_a_task_has_one_noise_level(make):
    with pytest.raises(ValueError, match=r"noise_std must be one number here, got a tensor of shape \(48,\)"):
        make((1, 8, 8), noise_std=torch.full((48,), 0.1))


def test_a_mask_that_is_no_image(tmp_path):
    file = tmp_path / "mask.npz"
    file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"mask must be the path of a \.npy file or an image, got .*mask\.npz"):
        Inpainting((1, 8, 8), mask=str(file))


@pytest.mark.parametrize("level", [-0.1, 0.0, math.nan, torch.tensor([0.2, 0.3, 0.4]), 5.0])
def test_a_noise_level_that_is_none(level):
    problem = NoiseRange(Inpainting((1, 8, 8), "half"), 0.1, 1.0)
    with pytest.raises(ValueError, match="level"):
        problem.observation(torch.zeros(2, 32), level)


def test_a_reward_is_judged_too(generator):
    posterior = Posterior(NORMAL, Reward(lambda x: -x.square().sum(-1)), width=8)
    report = evaluate(posterior, None, 64, generator)
    assert {"elbo", "log_z_is", "ess"} <= set(report.numbers) and "elbo" in report.to_markdown()
    assert report.numbers["log_z_is"].value == pytest.approx(-1.5 * math.log(3), abs=1.0)  # of N(0, I) and exp(-|x|^2)


def test_what_fit_is_told_of_y_and_of_its_seed():
    posterior = Posterior(NORMAL, InverseProblem(torch.eye(3), GaussianNoise(0.5)), width=8)
    with pytest.raises(TypeError, match=r"y must be a torch\.Tensor, got list"):
        fit(posterior, 1, y=[0.0] * 3, progress=False)
    for seed in (1.5, None, -1, 2**64):
        with pytest.raises(ValueError, match="seed must be"):
            fit(posterior, 1, seed=seed, progress=False)
    with pytest.raises(ValueError, match="seed must be at most 2"):
        Inpainting((1, 8, 8), "random", seed=2**70)


@pytest.mark.parametrize("y", [torch.tensor(3), torch.tensor([3])])
def test_one_class_to_fit_to(y):
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=2)
    posterior = Posterior(prior, ClassConstraint(lambda x: x.flatten(1)[:, :10]), start="prior")
    fit(posterior, 1, y=y, progress=False, states=4, draws=2, line_search=False, bounds=0)


def test_fit_leaves_the_global_random_state_alone():
    posterior = Posterior(NORMAL, InverseProblem(torch.eye(3), GaussianNoise(0.5)), width=8)
    before = torch.get_rng_state()
    fit(posterior, 2, progress=False, states=8, pool=16, pool_start=16, slots=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_draws_are_those_that_are_saved(make_prior, tmp_path, generator):
    prior = make_prior("unet2d").keep_draws(16, generator)
    prior.save_pretrained(tmp_path / "half")
    assert torch.equal(DiffusersPrior.from_pretrained(tmp_path / "half").draws, prior.draws)
    prior.draws = 1e5 * torch.randn((16, *prior.shape), generator=generator)
    prior.save_pretrained(tmp_path / "whole")
    assert torch.equal(DiffusersPrior.from_pretrained(tmp_path / "whole").draws, prior.draws)


def test_the_prior_may_be_laid_on_another_grid(make_prior, tmp_path, generator):
    prior = make_prior("unet2d", steps=4)
    posterior = Posterior(prior, Inpainting(prior.shape, "half"))
    held = simulated(posterior, 2, torch.Generator().manual_seed(1))
    before = evaluate(posterior, held, 4, torch.Generator().manual_seed(2)).numbers
    posterior.save_pretrained(tmp_path)
    prior.set_steps(7)
    loaded = Posterior.from_pretrained(tmp_path, prior=prior)
    assert prior.steps == 7 and Posterior(prior, Inpainting(prior.shape, "half")).steps == 7
    for each in (posterior, loaded):
        assert evaluate(each, held, 4, torch.Generator().manual_seed(2)).numbers == before
        assert simulated(each, 2, generator).paths.steps == 4
