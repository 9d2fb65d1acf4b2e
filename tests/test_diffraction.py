"""Coherent diffraction against scipy's Poisson distribution and numpy's transform, its ambiguities, and the shares of the modes they make.

The test of the shares is a chi-squared test at a false alarm rate of 1e-4; its seeds are fixed."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
import yaml
from jsonargparse import ArgumentParser

import tasks
from priors import GaussianMixturePrior, held_out_digits
from rtb_inverse.corrections import importance
from rtb_inverse.diagnostics import clustered_p_value
from rtb_inverse.guidance import GradientGuidance, guidance
from rtb_inverse.noise import Noise, PoissonNoise
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import InverseProblem
from tasks.ambiguous import AmbiguousObjects, EqualImages
from tasks.diffraction import CoherentDiffraction

D = torch.float64
SHAPE = (1, 8, 8)
PROBLEMS = {
    "plain": lambda shape=SHAPE: CoherentDiffraction(shape, photons=100.0),
    "stopped": lambda shape=SHAPE: CoherentDiffraction(shape, 50.0, 1.5, background=2.0, beam_stop=2.5, dark=-0.5),
}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]()


def rand(generator, *shape):
    """In [-1, 1]."""
    return 2 * torch.rand(shape, generator=generator, dtype=D) - 1


def placed(generator, down: int, right: int, b: int = 2) -> torch.Tensor:
    """Objects of 4 x 4 pixels at (down, right) in dark frames of 8 x 8."""
    x = -torch.ones((b, *SHAPE), dtype=D)
    x[..., down : down + 4, right : right + 4] = rand(generator, b, 1, 4, 4)
    return x


# The model


def rates(x: np.ndarray, of: dict) -> np.ndarray:
    """Mean counts of images (M, C, H, W), by numpy's transform of all frequencies."""
    u = (x - of["dark"]) / (1 - of["dark"])
    P, Q = (math.ceil(of["oversampling"] * n) for n in x.shape[-2:])
    whole = np.abs(np.fft.fft2(u, s=(P, Q))) ** 2 / (P * Q)
    k_1, k_2 = np.meshgrid(np.fft.fftfreq(P, 1 / P), np.fft.fftfreq(Q, 1 / Q), indexing="ij")
    counted = np.sqrt(k_1**2 + k_2**2) >= of["beam_stop"]
    return ((of["photons"] * whole + of["background"]) * counted)[..., : Q // 2 + 1]


@pytest.mark.parametrize("shape", [SHAPE, (2, 6, 5)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_counts_are_scipys_poisson_about_numpys_transform(name, shape, generator):
    problem, x = PROBLEMS[name](shape), rand(generator, 3, *shape)
    rate, y = rates(x.numpy(), problem.config), problem.simulate(x, generator)
    assert y.shape == rate.shape == (3, *problem.y_shape) and problem.linear is False
    torch.testing.assert_close(problem.noise.mean(problem(x)), torch.from_numpy(rate))
    log_p = torch.from_numpy(scipy.stats.poisson.logpmf(y.numpy(), rate).sum((1, 2, 3)))
    torch.testing.assert_close(problem.log_likelihood(x, y), log_p)
    table = scipy.stats.poisson.logpmf(y.numpy()[None], rate[:, None]).sum((2, 3, 4))
    torch.testing.assert_close(problem.log_likelihood(x[:, None], y), torch.from_numpy(table))


def test_counts_have_the_mean_and_the_variance_of_poisson(problem, generator, assert_mean):
    x = rand(generator, 1, *SHAPE)
    y, rate = problem.simulate(x.expand(4000, *SHAPE), generator), problem.noise.mean(problem(x))[0]
    lit = problem.counted.expand(rate.shape)
    assert torch.equal(y, y.round()) and float(y.min()) >= 0 and float(y[:, ~lit].sum()) == 0
    assert_mean(y[:, lit], rate[lit])
    assert_mean((y - rate).square()[:, lit], rate[lit])


@pytest.mark.parametrize("oversampling", [1.0, 2.0, 2.5])
def test_a_pixel_of_density_one_scatters_so_many_photons(oversampling, generator):
    """Over both halves of the detector, without the background (Parseval): `photons` sum u^2."""
    problem = CoherentDiffraction(SHAPE, 30.0, oversampling, dark=0.2)
    x = rand(generator, 1, *SHAPE)
    half, Q = problem.noise.mean(problem(x))[0, 0], problem.far_field.padded[1]
    whole = half.sum() + half[:, 1 : (Q + 1) // 2].sum()
    assert float(whole) == pytest.approx(30 * float(((x - 0.2) / 0.8).square().sum()))


def test_the_beam_stop_hides_a_disc_and_nothing_else(generator):
    x = rand(generator, 1, *SHAPE)
    whole, stopped = (CoherentDiffraction(SHAPE, beam_stop=r, background=3.0) for r in (0.0, 2.0))
    before, after = (problem.noise.mean(problem(x))[0, 0] for problem in (whole, stopped))
    hidden = {(int(i), int(j)) for i, j in (after < 1e-30).nonzero()}
    assert hidden == {(0, 0), (1, 0), (15, 0), (0, 1), (1, 1), (15, 1)}  # |k| < 2, of k_1 and -k_1 alike
    torch.testing.assert_close(after[after > 1], before[after > 1])
    assert float(before.min()) >= 3
    y = stopped.simulate(x, generator)
    assert stopped.residual(x, y).shape == (1, 1, before.numel() - 6)  # nothing is to be seen behind it, and to be counted in chi squared


def test_where_no_photon_is_expected_none_is_seen():
    """A dark image without background: y = 0 is certain, another y impossible; so is light where the beam stop is."""
    problem, dark = CoherentDiffraction(SHAPE), torch.full((1, *SHAPE), -1.0)
    y = torch.zeros((2, *problem.y_shape))
    y[1, 0, 3, 2] = 1.0
    assert float(problem.simulate(dark).sum()) == 0
    assert problem.log_likelihood(dark[:, None], y)[0].tolist() == [0.0, -math.inf]
    assert float(problem.log_likelihood(dark, y[1:])) == -math.inf


@pytest.mark.parametrize("shape", [(5, 1, 1), (5, 3, 1), (5, 3, 3), (5, 1, 3)], ids=str)
def test_the_product_of_counts_is_the_sum_of_poissons(shape, generator):
    """Element by element in the library's own noise; with rates of 0, and counts that are none."""
    *batch, m = (*shape, 7)
    clean = rand(generator, *batch, m).clamp_min(0)
    y = torch.poisson(2 * torch.rand((3, m), generator=generator, dtype=D), generator=generator)
    y[0], y[1, 0] = 0.0, 0.5
    ours, own = (of(PoissonNoise(4.0), clean, y, 1) for of in (PoissonNoise.log_prob, Noise.log_prob))
    torch.testing.assert_close(ours, own)
    assert ours.isneginf().any() and torch.isfinite(ours).any()


# What the counts do not say


@pytest.mark.parametrize("options", [{}, {"oversampling": 2.6, "background": 1.0}, {"beam_stop": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_shift_inside_the_frame_and_a_turn_change_no_likelihood(options, dtype, generator):
    problem = CoherentDiffraction(SHAPE, photons=1000.0, **options)
    first, other = placed(generator, 1, 0).to(dtype), placed(generator, 1, 0).to(dtype)
    y = problem.simulate(first, generator)
    here, elsewhere = problem.log_likelihood(first, y), problem.log_likelihood(other, y)
    for moved in (first.roll((2, 4), (-2, -1)), first.flip(-2, -1), first.flip(-2, -1).roll((1, -3), (-2, -1))):
        torch.testing.assert_close(problem.log_likelihood(moved, y), here, rtol=1e-5, atol=1e-5)
    assert bool((elsewhere < here - 100).all())
    mirrored = problem.log_likelihood(first.flip(-1), y)
    assert bool((mirrored < here - 100).all())  # a reflection is none of these


def test_without_padding_every_cyclic_shift_is_hidden(generator):
    x = rand(generator, 2, *SHAPE)
    cyclic, padded = (CoherentDiffraction(SHAPE, oversampling=s) for s in (1.0, 2.0))
    for moved in (x.roll((3, 5), (-2, -1)), x.flip(-2, -1)):
        torch.testing.assert_close(cyclic(moved), cyclic(x))
    assert float((padded(x.roll(3, -1)) - padded(x)).abs().max()) > 0.1


@pytest.mark.parametrize(("oversampling", "whole"), [(1.5, False), (2.0, True), (3.0, True)])
def test_from_an_oversampling_of_two_on_the_whole_autocorrelation_is_determined(oversampling, whole, generator):
    problem, x = CoherentDiffraction(SHAPE, 70.0, oversampling, background=5.0, dark=-0.7), rand(generator, 2, *SHAPE)
    seen = (problem.condition(problem.noise.mean(problem(x))) + 1) / 2
    assert seen.shape == (2, 3, 8, 8)
    for b in range(2):
        u = ((x[b, 0] + 0.7) / 1.7).numpy()
        full = torch.from_numpy(scipy.signal.correlate2d(u, u))  # lag (i, j) at [7 + i, 7 + j]
        expected = torch.stack([full[7:, 7:], full[7:, :8].flip(-1)]) / full[7, 7]
        assert torch.allclose(seen[b, :2], expected, atol=1e-6) is whole
        if whole:
            torch.testing.assert_close(seen[b, 2], (full[7, 7] / 64).expand(8, 8))


# What the network and the guide see


def test_conditions_and_pictures_of_any_counts_are_finite_and_on_the_grid(problem, generator):
    Q = problem.far_field.padded
    for y in (torch.zeros((2, *problem.y_shape)), problem.simulate(held_out_digits()[:2], generator)):
        seen, picture = problem.condition(y), problem.picture(y)
        assert seen.shape == (2, 3, 8, 8) and torch.isfinite(seen).all()
        assert picture.shape == (2, 1, *Q) and bool((torch.isfinite(picture).sum((1, 2, 3)) > 100).all())


def test_the_picture_is_the_whole_pattern(generator):
    for shape, oversampling in ((SHAPE, 2.0), ((1, 7, 5), 1.0)):
        problem, x = CoherentDiffraction(shape, 100.0, oversampling), rand(generator, 1, *shape)
        whole = np.abs(np.fft.fft2((x.numpy() + 1) / 2, s=problem.far_field.padded, norm="ortho")) ** 2
        expected = torch.from_numpy(np.log10(1 + 100 * np.fft.fftshift(whole, (-2, -1))))
        torch.testing.assert_close(problem.picture(problem.noise.mean(problem(x))), expected)


@pytest.mark.parametrize("value", [-1.0, -0.5, 0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_gradients_are_finite_where_there_is_no_light(value, dtype, problem, generator):
    """All intensities but one are 0 for a constant image, all of them for a dark one."""
    y = problem.simulate(rand(generator, 2, *SHAPE), generator).to(dtype)
    x = torch.full((2, *SHAPE), value, dtype=dtype, requires_grad=True)
    log_p = problem.log_likelihood(x, y)
    assert not log_p.isnan().any() and torch.isfinite(torch.autograd.grad(log_p.sum(), x)[0]).all()
    assert torch.isfinite(problem.log_likelihood(x, torch.zeros_like(y))).all()
    assert type(guidance(problem)) is GradientGuidance
    assert torch.isfinite(guidance(problem)(x, y, torch.full((1, 1, 1), 0.3, dtype=D)).delta).all()


def test_elements_of_a_batch_do_not_meet(problem, generator):
    x, y = rand(generator, 4, *SHAPE).requires_grad_(), problem.simulate(rand(generator, 4, *SHAPE), generator)
    log_p, seen = problem.log_likelihood(x, y), problem.condition(y)
    (gradient,) = torch.autograd.grad(log_p[1], x)
    assert float(gradient[1].abs().max()) > 0 and float(gradient[[0, 2, 3]].abs().max()) == 0
    for i in range(4):
        torch.testing.assert_close(log_p[i], problem.log_likelihood(x[i : i + 1], y[i : i + 1])[0])
        torch.testing.assert_close(seen[i], problem.condition(y[i : i + 1])[0])


# Modes and their shares

WEIGHTS = torch.tensor([[[6.0, 1.0], [3.0, 2.0]], [[1.0, 2.0], [2.0, 3.0]]])
SHIFTS = [(0, 1), (2, 2)]


def ambiguous(photons: float = 60.0, std: float = 0.1, **options) -> AmbiguousObjects:
    """Two objects of 2 x 2 pixels in frames of 4 x 4, at two places and both ways round."""
    objects = torch.tensor([[[1.0, 0.6], [0.0, 0.2]], [[0.3, 1.0], [1.0, 0.8]]])
    return AmbiguousObjects(objects, 4, SHIFTS, WEIGHTS, std, photons=photons, background=0.5, **options)


def test_the_images_are_those_of_the_objects_and_counts_tell_objects_only():
    exact = ambiguous()
    assert exact.images.shape == (2, 2, 2, 4, 4)
    u = (exact.images[0] + 1) / 2
    torch.testing.assert_close(u[0, 0, :2, 1:3], torch.tensor([[1.0, 0.6], [0.0, 0.2]]))
    torch.testing.assert_close(u[1, 0, 2:, 2:], u[0, 0, :2, 1:3])
    torch.testing.assert_close(u[1, 1, :2, :2], torch.tensor([[0.2, 0.0], [0.6, 1.0]]))
    torch.testing.assert_close(u.sum((-1, -2)), torch.full((2, 2), 1.8))
    torch.testing.assert_close(exact.prior.distribution.logits.exp(), WEIGHTS.flatten() / 20)
    clean = exact.problem(exact.prior.means).reshape(2, 4, -1)
    torch.testing.assert_close(clean, clean[:, :1].expand_as(clean), rtol=1e-4, atol=1e-5)
    assert float((clean[0, 0] - clean[1, 0]).abs().max()) > 0.1


def test_the_short_denoiser_is_the_mixtures(generator):
    means, covariance = torch.randn((5, 9), generator=generator, dtype=D), (0.04 * torch.eye(9, dtype=D)).expand(5, -1, -1)
    short, long = (kind(torch.arange(1.0, 6, dtype=D), means, covariance) for kind in (EqualImages, GaussianMixturePrior))
    for t in long.times[[0, 1, 20, 38, 39]]:
        x_t = torch.randn((7, 3, 9), generator=generator, dtype=D)
        torch.testing.assert_close(short.denoise(x_t, t), long.denoise(x_t, t))


def test_the_exact_evidence_is_that_of_brute_force(generator):
    """By 200,000 draws of the prior, within 4.5 standard errors of the two."""
    exact = ambiguous(photons=20.0)
    y = exact.problem.simulate(exact.prior.sample(2, generator), generator)
    x = exact.prior.sample(200_000, generator)
    log_p = torch.cat([exact.problem.log_likelihood(part[:, None], y) for part in x.split(50_000)])
    brute = Particles(x[:, None].expand(-1, 2, -1), log_p)
    error = torch.stack([draws.log_z_error for draws in exact.given_object(y, 1024, generator)]).amax(0)
    z = (brute.log_z - exact.log_evidence(y)) / (brute.log_z_error**2 + error**2).sqrt()
    assert float(error.max()) < 0.1 and float(z.abs().max()) < 4.5
    shares = exact.log_joint(y).softmax(1)
    found = exact.shares(brute)
    assert float((found - shares).abs().max()) < 4.5 * 0.5 * float(brute.ess.min()) ** -0.5 + 0.02


def shares_p_value(shares: torch.Tensor, n: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-squared test of shares (J,) of n draws."""
    counts = shares * n
    return float(scipy.stats.chisquare(counts.numpy(), (expected / expected.sum() * counts.sum()).numpy()).pvalue)


def test_the_p_value_of_shares_is_uniform_also_where_draws_come_in_pairs(generator):
    """Of 6 runs of 60 draws, each draw alone or twice over: Kolmogorov's test of 400 p-values, at a false alarm rate of 1e-4."""
    known = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for copies in (1, 2):
        draws = torch.multinomial(known, 400 * 6 * (60 // copies), replacement=True, generator=generator).reshape(400, 6, -1)
        shares = torch.nn.functional.one_hot(draws, 4).double().mean(2)
        p = [clustered_p_value(run, known) for run in shares]
        assert scipy.stats.kstest(p, "uniform").pvalue > 1e-4
        assert np.median([clustered_p_value(run, known.flip(0)) for run in shares]) < 1e-6
    with pytest.raises(ValueError, match="shares must be those of 2 runs at least, got 1"):
        clustered_p_value(shares[0, :1], known)


def test_the_letters_have_eight_images_each_of_unequal_weights():
    exact = AmbiguousObjects.letters(photons=50.0)
    weights = exact.prior.log_weights.exp().reshape(3, 8)
    torch.testing.assert_close(weights, torch.tensor([8.0, 1, 2, 5, 3, 4, 6, 7]).expand(3, 8) / 108)
    assert exact.images.shape == (3, 4, 2, 10, 10) and len(exact.images.flatten(0, 2).flatten(1).unique(dim=0)) == 24
    clean = exact.problem(exact.prior.means).reshape(3, 8, -1)
    torch.testing.assert_close(clean, clean[:, :1].expand_as(clean), rtol=1e-4, atol=1e-4)


def test_exact_draws_have_the_exact_shares(generator):
    exact = ambiguous()
    y = exact.problem.simulate(exact.images[0, 1, 1].reshape(1, -1), generator)
    x = exact.draws(y, 2000, generator)
    assert float(torch.cdist(x[:, 0], exact.prior.means).amin(1).max()) < 2 * 0.1 * 16**0.5  # twice the prior's standard deviation
    shares = exact.shares(Particles(x, torch.zeros(x.shape[:2])))[0, :4]
    assert float(shares.sum()) > 0.99
    assert shares_p_value(shares.double(), 2000, WEIGHTS[0].flatten().double()) > 1e-4


def test_corrected_draws_of_the_guided_posterior_have_the_exact_shares():
    """Importance-weighted paths, resampled: a chi-squared test of as many draws as they are worth (ESS)."""
    generator, exact = torch.Generator().manual_seed(1), ambiguous(steps=10)
    y = exact.problem.simulate(exact.images[0, 1, 1].reshape(1, -1), generator)
    draws = importance(Posterior(exact.prior, exact.problem), y, 1500, generator)
    shares = exact.shares(draws)[0].double()
    worth = draws.ess.double()[0]
    assert float(worth) > 100 and float(shares[:4].sum()) > 0.98
    assert shares_p_value(shares[:4], worth, WEIGHTS[0].flatten().double()) > 1e-4
    assert shares_p_value(shares[:4], worth, torch.ones(4, dtype=D)) < 1e-4  # it would tell equal shares
    assert abs(float(draws.log_z[0] - exact.log_evidence(y)[0])) < 4.5 * float(draws.log_z_error[0]) + 0.1


# To disk and back, from YAML, as a script


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_saved_posterior_knows_its_problem(name, unet2d_prior, assert_saved):
    problem = PROBLEMS[name]()
    assert_saved(Posterior(unet2d_prior, problem), problem.simulate(held_out_digits()[:2], torch.Generator().manual_seed(0)))


def test_a_guided_start_is_nearer_to_y(unet2d_prior, generator):
    problem = CoherentDiffraction(SHAPE, 100.0, background=0.5)
    guided, plain = Posterior(unet2d_prior, problem), Posterior(unet2d_prior, problem, start="prior")
    y = problem.simulate(held_out_digits()[:4], generator)
    near, far = (problem.log_likelihood(p.sample(y, 8, torch.Generator().manual_seed(1)).x, y).mean() for p in (guided, plain))
    assert float(near) > float(far) + 100


def test_the_yaml_builds_its_problem():
    text = (Path(tasks.__file__).parent / "diffraction.yaml").read_text()
    arguments = yaml.safe_load(text)["model"]["init_args"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(InverseProblem, "problem", fail_untyped=False)
    section = {"problem": arguments["posterior"]["init_args"]["problem"]}
    problem = parser.instantiate(parser.parse_object(section)).problem
    assert type(problem) is CoherentDiffraction and problem.shape == (1, 8, 8)
    assert arguments["output"] == "outputs/diffraction" and "tasks/diffraction.yaml" in text


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"photons": 0}, "photons must be a finite number above 0, got 0"),
        ({"photons": math.inf}, "photons must be a finite number above 0, got inf"),
        ({"oversampling": 0.5}, "oversampling must be a finite number of at least 1, got 0.5"),
        ({"oversampling": math.nan}, "oversampling must be a finite number of at least 1, got nan"),
        ({"background": -1.0}, "background must be a finite number of at least 0, got -1.0"),
        ({"beam_stop": -0.5}, "beam_stop must be a finite number of at least 0, got -0.5"),
        ({"beam_stop": "wide"}, "beam_stop must be a finite number of at least 0, got 'wide'"),
        ({"beam_stop": 12.0}, "beam_stop must leave a pixel of the 16 x 16 of the padded spectrum, got 12"),
        ({"dark": 1.0}, "dark must be a finite number below 1, got 1.0"),
        ({"shape": (8, 8)}, r"shape must be \(C, H, W\), got \(8, 8\)"),
    ],
)
def test_bad_arguments_get_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoherentDiffraction(**({"shape": SHAPE} | arguments))


def test_bad_counts_get_one_clear_error(problem):
    y = torch.ones((1, *problem.y_shape)) * problem.counted
    assert torch.equal(problem.check_y(y), y)
    for value in (-1.0, 0.5):
        with pytest.raises(ValueError, match=rf"y must be counts, 0, 1, 2, \.\.\., for PoissonNoise, got {value:g}"):
            problem.check_y(value * y)
    with pytest.raises(ValueError, match=r"y must have shape \(B, 1, "):
        problem.check_y(y[..., :1])
    if not problem.counted.all():
        with pytest.raises(ValueError, match=r"y must be 0 behind the beam stop, of radius 2.5, got 1"):
            problem.check_y(torch.ones_like(y))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 3}, "size must be at least twice that of the objects, 2 x 2, got 3"),
        ({"std": 0.0}, "std must be a finite number above 0, got 0.0"),
        ({"objects": torch.full((1, 2, 2), math.nan)}, "objects must be finite, got NaN or infinity in 4 of 4 elements"),
        ({"weights": torch.ones(2, 2)}, r"weights must have shape \(O, S, 2\) = \(1, 2, 2\), got \(2, 2\)"),
    ],
)
def test_bad_objects_get_one_clear_error(arguments, message):
    good = {"objects": torch.ones(1, 2, 2), "size": 4, "shifts": SHIFTS, "weights": torch.ones(1, 2, 2)}
    with pytest.raises(ValueError, match=message):
        AmbiguousObjects(**(good | arguments))


def test_a_posterior_of_ambiguous_objects_is_saved(tmp_path, generator):
    letters = AmbiguousObjects.letters(steps=4)
    posterior = Posterior(letters.prior, letters.problem, references=False)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path, problem=AmbiguousObjects.letters(steps=4).problem)
    y = letters.problem.simulate(letters.prior.sample(1, generator), generator)
    again = (q.sample(y, 2, torch.Generator().manual_seed(1)).x for q in (posterior, loaded))
    assert torch.equal(*again)
