"""The nonlinear tasks against numpy and scipy: operators, likelihoods, what the network sees, guides, errors; to disk, from YAML.

Monte-Carlo comparisons fail at 4.5 standard errors: a right one does so once in 150,000, this file makes fewer than 200."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.ndimage
import scipy.signal
import scipy.special
import scipy.stats
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

import priors
import tasks
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.guidance import ElementGuidance, GradientGuidance, guidance
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import InverseProblem
from tasks import HDR, ClassConstraint, ClassReward, PhaseRetrieval, Quantisation, SaturatingDeblurring
from tasks.phase_retrieval import EPS

D = torch.float64
IMAGE, COLOUR = (1, 8, 8), (2, 6, 5)


class Classifier(nn.Module):
    """Three classes of images of 64 pixels, by a seeded matrix."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn((3, 64), generator=torch.Generator().manual_seed(3)))
        self.dropout = nn.Dropout(0.5)

    @classmethod
    def from_pretrained(cls, folder: str) -> "Classifier":
        return cls()

    def forward(self, x):
        return self.dropout(x.flatten(1)) @ self.weight.to(x.dtype).T


PROBLEMS = {
    "saturating": lambda shape=IMAGE: SaturatingDeblurring(shape, blur_std=1.2, gain=2.5, noise_std=0.1),
    "hdr": lambda shape=IMAGE: HDR(shape, scale=1.7, limits=(-1.0, 0.8), noise_std=0.1),
    "amplitude": lambda shape=IMAGE: PhaseRetrieval(shape, "amplitude", 2, 0.05),
    "intensity": lambda shape=IMAGE: PhaseRetrieval(shape, "intensity", 1.5, 0.05),
    "quantisation": lambda shape=IMAGE: Quantisation(shape, 2, 0.2, limits=(-1.0, 0.6)),
    "class": lambda shape=IMAGE: ClassConstraint(Classifier(), shape),
}
GUIDED = {
    "saturating": GradientGuidance, "hdr": ElementGuidance, "amplitude": GradientGuidance, "intensity": GradientGuidance,
    "quantisation": ElementGuidance,
}  # fmt: skip


@pytest.fixture(params=PROBLEMS)
def name(request):
    return request.param


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=D)


def simulated(problem, generator, b=3):
    return problem.simulate(0.7 * randn(generator, b, *problem.shape), generator)


# Operators and likelihoods


def truth(name: str, x: np.ndarray) -> np.ndarray:
    """A(x) for one x (C, H, W), by numpy and scipy."""
    if name == "saturating":
        blurred = [scipy.ndimage.gaussian_filter(channel, 1.2, mode="nearest", radius=4) for channel in x]
        return np.tanh(2.5 * np.stack(blurred)) / np.tanh(2.5)
    if name == "hdr":
        return np.clip(1.7 * x, -1.0, 0.8)
    padded = tuple(int(np.ceil({"amplitude": 2, "intensity": 1.5}[name] * n)) for n in x.shape[1:])
    power = np.abs(np.fft.rfft2((x + 1) / 2, s=padded, norm="ortho")) ** 2
    return power if name == "intensity" else np.sqrt(power + EPS**2)


@pytest.mark.parametrize("shape", [IMAGE, COLOUR])
@pytest.mark.parametrize("name", ["saturating", "hdr", "amplitude", "intensity"])
def test_operators_are_numpys_and_their_noise_gaussian(name, shape, generator):
    problem, x = PROBLEMS[name](shape), randn(generator, 3, *shape)
    expected = torch.from_numpy(np.stack([truth(name, one.numpy()) for one in x]))
    torch.testing.assert_close(problem(x), expected)
    y = problem.simulate(x, generator)
    assert y.shape == expected.shape
    log_p = scipy.stats.norm.logpdf(y, expected, float(problem.noise.std)).sum((1, 2, 3))
    torch.testing.assert_close(problem.log_likelihood(x, y), torch.from_numpy(log_p))
    z = (y - expected) / problem.noise.std
    assert abs(float(z.square().mean()) - 1) < 4.5 * (2 / z.numel()) ** 0.5


def test_the_camera_keeps_the_range_and_what_is_measured_is_never_negative(generator):
    x = 2 * torch.rand((20, *IMAGE), generator=generator) - 1
    assert (PROBLEMS["saturating"]()(x).abs() <= 1).all()
    assert (PROBLEMS["amplitude"]()(x) >= 0).all() and (PROBLEMS["intensity"]()(x) >= 0).all()
    hdr = PROBLEMS["hdr"]()(3 * x)
    assert float(hdr.min()) == -1.0 and float(hdr.max()) == pytest.approx(0.8)


EDGES = np.array([-np.inf, -0.6, -0.2, 0.2, np.inf])  # of 2 bits on [-1, 0.6]


def test_bins_have_scipys_probabilities():
    problem, x = Quantisation((1,), 2, 0.2, (-1.0, 0.6)), torch.linspace(-2, 2, 41, dtype=D)[:, None, None]
    y = torch.arange(4, dtype=D)[:, None]
    log_p = problem.log_likelihood(x.expand(41, 4, 1), y)
    cdf = scipy.stats.norm.cdf(EDGES, x[:, 0].numpy(), 0.2)
    torch.testing.assert_close(log_p.exp(), torch.from_numpy(np.diff(cdf)))
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(41, dtype=D))


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_far_bins_have_finite_logarithms_and_gradients(dtype):
    problem = Quantisation((1,), 2, 0.05, (-1.0, 0.6))
    for bin, (lower, upper) in enumerate(pairwise(EDGES)):
        x = torch.tensor([[-3.0], [3.0]], dtype=dtype, requires_grad=True)
        log_p = problem.log_likelihood(x, torch.full((2, 1), float(bin), dtype=dtype))
        (gradient,) = torch.autograd.grad(log_p.sum(), x)
        assert torch.isfinite(gradient).all()
        for found, at in zip(log_p.tolist(), (-3.0, 3.0), strict=True):
            a, b = (lower - at) / 0.05, (upper - at) / 0.05
            a, b = (-b, -a) if a + b > 0 else (a, b)
            expected = scipy.special.log_ndtr(b) + np.log1p(-np.exp(scipy.special.log_ndtr(a) - scipy.special.log_ndtr(b)))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_bins_are_drawn_as_often_as_they_say(generator, assert_mean):
    problem, x = Quantisation((1,), 2, 0.2, (-1.0, 0.6)), torch.tensor([-0.7, 0.1, 2.0], dtype=D)[:, None]
    y = problem.simulate(x.expand(4000, 3, 1), generator)
    assert set(y.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert_mean(y[:, :2], (np.diff(scipy.stats.norm.cdf(EDGES, x[:2].numpy(), 0.2)) * np.arange(4)).sum(1, keepdims=True))
    assert (y[:, 2] == 3).all()


def test_classes_are_drawn_and_scored_by_the_softmax(generator, assert_mean):
    problem, x = PROBLEMS["class"](), 0.5 * randn(generator, 2, *IMAGE)
    p = scipy.special.softmax(x.flatten(1).numpy() @ problem.classifier.weight.double().numpy().T, 1)
    classes = torch.eye(3, dtype=D)
    torch.testing.assert_close(problem.log_likelihood(x[:, None].expand(2, 3, *IMAGE), classes).exp(), torch.from_numpy(p))
    y = problem.simulate(x.expand(4000, 2, *IMAGE), generator)
    assert y.shape == (4000, 2, 3) and torch.equal(y.sum(-1), torch.ones(4000, 2, dtype=D))
    assert_mean(y, p)


@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_a_class_reward_is_its_log_probability(label, beta, unet2d_prior, generator):
    posterior = Posterior(unet2d_prior, ClassReward(Classifier(), label), beta=beta)
    x = randn(generator, 4, 1, *IMAGE).float()
    p = scipy.special.log_softmax(x.flatten(1).numpy() @ posterior.problem.classifier.weight.numpy().T, 1)[:, label]
    torch.testing.assert_close(posterior.log_likelihood(x, None)[:, 0], beta * torch.from_numpy(p), rtol=1e-4, atol=1e-5)
    assert not posterior.amortised and posterior.sample(n=2).x.shape == (2, 1, *IMAGE)


def test_a_function_can_classify():
    problem = ClassConstraint(lambda x: torch.stack([x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1), IMAGE)
    assert problem.y_shape == (2,) and problem.config is None


def test_classifiers_are_frozen_and_free_of_dropout(generator):
    problem = PROBLEMS["class"]()
    x = randn(generator, 2, *IMAGE)
    assert torch.equal(problem(x), problem(x)) and not any(p.requires_grad for p in problem.parameters())


def test_elements_of_a_batch_do_not_see_each_other(name, generator):
    problem = PROBLEMS[name]()
    x, y = randn(generator, 4, *IMAGE), simulated(problem, generator, 4)
    x.requires_grad_()
    log_p = problem.log_likelihood(x, y)
    (gradient,) = torch.autograd.grad(log_p[1], x)
    assert float(gradient[1].abs().max()) > 0 and float(gradient[[0, 2, 3]].abs().max()) == 0
    for i in range(4):
        torch.testing.assert_close(log_p[i], problem.log_likelihood(x[i : i + 1], y[i : i + 1])[0])
        torch.testing.assert_close(problem.condition(y)[i], problem.condition(y[i : i + 1])[0])


def test_a_problem_depends_on_no_global_state_and_leaves_it_alone(name, generator):
    x = randn(generator, 2, *IMAGE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = PROBLEMS[name]()
        draw = torch.rand(())
        torch.manual_seed(1)
        assert torch.equal(draw, torch.rand(()))
        second = PROBLEMS[name]()
    assert torch.equal(first(x), second(x))
    again = (problem.simulate(x, torch.Generator().manual_seed(5)) for problem in (first, second))
    assert torch.equal(*again)


def test_a_problem_is_the_same_on_another_device(name, elsewhere, generator):
    here, there = PROBLEMS[name](), PROBLEMS[name]().to(elsewhere)
    x, y = randn(generator, 3, *IMAGE), simulated(here, generator)
    x_there, y_there = x.to(elsewhere), y.to(elsewhere)
    torch.testing.assert_close(there(x_there).cpu(), here(x))
    torch.testing.assert_close(there.log_likelihood(x_there, y_there).cpu(), here.log_likelihood(x, y))
    torch.testing.assert_close(there.condition(y_there).cpu(), here.condition(y))


AWKWARD = {"dark": -1.0, "grey": 0.0, "bright": 1.0, "far below": -30.0, "far above": 30.0}


@pytest.mark.parametrize("value", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_gradients_are_finite_at_awkward_points(value, dtype, name, generator):
    """All amplitudes but one are 0 for a constant image, all of them for a dark one; all else is saturated or clipped."""
    problem = PROBLEMS[name]()
    x, y = torch.full((3, *IMAGE), value, dtype=dtype, requires_grad=True), simulated(problem, generator).to(dtype)
    log_p = problem.log_likelihood(x, y)
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(torch.autograd.grad(log_p.sum(), x)[0]).all()
    if name in GUIDED:
        update = guidance(problem)(x, y, torch.full((1, 1, 1), 0.3, dtype=D))
        assert torch.isfinite(update.delta).all()
        total = update.delta.sum() + (0 if update.shrink is None else update.shrink.sum())
        assert torch.isfinite(torch.autograd.grad(total, x)[0]).all()


def test_what_is_clipped_has_no_gradient():
    problem = PROBLEMS["hdr"]((3,))
    x = torch.tensor([[-2.0, 0.1, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(problem.log_likelihood(x, torch.zeros(1, 3)).sum(), x)
    assert gradient[0, 0] == 0 == gradient[0, 2] and gradient[0, 1] != 0


# What the network sees


def test_conditions_lie_on_xs_grid_at_its_scale(name, generator):
    problem = PROBLEMS[name]()
    seen = problem.condition(problem.simulate(priors.held_out_digits()[:50], generator))
    assert seen.shape[0] == 50 and seen.shape[2:] == (8, 8) and seen.ndim == 4
    assert 0.2 < float(seen.square().mean().sqrt()) < 2


@pytest.mark.parametrize("name", ["hdr", "quantisation"])
def test_conditions_of_vectors_are_vectors(name, generator):
    problem = PROBLEMS[name]((5,))
    assert problem.condition(simulated(problem, generator, 2)).shape == (2, 10 if name == "hdr" else 5)


def test_the_inverse_response_of_a_clean_image_is_the_blurred_one(generator):
    problem, x = PROBLEMS["saturating"](), 0.9 * (2 * torch.rand((2, *IMAGE), generator=generator, dtype=D) - 1)
    blurred = np.stack([scipy.ndimage.gaussian_filter(one[0], 1.2, mode="nearest", radius=4)[None] for one in x.numpy()])
    torch.testing.assert_close(problem.condition(problem(x)), torch.from_numpy(blurred))
    torch.testing.assert_close(problem.condition(torch.full((1, *IMAGE), 9.0, dtype=D)), torch.ones((1, *IMAGE), dtype=D))


def test_hdr_shows_what_is_clipped():
    seen = HDR((4,), 2.0, (-1.0, 1.0), 0.1).condition(torch.tensor([[-1.05, -0.5, 0.93, 2.0]]))
    torch.testing.assert_close(seen, torch.tensor([[-0.525, -0.25, 0.465, 1.0, -1.0, 0.0, 1.0, 1.0]]))


@pytest.mark.parametrize("kind", ["amplitude", "intensity"])
def test_phase_retrieval_shows_the_autocorrelation(kind, generator):
    problem, x = PhaseRetrieval(IMAGE, kind, 2, 0.01), randn(generator, 2, *IMAGE)
    seen = (problem.condition(problem(x)) + 1) / 2
    for b in range(2):
        u = ((x[b, 0] + 1) / 2).numpy()
        full = torch.from_numpy(scipy.signal.correlate2d(u, u))  # lag (i, j) at [7 + i, 7 + j]
        ratio = full / full[7, 7]
        torch.testing.assert_close(seen[b, 0], ratio[7:, 7:], atol=2e-4, rtol=0)
        torch.testing.assert_close(seen[b, 1], ratio[7:, :8].flip(-1), atol=2e-4, rtol=0)
        torch.testing.assert_close(seen[b, 2], (full[7, 7] / 64).expand(8, 8), atol=2e-4, rtol=0)
    dark = problem.condition(problem(torch.full((1, *IMAGE), -1.0, dtype=D)))
    assert bool(((dark + 1).abs() < 2e-3).all())


def test_quantisation_shows_the_bins_centres(generator):
    problem, x = Quantisation((50,), 3, 1e-6), 2 * torch.rand((1, 50), generator=generator) - 1
    centres = problem.condition(problem.simulate(x, generator))
    assert ((centres - x).abs() <= 1 / 8 + 1e-5).all()
    torch.testing.assert_close(problem.condition(torch.arange(8.0).expand(1, 8))[0], torch.linspace(-7, 7, 8) / 8)


def test_a_class_is_shown_everywhere():
    seen = PROBLEMS["class"]().condition(torch.eye(3))
    assert seen.shape == (3, 3, 8, 8) and torch.equal(seen, torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8))


# Guides


def test_the_guides_are_the_best_there_are(name):
    guide = guidance(PROBLEMS[name]())
    assert type(guide) is GUIDED.get(name, type(None))


LIKELIHOODS = {
    "hdr": lambda x, y: scipy.stats.norm.pdf(y, np.clip(1.7 * x, -1.0, 0.8), 0.1),
    "quantisation": lambda x, y: scipy.stats.norm.cdf(EDGES[int(y) + 1], x, 0.2) - scipy.stats.norm.cdf(EDGES[int(y)], x, 0.2),
}


@pytest.mark.parametrize("y", {"hdr": [-1.2, -0.97, 0.3, 0.75, 1.0], "quantisation": [0, 1, 2, 3]}.items(), ids=lambda item: item[0])
def test_element_guidance_is_the_posteriors_mean_and_variance(y):
    """By quadrature, from estimates within and beyond what is clipped, and errors large and small."""
    name, values = y
    guide = guidance(PROBLEMS[name]((len(values),)))
    for mean in (-1.4, -0.5, 0.1, 0.9):
        for r in (0.7, 0.1):
            update = guide(torch.full((1, len(values)), mean, dtype=D), torch.tensor([values], dtype=D), torch.full((1,), r**2, dtype=D))
            x = np.linspace(mean - 30 * r, mean + 30 * r, 200_001)
            for i, value in enumerate(values):
                density = scipy.stats.norm.pdf(x, mean, r) * LIKELIHOODS[name](x, value)
                density = density / scipy.integrate.simpson(density, x=x)
                first = scipy.integrate.simpson(density * (x - mean), x=x)
                second = scipy.integrate.simpson(density * (x - mean - first) ** 2, x=x)
                assert float(update.delta[0, i]) == pytest.approx(first, abs=1e-5)
                assert float(update.shrink[0, i]) * r**2 == pytest.approx(second, rel=1e-3, abs=1e-6)


def test_element_guidance_is_a_loop_in_the_states_dtype(generator):
    problem = PROBLEMS["hdr"]()
    guide, y = guidance(problem), simulated(problem, generator, 2).float()
    x_0, error = randn(generator, 3, 2, *IMAGE).float(), 0.1 + torch.rand((3, 1, *IMAGE), generator=generator, dtype=D)
    update = guide(x_0, y, error)
    assert update.delta.dtype == torch.float32 and update.shrink.shape == update.delta.shape == x_0.shape
    for i in range(3):
        for j in range(2):
            one = guide(x_0[i, j : j + 1], y[j : j + 1], error[i])
            torch.testing.assert_close((update.delta[i, j], update.shrink[i, j]), (one.delta[0], one.shrink[0]))


@pytest.mark.parametrize("name", GUIDED)
def test_a_guided_start_is_nearer_to_y_and_its_density_can_be_trained(name, unet2d_prior, generator):
    problem = PROBLEMS[name]()
    guided, plain = Posterior(unet2d_prior, problem), Posterior(unet2d_prior, problem, start="prior")
    assert guided.start == "guided"
    y = problem.simulate(unet2d_prior.sample(4, generator).clamp(-1, 1), generator)
    near, far = (problem.log_likelihood(p.sample(y, 8, torch.Generator().manual_seed(1)).x, y).mean() for p in (guided, plain))
    assert float(near) > float(far)
    path = rollout(guided, 2, y, generator)
    path_log_prob(guided, path).sum().backward()
    gradients = [p.grad for p in guided.trainable() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


# To disk and back


@pytest.fixture
def own_classifier(monkeypatch):
    """As if the classifier were one of the project's."""
    monkeypatch.setattr(priors, "Classifier", Classifier, raising=False)
    monkeypatch.setattr(Classifier, "__module__", "priors")


@pytest.mark.usefixtures("own_classifier")
@pytest.mark.parametrize("name", [*PROBLEMS, "reward"])
def test_a_saved_posterior_knows_its_problem(name, unet2d_prior, tmp_path):
    problem = ClassReward(Classifier(), 2, IMAGE) if name == "reward" else PROBLEMS[name]()
    if name in ("class", "reward"):
        problem.classifier.weight.data += 0.1  # weights of its own
    posterior = Posterior(copy.deepcopy(unet2d_prior), problem)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path)
    assert type(loaded.problem) is type(problem) and loaded.problem.config == problem.config
    y = None if name == "reward" else simulated(problem, torch.Generator().manual_seed(2)).float()
    ours, theirs = (p.sample(y, 2, torch.Generator().manual_seed(1)).x for p in (posterior, loaded))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(loaded.log_likelihood(ours, y), posterior.log_likelihood(ours, y), rtol=0, atol=0)


def test_a_foreign_classifier_has_to_be_given_again(unet2d_prior, tmp_path):
    Posterior(unet2d_prior, PROBLEMS["class"]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot rebuild the problem \(tasks.class_constraint.ClassConstraint is code\); pass problem="):
        Posterior.from_pretrained(tmp_path)
    assert isinstance(Posterior.from_pretrained(tmp_path, problem=PROBLEMS["class"]()).problem, ClassConstraint)


ROOT = Path(tasks.__file__).parent
YAML = {"saturating_deblurring", "hdr", "phase_retrieval", "quantisation", "class_constraint", "class_reward"}


def problem_section(file: str) -> dict:
    return yaml.safe_load((ROOT / f"{file}.yaml").read_text())["model"]["init_args"]["posterior"]["init_args"]["problem"]


def build(section: dict) -> InverseProblem:
    """As the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(InverseProblem, "problem", fail_untyped=False)
    return parser.instantiate(parser.parse_object({"problem": section})).problem


@pytest.mark.parametrize("file", sorted(YAML))
def test_the_yaml_builds_its_problem(file, monkeypatch):
    monkeypatch.setattr(priors, "MNISTClassifier", Classifier, raising=False)
    monkeypatch.setattr(Classifier, "__module__", "priors")
    problem = build(problem_section(file))
    assert type(problem).__module__ == f"tasks.{file}" or type(problem) is ClassReward
    assert problem.shape == ((1, 28, 28) if file not in ("class_constraint", "class_reward") else None)
    wrong = problem_section(file)
    wrong["init_args"]["nonsense"] = 1
    with pytest.raises(Exception, match="nonsense"):
        build(wrong)


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SaturatingDeblurring((8,)), ValueError, r"shape must be \(C, H, W\), got \(8,\)"),
        (lambda: SaturatingDeblurring(IMAGE, blur_std=0), ValueError, "blur_std must be a finite number above 0, got 0"),
        (lambda: SaturatingDeblurring(IMAGE, gain=-1), ValueError, "gain must be a finite number above 0, got -1"),
        (lambda: SaturatingDeblurring(IMAGE, noise_std=0.0), ValueError, "noise_std must be finite and above 0, got 0.0"),
        (lambda: HDR(IMAGE, scale=float("nan")), ValueError, "scale must be a finite number above 0, got nan"),
        (lambda: HDR(IMAGE, limits=(1, -1)), ValueError, r"limits must be two finite numbers low < high, got \(1, -1\)"),
        (lambda: PhaseRetrieval((8, 8)), ValueError, r"shape must be \(C, H, W\), got \(8, 8\)"),
        (lambda: PhaseRetrieval(IMAGE, "phase"), ValueError, "kind must be one of amplitude, intensity, got 'phase'"),
        (lambda: PhaseRetrieval(IMAGE, oversampling=0.5), ValueError, "oversampling must be a finite number of at least 1, got 0.5"),
        (lambda: PhaseRetrieval(IMAGE, oversampling="2"), ValueError, "oversampling must be a finite number of at least 1, got '2'"),
        (lambda: HDR(IMAGE, limits=None), ValueError, "limits must be two finite numbers low < high, got None"),
        (lambda: SaturatingDeblurring(IMAGE, blur_std=2.5), ValueError, "blur_std must be at most a quarter of the image's side, 2 "),
        (lambda: Quantisation(IMAGE, 0), ValueError, "bits must be an integer of at least 1, got 0"),
        (lambda: Quantisation(IMAGE, 17), ValueError, "bits must be at most 16, got 17"),
        (lambda: Quantisation(IMAGE, noise_std=0), ValueError, "noise_std must be finite and above 0, got 0"),
        (lambda: Quantisation(IMAGE, limits=(0.0, 0.0)), ValueError, r"limits must be two finite numbers low < high, got \(0.0, 0.0\)"),
        (lambda: ClassConstraint("MNIST", IMAGE), TypeError, "classifier must be a callable from x to logits, got str"),
        (lambda: ClassConstraint(lambda x: x, IMAGE), ValueError, r"classifier must give logits of shape \(M, C\), C >= 2, got \(3, 1"),
        (lambda: ClassReward(Classifier(), -1), ValueError, "label must be an integer of at least 0, got -1"),
        (lambda: ClassReward(Classifier(), 3, IMAGE), ValueError, r"label must be one of the classes 0, 1, \.\.\., 2, got 3"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_clear_error(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "y", "error", "message"),
    [
        ("saturating", torch.zeros(2, 64), ValueError, r"y must have shape \(B, 1, 8, 8\), got \(2, 64\)"),
        ("saturating", torch.full((2, *IMAGE), 255.0), ValueError, r"within what the operator gives, \[-1.01357, 1.01357\], "),
        ("hdr", torch.full((1, *IMAGE), float("nan")), ValueError, "y must be finite"),
        ("hdr", torch.full((1, *IMAGE), -20.0), ValueError, r"gives, \[-1, 0.8\], and no more than 10 noise_std beyond, got -20 \(64 such"),
        ("amplitude", torch.full((1, 1, 16, 9), -2.0), ValueError, r"y must be within what the operator gives, \[0, inf\], .* got -2"),
        ("amplitude", torch.zeros((1, 1, 16, 16)), ValueError, r"y must have shape \(B, 1, 16, 9\), got \(1, 1, 16, 16\)"),
        ("quantisation", torch.full((1, *IMAGE), -1.0), ValueError, r"y must hold bins 0, 1, \.\.\., 3, got -1"),
        ("quantisation", torch.full((1, *IMAGE), 4), ValueError, r"y must hold bins 0, 1, \.\.\., 3, got 4"),
        ("quantisation", torch.full((1, *IMAGE), 0.25), ValueError, r"y must hold bins 0, 1, \.\.\., 3, got 0.25"),
        ("quantisation", [0], TypeError, "y must be a torch.Tensor, got list"),
        ("class", torch.tensor([0, 3]), ValueError, r"y must hold classes 0, 1, \.\.\., 2, got 3"),
        ("class", torch.tensor([-1.0]), ValueError, r"y must hold classes 0, 1, \.\.\., 2, got -1"),
        ("class", torch.tensor([0.5]), ValueError, r"y must hold classes 0, 1, \.\.\., 2, got 0.5"),
        ("class", torch.full((2, 3), 0.5), ValueError, r"y must be one-hot, \(B, 3\), or the indices of the classes, \(B,\), got rows"),
        ("class", torch.zeros((2, 4)), ValueError, r"y must have shape \(B, 3\), got \(2, 4\)"),
    ],
)  # fmt: skip
def test_bad_observations_get_one_clear_error(name, y, error, message):
    with pytest.raises(error, match=message):
        PROBLEMS[name]().check_y(y)


def test_good_observations_pass(name, generator):
    problem = PROBLEMS[name]()
    y = simulated(problem, generator)
    assert torch.equal(problem.check_y(y), y)
    if name == "quantisation":
        assert torch.equal(problem.check_y(y.long()), y.float())
    if name == "class":
        assert torch.equal(problem.check_y(y.argmax(1)), y.float())
