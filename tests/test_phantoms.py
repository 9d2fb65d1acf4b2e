"""Phantoms: ellipses where their frames say, nothing sticking out, seeds, ranges, and what training sees of them."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import yaml

from priors.phantoms_data import FINE, Ellipses, PhantomData, bodies, frame, paint, phantoms


@pytest.fixture(scope="module")
def some():
    return phantoms(512, torch.Generator().manual_seed(0))


def test_shape_range_and_air_around(some):
    assert some.shape == (512, 1, 32, 32) and some.dtype == torch.float32
    assert float(some.min()) == -1 and 0.9 < float(some.max()) <= 1
    border = torch.cat([some[..., 0, :], some[..., -1, :], some[..., 0], some[..., -1]], -1)
    assert float((border > -1).float().mean()) < 0.01  # bodies end before the field of view does
    assert bool((some[..., 12:20, 12:20].mean((1, 2, 3)) > -0.9).all())


@pytest.mark.parametrize(("n", "size"), [(1, 16), (3, 8), (5, 33)])
def test_seeds_and_sizes(n, size):
    first, again, other = (phantoms(n, torch.Generator().manual_seed(seed), size) for seed in (1, 1, 2))
    assert first.shape == (n, 1, size, size) and torch.equal(first, again) and not torch.equal(first, other)


def test_the_global_random_state_is_left_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = torch.rand(())
        torch.manual_seed(3)
        phantoms(2, torch.Generator().manual_seed(0), 8)
        assert torch.equal(torch.rand(()), expected)


def test_an_ellipse_has_its_area_middle_and_axes():
    x, y, a, b, angle = 0.2, -0.1, 0.6, 0.3, 0.5
    F = frame(*(torch.tensor([[value]]) for value in (x, y, a, b, angle)))
    picture = paint(F, torch.tensor([[0.5]]), torch.ones((1, 1), dtype=torch.bool), 96)[0]
    share, axis = (picture + 1) / 1.5, (2 * torch.arange(96) + 1) / 96 - 1
    area = float(share.sum()) * (2 / 96) ** 2
    assert area == pytest.approx(math.pi * a * b, rel=0.01)
    weight = share / share.sum()
    dx, dy = axis - (weight.sum(0) @ axis), axis - (weight.sum(1) @ axis)
    assert float(weight.sum(0) @ axis) == pytest.approx(x, abs=2e-3) and float(weight.sum(1) @ axis) == pytest.approx(y, abs=2e-3)
    moments = torch.tensor([[weight.sum(0) @ dx**2, dy @ weight @ dx], [dy @ weight @ dx, weight.sum(1) @ dy**2]])
    variances, vectors = torch.linalg.eigh(moments)
    torch.testing.assert_close(variances, torch.tensor([b**2, a**2]) / 4, rtol=0.02, atol=0)
    assert abs(float(vectors[:, 1] @ torch.tensor([math.cos(angle), math.sin(angle)]))) == pytest.approx(1, abs=1e-3)


def test_edges_are_shares_of_samples_and_later_ellipses_cover(some):
    centred = frame(*(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), *(torch.tensor([[0.8, 0.4]]),) * 2, torch.zeros(1, 2)))
    picture = paint(centred, torch.tensor([[1.0, 0.0]]), torch.tensor([[True, True]]), 32)[0]
    assert float(picture[16, 16]) == 0 and float(picture[16, 27]) == 1 and float(picture[16, 31]) == -1
    hidden = paint(centred, torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), 32)[0]
    levels = (hidden + 1) / 2 * FINE**2
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert float(hidden[16, 16]) == 1 and len(hidden.unique()) > 5


def test_nothing_sticks_out_into_the_rim():
    frames, values, shown = bodies(Ellipses(300, torch.Generator().manual_seed(0)))
    rim = torch.linspace(0, 2 * math.pi, 60)
    circle = torch.stack([rim.cos(), rim.sin(), torch.ones(60)])
    points = frames @ circle  # (n, K, 3, 60)
    within = (torch.linalg.inv(frames[:, 1:2]) @ points)[..., :2, :].norm(dim=-2)
    assert float(within[:, 2:].max()) < 1 + 1e-4 and float(within[:, 1].min()) == pytest.approx(1, abs=1e-4)
    assert float(within[:, 0].min()) > 1.04  # the rim
    assert float(points[:, 0, :2].abs().max()) < 1
    assert values.shape == shown.shape == frames.shape[:2] and float(values.abs().max()) <= 1


def test_phantoms_vary(some):
    """No two alike, and what the docstring counts is about so often there: bone in 35 % of the rims, none of it in most of the others."""
    flat = some.flatten(1)
    distances = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    assert float(distances.min()) > 0.5
    values = bodies(Ellipses(2000, torch.Generator().manual_seed(0)))[1]
    bone = (values[:, 0] > 0.5).double()
    assert abs(float(bone.mean()) - 0.35) < 4.5 * (0.35 * 0.65 / 2000) ** 0.5
    fat = (values[:, 0] < values[:, 1] - 0.1).double()
    assert abs(float(fat.mean()) - 0.35) < 4.5 * (0.35 * 0.65 / 2000) ** 0.5


def test_training_and_validation_do_not_meet():
    data = PhantomData(batch_size=8, images=40, held_out=6, size=8)
    (first,) = next(iter(data.train_dataloader()))
    (held,) = next(iter(data.val_dataloader()))
    assert first.shape == (8, 1, 8, 8) and held.shape == (6, 1, 8, 8) and len(data.train_dataloader()) == 5
    train = data.train_set.tensors[0]
    assert float(torch.cdist(train.flatten(1), held.flatten(1)).min()) > 0
    assert torch.equal(PhantomData(8, 40, 6, 8).train_set.tensors[0], train)
    alike = PhantomData(6, 6, 6, 8)
    assert not torch.equal(alike.train_set.tensors[0], alike.val_set.tensors[0])


def test_the_recipe_names_what_there_is():
    recipe = yaml.safe_load((Path(__file__).parents[1] / "priors" / "phantoms" / "train.yaml").read_text())
    data, model = recipe["data"], recipe["model"]["init_args"]
    module, _, name = data["class_path"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is PhantomData and model["output"] == "priors/phantoms"
    assert data["init_args"]["size"] == model["network"]["init_args"]["sample_size"] == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: phantoms(0), "n must be an integer of at least 1, got 0"),
        (lambda: phantoms(2, size=1.5), "size must be an integer of at least 1, got 1.5"),
        (lambda: PhantomData(batch_size=0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: PhantomData(images=-1), "images must be an integer of at least 1, got -1"),
    ],
)
def test_bad_input_gets_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
