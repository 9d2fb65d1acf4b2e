r"""deepinv's posterior samplers on our prior, problem and observations: one denoiser, one physics, one change of units for all.

    "dps"              Diffusion Posterior Sampling, annealed (Chung et al. 2023, arXiv 2209.14687)
    "pigdm"            pseudoinverse guidance (Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", ICLR)
    "moment_matching"  the covariance of x_0 given x_t by the denoiser's Jacobian (Rozet et al. 2024, arXiv 2405.13712)
    "diffpir"          half-quadratic splitting (Zhu et al. 2023, arXiv 2305.08995)
    "ddrm"             noise levels matched along the singular vectors of A (Kawar et al. 2022, arXiv 2201.11793)

deepinv denoises x_0 + s n at noise level s. Our prior knows x_t = alpha_t x_0 + sigma_t n, so that

    D(x, s) = denoise(alpha_t x, t),    sigma_t / alpha_t = s.

Its samplers take images in [0, 1] or [-1, 1], of about unit variance, and operators of unit norm. So they are run in units of the prior,

    x = c + S x',    y = A(c) + S G y',    A'(x') = (A(c + S x') - A(c)) / (S G),    s = S s',

where A and y are whitened (noise of level 1, so that sigma' = 1 / (S G)), G is the norm of A, c the prior's mean and S its standard
deviation, and nothing is clamped: what cannot be switched off is moved out of reach (`diffpir`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from rtb_inverse.baselines.common import check_differentiable, prepare
from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_choice, check_count, check_finite, check_fraction, check_positive
from rtb_inverse.guidance import DENSE_LIMIT, affine
from rtb_inverse.particles import Particles
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.randomness import check_generator, fixed_normal, generator_on, standard_normal
from rtb_inverse.schedules import CLEAN

HIGHEST = 1e3  # noise level, in standard deviations of the prior, at which a schedule that ends in pure noise is started
FAR = 100.0  # standard deviations of the prior between its mean and the clamp of DiffPIR
LEVELS = 1000  # of the table of noise levels

TUNING: dict[str, dict[str, Any]] = {
    "dps": {"weight": 1.0, "eta": 1.0, "guidance": "annealed"},
    "pigdm": {"weight": 1.0, "eta": 1.0},
    "moment_matching": {"weight": 1.0, "eta": 1.0, "iterations": 10},
    "diffpir": {"lambda_": 7.0, "zeta": 0.1},
    "ddrm": {"eta": 0.85, "eta_b": 1.0},
}


@torch.no_grad()
def deepinv_sampler(
    name: str, prior: Prior, problem: InverseProblem, y: Tensor, n: int = 64, generator: Generator | None = None, *,
    steps: int | None = None, batch_size: int | None = None, progress: bool = False, **tuning,
) -> Particles:  # fmt: skip
    r"""One of deepinv's posterior samplers. All are approximations: the draws carry no weights.

    Args:
        name: "dps", "pigdm", "moment_matching", "diffpir" or "ddrm".
        prior: the prior's chain, in any range. All but "dps" want it in data space (no decoder).
        problem: the measurement model, with Gaussian noise; bound to the prior's shape here. All but "dps" want an affine operator, and
            "ddrm" one that is small enough for a singular value decomposition, or a mask.
        y: observations, (B, *y_shape); left as they are.
        n: draws per observation, at least 1.
        generator: source of all randomness; torch's global one by default.
        steps: calls of the denoiser, at least 2; as many as the prior has steps by default.
        batch_size: most draws per observation in one run, which bounds the memory; all by default.
        tuning: by method,
            dps: weight (1) > 0 of the guidance; eta (1) in [0, 1], 1 for ancestral steps and 0 for deterministic ones; guidance:
                "annealed", the Gaussian likelihood of variance sigma^2 + s^2, or "norm", the slope of the residual's norm as in the paper,
                whose weight has to be tuned.
            pigdm: weight (1), eta (1).
            moment_matching: weight (1), eta (1), iterations (10), most steps of conjugate gradients.
            diffpir: lambda_ (7) > 0: the data step trusts the denoiser to a variance of 2 s^2 / lambda_ (the paper's formula has
                s^2 / lambda_); zeta (0.1) in [0, 1], the share of fresh noise.
            ddrm: eta (0.85) and eta_b (1) in [0, 1], the shares of fresh noise where y is more, and less, noisy than x_t.

    Returns:
        Particles(x (n, B, *data_shape), log_w = 0), with info `evaluations` of the denoiser for each draw. "dps" and "pigdm" take a
        gradient through each, "moment_matching" up to iterations + 2.

    Raises:
        ImportError: deepinv is not installed. TypeError, ValueError: arguments that are none or do not fit; another noise than Gaussian;
            an operator or a prior that the method cannot take; draws that left the finite numbers.
    """
    check_choice("name", name, TUNING), check_count("n", n)
    check_generator(generator)
    options = check_tuning(name, tuning)
    package = import_deepinv()
    y = prepare(prior, problem, y)
    check_problem(name, prior, problem)
    steps = check_count("steps", prior.steps if steps is None else steps, 2)
    sizes = [len(part) for part in torch.arange(n).split(n if batch_size is None else check_count("batch_size", batch_size))]

    denoiser = Denoiser(prior, prior.schedule.times(steps))
    methods: dict[str, Callable[..., Tensor]] = {"diffpir": run_diffpir, "ddrm": run_ddrm}
    run = methods.get(name, run_sde)
    forward = Measurement.of(prior, problem, package)
    shared = package, name, denoiser, forward
    parts = [run(*shared, flat(y, size), generator, steps, progress, **options) for size in sizes]
    x = torch.cat([part.reshape(size, len(y), *prior.shape) for part, size in zip(parts, sizes, strict=True)])
    x = prior.decode(check_finite(f"draws of {name}", x).to(**prior._options()))
    return Particles(x, x.new_zeros(x.shape[:2]), {"evaluations": denoiser.evaluations / len(sizes)})


def import_deepinv() -> ModuleType:
    try:
        import deepinv
    except ImportError as error:
        raise ImportError("deepinv_sampler needs deepinv, one of the requirements of rtb-inverse: install it anew") from error
    return deepinv


def check_tuning(name: str, tuning: dict) -> dict:
    """The method's parameters, given and default."""
    for key, value in tuning.items():
        check_choice(f"tuning parameter of {name}", key, TUNING[name])
        match key:
            case "guidance":
                check_choice(key, value, ("annealed", "norm"))
            case "iterations":
                check_count(key, value)
            case "weight" | "lambda_":
                check_positive(key, value)
            case _:
                check_fraction(key, value)
    return TUNING[name] | tuning


def check_problem(name: str, prior: Prior, problem: InverseProblem) -> None:
    if not isinstance(problem.noise, GaussianNoise):
        raise ValueError(f"problem must have Gaussian noise for {name}, got {type(problem.noise).__name__}")
    check_differentiable(name, problem, prior)
    if name == "dps":
        return
    if not problem.linear:
        raise ValueError(f"problem must have an affine operator for {name}, got one that is not")
    if prior.decodes:
        raise ValueError(f"prior must live in data space for {name}, got one with a decoder, through which no operator is affine")
    if name == "ddrm" and not decomposes(problem):
        raise ValueError(f"problem must have a mask, or a matrix of at most {DENSE_LIMIT} elements, for ddrm, got a larger operator")


def decomposes(problem: InverseProblem) -> bool:
    d = problem.shape.numel()
    return problem.mask is not None or d * max(d, problem.y_shape.numel()) <= DENSE_LIMIT


def flat(y: Tensor, n: int) -> Tensor:
    """n copies of the observations as the images (n B, 1, 1, m) that deepinv wants; float64."""
    return y.double().reshape(1, len(y), 1, 1, -1).repeat(n, 1, 1, 1, 1).flatten(0, 1)


# The denoiser


class Denoiser:
    """D(x, s), the estimate of x_0 from x_0 + s n, in deepinv's shape and in the units x = centre + scale x'.

    Args:
        prior: the prior's chain. times: a grid of its schedule, the last one clean.

    Attributes:
        centre: (1, 1, 1, d), float64; scale: a number. At first those of the prior's mean and standard deviation (that of the denoiser's
            error at the noisiest time, 1 where it is not known).
        levels: sigma_t / alpha_t on the grid without its clean end, falling, float64, at most `HIGHEST` standard deviations.
        evaluations: how often it was called.
    """

    def __init__(self, prior: Prior, times: Tensor):
        self.prior, self.evaluations = prior, 0
        error = prior.denoiser_error(times[0])
        self.spread = 1.0 if error is None else float(error.mean().sqrt())
        table = prior.schedule.times(LEVELS)
        self.knots = torch.cat([times, table]).cpu()
        self.knots = self.knots[self.knots != CLEAN].unique()
        self.log_knots = self.level(self.knots).log()
        self.levels = self.level(times[times != CLEAN]).cpu()
        self.time = cache(self._time)
        self.scale, self.centre = self.spread, torch.zeros((), dtype=torch.float64, device=prior._options()["device"])
        zero = torch.zeros((1, 1, 1, prior.shape.numel()), dtype=torch.float64, device=self.centre.device)
        self.mean = self(zero, float(self.levels[0]) / self.scale) * self.scale
        self.centre, self.evaluations = self.mean, 0

    def level(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t."""
        alpha, sigma = self.prior.schedule.alpha_sigma(t)
        return (sigma / alpha).clamp_max(HIGHEST * self.spread)

    def _time(self, level: float) -> float:
        """t of a noise level: one of the knots where it is theirs to single precision, else by bisection, at the nearest end outside."""
        nearest = int((self.log_knots - math.log(level)).abs().argmin())
        low, high = self.knots[[0, -1]].tolist()
        if abs(float(self.log_knots[nearest]) - math.log(level)) < 1e-6 and float(self.level(self.knots[nearest])) < HIGHEST * self.spread:
            return float(self.knots[nearest])
        for _ in range(50):
            middle = (low + high) / 2
            alpha, sigma = self.prior.schedule.alpha_sigma(torch.tensor(middle, dtype=torch.float64))
            low, high = (middle, high) if float(sigma) < level * float(alpha) else (low, middle)
        return (low + high) / 2

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """x' (M, 1, 1, d) at noise levels s', a number or (M,) up to axes of 1; float64 out."""
        self.evaluations += 1
        levels, which = (torch.as_tensor(sigma, dtype=torch.float64).flatten() * self.scale).unique(return_inverse=True)
        t = torch.tensor([self.time(level) for level in levels.tolist()], dtype=torch.float64)[which.cpu()]
        t = t.expand(len(x)).to(x.device)
        alpha = self.prior.schedule.alpha_sigma(t)[0].reshape(-1, 1, 1, 1)
        x_t = (alpha * (self.centre + self.scale * x.double())).to(self.prior._options()["dtype"])
        x_0 = self.prior.denoise(x_t.reshape(-1, *self.prior.shape), t).double().reshape(x.shape)
        return (x_0 - self.centre) / self.scale


# The measurement


@dataclass
class Measurement:
    """The whitened measurement A in flat coordinates, (M, 1, 1, d) to (M, 1, 1, m), float64.

    Attributes:
        apply: A, of decoded states. slope: its linear part over G; where A is not affine, None.
        whiten: one over the noise's standard deviations, (1, 1, 1, m).
        gain: G; 1 where A is not affine. make: deepinv's physics of the slope, given its noise model.
    """

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None
    whiten: Tensor
    gain: float
    make: Callable[..., Any] | None

    @staticmethod
    def of(prior: Prior, problem: InverseProblem, package: ModuleType) -> "Measurement":
        options = prior._options()
        whiten = 1 / problem.noise.std.to(options["device"]).double().expand(problem.y_shape).reshape(1, 1, 1, -1)

        def apply(x):
            clean = problem(prior.decode(x.to(options["dtype"]).reshape(-1, *prior.shape)))
            return clean.double().reshape(len(x), 1, 1, -1) * whiten

        if prior.decodes or not problem.linear:
            return Measurement(apply, None, whiten, 1.0, None)
        zero = torch.zeros((1, 1, 1, prior.shape.numel()), dtype=torch.float64, device=options["device"])
        if decomposes(problem):
            operator = decomposition(problem, whiten)
            gain = float(operator["mask"].max())
            operator["mask"] = operator["mask"] / gain
            make, kind = operator, package.physics.DecomposablePhysics
        else:
            offset = apply(zero)
            raw = adjoint_pair(lambda x: apply(x) - offset, zero, 1.0)
            start = fixed_normal(0, zero.shape, torch.float64).to(zero)
            gain = float(package.physics.LinearPhysics(**raw).compute_norm(start, squared=False, verbose=False))
            make, kind = adjoint_pair(lambda x: apply(x) - offset, zero, gain), package.physics.LinearPhysics
        physics = kind(**make, device=options["device"])
        return Measurement(apply, physics.A, whiten, gain, lambda noise: kind(**make, noise_model=noise, device=options["device"]))

    def observed(self, package: ModuleType, denoiser: Denoiser, y: Tensor) -> tuple[Tensor, Any]:
        """y' and the physics A', with its noise, in the denoiser's units."""
        centre, scale, mean = denoiser.centre, denoiser.scale, denoiser.mean
        noise = package.physics.GaussianNoise(1 / (scale * self.gain)).to(y.device)
        if self.slope is None:
            at_centre = self.apply(centre)
            physics = package.physics.Physics(A=lambda x: (self.apply(centre + scale * x) - at_centre) / scale, noise_model=noise)
            return (y * self.whiten - at_centre) / scale, physics
        y = (y * self.whiten - self.apply(mean)) / (scale * self.gain) + self.slope((mean - centre) / scale)
        return y, self.make(noise)


def decomposition(problem: InverseProblem, whiten: Tensor) -> dict[str, Any]:
    """The singular value decomposition of the whitened operator as deepinv wants it: d singular values, those that y lacks 0."""
    d, m = problem.shape.numel(), whiten.numel()
    if problem.mask is not None:
        seen = problem.mask.flatten().to(whiten.device).nonzero()[:, 0]
        singular = whiten.new_zeros((1, 1, 1, d)).index_copy(-1, seen, whiten)
        return {
            "mask": singular, "img_size": (1, 1, d), "V": torch.clone, "V_adjoint": torch.clone, "U": lambda z: z[..., seen],
            "U_adjoint": lambda u: u.new_zeros((*u.shape[:-1], d)).index_copy(-1, seen, u),
        }  # fmt: skip
    U, S, Vh = torch.linalg.svd(whiten.reshape(m, 1) * affine(problem)[0].to(whiten), full_matrices=True)
    k = min(m, d)
    U = torch.cat([U[:, :k], U.new_zeros((m, d - k))], 1)
    singular = torch.cat([S, S.new_zeros(d - k)])
    singular = singular.where(singular > 1e-10 * singular.max(), 0.0).reshape(1, 1, 1, d)
    return {
        "mask": singular, "img_size": (1, 1, d), "U": lambda z: z.to(U) @ U.T, "U_adjoint": lambda u: u.to(U) @ U,
        "V": lambda z: z.to(Vh) @ Vh, "V_adjoint": lambda x: x.to(Vh) @ Vh.T,
    }  # fmt: skip


def adjoint_pair(operator: Callable[[Tensor], Tensor], zero: Tensor, gain: float) -> dict[str, Any]:
    """A linear operator over its gain, and its adjoint by automatic differentiation."""

    def forward(x):
        return operator(x) / gain

    def adjoint(v):
        return torch.func.vjp(forward, zero.expand(len(v), *zero.shape[1:]))[1](v)[0]  # type: ignore[misc]

    return {"A": forward, "A_adjoint": adjoint, "max_iter": 100, "tol": 1e-6}


# The methods


def run_sde(package, name, denoiser, forward, y, generator, steps, progress, weight, eta, guidance=None, iterations=None) -> Tensor:
    """Ancestral steps (variance-exploding, time is the noise level) with a score p(y | x_t) of one of three kinds."""
    y, physics = forward.observed(package, denoiser, y)
    sampling, levels = package.sampling, (denoiser.levels / denoiser.scale).to(y.device)
    match name:
        case "dps":
            fidelity = sampling.DPSDataFidelity(weight=weight, guidance=guidance, clip=None)
        case "pigdm":
            fidelity = sampling.PiGDMDataFidelity(weight=weight, cg_max_iter=50)  # exact where the operator is decomposed
        case _:
            fidelity = sampling.MomentMatchingDataFidelity(weight=weight, cg_max_iter=iterations)
    units = {"device": y.device, "dtype": torch.float64, "minus_one_one": False}
    sde = sampling.EDMDiffusionSDE(sigma_t=lambda t: t, variance_exploding=True, **units)
    solver = sampling.DDIMSolver(timesteps=torch.cat([levels, levels.new_zeros(1)]), eta=eta, rng=generator_on(y.device, generator))
    model = sampling.PosteriorDiffusion(fidelity, denoiser, sde, solver, verbose=progress, **units)
    x = model(y, physics, x_init=(len(y), *denoiser.mean.shape[1:]))
    return denoiser.centre + denoiser.scale * x


def run_diffpir(package, name, denoiser, forward, y, generator, steps, progress, lambda_, zeta) -> Tensor:
    """DiffPIR clamps its estimate of 2 x' - 1 to [-1, 1]: its unit is made so large that the prior is far inside. Its table of noise
    levels, that of one variance-preserving schedule, is replaced by the prior's."""
    schedule = denoiser.prior.schedule.times(max(LEVELS, 4 * steps))
    levels = denoiser.level(schedule[schedule != CLEAN]).unique().to(y.device)
    half = FAR * denoiser.spread
    denoiser.centre, denoiser.scale = denoiser.mean - half, 2 * half
    y, physics = forward.observed(package, denoiser, y)

    model = package.sampling.DiffPIR(
        denoiser, package.optim.data_fidelity.L2(), sigma=0.0, max_iter=steps, zeta=zeta, lambda_=lambda_, verbose=progress, device=y.device
    )
    model.num_train_timesteps = len(levels)
    model.reduced_alpha_cumprod = levels / half
    model.sqrt_alphas_cumprod = (1 + model.reduced_alpha_cumprod**2).rsqrt()
    model.sqrt_1m_alphas_cumprod = model.reduced_alpha_cumprod * model.sqrt_alphas_cumprod
    model.get_alpha_prod = lambda: (1 / model.sqrt_alphas_cumprod, model.reduced_alpha_cumprod)
    with DrawsFrom(generator):
        x = model(y, physics, x_init=torch.full((len(y), *denoiser.mean.shape[1:]), 0.5, dtype=y.dtype, device=y.device))
    return denoiser.centre + denoiser.scale * x


def run_ddrm(package, name, denoiser, forward, y, generator, steps, progress, eta, eta_b) -> Tensor:
    """DDRM starts at noise level 1, and takes what is measured at more noise than that for unseen: its unit is the highest level. It also
    draws its noise at 1 / sqrt(2) of the level that it tells the denoiser and that the paper asks for, which is undone here."""
    denoiser.centre, denoiser.scale = denoiser.mean, float(denoiser.levels[0])
    y, physics = forward.observed(package, denoiser, y)
    sigmas = (denoiser.levels / denoiser.scale).tolist()
    model = package.sampling.DDRM(denoiser, sigmas, eta=eta, etab=eta_b, verbose=progress, eps=0.0)
    with DrawsFrom(generator, math.sqrt(2)):
        x = model(y, physics)
    return denoiser.centre + denoiser.scale * x


class DrawsFrom(TorchFunctionMode):
    """Within it, `torch.randn_like` draws from a generator, times a factor: for samplers that know only torch's global one."""

    def __init__(self, generator: Generator | None, factor: float = 1.0):
        super().__init__()
        self.generator, self.factor = generator, factor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.randn_like:
            x = args[0]
            return self.factor * standard_normal(x, self.generator)
        return func(*args, **(kwargs or {}))
