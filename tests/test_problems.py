"""Likelihoods against scipy, shapes against loops, and guidance against the textbook Gaussian conditional."""

import subprocess
import sys

import pytest
import scipy.stats
import torch
from torch import nn

import rtb_inverse.guidance
from rtb_inverse.guidance import DenseGuidance, GradientGuidance, MaskGuidance, conjugate_gradients, guidance
from rtb_inverse.noise import PoissonNoise
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward

D = torch.float64


class Masked(InverseProblem):
    """y = x[mask] + noise: the smallest problem with a mask."""

    def __init__(self, mask, std):
        super().__init__(lambda x: x[:, mask], GaussianNoise(std), linear=True)
        self.mask = mask
        self.bind(mask.shape)


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=D)


def pool(x):
    return nn.functional.avg_pool2d(x, 2)


MATRIX = torch.randn((3, 4), generator=torch.Generator().manual_seed(7), dtype=D)
IMAGE = (1, 4, 4)
# operator, shape of x, shape of y, linear
OPERATORS = {
    "matrix": (MATRIX, (4,), (3,), True),
    "matrix on images": (torch.cat([MATRIX] * 4, 1), IMAGE, (3,), True),
    "affine": (lambda x: 2 * x + 1, (4,), (4,), True),
    "pool": (pool, IMAGE, (1, 2, 2), True),
    "sum": (lambda x: x.sum(1), (4,), (), True),
    "cube": (lambda x: x**3, (4,), (4,), False),
    "norm": (lambda x: x.flatten(1).norm(dim=1), IMAGE, (), False),
    "magnitude": (lambda x: (x.flatten(1) @ MATRIX.to(x.dtype).T.repeat(4, 1)).abs(), IMAGE, (3,), False),
}


@pytest.fixture(params=OPERATORS)
def named(request):
    operator, shape, y_shape, linear = OPERATORS[request.param]
    return InverseProblem(operator, GaussianNoise(0.3), shape), operator, torch.Size(y_shape), linear


# Noise and likelihood


@pytest.mark.parametrize("std", [0.1, 2, torch.tensor([0.1, 1.0, 3.0], dtype=D)])
def test_gaussian_noise_is_scipys(std, generator):
    clean, y = randn(generator, 5, 2, 3), randn(generator, 5, 2, 3)
    log_prob = GaussianNoise(std).log_prob(clean, y, 2)
    truth = scipy.stats.norm.logpdf(y, clean, std).sum((1, 2))
    torch.testing.assert_close(log_prob, torch.from_numpy(truth), rtol=1e-12, atol=1e-12)


def test_simulated_moments_are_those_of_the_noise(generator, assert_mean):
    std = torch.tensor([0.1, 1.0, 3.0], dtype=D)
    problem = InverseProblem(MATRIX, GaussianNoise(std), (4,))
    x = randn(generator, 2, 4)
    y = problem.simulate(x.expand(4000, 2, 4), generator)
    clean = x @ MATRIX.T
    assert_mean(y, clean)
    assert_mean((y - clean) ** 2, (std**2).expand(2, 3))
    assert_mean((y[:, 0, 0] - clean[0, 0]) * (y[:, 1, 0] - clean[1, 0]), 0.0)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0])])
def test_bad_noise_gets_one_clear_error(std):
    with pytest.raises(ValueError, match="noise_std must be finite and above 0"):
        GaussianNoise(std)


def test_likelihood_is_normalised_in_y():
    problem = InverseProblem(MATRIX[:1], GaussianNoise(0.7), (4,))
    y = torch.linspace(-20, 20, 4001, dtype=D)[:, None]
    density = problem.log_likelihood(torch.ones((4001, 4), dtype=D), y).exp()
    assert float(torch.trapezoid(density, y[:, 0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n, b", [(3, 3), (3, 2), (1, 4), (4, 1)])
def test_likelihood_of_draws_and_observations_is_a_loop(n, b, named, generator):
    problem, operator, y_shape, _ = named
    x, y = randn(generator, n, b, *problem.shape), randn(generator, b, *y_shape)
    clean = problem(x)
    assert clean.shape == (n, b, *y_shape)
    log_likelihood = problem.log_likelihood(x, y)
    assert log_likelihood.shape == (n, b)
    for i in range(n):
        for j in range(b):
            one = operator @ x[i, j].flatten() if isinstance(operator, torch.Tensor) else operator(x[i, j][None])[0]
            torch.testing.assert_close(clean[i, j], one)
            truth = scipy.stats.norm.logpdf(y[j], one, 0.3).sum()
            assert float(log_likelihood[i, j]) == pytest.approx(float(truth), rel=1e-9)
    torch.testing.assert_close(problem.log_likelihood(x[0], y), log_likelihood[0])


def test_simulate_keeps_the_batch(named, generator):
    problem, _, y_shape, _ = named
    assert problem.simulate(randn(generator, 5, 2, *problem.shape), generator).shape == (5, 2, *y_shape)
    assert problem.simulate(randn(generator, 5, *problem.shape), generator).shape == (5, *y_shape)


# What is known of the operator


def test_shapes_and_linearity_are_found_out(named):
    problem, _, y_shape, linear = named
    assert problem.y_shape == y_shape and problem.linear is linear and problem.differentiable


@pytest.mark.parametrize("d", range(1, 9))
@pytest.mark.parametrize("operator, linear", [
    (lambda x: x + 0.1 * x**2, False), (lambda x: x.abs(), False), (lambda x: x.relu(), False), (lambda x: x.clamp(-0.3, 0.3), False),
    (lambda x: 1e-3 * x.sin(), False), (lambda x: 1e4 * x - 3, True), (lambda x: x.flip(-1).cumsum(-1), True), (lambda x: 0 * x + 1, True),
])  # fmt: skip
def test_linearity_in_any_dimension(operator, linear, d):
    assert InverseProblem(operator, GaussianNoise(0.1), (d,)).linear is linear


def test_linearity_can_be_said():
    assert InverseProblem(torch.sin, GaussianNoise(0.1), (3,), linear=True).linear is True


def test_operators_without_gradients_are_noticed():
    assert not InverseProblem(lambda x: x.detach().round(), GaussianNoise(0.1), (3,)).differentiable


@pytest.mark.parametrize("operator, message", [
    (lambda x: x @ torch.ones(5, 2), "operator failed on x of shape"),
    (lambda x: x.sum(), "operator must map a batch"),
    (lambda x: x[:1], "operator must map a batch"),
    (lambda x: x.tolist(), "operator must map a batch"),
    (lambda x: x.log(), r"operator's output at x ~ N\(0, I\) must be finite"),
])  # fmt: skip
def test_bad_operators_get_one_clear_error(operator, message):
    with pytest.raises(ValueError, match=message):
        InverseProblem(operator, GaussianNoise(0.1), (3,))


def test_operator_must_be_callable():
    with pytest.raises(TypeError, match="operator must be a callable or a matrix"):
        InverseProblem([[1.0]], GaussianNoise(0.1))


@pytest.mark.parametrize("matrix, was", [
    (torch.ones((2, 3), dtype=torch.complex64), r"torch.complex64 of shape \(2, 3\); torch.view_as_real makes a real one"),
    (torch.ones((2, 3), dtype=torch.long), r"torch.int64 of shape \(2, 3\)"),
    (torch.ones(3), r"torch.float32 of shape \(3,\)"),
])  # fmt: skip
def test_a_matrix_must_be_real(matrix, was):
    with pytest.raises(TypeError, match=rf"operator must be a real matrix \(m, d\), got {was}"):
        InverseProblem(matrix, GaussianNoise(0.1))


def test_a_problem_keeps_its_shape():
    problem = InverseProblem(pool, GaussianNoise(0.1), IMAGE)
    assert problem.bind(IMAGE) is problem
    with pytest.raises(ValueError, match="they must agree"):
        problem.bind((1, 8, 8))


def test_simulate_refuses_what_is_not_finite():
    problem = InverseProblem(torch.exp, GaussianNoise(0.1), (2,))
    with pytest.raises(ValueError, match="operator's output must be finite"):
        problem.simulate(torch.full((1, 2), 1e4))


@pytest.mark.parametrize("y, error, message", [
    (torch.zeros(3), ValueError, r"y must have shape \(B, 3\)"),
    (torch.zeros(2, 4), ValueError, r"y must have shape \(B, 3\)"),
    (torch.zeros(0, 3), ValueError, "y is empty"),
    (torch.full((1, 3), float("nan")), ValueError, "y must be finite"),
    (torch.zeros((2, 3), dtype=torch.long), TypeError, "floating-point"),
    ([0.0, 0.0, 0.0], TypeError, "y must be a torch.Tensor"),
])  # fmt: skip
def test_bad_observations_get_one_clear_error(y, error, message):
    with pytest.raises(error, match=message):
        InverseProblem(MATRIX, GaussianNoise(0.1), (4,)).check_y(y)


# What the network sees


def test_condition_of_vectors_is_y(generator):
    y = randn(generator, 5, 2, 3)
    problem = InverseProblem(lambda x: x.reshape(-1, 2, 3), GaussianNoise(0.1), (6,))
    assert torch.equal(problem.condition(y), y.flatten(1))


def test_condition_on_xs_grid_is_y(generator):
    y = randn(generator, 5, 2, 4, 4)
    problem = InverseProblem(lambda x: torch.cat([x, -x], 1), GaussianNoise(0.1), IMAGE)
    assert torch.equal(problem.condition(y), y)


@pytest.mark.parametrize("name", ["matrix on images", "pool"])
def test_condition_elsewhere_is_the_back_projection(name, generator):
    problem = InverseProblem(OPERATORS[name][0], GaussianNoise(0.1), IMAGE)
    y = randn(generator, 5, *problem.y_shape)
    J = torch.autograd.functional.jacobian(lambda x: problem(x).flatten(), torch.zeros(IMAGE, dtype=D)).flatten(1)
    torch.testing.assert_close(problem.condition(y), (y.flatten(1) @ J).reshape(5, *IMAGE))


@pytest.mark.parametrize("operator", [lambda x: torch.sin(pool(x)) + 1, lambda x: 1e3 * torch.fft.rfft2(x).abs()], ids=["curved", "even"])
def test_condition_of_a_nonlinear_operator_is_affine_in_y_of_scale_1_and_the_same_again(operator, generator):
    first, second = (InverseProblem(operator, GaussianNoise(0.1), IMAGE) for _ in range(2))
    y = randn(generator, 3, *first.y_shape)
    seen, again = first.condition(first(randn(generator, 50, *IMAGE))), second.condition(y)
    assert 0.3 < float(seen.square().mean().sqrt()) < 3  # an even operator has the Jacobian 0 at 0
    torch.testing.assert_close(first.condition(y), again)
    torch.testing.assert_close(first.condition(y[:1] - 2 * y[1:2] + 2 * y[2:]), again[:1] - 2 * again[1:2] + 2 * again[2:])


@pytest.mark.parametrize("operator", [lambda x: (x + 1).relu(), lambda x: (x + 1).relu().sum(-1)], ids=["on the grid", "sums"])
def test_condition_of_counts_has_scale_1_and_tells_them_apart(operator, generator):
    """At a gain of 1,000 too; and it is, but for shift and scale, what it is at a gain of 1."""
    large, small = (InverseProblem(operator, PoissonNoise(gain=gain, background=2 * gain), IMAGE) for gain in (1000.0, 1.0))
    x = randn(generator, 50, *IMAGE)
    seen = large.condition(large.simulate(x, generator))
    assert seen.shape == (50, *IMAGE) and abs(float(seen.mean())) < 0.5 and 0.3 < float(seen.std()) < 3
    assert float((seen[0] - seen[1]).square().mean()) > 0.1
    clean = large(x)
    torch.testing.assert_close(large.condition(1000 * (clean + 2)), small.condition(clean + 2))


def test_condition_needs_a_shape_and_a_gradient():
    with pytest.raises(ValueError, match="shape of x is not known yet"):
        InverseProblem(pool, GaussianNoise(0.1)).condition(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="override `condition`"):
        InverseProblem(lambda x: pool(x.detach()), GaussianNoise(0.1), IMAGE).condition(torch.zeros(1, 1, 2, 2))


def test_reward_is_its_own_likelihood(generator):
    reward = Reward(lambda x: -(x**2).flatten(1).sum(1), IMAGE)
    x = randn(generator, 3, 2, *IMAGE)
    torch.testing.assert_close(reward.log_likelihood(x, None), -(x**2).flatten(2).sum(2))
    assert reward.check_y(None) is None and guidance(reward) is None
    with pytest.raises(TypeError, match="no observation to simulate"):
        reward.simulate(x)
    with pytest.raises(ValueError, match="y must be None for a Reward"):
        reward.check_y(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="one number per x"):
        Reward(lambda x: x, IMAGE)


# Guidance


def textbook(x_0, error, J, std, residual):
    """Mean shift and covariance of x given y = clean + J (x - x_0) + std n, under x ~ N(x_0, diag(error)); vectors only."""
    R = torch.diag(error.flatten())
    J = J.flatten(1)
    gain = R @ J.T @ torch.linalg.inv(J @ R @ J.T + torch.diag(std.expand(len(J)) ** 2))
    return (gain @ residual.flatten()).reshape(x_0.shape), R - gain @ J @ R


def jacobian(problem, x_0):
    return torch.autograd.functional.jacobian(lambda x: problem(x).flatten(), x_0)


@pytest.mark.parametrize("shape", [(5,), (2, 6), (1, 4, 4)])
@pytest.mark.parametrize("per_element", [False, True])
def test_mask_guidance_is_the_textbook(shape, per_element, generator):
    mask = torch.rand(shape, generator=generator) < 0.6
    m = int(mask.sum())
    std = 0.1 + torch.rand(m, generator=generator, dtype=D) if per_element else torch.tensor(0.3, dtype=D)
    problem = Masked(mask, std)
    guide = guidance(problem)
    assert isinstance(guide, MaskGuidance)
    x_0, y, error = randn(generator, 2, 3, *shape), randn(generator, 3, m), torch.rand((2, 1, *shape), generator=generator, dtype=D)
    update = guide(x_0, y, error)
    for i in range(2):
        for j in range(3):
            delta, covariance = textbook(x_0[i, j], error[i, 0], jacobian(problem, x_0[i, j]), std, y[j] - problem(x_0[i, j]))
            torch.testing.assert_close(update.delta[i, j], delta)
            torch.testing.assert_close(torch.diag((error[i, 0] * update.shrink[i, 0]).flatten()), covariance)


@pytest.mark.parametrize("m", [1, 3, 7])
@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
@pytest.mark.parametrize("rank", ["full", "deficient"])
def test_dense_guidance_is_the_textbook(m, shape, rank, generator):
    A, std = randn(generator, m, 4), 0.2 + torch.rand(m, generator=generator, dtype=D)
    A[-1] = 0 if rank == "deficient" else A[-1]
    problem = InverseProblem(A, GaussianNoise(std), shape)
    guide = guidance(problem)
    assert isinstance(guide, DenseGuidance)
    x_0, y, level = randn(generator, 2, 3, *shape), randn(generator, 3, m), torch.tensor([0.3, 2.0], dtype=D)
    update = guide(x_0, y, level.reshape(2, 1, *(1,) * len(shape)).expand(2, 1, *shape))
    V = update.basis
    torch.testing.assert_close(V.T @ V, torch.eye(min(m, 4), dtype=D))
    for i in range(2):
        own = level[i] * (torch.eye(4, dtype=D) + (V * (update.shrink[i, 0] - 1)) @ V.T)
        for j in range(3):
            delta, covariance = textbook(x_0[i, j], level[i].expand(4), A, std, y[j] - problem(x_0[i, j]))
            torch.testing.assert_close(update.delta[i, j], delta)
            torch.testing.assert_close(own, covariance, atol=1e-10, rtol=1e-7)


def test_dense_guidance_knows_offsets_and_averages_the_error(generator):
    problem = InverseProblem(lambda x: 3 * x[:, :2] - 5, GaussianNoise(0.4), (3,))
    x_0, y, error = randn(generator, 2, 3), randn(generator, 2, 2), torch.tensor([0.2, 0.9, 1.3], dtype=D)
    update = guidance(problem)(x_0, y, error)
    for j in range(2):
        residual = y[j] - (3 * x_0[j, :2] - 5)
        delta, _ = textbook(x_0[j], error.mean().expand(3), jacobian(problem, x_0[j]), torch.tensor(0.4, dtype=D), residual)
        torch.testing.assert_close(update.delta[j], delta, rtol=1e-5, atol=1e-6)  # a bare function is tried out in float32


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_guidance_is_in_the_dtype_of_the_state(named, dtype, generator):
    problem = named[0]
    guide = guidance(problem)
    x_0, y = randn(generator, 2, 3, *problem.shape).to(dtype), randn(generator, 3, *problem.y_shape).to(dtype)
    update = guide(x_0, y, torch.full((2, 1, *problem.shape), 0.5, dtype=D))
    assert update.delta.dtype == dtype and update.delta.shape == x_0.shape and torch.isfinite(update.delta).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_guidance_is_the_textbook_of_the_linearised_problem(name, generator):
    operator, shape, _, _ = OPERATORS[name]
    problem = InverseProblem(operator, GaussianNoise(0.7), shape)
    guide = GradientGuidance(problem, iterations=60, clip=None)
    x_0, y = randn(generator, 2, 3, *shape), randn(generator, 3, *problem.y_shape)
    error = 0.2 + torch.rand((2, 1, *shape), generator=generator, dtype=D)
    update = guide(x_0, y, error)
    assert update.shrink is None
    for i in range(2):
        for j in range(3):
            delta, _ = textbook(x_0[i, j], error[i, 0], jacobian(problem, x_0[i, j]).reshape(problem.y_shape.numel(), -1),
                                torch.tensor(0.7, dtype=D), y[j] - problem(x_0[i, j]))  # fmt: skip
            torch.testing.assert_close(update.delta[i, j], delta, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("rounds", [2, 3])
def test_rounds_are_gauss_newton(rounds, generator):
    problem = InverseProblem(lambda x: torch.sin(x @ MATRIX.to(x.dtype).T), GaussianNoise(0.3), (4,))
    guide = GradientGuidance(problem, iterations=60, clip=None, rounds=rounds)
    x_0, y, error = randn(generator, 3, 4), randn(generator, 3, 3), 0.2 + torch.rand(4, generator=generator, dtype=D)
    update = guide(x_0, y, error)
    for j in range(3):
        delta = torch.zeros(4, dtype=D)
        for _ in range(rounds):
            at = x_0[j] + delta
            J = jacobian(problem, at)
            delta, _ = textbook(x_0[j], error, J, torch.tensor(0.3, dtype=D), y[j] - problem(at) + J @ delta)
        torch.testing.assert_close(update.delta[j], delta, atol=1e-8, rtol=1e-6)


def test_one_iteration_is_the_gradient_with_the_best_step(generator):
    problem = InverseProblem(MATRIX, GaussianNoise(0.7), (4,))
    x_0, y = randn(generator, 1, 4), randn(generator, 1, 3)
    delta = GradientGuidance(problem, iterations=1, clip=None)(x_0, y, torch.ones(4, dtype=D)).delta

    def energy(move):
        return -problem.log_likelihood(x_0 + move, y) + 0.5 * (move**2).sum()

    x = x_0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.log_likelihood(x, y).sum(), x)
    assert float(torch.cosine_similarity(delta, gradient)) == pytest.approx(1, abs=1e-9)
    for factor in (0.99, 1.01):
        assert float(energy(factor * delta)) > float(energy(delta))


def test_clip_bounds_the_move_and_keeps_its_direction(generator):
    problem = InverseProblem(torch.sin, GaussianNoise(1e-3), (4,))
    x_0, y, error = 0.3 * randn(generator, 5, 4), 100 + randn(generator, 5, 4), torch.full((4,), 0.25, dtype=D)
    free = GradientGuidance(problem, 1, clip=None)(x_0, y, error).delta
    clipped = GradientGuidance(problem, 1, clip=2.0)(x_0, y, error).delta
    size = clipped.square().mean(1).sqrt()
    assert (free.square().mean(1).sqrt() > 20 * 0.5).all()
    assert ((0.95 * 2 * 0.5 < size) & (size <= 2 * 0.5)).all()  # a far move ends at the bound, no shorter
    torch.testing.assert_close(torch.cosine_similarity(free, clipped, 1), torch.ones(5, dtype=D))
    tiny = GradientGuidance(problem, 1, clip=1e6)(x_0, y, error).delta
    torch.testing.assert_close(tiny, free, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["mask", "dense", "gradient"])
def test_batched_guidance_is_a_loop(kind, generator):
    shape = (1, 3, 3)
    if kind == "mask":
        problem = Masked(torch.rand(shape, generator=generator) < 0.5, 0.3)
    else:
        problem = InverseProblem(pool_1 if kind == "dense" else (lambda x: pool_1(x) ** 2), GaussianNoise(0.3), shape)
    guide = guidance(problem)
    assert type(guide).__name__.lower().startswith(kind)
    x_0, y = randn(generator, 4, 2, *shape), randn(generator, 2, *problem.y_shape)
    error = 0.1 + torch.rand((4, 1, *shape), generator=generator, dtype=D)
    batched = guide(x_0, y, error)
    for i in range(4):
        for j in range(2):
            single = guide(x_0[i, j : j + 1], y[j : j + 1], error[i, 0])
            torch.testing.assert_close(batched.delta[i, j], single.delta[0])
            if single.shrink is not None:
                torch.testing.assert_close(batched.shrink[i, 0], single.shrink)


def pool_1(x):
    return nn.functional.avg_pool2d(x, 2, 1)


def test_guidance_takes_the_best_that_the_problem_allows(monkeypatch):
    noise = GaussianNoise(0.1)
    assert isinstance(guidance(Masked(torch.tensor([True, False]), 0.1)), MaskGuidance)
    assert isinstance(guidance(InverseProblem(MATRIX, noise, (4,))), DenseGuidance)
    assert isinstance(guidance(InverseProblem(torch.sin, noise, (4,))), GradientGuidance)
    assert isinstance(guidance(InverseProblem(MATRIX, noise, (4,)), decode=torch.sin), GradientGuidance)
    assert guidance(InverseProblem(lambda x: x.detach().round(), noise, (4,))) is None

    class Other(nn.Module):
        pass

    assert guidance(InverseProblem(MATRIX, Other(), (4,))) is None
    monkeypatch.setattr(rtb_inverse.guidance, "DENSE_LIMIT", 11)
    large = guidance(InverseProblem(MATRIX, noise, (4,)))
    assert isinstance(large, GradientGuidance) and large.clip is None and large.iterations == 5


def test_decoded_guidance_pulls_through_the_decoder(generator):
    """A(decode(z)) with both linear: the textbook of their product, where it has one singular value (one iteration is then exact)."""
    problem = InverseProblem(torch.eye(3, dtype=D), GaussianNoise(0.5), (3,))
    Q = torch.linalg.qr(randn(generator, 3, 3))[0]
    guide = guidance(problem, lambda z: 2 * z @ Q.T)
    guide.clip = None
    z, y = randn(generator, 2, 3), randn(generator, 2, 3)
    update = guide(z, y, torch.full((3,), 0.8, dtype=D))
    for j in range(2):
        delta, _ = textbook(z[j], torch.full((3,), 0.8, dtype=D), 2 * Q, torch.tensor(0.5, dtype=D), y[j] - 2 * Q @ z[j])
        torch.testing.assert_close(update.delta[j], delta)


def test_decoded_guidance_where_the_spaces_have_other_ranks(generator):
    """z in R^4, x an image: the events of the chain are z's."""
    Q = torch.linalg.qr(randn(generator, 4, 4))[0]
    problem = InverseProblem(lambda x: x[:, 0], GaussianNoise(0.5), (1, 2, 2))
    guide = guidance(problem, lambda z: (z @ Q.T).unflatten(-1, (1, 2, 2)), event_dim=1)
    guide.clip = None
    z, y = randn(generator, 2, 3, 4), randn(generator, 3, 2, 2)
    delta = guide(z, y, torch.full((4,), 0.8, dtype=D)).delta
    expected = 0.8 / (0.8 + 0.25) * (y.flatten(1) - z @ Q.T) @ Q
    torch.testing.assert_close(delta, expected)


def test_guidance_needs_no_forward_mode(generator):
    class Square(torch.autograd.Function):
        """x^2, in reverse mode only."""

        generate_vmap_rule = False

        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    x_0, y, error = randn(generator, 2, 3), randn(generator, 2, 3), torch.full((3,), 0.3, dtype=D)
    updates = []
    for operator in (Square.apply, torch.square):
        problem = InverseProblem(operator, GaussianNoise(0.5), (3,))
        updates.append(guidance(problem)(x_0, y, error).delta)
    torch.testing.assert_close(*updates)


@pytest.mark.parametrize("iterations", [5, 50])
def test_conjugate_gradients_solve_a_batch_at_once(iterations, generator):
    A = randn(generator, 6, 5, 5)
    A = A @ A.mT + torch.eye(5, dtype=D)
    b = randn(generator, 6, 5)
    b[0] = 0  # solved before the first step
    x = conjugate_gradients(lambda v: torch.einsum("mij,mj->mi", A, v), b, iterations)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "operator",
    [lambda x: x - x.mean(0), lambda x: x.softmax(0), lambda x: x.cumsum(0), lambda x: x.flip(0), lambda x: x[:1].expand(len(x), -1)],
)
def test_an_operator_that_mixes_the_batch(operator):
    with pytest.raises(ValueError, match="operator must see each element of a batch by itself"):
        InverseProblem(operator, GaussianNoise(0.1), (4,))
    with pytest.raises(ValueError, match="log_reward must see each element of a batch by itself"):
        Reward(lambda x: operator(x).sum(1), (4,))


@pytest.mark.parametrize("setting", ["legacy", "new", "default"])
def test_an_operator_is_asked_whether_it_is_affine_at_full_precision(setting):
    """A GPU's convolutions round to three digits (TF32), which no affine operator would pass; the user's setting is left as it was."""
    code = """if True:
        import torch
        from rtb_inverse import GaussianNoise, InverseProblem
        conv, seen = torch.backends.cudnn.conv, []
        match "SETTING":
            case "legacy":
                torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
            case "new":
                torch.backends.fp32_precision = "tf32"
        def settings():
            return conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        was = settings()
        problem = InverseProblem(lambda x: (seen.append(settings()), 2 * x)[1], GaussianNoise(0.1), (4,))
        assert problem.linear and settings() == was != ("ieee", "ieee") and seen.count(("ieee", "ieee")) == 1, (was, seen)
    """
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code.replace("SETTING", setting)], check=True, timeout=300)
