"""An accelerator that is not there, with numbers: what a GPU's rules refuse fails here as well.

Within `accelerator()` a tensor of the device "meta" is a `There`: it holds a tensor of the CPU, on which all is computed, and what a GPU
would refuse raises RuntimeError: tensors of two devices in one call (numbers of the CPU apart), a generator of another device, numpy.
The second derivative of `torch.maximum` by torch.func does not survive it, nor does it hold sparse matrices, so elements that are seen
one by one (HDR, quantisation) and `Lensing` do without.
"""

import sys
from contextlib import contextmanager

import torch
from lightning.pytorch.accelerators import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

THERE, HERE = torch.device("meta"), torch.device("cpu")
MOVES = ("aten.copy_.default", "aten._to_copy.default", "aten.set_.source_Tensor")
JOINS = ("aten.cat.default", "aten.stack.default")  # not even of a number
INDEXING = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")
MAKES = ("new_tensor", "tensor", "as_tensor", "asarray")
CpuGenerator = torch.Generator


class There(torch.Tensor):
    """A tensor of the CPU, `held`, that says it lies there."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        wide = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        there = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=THERE, **wide)
        there.held = held
        return there

    def __repr__(self):
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def check_devices(name, args, kwargs):
    """Raise RuntimeError where a GPU would; returns whether any tensor lies there."""
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    assert not any(a.device == THERE and not isinstance(a, There) for a in tensors), f"{name} met a tensor without numbers"
    there = any(isinstance(a, There) for a in tensors)
    here = any(not isinstance(a, There) and (a.ndim > 0 or name in JOINS) for a in tensors)
    if name.startswith(INDEXING):  # x[i] takes an i of the CPU
        here = any(isinstance(a, torch.Tensor) and not isinstance(a, There) and (k == 0 or a.ndim > 0) for k, a in enumerate(args))
    if there and here and name not in MOVES:
        raise RuntimeError(f"expected all tensors on the same device: {name} of {[(type(a).__name__, tuple(a.shape)) for a in tensors]}")
    return there


def run(func, args, kwargs):
    name, device = str(func), kwargs.get("device")
    any_there = check_devices(name, args, kwargs)
    goes_there = any_there if device is None else torch.device(device) == THERE
    if name == "aten.copy_.default":
        goes_there = isinstance(args[0], There)
    if device is not None and torch.device(device) == THERE:
        kwargs = kwargs | {"device": HERE}
    held_args, held_kwargs = tree_map_only(There, lambda a: a.held, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    if not goes_there:
        return args[0] if name == "aten.copy_.default" else out
    out = tree_map_only(torch.Tensor, lambda o: There(o.resolve_conj().resolve_neg()), out)
    return return_and_correct_aliasing(func, args, kwargs, out) if any_there else out


class AnyGenerator(type(CpuGenerator)):
    def __instancecheck__(cls, instance):
        return isinstance(instance, CpuGenerator)


class Generator(CpuGenerator, metaclass=AnyGenerator):
    """One that says where it lies."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, device="cpu")

    def __init__(self, device="cpu"):
        self._where = torch.device(device)

    @property
    def device(self):
        return self._where


class Calls(TorchFunctionMode):
    """Of what never meets the dispatcher: generators, numpy, and tensors made of data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else torch.get_default_device()))
        generator = kwargs.get("generator")
        if generator is not None and generator.device != device:
            raise RuntimeError(f"expected a generator of {device}, got one of {generator.device} ({name})")
        if name in ("numpy", "__array__") and isinstance(args[0], There):
            raise TypeError("can't convert a tensor that lies there to numpy")
        if name == "tolist" and isinstance(args[0], There):
            return args[0].held.tolist()
        if name in MAKES and device == THERE and (name == "new_tensor") == bool(tensors):
            kwargs = kwargs | {"device": HERE, "dtype": kwargs.get("dtype", tensors[0].dtype if tensors else None)}
            with torch._C.DisableTorchFunction():
                return (torch.tensor if tensors else getattr(torch, name))(args[-1], **kwargs).to(THERE)
        return func(*args, **kwargs)


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def swap_generators(ours):
    """torch.Generator is one of `ours`, in every module of ours that names it, too."""
    was, torch.Generator = torch.Generator, ours
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("rtb_inverse", "priors", "tasks") and getattr(module, "Generator", None) is was:
            module.Generator = ours


@contextmanager
def accelerator():
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # as on a GPU, a parameter stays the same object when it moves
    swap_generators(Generator)
    try:
        with Calls(), Dispatched():
            yield THERE
    finally:
        swap_generators(CpuGenerator)
        torch.__future__.set_swap_module_params_on_conversion(swapped)


class ThereAccelerator(Accelerator):
    """For lightning's Trainer."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return [THERE]

    @staticmethod
    def get_parallel_devices(devices):
        return [THERE]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "there"
