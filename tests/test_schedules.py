"""Schedules against diffusers' own schedulers, which are run, not quoted."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)

from rtb_inverse.schedules import CLEAN, PREDICTION_TYPES, FlowMatching, VarianceExploding, VariancePreserving, schedule_from_config

T = 100
BETAS = {"beta_start": 1e-3, "beta_end": 0.1, "num_train_timesteps": T}


def exact(scheduler):
    """The scheduler with its table cast to float64: its own arithmetic, without the cancellation in 1 - alphas_cumprod."""
    scheduler.alphas_cumprod, scheduler.one = scheduler.alphas_cumprod.double(), torch.tensor(1.0, dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def ours(schedule, x_t, output, t, s, eta=1.0):
    """Mean and standard deviation of our step."""
    c_0, c_t, sd = schedule.reverse_step(t, s, eta)
    return c_0 * schedule.to_x_0(output, x_t, t) + c_t * x_t, sd


def pairs(generator, shape=(2, 1, 4, 4)):
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_step_is_that_of_ddpm(betas, prediction, spacing, clip, generator):
    scheduler = exact(DDPMScheduler(
        **BETAS, beta_schedule=betas, prediction_type=prediction, timestep_spacing=spacing,
        clip_sample=clip is not None, clip_sample_range=clip or 1.0, variance_type="fixed_small",
    ))  # fmt: skip
    schedule = schedule_from_config(scheduler)
    for steps in (1, 4, 7, T):
        scheduler.set_timesteps(steps)
        times = schedule.times(steps)
        assert torch.equal(times[:-1], scheduler.timesteps.double()) and times[-1] == CLEAN
        for k in sorted({0, steps // 2, max(steps - 2, 0), steps - 1}):
            x_t, output = pairs(generator)
            t = scheduler.timesteps[k]
            noise = torch.Generator().manual_seed(k)
            stepped = scheduler.step(output, t, x_t, generator=noise).prev_sample
            drawn = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            mean, sd = ours(schedule, x_t, output, times[k], times[k + 1])
            assert sd**2 == pytest.approx(float(scheduler._get_variance(t)) if k < steps - 1 else 0, abs=1e-8)
            torch.testing.assert_close(stepped, mean + sd * drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [5, 7])
def test_zero_terminal_snr_steps_like_ddpm(prediction, steps, generator):
    scheduler = exact(DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, timestep_spacing="trailing", clip_sample=False,
        rescale_betas_zero_snr=True,
    ))  # fmt: skip
    schedule = schedule_from_config(scheduler)
    scheduler.set_timesteps(steps)
    times = schedule.times(steps)
    assert float(schedule.alpha_sigma(times[0])[0]) < 1e-6
    for k, t in enumerate(scheduler.timesteps):
        x_t, output = pairs(generator)
        stepped = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(k)).prev_sample
        drawn = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        mean, sd = ours(schedule, x_t, output, times[k], times[k + 1])
        torch.testing.assert_close(stepped, mean + sd * drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_step_is_that_of_ddim(eta, betas, prediction, spacing, clip, generator):
    scheduler = exact(DDIMScheduler(
        **BETAS, beta_schedule=betas, prediction_type=prediction, timestep_spacing=spacing,
        clip_sample=clip is not None, clip_sample_range=clip or 1.0,
    ))  # fmt: skip
    schedule = schedule_from_config(scheduler)
    for steps in (5, 20):  # DDIM steps back by T // K: only divisors of T have the grid's own step
        scheduler.set_timesteps(steps)
        times = schedule.times(steps)
        for k in (0, steps // 2, steps - 1):
            x_t, output = pairs(generator)

            step = partial(scheduler.step, output, int(times[k]), x_t, eta=eta, use_clipped_model_output=clip is not None)
            mean, sd = ours(schedule, x_t, output, times[k], times[k + 1], eta)
            still, moved = (step(variance_noise=noise).prev_sample for noise in (torch.zeros_like(x_t), torch.ones_like(x_t)))
            torch.testing.assert_close(mean, still, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(sd.expand(x_t.shape), moved - still, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_decrease_for_every_number_of_steps(spacing, offset):
    schedule = VariancePreserving(num_train_timesteps=300, timestep_spacing=spacing, steps_offset=offset)
    for steps in (*range(1, 301), 301, 450, 1000):
        times = schedule.times(steps)
        assert times.shape == (steps + 1,) and times.dtype == torch.float64
        assert (times.diff() < 0).all() and 0 <= times[-2] and times[0] <= 299 and times[-1] == CLEAN, steps


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_steps_must_be_a_count(schedule, steps):
    with pytest.raises(ValueError, match="steps"):
        schedule.times(steps)


def test_steps_offset_is_that_of_diffusers():
    scheduler = DDPMScheduler(steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    assert torch.equal(schedule_from_config(scheduler).times(20)[:-1], scheduler.timesteps.double())


def test_more_steps_than_training_times_interpolate_between_them():
    schedule = VariancePreserving(num_train_timesteps=10)
    t = schedule.times(50)[:-1]
    alpha, sigma = schedule.alpha_sigma(t)
    low, high = (schedule.alpha_sigma(f(t))[1] for f in (torch.floor, torch.ceil))
    assert ((low <= sigma + 1e-12) & (sigma <= high + 1e-12)).all() and (sigma.diff() < 0).all()
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close(schedule.alpha_sigma(torch.arange(10.0))[0] ** 2, schedule.alphas_cumprod)


def test_clean_end_has_no_noise(schedule):
    alpha, sigma = schedule.alpha_sigma(torch.tensor([CLEAN, -0.5], dtype=torch.float64))
    assert torch.equal(alpha, torch.ones_like(alpha)) and torch.equal(sigma, torch.zeros_like(sigma))


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", [VariancePreserving, VarianceExploding, FlowMatching])
def test_target_is_the_inverse_of_to_x_0(kind, prediction, generator):
    if kind is FlowMatching and prediction in ("epsilon", "score"):
        with pytest.raises(ValueError, match="prediction_type"):
            kind(prediction_type=prediction)
        return
    schedule = kind(prediction_type=prediction)
    x_0, noise = pairs(generator, (3, 5, 2, 2))
    t = schedule.times(7)[[0, 3, 6], None].expand(3, 5)
    x_t = schedule.add_noise(x_0, noise, t)
    torch.testing.assert_close(schedule.to_x_0(schedule.target(x_0, noise, t), x_t, t), x_0, atol=1e-8, rtol=1e-8)
    assert schedule.target(x_0, noise, t).shape == x_0.shape


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_target_and_noise_are_those_of_ddpm(prediction, generator):
    scheduler = exact(DDPMScheduler(**BETAS, prediction_type=prediction))
    schedule = schedule_from_config(scheduler)
    x_0, noise = pairs(generator)
    t = torch.tensor([3, 77])
    torch.testing.assert_close(schedule.add_noise(x_0, noise, t), scheduler.add_noise(x_0, noise, t))
    target = {"epsilon": noise, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, noise, t)}[prediction]
    torch.testing.assert_close(schedule.target(x_0, noise, t), target)


def test_score_is_the_gradient_of_the_gaussian(schedule, generator):
    """With x_0 known, grad log N(x_t; alpha x_0, sigma^2) by autograd is the score target."""
    scored = VariancePreserving(prediction_type="score") if isinstance(schedule, (VariancePreserving, FlowMatching)) else schedule
    x_0, noise = pairs(generator, (4,))
    t = scored.times(5)[2].expand(4)
    alpha, sigma = scored.alpha_sigma(t)
    x_t = scored.add_noise(x_0, noise, t).requires_grad_()
    torch.distributions.Normal(alpha * x_0, sigma).log_prob(x_t).sum().backward()
    torch.testing.assert_close(x_t.grad, scored.target(x_0, noise, t))


def test_clip_bites_only_outside_its_range():
    schedule = VariancePreserving(prediction_type="sample", clip_sample=0.5)
    x = torch.tensor([-2.0, -0.3, 0.5, 9.0])
    assert torch.equal(schedule.to_x_0(x, x, torch.zeros(4)), torch.tensor([-0.5, -0.3, 0.5, 0.5]))


@pytest.mark.parametrize("steps", [1, 5, 9])
def test_variance_exploding_sigmas_are_those_of_diffusers(steps):
    scheduler = ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=50.0)
    schedule = schedule_from_config(scheduler)
    assert isinstance(schedule, VarianceExploding)
    scheduler.set_timesteps(steps, sampling_eps=0.0)
    scheduler.set_sigmas(steps)
    times = schedule.times(steps)
    torch.testing.assert_close(times[:-1], scheduler.timesteps.double())
    torch.testing.assert_close(schedule.alpha_sigma(times[:-1])[1], scheduler.sigmas.double(), rtol=1e-5, atol=0)
    assert torch.equal(schedule.network_time(times), schedule.alpha_sigma(times)[1])


def test_variance_exploding_step_is_that_of_diffusers(generator):
    scheduler = ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=50.0)
    schedule, steps = schedule_from_config(scheduler), 5
    scheduler.set_timesteps(steps, sampling_eps=0.0)
    scheduler.set_sigmas(steps)
    times = schedule.times(steps)
    for t, s in itertools.pairwise(times):
        x_t, score = (x.float() for x in pairs(generator))
        theirs = scheduler.step_pred(score, t.float(), x_t, generator=generator).prev_sample_mean
        torch.testing.assert_close(ours(schedule, x_t, score, t, s)[0].float(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 6])
def test_flow_matching_is_eulers_step_without_noise(shift, steps, generator):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedule_from_config(scheduler)
    assert isinstance(schedule, FlowMatching) and schedule.shift == shift
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # as the pipelines do
    times = schedule.times(steps)
    torch.testing.assert_close(schedule.alpha_sigma(times)[1], scheduler.sigmas.double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(schedule.network_time(times[:-1]), scheduler.timesteps.double(), atol=1e-3, rtol=1e-6)
    for k, t in enumerate(scheduler.timesteps):
        x_t, output = pairs(generator)
        mean, sd = ours(schedule, x_t, output, times[k], times[k + 1], eta=1e-6)
        assert sd < 1e-5
        torch.testing.assert_close(mean.float(), scheduler.step(output, t, x_t).prev_sample.float(), atol=1e-5, rtol=1e-5)


def test_forward_steps_compose(schedule):
    times = schedule.times(6).flip(0)
    for r, s, t in ((0, 1, 2), (1, 3, 5), (0, 2, 5), (2, 3, 4)):
        (a_1, b_1), (a_2, b_2) = schedule.forward_step(times[r], times[s]), schedule.forward_step(times[s], times[t])
        a, b = schedule.forward_step(times[r], times[t])
        torch.testing.assert_close(a, a_2 * a_1)
        torch.testing.assert_close(b**2, a_2**2 * b_1**2 + b_2**2)
    a, b = schedule.forward_step(times[0], times[3])
    torch.testing.assert_close(torch.stack([a, b]), torch.stack(schedule.alpha_sigma(times[3])))


@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0])
def test_reverse_step_keeps_the_marginal(schedule, eta):
    """Given x_0, x_s = c_0 x_0 + c_t x_t + sd n must again be N(alpha_s x_0, sigma_s^2), for every eta."""
    times = schedule.times(6)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(times[:-1]), schedule.alpha_sigma(times[1:])
    c_0, c_t, sd = schedule.reverse_step(times[:-1], times[1:], eta)
    torch.testing.assert_close(c_0 + c_t * alpha_t, alpha_s)
    torch.testing.assert_close(c_t**2 * sigma_t**2 + sd**2, sigma_s**2)


def test_ancestral_step_is_bayes_rule(schedule):
    """eta = 1: p(x_s | x_t, x_0) by conditioning the joint Gaussian of (x_s, x_t) given x_0."""
    times = schedule.times(6)
    t, s = times[:-1], times[1:]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    a, _ = schedule.forward_step(s, t)
    covariance = a * sigma_s**2
    c_0, c_t, sd = schedule.reverse_step(t, s)
    torch.testing.assert_close(c_t, covariance / sigma_t**2)
    torch.testing.assert_close(c_0, alpha_s - covariance / sigma_t**2 * alpha_t)
    torch.testing.assert_close(sd**2, sigma_s**2 - covariance**2 / sigma_t**2, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_in_memory_and_its_file_mean_the_same(scheduler, tmp_path):
    scheduler = scheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    scheduler.save_config(tmp_path)
    config = type(scheduler).load_config(tmp_path)
    assert schedule_from_config(config) == schedule_from_config(scheduler)
    assert (schedule_from_config(config).clip_sample is not None) == ("DD" in type(scheduler).__name__)


def test_trained_betas_are_taken_as_they_are():
    betas = torch.linspace(0.01, 0.3, 20).tolist()
    scheduler = DDPMScheduler(num_train_timesteps=20, trained_betas=betas)
    assert torch.equal(schedule_from_config(scheduler).alphas_cumprod, scheduler.alphas_cumprod.double())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "EDMEulerScheduler"}, "scheduler must be one of .* got 'EDMEulerScheduler'"),
        ({"_class_name": None}, "scheduler must be one of"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be one of"),
        ({"prediction_type": "noise"}, "prediction_type must be one of"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of"),
        ({"thresholding": True}, "thresholding"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas must be false"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"clip_sample_range": -1.0}, "clip_sample"),
    ],
)
def test_bad_configs_get_one_clear_error(change, message):
    config = {"_class_name": "DDPMScheduler"} | change
    with pytest.raises(ValueError, match=message):
        schedule_from_config(config)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: VarianceExploding(sigma_min=0.0), "sigma_min"),
        (lambda: VarianceExploding(sigma_min=2.0, sigma_max=1.0), "sigma_max"),
        (lambda: FlowMatching(shift=0.0), "shift"),
        (lambda: FlowMatching(prediction_type="epsilon"), "prediction_type"),
        (lambda: VariancePreserving(clip_sample=0.0), "clip_sample"),
    ],
)
def test_bad_schedules_get_one_clear_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()
