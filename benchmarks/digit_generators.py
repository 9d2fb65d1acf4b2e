"""Posteriors in the noise space of the shipped generators of 8x8 digits, against Markov chains in z at equal evaluations of f:

    python benchmarks/digit_generators.py [--seconds 60] [--generators vae gan] [--problems box class] [--observations 8] [--draws 128]
        [--sweeps 40 400] [--output FOLDER]

For the VAE and the GAN: a box hidden, noise_std 0.1, and a class, by a small classifier that is trained here in seconds; y is simulated.
The truth is 64 long chains of Hamiltonian Monte Carlo, of the box about the Laplace approximation, of a class from draws of the prior;
their R-hat is said. Rivals are chains about the prior and, of the box, about the Laplace approximation; some of ours are re-noised. Ours
are trained on simulated pairs alone, then by each objective for half of the time. Numbers are means over observations.

    log p(y | x)    mean over draws, the reward
    diversity       root mean square distance of a draw from the mean of its observation's draws
    SW / floor      sliced Wasserstein of x to the truth, over that of as many other draws of the truth
    ELBO, EUBO      bounds of log Z, of paths of ours and of those that made the y; log Z of the path weights; ESS / n
    evaluations     of f for each draw; ours look for the mode once for each y, for all its draws
    s per 1,000     CPU seconds for 1,000 draws; training apart

One thread; writes digit_generators.md, and digit_generators_vae.png and _gan.png: for each of eight y of the box, seven draws of ours.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from priors import DigitGenerator, GeneratorPrior, digits
from rtb_inverse import InverseProblem, Posterior, fit, importance, renoise_mcmc, simulate_observations, smc
from rtb_inverse.baselines import hmc, pcn
from rtb_inverse.diagnostics import Estimate, eubo, sliced_wasserstein
from rtb_inverse.particles import Particles
from rtb_inverse.plots import image_grid
from rtb_inverse.training import score
from tasks import ClassConstraint, Inpainting

LONG = {"steps": 1200, "burn_in": 300, "leaps": 8, "kept": 8}  # the truth, 64 chains
HEAD = [
    "problem",
    "method",
    "log p(y given x)",
    "diversity",
    "SW / floor",
    "ELBO",
    "EUBO",
    "log Z",
    "ESS / n",
    "evaluations",
    "CPU s per 1,000 draws",
]


class Counted(nn.Module):
    """A generator that counts how many z it was asked for."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator, self.calls = generator, 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += len(z)
        return self.generator(z)


def classifier() -> nn.Module:
    """Of 8x8 digits, trained on the 1,497 that are not held out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the first weights and the dropout, which take no generator
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
        optimizer, (x, c) = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2), digits()
        for _ in range(500):
            index = torch.randint(len(x), (256,))
            loss = cross_entropy(network(x[index] + 0.3 * torch.randn_like(x[index])), c[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x, c = digits(held_out=True)
    print(f"classifier: {float((network.eval()(x).argmax(1) == c).double().mean()):.3f} of the held-out digits")
    return network


def diversity(x: Tensor) -> Tensor:
    """Root mean square distance of a draw from the mean of its observation's draws: (N, B, *shape) to (B,)."""
    return (x - x.mean(0)).flatten(2).square().sum(-1).mean(0).sqrt()


class Comparison:
    """One generator and one problem."""

    def __init__(self, name: str, label: str, problem: InverseProblem, observations: int, draws: int):
        self.label, self.problem, self.n, self.lines = f"{name}, {label}", problem, draws, []
        self.generator = Generator().manual_seed(0)
        self.counted = Counted(DigitGenerator.from_pretrained(f"priors/digits_{name}"))
        self.prior = GeneratorPrior(self.counted, self.counted.generator.latent)
        problem.bind(self.prior.data_shape)
        self.held = simulate_observations(Posterior(self.prior, problem, "prior"), observations, self.generator)
        self.y = self.held.y
        self.laws = ["prior"] if isinstance(problem, ClassConstraint) else ["prior", "laplace"]
        self.counted.calls, start = 0, time.process_time()
        truth = hmc(self.prior, problem, self.y, 64, self.generator, law=self.laws[-1], **LONG)
        seconds, calls = time.process_time() - start, self.counted.calls / truth.log_w.numel()
        shuffled = truth.x[torch.randperm(len(truth.x), generator=Generator().manual_seed(4))]
        self.truth, other, self.r_hat = shuffled[:draws], shuffled[draws : 2 * draws], float(truth.info["r_hat"].max())
        self.floor = self.far(other)
        self.row(f"truth, R-hat {self.r_hat:.3f}", other, [""] * 4, calls, 1000 * seconds / truth.log_w.numel())

    def far(self, x: Tensor) -> Tensor:
        return sliced_wasserstein(x, self.truth, generator=Generator().manual_seed(1))

    def row(self, method: str, x: Tensor, bounds: list, calls: float, seconds: float) -> None:
        found = self.problem.log_likelihood(x, self.y).mean(0), diversity(x), self.far(x) / self.floor
        cells = [*map(Estimate.of, found), *bounds, f"{calls:.0f}", f"{seconds:.2g}"]
        self.lines.append(f"| {self.label} | {method} | {' | '.join(map(str, cells))} |")
        print(self.lines[-1], flush=True)

    def add(self, method: str, sample: Callable[..., Particles], proposal: Posterior | None = None) -> Particles:
        """Draws of a `proposal` are judged as they come, their weights for the bounds only."""
        self.counted.calls, start = 0, time.process_time()
        draws = sample(y=self.y, n=self.n, generator=Generator().manual_seed(3))
        seconds, calls = time.process_time() - start, self.counted.calls / draws.log_w.numel()
        weighted = bool(draws.log_w.any())
        x = draws.resample(self.n, Generator().manual_seed(2)).x if weighted and proposal is None else draws.x
        bounds = ["", ""] if proposal is None else [Estimate.of(draws.log_w.mean(0)), Estimate.of(self.upper(proposal))]
        bounds += [Estimate.of(draws.log_z), Estimate.of(draws.ess / self.n)] if weighted else ["", ""]
        self.row(method, x, bounds, calls, 1000 * seconds / draws.log_w.numel())
        return draws

    @torch.no_grad()
    def upper(self, posterior: Posterior) -> Tensor:
        """The upper bound of log Z, of the prior's paths that made the y: (B,)."""
        log_q, log_p, log_lik = score(posterior, self.held.paths)
        return eubo(log_p + log_lik - log_q)

    def trained(self, seconds: float, **options) -> Posterior:
        """For about that many CPU seconds."""
        options |= {"bounds": 0, "progress": False, "states": 256, "observations": 16, "draws": 8}
        start = time.process_time()
        fit(Posterior(self.prior, self.problem), 20, 0, **options)
        steps = max(20, int(20 * seconds / (time.process_time() - start)))
        return fit(Posterior(self.prior, self.problem), steps, 0, **options)

    def run(self, seconds: float, sweeps: list[int]) -> Tensor:
        """All methods; the draws of ours, (N, B, 1, 8, 8)."""
        prior, problem = self.prior, self.problem
        for law in self.laws:
            about = "" if law == "prior" else " about Laplace"
            for cost, steps in ((80, 40), (800, 400)):
                options = {"law": law, "steps": steps, "burn_in": steps}
                self.add(f"pCN{about}, {cost}", lambda options=options, **a: pcn(prior, problem, **options, **a))
            for method, leaps, steps in (("MALA, 80", 1, 40), ("HMC, 80", 8, 5), ("HMC, 800", 8, 50)):
                options = {"law": law, "leaps": leaps, "steps": steps, "burn_in": steps}
                self.add(method.replace(",", f"{about},"), lambda options=options, **a: hmc(prior, problem, **options, **a))
        untrained = {"prior, importance": Posterior(prior, problem, "prior"), "ours, untrained": Posterior(prior, problem, "guided")}
        for method, posterior in untrained.items():  # a class is guided by references
            self.add(method, lambda posterior=posterior, **a: importance(posterior, **a), posterior)
        ways = {f"pairs, then {name}": {"warm_start": 0.5, "objective": name} for name in ("rtb", "vargrad", "wake_sleep")}
        for way, options in (ways | {"pairs": {"warm_start": 1.0}}).items():
            start = time.process_time()
            posterior = self.trained(seconds, **options)
            said = f"ours, {time.process_time() - start:.0f} s of {way}"
            draws = self.add(said, lambda posterior=posterior, **a: importance(posterior, **a), posterior)
        self.add("ours, SMC", lambda **a: smc(posterior, **a))
        for k in sweeps:
            self.add(f"ours, re-noised {k} times", lambda k=k, **a: renoise_mcmc(posterior, sweeps=k, **a))
        return draws.x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of each training")
    parser.add_argument("--observations", type=int, default=8)
    parser.add_argument("--draws", type=int, default=128, help="at most 256, half of the truth's")
    parser.add_argument("--generators", nargs="+", default=["vae", "gan"], choices=["vae", "gan"])
    parser.add_argument("--problems", nargs="+", default=["box", "class"], choices=["box", "class"])
    parser.add_argument("--sweeps", nargs="*", type=int, default=[40, 400], help="of re-noising, two evaluations of f each")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines, seen = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"], classifier()
    for name in args.generators:
        known = {"box": Inpainting((1, 8, 8), mask="box", noise_std=0.1), "class": ClassConstraint(seen)}
        for label, problem in ((label, known[label]) for label in args.problems):
            comparison = Comparison(name, label, problem, args.observations, args.draws)
            x = comparison.run(args.seconds, args.sweeps)
            lines += comparison.lines
            print(f"{comparison.label}: R-hat of the truth {comparison.r_hat:.3f}")
            if label == "box":
                y = comparison.y[:8]
                shown = [problem.condition(y)[:, :1], *x[:7, :8]]
                image_grid(torch.stack(shown, 1).flatten(0, 1), args.output / f"digit_generators_{name}.png", columns=8)
            (args.output / "digit_generators.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
