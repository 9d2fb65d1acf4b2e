"""Any of deepinv's physics as the operator of a problem, as it is: against its own adjoint, and the exact posterior of a Gaussian prior."""

import pytest
import torch
from deepinv import physics
from deepinv.physics.functional import gaussian_blur

from priors import GaussianPrior
from rtb_inverse import GaussianNoise, InverseProblem, Posterior
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.guidance import affine

N = 8
SHAPE = (1, N, N)
LINEAR = {
    "inpainting": lambda rng: physics.Inpainting(SHAPE, mask=0.5, rng=rng),
    "blur": lambda rng: physics.Blur(filter=gaussian_blur(sigma=(1.0, 1.0)), padding="circular"),
    "blur by Fourier": lambda rng: physics.BlurFFT(SHAPE, filter=gaussian_blur(sigma=(0.5, 0.5))),
    "downsampling": lambda rng: physics.Downsampling(SHAPE, filter="gaussian", factor=2),
    "compressed sensing": lambda rng: physics.CompressedSensing(20, SHAPE, rng=rng),
    "one pixel": lambda rng: physics.SinglePixelCamera(16, SHAPE, rng=rng),
    "tomography": lambda rng: physics.Tomography(5, N, normalize=False),
}


@pytest.fixture(params=LINEAR)
def linear(request):
    return LINEAR[request.param](torch.Generator().manual_seed(0))


def test_the_matrix_is_the_transpose_of_the_adjoint(linear):
    problem = InverseProblem(operator=linear.A, noise=GaussianNoise(0.1), shape=SHAPE)
    matrix, offset = affine(problem)
    units = torch.eye(problem.y_shape.numel()).reshape(-1, *problem.y_shape)
    assert problem.linear and problem.differentiable and not offset.any()
    torch.testing.assert_close(matrix, linear.A_adjoint(units).flatten(1), rtol=1e-4, atol=1e-4)


def test_the_posterior_of_a_gaussian_prior_is_exact(linear):
    """The residual of RTB, log Z + log q - log p - log p(y | x_0), is 0 on the posterior's paths, as far as float32 goes."""
    root = torch.randn((N * N, N * N), generator=torch.Generator().manual_seed(1)) / N
    prior = GaussianPrior(torch.zeros(SHAPE), root @ root.T + 0.1 * torch.eye(N * N), steps=6)
    posterior = Posterior(prior, InverseProblem(operator=linear.A, noise=GaussianNoise(0.1)))
    y = posterior.problem.simulate(prior.sample(3, torch.Generator().manual_seed(2)), torch.Generator().manual_seed(3))
    paths = rollout(posterior, 8, y, torch.Generator().manual_seed(4))
    with torch.no_grad():
        log_w = path_log_prob(prior, paths) + posterior.log_likelihood(paths.x_0, y) - paths.log_prob
    A = affine(posterior.problem)[0].double()
    S = A @ (root.double() @ root.double().T + 0.1 * torch.eye(N * N)) @ A.T + 0.01 * torch.eye(len(A))
    log_z = torch.distributions.MultivariateNormal(torch.zeros(len(A)).double(), S).log_prob(y.flatten(1).double())
    torch.testing.assert_close(log_w.double(), log_z.expand(8, 3), rtol=1e-4, atol=0.02)


def test_physics_that_is_not_linear(generator):
    problem = InverseProblem(operator=physics.Ptychography(SHAPE).A, noise=GaussianNoise(0.1), shape=SHAPE)
    x = torch.rand((2, *SHAPE), generator=generator)
    assert not problem.linear and problem(x).shape == (2, *problem.y_shape)


def test_complex_measurements_are_to_be_real_and_imaginary_parts():
    transform = physics.MRI(img_size=(1, N, N)).fft
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.complex64; torch.view_as_real makes one"):
        InverseProblem(operator=transform, noise=GaussianNoise(0.1), shape=SHAPE)
    assert InverseProblem(lambda x: torch.view_as_real(transform(x)), GaussianNoise(0.1), SHAPE).y_shape == (1, N, N, 2)
