r"""Class constraints by a classifier p(c | x) = softmax(logits(x))_c: the first experiment of RTB (arXiv 2405.20971).

One class is a reward, p(x) p(c | x)^beta / Z (`ClassReward`); or the class is the observation and one posterior serves them all
(`ClassConstraint`). beta is that of `Posterior(beta=...)`.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from rtb_inverse.checkpoints import class_path, own_class
from rtb_inverse.checks import check_count, check_tensor
from rtb_inverse.problems import InverseProblem, Reward
from rtb_inverse.randomness import generator_on
from tasks.linear import lay_out


class CategoricalNoise(nn.Module):
    """y is one of C classes, one-hot: p(y | x) = softmax(A(x))_y, for logits A(x) of shape (..., C)."""

    def sample(self, clean: Tensor, generator: Generator | None = None) -> Tensor:
        """y given the logits."""
        drawn = torch.multinomial(clean.softmax(-1).flatten(0, -2), 1, generator=generator_on(clean.device, generator))[:, 0]
        return nn.functional.one_hot(drawn, clean.shape[-1]).to(clean.dtype).reshape(clean.shape)

    def log_prob(self, clean: Tensor, y: Tensor, event_dim: int) -> Tensor:
        """log p(y | logits); logits and y broadcast."""
        return (y * clean.log_softmax(-1)).sum(-1)


def taken(classifier):
    """A classifier as the problems hold it: a module in eval mode, its weights frozen; a function as it is."""
    if not callable(classifier):
        raise TypeError(f"classifier must be a callable from x to logits, got {type(classifier).__name__}")
    return classifier.requires_grad_(False).eval() if isinstance(classifier, nn.Module) else classifier


def check_logits(logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        was = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"classifier must give logits of shape (M, C), C >= 2, got {was}")
    return logits


def describe(classifier) -> dict | None:
    """What `rebuild` needs beside the weights, for a module of this project: its constructor's arguments, JSON, are its `config`, if it has
    any. None for other classifiers."""
    if not isinstance(classifier, nn.Module) or type(classifier).__module__.split(".")[0] not in ("rtb_inverse", "priors", "tasks"):
        return None
    return {"class_path": class_path(classifier), "config": dict(getattr(classifier, "config", {}))}


def rebuild(described: dict, weights: dict[str, Tensor]) -> nn.Module:
    """The classifier that `describe` described, with those of `weights` that begin with "classifier."."""
    classifier = own_class(described["class_path"])(**described["config"])
    classifier.load_state_dict({n.removeprefix("classifier."): w for n, w in weights.items() if n.startswith("classifier.")})
    return classifier


class ClassConstraint(InverseProblem):
    """y is the class of x, one-hot, (B, C), with p(y | x) = softmax(logits(x))_y; `check_y` makes it from indices (B,) too.

    Args:
        classifier: module or function from a batch of x, (M, *shape), to logits (M, C), C >= 2; kept in eval mode, its weights frozen.
        shape: of x. May be left out: `Posterior` tells it the prior's.

    Raises:
        TypeError: a classifier that is not callable. ValueError: one that gives other than (M, C) logits, C >= 2.
    """

    classifier: Callable[[Tensor], Tensor]

    def __init__(self, classifier: nn.Module | Callable[[Tensor], Tensor], shape=None):
        classifier = taken(classifier)
        super().__init__(self.logits, CategoricalNoise(), linear=False)
        self.classifier, described = classifier, describe(classifier)
        self.config = described and {"classifier": described}
        if shape is not None:
            self.bind(shape)

    def logits(self, x: Tensor) -> Tensor:
        """(M, *shape) to (M, C)."""
        return check_logits(self.classifier(x))

    def condition(self, y):
        """The one-hot class, (B, C), on each position of x's grid: (B, C, *spatial)."""
        spatial = self.shape[1:]
        return y.reshape(*y.shape, *(1,) * len(spatial)).expand(*y.shape, *spatial)

    def picture(self, y: Tensor) -> Tensor:
        """The classes line by line."""
        return lay_out(y)

    def check_y(self, y):
        """One-hot classes (B, C), or their indices 0 .. C - 1, (B,): the former."""
        classes = self.y_shape[0]
        if isinstance(y, Tensor) and y.ndim == 1 and not y.is_complex():
            index = check_tensor("y", y.float(), ())
            wrong = (index != index.round()) | (index < 0) | (index >= classes)
            if wrong.any():
                raise ValueError(f"y must hold classes 0, 1, ..., {classes - 1}, got {float(index[wrong][0]):g}")
            return nn.functional.one_hot(y.long(), classes).float()
        y = check_tensor("y", y, self.y_shape)
        if bool(((y != 0) & (y != 1)).any() or (y.sum(-1) != 1).any()):
            raise ValueError(f"y must be one-hot, (B, {classes}), or the indices of the classes, (B,), got rows other than one 1 and zeros")
        return y

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "ClassConstraint":
        """Rebuild from `config` and the saved weights of the classifier."""
        return cls(rebuild(config["classifier"], weights))


class ClassReward(Reward):
    """p(x) p(c | x) / Z for one class c, without observation: the log-reward is log softmax(logits(x))_c.

    Args:
        classifier, shape: as in `ClassConstraint`.
        label: c, 0 .. C - 1.

    Raises:
        TypeError, ValueError: as in `ClassConstraint`, and a label that is no class.
    """

    classifier: Callable[[Tensor], Tensor]

    def __init__(self, classifier: nn.Module | Callable[[Tensor], Tensor], label: int, shape=None):
        classifier, label = taken(classifier), check_count("label", label, 0)
        super().__init__(self.log_p)
        self.label, self.classifier, described = label, classifier, describe(classifier)
        self.config = described and {"classifier": described, "label": label}
        if shape is not None:
            self.bind(shape)

    def log_p(self, x: Tensor) -> Tensor:
        """log p(c | x), (M, *shape) to (M,)."""
        logits = check_logits(self.classifier(x))
        if self.label >= logits.shape[1]:
            raise ValueError(f"label must be one of the classes 0, 1, ..., {logits.shape[1] - 1}, got {self.label}")
        return logits.log_softmax(1)[:, self.label]

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "ClassReward":
        """Rebuild from `config` and the saved weights of the classifier."""
        return cls(rebuild(config["classifier"], weights), config["label"])
