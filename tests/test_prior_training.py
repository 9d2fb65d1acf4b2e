"""The learning rate of a prior's training, and a training that goes on from finished weights."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from lightning.pytorch.callbacks import Timer

from priors import DiffusersPrior
from rtb_inverse.prior_training import PriorTraining

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
