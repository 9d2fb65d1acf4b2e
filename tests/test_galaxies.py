"""Simulated galaxies: their profile against scipy's integrals, their variety, and the recipe of their prior."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import gamma, gammainc

from priors.galaxies_data import CORE, Disc, GalaxyData, galaxies, sersic
from priors.simulated import Draws
from rtb_inverse import cli


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def many():
    return galaxies(300, seeded())


def test_shape_range_and_seed(many):
    assert many.shape == (300, 1, 32, 32) and many.dtype == torch.float32 and torch.isfinite(many).all()
    assert float(many.min()) >= -1 and float(many.max()) <= 1
    peak = many.amax((1, 2, 3))
    assert 0.55 < float(peak.min()) < 0.7 and float(peak.max()) > 0.95
    border = torch.cat([many[..., 0], many[..., -1], many[:, :, 0], many[:, :, -1]], -1)
    assert float(border.median()) < -0.93  # sky
    assert torch.equal(galaxies(300, seeded()), many) and not torch.equal(galaxies(300, seeded(1)), many)
    assert galaxies(3, seeded(), 17).shape == (3, 1, 17, 17)
    state = torch.get_rng_state()
    galaxies(2, seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_they_are_of_all_sorts(many):
    """No two alike; large and small, round and flat, smooth and clumpy; about as many each way round."""
    flat = many.flatten(1)
    assert float(torch.pdist(flat).min()) > 0.3 and float(torch.corrcoef(flat).median()) < 0.8
    light = (many[:, 0] + 1) / light_sum(many)
    axis = (2 * torch.arange(32) + 1) / 32 - 1.0
    x, y = (light.sum(1) * axis).sum(1), (light.sum(2) * axis).sum(1)
    dx, dy = axis - x[:, None, None], axis[:, None] - y[:, None, None]
    xx, yy, xy = ((light * part).sum((1, 2)) for part in (dx**2 * torch.ones(32, 1), dy**2 * torch.ones(32), dx * dy))
    size, flatness = (xx + yy).sqrt(), ((xx - yy) ** 2 + 4 * xy**2).sqrt() / (xx + yy)
    assert float(size.quantile(0.9) / size.quantile(0.1)) > 1.3
    assert float(flatness.quantile(0.05)) < 0.15 and float(flatness.quantile(0.95)) > 0.6
    assert abs(float((xy > 0).float().mean()) - 0.5) < 4.5 * 0.5 / 300**0.5 and 0.05 < float(x.std()) < 0.2
    rough = torch.nn.functional.avg_pool2d(many, 3, 1, 1).sub(many)[..., 1:-1, 1:-1].std((1, 2, 3))
    assert float(rough.quantile(0.9) / rough.quantile(0.1)) > 2


def light_sum(images):
    return (images[:, 0] + 1).sum((1, 2), keepdim=True)


@pytest.mark.parametrize("n", [1.0, 2.5, 4.0])
def test_sersic_has_flux_1_and_half_of_it_within_its_radius(n):
    """Against the incomplete gamma function; b_n of the closed form is right to 1e-3."""
    r_e, q, one = 0.4, 0.6, torch.ones(1)

    def brightness(r, turn):
        """At elliptical radius r along either axis of an ellipse turned by `turn`."""
        along = torch.tensor([math.sqrt(max(r**2 - CORE**2, 0.0))])  # the code softens r by CORE
        x, y = along * math.cos(turn), along * math.sin(turn)
        return float(sersic(x[:, None], y[:, None], n * one, r_e * one, q * one, turn * one).squeeze())

    assert brightness(0.3, 0.0) == pytest.approx(brightness(0.3, 1.1), rel=1e-4)
    b = 2 * n - 1 / 3 + 4 / (405 * n)
    within = 2 * math.pi * q * quad(lambda r: r * brightness(r, 0.5), CORE, r_e)[0]
    share = gammainc(2 * n, b) - gammainc(2 * n, b * (CORE / r_e) ** (1 / n))
    assert within == pytest.approx(share, rel=1e-3) and gammainc(2 * n, b) == pytest.approx(0.5, abs=1e-3) and gamma(2 * n) > 0


def test_arms_keep_the_light_and_turn_as_they_should():
    """A disc with arms has the flux of the same disc without; an m-armed one, face-on without ripples, repeats after 1 / m of a turn."""
    fine = (2 * torch.arange(256) + 1) / 256 - 1.0
    disc = Disc(Draws(16, seeded()), torch.ones(16))
    disc.r_e = torch.full_like(disc.r_e, 0.25)
    disc.cos = disc.q = torch.ones(16)
    y, x = torch.meshgrid(2 * fine, 2 * fine, indexing="ij")
    with_arms = disc.brightness(x[None], y[None])
    contrast, disc.contrast = disc.contrast, torch.zeros(16)
    without = disc.brightness(x[None], y[None])
    ratio = with_arms.sum((1, 2)) / without.sum((1, 2))
    assert float((ratio - 1).abs().max()) < 0.05 and float((with_arms / without).std()) > 0.2
    disc.contrast, disc.ripple = contrast, torch.zeros(16, 3)
    turn = 2 * math.pi / disc.m[:, None, None]
    again = disc.brightness(x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos())
    torch.testing.assert_close(again, disc.brightness(x[None], y[None]), rtol=0.05, atol=1e-3)
    half = disc.brightness(x * (turn / 2).cos() - y * (turn / 2).sin(), x * (turn / 2).sin() + y * (turn / 2).cos())
    assert float((half - again).abs().max()) > 0.1


def test_clumps_lie_on_their_arms():
    """Without scatter each is where psi = 0 modulo 2 pi, in the disc's plane."""
    disc = Disc(Draws(8, seeded()), torch.ones(8))
    disc.cos, disc.angle, disc.clump_scatter = torch.ones(8), torch.zeros(8), torch.zeros_like(disc.clump_scatter)
    disc.clump_size = torch.full_like(disc.clump_size, 0.005)
    disc.clump_flux = torch.zeros_like(disc.clump_flux)
    disc.clump_flux[:, 0] = 1
    disc.clump_R[:, 0] = 0.5
    axis = (2 * torch.arange(400) + 1) / 400 - 1.0
    image = disc.clumps(axis, torch.zeros(8, 2))
    assert np.allclose(image.sum((1, 2)) * (2 / 400) ** 2, 1, atol=1e-3)
    row, column = image.flatten(1).argmax(1) // 400, image.flatten(1).argmax(1) % 400
    phi = torch.atan2(axis[row], axis[column])
    psi = disc.m * (phi - disc.winding * math.log(0.5 + CORE)) + disc.phase
    assert float(psi.cos().min()) > 0.99


def test_the_data_module():
    data = GalaxyData(batch_size=8, images=300, held_out=256, size=8)
    batches = [x for (x,) in data.train_dataloader()]
    assert [len(x) for x in batches] == [8] * 37  # whole ones only
    ((held_out,),) = data.val_dataloader()
    train = data.train_set.tensors[0]
    assert held_out.shape == (256, 1, 8, 8) and train.shape == (300, 1, 8, 8)
    assert float(torch.cdist(train.flatten(1), held_out.flatten(1)).min()) > 1e-3
    assert torch.equal(GalaxyData(4, 300, 2, 8).train_set.tensors[0], train)


def test_the_recipe_of_the_prior(tmp_path, monkeypatch):
    """Two steps of it write a prior."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    model, data = "--model.init_args.", "--data.init_args."
    small = {
        f"{model}output": tmp_path / "prior", f"{model}error_draws": 8, f"{model}steps": 2, f"{data}images": 64, f"{data}held_out": 8,
        f"{data}size": 16, f"{model}network.init_args.sample_size": 16, f"{model}network.init_args.block_out_channels": "[8, 8, 16]",
        f"{model}network.init_args.norm_num_groups": 4, f"{model}network.init_args.attention_head_dim": 8, "--trainer.max_steps": 2,
        "--trainer.logger": "false", "--trainer.callbacks": "null", "--trainer.enable_progress_bar": "false",
        "--trainer.val_check_interval": 2, "--trainer.enable_checkpointing": "false",
    }  # fmt: skip
    options = [str(word) for pair in small.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["rtb-inverse"])
    cli.run(["fit", "--config", "priors/galaxies/train.yaml", *options])
    assert {"unet", "scheduler", "prior_config.json"} <= {path.name for path in (tmp_path / "prior").iterdir()}


@pytest.mark.parametrize("call, message", [
    (lambda: galaxies(0), "n must be an integer of at least 1, got 0"),
    (lambda: galaxies(2, seeded(), 0), "size must be an integer of at least 1, got 0"),
    (lambda: GalaxyData(batch_size=0, images=1), "batch_size must be an integer of at least 1, got 0"),
    (lambda: GalaxyData(images=0), "images must be an integer of at least 1, got 0"),
])  # fmt: skip
def test_bad_arguments_get_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
