"""What readers with lists in hand found: silent mistakes, which get one clear error, and guides that float32 made unsteady."""

import copy
import pickle

import pytest
import scipy.stats
import torch

from priors import DiffusersPrior, GeneratorPrior, LatentPrior, held_out_digits
from rtb_inverse import GaussianNoise, InverseProblem, Posterior
from rtb_inverse.baselines import pcn
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.guidance import GradientGuidance, guidance
from rtb_inverse.noise import BernoulliNoise, ComplexGaussianNoise, PoissonNoise
from tasks import (
    HDR,
    MRI,
    CoherentDiffraction,
    Colourisation,
    CompressedSensing,
    Deblurring,
    Denoising,
    Inpainting,
    InverseScattering,
    Lensing,
    LensingFamily,
    LowDoseCT,
    PhaseRetrieval,
    SaturatingDeblurring,
    SuperResolution,
    Tomography,
)  # fmt: skip
from tasks.inpainting import make_mask

D = torch.float64
SHAPE = (1, 8, 8)
PHYSICS = {
    "blur": lambda: Deblurring(SHAPE, size=3),
    "noise": lambda: Denoising(SHAPE),
    "mri": lambda: MRI(SHAPE, 2),
    "rays": lambda: Tomography(SHAPE, 4),
    "large rays": lambda: Tomography((1, 48, 48), 40),
    "area": lambda: SuperResolution(SHAPE, 4, "area"),
    "matlab": lambda: SuperResolution(SHAPE, 2, "matlab"),
    "saturating": lambda: SaturatingDeblurring(SHAPE),
    "grey": lambda: Colourisation((3, 8, 8)),
    "fourier": lambda: CompressedSensing(SHAPE, "fourier"),
    "counts": lambda: LowDoseCT(SHAPE, 4),
    "waves": lambda: InverseScattering(SHAPE, 2, 3, solver="deepinv"),
}
NONLINEAR = {
    "scattering": lambda: InverseScattering(SHAPE, 1, 3, 0.5, 1.5, "lippmann_schwinger", 0.05),
    "phases": lambda: PhaseRetrieval(SHAPE),
    "phases of intensities": lambda: PhaseRetrieval(SHAPE, "intensity"),
    "saturating": lambda: SaturatingDeblurring(SHAPE, noise_std=0.02),
    "low dose": lambda: LowDoseCT(SHAPE, 6),
    "diffraction": lambda: CoherentDiffraction(SHAPE),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_a_problem_on_deepinvs_physics_is_pickled_and_copied(name, generator):
    problem = PHYSICS[name]()
    x = torch.rand((2, *problem.shape), generator=generator)
    for other in (pickle.loads(pickle.dumps(problem)), copy.deepcopy(problem), copy.copy(problem)):
        assert torch.equal(other(x), problem(x))
        assert {*other.state_dict()} == {*problem.state_dict()}


@pytest.mark.parametrize("name", NONLINEAR)
def test_the_guide_by_gradients_sees_each_state_alone(name, generator):
    """In float32 the steps of conjugate gradients left it, by rounding, to what else was in the batch: by 20 %, here."""
    problem, wild = NONLINEAR[name](), 4 * torch.randn((4, *SHAPE), generator=generator)
    guide, error = guidance(problem), torch.full((1, 1, 1), 0.5, dtype=D)
    assert type(guide) is GradientGuidance
    y = problem.simulate(held_out_digits()[:1], generator)
    together = guide(wild, y.expand(4, *y.shape[1:]), error).delta
    alone = torch.cat([guide(one[None], y, error).delta for one in wild])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_paths_of_an_untrained_network_have_one_density(unet2d_prior, generator):
    """Drawn and read: 3 nats apart before, behind waves that scatter again and again."""
    posterior = Posterior(unet2d_prior, NONLINEAR["scattering"]())
    paths = rollout(posterior, 4, posterior.problem.simulate(held_out_digits()[:1], generator), generator)
    with torch.no_grad():
        torch.testing.assert_close(path_log_prob(posterior, paths), paths.log_prob, rtol=0.0, atol=0.02)


def test_an_operator_of_float32_guides_in_float32(generator):
    matrix = torch.randn((3, 4), generator=generator)  # a product of float32 with float64 is refused
    problem = InverseProblem(lambda x: (x @ matrix.T).tanh(), GaussianNoise(0.1), shape=(4,))
    x, y = torch.randn((5, 4), generator=generator), torch.zeros((5, 3))
    assert guidance(problem)(x, y, torch.full((4,), 0.3, dtype=D)).delta.dtype == torch.float32


def test_operators_do_not_depend_on_the_default_dtype():
    mask, matrix = make_mask("scratches", (1, 28, 28), 0.25, 3), CompressedSensing(SHAPE, seed=1).operator.matrix
    torch.set_default_dtype(D)
    try:
        assert torch.equal(make_mask("scratches", (1, 28, 28), 0.25, 3), mask)
        assert torch.equal(CompressedSensing(SHAPE, seed=1).operator.matrix, matrix)
    finally:
        torch.set_default_dtype(torch.float32)


def test_complex_noise_is_scipys(generator):
    """As real and imaginary parts, each with half of the variance, correlated in no way."""
    clean, y = torch.randn((2, 6, 2), generator=generator, dtype=D)
    expected = scipy.stats.multivariate_normal(clean.flatten().numpy(), 0.3**2 / 2).logpdf(y.flatten().numpy())
    assert float(ComplexGaussianNoise(0.3).log_prob(clean, y, 2)) == pytest.approx(expected, rel=1e-12)


def test_whole_numbers_may_be_integers(generator):
    counts = InverseProblem(lambda x: x.exp(), PoissonNoise(10.0), shape=(4,))
    assert counts.check_y(torch.tensor([[0, 3, 1, 7]])).dtype == torch.float32
    coins = InverseProblem(lambda x: x, BernoulliNoise(), shape=(2,))
    assert coins.check_y(torch.tensor([[True, False]])).tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match=r"y must be counts, 0, 1, 2, \.\.\., for PoissonNoise, got -3"):
        counts.check_y(torch.tensor([[0, -3, 1, 7]]))
    with pytest.raises(TypeError, match=r"y must have a floating-point dtype, got torch\.int64"):
        InverseProblem(lambda x: x, GaussianNoise(1.0), shape=(2,)).check_y(torch.tensor([[1, 2]]))


def test_a_y_in_other_units_is_warned_of(unet2d_prior, recwarn):
    posterior = Posterior(unet2d_prior, Inpainting(SHAPE, noise_std=0.1))
    y = posterior.problem.observed(held_out_digits()[:2])
    posterior.check_y(y)
    assert not [w for w in recwarn if "units" in str(w.message)]
    with pytest.warns(UserWarning, match="y is up to 255, draws of the prior give up to .*: is y in their units?"):
        posterior.check_y(127.5 * (y + 1))


def stepwise(z):
    return (4 * z).round() / 4


def through_numpy(z):
    return torch.from_numpy(z.numpy().copy())


@pytest.mark.parametrize("decode", [stepwise, through_numpy, torch.no_grad()(lambda z: 2 * z)])
def test_a_decode_without_gradient_is_known(decode):
    prior = GeneratorPrior(decode, 2, steps=4)
    assert not prior.differentiable
    with pytest.raises(ValueError, match=r"law='laplace' needs a prior .* of differentiable decode"):
        pcn(prior, InverseProblem(torch.tensor([[1.0, 1.0]]), GaussianNoise(0.1)), torch.tensor([[3.0]]), 8, law="laplace")


def test_latents_are_not_taken_for_images_nor_unscaled():
    with pytest.raises(
        ValueError, match="priors/mnist_latent holds an autoencoder, vae/, and its latents are no images: LatentPrior reads it"
    ):
        DiffusersPrior.from_pretrained("priors/mnist_latent")
    prior = LatentPrior.from_pretrained("priors/mnist_latent", steps=2)
    config = {name: value for name, value in prior.autoencoder.config.items() if name != "scaling_factor" and name[0] != "_"}
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match="scaling_factor must be given, got None"):
        LatentPrior(prior.network, prior.schedule, type(prior.autoencoder)(**config), steps=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Denoising(SHAPE)(torch.zeros((2, *SHAPE), dtype=torch.complex64)), TypeError, "x must be real, got torch.complex64"),
        (lambda: MRI(SHAPE, 2)(torch.zeros((2, *SHAPE), dtype=torch.complex64)), TypeError, "x must be real, got torch.complex64"),
        (lambda: HDR(SHAPE, limits=(1j, 2j)), ValueError, "limits must be two finite numbers low < high"),
        (lambda: Tomography(SHAPE, air=1j), ValueError, "air must be a finite number, got 1j"),
        (lambda: Deblurring(SHAPE, "anisotropic", size=3, std=(1.0, 2.0), angle=1j), ValueError, "angle must be a finite number, got 1j"),
        (lambda: Inpainting(8), ValueError, r"shape must be that of x, \(d,\) or \(C, H, W\), got 8"),
        (lambda: Lensing(SHAPE, pixels=16, einstein_radius=5.0), ValueError, "lens must show some of the source, within source_fov 1.2"),
        (lambda: LensingFamily(Lensing(SHAPE), shear=(0.05, -0.05)), ValueError, r"shear must be a range \(low, high\) with low below"),
        (
            lambda: InverseProblem(lambda x: x.mean(0, keepdim=True), GaussianNoise(0.1)).simulate(torch.zeros((4, *SHAPE))),
            ValueError, "operator must map a batch",
        ),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
