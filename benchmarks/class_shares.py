"""Are several modes found, in the right shares? python benchmarks/class_shares.py [--tasks "inpainting, half" ...] [--long 8192]

8x8 digits, and the classes of draws by a small classifier that is trained here in seconds. Of 48 simulated observations those whose own
draws are the least sure of their class. The truth: a long run of ours, weighted by the exact path weights, and one of SMC with as many
particles. These are references as far as they agree, and as their two halves do:

    total variation     half the sum of the absolute differences of the shares, from the first of the references; over observations
    ESS                 effective draws of that reference; a total variation of about .4 sqrt(number of classes / ESS) is its own noise

And where re-noising chains (`renoise_mcmc`, which leaves the posterior as it is) end after --sweeps, from our draws, and from draws of the
prior, of any class: as far as the two agree they have forgotten where they began. DPS with the zeta that is best, by CRPS, on eight other
observations. One thread; prints Markdown.
"""

import argparse

import torch
from digit_generators import classifier
from torch import Generator, Tensor, nn

from priors import DiffusersPrior
from rtb_inverse import Posterior, importance, renoise_mcmc, simulate_observations, smc
from rtb_inverse.baselines import dps, tuned_zeta
from rtb_inverse.diagnostics import Estimate
from rtb_inverse.particles import Particles
from tasks.gallery import EXAMPLES

OBSERVATIONS, LOOK, CHUNK = 48, 32, 512
TASKS = ["inpainting, half", "super-resolution, ×4", "phase retrieval"]
ZETAS = (0.1, 0.3, 1.0, 3.0)


def shares(seen: nn.Module, draws: Particles) -> Tensor:
    """Of the ten classes among weighted draws (N, B): (B, 10)."""
    classes = seen(draws.x.flatten(0, 1)).argmax(1).reshape(draws.x.shape[:2])
    return (draws.weights[..., None] * nn.functional.one_hot(classes, 10)).sum(0)


def distance(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2


def part(draws: Particles, k: int) -> Particles:
    return Particles(draws.x[k::2], draws.log_w[k::2])


@torch.no_grad()
def compare(task: str, prior: DiffusersPrior, seen: nn.Module, o: argparse.Namespace) -> None:
    posterior = Posterior(prior, EXAMPLES[task](prior.shape))
    problem, generator = posterior.problem, Generator().manual_seed(0)
    held, others = simulate_observations(posterior, OBSERVATIONS, generator), simulate_observations(posterior, 8, generator)
    zeta = tuned_zeta(prior, problem, others.x, others.y, ZETAS, 8, generator)
    look = shares(seen, posterior.sample(held.y, LOOK, generator))
    y = held.y[(look * look.clamp_min(1e-9).log()).sum(1).argsort()[: o.observations]]
    plain = {
        f"ours, {o.draws} draws": posterior.sample(y, o.draws, generator),
        f"DPS, {prior.steps} steps, zeta {zeta:g}": dps(prior, problem, y, o.draws, generator, zeta=zeta, batch_size=CHUNK),
    }
    long = importance(posterior, y, o.long, generator, batch_size=CHUNK)
    particles = smc(posterior, y, o.long, generator)
    truth, halves = shares(seen, long), [distance(shares(seen, part(d, 0)), shares(seen, part(d, 1))) for d in (long, particles)]
    anywhere = prior.draws[torch.randint(len(prior.draws), (o.chains * len(y),), generator=generator)].unflatten(0, (o.chains, len(y)))
    for name, start in {"our draws": posterior.sample(y, o.chains, generator).x, "the prior's": anywhere}.items() if o.sweeps else ():
        chains = renoise_mcmc(posterior, y, o.chains, generator, sweeps=o.sweeps, start=start, progress=True)
        accepted = Estimate.of(chains.info["acceptance"])
        plain[f"{o.chains} chains, {o.sweeps} sweeps from {name} ({accepted} accepted)"] = chains
    found = {name: shares(seen, draws) for name, draws in plain.items()} | {
        f"SMC, {o.long} particles": shares(seen, particles),
        f"ours, weighted, {o.long} draws": truth,
    }
    print(f"\n#### {task}\n\n| draws | total variation | its own halves | ESS | shares of 0 to 9, %, by observation |")
    print("|---|---|---|---|---|")
    of = {f"SMC, {o.long} particles": (halves[1], None), f"ours, weighted, {o.long} draws": (halves[0], long.ess)}
    for name, p in found.items():
        own, ess = of.get(name, (None, None))
        cells = ["" if p is truth else str(Estimate.of(distance(p, truth)))]
        cells += ["" if value is None else str(Estimate.of(value)) for value in (own, ess)]
        print(f"| {name} | {' | '.join(cells)} | {'; '.join(' '.join(f'{100 * s:.0f}' for s in row) for row in p)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=list(EXAMPLES))
    for name, default in {"observations": 6, "draws": 512, "long": 8192, "chains": 64, "sweeps": 60}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    torch.set_num_threads(1)
    prior, seen = DiffusersPrior.from_pretrained("priors/digits"), classifier().eval()
    for task in o.tasks:
        compare(task, prior, seen, o)


if __name__ == "__main__":
    main()
