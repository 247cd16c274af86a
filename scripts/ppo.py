"""Proximal policy optimisation: the advantages of a rollout, and the loss with its gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gru_any import Adam, Chain, clip_by_global_norm, to_numpy

Total: TypeAlias = Callable[[dict[str, Any], float], tuple[dict[str, Any], float]]


class Rollout(NamedTuple):
    """T steps of N environments; (T, N) where nothing else is said."""

    x: np.ndarray  # (T, N, I): what is observed
    resets: np.ndarray  # of bool: an episode begins
    h0: np.ndarray  # (1, N, H): the state before the first step
    actions: np.ndarray
    logp: np.ndarray  # log of the probability with which the action was drawn
    advantages: np.ndarray
    returns: np.ndarray  # what the value should have been


def gae(
    rewards: np.ndarray, values: np.ndarray, done: np.ndarray, gamma: float, trace: float
) -> np.ndarray:
    """Return the generalised advantages A (T, N) of Schulman et al. 2016; values: (T + 1, N).

    delta_t = r_t + gamma v_(t+1) - v_t;  A_t = delta_t + gamma trace A_(t+1)

    After the last step of an episode v and A are 0.
    """
    advantages, following = np.zeros_like(rewards), np.zeros_like(rewards[0])
    for t in range(len(rewards) - 1, -1, -1):
        kept = np.where(done[t], 0.0, gamma).astype(rewards.dtype)
        following = rewards[t] + kept * (values[t + 1] + trace * following) - values[t]
        advantages[t] = following
    return advantages


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return the log of the probabilities, along the last axis."""
    scores = scores - scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def ppo_loss(
    y: np.ndarray, part: Rollout, eps: float, a: float, b: float, count: int
) -> tuple[float, np.ndarray]:
    """Return the loss of Schulman et al. 2017 and dL/dy; y (T, N, A + 1): scores s, then value v.

    count: T N of all parts of which the losses are added; that of this one, if it is alone.

    p = softmax(s);  q = p(action) / p_old(action);  H = -sum(p log p);  c = clip(q, 1 -+ eps)
    L = sum( -min(q A, c A) + a (v - G)^2 / 2 - b H ) / count      A: advantage, G: return

    dL/ds = ( -q A (onehot - p) + b p (log p + H) ) / count          without -q A where q A > c A
    dL/dv = a (v - G) / count
    """
    logp, error = log_softmax(y[..., :-1]), y[..., -1] - part.returns
    p, hot = np.exp(logp), np.eye(y.shape[-1] - 1, dtype=y.dtype)[part.actions]
    q = np.exp((hot * logp).sum(axis=-1) - part.logp)
    gain, clipped = q * part.advantages, np.clip(q, 1 - eps, 1 + eps) * part.advantages
    H = -(p * logp).sum(axis=-1)
    value = (-np.minimum(gain, clipped) + a * error * error / 2 - b * H).sum() / count
    slope = np.where(gain > clipped, 0, gain)[..., None]
    ds = -slope * (hot - p) + b * p * (logp + H[..., None])
    dy = np.concatenate((ds, a * error[..., None]), axis=-1)
    return float(value), dy / y.dtype.type(count)


def update(
    model: Chain,
    optimiser: Adam,
    part: Rollout,
    eps: float,
    a: float,
    b: float,
    clip: float,
    count: int,
    total: Total = lambda grads, value: (grads, value),
) -> float:
    """Change the weights by the gradient of a rollout, all episodes in one call; return the loss.

    eps, a, b, count : of `ppo_loss`
    clip : the largest norm of the gradient
    total : returns the sums of gradient and loss over all processes that share the rollout
    """
    put = model.backend.put
    (y, _), pullback = model.vjp(put(part.x), [put(part.h0)], resets=part.resets)
    value, dy = ppo_loss(to_numpy(y), part, eps, a, b, count)
    grads, value = total(pullback(put(dy))[0], value)
    clip_by_global_norm(grads, clip)
    optimiser.step(model.params, grads)
    return value
