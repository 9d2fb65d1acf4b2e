"""Folders in the layout of diffusers: config.json beside safetensors. Nothing here unpickles."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

ERROR_FILE = "denoiser_error.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def resolve_folder(folder_or_hub_id: str | Path) -> Path:
    """A local folder as it is; a hub id (owner/name) is downloaded, safetensors and JSON only."""
    folder = Path(folder_or_hub_id)
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


def load_model(folder: Path, models: Mapping[str, type[nn.Module]]) -> nn.Module:
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
