"""Evidence bounds over training: what is measured is a bound, costs no randomness of the training's, and survives a resume."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from priors import GaussianMixturePrior
from rtb_inverse.bounds import BoundsOverTraining
from rtb_inverse.chains import path_log_prob
from rtb_inverse.lightning import ObservationData, PosteriorTraining
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward
from tasks import Inpainting

MATRIX = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
STEPS, EVERY = 30, 10
SMALL = {
    "states": 16, "observations": 3, "draws": 4, "pool_start": 32, "pool_growth": 4, "refresh": 3, "slots": 6, "capacity": 4,
    "warm_start": 0.5,
}  # fmt: skip


def make(problem=None, start=None) -> Posterior:
    prior = GaussianMixturePrior.random(2, 3, 0, torch.float64, steps=4)
    return Posterior(prior, problem or InverseProblem(MATRIX, GaussianNoise(0.5)), start, width=16)


class StopAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == self.step:
            raise InterruptedError


def train(folder=None, ckpt_path=None, stop_at: int = -1, problem=None, **options) -> PosteriorTraining:
    module = PosteriorTraining(make(problem), **(SMALL | options))
    callbacks = [StopAt(stop_at)]
    if folder is not None:
        callbacks.append(ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0))
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=STEPS, callbacks=callbacks, enable_checkpointing=folder is not None, **settings)
    trainer.fit(module, ObservationData(), ckpt_path=ckpt_path, weights_only=True)
    return module


def test_own_paths_do_not_know_the_truth():
    """Of the prior as a posterior, whose paths are those that y was simulated from if the noise is the same."""
    bounds = BoundsOverTraining(make(start="prior"), observations=64)
    own, exact = bounds.log_weights()
    assert abs(torch.corrcoef(torch.cat([own, exact]))[0, 1]) < 0.5 and float(bounds.gap()) > 0.5


def test_the_bounds_hold_the_exact_evidence():
    """Of the prior as a posterior: both gaps to the closed-form log Z are well resolved; the exact log w of the roll-outs is used."""
    posterior = make(start="prior")
    bounds = BoundsOverTraining(posterior, observations=400)
    bounds.measure(0)
    (point,) = bounds.curve
    log_z = float(posterior.prior.log_evidence(MATRIX, 0.5, bounds.y).mean())
    assert log_z - point["elbo"]["value"] > 4 * point["elbo"]["error"]
    assert point["eubo"]["value"] > log_z
    log_joint = path_log_prob(posterior.prior, bounds.paths) + posterior.log_likelihood(bounds.paths.x_0, bounds.y)
    torch.testing.assert_close(bounds.log_joint, log_joint)
    bounds.measure(1)
    assert bounds.curve[1] == point | {"step": 1}  # the same random numbers


def test_measuring_changes_nothing_and_resumes(tmp_path):
    """The curve of a run broken off between two measurements is that of a straight run; training is the same with and without."""
    straight = train(tmp_path / "a")
    curve = straight.bounds.curve
    assert [point["step"] for point in curve] == [0, EVERY, 2 * EVERY, STEPS]
    assert ["elbo_on_policy" in point for point in curve] == [False, False, True, True]
    without = train(bounds=0)
    assert without.bounds is None
    for name, value in straight.posterior.state_dict().items():
        assert torch.equal(value, without.posterior.state_dict()[name]), name
    with pytest.raises(InterruptedError):
        train(tmp_path / "b", stop_at=17)
    resumed = train(tmp_path / "b", tmp_path / "b" / "last.ckpt")
    assert resumed.bounds.curve == curve


@pytest.mark.parametrize("kind", ["fixed", "reward"])
def test_without_simulated_observations_there_is_an_elbo_alone(kind, tmp_path):
    if kind == "fixed":
        module = train(y=torch.tensor([[1.0]], dtype=torch.float64), output=str(tmp_path))
    else:
        module = train(problem=Reward(lambda x: -x.square().sum(-1) / 8), output=str(tmp_path))
    written = json.loads((tmp_path / "training.json").read_text())
    assert (written["observations"], written["paths_per_observation"]) == (1, module.bounds.n)
    assert (tmp_path / "training.png").is_file()
    for point in written["bounds"]:
        assert "eubo" not in point
        assert math.isfinite(point["elbo"]["value"]) and point["elbo"]["error"] > 0


def test_the_number_of_measurements_is_checked():
    with pytest.raises(ValueError, match="bounds must be an integer of at least 0, got -1"):
        PosteriorTraining(make(), bounds=-1)


def test_bounds_are_of_networks_in_full_precision(make_prior):
    posterior = Posterior(make_prior("unet2d"), Inpainting((1, 8, 8), "half"))
    bounds = BoundsOverTraining(posterior, observations=3)
    expected = bounds.log_weights()
    posterior.prior.autocast = torch.bfloat16
    rounded = path_log_prob(posterior.prior, bounds.paths)
    try:
        found = BoundsOverTraining(posterior, observations=3).log_weights()
        assert posterior.prior.autocast is torch.bfloat16
    finally:
        posterior.prior.autocast = None
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(rounded, path_log_prob(posterior.prior, bounds.paths))
