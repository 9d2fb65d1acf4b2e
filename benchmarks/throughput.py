"""Training and sampling against the raw network, in one run: python benchmarks/throughput.py [--device cpu] [--repeats 7]

Digits network, K = 20, batch 64. Each ratio is (time of the bare network calls) / (time of the whole), the same number of evaluations
in the same batches, alternating, medians. Sampling: K calls, and one for each second look. A training iteration of RTB on 64 on-policy
paths: the same to roll out, then K x 64 states through the prior, and forward and backward through the posterior, in chunks of 64. First
without second looks, then with them.
"""

import argparse
import statistics
import time

import torch

from priors import DiffusersPrior
from rtb_inverse import Posterior, rollout
from rtb_inverse.behaviours import Pool
from rtb_inverse.chains import step_shares
from rtb_inverse.objectives import vargrad
from rtb_inverse.training import denoising_loss, path_backward, score, step_weights
from tasks import Inpainting

BATCH, STEPS = 64, 20


def main() -> None:
    print(f"torch {torch.__version__}, batch {BATCH}, K = {STEPS}")
    print("| second look | what | bare network, ms | whole, ms | ratio |\n|---|---|---|---|---|")
    for second_look in (False, True):
        measure(arguments(), second_look)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def measure(args: argparse.Namespace, second_look: bool) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=STEPS).to(device)
    posterior = Posterior(prior, Inpainting(prior.shape).to(device), second_look=second_look)
    looks = posterior.looks if second_look else torch.zeros(STEPS, dtype=torch.bool)
    calls = STEPS + int(looks.sum())
    generator = torch.Generator(device).manual_seed(0)
    y = posterior.problem.simulate(prior.sample(BATCH // 8, generator), generator)
    network, wide = prior.network, posterior.network.network
    x = torch.randn((BATCH, 1, 8, 8), device=device)
    seen = torch.randn((BATCH, 1 + posterior.network.extra, 8, 8), device=device)
    t = torch.full((BATCH,), 500.0, device=device)
    pool, weights = Pool(posterior), step_weights(posterior)
    pool.grow(4 * BATCH, generator)

    def raw_sampling():
        with torch.no_grad():
            for _ in range(calls):
                wide(seen, t)

    def sampling():
        posterior.sample(y, BATCH // len(y), generator)

    def backward(count, inputs=seen):
        for _ in range(count):
            wide(inputs, t.repeat(len(inputs) // BATCH)).sample.square().sum().backward()

    def raw_training():
        raw_sampling()
        with torch.no_grad():
            for _ in range(STEPS):
                network(x, t)
        backward(calls)

    def training():
        paths = rollout(posterior, BATCH // len(y), y, generator)
        log_q, log_p, log_lik = score(posterior, paths, BATCH)
        path_backward(posterior, paths, log_q, lambda log_q: vargrad(log_q, log_p, log_lik), chunk_size=BATCH)

    again = 4 * BATCH * float(step_shares(prior)[looks.flip(0)].sum())  # states of a warm step that are looked at twice

    def raw_warm():
        backward(1, seen.repeat(4, 1, 1, 1))
        backward(round(again / BATCH))

    def warm():
        denoising_loss(posterior, *pool.bridges(4 * BATCH, generator), weights).backward()

    pairs = {
        "sampling": (raw_sampling, sampling),
        "RTB iteration": (raw_training, training),
        "warm-start step (256 states)": (raw_warm, warm),
    }
    for name, (raw, whole) in pairs.items():
        times: dict = {raw: [], whole: []}
        for repeat in range(args.repeats + 1):
            for function in (raw, whole):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first round warms up
                    times[function].append(time.perf_counter() - start)
        bare, total = (1e3 * statistics.median(times[function]) for function in (raw, whole))
        ratio = statistics.median(a / b for a, b in zip(times[raw], times[whole], strict=True))
        print(f"| {'yes' if second_look else 'no'} | {name} | {bare:.0f} | {total:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
