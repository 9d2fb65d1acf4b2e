r"""The trainable chain q(tau | y): a conditional copy of the prior's chain, and log Z(y)."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_inverse import checkpoints
from rtb_inverse.chains import Chain, Prior, rollout
from rtb_inverse.checks import check_choice, check_count, check_positive
from rtb_inverse.guidance import COVARIANCE_LIMIT, DENSE_LIMIT, GradientGuidance, Guide, Update, covariance_guidance, guidance
from rtb_inverse.kept_draws import KeptDraws
from rtb_inverse.laplace import laplace_guidance
from rtb_inverse.networks import ConditionalUNet, LinearHead, LogZ, ResidualMLP, gaussian_error, on_grid
from rtb_inverse.noise_range import NoiseRange
from rtb_inverse.particles import Particles
from rtb_inverse.problems import TRIED, InverseProblem, Reward
from rtb_inverse.references import References
from rtb_inverse.schedules import expand
from rtb_inverse.second_look import local_move
from rtb_inverse.second_look import shares as second_look_shares

WAVES_LIMIT = 128  # elements of an x whose Fourier features a perceptron sees
REFERENCES_LIMIT = 64  # elements of a generator's z, from where none of its draws is near what a guide finds
PAIRS = 16  # simulated ones, on which a guide learns what y tells


def check_posterior(posterior) -> "Posterior":
    """Return `posterior` if it is one; raise TypeError otherwise."""
    if not isinstance(posterior, Posterior):
        raise TypeError(f"posterior must be a Posterior, got {type(posterior).__name__}; Posterior(prior, problem) makes one")
    return posterior


class Posterior(Chain):
    r"""q(x_s | x_t, y): the prior's Gaussian step around another estimate of x_0.

        x0hat  <- network(x_t, t, condition(y), data residual)
        x0hat  <- x0hat + gate_t * (Gaussian update of x0hat by y under the denoiser's error r_t^2)      (start="guided")
                  (where the prior is a network: joined with an update by the covariance at the very state, see `second_look`, and begun
                  from what kept draws say, see `KeptDraws`; where draws are cheap: joined with E[x_0 | x_t, y] over many, see `References`)
        x0hat  <- x0hat + a linear map of x_t and of x0hat, of a posterior of one y only                  (`LinearHead`)
        scales <- prior's step, shrunk by what y tells, times exp(log_scale)

    gate_t starts at 1, log_scale at 0, all added inputs of the network at 0: so the chain starts at the prior, or guided. A U-Net's own
    x_t is moved towards y too, by `ConditionalUNet.input_gate`, which starts at 0, or, guided, at sigma_t^2 / (alpha_t^2 + sigma_t^2).

    The last step of a guided U-Net is not learnt (`exact_end`): p(x_0 | x_1) is the prior's own Gaussian, which the guide makes fit y, and
    all that training would bring to it is noise, where it costs most. (But where the guide is one gradient, in latents, say.)

    Args:
        prior: the frozen prior.
        problem: the measurement model; bound to the prior's shape here. A `Reward` has no y.
        start: "prior" or "guided"; by default guided wherever the problem allows it (differentiable, a noise model of `noise`);
            a class of what a generator draws, which only `References` guide, is better learnt from the prior on.
        beta: inverse temperature of the likelihood, > 0.
        network: in place of the copy: a module with `estimate` and `forward` as in `networks`.
        lora_rank: train low-rank adapters of the copy, not all its weights.
        width: of the perceptron, for priors without a network.
        second_look: evaluate a guided network twice at the steps where that pays (10 of the 20 of `priors/digits`); by default not in
            latents, where it has not paid.
        references: of a guided network the `draws` that its prior keeps, if it does, or others (M, *shape), or False for none: they say
            what y says of x_0 before x_t does (`KeptDraws`, held as `draws`; to measure how much takes as long as 32 to 128 draws, and
            M calls of the operator).

    Raises:
        ValueError: prior and problem of different shapes; start="guided" where the operator does not allow it; a second look or
            references without.
    """

    guide: Guide | None
    network: Any  # a module with `estimate` and `forward`

    def __init__(
        self, prior: Prior, problem: InverseProblem, start: str | None = None, beta: float = 1.0, network: nn.Module | None = None,
        lora_rank: int | None = None, width: int = 256, second_look: bool | None = None, references: bool | Tensor | None = None,
    ):  # fmt: skip
        if not isinstance(prior, Prior):
            raise TypeError(f"prior must be a Prior, got {type(prior).__name__}")
        if not isinstance(problem, InverseProblem):
            raise TypeError(f"problem must be an InverseProblem, got {type(problem).__name__}")
        super().__init__(prior.shape, prior.schedule, prior.steps)
        prior = copy.copy(prior.requires_grad_(False))  # weights and tables are shared, the grid is not: the prior may be laid on another
        self.prior = prior
        self.problem = problem.bind(prior.data_shape, prior.examples(TRIED))
        self.beta = check_positive("beta", beta)
        self.guide = self._guide(start) if prior.differentiable else None
        few = not prior.white or prior.shape.numel() <= REFERENCES_LIMIT or self.guide is None
        cheap = prior.exact_reversal and self.amortised and few and not (self.guide is not None and self.guide.exact)
        can_guide = self.guide is not None or cheap
        scarce = prior.white and not self.problem.whitens  # a class, say, which many z fit: references make training slower, not nearer
        default = self.guide is not None or (cheap and not scarce)
        self.start = check_choice("start", start or ("guided" if default else "prior"), ("guided", "prior"))
        if self.start == "guided" and not can_guide:
            needs = "a differentiable operator (and decode) and a noise model of rtb_inverse.noise, or a prior of exact draws"
            raise ValueError(f"start='guided' needs {needs}; expected start='prior' here")
        if self.start == "guided" and getattr(prior, "error", prior) is None:
            how = "prior.measure_error() measures it, prior.save_pretrained(folder) keeps it"
            warnings.warn(f"prior's error is not known: the guide takes x_0 for N(0, I), which costs much; {how}", stacklevel=2)
        self.lora_rank, self.width = lora_rank, width
        options = prior._options()
        self.gate = nn.Parameter(torch.ones(prior.steps, **options))
        self.log_scale = nn.Parameter(torch.zeros(prior.steps, **options))
        condition = self._probe_condition()
        with torch.random.fork_rng(range(torch.cuda.device_count())):  # the first weights of the added layers depend on no global state
            torch.manual_seed(0)
            self.network = (network or self._network(condition)).to(**options)
            self.log_z = LogZ(0 if condition is None else condition[0].numel()).to(**options)
        exact = self.guide is not None and not (isinstance(self.guide, GradientGuidance) and self.guide.covariance is None)
        self.exact_end = self.start == "guided" and exact and isinstance(self.network, ConditionalUNet)
        self.local_gate = self.looks = None  # shares of the covariance at the very state; and the steps where it is asked for
        ascending = self.times[:-1].flip(0)  # step_index 0 is the last step
        able = self.start == "guided" and isinstance(self.network, ConditionalUNet)
        if second_look and not able:
            raise ValueError(f"second_look=True needs a guided start and the prior's own network, got start={self.start!r} here")
        if able and (not prior.decodes if second_look is None else second_look):
            w = second_look_shares(prior.schedule, ascending)
            w[0] *= not self.exact_end
            self.local_gate, self.looks = nn.Parameter(w.to(**options)), w > 0
        self.draws: KeptDraws | None = None
        self.head: LinearHead | None = None
        self.references = self._measured_references() if self.start == "guided" and cheap else None
        if self.start == "guided" and isinstance(self.guide, GradientGuidance) and self.references is None:
            self._learn(self.guide)
        if self.start == "guided" and self._input_gate is not None:
            with torch.no_grad():
                self._input_gate.copy_(gaussian_error(prior, ascending).flatten(1)[:, 0])
        drawn = self._drawn(references, able)
        if drawn is not None:
            self.hold_references(drawn).measure(prior, self.problem, lambda *state: self.denoise(*state)[0])

    def _drawn(self, references: bool | Tensor | None, able: bool) -> Tensor | None:
        """The draws to take as references: those given, or those that the prior keeps."""
        kept = getattr(self.prior, "draws", None)
        if references is None:
            return kept if able else None
        if references is False:
            return None
        if not able:
            raise ValueError(f"references need a guided start and the prior's own network, got start={self.start!r} here")
        if references is True and kept is None:
            raise ValueError("references=True needs a prior that keeps draws, got one without: prior.keep_draws(4096) makes them")
        return kept if references is True else references

    def hold_references(self, x: Tensor) -> KeptDraws:
        """Take draws x (M, *shape) of the prior as references, whose shares are 0 until they are measured or loaded."""
        self.draws = KeptDraws(self.prior, x, self.problem)
        return self.draws

    def hold_head(self) -> LinearHead:
        """Make room for what `fit(posterior, y=y)` finds for one y in closed form; until then it is 0."""
        self.head = LinearHead(self.prior)
        return self.head

    def _guide(self, start: str | None) -> Guide | None:
        """The best that prior and problem allow; of a chain in latents that starts at the prior, whose network the guide only shows where y
        would move the estimate, one gradient, at a tenth of the cost."""
        prior, problem, best = self.prior, self.problem, None
        if start != "prior" or prior.white or not prior.decodes:
            best = laplace_guidance(problem, prior, self.beta) or covariance_guidance(problem, prior, self.beta)
        return best or guidance(problem, prior.decode if prior.decodes else None, len(prior.shape))

    def _learn(self, guide: GradientGuidance) -> None:
        """What y leaves of the variances, where the prior knows them; not where the operator is too large, or each y has its own noise."""
        prior, d = self.prior, self.shape.numel()
        known = prior.variance == "analytic" and prior.denoiser_error(self.times[-2]) is not None
        small = d**2 <= COVARIANCE_LIMIT and d * self.problem.y_shape.numel() <= DENSE_LIMIT
        if known and small and not isinstance(self.problem, NoiseRange):
            generator = torch.Generator(self.gate.device).manual_seed(3)
            x_0 = prior.sample(PAIRS, generator)
            y = self.problem.simulate(self.decode(x_0), generator)
            guide.learn(x_0, y, self.error(self.times[-2]).sqrt())

    @property
    def amortised(self) -> bool:
        """Whether there is an observation to condition on."""
        return not isinstance(self.problem, Reward)

    def _probe_condition(self) -> Tensor | None:
        if not self.amortised:
            return None
        return self.problem.condition(torch.zeros((1, *self.problem.y_shape), **self.prior._options()))

    def _network(self, condition: Tensor | None) -> nn.Module:
        if getattr(self.prior, "network", None) is not None:
            channels = 0 if condition is None else on_grid(condition, self.shape[1:]).shape[1]
            return ConditionalUNet(self.prior, channels, self.lora_rank)
        generator = torch.Generator(self.gate.device).manual_seed(0)
        x = self.prior.sample(512, generator)
        y = torch.zeros((512, 0), **self.prior._options())
        if self.amortised:
            y = self.problem.condition(self.problem.simulate(self.prior.decode(x), generator)).flatten(1)
        y_std, x = y.std(0) if self.amortised else y[0], x.flatten(1)
        octaves = 3 if x.shape[1] <= WAVES_LIMIT else 0
        return ResidualMLP(x.mean(0), x.std(0) + 1e-6, y.mean(0), y_std + 1e-6, self.width, octaves=octaves)

    def _measured_references(self) -> References:
        def guided(x_t, t, y):
            first, error = self.prior.denoise(x_t, t), self.beta * self.error(t)
            return first if self.guide is None else first + self.guide(first, y, error, self.guide.at(x_t, t)).delta

        def simulate(x_0, generator):
            return self.problem.simulate(self.prior.decode(x_0), generator)

        references = References(self.prior, getattr(self.guide, "basis", None))
        return references.measure(self.prior, guided, simulate, lambda y: self._likelihood_of(references, y))

    def _likelihood_of(self, references: References, y: Tensor) -> Tensor:
        return self.beta * references.told(self.problem, y)[0]

    def set_steps(self, steps: int) -> "Posterior":
        """Its gates are for the grid that its prior had: another one asks for another posterior."""
        if hasattr(self, "times"):
            self._keeps(steps)
        return super().set_steps(steps)  # type: ignore[return-value]

    def _keeps(self, steps: int) -> None:
        if steps != self.steps:
            raise ValueError(
                f"steps of a posterior must stay {self.steps}, got {steps}: set_steps of your prior, then make a posterior anew"
            )

    def train(self, mode: bool = True) -> "Posterior":
        return super().train(False)  # a density must not depend on dropout

    def initial(self, sample_shape):
        return self.prior.initial(sample_shape)

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the chain, without log Z."""
        return self.gates() + [p for p in self.network.parameters() if p.requires_grad and p is not self._input_gate]

    def gates(self) -> list[nn.Parameter]:
        """Those of them with one number per step."""
        gates = [self.log_scale] + ([self.gate] if self.start == "guided" else [])
        further = (self.local_gate, self._input_gate)
        return gates + [gate for gate in further if gate is not None]

    @property
    def _input_gate(self) -> nn.Parameter | None:
        return getattr(self.network, "input_gate", None)

    def evaluations(self, level: int | None = None) -> int:
        """Of the network for one draw, from the start (K, the default) or from `level` steps above x_0: a step takes one, or two looks."""
        level = self.steps if level is None else level
        return level + (0 if self.looks is None else int(self.looks[:level].sum()))

    def log_likelihood(self, x_0: Tensor, y: Tensor | None) -> Tensor:
        """beta log p(y | decode(x_0)): x_0 (N, B, *shape), y (B, *y_shape); returns (N, B)."""
        return self.beta * self.problem.log_likelihood(self.prior.decode(x_0), y)

    def log_evidence(self, y: Tensor | None) -> Tensor:
        """The learned log Z(y), (B,); (1,) without observation. `importance` gives an estimate with a standard error."""
        return self.log_z(None if y is None else self.problem.condition(y.to(self.gate)))

    def error(self, t: Tensor) -> Tensor:
        """r_t^2, (*t.shape, *shape), float64; where the prior does not know it, that of x_0 ~ N(0, I)."""
        error = self.prior.denoiser_error(t)
        return gaussian_error(self.prior, t.to(self.gate.device)) if error is None else error

    def denoise(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | float, Update | None]:
        """The estimate of x_0 given y, the log-scale of the step, and the update that y made."""
        self._keeps(self.prior.steps)
        t = t.to(x_t.device)
        k, guide = self.step_index(t), self.guide
        with torch.no_grad():
            condition = x_t.new_zeros((x_t.shape[-1 - len(self.shape)], 0, *self.shape[1:])) if y is None else self.problem.condition(y)
            first, error = self.network.estimate(self.prior, x_t, t)
            at = reference = move = None
            if guide is not None and y is not None:
                at = guide.at(x_t, t)
                move = guide(first, y, self.beta * error, at).delta
            if self.references is not None and y is not None:
                share = expand(self.references.share[k], x_t).expand_as(x_t)
                reference = self._reference(x_t, t, y, self.references.share[k] > 0)
                move = torch.zeros_like(first) if move is None else move
                move = torch.lerp(move, reference - first, share)
            move = None if move is None else move / error.sqrt().to(x_t.dtype)
        learnt = (k > 0) | (not self.exact_end)
        x_0, log_scale = self._estimate(x_t, t, learnt, condition, move, first)
        log_scale = log_scale + expand(self.log_scale[k] * learnt, x_0)
        if self.start == "prior" or move is None:
            return x_0, log_scale, None
        drawn, update = x_0, Update(torch.zeros_like(x_0))
        if self.draws is not None and (self.draws.regressed + self.draws.share)[k].any():
            drawn = self.draws(x_t, t, k, *self.draws.told(self.problem, y), x_0)
        if guide is not None:
            update = guide(drawn, y, self.beta * self.error(t), at)
        if self.local_gate is not None and update.slope is not None and self.looks[k.cpu()].any():
            update = replace(update, delta=self._local(x_t, t, k, condition, move, x_0, update))
        if reference is not None:
            delta = torch.lerp(update.delta, reference - first, share)
            known = guide is not None and guide.per_observation and update.shrink is not None
            update = replace(update, delta=delta) if known else self.references.left(k, delta)
        estimate = drawn + expand(torch.where(learnt, self.gate[k], 1.0), x_0) * update.delta
        if self.head is not None:
            estimate = self.head(x_t, t, k, estimate)
        clip = self.schedule.clip_sample
        return (estimate if clip is None else estimate.clamp(-clip, clip)), log_scale, update

    def _estimate(
        self, x_t: Tensor, t: Tensor, learnt: Tensor, condition: Tensor, move: Tensor | None, first: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """The network's estimate and log-scale; the prior's own estimate where nothing is `learnt`."""
        if learnt.all():
            return self.network(self.prior, x_t, t, condition, move, first)
        if not learnt.any():
            return self.prior.denoise(x_t, t), 0.0
        batch = x_t.shape[: x_t.ndim - len(self.shape)]
        here, t, condition = learnt.expand(batch), t.expand(batch), condition.expand(*batch, *condition.shape[1:])
        move = None if move is None else move[here]
        estimate, log_scale = self.network(self.prior, x_t[here], t[here], condition[here], move, first[here])
        x_0 = torch.zeros_like(x_t).index_put((here,), estimate.to(x_t.dtype))
        x_0 = x_0.index_put((~here,), self.prior.denoise(x_t[~here], t[~here]).to(x_t.dtype))
        if isinstance(log_scale, Tensor):
            log_scale = torch.zeros_like(x_0).index_put((here,), log_scale.to(x_0.dtype))
        return x_0, log_scale

    def _local(
        self, x_t: Tensor, t: Tensor, k: Tensor, condition: Tensor, move: Tensor, x_0: Tensor, update: Update
    ) -> Tensor:  # fmt: skip
        """The update's move, joined with one by the covariance at the very state wherever a second look is due."""
        batch, prior = x_t.shape[: x_t.ndim - len(self.shape)], self.prior
        here = self.looks.to(k.device)[k].expand(batch)
        t, w = t.expand(batch)[here], self.local_gate[k.expand(batch)[here]]
        condition, move = condition.expand(*batch, *condition.shape[1:])[here], move[here]
        slope, error = self.beta * update.slope()[here], self.error(t)

        def estimate(x):
            return self.network(prior, x, t, condition, move, None)[0]

        local = local_move(estimate, x_t[here], x_0[here], slope, error, *prior.schedule.alpha_sigma(t))
        return update.delta.index_put((here,), torch.lerp(update.delta[here], local, expand(w, local)))

    def _reference(self, x_t: Tensor, t: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
        if not wanted.any():
            return torch.zeros_like(x_t)
        return self.references(x_t, t, self._likelihood_of(self.references, y), wanted)

    def transition(self, x_t, t, s, y=None):
        t, s = t.to(x_t.device), s.to(x_t.device)
        x_0, log_scale, update = self.denoise(x_t, t, y)
        return self.prior.gaussian_step(x_t, x_0, t, s, 2 * torch.tanh(log_scale / 2), update)

    def sample(self, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, progress: bool = False) -> Particles:
        """n draws for each observation, not corrected: log_w = 0.

        Args:
            y: observations, (B, *y_shape); None for a `Reward`.

        Returns:
            Particles(x (n, B, *data_shape), log_w (n, B)).
        """
        check_count("n", n)
        path = rollout(self, n, self.check_y(y), generator, progress=progress)
        x = self.decode(path.x_0)
        return Particles(x, x.new_zeros(x.shape[:2]))

    def check_y(self, y: Tensor | None) -> Tensor | None:
        """y in the chain's device and dtype, where the problem, which others may share, is brought too, if it is a finite batch
        (B, *y_shape)."""
        self.problem.to(self.gate.device)
        y = self.problem.check_y(y.to(self.gate.device) if isinstance(y, Tensor) else y)
        return y if y is None else y.to(self.gate.dtype)

    def weights(self) -> dict[str, Tensor]:
        """State of everything but the prior, and the problem as the guide has it."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(("prior.", "guide.problem."))}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the posterior as a folder: config.json, safetensors, and its prior in prior/ (where that knows how to save itself)."""
        checkpoints.save_posterior(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, prior: Prior | None = None, problem: InverseProblem | None = None, **options
    ) -> "Posterior":
        """Load what `save_pretrained` wrote.

        Args:
            folder: local.
            prior, problem: needed only where the folder cannot rebuild them (a class of your own, an operator that is code).
            options: what else the constructor took that is code (`network`).

        Raises:
            FileNotFoundError: missing folder or file. ValueError: weights that are truncated, pickled, or of another posterior.
        """
        return checkpoints.load_posterior(cls, Path(folder), prior, problem, **options)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        return self.prior.decode(x_0)
