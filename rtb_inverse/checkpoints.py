"""Folders in the layout of diffusers: config.json beside safetensors. Nothing here unpickles."""

import copy
import importlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ERROR_FILE = "denoiser_error.safetensors"
DRAWS_FILE = "draws.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def resolve_folder(folder_or_hub_id: str | Path) -> Path:
    """A local folder as it is, one that is shipped ("priors/digits") from anywhere; a hub id (owner/name) is downloaded, safetensors and
    JSON only."""
    folder = shipped(Path(folder_or_hub_id))
    if folder.is_dir():
        return folder
    text = str(folder_or_hub_id)
    if folder.is_absolute() or text.startswith(".") or text.count("/") != 1 or (folder.parent.is_dir() and text.count("/") == 1):
        raise FileNotFoundError(f"folder_or_hub_id: no folder {text!r}, expected a local folder or a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(
            f"folder_or_hub_id: {text!r} is neither a local folder nor a repository that the hub gave ({type(error).__name__}: {error})"
        ) from error


def shipped(folder: Path) -> Path:
    """A folder as it is where it is one; else, of "priors/...", that of the installed package."""
    if folder.is_dir() or folder.parts[:1] != ("priors",):
        return folder
    places = getattr(find_spec("priors"), "submodule_search_locations", None) or []
    return next((there for there in (Path(place, *folder.parts[1:]) for place in places) if there.is_dir()), folder)


def read_json(file: Path) -> dict:
    """The content of a JSON file; FileNotFoundError or ValueError name the file."""
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def load_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file. ValueError: a pickle beside it or in its place, or a truncated file.
    """
    if not file.is_file():
        pickles = sorted(p.name for p in file.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if pickles:
            raise ValueError(f"{file.parent} holds pickled weights ({', '.join(pickles)}), expected {file.name}; pickles are not loaded")
        raise FileNotFoundError(f"no weights {file.name} in {file.parent}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}); expected weights written by save_pretrained") from error


def load_model(folder: Path, models: Mapping[str, type[Any]]) -> nn.Module:
    """A diffusers model from its folder; the class named in config.json must be one of `models`."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in models:
        raise ValueError(f"config.json of {folder} names the model class {name!r}, expected one of {', '.join(models)}")
    network = models[name].from_config(config)
    load_into(network, load_weights(folder / WEIGHTS), folder / WEIGHTS)
    return network


def load_into(module: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Load weights that must match the module's own, name by name and shape by shape."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {type(module).__name__} as its config describes it: {error}") from error


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors, by way of a temporary file, so that no half-written file is left under the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial)
    partial.replace(file)


def load_array(name: str, file: Path) -> Tensor:
    """One tensor from a .npy or a .safetensors file (its tensor `name`, or its only one)."""
    if not file.is_file():
        raise FileNotFoundError(f"{name}: no file {str(file)!r}, expected a .npy or .safetensors file")
    if file.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False))
        except ValueError as error:
            raise ValueError(f"{name}: {file} is not a plain .npy array ({error})") from error
    if file.suffix != ".safetensors":
        raise ValueError(f"{name}: {str(file)!r} must be a .npy or .safetensors file")
    tensors = load_weights(file)
    if name not in tensors and len(tensors) != 1:
        raise ValueError(f"{name}: {file} holds {sorted(tensors)}, expected one tensor or one of the name {name!r}")
    return tensors.get(name, next(iter(tensors.values())))


def write_json(content: Mapping, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def class_path(obj: object) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def own_class(path: str) -> type[Any]:
    """The class of a dotted path that lies in this project's packages; a config file may name no other."""
    module, _, name = path.rpartition(".")
    if module.split(".")[0] not in ("rtb_inverse", "priors", "tasks"):
        raise ValueError(
            f"config.json names the class {path!r}, expected one of rtb_inverse, priors or tasks; pass prior= or problem= yourself"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"config.json names the class {path!r}, which does not exist ({error})") from error


def save_posterior(posterior, folder: Path) -> None:
    """See `Posterior.save_pretrained`."""
    config = {
        "_class_name": type(posterior).__name__,
        "steps": posterior.steps,
        "start": posterior.start,
        "beta": posterior.beta,
        "lora_rank": posterior.lora_rank,
        "width": posterior.width,
        "second_look": posterior.local_gate is not None,
        "problem": {"class_path": class_path(posterior.problem), "config": posterior.problem.config},
        "prior": class_path(posterior.prior) if hasattr(posterior.prior, "save_pretrained") else None,
    }
    if config["prior"]:
        posterior.prior.save_pretrained(folder / "prior")
    write_json(config, folder / "config.json")
    save_tensors(posterior.weights(), folder / WEIGHTS)


def load_posterior(cls, folder: Path, prior=None, problem=None, **options):
    """See `Posterior.from_pretrained`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: no folder {str(folder)!r}, expected one that Posterior.save_pretrained wrote")
    config, weights = read_json(folder / "config.json"), load_weights(folder / WEIGHTS)
    if config.get("_class_name") != cls.__name__:
        raise ValueError(f"{folder / 'config.json'} describes a {config.get('_class_name')!r}, expected a {cls.__name__}")
    if prior is None:
        if not config["prior"]:
            raise ValueError(f"{folder} holds no prior; pass prior=")
        prior = own_class(config["prior"]).from_pretrained(folder / "prior")
    prior = copy.copy(prior).set_steps(config["steps"])  # that of the caller stays on its grid
    if problem is None:
        if config["problem"]["config"] is None:
            raise ValueError(f"{folder} cannot rebuild the problem ({config['problem']['class_path']} is code); pass problem=")
        held = {name.removeprefix("problem."): value for name, value in weights.items() if name.startswith("problem.")}
        problem = own_class(config["problem"]["class_path"]).from_config(config["problem"]["config"], held)
    own = {name: config[name] for name in ("start", "beta", "lora_rank", "width")}
    posterior = cls(prior, problem, second_look=config.get("second_look", False), references=False, **own, **options)
    if "draws.x" in weights:
        posterior.hold_references(weights["draws.x"])  # the shares are among the weights
    if "head.weight" in weights:
        posterior.hold_head()
    load_posterior_weights(posterior, weights, folder / WEIGHTS)
    return posterior


def load_posterior_weights(posterior, weights: dict[str, Tensor], file: Path) -> None:
    """Fill a posterior, prior apart; names, shapes and the problem must match."""
    take_learnt(posterior, weights)
    check_fit(posterior, weights, file)
    missing, unexpected = posterior.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.startswith(("prior.", "guide."))]
    if missing or unexpected:
        raise ValueError(f"{file} does not fit this posterior: missing {missing[:3]}, unexpected {unexpected[:3]}")


def take_learnt(posterior, weights: Mapping[str, Tensor]) -> None:
    """What the guide had learnt, in place of what it has: on another device its pairs are others, and of their directions there may be more
    or fewer."""
    for name, value in weights.items():
        if name.startswith("guide.") and hasattr(posterior.guide, name.removeprefix("guide.")):
            setattr(posterior.guide, name.removeprefix("guide."), value.to(posterior.gate.device))


def check_fit(posterior, weights: Mapping[str, Tensor], file: str | Path) -> None:
    """Raise ValueError where weights have other shapes than the posterior's, or are of another problem (operator, mask, noise)."""
    own = posterior.state_dict()
    for name, value in weights.items():
        if name not in own:
            continue
        if own[name].shape != value.shape:
            raise ValueError(
                f"{file} does not fit this posterior: {name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}"
            )
        if name.startswith("problem.") and not torch.equal(own[name].cpu(), value.to(own[name].dtype).cpu()):
            raise ValueError(f"{file} does not fit this posterior: it was trained on another problem, {name} differs")
