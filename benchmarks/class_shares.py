"""Are several modes found, in the right shares? python benchmarks/class_shares.py [--prior digits] [--tasks "inpainting, half" ...]

The classes of draws by a classifier (of the 8x8 digits a small one that is trained here in seconds), in phase retrieval also those that are
the truth and the truth turned by half (likeness above 0.9 at the best shift). Of --look simulated observations those whose own draws are
the least sure of their class; then --steps of training. References, as far as they agree (without any, our plain draws):

    long      a run of ours of so many draws, weighted by the exact path weights, and SMC with as many particles, each --runs times, joined
              by their evidence; 0: none
    chains    where re-noising chains (`renoise_mcmc`, which leaves the posterior as it is) end after --sweeps, from our draws, and from
              draws of the prior, of any class: as far as the two agree they have forgotten where they began; 0: none

    total variation     half the sum of the absolute differences of the shares, from the first reference; over observations
    its own halves      that of its two halves, of the runs (if there are an even number; of one run they share ancestors) or of the
                        chains, from one another
    ESS                 effective draws; a total variation of about .4 sqrt(number of classes / ESS) is its own noise

DPS has the zeta that is best, by CRPS, on eight other observations. One thread; prints Markdown.
"""

import argparse
from functools import partial

import torch
from digit_generators import classifier
from mnist_posteriors import TRAINING, likeness
from torch import Generator, Tensor, nn

from priors import DiffusersPrior, MNISTClassifier
from rtb_inverse import Posterior, fit, importance, renoise_mcmc, simulate_observations, smc
from rtb_inverse.baselines import dps, tuned_zeta
from rtb_inverse.diagnostics import Estimate
from rtb_inverse.particles import Particles
from tasks import Inpainting, PhaseRetrieval
from tasks.gallery import EXAMPLES

OWN, CHUNK = 32, 512
TASKS = ["inpainting, half", "super-resolution, ×4", "phase retrieval"]
PROBLEMS = EXAMPLES | {
    "inpainting, half, noise 1": partial(Inpainting, mask="half", noise_std=1.0),
    "phase retrieval, noise 0.1": partial(PhaseRetrieval, noise_std=0.1),
}
ZETAS = (0.1, 0.3, 1.0, 3.0)


def shares(seen: nn.Module, draws: Particles) -> Tensor:
    """Of the ten classes among weighted draws (N, B): (B, 10)."""
    classes = seen(draws.x.flatten(0, 1).clamp(-1, 1)).argmax(1).reshape(draws.x.shape[:2])
    return (draws.weights[..., None] * nn.functional.one_hot(classes, 10)).sum(0)


def twins(x: Tensor, draws: Particles) -> Tensor:
    """Of the truth (B, *shape), and of it turned, among weighted draws: (B, 2)."""
    like = torch.stack([likeness(draws.x, x), likeness(draws.x, x.flip(-1, -2))], -1)
    found = (like > 0.9) & (like == like.amax(-1, keepdim=True))
    return (draws.weights[..., None] * found).sum(0)


def percent(shares: Tensor) -> str:
    return "; ".join(" ".join(f"{100 * share:.0f}" for share in row) for row in shares)


def distance(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2


def part(draws: Particles, k: int) -> Particles:
    half = len(draws.x) // 2
    own = slice(k * half, (k + 1) * half)
    return Particles(draws.x[own], draws.log_w[own])


def joined(runs: list[Particles]) -> Particles:
    return Particles(torch.cat([run.x for run in runs]), torch.cat([run.log_w for run in runs]))


@torch.no_grad()
def compare(task: str, prior: DiffusersPrior, seen: nn.Module, o: argparse.Namespace) -> None:
    posterior = Posterior(prior, PROBLEMS[task](prior.shape))
    problem, generator = posterior.problem, Generator().manual_seed(0)
    held, others = simulate_observations(posterior, o.look, generator), simulate_observations(posterior, 8, generator)
    own = shares(seen, posterior.sample(held.y, OWN, generator))
    unsure = (own * own.clamp_min(1e-9).log()).sum(1).argsort()[: o.observations]
    x, y = held.x[unsure], held.y[unsure]
    if o.steps:
        with torch.enable_grad():
            fit(posterior, o.steps, 0, bounds=0, **TRAINING)
    references, plain = {}, {f"ours, {o.draws} draws": posterior.sample(y, o.draws, generator)}
    if o.rivals:
        zeta = tuned_zeta(prior, problem, others.x, others.y, ZETAS, 8, generator)
        draws = dps(prior, problem, y, o.draws, generator, zeta=zeta, batch_size=CHUNK)
        plain[f"DPS, {prior.steps} steps, zeta {zeta:g}"] = draws
    if o.long:
        for name, run in {"ours, weighted": partial(importance, batch_size=CHUNK), "SMC": smc}.items():
            runs = [run(posterior, y, o.long, generator) for _ in range(o.runs)]
            log_z = torch.stack([one.log_z for one in runs])
            spread = f"; log Z of a run ± {float(log_z.std(0).square().mean().sqrt()):.2f}" if o.runs > 1 else ""
            references[f"{name}, {o.runs} × {o.long}{spread}"] = joined(runs)
    if o.sweeps:
        anywhere = prior.draws[torch.randint(len(prior.draws), (o.chains * len(y),), generator=generator)].unflatten(0, (o.chains, len(y)))
        starts = {"ours": ("our draws", posterior.sample(y, o.chains, generator).x), "prior": ("the prior's", anywhere)}
        for name, start in (starts[which] for which in o.starts):
            draws = renoise_mcmc(posterior, y, o.chains, generator, sweeps=o.sweeps, start=start, progress=True)
            accepted = Estimate.of(draws.info["acceptance"])
            references[f"{o.chains} chains, {o.sweeps} sweeps from {name} ({accepted} accepted)"] = draws
    truth = shares(seen, next(iter((references or plain).values())))
    turned = " truth and turned, % |" if "phase" in task else ""
    print(f"\n#### {task}\n\n| draws | total variation | its own halves | ESS | shares of 0 to 9, %, by observation |{turned}")
    print("|---" * (6 if turned else 5) + "|")
    for name, draws in (plain | references).items():
        p = shares(seen, draws)
        cells = [str(Estimate.of(distance(p, truth)))]
        cells += [str(Estimate.of(distance(shares(seen, part(draws, 0)), shares(seen, part(draws, 1))))) if name in references else ""]
        cells += [str(Estimate.of(draws.ess)) if draws.log_w.any() else ""]
        cells += [percent(p)] + ([percent(twins(x, draws))] if turned else [])
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=list(PROBLEMS))
    parser.add_argument("--prior", default="digits", choices=["digits", "mnist"])
    parser.add_argument("--starts", nargs="+", default=["ours", "prior"], choices=["ours", "prior"], help="of the chains")
    parser.add_argument("--rivals", default=True, action=argparse.BooleanOptionalAction)
    for name, default in {
        "look": 48,
        "observations": 6,
        "draws": 512,
        "long": 8192,
        "runs": 1,
        "chains": 64,
        "sweeps": 60,
        "steps": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    torch.set_num_threads(1)
    prior = DiffusersPrior.from_pretrained(f"priors/{o.prior}")
    seen = classifier().eval() if o.prior == "digits" else MNISTClassifier.from_pretrained("priors/mnist_classifier")
    for task in o.tasks:
        compare(task, prior, seen, o)


if __name__ == "__main__":
    main()
