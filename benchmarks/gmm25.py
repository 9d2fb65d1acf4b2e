"""A reward without observation: from 25 Gaussians to 9 of them.

    python benchmarks/gmm25.py [--seconds 200] [--seeds 3]

Prior: 25 Gaussians at {-10, -5, 0, 5, 10}^2, covariance 0.3 I, equal weights. Target: nine of them with weights [4,10,4,5,10,5,4,15,4]/61,
as the reward log p_target - log p_prior, so that the true log Z is 0. One CPU thread. Prints, per seed: total variation of the mode
weights and 2-D W2 to 2,440 stratified target draws, without any correction; beside them importance resampling of prior draws, and
true draws (the floor).
"""

import argparse
import logging
import time
import warnings

import ot
import torch
from torch import Tensor

from priors import GaussianMixturePrior
from rtb_inverse import Posterior, Reward, fit
from rtb_inverse.diagnostics import effective_sample_size, total_variation
from rtb_inverse.schedules import VariancePreserving

MODES = torch.tensor([[-10, -5], [-5, -10], [-5, 0], [10, -5], [0, 0], [0, 5], [5, -5], [5, 0], [5, 10]]).float()
COUNTS = torch.tensor([4, 10, 4, 5, 10, 5, 4, 15, 4])
DRAWS = 2440


def mixture(means: Tensor, weights: Tensor, steps: int) -> GaussianMixturePrior:
    schedule = VariancePreserving(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type="sample")
    return GaussianMixturePrior(weights, means, 0.3 * torch.eye(2).expand(len(means), 2, 2), schedule, steps)


def stratified_draws(generator) -> Tensor:
    """2,440 = 40 x 61 target draws with exactly the target's mode counts."""
    centres = MODES.repeat_interleave(COUNTS * (DRAWS // int(COUNTS.sum())), 0)
    return centres + 0.3**0.5 * torch.randn(centres.shape, generator=generator)


def judge(x: Tensor, grid: Tensor, truth: Tensor) -> tuple[float, float]:
    """Total variation of mode weights (nearest of the 25) and W2."""
    counts = torch.bincount(torch.cdist(x, grid).argmin(1), minlength=len(grid)).double()
    target = torch.zeros(len(grid), dtype=torch.float64)
    target[torch.cdist(MODES, grid).argmin(1)] = COUNTS.double()
    tv = total_variation(counts / counts.sum(), target / target.sum())
    w2 = ot.emd2([], [], ot.dist(x.double().numpy(), truth.double().numpy()), numItermax=2_000_000) ** 0.5
    return float(tv), float(w2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of the chain")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    axis = torch.tensor([-10.0, -5.0, 0.0, 5.0, 10.0])
    grid = torch.cartesian_prod(axis, axis)
    prior, target = mixture(grid, torch.ones(25), args.steps), mixture(MODES, COUNTS.float(), args.steps)

    def log_reward(x: Tensor) -> Tensor:
        return target.distribution.log_prob(x) - prior.distribution.log_prob(x)

    generator = torch.Generator().manual_seed(0)
    truth = stratified_draws(generator)
    print("| sampler | seed | TV of mode weights | W2 | learned log Z | ESS / n | network evaluations | CPU s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for seed in range(args.seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        tv, w2 = judge(target.sample(DRAWS, generator), grid, truth)
        print(f"| target's own draws (floor) | {seed} | {tv:.3f} | {w2:.2f} | | | | |")
        x = prior.sample(100_000, generator)
        log_w = log_reward(x)[:, None]
        pick = torch.multinomial(log_w[:, 0].softmax(0), DRAWS, replacement=True, generator=generator)
        tv, w2 = judge(x[pick], grid, truth)
        print(
            f"| 100,000 prior draws, resampled | {seed} | {tv:.3f} | {w2:.2f} | | {float(effective_sample_size(log_w)) / len(x):.2f} | | |",
            flush=True,
        )

        options = {"states": 1024, "pool_start": 4096, "pool_growth": 1024, "pool": 32768, "refresh": 20, "lr": 2e-3, "warm_start": 0.9}
        options |= {"draws": 256, "observations": 1, "chunk_size": None, "progress": False}
        start = time.process_time()
        fit(Posterior(prior, Reward(log_reward)), 40, seed, **options)
        steps = int(40 * args.seconds / (time.process_time() - start))
        posterior, start = Posterior(prior, Reward(log_reward)), time.process_time()
        evaluations = count_evaluations(posterior.network)
        fit(posterior, steps, seed, **options)
        seconds, trained = time.process_time() - start, evaluations[0]
        draws = posterior.sample(None, DRAWS, torch.Generator().manual_seed(seed))
        tv, w2 = judge(draws.x[:, 0], grid, truth)
        log_z = float(posterior.log_evidence(None).detach())
        print(f"| RTB, no correction | {seed} | {tv:.3f} | {w2:.2f} | {log_z:.3f} | | {trained:,} | {seconds:.0f} |", flush=True)


def count_evaluations(network: torch.nn.Module) -> list[int]:
    """A counter of states that pass through the network."""
    count = [0]

    def hook(module, args):
        count[0] += args[1][..., 0].numel()

    network.register_forward_pre_hook(hook)
    return count


if __name__ == "__main__":
    main()
