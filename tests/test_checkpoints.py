"""Priors from folders: what is written is what is read, what is broken is refused by one clear error, and the prior stays frozen."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from priors import DiffusersPrior
from rtb_inverse.checkpoints import ERROR_FILE, WEIGHTS, load_weights
from rtb_inverse.schedules import CLEAN, FlowMatching, VarianceExploding

KINDS = ("unet2d", "unet1d")


def write(prior, scheduler, folder, layout):
    """What diffusers itself writes: a pipeline's two folders, or one folder with both."""
    flat = layout == "flat"
    prior.network.save_pretrained(folder if flat else folder / "unet")
    scheduler.save_pretrained(folder if flat else folder / "scheduler")
    return folder


@pytest.fixture(params=["pipeline", "flat"])
def layout(request):
    return request.param


@pytest.fixture
def folder(unet2d_prior, scheduler, tmp_path, layout):
    return write(unet2d_prior, scheduler, tmp_path / "prior", layout)


def find(folder, name):
    return next(folder.rglob(name))


def edit(file, **change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def same_denoiser(first, second, generator):
    x_t = torch.randn((2, 3, *first.shape), generator=generator)
    for t in first.times[:-1]:
        with torch.no_grad():
            assert torch.equal(first.denoise(x_t, t), second.denoise(x_t, t))
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_wrote_denoises_the_same(kind, layout, make_prior, scheduler, tmp_path, generator):
    prior = make_prior(kind, measured=False)
    loaded = DiffusersPrior.from_pretrained(str(write(prior, scheduler, tmp_path / "prior", layout)), steps=4)
    assert loaded.shape == prior.shape and loaded.schedule == prior.schedule and torch.equal(loaded.times, prior.times)
    assert loaded.denoiser_error(prior.times[1]) is None
    assert same_denoiser(prior, loaded, generator)


@pytest.mark.parametrize("schedule", [None, FlowMatching(shift=3.0), VarianceExploding(sigma_max=20.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_prior_wrote_is_the_prior(kind, schedule, make_prior, tmp_path, generator):
    prior = make_prior(kind, schedule, steps=5, eta=0.7, variance="large", min_std=0.03)
    prior.save_pretrained(tmp_path / "prior")
    loaded = DiffusersPrior.from_pretrained(tmp_path / "prior")
    assert same_denoiser(prior, loaded, generator)
    assert loaded.schedule == prior.schedule and torch.equal(loaded.times, prior.times)
    assert (loaded.steps, loaded.eta, loaded.variance, loaded.min_std) == (5, 0.7, "large", 0.03)
    t = prior.times[:-1]
    assert torch.equal(loaded.denoiser_error(t), prior.denoiser_error(t))
    assert DiffusersPrior.from_pretrained(tmp_path / "prior", steps=7).steps == 7


def test_steps_default_to_20(folder):
    assert DiffusersPrior.from_pretrained(folder).steps == 20


def test_measured_error_is_the_denoisers(unet2d_prior, generator, assert_mean):
    prior = unet2d_prior
    x_0 = torch.randn((400, *prior.shape), generator=generator)
    prior.measure_error(x_0[:200], 4, generator)
    for t in prior.schedule.times(4)[:-1]:
        held_out = x_0[200:]
        x_t = prior.schedule.add_noise(held_out, torch.randn(held_out.shape, generator=generator), t)
        with torch.no_grad():
            squares = (prior.denoise(x_t, t) - held_out).double().square().flatten(1).mean(1)
        difference = squares.mean() - prior.denoiser_error(t).mean()
        assert abs(float(difference)) < 4.5 * float(squares.std()) * (1 / 200 + 1 / 200) ** 0.5


# Frozen


@pytest.mark.parametrize("kind", KINDS)
def test_the_prior_is_frozen_and_in_eval_mode_for_ever(kind, make_prior):
    prior = make_prior(kind)
    assert not any(p.requires_grad for p in prior.parameters())
    assert prior.train() is prior and not any(module.training for module in prior.modules())
    holder = torch.nn.Sequential(prior).train()
    assert holder.training and not prior.training and not prior.network.training


def test_gradients_pass_through_the_prior_to_its_input(unet2d_prior, generator):
    x_t = torch.randn((1, 1, *unet2d_prior.shape), generator=generator, requires_grad=True)
    unet2d_prior.denoise(x_t, unet2d_prior.times[1]).sum().backward()
    assert float(x_t.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_denoise_takes_any_batch_and_time(kind, make_prior, generator):
    prior = make_prior(kind)
    x_t, t = torch.randn((3, 2, *prior.shape), generator=generator), prior.times[:3, None]
    together = prior.denoise(x_t, t)
    for r in range(3):
        for b in range(2):
            torch.testing.assert_close(together[r, b], prior.denoise(x_t[r, b][None], t[r, 0])[0], rtol=1e-4, atol=1e-5)


def test_a_scheduler_in_memory_is_read_by_its_class(unet2d_prior):
    from diffusers import FlowMatchEulerDiscreteScheduler, ScoreSdeVeScheduler

    flow = DiffusersPrior(unet2d_prior.network, FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    assert flow.schedule == FlowMatching(shift=3.0) and flow.times[0] == 1 and flow.times[-1] == CLEAN
    assert DiffusersPrior(unet2d_prior.network, ScoreSdeVeScheduler(sigma_max=9.0), 4).schedule == VarianceExploding(sigma_max=9.0)


def test_the_network_must_say_its_size(unet2d_prior, scheduler):
    network = unet2d_prior.network
    network.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size must be set"):
        DiffusersPrior(network, scheduler)


# Broken folders


@pytest.mark.parametrize("name", ["nowhere", "./some/where", "a/b/c"])
def test_missing_folder(name, tmp_path):
    for path in (name, str(tmp_path / name)):
        with pytest.raises(FileNotFoundError, match="expected a local folder or a hub id"):
            DiffusersPrior.from_pretrained(path)


def test_a_hub_that_does_not_answer(monkeypatch):
    def refuse(*args, allow_patterns, **options):
        assert set(allow_patterns) == {"*.json", "*.safetensors"}  # never a pickle
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"'owner/name' is neither a local folder nor a repository .* no network"):
        DiffusersPrior.from_pretrained("owner/name")


def test_a_hub_repository_is_its_snapshot(folder, monkeypatch, unet2d_prior, generator):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
    assert same_denoiser(unet2d_prior, DiffusersPrior.from_pretrained("owner/name", steps=4), generator)


@pytest.mark.parametrize("name", ["scheduler_config.json", "config.json", WEIGHTS])
def test_missing_file(name, folder):
    find(folder, name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no .*{name}"):
        DiffusersPrior.from_pretrained(folder)


@pytest.mark.parametrize("name", ["scheduler_config.json", "config.json"])
def test_broken_json(name, folder):
    file = find(folder, name)
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{name} is not valid JSON"):
        DiffusersPrior.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(keep, folder):
    file = find(folder, WEIGHTS)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        DiffusersPrior.from_pretrained(folder)


def test_truncated_error_table(folder, unet2d_prior):
    unet2d_prior.save_pretrained(folder)
    table = folder / ERROR_FILE
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        DiffusersPrior.from_pretrained(folder)


def test_error_table_of_another_kind(folder):
    save_file({"times": torch.ones(2), "error": torch.ones(2, 1, 8, 8)}, folder / ERROR_FILE)
    with pytest.raises(ValueError, match=f"{ERROR_FILE} must hold times and variance, .* got \\['error', 'times'\\]"):
        DiffusersPrior.from_pretrained(folder)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_are_not_loaded(suffix, folder):
    file = find(folder, WEIGHTS)
    torch.save(load_file(file), file.with_suffix(suffix))
    file.unlink()
    with pytest.raises(ValueError, match=f"pickled weights .*{suffix}.* expected {WEIGHTS}"):
        DiffusersPrior.from_pretrained(folder)


def test_a_pickle_under_the_name_of_safetensors(folder):
    file = find(folder, WEIGHTS)
    file.unlink()
    torch.save({"weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        DiffusersPrior.from_pretrained(folder)


@pytest.mark.parametrize("file, change, message", [
    ("config.json", {"_class_name": "UNet3DModel"}, "names the model class 'UNet3DModel', expected one of UNet2DModel, UNet1DModel"),
    ("config.json", {"_class_name": None}, "names the model class None"),
    ("config.json", {"block_out_channels": [8, 16]}, f"{WEIGHTS} does not fit UNet2DModel"),
    ("config.json", {"sample_size": None}, "sample_size must be set"),
    ("scheduler_config.json", {"_class_name": "MyScheduler"}, "scheduler must be one of .* got 'MyScheduler'"),
    ("scheduler_config.json", {"_class_name": None}, "scheduler must be one of"),
    ("scheduler_config.json", {"prediction_type": "x"}, "prediction_type must be one of .* got 'x'"),
    ("scheduler_config.json", {"thresholding": True}, "thresholding must be false"),
])  # fmt: skip
def test_configs_that_cannot_be_served(file, change, message, folder):
    edit(find(folder, file), **change)
    with pytest.raises(ValueError, match=message):
        DiffusersPrior.from_pretrained(folder)


@pytest.mark.parametrize("change", ["drop", "add", "reshape"])
def test_weights_of_another_model(change, folder):
    file = find(folder, WEIGHTS)
    weights = {name: value.clone() for name, value in load_file(file).items()}  # the file is mapped: let go before writing over it
    name = sorted(weights)[0]
    if change == "drop":
        del weights[name]
    elif change == "add":
        weights["stranger"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(3)
    save_file(weights, file)
    with pytest.raises(ValueError, match="does not fit UNet2DModel"):
        DiffusersPrior.from_pretrained(folder)


def test_load_weights_reads_tensors(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / WEIGHTS)
    assert torch.equal(load_weights(tmp_path / WEIGHTS)["a"], torch.arange(3.0))
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_weights(tmp_path / WEIGHTS)
