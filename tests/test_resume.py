"""Interrupted and resumed is the same as never interrupted: weights, averages, log Z, buffers, pool, optimiser and random state."""

import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from priors import GaussianMixturePrior
from rtb_inverse import cli
from rtb_inverse.lightning import ObservationData, PosteriorTraining
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward
from tasks import Inpainting

STEPS, WARM = 16, 8  # half of the steps are the warm start

CONFIG = """
seed_everything: 0
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
        width: 16
    warm_start: 0.5
    states: 16
    observations: 3
    draws: 4
    pool_start: 32
    pool_growth: 4
    refresh: 3
    slots: 6
    capacity: 4
    output: {output}
data:
  class_path: rtb_inverse.ObservationData
trainer:
  max_steps: 16
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {output}/checkpoints, every_n_train_steps: 3, save_last: true, save_top_k: 0}}
"""

KILL_ITSELF = """
import os, signal, sys
from rtb_inverse import cli, lightning

original = lightning.PosteriorTraining.training_step

def training_step(self, batch, index):
    if self.global_step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, batch, index)

lightning.PosteriorTraining.training_step = training_step
cli.main(sys.argv[2:])
"""


@pytest.fixture
def steps_taken(monkeypatch):
    """The step numbers of all training steps."""
    taken, original = [], PosteriorTraining.training_step

    def training_step(self, batch, index):
        taken.append(self.global_step)
        return original(self, batch, index)

    monkeypatch.setattr(PosteriorTraining, "training_step", training_step)
    return taken


def state(module: PosteriorTraining) -> dict[str, torch.Tensor]:
    """All that training changed: after the end, so that `posterior` holds the averages and `ema` the running weights."""
    everything = {f"weights.{name}": value for name, value in module.state_dict().items()}
    everything |= {f"store.{name}": value for name, value in module.store.state_dict().items()}
    everything |= {} if module.pool is None else {f"pool.{name}": value for name, value in module.pool.state_dict().items()}
    optimizer = module.trainer.optimizers[0]
    for i, group in enumerate(optimizer.param_groups):
        everything[f"optimizer.lr.{i}"] = torch.tensor(group["lr"], dtype=torch.float64)
        for j, parameter in enumerate(group["params"]):
            everything |= {f"optimizer.{i}.{j}.{name}": torch.as_tensor(value) for name, value in optimizer.state[parameter].items()}
    everything["generator"] = module.generator.get_state()
    return {name: value.detach().clone() for name, value in everything.items()}


def assert_same(resumed: dict, straight: dict):
    assert resumed.keys() == straight.keys()
    for name, expected in straight.items():
        torch.testing.assert_close(resumed[name], expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# A process that is killed, on the command line


def run(args: list[str]) -> cli.CommandLine:
    with mock.patch.object(sys, "argv", ["rtb-inverse"]):  # Lightning warns where pytest was given options
        return cli.run(args)


def write_config(folder) -> str:
    file = folder / "config.yaml"
    file.write_text(CONFIG.format(output=folder / "out"))
    return str(file)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The command line's run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    finished = run(["fit", "--config", write_config(folder)])
    assert finished.config.fit.weights_only is True
    return state(finished.model), folder / "out"


@pytest.mark.parametrize(("kill_at", "saved"), [(5, 3), (14, 12)], ids=["warm start", "rtb"])
def test_killed_and_resumed(kill_at, saved, straight, tmp_path, steps_taken):
    config = write_config(tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", KILL_ITSELF, str(kill_at), "fit", "--config", config],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == saved
    assert not (tmp_path / "out" / "config.json").exists()
    model = run(["fit", "--config", config, "--ckpt_path", str(checkpoint)]).model
    assert steps_taken == list(range(saved, STEPS))
    expected, folder = straight
    assert_same(state(model), expected)
    # what the two wrote is the same, and it is the average
    first, second = (Posterior.from_pretrained(path) for path in (tmp_path / "out", folder))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first.network.last.weight, expected["weights.posterior.network.last.weight"])


def test_a_checkpoint_is_tensors_and_plain_types(straight):
    """And does not hold the frozen prior."""
    checkpoint = torch.load(straight[1] / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 15
    assert not [name for name in checkpoint["state_dict"] if ".prior." in name]
    assert {"generator", "pool", "store"} <= checkpoint["sources"].keys()
    assert checkpoint["sources"]["store"]["x_0"].shape == (6, 4, 2)


def test_a_checkpoint_of_another_kind_of_device_is_taken_up(straight, tmp_path):
    """Its random state has another size: 16 bytes on a GPU."""
    checkpoint = torch.load(straight[1] / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["sources"]["generator"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    finished = run(["fit", "--config", write_config(tmp_path), "--ckpt_path", str(tmp_path / "other.ckpt")])
    assert finished.trainer.global_step == STEPS


class Touch:
    """Pickled code: unpickling it writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("command", ["fit", "test"])
def test_the_command_line_unpickles_nothing(command, straight, tmp_path):
    content = torch.load(straight[1] / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(content | {"extra": Touch(tmp_path / "touched")}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        run([command, "--config", write_config(tmp_path), "--ckpt_path", str(tmp_path / "evil.ckpt")])
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "touched").exists()  # it would have


def test_test_judges_the_averages_of_a_checkpoint(straight, tmp_path):
    """`test --ckpt_path` needs no finished run, and puts the averages in place of the running weights."""
    checkpoint = straight[1] / "checkpoints" / "last.ckpt"
    model = run(["test", "--config", write_config(tmp_path), "--ckpt_path", str(checkpoint), "--data.init_args.simulated", "2"]).model
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    names = [name for name, _ in model.posterior.named_parameters()]
    followed = {id(p): i for i, p in enumerate(model.posterior.trainable())}
    assert names
    for name, parameter in model.posterior.named_parameters():
        if id(parameter) in followed:
            assert torch.equal(parameter, saved[f"ema.average_{followed[id(parameter)]}"]), name
    assert not torch.equal(model.posterior.network.last.weight, saved["posterior.network.last.weight"])
    assert (tmp_path / "out" / "report_simulated.json").is_file()


# Every mode of training, in one process


def make_posterior(kind: str, make_prior) -> Posterior:
    if kind == "unet":
        prior = make_prior("unet2d", steps=3)
        return Posterior(prior, Inpainting(prior.shape, "box", 0.3))
    prior = GaussianMixturePrior.random(2, 3, 0, steps=4)
    if kind == "reward":
        return Posterior(prior, Reward(lambda x: -x.square().sum(-1) / 8), width=16)
    return Posterior(prior, InverseProblem(torch.tensor([[0.6, 0.8]]), GaussianNoise(0.5)), width=16)


MODES = {
    "amortised": {"extra_noise": 0.5, "step_fraction": 0.5},
    "rtb": {"objective": "rtb"},
    "data": {"data": torch.randn((20, 2), generator=torch.Generator().manual_seed(0))},
    "fixed": {"y": torch.tensor([[1.0]]), "objective": "rtb"},
    "reward": {"objective": "vargrad"},
    "reward, wake-sleep": {"objective": "wake_sleep"},
    "unet": {"states": 4, "observations": 2, "draws": 2, "pool_start": 4},
}
SMALL = {
    "states": 16,
    "observations": 3,
    "draws": 4,
    "pool_start": 32,
    "pool_growth": 4,
    "refresh": 3,
    "slots": 6,
    "capacity": 4,
    "pool": 100,
}


class Stop(Exception):
    pass


def train(mode: str, make_prior, folder, ckpt_path=None) -> PosteriorTraining:
    posterior = make_posterior(mode.split(",")[0], make_prior)
    module = PosteriorTraining(posterior, **(SMALL | {"warm_start": WARM / STEPS, "seed": 3} | MODES[mode]))
    every = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [every]}
    Trainer(max_steps=STEPS, **options).fit(module, ObservationData(), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.parametrize("mode", MODES)
def test_stopped_and_resumed_in_every_mode(mode, make_prior, tmp_path, monkeypatch, steps_taken):
    """Stopped in the warm start, at its last step, and in the RTB phase."""
    expected = state(train(mode, make_prior, tmp_path / "straight"))
    counted = PosteriorTraining.training_step
    for stop_at in (5, WARM, 13):

        def training_step(self, batch, index, stop_at=stop_at):
            if self.global_step == stop_at:
                raise Stop
            return counted(self, batch, index)

        folder = tmp_path / str(stop_at)
        monkeypatch.setattr(PosteriorTraining, "training_step", training_step)
        with pytest.raises(Stop):
            train(mode, make_prior, folder)
        monkeypatch.setattr(PosteriorTraining, "training_step", counted)
        steps_taken.clear()
        resumed = train(mode, make_prior, folder, folder / "last.ckpt")
        assert steps_taken == list(range(stop_at, STEPS))
        assert_same(state(resumed), expected)


def test_the_comparison_sees_a_difference(make_prior, tmp_path, monkeypatch):
    """Resuming without the random state is another run: the equality above is not for free."""
    expected = state(train("amortised", make_prior, tmp_path / "a"))
    original = PosteriorTraining.on_save_checkpoint

    def forgetful(self, checkpoint):
        original(self, checkpoint)
        checkpoint["sources"]["generator"] = torch.Generator().manual_seed(99).get_state()

    monkeypatch.setattr(PosteriorTraining, "on_save_checkpoint", forgetful)
    train("amortised", make_prior, tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same(state(train("amortised", make_prior, tmp_path / "b", tmp_path / "b" / "last.ckpt")), expected)


def test_a_checkpoint_of_the_finished_training_holds_what_it_wrote(make_prior, tmp_path):
    """The averages, both as weights and as what they go on from."""
    posterior = Posterior(make_prior("mixture"), InverseProblem(torch.eye(3, dtype=torch.float64), GaussianNoise(0.5)), width=8)
    module = PosteriorTraining(posterior, states=8, pool=16, pool_start=16, slots=4, bounds=0, output=str(tmp_path / "out"))
    trainer = Trainer(max_steps=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(module, ObservationData())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    written, held = (
        Posterior.from_pretrained(tmp_path / "out", prior=posterior.prior),
        torch.load(tmp_path / "end.ckpt", weights_only=True),
    )
    for i, (average, own) in enumerate(zip(module.ema.averages, written.trainable(), strict=True)):
        assert torch.equal(average, own) and torch.equal(held["state_dict"][f"ema.average_{i}"], own)
