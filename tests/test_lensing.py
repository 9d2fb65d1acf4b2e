"""Strong lensing against the simulator of caustics, the images of an isothermal sphere, and the exact posterior of a Gaussian source."""

import math

import pytest
import torch
from scipy import stats

from priors import GaussianPrior
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.checkpoints import own_class
from rtb_inverse.corrections import smc
from rtb_inverse.evaluation import evaluate, simulate_observations
from rtb_inverse.guidance import GaussianGuidance, affine, guidance
from rtb_inverse.lightning import fit
from rtb_inverse.posterior import Posterior
from tasks import Lensing, LensingFamily
from tasks.exact import LinearProblem
from tasks.lensing import critical_curve, detector

D = torch.float64
SHAPE = (1, 8, 8)
OTHERS = {
    "default": {},
    "sphere off centre": {"axis_ratio": 1.0, "shear": (0.0, 0.0), "centre": (0.07, -0.04), "psf_fwhm": 0.0},
    "odd and sharp": {"pixels": 15, "supersample": 1, "psf_fwhm": 0.0, "angle": -2.0},
    "wide": {"pixels": 20, "psf_fwhm": 0.4, "einstein_radius": 0.7, "axis_ratio": 0.5, "shear": (0.1, 0.2), "supersample": 2},
}


def lensing(name="default", shape=SHAPE, **options):
    return Lensing(shape, **({"pixels": 16} | OTHERS[name] | options))


def randn(generator, *shape, dtype=D):
    return torch.randn(shape, generator=generator, dtype=dtype)


# The operator


@pytest.mark.filterwarnings("ignore::DeprecationWarning:caustics")
@pytest.mark.parametrize("name", OTHERS)
def test_image_is_that_of_caustics_simulator(name, generator):
    """Of a source whose two outer pixels on each side are sky, where the rules of the border differ."""
    import caustics

    problem = lensing(name, shape=(1, 12, 12)).double()
    of = problem.config
    x = torch.nn.functional.pad(randn(generator, 8, 8), (2, 2, 2, 2))
    fine = of["image_fov"] / of["pixels"] / of["supersample"]
    sigma = of["psf_fwhm"] / math.sqrt(8 * math.log(2)) / fine
    pad = math.ceil(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-pad, pad + 1, dtype=D) / max(sigma, 1e-9)) ** 2)
    cosmology, (x0, y0), (g1, g2) = caustics.FlatLambdaCDM(), of["centre"], of["shear"]
    galaxy = caustics.SIE(cosmology, x0=x0, y0=y0, q=of["axis_ratio"], phi=of["angle"] % math.pi, Rein=of["einstein_radius"])
    shear = caustics.ExternalShear(cosmology, x0=x0, y0=y0, gamma_1=g1, gamma_2=g2)
    simulator = caustics.LensSource(
        caustics.SinglePlane(cosmology, [galaxy, shear], z_l=0.4, z_s=2.0),
        caustics.Pixelated(image=x, x0=0.0, y0=0.0, pixelscale=of["source_fov"] / 12),
        pixelscale=of["image_fov"] / of["pixels"], pixels_x=of["pixels"], upsample_factor=of["supersample"],
        psf=torch.outer(kernel, kernel),
    )  # fmt: skip
    theirs = simulator.to(dtype=D)()
    assert float(theirs.abs().max()) > 0.3
    torch.testing.assert_close(problem(x[None, None])[0, 0], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.16, -0.33])
def test_a_point_behind_a_sphere_is_seen_at_its_two_images(beta):
    """At theta = beta +- theta_E on the line through both; a ring of radius theta_E where they are behind each other."""
    problem = Lensing(
        (1, 61, 61), pixels=81, einstein_radius=0.9, axis_ratio=1.0, shear=(0.0, 0.0), source_fov=1.22, image_fov=3.24, psf_fwhm=0.0,
        supersample=4,
    ).double()  # fmt: skip
    x = torch.zeros((1, 1, 61, 61), dtype=D)
    x[0, 0, 30, 30 + round(beta / 0.02)] = 1  # beta_1 grows with the column
    image, theta = problem(x)[0, 0], (torch.arange(81, dtype=D) - 40) * 0.04
    if beta == 0:
        radius = (theta[:, None] ** 2 + theta**2).sqrt()
        assert abs(float((image * radius).sum() / image.sum()) - 0.9) < 0.005
        assert float(image[(radius - 0.9).abs() > 0.06].abs().max()) == 0 and float(image[40].max()) > 0 and float(image[:, 40].max()) > 0
        return
    for half, expected in ((theta > 0, beta + 0.9), (theta < 0, beta - 0.9)):
        part = image[:, half]
        assert abs(float((part.sum(0) * theta[half]).sum() / part.sum()) - expected) < 0.02
        assert abs(float((part.sum(1) * theta).sum() / part.sum())) < 1e-5  # on the axis, in float32
        magnification = float(part.sum()) * 0.04**2 / 0.02**2
        assert magnification == pytest.approx(abs(expected) / abs(beta), rel=0.05)


def test_adjoint_and_matrix(generator):
    for name in OTHERS:
        for dtype, atol in ((torch.float32, 1e-5), (D, 1e-12)):
            problem = lensing(name)
            m = problem.config["pixels"]
            x, y = randn(generator, 3, *SHAPE).to(dtype), randn(generator, 3, 1, m, m).to(dtype)
            assert problem(x).dtype == dtype and problem(x).shape == (3, *problem.y_shape) == (3, 1, m, m)
            pulled = torch.func.vjp(problem, torch.zeros_like(x))[1](y)[0]
            torch.testing.assert_close(problem.operator.pull(y), pulled, rtol=0, atol=atol)
            torch.testing.assert_close((problem(x) * y).sum((1, 2, 3)), (x * pulled).sum((1, 2, 3)), rtol=1e-4, atol=30 * atol)
            matrix = problem.matrix.to(dtype)
            assert matrix.shape == (m * m, 64)
            torch.testing.assert_close(problem(x).flatten(1), x.flatten(1) @ matrix.T, rtol=0, atol=atol)


def test_surface_brightness_is_kept(generator):
    """A source that is bright everywhere is seen as bright wherever the point-spread function stays on it; one without light is not."""
    problem = lensing(pixels=24, einstein_radius=0.6, source_fov=4.0)
    ones = torch.ones((1, *SHAPE))
    assert float(problem(ones).min()) == pytest.approx(1, abs=1e-6) == float(problem(ones).max())
    narrow = lensing(pixels=24)
    assert float(narrow.matrix.min()) >= 0 and float(narrow.matrix.sum(1).max()) == pytest.approx(1, abs=1e-6)
    assert float(narrow(ones).min()) < 1e-8


def test_the_point_spread_function_keeps_flux_and_has_its_width():
    """As seen along one axis: the light of one ray, summed over pixels, and its full width at half maximum."""
    PB, theta = detector(101, 5, 2.02, 0.3)
    PB = torch.from_numpy(PB.toarray())
    axis = theta[: PB.shape[1], 0]
    assert theta.shape == (PB.shape[1] ** 2, 2) and torch.equal(theta[:: PB.shape[1], 1], axis)
    torch.testing.assert_close(PB.sum(1), torch.ones(101, dtype=D))
    far_from_the_ends = axis.abs() < 1.01 - 4 * 0.3 / 2.35
    torch.testing.assert_close(PB.sum(0)[far_from_the_ends], torch.full_like(axis[far_from_the_ends], 1 / 5), rtol=1e-4, atol=0)
    at = (torch.arange(101, dtype=D) - 50) * 0.02
    spot = PB[:, PB.shape[1] // 2]
    torch.testing.assert_close((spot @ at**2 / spot.sum()).sqrt(), torch.tensor(0.3 / 2.3548, dtype=D), rtol=0.02, atol=0)
    blurred, sharp = lensing(psf_fwhm=0.3), lensing(psf_fwhm=0.0)
    x = torch.zeros((1, *SHAPE))
    x[..., 4, 4] = 1
    assert float(blurred(x).sum() / sharp(x).sum()) == pytest.approx(1, abs=1e-3) and float(blurred(x).max()) < 0.8 * float(sharp(x).max())


def test_the_sky_is_no_light(generator):
    x = randn(generator, 2, *SHAPE)
    dark, black = lensing().double(), lensing(sky=-1.0).double()
    torch.testing.assert_close(black(x - 1), dark(x))
    assert not black(torch.full((1, *SHAPE), -1.0, dtype=D)).any()
    torch.testing.assert_close(affine(black)[0], affine(dark)[0])
    y = dark.simulate(x, generator)
    torch.testing.assert_close(black.condition(y)[:, :1], dark.condition(y)[:, :1] - 1)


# What the network sees


@pytest.mark.parametrize("how", ["matrix", "conjugate gradients"])
def test_condition_is_the_posterior_mean_of_a_white_source(how, generator, monkeypatch):
    problem = lensing().double()
    if how == "conjugate gradients":
        monkeypatch.setattr("tasks.lensing.DENSE_LIMIT", 0)
        monkeypatch.setattr(problem, "iterations", 300)
    y, A = randn(generator, 3, *problem.y_shape), problem.matrix
    seen = problem.condition(y)
    assert seen.shape == (3, 2, 8, 8) and torch.isfinite(seen).all() and seen.dtype == D
    expected = torch.linalg.solve(A.T @ A + problem.noise.std.double() ** 2 * torch.eye(64, dtype=D), A.T @ y.flatten(1).T).T
    torch.testing.assert_close(seen[:, 0].flatten(1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0, 1].flatten(), A.norm(dim=0) / A.norm(dim=0).max())
    assert float(seen[0, 1].max()) == 1 and torch.equal(seen[0, 1], seen[2, 1])


# The exact posterior


def initial_log_prob(chain, path):
    return chain.initial(path.x.shape[1:3]).log_prob(path.x[0])


@torch.no_grad()
def test_the_guided_start_is_the_exact_posterior(generator):
    """The RTB residual of a Gaussian source's untrained guided chain is zero on posterior and prior paths; with a lens a little off it is
    not. (The chain starts from the prior's x_T.)"""
    prior = GaussianPrior.process(8, 2.0, steps=5, dtype=D)
    problem = lensing(noise_std=0.1).double()
    posterior = Posterior(prior, problem, width=8)
    assert isinstance(posterior.guide, GaussianGuidance)
    y = problem.simulate(prior.sample(2, generator), generator)
    exact = prior.posterior(problem.matrix, problem.noise.std.double(), y.flatten(1))
    log_z = prior.log_evidence(problem.matrix, problem.noise.std.double(), y.flatten(1))
    wrong = Posterior(prior, lensing(noise_std=0.1, einstein_radius=1.05).double(), width=8)
    for chain in (exact, prior):
        path = rollout(chain, 4, y, generator)
        start = initial_log_prob(exact, path) - initial_log_prob(posterior, path)

        def residual(q, path=path, start=start):
            return log_z + path_log_prob(q, path) + start - path_log_prob(prior, path) - problem.log_likelihood(path.x_0, y)

        assert float(residual(posterior).abs().max()) < 1e-7
        assert float(residual(wrong).abs().min()) > 1e-2


@torch.no_grad()
def test_exact_draws_and_evidence(generator, assert_mean):
    """By `LinearProblem` too, whose y is less the sky."""
    prior, problem = GaussianPrior.process(8, 2.0, dtype=D), lensing(noise_std=0.2, sky=-0.5).double()
    exact = LinearProblem(prior, problem)
    y = problem.simulate(prior.sample(2, generator), generator)
    A, std, seen = problem.matrix, problem.noise.std.double(), (y - problem(torch.zeros((1, *SHAPE), dtype=D))).flatten(1)
    torch.testing.assert_close(exact.log_evidence(y), prior.log_evidence(A, std, seen))
    torch.testing.assert_close(exact.posterior(y).mean, prior.posterior(A, std, seen).mean)
    draws = Posterior(prior, problem, width=8).sample(y, 500, generator).x
    assert float(((draws.mean(0) - exact.posterior(y).mean) / draws.std(0) * 500**0.5).abs().max()) < 5


# Seeds, saving, bad input


def test_seeds_and_state():
    problem = lensing()
    x = randn(torch.Generator().manual_seed(3), 2, *SHAPE, dtype=torch.float32)
    one, two, other = (problem.simulate(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(lensing().matrix, problem.matrix)
    assert not [key for key in problem.state_dict() if key.startswith("operator")]
    again = Lensing.from_config(problem.config, problem.state_dict())
    assert torch.equal(again.matrix, problem.matrix) and again.config == problem.config


def test_a_saved_posterior_rebuilds_it(tmp_path, make_prior, generator):
    posterior = Posterior(make_prior("unet2d"), lensing())
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path)
    assert torch.equal(loaded.problem.matrix, posterior.problem.matrix)
    y = posterior.problem.simulate(randn(generator, 2, *SHAPE, dtype=torch.float32), generator)
    draws = [p.sample(y, 2, torch.Generator().manual_seed(3)).x for p in (posterior, loaded)]
    assert torch.equal(*draws) and torch.isfinite(draws[0]).all()


@pytest.mark.parametrize("options, message", [
    ({"shape": (1, 8, 9)}, r"shape must be \(1, n, n\), got \(1, 8, 9\)"),
    ({"shape": (3, 8, 8)}, r"shape must be \(1, n, n\), got \(3, 8, 8\)"),
    ({"shape": (1, 1, 1)}, "sizes in shape must be an integer of at least 2, got 1"),
    ({"pixels": 0}, "pixels must be an integer of at least 1, got 0"),
    ({"pixels": 2.5}, "pixels must be an integer of at least 1, got 2.5"),
    ({"supersample": 0}, "supersample must be an integer of at least 1, got 0"),
    ({"einstein_radius": 0.0}, "einstein_radius must be a finite number above 0, got 0.0"),
    ({"einstein_radius": math.nan}, "einstein_radius must be a finite number above 0, got nan"),
    ({"axis_ratio": 0.0}, r"axis_ratio must be in \(0, 1\], got 0.0"),
    ({"axis_ratio": 1.2}, r"axis_ratio must be in \(0, 1\], got 1.2"),
    ({"angle": math.inf}, "angle must be a finite number, got inf"),
    ({"centre": (0.0,)}, r"centre must be two finite numbers, got \(0.0,\)"),
    ({"centre": (0.0, "a")}, "second element of centre must be a finite number, got 'a'"),
    ({"shear": 0.1}, "shear must be two finite numbers, got 0.1"),
    ({"shear": (0.8, 0.6)}, r"shear must be of modulus below 1, got \(0.8, 0.6\)"),
    ({"source_fov": -1.0}, "source_fov must be a finite number above 0, got -1.0"),
    ({"image_fov": 0.0}, "image_fov must be a finite number above 0, got 0.0"),
    ({"psf_fwhm": -0.1}, "psf_fwhm must be a finite number of at least 0, got -0.1"),
    ({"sky": math.nan}, "sky must be a finite number, got nan"),
    ({"noise_std": 0.0}, "must be"),
])  # fmt: skip
def test_bad_arguments_get_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        Lensing(**({"shape": SHAPE, "pixels": 8} | options))


# Many lenses

LENSES = torch.tensor([[0.85, 0.9, 0.1, 0.02, -0.04], [1.1, 0.7, 2.0, -0.03, 0.01]], dtype=D)


def one_lens(v):
    b, q, angle, g1, g2 = v.tolist()
    return lensing(einstein_radius=b, axis_ratio=q, angle=angle, shear=(g1, g2), centre=(0.03, 0.0)).double()


@pytest.fixture
def family():
    return LensingFamily(lensing(centre=(0.03, 0.0))).double()


def test_each_lens_has_the_likelihood_of_its_own(family, generator):
    x, image = randn(generator, 5, 2, *SHAPE), randn(generator, 2, 1, 16, 16)
    y = family.observation(image, LENSES)
    assert y.shape == (2, *family.y_shape) == (2, 16 * 16 + 5)
    for j, v in enumerate(LENSES):
        fixed, one = one_lens(v), image[j : j + 1]
        torch.testing.assert_close(family.seen(x, LENSES)[:, j], fixed(x[:, j]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(family.log_likelihood(x, y)[:, j], fixed.log_likelihood(x[:, j], one), rtol=1e-6, atol=1e-2)
        torch.testing.assert_close(family.residual(x, y)[:, j], fixed.residual(x[:, j], one), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(family.log_likelihood(x[:, :1], y)[:, j], fixed.log_likelihood(x[:, 0], one), rtol=1e-6, atol=1e-2)
    own = torch.tensor([1.0, 0.75, 0.6, 0.03, -0.02], dtype=D)
    torch.testing.assert_close(family(x), family.seen(x, own), rtol=1e-5, atol=1e-6)


def test_a_family_has_the_noise_of_its_problem(family, generator):
    y = family.observation(randn(generator, 2, 1, 16, 16), LENSES)
    assert float(family.noise_variance(y)) == float(family.operator.noise.std**2)


def test_a_lens_may_be_told_by_any_angle(family, generator):
    image, x = randn(generator, 2, 1, 16, 16), randn(generator, 3, 2, *SHAPE)
    turned = LENSES + torch.tensor([0, 0, -math.pi, 0, 0], dtype=D)
    y, again = family.observation(image, LENSES), family.observation(image, turned)
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(family.seen(x, turned), family.seen(x, LENSES), rtol=1e-5, atol=1e-6)


def test_simulated_lenses_are_uniform_and_told(family, generator, assert_mean):
    x = randn(generator, 1, *SHAPE).expand(400, *SHAPE)
    y = family.check_y(family.simulate(x, generator))
    image, v = family.split(y)
    assert image.shape == (400, 1, 16, 16) and v.shape == (400, 5)
    for k in range(5):
        assert stats.kstest(family.noise.share(v)[:, k], "uniform").pvalue > 1e-4
    residual = family.residual(x, y)
    assert_mean(residual, 0.0)
    assert_mean(residual**2, 1.0)
    assert family.simulate(x[:6].reshape(3, 2, *SHAPE), generator).shape == (3, 2, *family.y_shape)


def test_what_the_network_sees_of_a_lens(family, generator):
    """A source of one brightness is shown as that where light arrives; the lens is told, and changes what is shown."""
    x = torch.full((2, *SHAPE), 0.7, dtype=D)
    y = family.observation(family.seen(x, LENSES), LENSES)
    seen = family.condition(y)
    assert seen.shape == (2, 8, 8, 8) and torch.isfinite(seen).all()
    assert float((seen[:, 0] - 0.7).abs()[seen[:, 1] > 0.7].max()) < 0.15
    torch.testing.assert_close(seen[:, 2:6, 0, 0], 2 * family.noise.share(LENSES)[:, [0, 1, 3, 4]] - 1)
    torch.testing.assert_close(seen[:, 6, 3, 3], (2 * LENSES[:, 2]).cos())
    assert not torch.allclose(seen[0, 1], seen[1, 1])


def test_a_family_is_trained_saved_and_judged(unet2d_prior, tmp_path, generator):
    posterior = Posterior(unet2d_prior, LensingFamily(lensing(noise_std=0.2)))
    fit(posterior, steps=2, seed=0)
    observations = simulate_observations(posterior, 3, generator)
    report = evaluate(posterior, observations, 4, generator)
    assert all(math.isfinite(report.numbers[name].value) for name in ("elbo", "eubo", "chi_squared"))
    assert smc(posterior, observations.y, 4, generator).x.shape == (4, 3, *unet2d_prior.shape)
    posterior.save_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path)
    assert again.problem.config == posterior.problem.config and own_class("tasks.LensingFamily") is type(again.problem)
    one, two = (p.sample(observations.y, 2, torch.Generator().manual_seed(0)).x for p in (posterior, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize("call, error, message", [
    (lambda: LensingFamily(SHAPE), TypeError, "problem must be a Lensing, got tuple"),
    (lambda: LensingFamily(lensing(), einstein_radius=(0.0, 1.0)), ValueError, r"einstein_radius must be a range within \(0, inf\]"),
    (lambda: LensingFamily(lensing(), axis_ratio=(0.5, 1.1)), ValueError, r"axis_ratio must be a range within \(0, 1\], got \(0.5, 1.1\)"),
    (lambda: LensingFamily(lensing(), shear=(0.1, 0.1)), ValueError, r"shear must be a range .* got \(0.1, 0.1\)"),
    (lambda: LensingFamily(lensing(), angle=1.0), ValueError, "angle must be two finite numbers, got 1.0"),
    (lambda: LensingFamily(lensing(), angle=(0, 1)).observation(torch.zeros(1, 1, 16, 16), LENSES[1]), ValueError, "its angle in .* got 2"),
    (lambda: LensingFamily(lensing()).observation(torch.zeros(1, 1, 16, 16), LENSES[0] + 1), ValueError, "its einstein_radius in .*1.85"),
    (lambda: LensingFamily(lensing()).observation(torch.zeros(1, 1, 9, 9), LENSES[0]), ValueError, r"y must have shape \(B, 1, 16, 16\)"),
])  # fmt: skip
def test_bad_families_and_lenses_get_one_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_guide_of_a_family_is_that_of_each_lens(family, generator):
    """Conjugate gradients to the end, at each observation's own lens, against the matrix of that lens."""
    problem = family
    guide = guidance(problem)
    guide.iterations, guide.clip = 400, None
    x = torch.randn((2, *SHAPE), generator=generator, dtype=D)
    y = problem.simulate(x, generator)
    x_0, error = torch.randn((3, 2, *SHAPE), generator=generator, dtype=D), torch.full((3, 1, *SHAPE), 0.3, dtype=D)
    delta = guide(x_0, y, error).delta
    for b, (image, v) in enumerate(zip(*problem.split(y), strict=True)):
        A = torch.autograd.functional.jacobian(lambda x, v=v: problem.seen(x[None], v[None]).flatten(), x[b]).flatten(1)
        gain = 0.3 * A.T @ torch.linalg.inv(0.3 * A @ A.T + problem.operator.noise.std.double() ** 2 * torch.eye(len(A), dtype=D))
        expected = (image.flatten() - problem.seen(x_0[:, b], v[None]).flatten(1)) @ gain.T
        torch.testing.assert_close(delta[:, b].flatten(1), expected, rtol=1e-5, atol=1e-7)


def test_a_sphere_shows_the_inside_of_its_radius_several_times():
    """The images of an isothermal sphere: two where |beta - centre| < b, else one."""
    problem = LensingFamily(Lensing((1, 24, 24), 16, centre=(0.2, 0.1)), einstein_radius=(0.3, 0.6), axis_ratio=(0.5, 1.0))
    v = torch.tensor([[0.3, 0.9999, 0.0, 0.0, 0.0], [0.45, 0.9999, 1.0, 0.0, 0.0]])
    middle = (torch.arange(24) + 0.5) / 24 * 1.2 - 0.6
    far = torch.hypot(middle - 0.2, middle[:, None] - 0.1)
    for found, b in zip(problem.several(v), v[:, 0], strict=True):
        clear = (far - b).abs() > 0.05  # a pixel's diagonal is 0.07
        assert torch.equal(found[clear], (far < b)[clear])


@pytest.mark.parametrize("radius", [0.5, 1.0])
def test_the_critical_curve_of_a_round_lens_is_its_ring(radius):
    critical, caustic = critical_curve(4.0, einstein_radius=radius, axis_ratio=1 - 1e-9, angle=0.0, centre=(0.1, 0.0), shear=(0.0, 0.0))
    assert float((critical - torch.tensor([0.1, 0.0])).norm(dim=1).sub(radius).abs().max()) < 0.01
    assert float((caustic - torch.tensor([0.1, 0.0])).norm(dim=1).max()) < 0.02


def test_a_field_of_view_without_the_critical_curve():
    for fov in (0.3, 1.5):
        with pytest.raises(ValueError, match="fov must hold the critical curve whole"):
            critical_curve(fov, einstein_radius=1.0, axis_ratio=0.7, angle=0.0, centre=(0.0, 0.0), shear=(0.0, 0.0))
