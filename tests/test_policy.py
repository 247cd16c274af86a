"""train_policy.py: the advantages by hand, the gradient of the loss, PyTorch's, and a short run."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import require, running
from test_distributed import run

from gru_any import load, to_numpy

SCRIPTS = Path(__file__).parent.parent / "scripts"
QUICK = ["--backend", "numpy", "--quiet", "--log-every", "2", "--envs", "4", "--parts", "2"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    monkeypatch.syspath_prepend(SCRIPTS)


def test_advantages_by_hand():
    """Two rows: an episode that goes on beyond the rollout, and one that ends after two steps."""
    import ppo

    rewards = np.array([[1.0, 1.0], [0.0, 3.0], [2.0, 5.0]])
    values = np.array([[4.0, 1.0], [2.0, 1.0], [1.0, 2.0], [3.0, 7.0]])
    done = np.array([[False, False], [False, True], [False, True]])
    found = ppo.gae(rewards, values, done, 0.5, 0.5)
    # row 0: deltas 1 + 1 - 4, 0 + 0.5 - 2, 2 + 1.5 - 1; row 1: 1 + 0.5 - 1, 3 - 1, 5 - 2
    by_hand = [[-2 + (-1.5 + 2.5 / 4) / 4, 0.5 + 2 / 4], [-1.5 + 2.5 / 4, 2], [2.5, 3]]
    assert np.allclose(found, by_hand, rtol=0, atol=1e-15)


def some(T=5, N=3, choices=4, seed=0):
    """y and a rollout in float64, with ratios on both sides of each bound."""
    from ppo import Rollout, log_softmax

    rng = np.random.default_rng(seed)
    y = rng.standard_normal((T, N, choices + 1))
    actions = rng.integers(0, choices, (T, N))
    logp = np.take_along_axis(log_softmax(y[..., :-1]), actions[..., None], -1)[..., 0]
    A, G, x = rng.standard_normal((3, T, N))
    moved = logp - rng.uniform(-0.5, 0.5, (T, N))
    return y, Rollout(x, x > 0, x, actions, moved, A, G)


@pytest.mark.parametrize("weights", [(0.2, 0.0, 0.0), (0.2, 0.5, 0.0), (0.2, 0.0, 0.3), (9, 1, 1)])
def test_gradient_of_the_loss(weights):
    """Each term alone, and all together, by central differences."""
    import ppo

    y, part = some()
    value, dy = ppo.ppo_loss(y, part, *weights, part.actions.size)
    numeric = np.empty_like(y)
    for at in np.ndindex(*y.shape):
        e = np.zeros_like(y)
        e[at] = 1e-6
        up, down = (ppo.ppo_loss(v, part, *weights, part.actions.size)[0] for v in (y + e, y - e))
        numeric[at] = (up - down) / 2e-6
    assert np.abs(dy - numeric).max() < 1e-9
    assert np.isfinite(value)
    if weights == (0.2, 0.0, 0.0):  # a ratio beyond its bound gives no gradient, one within does
        still = (dy[..., :-1] == 0).all(axis=-1)
        assert 0 < still.sum() < still.size


def test_the_terms_of_the_loss_by_hand():
    """Even odds between two actions: H = log 2; ratios 1 / 0.25 = 2 and 0.5 / 1 = 0.5."""
    import ppo

    y = np.array([[[0.0, 0.0, 3.0], [0.0, 0.0, 1.0]]])
    logp, zero = np.log([[0.25, 1.0]]), np.zeros((1, 2))
    part = ppo.Rollout(zero, zero, zero, np.zeros((1, 2), int), logp, *np.ones((2, 1, 2)))
    policy = -(1.2 + 0.5) / 2  # of the first the clipped ratio counts, of the second the ratio
    assert ppo.ppo_loss(y, part, 0.2, 0.0, 0.0, 2)[0] == pytest.approx(policy)
    assert ppo.ppo_loss(y, part, 0.2, 1.0, 0.0, 2)[0] == pytest.approx(policy + (4 / 2 + 0) / 2)
    assert ppo.ppo_loss(y, part, 0.2, 0.0, 1.0, 2)[0] == pytest.approx(policy - np.log(2))


@pytest.mark.parametrize("cell", [False, True], ids=["GRU", "GRUCell"])
def test_pytorch_computes_the_same(cell):
    """Its loop over steps, with autograd: loss, gradients, and the weights after three updates."""
    torch = require("torch")
    import compare_policy
    import ppo
    from on_torch import twin

    from gru_any import Adam

    part = compare_policy.rollout(12, 3, 5, episode=4, dtype="float64")
    assert part.resets[1:].any()
    model = compare_policy.policy(5, dtype="float64")
    layers = twin(model).double()
    for name, weight in layers.named_parameters():
        weight.data = torch.tensor(model.params[name])  # in float64
    layers = compare_policy.cells(layers) if cell else layers
    tensors = ppo.Rollout(*map(torch.tensor, part))
    theirs = compare_policy.loss(compare_policy.loop(layers, tensors), tensors)
    theirs.backward()
    with running("traced"):
        (y, _), pullback = model.vjp(part.x, [part.h0], resets=part.resets)
        weights = compare_policy.EPS, compare_policy.A, compare_policy.B
        value, dy = ppo.ppo_loss(y, part, *weights, part.actions.size)
        grads, _, _ = pullback(dy)
        assert value == pytest.approx(theirs.item(), rel=1e-12)
        for name, weight in zip(model.params, layers.parameters(), strict=True):
            assert np.allclose(grads[name], weight.grad.numpy(), rtol=0, atol=1e-12), name
        optimiser = Adam(model.params, lr=compare_policy.RATE)
        call = compare_policy.torch_update(layers, part)
        for _ in range(3):
            ppo.update(model, optimiser, part, *weights, compare_policy.CLIP, part.actions.size)
            call()
    for ours, weight in zip(model.params.values(), layers.parameters(), strict=True):
        assert np.allclose(to_numpy(ours), weight.detach().numpy(), rtol=0, atol=1e-7)


# with popgym -------------------------------------------------------------------------------------


@pytest.fixture
def policy():
    require("popgym")
    import train_policy

    with running("traced"):
        yield train_policy


def test_a_run_resumes_bit_for_bit(policy, tmp_path, capsys):
    """Stopped in the middle of episodes, it ends with the weights and the log of one run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = [*QUICK, "--length", "20", "--hidden", "6"]
    policy.main([*command, "--steps", "480", "--out", str(whole)])
    for steps in ("320", "480"):
        policy.main([*command, "--steps", steps, "--out", str(parts)])
    assert "goes on after rollout 4" in capsys.readouterr().out
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (out / "log.jsonl").read_text().split("\n")
         if line] for out in (whole, parts)
    ]  # fmt: skip
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
    assert (whole / "return.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"gamma was 0\.99 and is now 0\.5"):
        policy.main([*command, "--gamma", "0.5", "--out", str(parts)])


def test_it_learns(policy, tmp_path):
    """No action changes a later card, so without a discounted future the task is easy."""
    policy.main([*QUICK, "--hidden", "24", "--envs", "16", "--steps", "14000", "--gamma", "0",
                 "--rate", "0.01", "--parts", "4", "--out", str(tmp_path)])  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["highest"] > 0  # chance has -0.5; the best policy 1


def test_a_rollout_is_what_the_policy_did(policy):
    """Read in one call, it has the probabilities and values that were met step by step."""
    import ppo

    from gru_any import Adam
    from gru_any.stream import Stream
    from gru_any.train.distributed import Alone

    args = policy.parse([*QUICK, "--length", "70", "--hidden", "6"])
    model = policy.build(args)
    envs = policy.Environments(args.task, range(4), 0)
    run = policy.Run(Stream(model), Adam(model.params), envs, Alone(), lambda: "")
    run.stream.state = [np.zeros((1, 4, 6), "float32")]
    first, second = (policy.collect(run, np.random.default_rng(n), args) for n in range(2))
    assert first.resets[0].all()
    assert first.resets.sum() == second.resets.sum() + 4 == 8  # episodes of 51 steps
    y, state = model(second.x, [second.h0], resets=second.resets)
    logp = np.take_along_axis(ppo.log_softmax(y[..., :-1]), second.actions[..., None], -1)[..., 0]
    assert np.allclose(logp, second.logp, rtol=0, atol=1e-5)
    assert np.allclose(second.returns - second.advantages, y[..., -1], rtol=0, atol=1e-5)
    assert np.allclose(state[0], run.stream.state[0], rtol=0, atol=1e-5)


def test_ranks_share_the_environments(policy, tmp_path):
    """Some without a row in some parts; and two ranks go on where three have stopped."""
    command = ["--envs", "5", "--parts", "3", "--length", "20", "--hidden", "6"]
    script = [SCRIPTS / "train_policy.py", *QUICK, *command, "--distributed"]
    policy.main([*QUICK, *command, "--steps", "600", "--out", str(tmp_path / "alone")])
    run(3, *script, "--steps", 400, "--out", tmp_path / "ranks")
    text = run(2, *script, "--steps", 600, "--out", tmp_path / "ranks")
    assert "goes on after rollout 4" in text
    ours, theirs = (load(tmp_path / name / "model.safetensors") for name in ("alone", "ranks"))
    for name, array in theirs.params.items():
        assert np.abs(array - ours.params[name]).max() < 1e-5, name
    kept, found = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text("utf-8").split("\n")
         if line] for name in ("alone", "ranks")
    )  # fmt: skip
    assert [r["step"] for r in found] == [r["step"] for r in kept] == [200, 400, 600]
    assert [r.get("return") for r in found] == [r.get("return") for r in kept]
    assert "--envs 2 cannot be shared among 3 ranks" in run(
        3, SCRIPTS / "train_policy.py", "--distributed", "--envs", 2, "--out", tmp_path, code=1
    )
