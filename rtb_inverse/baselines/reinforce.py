r"""REINFORCE on paths, regularised towards the prior by the reverse KL.

The objective is the free energy F = E_q[- log lik] + KL(q || p), least, and - log Z(y), where q is the posterior. With the score
function its gradient over paths tau_1 .. tau_N drawn from q itself is, with c the cost and its leave-one-out mean as the baseline,

    grad F = E 1/N sum_n (c_n - mean_{m != n} c_m) grad log q(tau_n),        c = - log lik + log q - log p

Schulman ("Approximating KL divergence", 2020) estimates the *value* of KL(q || p) from r = p / q by

    k1 = - log r        k2 = (log r)^2 / 2        k3 = r - 1 - log r

An estimator enters a gradient at one of two places: detached, as a part of the cost c ("reward"), or differentiated beside it ("loss").
What the expected gradient of the KL term then is:

            "reward"                                    "loss"
    k1      grad KL(q || p)                             0
    k2      grad E_q k2, k2 held fixed                  grad KL(q || p)
    k3      grad (KL(q || p) - KL(p || q))              grad KL(p || q)

Only k1 in the reward and k2 in the loss descend F; an unbiased value (k1, k3) does not make an unbiased gradient, nor a biased one (k2)
a biased one. The first is, path by path, N / (N - 1) times the on-policy gradient of VarGrad, and in expectation that of RTB and of
path-level Trust-PCL (Nachum et al. 2018, arXiv 1707.01891) whatever their log Z.
"""

from torch import Tensor

from rtb_inverse.checks import check_choice

ESTIMATORS = {
    "k1": lambda log_r: -log_r,
    "k2": lambda log_r: log_r.square() / 2,
    "k3": lambda log_r: log_r.expm1() - log_r,
}
PLACES = ("reward", "loss")
UNBIASED = (("k1", "reward"), ("k2", "loss"))


def reinforce(
    log_q: Tensor, log_p: Tensor, log_lik: Tensor, kl: str = "k1", place: str = "reward", allow_biased: bool = False
) -> Tensor:  # fmt: skip
    r"""A loss whose gradient, at paths drawn from q itself, estimates that of E_q[- log lik] + KL(q || p), mean over observations.

    Args:
        log_q: log q(tau | y), (N, B), differentiable in q's parameters, at paths that are held fixed (not reparametrised); N at least 2.
        log_p: log p(tau), (N, B). log_lik: beta log p(y | x_0), (N, B).
        kl: "k1", "k2" or "k3". place: "reward" or "loss".
        allow_biased: also offer the pairs whose gradient is another one: see the module.

    Returns:
        A number whose gradient in log_q is meant; its value is not the objective's.

    Raises:
        ValueError: fewer than two paths; another name; a biased pair where it is not allowed.
    """
    check_choice("kl", kl, ESTIMATORS), check_choice("place", place, PLACES)
    if len(log_q) < 2:
        raise ValueError(f"reinforce needs at least 2 paths per observation, got {len(log_q)}")
    if (kl, place) not in UNBIASED and not allow_biased:
        good = " or ".join(f"kl={k!r} with place={p!r}" for k, p in UNBIASED)
        raise ValueError(f"kl={kl!r} with place={place!r} has not the gradient of KL(q || p); expected {good}, or allow_biased=True")
    penalty = ESTIMATORS[kl](log_p.detach() - log_q)
    cost = penalty.detach() - log_lik.detach() if place == "reward" else -log_lik.detach()
    loss = (leave_one_out(cost) * log_q).mean()
    return loss + penalty.mean() if place == "loss" else loss


def leave_one_out(cost: Tensor) -> Tensor:
    """cost (N, B) less the mean of the other N - 1 of its observation."""
    return (cost - cost.mean(0)) * (len(cost) / (len(cost) - 1))
