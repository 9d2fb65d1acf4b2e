"""`rtb-inverse fit | test | predict` on the shipped YAML files, with budgets of a few steps; nothing depends on how good a prior is."""

import json
import math
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from priors import DiffusersPrior, held_out_digits
from rtb_inverse import cli
from rtb_inverse.posterior import Posterior
from rtb_inverse.prior_training import PriorTraining
from tasks import Inpainting

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted(path.name for path in (ROOT / "tasks").glob("*.yaml"))
MODEL, PRIOR = "--model.init_args", "--model.init_args.posterior.init_args.prior.init_args"
TINY = [
    *(f"{MODEL}.pool_start", "8"), *(f"{MODEL}.pool_growth", "2"), *(f"{MODEL}.slots", "4"), *(f"{MODEL}.states", "4"),
    *(f"{MODEL}.observations", "2"), *(f"{MODEL}.draws", "2"), *(f"{MODEL}.test_draws", "19"), *(f"{PRIOR}.steps", "5"),
    *("--data.init_args.simulated", "3"), *("--trainer.enable_progress_bar", "false"),
]  # fmt: skip
SHORT = ["--trainer.max_steps", "4", f"{MODEL}.warm_start", "0.75", f"{MODEL}.line_search", "false"]
JUDGED = {"elbo", "log_z_is", "log_z_learned", "ess", "log_likelihood", "chi_squared"}
WITH_TRUTH = JUDGED | {"log_likelihood_of_truth", "psnr", "ssim", "crps", "coverage_50", "coverage_80", "coverage_90"}


def run(args: list[str]) -> cli.CommandLine:
    with mock.patch.object(sys, "argv", ["rtb-inverse"]):  # Lightning warns where pytest was given options
        return cli.run(args)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)  # the YAML files name folders from there


def task(command: str, output: Path, *options: str, file: str = "inpainting_box.yaml") -> cli.CommandLine:
    return run([command, "--config", f"tasks/{file}", *TINY, f"{MODEL}.output", str(output), *options])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The output folder of a fit of 4 steps (3 of them warm start), and the posterior that it trained."""
    output = tmp_path_factory.mktemp("fit") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        posterior = task("fit", output, *SHORT).model.posterior
    return output, posterior


def assert_same_draws(first: Posterior, second: Posterior):
    y = None
    if first.amortised:
        x = first.decode(first.prior.sample(2, torch.Generator().manual_seed(4)))
        y = first.problem.simulate(x, torch.Generator().manual_seed(4))
    ours, theirs = (posterior.sample(y, 3, torch.Generator().manual_seed(5)).x for posterior in (first, second))
    assert ours.shape == (3, 2 if first.amortised else 1, *first.prior.data_shape)
    assert torch.equal(ours, theirs)


def test_fit_writes_a_posterior_that_draws_the_same(fitted):
    output, trained = fitted
    assert {path.name for path in output.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "prior", "training.json", "training.png"
    }  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    assert config["_class_name"] == "Posterior"
    assert config["steps"] == 5
    assert config["problem"]["config"] == {"noise_std": 0.1, "shape": [1, 8, 8]}
    weights = load_file(output / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())
    loaded = Posterior.from_pretrained(output)
    assert isinstance(loaded.prior, DiffusersPrior)
    assert isinstance(loaded.problem, Inpainting)
    assert_same_draws(loaded, trained)


def test_fit_trained_something(fitted):
    """Away from where a posterior starts, and not the prior."""
    _, trained = fitted
    new = Posterior(DiffusersPrior.from_pretrained("priors/digits", 5), Inpainting((1, 8, 8), "box", 0.1))
    for name, value in new.prior.state_dict().items():
        assert torch.equal(trained.prior.state_dict()[name], value), name
    moved = [name for name, p in new.named_parameters() if p.requires_grad and not torch.equal(trained.get_parameter(name), p)]
    assert {"gate", "log_scale", "network.network.conv_in.added.weight"} <= set(moved)


def test_test_writes_reports_and_panels(fitted, capsys):
    """Numbers that are what the JSON says, each with a finite standard error, for simulated and for held-out observations."""
    output, _ = fitted
    task("test", output)
    printed = capsys.readouterr().out
    for name, expected in (("simulated", WITH_TRUTH | {"eubo"}), ("held_out", WITH_TRUTH)):
        report = json.loads((output / f"report_{name}.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in the report"))
        assert report["numbers"].keys() == expected
        for key, number in report["numbers"].items():
            assert number.keys() == {"value", "error"}
            assert math.isfinite(number["value"]), key
            assert math.isfinite(number["error"]), key
            assert number["error"] >= 0, key
        assert 1 <= report["numbers"]["ess"]["value"] <= 19
        assert report["numbers"]["elbo"]["value"] <= report["numbers"]["log_z_is"]["value"]
        settings = report["settings"]
        assert (settings["observations"], settings["draws"], settings["steps"], settings["start"]) == (3, 19, 5, "guided")
        assert (settings["nominal_50"], settings["nominal_80"], settings["nominal_90"]) == pytest.approx((0.5, 0.8, 0.9))
        assert report["seconds"] > 0
        panel = (output / f"report_{name}_panel.png").read_bytes()
        assert panel.startswith(b"\x89PNG\r\n\x1a\n")
        assert (output / f"report_{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        page = (output / f"report_{name}.md").read_text()
        assert all(f"| {key} |" in page for key in expected)
        for picture in (f"report_{name}.png", f"report_{name}_panel.png", "training.png"):
            assert f"]({picture})" in page
        assert len(panel) > 5_000
        assert f"{name} observations (3, 19 draws each)" in printed
        assert f"{report['numbers']['elbo']['value']:.3g}" in printed


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_predict_writes_the_posteriors_draws(suffix, fitted, tmp_path):
    output, trained = fitted
    y = trained.problem.observed(held_out_digits()[:2])
    file = tmp_path / f"y.{suffix}"
    if suffix == "npy":
        np.save(file, y.numpy())
    else:
        save_file({"y": y, "other": y + 1}, file)
    task("predict", output, "--data.init_args.y", str(file), f"{MODEL}.seed", "7")
    samples = load_file(output / "samples.safetensors")
    assert samples.keys() == {"x", "log_w", "y"}
    assert torch.equal(samples["y"], y)
    assert torch.equal(samples["log_w"], torch.zeros((19, 2)))
    expected = Posterior.from_pretrained(output).sample(y, 19, torch.Generator().manual_seed(8)).x
    assert samples["x"].shape == (19, 2, 1, 8, 8)
    assert torch.equal(samples["x"], expected)
    assert not torch.equal(samples["x"][0], samples["x"][1])


def test_there_are_tasks():
    assert "inpainting_box.yaml" in TASKS


def small_ones_fast(file: str):
    """Those on larger images than the 8x8 digits are slow."""
    return pytest.param(file, marks=[] if "priors/digits" in text(file) or "process" in text(file) else pytest.mark.slow)


def text(file: str) -> str:
    return (ROOT / "tasks" / file).read_text()


@pytest.mark.parametrize("file", [small_ones_fast(file) for file in TASKS])
def test_every_task_runs(file, tmp_path):
    """Two steps of each: one of the warm start, one of RTB."""
    if missing := [folder for folder in re.findall(r"folder_or_hub_id: (priors/\w+)", text(file)) if not Path(folder).is_dir()]:
        pytest.skip(f"no prior in {missing[0]}")
    trained = task("fit", tmp_path / "out", "--trainer.max_steps", "2", f"{MODEL}.warm_start", "0.5", file=file).model.posterior
    assert_same_draws(Posterior.from_pretrained(tmp_path / "out"), trained)


def test_main_returns_no_status(tmp_path):
    """What the console script's function returns is the exit status."""
    with mock.patch.object(sys, "argv", ["rtb-inverse"]):
        assert (
            cli.main(["fit", "--config", "tasks/inpainting_box.yaml", *TINY, f"{MODEL}.output", str(tmp_path), "--trainer.max_steps", "1"])
            is None
        )


def test_the_recipe_of_the_prior(tmp_path, monkeypatch):
    """Three steps of it give a prior that `from_pretrained` reads; the shipped one is left alone."""
    before = {path: path.read_bytes() for path in sorted((ROOT / "priors" / "digits").rglob("*")) if path.is_file()}
    options = ["--trainer.max_steps", "3", "--data.init_args.batch_size", "8", "--data.init_args.steps_per_epoch", "2"]
    for option, value in {"block_out_channels": "[8, 16]", "norm_num_groups": "4", "attention_head_dim": "8"}.items():
        options += [f"{MODEL}.network.init_args.{option}", value]
    options += ["--trainer.logger.init_args.save_dir", str(tmp_path / "logs"), "--trainer.enable_progress_bar", "false"]
    held_out = PriorTraining.held_out
    monkeypatch.setattr(PriorTraining, "held_out", lambda self: held_out(self)[:128])  # measuring the error would take a minute
    run(["fit", "--config", "priors/digits/train.yaml", f"{MODEL}.output", str(tmp_path / "prior"), *options])
    prior = DiffusersPrior.from_pretrained(tmp_path / "prior", steps=3)
    assert prior.shape == (1, 8, 8)
    draws = prior.sample(2, torch.Generator().manual_seed(0))
    assert draws.shape == (2, 1, 8, 8)
    assert torch.isfinite(draws).all()
    assert prior.error.variance.shape[1:] == (1, 8, 8) and prior.error.factor.shape == (16, 64, 64)
    assert bool((prior.error.variance >= 0).all()) and bool((prior.error.times.diff() > 0).all())
    assert json.loads((tmp_path / "prior" / "prior_config.json").read_text())["steps"] == 20
    metrics = (tmp_path / "logs").rglob("metrics.csv")
    assert "val_loss" in next(metrics).read_text()
    assert {path: path.read_bytes() for path in before} == before


def test_the_shipped_prior_is_what_the_tasks_expect():
    prior = DiffusersPrior.from_pretrained("priors/digits")
    assert prior.shape == (1, 8, 8)
    assert prior.error is not None
    assert prior.steps >= 1
