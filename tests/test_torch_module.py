"""A GRU of ours inside of a PyTorch model."""

import copy

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, convert

torch = require("torch")
T, B, I, H = 4, 3, 2, 3
SETTINGS = [
    {},
    {"bias": False, "batch_first": True},
    {"reset_after": True, "num_layers": 2, "bidirectional": True},
]


def made(**settings):
    gru = GRU(I, H, dtype="float64", seed=0, **settings)
    return gru, convert.torch.as_module(gru)


def inputs(gru, grad=True):
    torch.manual_seed(0)
    shape = (B, T, I) if gru.batch_first else (T, B, I)
    states = gru.num_layers * len(gru.suffixes)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=grad)
    return x, torch.randn(states, B, H, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
def test_gradcheck(settings, lengths):
    gru, module = made(**settings)
    names, params = zip(*module.named_parameters(), strict=True)
    assert list(names) == list(gru.params)

    def run(x, h0, *params):
        named = dict(zip(names, params, strict=True))
        return torch.func.functional_call(module, named, (x, h0, lengths))

    fresh = [p.detach().clone().requires_grad_() for p in params]
    assert torch.autograd.gradcheck(run, (*inputs(gru), *fresh), fast_mode=True)


def test_it_computes_what_torch_does():
    gru, module = made(reset_after=True, num_layers=2, bidirectional=True)
    theirs = torch.nn.GRU(I, H, 2, bidirectional=True).double()
    theirs.load_state_dict(module.state_dict())
    x, h0 = inputs(gru)
    for model in (module, theirs):
        y, h_n = model(x, h0)
        (y.pow(2).sum() + h_n.pow(3).sum()).backward()
    for (name, p), q in zip(module.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-12), name
    y = module(x)[0]
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_an_optimiser_changes_the_gru_it_was_made_of():
    gru, module = made()
    before = {k: a.copy() for k, a in gru.params.items()}
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    x, _ = inputs(gru, grad=False)
    module(x)[0].sum().backward()
    optimiser.step()
    for name, parameter in module.named_parameters():
        assert not np.array_equal(gru.params[name], before[name])
        assert np.array_equal(gru.params[name], parameter.detach().numpy())
    assert np.array_equal(gru(x.numpy())[0], module(x)[0].detach().numpy())
    assert np.array_equal(module.gru()(x.numpy())[0], gru(x.numpy())[0])


def test_copies_and_casts():
    gru, module = made(reset_after=True)
    x, _ = inputs(gru, grad=False)
    other = copy.deepcopy(module)
    torch.nn.init.zeros_(other.weight_ih_l0)
    assert gru.params["weight_ih_l0"].any()
    assert not torch.equal(other(x)[0], module(x)[0])
    single = copy.deepcopy(module).float()
    assert single.gru().dtype == "float32"
    assert torch.allclose(single(x.float())[0].double(), module(x)[0], atol=1e-6)
    half = copy.deepcopy(module).bfloat16()
    assert half(x.bfloat16())[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="x has dtype float32, expected float64"):
        module(x.float())


def test_nothing_is_kept_without_grad_and_lengths_may_be_a_tensor():
    gru, module = made()
    x, h0 = inputs(gru)
    with torch.no_grad():
        y, h_n = module(x, h0, torch.tensor([4, 0, 2]))
    assert not y.requires_grad
    expected = gru(x.detach().numpy(), h0.detach().numpy(), [4, 0, 2])
    assert np.array_equal(y.numpy(), expected[0])
    assert np.array_equal(h_n.numpy(), expected[1])


def test_weights_written_in_between_are_noticed():
    gru, module = made()
    y, _ = module(inputs(gru)[0])
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_follows_the_mode_and_torch_s_seed():
    gru, module = made(num_layers=2, dropout=0.5)
    x, _ = inputs(gru)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(module(x)[0])
    assert torch.equal(*runs)
    assert not torch.equal(module(x)[0], runs[0])
    module.eval()
    assert np.array_equal(module(x)[0].detach().numpy(), gru(x.detach().numpy())[0])
