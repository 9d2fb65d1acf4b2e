"""Bad input: one clear error each, which names the argument, says what it was and what is expected."""

import json
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import Coarse
from diffusers import DDPMScheduler

from priors import DiffusersPrior, GaussianMixturePrior
from rtb_inverse import cli
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.corrections import importance
from rtb_inverse.evaluation import evaluate, observe, simulate_observations
from rtb_inverse.lightning import ObservationData, PosteriorTraining, fit
from rtb_inverse.objectives import vargrad
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward
from rtb_inverse.schedules import FlowMatching, VarianceExploding, VariancePreserving, schedule_from_config
from rtb_inverse.training import score
from tasks import Inpainting

DIGITS = Path(__file__).parents[1] / "priors" / "digits"
NAN, INF = float("nan"), float("inf")
PRIOR = GaussianMixturePrior.random(3, 3, 0, torch.float64, steps=3)
A = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]], dtype=torch.float64)
Y = torch.zeros((4, 2), dtype=torch.float64)


def linear(noise_std: float = 0.5) -> InverseProblem:
    return InverseProblem(A, GaussianNoise(noise_std))


POSTERIOR = Posterior(PRIOR, linear(), width=8)
REWARD = Posterior(PRIOR, Reward(lambda x: -x.square().sum(-1)), width=8)


def problem(operator, **options) -> Posterior:
    return Posterior(PRIOR, InverseProblem(operator, GaussianNoise(0.5)), **options)


def inpainting(mask="box", shape=(1, 8, 8), **options) -> Inpainting:
    return Inpainting(shape, mask, **options)


def at(y: torch.Tensor, value: float) -> torch.Tensor:
    y = y.clone()
    y[1, 0] = value
    return y


def train(**options):
    """A fit that would take two steps, were its options good."""
    return fit(POSTERIOR, 2, progress=False, **options)


def overflowing(x):
    """Finite near the origin only."""
    return torch.where(x.abs() < 50, x, torch.full_like(x, INF))


def score_far_out():
    posterior = Posterior(PRIOR, InverseProblem(overflowing, GaussianNoise(0.5)), start="prior", width=8)
    paths = rollout(posterior, 2, torch.zeros((1, 3), dtype=torch.float64), torch.Generator().manual_seed(0))
    paths.x[-1, 0, 0, 0] = 99.0
    return score(posterior, paths)


def scheduler(**options):
    return schedule_from_config({"_class_name": "DDPMScheduler", "clip_sample": False} | options)


CASES = {
    # y
    "y of another shape": (lambda: POSTERIOR.sample(torch.zeros((4, 3))), ValueError, r"y must have shape \(B, 2\), got \(4, 3\)"),
    "y without a batch": (lambda: POSTERIOR.sample(torch.zeros(2)), ValueError, r"y must have shape \(B, 2\), got \(2,\)"),
    "y with two batches": (lambda: POSTERIOR.sample(torch.zeros((4, 5, 2))), ValueError, r"y must have shape \(B, 2\), got \(4, 5, 2\)"),
    "y an empty batch": (lambda: importance(POSTERIOR, Y[:0]), ValueError, r"y is empty: its shape is \(0, 2\), expected at least one"),
    "y of integers": (lambda: POSTERIOR.sample(Y.long()), TypeError, "y must have a floating-point dtype, got torch.int64"),
    "y complex": (lambda: POSTERIOR.sample(Y.to(torch.complex64)), TypeError, "y must have a floating-point dtype, got torch.complex64"),
    "y an array": (lambda: POSTERIOR.sample(Y.numpy()), TypeError, "y must be a torch.Tensor, got ndarray"),
    "y left out": (lambda: POSTERIOR.sample(), TypeError, "y must be a torch.Tensor, got NoneType"),
    "y with NaN": (lambda: POSTERIOR.sample(at(Y, NAN)), ValueError, "y must be finite, got NaN or infinity in 1 of 8 elements"),
    "y with infinity": (lambda: evaluate(POSTERIOR, at(Y, INF)), ValueError, "y must be finite, got NaN or infinity in 1 of 8"),
    "y for a reward": (lambda: REWARD.sample(Y), ValueError, "y must be None for a Reward, got Tensor"),
    "an image for y": (
        lambda: inpainting().check_y(torch.zeros((2, 1, 8, 8))),
        ValueError,
        r"y must have shape \(B, 48\), the seen elements, got \(2, 1, 8, 8\): .*problem.observed",
    ),
    # counts
    "no draw": (lambda: POSTERIOR.sample(Y, 0), ValueError, "n must be an integer of at least 1, got 0"),
    "half a draw": (lambda: importance(POSTERIOR, Y, 2.5), ValueError, "n must be an integer of at least 1, got 2.5"),
    "one draw to judge": (lambda: evaluate(POSTERIOR, Y, 1), ValueError, "n must be an integer of at least 2, got 1"),
    "no batch size": (lambda: importance(POSTERIOR, Y, 8, batch_size=0), ValueError, "batch_size must be an integer of at least 1, got 0"),
    "no chunk": (
        lambda: path_log_prob(PRIOR, rollout(PRIOR, 2), 0),
        ValueError,
        "chunk_size must be an integer of at least 1, got 0",
    ),
    "no step": (lambda: GaussianMixturePrior.random(3, 3, 0, steps=0), ValueError, "steps must be an integer of at least 1, got 0"),
    "minus one step": (lambda: DiffusersPrior.from_pretrained(DIGITS, -1), ValueError, "steps must be an integer of .* got -1"),
    "no observation": (lambda: simulate_observations(POSTERIOR, 0), ValueError, "n must be an integer of at least 1, got 0"),
    # noise
    "noise 0": (lambda: GaussianNoise(0), ValueError, "noise_std must be finite and above 0, got 0"),
    "noise below 0": (lambda: inpainting(noise_std=-0.1), ValueError, "noise_std must be finite and above 0, got -0.1"),
    "noise NaN": (lambda: linear(NAN), ValueError, "noise_std must be finite and above 0, got nan"),
    "noise 0 somewhere": (lambda: GaussianNoise(torch.tensor([1.0, 0.0])), ValueError, r"noise_std must be .* got \[1.0, 0.0\]"),
    "noise in words": (lambda: GaussianNoise("low"), TypeError, "noise_std must be a number or a tensor, got 'low'"),
    "noise a number": (lambda: InverseProblem(A, 0.1), TypeError, r"noise must be a noise model such as GaussianNoise\(std\), got 0.1"),
    # operator
    "operator in words": (
        lambda: InverseProblem("blur", GaussianNoise(0.1)),
        TypeError,
        "operator must be a callable or a matrix, got str",
    ),
    "operator raises": (
        lambda: problem(lambda x: x[:, 7]),
        ValueError,
        r"operator failed on x of shape \(3, 3\): IndexError: index 7 is out of bounds",
    ),
    "operator not finite": (
        lambda: problem(lambda x: x / 0),
        ValueError,
        "operator's output must be finite, got NaN or infinity in 9 of 9",
    ),
    "operator not finite far out": (
        lambda: InverseProblem(overflowing, GaussianNoise(0.1), shape=(3,)).simulate(99 * torch.ones((2, 3))),
        ValueError,
        "operator's output must be finite, got NaN or infinity in 6 of 6",
    ),
    "likelihood not finite": (score_far_out, ValueError, "log-likelihood of the paths must be finite, got NaN or infinity in 1 of 2"),
    "operator drops the batch": (
        lambda: problem(lambda x: x.sum()),
        ValueError,
        r"operator must map a batch \(M, \*shape\) to a batch \(M, \*y_shape\): on x of shape \(3, 3\) it gave \(\)",
    ),
    "operator takes one of the batch": (
        lambda: problem(lambda x: x[0]),  # of the length of the batch, by chance
        ValueError,
        r"operator must keep the batch: on 3 and 1 elements it gave \(3,\) and \(3,\)",
    ),
    "operator gives no tensor": (lambda: problem(lambda x: [x]), ValueError, r"operator must map a batch .* it gave list"),
    "operator rounds to integers": (
        lambda: problem(lambda x: x.round().long()),
        TypeError,
        "operator must return a floating-point tensor, got torch.int64",
    ),
    "matrix of another width": (lambda: problem(torch.ones((2, 4))), ValueError, r"operator failed on x of shape \(3, 3\).*4"),
    "reward per element": (lambda: Posterior(PRIOR, Reward(lambda x: x)), ValueError, r"log_reward must give one number per x.*\(3, 3\)"),
    # masks
    "mask sees nothing": (
        lambda: inpainting(torch.zeros((8, 8), dtype=torch.bool)),
        ValueError,
        "mask must see at least one element of x, got a mask that is False everywhere",
    ),
    "mask of another shape": (
        lambda: inpainting(torch.ones((8, 7), dtype=torch.bool)),
        ValueError,
        r"mask must have shape \(1, 8, 8\) or \(8, 8\), got \(8, 7\)",
    ),
    "mask of floats": (lambda: inpainting(torch.ones((8, 8))), TypeError, "mask must be boolean .* got dtype torch.float32"),
    "mask of other integers": (lambda: inpainting(2 * torch.ones((8, 8), dtype=torch.int)), TypeError, "mask must be boolean .* 0 and 1"),
    "mask misspelt": (
        lambda: inpainting("bxo"),
        FileNotFoundError,
        "mask must be one of box, half, random, scratches, an array .* got 'bxo'",
    ),
    "all hidden": (lambda: inpainting("random", hidden=1.0), ValueError, "hidden must be a finite number of at least 0 below 1, got 1.0"),
    # prior and posterior
    "prior and problem disagree": (
        lambda: Posterior(PRIOR, inpainting()),
        ValueError,
        r"problem is for x of shape \(1, 8, 8\), but the prior draws x of shape \(3,\)",
    ),
    "prior and problem swapped": (lambda: Posterior(linear(), PRIOR), TypeError, "prior must be a Prior, got InverseProblem"),
    "problem missing": (lambda: Posterior(PRIOR, A), TypeError, "problem must be an InverseProblem, got Tensor"),
    "guided without a gradient": (
        lambda: Posterior(Coarse(3), InverseProblem(lambda x: x.detach(), GaussianNoise(0.1)), start="guided"),
        ValueError,
        r"start='guided' needs a differentiable operator \(and decode\) and a noise model of rtb_inverse.noise, or a prior of exact draws; "
        "expected start=",
    ),
    "unknown start": (lambda: problem(A, start="warm"), ValueError, "start must be one of guided, prior, got 'warm'"),
    "beta 0": (lambda: Posterior(PRIOR, linear(), beta=0.0), ValueError, "beta must be a finite number above 0, got 0.0"),
    "eta above 1": (lambda: GaussianMixturePrior.random(3, 3, 0, eta=1.5), ValueError, r"eta must be in \(0, 1\], got 1.5"),
    "unknown variance": (
        lambda: GaussianMixturePrior.random(3, 3, 0, variance="learned"),
        ValueError,
        "variance must be one of analytic, small, large, got 'learned'",
    ),
    "mixture not positive definite": (
        lambda: GaussianMixturePrior(torch.ones(2), torch.zeros((2, 3)), torch.zeros((2, 3, 3))),
        ValueError,
        "covariances must be positive definite, got a smallest eigenvalue of 0",
    ),
    # schedules
    "unknown prediction type": (lambda: scheduler(prediction_type="x0"), ValueError, "prediction_type must be one of epsilon.* got 'x0'"),
    "unknown scheduler": (lambda: scheduler(_class_name="FooScheduler"), ValueError, "scheduler must be one of .* got 'FooScheduler'"),
    "unknown beta schedule": (lambda: scheduler(beta_schedule="cosine"), ValueError, "beta_schedule must be one of linear.* got 'cosine'"),
    "unknown beta schedule of ours": (
        lambda: VariancePreserving(beta_schedule="cosine"),
        ValueError,
        "beta_schedule must be one of linear.* got 'cosine'",
    ),
    "unknown spacing": (lambda: VariancePreserving(timestep_spacing="even"), ValueError, "timestep_spacing must be one of .* got 'even'"),
    "thresholding": (lambda: schedule_from_config(DDPMScheduler(thresholding=True)), ValueError, "thresholding must be false, got true"),
    "epsilon at zero SNR": (
        lambda: VariancePreserving(rescale_betas_zero_snr=True),
        ValueError,
        "prediction_type 'epsilon' says nothing about x_0 where alpha = 0.* expected v_prediction or sample",
    ),
    "score of a flow": (lambda: FlowMatching(prediction_type="score"), ValueError, "prediction_type 'score' .* expected flow_prediction"),
    "sigmas swapped": (lambda: VarianceExploding(2.0, 1.0), ValueError, "sigma_max must be above sigma_min = 2.0, got 1.0"),
    "clipping at 0": (lambda: VariancePreserving(clip_sample=0.0), ValueError, "clip_sample must be a finite number above 0, got 0.0"),
    # training
    "no posterior": (lambda: PosteriorTraining(PRIOR), TypeError, "posterior must be a Posterior, got GaussianMixturePrior"),
    "unknown objective": (lambda: train(objective="tb"), ValueError, "objective must be one of rtb, vargrad, wake_sleep, got 'tb'"),
    "vargrad of one path": (lambda: train(draws=1), ValueError, "draws must be an integer of at least 2, got 1"),
    "vargrad of one path, by hand": (
        lambda: vargrad(*torch.zeros((3, 1, 4))),
        ValueError,
        "vargrad needs at least 2 paths per observation, got 1",
    ),
    "warm start above 1": (lambda: train(warm_start=1.2), ValueError, r"warm_start must be in \[0, 1\], got 1.2"),
    "warm start below 0": (lambda: train(warm_start=-0.1), ValueError, r"warm_start must be in \[0, 1\], got -0.1"),
    "warm start NaN": (lambda: train(warm_start=NAN), ValueError, r"warm_start must be in \[0, 1\], got nan"),
    "unknown behaviour": (lambda: train(behaviours={"foo": 1}), ValueError, "behaviours must be one of on_policy, .* got 'foo'"),
    "negative weight": (lambda: train(behaviours={"replay": -1}), ValueError, "behaviours: the weight of 'replay' must be .* got -1"),
    "no weight": (lambda: train(behaviours={"replay": 0}), ValueError, "behaviours must have a weight above 0"),
    "simulated for one observation": (
        lambda: train(y=Y[0], behaviours={"simulated": 1.0}),
        ValueError,
        "behaviours: 'simulated' has no path for a fixed observation or a reward; expected on_policy, prior or replay",
    ),
    "simulated for a reward": (
        lambda: PosteriorTraining(REWARD, behaviours={"simulated": 1.0}),
        ValueError,
        "behaviours: 'simulated' has no path for a fixed observation or a reward",
    ),
    "wake-sleep off-policy": (
        lambda: train(objective="wake_sleep", behaviours={"replay": 1.0}),
        ValueError,
        "behaviours must be on_policy alone, without extra_noise, for wake_sleep",
    ),
    "two observations": (lambda: train(y=Y[:2]), ValueError, "y must be one observation, got 2; leave y out"),
    "observation of another shape": (lambda: train(y=torch.zeros(3)), ValueError, r"y must have shape \(B, 2\), got \(1, 3\)"),
    "observation for a reward": (lambda: PosteriorTraining(REWARD, y=Y[:1]), ValueError, "y must be None for a Reward, got Tensor"),
    "data of another shape": (lambda: train(data=torch.zeros((5, 2))), ValueError, r"data must have shape \(B, 3\), got \(5, 2\)"),
    "data with NaN": (lambda: train(data=torch.full((5, 3), NAN)), ValueError, "data must be finite, got NaN or infinity in 15 of 15"),
    "no training step": (lambda: fit(POSTERIOR, 0), ValueError, "steps must be an integer of at least 1, got 0"),
    "learning rate 0": (lambda: train(lr=0.0), ValueError, "lr must be a finite number above 0, got 0.0"),
    "clip below 0": (lambda: train(clip=-1.0), ValueError, "clip must be a finite number above 0, got -1.0"),
    "no share of steps": (lambda: train(step_fraction=0.0), ValueError, r"step_fraction must be in \(0, 1\], got 0.0"),
    "no chunk in training": (lambda: train(chunk_size=0), ValueError, "chunk_size must be an integer of at least 1, got 0"),
    "no pool": (lambda: train(pool=0), ValueError, "pool must be an integer of at least 1, got 0"),
    "nothing in the pool": (lambda: train(pool_start=0), ValueError, "pool_start must be an integer of at least 1, got 0"),
    "no slot": (lambda: train(slots=0), ValueError, "slots must be an integer of at least 1, got 0"),
    "noise taken away": (lambda: train(extra_noise=-1.0), ValueError, "extra_noise must be finite and at least 0, got -1.0"),
    "decay 1": (lambda: train(ema_decay=1.0), ValueError, r"decay must be in \[0, 1\), got 1.0"),
    "option misspelt": (lambda: train(warm_strat=0.5), TypeError, "unexpected keyword argument 'warm_strat'"),
    "example of another shape": (lambda: observe(POSTERIOR, torch.zeros((2, 4))), ValueError, r"x must have shape \(B, 3\), got \(2, 4\)"),
    "no simulated observation": (lambda: ObservationData(simulated=0), ValueError, "simulated must be an integer of at least 1, got 0"),
    "y file missing": (lambda: ObservationData(y="none.npy"), FileNotFoundError, "y: no file 'none.npy', expected a .npy or .safetensors"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name):
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert caught.type is kind
    assert "\n" not in str(caught.value)


# Files


@pytest.fixture
def saved(tmp_path):
    """A saved posterior: its folder."""
    POSTERIOR.save_pretrained(tmp_path / "posterior")
    return tmp_path / "posterior"


WEIGHTS = "diffusion_pytorch_model.safetensors"


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickle_in_its_place(folder):
    tensors = dict(POSTERIOR.weights())
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / WEIGHTS)


def pickle_beside(folder):
    (folder / WEIGHTS).unlink()
    torch.save(dict(POSTERIOR.weights()), folder / "diffusion_pytorch_model.bin")


def rewrite(change):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def of_another_posterior(folder):
    other = Posterior(GaussianMixturePrior.random(3, 3, 0, torch.float64, steps=5), linear(), width=8)
    other.save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / WEIGHTS, folder / WEIGHTS)


SPOILT = {
    "folder missing": (
        shutil.rmtree,
        FileNotFoundError,
        "folder: no folder '.*posterior', expected one that Posterior.save_pretrained wrote",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json in .*posterior"),
    "config torn": (lambda f: (f / "config.json").write_text('{"steps": 3,'), ValueError, "config.json is not valid JSON"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, f"no weights {WEIGHTS} in .*posterior"),
    "weights truncated": (truncate, ValueError, f"{WEIGHTS} is not a complete safetensors file"),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, f"{WEIGHTS} is not a complete safetensors file"),
    "weights a pickle": (pickle_in_its_place, ValueError, f"{WEIGHTS} is not a complete safetensors file"),
    "pickle beside": (pickle_beside, ValueError, f"holds pickled weights .*bin.*, expected {WEIGHTS}; pickles are not loaded"),
    "weights of another posterior": (
        of_another_posterior,
        ValueError,
        r"does not fit this posterior: .* has shape \(5,\), expected \(3,\)",
    ),
    "another class": (
        rewrite(lambda c: c.update(_class_name="UNet2DModel")),
        ValueError,
        "describes a 'UNet2DModel', expected a Posterior",
    ),
    "a class of others": (
        rewrite(lambda c: c["problem"].update(class_path="os.system")),
        ValueError,
        "names the class 'os.system', expected one of rtb_inverse, priors or tasks",
    ),
    "a class that is not": (
        rewrite(lambda c: c["problem"].update(class_path="tasks.Blur")),
        ValueError,
        "names the class 'tasks.Blur', which does not exist",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_folders(name, saved):
    spoil, kind, message = SPOILT[name]
    Posterior.from_pretrained(saved)  # good so far
    spoil(saved)
    with pytest.raises(kind, match=message):
        Posterior.from_pretrained(saved)


@pytest.mark.parametrize("name", ["noise_std", "mask"])
def test_weights_of_another_problem(name, tmp_path):
    """Same shapes, another measurement: not loaded in silence."""
    Posterior(PRIOR, Inpainting((3,), [1, 0, 1], 0.5), width=8).save_pretrained(tmp_path)
    second = Inpainting((3,), [1, 1, 0], 0.5) if name == "mask" else Inpainting((3,), [1, 0, 1], 0.4)
    with pytest.raises(
        ValueError, match=r"does not fit this posterior: it was trained on another problem, problem.(noise.std|mask) differs"
    ):
        Posterior.from_pretrained(tmp_path, PRIOR, second)


PRIOR_SPOILT = {
    "folder missing": (shutil.rmtree, FileNotFoundError, "folder_or_hub_id: no folder"),
    "scheduler missing": (lambda f: shutil.rmtree(f / "scheduler"), FileNotFoundError, "has no scheduler_config.json"),
    "network's config missing": (lambda f: (f / "unet" / "config.json").unlink(), FileNotFoundError, "no config.json in .*unet"),
    "weights missing": (lambda f: (f / "unet" / WEIGHTS).unlink(), FileNotFoundError, f"no weights {WEIGHTS} in .*unet"),
    "weights truncated": (lambda f: truncate(f / "unet"), ValueError, f"{WEIGHTS} is not a complete safetensors file"),
    "weights a pickle": (lambda f: pickle_beside(f / "unet"), ValueError, "pickles are not loaded"),
    "another network": (
        lambda f: rewrite(lambda c: c.update(_class_name="UNet3DConditionModel"))(f / "unet"),
        ValueError,
        "names the model class 'UNet3DConditionModel', expected one of UNet2DModel, UNet1DModel",
    ),
    "network of another width": (
        lambda f: rewrite(lambda c: c.update(layers_per_block=2))(f / "unet"),
        ValueError,
        f"{WEIGHTS} does not fit UNet2DModel as its config describes it",
    ),
}


@pytest.mark.parametrize("name", PRIOR_SPOILT)
def test_spoilt_priors(name, tmp_path, unet2d_prior):
    spoil, kind, message = PRIOR_SPOILT[name]
    unet2d_prior.save_pretrained(tmp_path / "prior")
    DiffusersPrior.from_pretrained(tmp_path / "prior")
    spoil(tmp_path / "prior")
    with pytest.raises(kind, match=message):
        DiffusersPrior.from_pretrained(tmp_path / "prior")


@pytest.mark.parametrize("below", ["", "sub/folder"])
def test_output_that_cannot_be_written_is_found_before_any_work(below, tmp_path):
    """A file in the folder's place: root, too, cannot write there."""
    (tmp_path / "taken").write_text("mine")
    with mock.patch.object(type(PRIOR), "sample", side_effect=AssertionError("work began")):
        with pytest.raises(ValueError, match=r"output must be a folder that can be written to, got '.*taken"):
            fit(POSTERIOR, 2, output=str(tmp_path / "taken" / below), progress=False)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("pickled.npy", lambda f: np.save(f, np.array([{}], dtype=object), allow_pickle=True), "y: .* is not a plain .npy array"),
        ("torn.safetensors", lambda f: f.write_bytes(b"123"), "is not a complete safetensors file"),
        ("words.txt", lambda f: f.write_text("1 2"), "y: .*words.txt' must be a .npy or .safetensors file"),
        ("nan.npy", lambda f: np.save(f, np.full((2, 2), np.nan, dtype="float32")), "y must be finite, got NaN or infinity in 4 of 4"),
        ("empty.npy", lambda f: np.save(f, np.zeros((0, 2), dtype="float32")), r"y is empty: its shape is \(0, 2\)"),
    ],
)
def test_spoilt_observations(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        ObservationData(y=str(tmp_path / name))


# The command line

CONFIG = """
model:
  class_path: rtb_inverse.PosteriorTraining
  init_args:
    posterior:
      class_path: rtb_inverse.Posterior
      init_args:
        prior:
          class_path: priors.GaussianMixturePrior.random
          init_args: {{d: 2, components: 3, steps: 4}}
        problem:
          class_path: tasks.Inpainting
          init_args: {{shape: [2], mask: [1, 0], noise_std: 0.3}}
        width: 8
    output: {output}
    pool_start: 16
    slots: 4
    states: 8
data: {{class_path: rtb_inverse.ObservationData}}
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""
PROBLEM = "--model.init_args.posterior.init_args.problem"


def run(args: list[str]) -> None:
    with mock.patch.object(sys, "argv", ["rtb-inverse"]):  # Lightning warns where pytest was given options
        cli.main(args)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.format(output=tmp_path / "out"))
    return ["--config", str(tmp_path / "config.yaml")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "none.yaml"], "File does not exist: '.*none.yaml'"),
        (["--model.init_args.warm_strat", "0.5"], "Option 'warm_strat' is not accepted"),
        (["--trainer.max_stps", "3"], "unrecognized arguments: --trainer.max_stps"),
        (["--model", "rtb_inverse.Nope"], "module 'rtb_inverse' has no attribute 'Nope'"),
        ([f"{PROBLEM}.class_path", "tasks.Nope"], "module 'tasks' has no attribute 'Nope'"),
        ([f"{PROBLEM}.class_path", "no_such_package.Blur"], "No module named 'no_such_package'"),
        (["--model.init_args.draws", "many"], "Parser key \"draws\":\\s+Expected a <class 'int'>. Got value: many"),
        (["--model.init_args.draws", "1"], "error: draws must be an integer of at least 2, got 1"),
        ([f"{PROBLEM}.init_args.noise_std", "0"], "error: noise_std must be finite and above 0, got 0.0"),
        (["--model.init_args.output", __file__], "error: output must be a folder that can be written to, got '.*test_bad_input.py'"),
        (["--data.init_args.y", "none.npy"], "error: y: no file 'none.npy'"),
    ],
)
def test_bad_options(options, message, config, capsys):
    with pytest.raises(SystemExit) as caught:
        run(["fit", *config, *options])
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert re.search(message, stderr), stderr[-2000:]


def test_unknown_key_in_the_file(config, capsys):
    file = Path(config[1])
    file.write_text(file.read_text().replace("slots: 4", "slotz: 4"))
    with pytest.raises(SystemExit):
        run(["fit", *config])
    assert "slotz" in capsys.readouterr().err


def test_predict_without_y(config):
    with pytest.raises(ValueError, match=r"y must name a .npy or .safetensors file of observations for predict, got None"):
        run(["predict", *config])


@pytest.mark.parametrize("command", ["test", "predict"])
def test_nothing_trained_yet(command, config, tmp_path):
    np.save(tmp_path / "y.npy", np.zeros((2, 1), dtype="float32"))
    with pytest.raises(FileNotFoundError, match=r"output must be a folder with a trained posterior, got '.*out': run fit first"):
        run([command, *config, "--data.init_args.y", str(tmp_path / "y.npy")])


def test_checkpoints_that_do_not_fit(config, tmp_path):
    run(["fit", *config, "--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", str(tmp_path)])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = ["fit", *config, "--ckpt_path", str(checkpoint)]
    with pytest.raises(
        ValueError, match=r"ckpt_path does not fit this posterior: network.first.weight has shape \(8, 74\), expected \(9, 74\)"
    ):
        run([*again, "--model.init_args.posterior.init_args.width", "9"])
    with pytest.raises(ValueError, match=r"ckpt_path does not fit this posterior: it was trained on another problem, problem.noise.std"):
        run([*again, f"{PROBLEM}.init_args.noise_std", "0.4"])
    torch.save({"state_dict": {}, "global_step": 1, "epoch": 0, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"ckpt_path must be a checkpoint of PosteriorTraining"):
        run(["fit", *config, "--ckpt_path", str(tmp_path / "other.ckpt")])
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*none.ckpt"):
        run(["fit", *config, "--ckpt_path", str(tmp_path / "none.ckpt")])
