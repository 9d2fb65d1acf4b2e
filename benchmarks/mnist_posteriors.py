"""Posteriors on the MNIST prior: the guided start, and what training makes of it, beside DPS and the prior with importance weights:

    python benchmarks/mnist_posteriors.py [--tasks "inpainting, box" ...] [--steps 0] [--real FOLDER] [--output FOLDER]

Observations simulated from the prior, the same for all rows but those "of real digits": of the test part of MNIST in FOLDER, that nothing
was trained on. Per row:

    log-likelihood      of the draws, in the mean; that of the truth is in the title
    ELBO, EUBO, log Z   bounds of the log evidence (log Z: by importance weights, SMC, or prior draws weighted by their likelihood)
    PSNR, CRPS          of the mean of the draws, which grows with their number, and of the draws one by one, which does not
    spread              root mean square of the pixels' standard deviation over the draws
    coverage            of the pixel-wise intervals whose level is in brackets
    draws per second    of one thread

Each zeta of DPS is the best of five by CRPS on four observations of their own. At 120 steps it runs another chain than the 30-step one of
all other rows. For the problems of `MODES` the classes of draws are counted (by the shipped classifier), on the observations whose own
draws are the least sure, beside those of a long run: SMC with many particles, with the standard error of its log Z by their ancestors;
where that is not small, few of them have survived, and their shares are no reference.

Two processes of one thread; writes mnist_posteriors.md and a panel for each task.
"""

import argparse
import functools
import json
import logging
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from priors import DiffusersPrior, MNISTClassifier
from priors.mnist_data import mnist
from rtb_inverse import Posterior, evaluate, fit, simulate_observations, smc
from rtb_inverse.baselines import dps, tuned_zeta
from rtb_inverse.diagnostics import Estimate, crps, interval_coverage, interval_level, psnr
from rtb_inverse.evaluation import Observations, Report, observe
from rtb_inverse.particles import Particles
from tasks.gallery import EXAMPLES

TASKS = ("inpainting, box", "inpainting, half", "deblurring, Gaussian", "deblurring, saturating", "super-resolution, ×4", "phase retrieval")
MODES = ("inpainting, half", "phase retrieval")
OBSERVATIONS, DRAWS, BANK, LONG, BUDGET, UNSURE = 8, 16, 1024, 256, 4, 2  # BANK: draws of the prior; BUDGET: of SMC, in multiples of K
TRAINING = {
    "states": 64,
    "observations": 4,
    "draws": 4,
    "step_fraction": 0.25,
    "warm_start": 0.95,
    "lr": 5e-4,
    "pool": 1024,
    "pool_start": 1024,
}
PLAIN = str.maketrans({" ": "_", ",": None, "×": "x"})
ZETAS = (0.1, 0.3, 1.0, 3.0, 6.0)
BOUNDS = {"ELBO": "elbo", "log Z": "log_z_is", "EUBO": "eubo"}
COLUMNS = ("log-likelihood", "ELBO", "log Z", "EUBO", "PSNR", "CRPS", "spread", "coverage", "draws per second", "draws")


def numbers(held: Observations, draws: Particles, seconds: float, log_likelihood: Tensor) -> dict[str, Any]:
    """What any draws can be asked."""
    n, level = len(draws.x), interval_level(len(draws.x), 0.9)
    return {
        "log-likelihood": Estimate.of(log_likelihood.mean(0)),
        "PSNR": Estimate.of(psnr(draws.x.mean(0), held.x)),
        "CRPS": Estimate.of(crps(draws.x, held.x)),
        "spread": f"{float(draws.x.var(0).mean().sqrt()):.3f}",
        "coverage": f"{interval_coverage(draws.x, held.x, 0.9).mean():.3f} ({level:.3f})",
        "draws per second": f"{n * draws.x.shape[1] / seconds:.2g}",
        "draws": n,
    }


def timed(work) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


@functools.cache
def prior_draws(folder: str) -> tuple[Tensor, float]:
    """The same for all tasks; and the CPU seconds that they took."""
    return timed(lambda: DiffusersPrior.from_pretrained(folder).sample(BANK, Generator().manual_seed(1)))


def held_out(posterior: Posterior) -> Observations:
    """Four observations to tune rivals on."""
    return simulate_observations(posterior, 4, Generator().manual_seed(999))


def class_shares(classifier: MNISTClassifier, x: Tensor) -> Tensor:
    """Of x (N, B, 1, 28, 28): (B, 10)."""
    classes = classifier(x.flatten(0, 1).clamp(-1, 1)).argmax(1).reshape(x.shape[:2])
    return torch.nn.functional.one_hot(classes, 10).double().mean(0)


def likeness(x: Tensor, other: Tensor) -> Tensor:
    """Cosine of the ink of x (N, B, 1, H, W) and of other (B, 1, H, W), the best over all shifts: (N, B)."""
    ink, like = x + 1, other + 1
    size = [2 * n for n in x.shape[-2:]]
    product = torch.fft.ifft2(torch.fft.fft2(ink, s=size) * torch.fft.fft2(like, s=size).conj()).real
    return product.flatten(2).amax(-1) / (ink.flatten(2).norm(dim=-1) * like.flatten(1).norm(dim=-1))


def twins(truth: Tensor, draws: dict[str, Tensor]) -> list[str]:
    """How many draws are the truth and how many the truth turned by half, which has the same Fourier magnitudes: a likeness above 0.9."""
    lines = ["", "Draws that are the truth, and the truth turned by half, of all draws:", ""]
    for name, x in draws.items():
        upright, turned = likeness(x, truth), likeness(x, truth.flip(-1, -2))
        found = ((like > 0.9) & (like >= other) for like, other in ((upright, turned), (turned, upright)))
        lines.append(f"- {name}: {' and '.join(str(int(which.sum())) for which in found)} of {upright.numel()}")
    return lines


def modes(posterior: Posterior, held: Observations, draws: dict[str, Tensor]) -> list[str]:
    """Class shares of draws, and of a long run, on the observations whose own draws (the first) are least sure of their class."""
    classifier = MNISTClassifier.from_pretrained("priors/mnist_classifier")
    shares = {name: class_shares(classifier, x) for name, x in draws.items()}
    first = next(iter(shares.values()))
    unsure = (-(first * first.clamp_min(1e-9).log()).sum(1)).argsort(descending=True)[:UNSURE]
    run = smc(posterior, held.y[unsure], LONG, Generator().manual_seed(3))
    long = class_shares(classifier, run.resample(LONG, Generator().manual_seed(4)).x)
    lines = ["", f"Class shares, % of 0 to 9, on the {UNSURE} least sure observations.", ""]
    lines += [f"| draws | {' | '.join(f'observation {int(b) + 1}' for b in unsure)} |", "|---" * (UNSURE + 1) + "|"]

    def line(name: str, found: Tensor) -> str:
        return f"| {name} | {' | '.join(' '.join(f'{100 * share:.0f}' for share in row) for row in found)} |"

    errors = " and ".join(f"{error:.2g}" for error in run.log_z_error)
    lines += [line(f"{name}, {len(draws[name])} draws", found[unsure]) for name, found in shares.items()]
    lines.append(line(f"SMC, {LONG} particles, log Z to {errors}", long))
    return lines


@torch.no_grad()
def compare(task: str, args: argparse.Namespace) -> str:
    """One task: its rows as Markdown; its panel is written."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    prior = DiffusersPrior.from_pretrained(args.prior)
    posterior = Posterior(prior, EXAMPLES[task](prior.shape))
    problem, rows = posterior.problem, {}
    held = simulate_observations(posterior, OBSERVATIONS, Generator().manual_seed(12345))

    def add(name: str, draws: Particles, seconds: float, held: Observations = held, **further) -> None:
        rows[name] = numbers(held, draws, seconds, problem.log_likelihood(draws.x, held.y)) | further

    if args.rivals:
        bank, seconds = prior_draws(args.prior)
        bank = bank[:, None].expand(-1, OBSERVATIONS, *bank.shape[1:])
        weighted = Particles(bank, problem.log_likelihood(bank, held.y))
        add("prior, importance", weighted.resample(DRAWS, Generator().manual_seed(2)), seconds, **{"log Z": Estimate.of(weighted.log_z)})

    def judge(name: str, posterior: Posterior, held: Observations = held) -> Report:
        report = evaluate(posterior, held, DRAWS, Generator().manual_seed(54321))
        _, seconds = timed(lambda: posterior.sample(held.y[:4], 8, Generator().manual_seed(0)))
        bounds = {title: report.numbers[of] for title, of in BOUNDS.items() if of in report.numbers}
        add(name, report.draws, seconds * DRAWS * OBSERVATIONS / 32, held, **bounds)
        return report

    judge("ours, one look, no references", Posterior(prior, EXAMPLES[task](prior.shape), second_look=False, references=False))
    report, training = judge("ours, untrained", posterior), 0.0
    if args.steps:
        with torch.enable_grad():
            options = TRAINING | json.loads(args.options)
            _, training = timed(lambda: fit(posterior, args.steps, 0, progress=False, bounds=0, **options))
        report = judge("ours, trained", posterior)
    if args.real:
        digits = observe(posterior, mnist(args.real, "test")[0][:OBSERVATIONS], Generator().manual_seed(12345))
        truth = Estimate.of(problem.log_likelihood(digits.x, digits.y))
        judge(f"{'ours, trained' if args.steps else 'ours, untrained'}, of real digits (truth {truth})", posterior, digits)
    report.save_panel(args.output / f"mnist_{task.translate(PLAIN)}.png", rows=4, columns=10)
    budget = BUDGET * posterior.evaluations()
    corrected, seconds = timed(lambda: smc(posterior, held.y, DRAWS // 2, Generator().manual_seed(0), budget=budget))
    add(f"ours, SMC at {BUDGET} K", corrected, seconds, **{"log Z": Estimate.of(corrected.log_z)})
    zetas, rivals = [], {}
    for multiple, n in ((1, DRAWS), (BUDGET, DRAWS // 4)) if args.rivals else ():
        fine = DiffusersPrior.from_pretrained(args.prior, steps=multiple * prior.steps)
        others, tries = held_out(posterior), 2 if fine.steps > 60 else 4
        zetas.append(tuned_zeta(fine, problem, others.x, others.y, ZETAS, tries, Generator().manual_seed(0)))
        run = functools.partial(dps, fine, problem, held.y, n, Generator().manual_seed(0), zeta=zetas[-1])
        try:
            rivals[f"DPS, {fine.steps} steps"], seconds = timed(run)
        except ValueError as error:  # states that left the finite numbers
            rows[f"DPS, {fine.steps} steps"] = {"log-likelihood": f"failed: {error}"}
            continue
        add(f"DPS, {fine.steps} steps", rivals[f"DPS, {fine.steps} steps"], seconds)
    title = f"### {task}\n\nLog-likelihood of the truth {Estimate.of(problem.log_likelihood(held.x, held.y))}; "
    title += f"{args.steps} steps of training, {training:.0f} CPU s; " if args.steps else ""
    title += f"DPS with zeta {' and '.join(f'{z:g}' for z in zetas)}.\n" if zetas else "ours only.\n"
    lines = [title, *table(rows)]
    if task in MODES:
        drawn = {"ours": report.draws.x} | {name: draws.x for name, draws in rivals.items()}
        lines += modes(posterior, held, drawn) + (twins(held.x, drawn) if task == "phase retrieval" else [])
    return "\n".join(lines)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(str(row.get(column, '')) for column in COLUMNS)} |" for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=0, help="of each training; 0: the guided start only")
    parser.add_argument("--options", default="{}", help="JSON of further training options")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--real", type=Path, help="folder of MNIST")
    parser.add_argument("--prior", default="priors/mnist")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file, found = args.output / "mnist_posteriors.md", {}
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(compare, task, args): task for task in args.tasks}
        for job, task in jobs.items():
            found[task] = job.result()
            file.write_text("\n\n".join(found.values()) + "\n")
            print(found[task], flush=True)


if __name__ == "__main__":
    main()
