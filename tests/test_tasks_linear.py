"""Linear tasks of imaging against scipy, numpy, torch's own resampling and deepinv; their guides against the textbook."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.stats
import torch
from deepinv import physics
from deepinv.physics.functional import imresize_matlab
from torch import nn

import rtb_inverse.guidance
import tasks.linear
from rtb_inverse.corrections.twists import gaussian_log_evidence
from rtb_inverse.guidance import CovarianceGuidance, DenseGuidance, GradientGuidance, MaskGuidance, affine, guidance
from rtb_inverse.lightning import fit
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem
from tasks import MRI, Colourisation, CompressedSensing, Deblurring, Denoising, Inpainting, SuperResolution, Tomography
from tasks.compressed_sensing import half_plane
from tasks.deblurring import anisotropic_kernel, gaussian_kernel, motion_kernel
from tasks.inpainting import make_mask

D = torch.float64
ROOT = Path(__file__).resolve().parents[1]
SHAPE = (1, 8, 8)
PROBLEMS = {
    "denoising": lambda: Denoising(SHAPE, 0.3),
    "scratches": lambda: Inpainting(SHAPE, "scratches", hidden=0.3, seed=1),
    "bicubic": lambda: SuperResolution(SHAPE, 2),
    "area": lambda: SuperResolution(SHAPE, 4, "area"),
    "matlab": lambda: SuperResolution(SHAPE, 2, "matlab"),
    "gaussian blur": lambda: Deblurring(SHAPE, size=5),
    "anisotropic blur": lambda: Deblurring(SHAPE, "anisotropic", size=7, std=(2.0, 0.7), boundary="replicate"),
    "motion blur": lambda: Deblurring(SHAPE, "motion", size=7, seed=1, boundary="circular"),
    "valid blur": lambda: Deblurring(SHAPE, size=3, boundary="valid"),
    "own blur": lambda: Deblurring(SHAPE, torch.tensor([[0.1, 0.2, 0.3]])),
    "gaussian": lambda: CompressedSensing(SHAPE, "gaussian", 0.5, seed=1),
    "hadamard": lambda: CompressedSensing(SHAPE, "hadamard", 0.5, seed=1),
    "fourier": lambda: CompressedSensing(SHAPE, "fourier", 0.5, seed=1),
    "sparse angles": lambda: Tomography(SHAPE, 6),
    "limited angles": lambda: Tomography(SHAPE, 6, 60.0, air=0.5),
    "mri": lambda: MRI(SHAPE, 2, 0.25, seed=1),
    "complex mri": lambda: MRI((2, 8, 8), 2, 0.25, seed=1),
    "colourisation": lambda: Colourisation((3, 8, 8)),
}
RANDOM = ("scratches", "motion blur", "gaussian", "hadamard", "fourier", "mri", "complex mri")
ON_GREY = [name for name in PROBLEMS if name not in ("complex mri", "colourisation")]
TIKHONOV = [name for name in PROBLEMS if name not in ("denoising", "scratches", "sparse angles", "limited angles", "colourisation")]


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]()


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=D)


def smooth(generator, *shape):
    """Images within [-1, 1], black around one bright blob each."""
    x = torch.from_numpy(scipy.ndimage.gaussian_filter(randn(generator, *shape).numpy(), (0,) * (len(shape) - 2) + (1, 1)))
    return (4 * x).clamp(-1, 1)


def linear_part(problem, x):
    return problem(x) - problem(torch.zeros_like(x[:1]))


def matrix_of(problem):
    """A (m, d) and its offset (m,) in float64, column by column."""
    offset = problem(torch.zeros((1, *problem.shape), dtype=D)).flatten()
    return (problem(torch.eye(problem.shape.numel(), dtype=D).reshape(-1, *problem.shape)).flatten(1) - offset).T, offset


# What all share


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_adjoint(problem, dtype, generator):
    """<A x, y> = <x, A^T y>, with A^T by autograd, and with that of the matrix."""
    x, y = randn(generator, 3, *problem.shape).to(dtype), randn(generator, 3, *problem.y_shape).to(dtype)
    pulled = torch.func.vjp(problem, torch.zeros_like(x))[1](y)[0]
    assert pulled.dtype == problem(x).dtype == dtype
    ours, theirs = (linear_part(problem, x) * y).flatten(1).sum(1), (x * pulled).flatten(1).sum(1)
    size = linear_part(problem, x).flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
    assert float(((ours - theirs).abs() / size).max()) < (1e-5 if dtype == torch.float32 else 1e-12)
    matrix = matrix_of(problem)[0]
    torch.testing.assert_close(pulled.flatten(1).double(), y.flatten(1).double() @ matrix, rtol=1e-4, atol=1e-5)


def test_the_engine_finds_the_operator_linear(problem):
    probed = InverseProblem(problem.operator, GaussianNoise(0.1), problem.shape)
    assert probed.linear is True and problem.linear is True and probed.differentiable and problem.differentiable
    assert probed.y_shape == problem.y_shape


def test_elements_of_a_batch_do_not_meet(problem, generator):
    x = randn(generator, 2, 3, *problem.shape)
    y, condition = problem(x), problem.condition(problem(x[0]))
    for j in range(3):
        torch.testing.assert_close(problem(x[1, j : j + 1])[0], y[1, j])
        torch.testing.assert_close(problem.condition(y[0, j : j + 1])[0], condition[j])


@pytest.mark.parametrize("name", PROBLEMS)
def test_built_twice_it_is_the_same(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
        first = PROBLEMS[name]()
        assert torch.equal(torch.random.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)
        torch.manual_seed(2)
        second = PROBLEMS[name]()
    torch.testing.assert_close(affine(first), affine(second), rtol=0, atol=0)


@pytest.mark.parametrize("make", [
    lambda seed: Inpainting(SHAPE, "scratches", hidden=0.3, seed=seed), lambda seed: Deblurring(SHAPE, "motion", size=7, seed=seed),
    lambda seed: CompressedSensing(SHAPE, "gaussian", seed=seed), lambda seed: CompressedSensing(SHAPE, "hadamard", seed=seed),
    lambda seed: CompressedSensing(SHAPE, "fourier", seed=seed), lambda seed: MRI((1, 32, 32), seed=seed),
])  # fmt: skip
def test_another_seed_is_another_operator(make):
    assert not torch.equal(affine(make(0))[0], affine(make(1))[0])


def test_gradients_are_finite(problem, generator):
    x = smooth(generator, 3, *problem.shape).requires_grad_()
    y = problem.simulate(x.detach(), generator)
    (gradient,) = torch.autograd.grad(problem.log_likelihood(x, y).sum(), x)
    assert torch.isfinite(gradient).all() and float(gradient.abs().max()) > 0


def test_all_state_is_in_buffers(problem):
    for module in problem.modules():
        assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    problem.condition(torch.zeros(1, *problem.y_shape))
    moved = copy.deepcopy(problem).to("meta")
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert moved.operator is not problem.operator


# Save and rebuild


@pytest.mark.parametrize("name", ON_GREY)
def test_a_saved_posterior_rebuilds_its_problem(name, tmp_path, make_prior, generator):
    posterior = Posterior(make_prior("unet2d"), PROBLEMS[name]())
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path)
    assert type(loaded.problem) is type(posterior.problem) and loaded.problem.config == posterior.problem.config
    torch.testing.assert_close(affine(loaded.problem), affine(posterior.problem), rtol=0, atol=0)
    y = posterior.problem.simulate(smooth(generator, 2, *SHAPE).float(), generator)
    draws = [p.sample(y, 2, torch.Generator().manual_seed(3)).x for p in (posterior, loaded)]
    assert torch.equal(*draws) and torch.isfinite(draws[0]).all()


@pytest.mark.parametrize("name", ["colourisation", *RANDOM])
def test_what_was_drawn_comes_from_the_saved_buffers(name):
    """Even where another version of torch would draw otherwise."""
    problem = PROBLEMS[name]()
    config = problem.config | ({"seed": 5} if "seed" in problem.config else {})
    rebuilt = type(problem).from_config(config, dict(problem.state_dict()))
    torch.testing.assert_close(affine(rebuilt), affine(problem), rtol=0, atol=0)
    assert torch.equal(rebuilt.noise.std, problem.noise.std)


# What the network sees


def test_condition_lies_on_the_grid_of_x(problem, generator):
    x = smooth(generator, 16, *problem.shape)
    condition = problem.condition(problem.simulate(x, generator))
    channels = {"Inpainting": 2, "Colourisation": 1}.get(type(problem).__name__, problem.shape[0])
    assert condition.shape == (16, channels, *problem.shape[1:]) and torch.isfinite(condition).all() and condition.dtype == D
    ratio = float(condition[:, : problem.shape[0]].std() / x.std())
    assert 0.4 < ratio < 1.6, ratio


@pytest.mark.parametrize("name", TIKHONOV)
@pytest.mark.parametrize("how", ["matrix", "conjugate gradients"])
def test_condition_is_the_posterior_mean_of_a_white_x(name, how, generator, monkeypatch):
    problem = PROBLEMS[name]().double()
    A, offset = matrix_of(problem)
    assert not offset.any()
    if how == "conjugate gradients":
        monkeypatch.setattr(tasks.linear, "DENSE_LIMIT", 0)
        monkeypatch.setattr(problem, "iterations", 3 if isinstance(problem, MRI) else 200)
    y = randn(generator, 3, *problem.y_shape)
    A, flat = A.numpy(), y.flatten(1).numpy()
    expected = np.linalg.solve(A.T @ A + float(problem.noise.std) ** 2 * np.eye(A.shape[1]), A.T @ flat.T).T
    torch.testing.assert_close(problem.condition(y).flatten(1), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_complete_projections_give_the_image_back(generator):
    x = torch.from_numpy(scipy.ndimage.gaussian_filter(torch.rand((1, 1, 24, 24), generator=generator, dtype=D).numpy(), (0, 0, 2, 2)))
    window = torch.from_numpy(np.outer(np.hanning(24), np.hanning(24)))
    x = -1 + 2 * x * window
    problem = Tomography((1, 24, 24), 60)
    assert float((problem.condition(problem(x)) - x).abs().max()) < 0.05
    assert float((problem.condition(problem(torch.full_like(x, -1))) + 1).abs().max()) < 1e-12  # air is air


def test_filtered_back_projection_is_deepinvs(generator):
    problem = Tomography((1, 9, 9), 7, air=0.0)
    theirs = physics.Tomography(7, 9, normalize=False, device="cpu")
    y = randn(generator, 2, *problem.y_shape).float()
    torch.testing.assert_close(problem.condition(y), 9 * theirs.fbp(y), rtol=1e-4, atol=1e-4)


# Guides


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_guide_of_each(name, generator):
    """The update under one error for all elements is the textbook's, whatever the guide."""
    problem = PROBLEMS[name]().double()
    guide = guidance(problem)
    assert type(guide) is (MaskGuidance if name in ("denoising", "scratches") else DenseGuidance)
    A, offset = matrix_of(problem)
    x_0, y, level = randn(generator, 2, 3, *problem.shape), randn(generator, 3, *problem.y_shape), 0.4
    gain = level * A.T @ torch.linalg.inv(level * A @ A.T + problem.noise.std**2 * torch.eye(len(A), dtype=D))
    expected = (y.flatten(1) - offset - x_0.flatten(2) @ A.T) @ gain.T
    delta = guide(x_0, y, torch.full((2, 1, *problem.shape), level, dtype=D)).delta
    torch.testing.assert_close(delta.flatten(2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in ("denoising", "scratches")])
def test_the_guide_of_each_where_it_is_large(name, generator, monkeypatch):
    """Products by A and A^T only, through every operator's second derivative."""
    problem = PROBLEMS[name]().double()
    dense = guidance(problem)
    monkeypatch.setattr(rtb_inverse.guidance, "DENSE_LIMIT", 0)
    guide = guidance(problem)
    assert isinstance(guide, GradientGuidance) and guide.clip is None
    guide.iterations = 200
    x_0, y = randn(generator, 2, 3, *problem.shape), randn(generator, 3, *problem.y_shape)
    error = torch.full((2, 1, *problem.shape), 0.4, dtype=D)
    torch.testing.assert_close(guide(x_0, y, error).delta, dense(x_0, y, error).delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ON_GREY)
def test_a_prior_that_knows_its_covariance_guides_by_it(name, make_prior):
    assert isinstance(Posterior(make_prior("unet2d"), PROBLEMS[name]()).guide, CovarianceGuidance)


def test_denoising_shrinks_element_by_element(generator):
    problem, error = Denoising(SHAPE, 0.3), 0.1 + torch.rand((1, *SHAPE), generator=generator, dtype=D)
    x_0, y = randn(generator, 1, *SHAPE), randn(generator, 1, *SHAPE)
    update = guidance(problem)(x_0, y, error)
    torch.testing.assert_close(update.delta, error / (error + 0.09) * (y - x_0))
    torch.testing.assert_close(update.shrink, 0.09 / (error + 0.09))


def test_denoising_is_inpainting_with_nothing_hidden(make_prior, generator):
    """Guide and twist take an image of observations as they take a vector of them."""
    prior = make_prior("unet2d", measured=False)
    both = [Posterior(prior, Denoising(SHAPE, 0.3)), Posterior(prior, Inpainting(SHAPE, torch.ones(SHAPE, dtype=torch.bool), 0.3))]
    assert [type(posterior.guide) for posterior in both] == [MaskGuidance] * 2
    x_t, y, t = randn(generator, 4, 2, *SHAPE).float(), randn(generator, 2, *SHAPE).float(), prior.times[1]
    estimate, error = prior.denoise(x_t, t.expand(4, 1)), both[0].error(t)
    moves = [posterior.guide(estimate, seen, error).delta for posterior, seen in zip(both, (y, y.flatten(1)), strict=True)]
    assert torch.equal(*moves)
    twists = [gaussian_log_evidence(posterior, x_t, estimate, t, seen) for posterior, seen in zip(both, (y, y.flatten(1)), strict=True)]
    assert torch.equal(*twists) and twists[0].shape == (4, 2)


# The operators


def test_denoising_and_colourisation(generator):
    x = randn(generator, 2, 3, 5, 4)
    assert torch.equal(Denoising((3, 5, 4))(x), x)
    grey = Colourisation((3, 5, 4))(x)
    torch.testing.assert_close(grey, (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grey.float(), physics.Decolorize().A(x.float()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [2, 4, 3])
@pytest.mark.parametrize("method", ["bicubic", "area"])
def test_super_resolution_is_torchs(factor, method, generator):
    x = randn(generator, 2, 3, 4 * factor, 5 * factor)
    options = {"antialias": True} if method == "bicubic" else {}
    truth = nn.functional.interpolate(x, (4, 5), mode=method, **options)
    torch.testing.assert_close(SuperResolution(x.shape[1:], factor, method)(x), truth, rtol=1e-6, atol=1e-6)


def test_bicubic_is_matlabs_inside_and_area_is_a_mean(generator):
    x = randn(generator, 2, 3, 32, 24)
    ours, theirs = (SuperResolution((3, 32, 24), 2, method)(x) for method in ("bicubic", "matlab"))
    torch.testing.assert_close(theirs, imresize_matlab(x, scale=0.5), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours, theirs, atol=1e-2)
    torch.testing.assert_close(ours[..., 3:-3, 3:-3], imresize_matlab(x, scale=0.5)[..., 3:-3, 3:-3], rtol=1e-5, atol=1e-5)
    blocks = x.reshape(2, 3, 8, 4, 6, 4).mean((3, 5))
    torch.testing.assert_close(SuperResolution((3, 32, 24), 4, "area")(x), blocks, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("boundary, mode", [("reflect", "mirror"), ("replicate", "nearest"), ("circular", "wrap"), ("valid", "mirror")])
@pytest.mark.parametrize("size, image", [((3, 3), (9, 10)), ((7, 5), (9, 10)), ((9, 9), (9, 10)), ((3, 3), (40, 30))])
def test_blur_is_scipys(boundary, mode, size, image, generator):
    x, kernel = randn(generator, 2, 3, *image), torch.rand(size, generator=generator)
    problem = Deblurring((3, *image), kernel, boundary=boundary)
    truth = scipy.ndimage.convolve(x.numpy(), kernel.double().numpy()[None, None], mode=mode)
    if boundary == "valid":
        truth = truth[:, :, size[0] // 2 : image[0] - size[0] // 2, size[1] // 2 : image[1] - size[1] // 2]
    torch.testing.assert_close(problem(x), torch.from_numpy(truth.copy()), rtol=1e-10, atol=1e-10)


def test_gaussian_kernels_are_scipys_density():
    grid = np.stack(np.meshgrid(np.arange(-5, 6), np.arange(-5, 6)), -1) * [1, -1]  # to the right, upwards
    for angle, std in [(0.0, (3.0, 1.0)), (30.0, (2.0, 0.8)), (90.0, (2.0, 1.0)), (120.0, (2.5, 1.5))]:
        along = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
        covariance = std[1] ** 2 * np.eye(2) + (std[0] ** 2 - std[1] ** 2) * np.outer(along, along)
        density = scipy.stats.multivariate_normal.pdf(grid, cov=covariance)
        kernel = anisotropic_kernel(11, std, angle)
        torch.testing.assert_close(kernel, torch.from_numpy(density / density.sum()).float(), rtol=1e-5, atol=1e-7)
    line = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
    torch.testing.assert_close(gaussian_kernel(7, 1.5), torch.from_numpy(np.outer(line, line) / line.sum() ** 2).float())


@pytest.mark.parametrize("size", [5, 15])
@pytest.mark.parametrize("seed", range(5))
def test_motion_kernels_are_tracks(size, seed):
    kernel = motion_kernel(size, seed)
    assert kernel.shape == (size, size) and bool((kernel >= 0).all()) and float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    pieces = scipy.ndimage.label(kernel.numpy() > 0, np.ones((3, 3)))[1]
    assert pieces == 1 and int((kernel > 0).sum()) >= 2
    assert torch.equal(kernel, motion_kernel(size, seed)) and not torch.equal(kernel, motion_kernel(size, seed + 1))


def test_blur_keeps_constants():
    for boundary in ("reflect", "replicate", "circular", "valid"):
        y = Deblurring((1, 12, 12), "motion", size=11, seed=2, boundary=boundary)(torch.full((1, 1, 12, 12), -1.0))
        torch.testing.assert_close(y, torch.full_like(y, -1.0), rtol=1e-5, atol=1e-5)


def test_gaussian_sensing_is_deepinvs(generator):
    problem = CompressedSensing((3, 5, 4), "gaussian", 0.4, seed=7)
    theirs = physics.CompressedSensing(24, (3, 5, 4), rng=torch.Generator().manual_seed(7))
    x = randn(generator, 2, 3, 5, 4).float()
    torch.testing.assert_close(problem(x), theirs.A(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape, n", [((1, 8, 8), 64), ((1, 7, 5), 64), ((3, 4, 4), 64)])
def test_hadamard_sensing_is_scipys_matrix(shape, n):
    problem = CompressedSensing(shape, "hadamard", 0.5, seed=3).double()
    d = torch.Size(shape).numel()
    H = scipy.linalg.hadamard(n)[problem.operator.rows.numpy()][:, :d] / math.sqrt(n) * problem.operator.signs.numpy()
    assert problem.y_shape == (round(0.5 * d),)
    np.testing.assert_allclose(matrix_of(problem)[0], H, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 7, 6), (3, 5, 5)])
def test_fourier_sensing_is_numpys(shape, generator):
    problem = CompressedSensing(shape, "fourier", 0.4, seed=3)
    x = randn(generator, 2, *shape)
    chosen = problem.operator.frequencies.numpy()
    spectrum = np.fft.fft2(np.fft.ifftshift(x.numpy(), (-2, -1)), norm="ortho").reshape(*x.shape[:2], -1)[..., chosen]
    y = problem(x)
    np.testing.assert_allclose(y[..., 0], spectrum.real, atol=1e-12)
    np.testing.assert_allclose(y[..., 1], spectrum.imag, atol=1e-12)
    assert 0 in chosen and len(set(chosen)) == len(chosen) == round(0.4 * len(half_plane(*shape[1:])))


@pytest.mark.parametrize("H, W", [(4, 6), (5, 7), (8, 3)])
def test_the_half_plane_says_all_of_a_real_image_once(H, W):
    problem = CompressedSensing((1, H, W), "fourier", 1.0)
    matrix = matrix_of(problem)[0]
    assert int(torch.linalg.matrix_rank(matrix)) == H * W == int((matrix.norm(dim=1) > 1e-9).sum())


@pytest.mark.parametrize("n", [8, 9, 12, 15])
@pytest.mark.parametrize("angles, arc", [(5, 180.0), (4, 90.0), (1, 180.0)])
def test_projections_are_deepinvs(n, angles, arc, generator):
    problem = Tomography((2, n, n), angles, arc, air=-1.0)
    theirs = physics.Tomography(torch.arange(angles) * arc / angles, n, normalize=False, device="cpu")
    x = randn(generator, 2, 2, n, n).float()
    torch.testing.assert_close(n * problem(x), theirs.A(x + 1), rtol=1e-3, atol=1e-3)


def test_a_large_projection_is_the_same_without_its_matrix(generator, monkeypatch):
    x = randn(generator, 2, 2, 9, 9)
    kept = Tomography((2, 9, 9), 5)
    monkeypatch.setattr("tasks.tomography.DENSE_LIMIT", 0)
    bare = Tomography((2, 9, 9), 5)
    assert kept.operator.rays.matrix is not None and bare.operator.rays.matrix is None
    y, pull = torch.func.vjp(bare, x)
    expected, expected_pull = torch.func.vjp(kept, x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pull(y)[0], expected_pull(y)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bare.condition(y), kept.condition(y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bare(x.float()), y.float(), rtol=1e-4, atol=1e-4)


def test_projections_are_scipys(generator):
    n, N = 13, 19  # both odd: there is a pixel to turn about
    x = torch.zeros((1, 1, n, n), dtype=D)
    x[..., 3:10, 3:10] = torch.from_numpy(scipy.ndimage.gaussian_filter(torch.rand((7, 7), generator=generator, dtype=D).numpy(), 1))
    y = n * Tomography((1, n, n), 6, air=0.0)(x)[0, 0]
    assert y.shape == (N, 6)
    padded = np.pad(x[0, 0].numpy(), (N - n) // 2)
    for i, degrees in enumerate(range(0, 180, 30)):
        turned = scipy.ndimage.rotate(padded, -degrees, reshape=False, order=1)
        np.testing.assert_allclose(y[:, i], turned.sum(0), atol=1e-6, err_msg=str(degrees))
    torch.testing.assert_close(y.sum(0), x.sum().expand(6), rtol=0.02, atol=0.0)  # every projection carries the mass


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 8), (2, 7, 12)])
def test_mri_is_deepinvs_and_numpys(shape, generator):
    problem = MRI(shape, 2, 0.25, seed=4)
    columns = problem.operator.columns
    x = randn(generator, 3, *shape)
    complex_x = x[:, 0].numpy() + 1j * (x[:, 1].numpy() if shape[0] == 2 else 0)
    axes = (-2, -1)
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(complex_x, axes), norm="ortho"), axes)[..., columns.numpy()]
    y = problem(x)
    np.testing.assert_allclose(torch.view_as_complex(y), spectrum, atol=1e-12)
    two = x if shape[0] == 2 else torch.cat([x, torch.zeros_like(x)], 1)
    theirs = physics.MRI(mask=columns.double().expand(*shape[1:]).clone()).A(two)
    torch.testing.assert_close(y.movedim(-1, 1), theirs[..., columns], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("W, acceleration, central", [(28, 4, 0.1), (28, 2, 0.0), (32, 8, 0.06), (9, 3, 1 / 3), (8, 1, 0.5)])
def test_mri_measures_so_many_columns(W, acceleration, central):
    columns = MRI((1, 4, W), acceleration, central, seed=2).operator.columns
    assert int(columns.sum()) == W // acceleration
    middle = int(central * W)
    assert bool(columns[W // 2 - middle // 2 :][:middle].all())


@pytest.mark.parametrize("hidden", [0.0, 0.1, 0.5])
def test_scratches_hide_their_share_in_strokes(hidden):
    seen = make_mask("scratches", (3, 28, 28), hidden, 3)
    assert seen.shape == (3, 28, 28) and int((~seen[0]).sum()) == round(hidden * 784)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen, make_mask("scratches", (3, 28, 28), hidden, 3))
    if hidden == 0.1:  # far fewer pieces than as many single pixels would be
        ours, theirs = (scipy.ndimage.label(~mask[0].numpy(), np.ones((3, 3)))[1] for mask in (seen, make_mask("random", SHAPE_28, 0.1)))
        assert ours < theirs / 4


SHAPE_28 = (1, 28, 28)


def test_a_picture_of_every_y(problem, generator):
    y = problem.simulate(smooth(generator, 2, *problem.shape), generator)
    if isinstance(problem, Inpainting):
        return
    picture = problem.picture(y)
    assert picture.ndim == 4 and len(picture) == 2 and picture.shape[1] in (1, 3) and not picture.isinf().any()
    known = ~picture[0].isnan()
    assert bool(known.any())
    if y.ndim == 2:
        torch.testing.assert_close(picture[1][known], y[1])


def test_y_of_another_shape_is_refused(problem):
    with pytest.raises(ValueError, match="y must have shape"):
        problem.check_y(torch.zeros(2, *problem.y_shape[:-1], problem.y_shape[-1] + 1))


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_the_same_on_another_device(name, elsewhere, generator):
    """Built twice from the same seed, here, and where another device is the default: the same operator, likelihood, and condition."""
    here = PROBLEMS[name]().double()
    with elsewhere:
        there = PROBLEMS[name]().double()
    there.to(elsewhere)
    x = randn(generator, 3, *here.shape)
    y = here.simulate(x, generator)
    x_there, y_there = x.to(elsewhere), y.to(elsewhere)
    torch.testing.assert_close(there(x_there).cpu(), here(x))
    torch.testing.assert_close(there.log_likelihood(x_there, y_there).cpu(), here.log_likelihood(x, y))
    torch.testing.assert_close(there.condition(y_there).cpu(), here.condition(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5,), (2, 16)])
def test_vectors_and_signals_are_denoised(shape, generator):
    problem, x = Denoising(shape, 0.3), randn(generator, 4, *shape)
    y = problem.simulate(x, generator)
    expected = scipy.stats.norm.logpdf(y, x, 0.3).reshape(4, -1).sum(1)
    torch.testing.assert_close(problem.log_likelihood(x, y), torch.from_numpy(expected))
    assert torch.equal(problem.condition(y), y) and problem.linear
    rebuilt = Denoising.from_config(problem.config, problem.state_dict())
    assert torch.equal(rebuilt(x), x) and len(problem.picture(y)) == 4


def test_colours_are_restored_under_a_prior_of_colours(make_prior, generator):
    """No prior of colours is shipped: a tiny untrained one, from the problem to a trained posterior and its draws."""
    prior = make_prior("colours")
    posterior = Posterior(prior, Colourisation(prior.shape, noise_std=0.1))
    fit(posterior, 2, 0, progress=False, bounds=0, states=4, draws=2, observations=2, pool=8, pool_start=8, slots=4, line_search=False)
    y = posterior.problem.simulate(smooth(generator, 2, 3, 8, 8).float(), generator)
    draws = posterior.sample(y, 16, generator).x
    assert draws.shape == (16, 2, 3, 8, 8)
    grey = posterior.problem.residual(draws, y)
    assert float(grey.square().mean()) < 0.1 * float(posterior.problem.residual(prior.sample(16, generator)[:, None], y).square().mean())
