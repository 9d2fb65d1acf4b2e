"""Trainings of priors: the learning rate, going on from finished weights, and interrupted ones that resume to the same result."""

import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_network
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer
from torch.utils.data import TensorDataset

from priors import DiffusersPrior, DigitsData, digits
from priors.autoencoders import AutoencoderTraining
from priors.digit_generators import GANTraining, VAETraining
from priors.mnist_classifier import MNISTClassifierTraining
from priors.tensor_data import OrderOfEpochs, TensorData
from rtb_inverse.prior_training import PriorTraining, generator_of_step
from rtb_inverse.schedules import expand

DIGITS = "priors/digits"


def training(folder, **options):
    network = UNet2DModel.from_config(DiffusersPrior.from_pretrained(DIGITS).network.config | options.pop("network", {}))
    return PriorTraining(network, DDPMScheduler(), str(folder), lr=1.0, warmup=10, **options)


def rates(module, steps, total, callbacks=()):
    module.trainer = SimpleNamespace(estimated_stepping_batches=total, callbacks=list(callbacks))
    made = module.configure_optimizers()
    found = []
    for _ in range(steps):
        found.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return torch.tensor(found)


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(PriorTraining, "trainer", None)  # Lightning's own insists on a Trainer
    return training(tmp_path)


def test_warm_up_then_a_cosine_to_zero(module):
    found = rates(module, 111, 110)
    assert torch.allclose(found[:10], torch.arange(1, 11) / 10)
    assert float(found[60]) == pytest.approx(0.5)
    assert float(found[35]) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert float(found[110]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("total", [math.inf, 10_000])
def test_the_share_of_the_time_spent_decides_where_it_is_further(module, total):
    timer = Timer(duration={"seconds": 100})
    timer.time_elapsed = lambda stage=None: 75.0
    assert float(rates(module, 21, total, [timer])[20]) == pytest.approx((1 + math.cos(0.75 * math.pi)) / 2)
    timer.time_elapsed = lambda stage=None: 1.0
    assert float(rates(module, 61, 110, [timer])[60]) == pytest.approx(0.5)


def test_training_continues_from_finished_weights(tmp_path):
    finished = list(DiffusersPrior.from_pretrained(DIGITS).network.parameters())
    module = training(tmp_path, start=DIGITS)
    for part in (module.network.parameters(), module.ema.averages):
        assert all(torch.equal(a, b) for a, b in zip(part, finished, strict=True))
    with pytest.raises(ValueError, match="does not fit UNet2DModel"):
        training(tmp_path, start=DIGITS, network={"block_out_channels": [32, 32]})
    with pytest.raises(FileNotFoundError, match="no weights"):
        training(tmp_path, start=str(tmp_path))


def train_some(module: LightningModule, data: TensorData, folder: Path, ckpt_path: Path | None = None) -> LightningModule:
    """Nine steps, of which the sixth writes last.ckpt."""

    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.fit_loop.total_batch_idx == 5:
                trainer.save_checkpoint(folder / "last.ckpt")

    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    steps = 9 if module.automatic_optimization else 18  # the trainer counts those of both optimisers
    Trainer(max_steps=steps, accelerator="cpu", callbacks=[SaveAt()], **options).fit(module, data, ckpt_path=ckpt_path)
    return module


def test_an_interrupted_training_resumes_to_the_same_result(tmp_path):
    """Within an epoch: the order of the examples, times, noise, averages and learning rate go on where they were."""
    x = torch.randn((40, 1, 8, 8), generator=torch.Generator().manual_seed(0))

    def train(name, ckpt_path=None):
        module = PriorTraining(make_network("unet2d"), DDPMScheduler(), str(tmp_path / name), 2, lr=1e-3, warmup=2, error_draws=8)
        return train_some(module, TensorData(TensorDataset(x[:32]), TensorDataset(x[32:]), batch_size=8), tmp_path, ckpt_path)

    began = [parameter.clone() for parameter in make_network("unet2d").parameters()]
    whole, resumed = train("whole"), train("resumed", tmp_path / "last.ckpt")
    for a, b, c in zip(whole.network.parameters(), resumed.network.parameters(), began, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(whole.ema.averages, resumed.ema.averages, strict=True))


def test_each_seed_and_step_has_numbers_of_its_own():
    def numbers(seed, step):
        trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=step), world_size=1)
        generator = generator_of_step(SimpleNamespace(trainer=trainer, global_rank=0, device="cpu"), seed)
        return torch.rand(4, generator=generator)

    found = [numbers(seed, step) for seed in (0, 1, 7) for step in (0, 1, 2)]
    assert len({tuple(each.tolist()) for each in found}) == 9 and torch.equal(numbers(7, 2), found[-1])


SMALL = {"in_channels": 1, "out_channels": 1, "latent_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}


@pytest.mark.parametrize("recipe", [VAETraining, GANTraining, MNISTClassifierTraining, partial(AutoencoderTraining, SMALL)])
def test_other_recipes_resume_too(recipe, tmp_path, generator):
    x = torch.rand((40, 1, *((28, 28) if recipe is MNISTClassifierTraining else (8, 8))), generator=generator)
    c = torch.randint(10, (40,), generator=generator)
    data = TensorData(TensorDataset(x[:32], c[:32]), TensorDataset(x[32:], c[32:]), batch_size=8)
    untrained = recipe(str(tmp_path))
    whole = train_some(deepcopy(untrained), data, tmp_path)
    resumed = train_some(deepcopy(untrained), data, tmp_path, tmp_path / "last.ckpt")
    states = (module.state_dict() for module in (whole, resumed, untrained))
    pairs = list(zip(*(state.values() for state in states), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(a, c) for a, _, c in pairs)


def test_each_epoch_has_another_order_and_goes_on_where_it_was():
    first, second = list(OrderOfEpochs(10, 3, lambda: 0)), list(OrderOfEpochs(10, 3, lambda: 3))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert list(OrderOfEpochs(10, 3, lambda: 2)) == first[6:] and list(OrderOfEpochs(10, 3, lambda: 4)) == second[3:]


def test_an_epoch_with_replacement_goes_on_where_it_was():
    epochs = [list(OrderOfEpochs(10, 3, lambda n=n: n, of_epoch=5)) for n in (0, 5, 7)]
    assert [len(epoch) for epoch in epochs] == [15, 15, 9] and epochs[0] != epochs[1] and epochs[2] == epochs[1][6:]
    assert set(epochs[0]) <= set(range(10)) and len(set(epochs[0])) < 10


def test_the_recipe_of_the_digits_resumes(tmp_path):
    """Three batches an epoch: nine steps, and four to nine."""
    network, data = make_network("unet2d"), DigitsData(batch_size=4, steps_per_epoch=4)

    def train(name, ckpt_path=None):
        module = PriorTraining(deepcopy(network), DDPMScheduler(), str(tmp_path / name), 2, lr=1e-3, warmup=2, error_draws=8)
        module.held_out = lambda: digits()[0][:8]
        return train_some(module, data, tmp_path, ckpt_path)

    pairs = zip(train("whole").network.parameters(), train("resumed", tmp_path / "last.ckpt").network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_same_error_of_x_0_whatever_is_predicted(prediction_type, tmp_path, generator):
    """Hang et al. 2023: min(SNR, gamma) on the error of x_0. A network that says 0 but for a fixed error of x_0 has it at all three."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    module = PriorTraining(make_network("unet2d"), scheduler, str(tmp_path), 2, min_snr=5.0)
    x = torch.randn((256, 1, 8, 8), generator=generator)

    def exact_but_for_an_error(x_t, time):
        alpha, sigma = (expand(c, x_t) for c in module.schedule.alpha_sigma(time.double()))
        estimate = x + 0.1
        return SimpleNamespace(sample=module.schedule.target(estimate, (x_t - alpha * estimate) / sigma, time.double()))

    del module.network
    module.network = exact_but_for_an_error
    seed = torch.Generator().manual_seed(3)
    t = module.schedule.times(1000)[:-1][torch.randint(1000, (256,), generator=torch.Generator().manual_seed(3))]
    alpha, sigma = module.schedule.alpha_sigma(t)
    assert float(module.loss(x, seed)) == pytest.approx(float(((alpha / sigma) ** 2).clamp_max(5.0).mean()) * 0.01, rel=1e-3)
    with pytest.raises(ValueError, match="min_snr must be None"):
        PriorTraining(make_network("unet2d"), FlowMatchEulerDiscreteScheduler(), str(tmp_path), 2, min_snr=5.0)
