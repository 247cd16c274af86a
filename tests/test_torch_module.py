"""Models of ours inside of a PyTorch model."""

import copy

import numpy as np
import pytest
from conftest import require, running

from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Linear, convert

torch = require("torch")
from gru_any.convert.torch import autograd  # noqa: E402
from gru_any.convert.torch import module as ours  # noqa: E402

require("torch.nn.utils.prune")
T, B, I, H = 4, 3, 2, 3
SETTINGS = [
    {},
    {"bias": False, "batch_first": True},
    {"reset_after": True, "num_layers": 2, "bidirectional": True},
]


@pytest.fixture(autouse=True)
def few_steps_too(monkeypatch):
    """Nothing is left to PyTorch's own operator."""
    monkeypatch.setattr(ours, "FEW", 0)


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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_resets_as_in_a_loop_over_a_cell(compiled, monkeypatch):
    """Also where PyTorch sees an operator alone, and of so few steps that it would run its own."""
    monkeypatch.setattr(ours, "FEW", 8)
    gru, module = made(reset_after=True)
    cell = torch.nn.GRUCell(I, H).double()
    cell.load_state_dict({name[:-3]: w for name, w in module.state_dict().items()})
    x, h0 = inputs(gru)
    resets = torch.rand(T, B) < 0.5
    h, ys = h0[0], []
    for x_t, at in zip(x, resets, strict=True):
        h = cell(x_t, torch.where(at[:, None], 0.0, h))
        ys.append(h)
    function = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    with running("traced"):
        y, h_n = function(x, h0, resets=resets)
        of, to = y.pow(2).sum() + h_n.pow(3).sum(), [x, h0, *module.parameters()]
        found = torch.autograd.grad(of, to, retain_graph=True)
        monkeypatch.setattr(autograd, "_handles", {})  # so that the call is run again
        again = torch.autograd.grad(of, to)
    assert all(map(torch.equal, found, again))
    loss = torch.stack(ys).pow(2).sum() + h.pow(3).sum()
    expected = torch.autograd.grad(loss, [x, h0, *cell.parameters()])
    assert torch.allclose(y, torch.stack(ys), rtol=0, atol=1e-14)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_in_every_layout(batch_first):
    gru, module = made(batch_first=batch_first, num_layers=2, bidirectional=True)
    x, h0 = inputs(gru, grad=False)
    resets = torch.rand(x.shape[:2]) < 0.5
    with running("traced"):
        for lengths in (None, [4, 0, 2]):
            expected = gru(x.numpy(), h0.numpy(), lengths, resets=resets.numpy())
            for given in (resets, resets.numpy(), resets.tolist()):
                found = module(x, h0, lengths, given)
                for a, b in zip(found, expected, strict=True):
                    assert np.allclose(a.detach(), b, rtol=0, atol=1e-14)
        row = (1, slice(None)) if batch_first else (slice(None), 1)
        y, h_n = module(x[row], h0[:, 1], resets=resets[row])
        alone, last = gru(x[row].numpy(), h0[:, 1].numpy(), resets=resets[row].numpy())
        assert np.allclose(y.detach(), alone, rtol=0, atol=1e-14)
        assert np.allclose(h_n.detach(), last, rtol=0, atol=1e-14)
        for wrong, told in (
            (resets[:, :1], r"resets is .*, expected \((T, B|B, T)\)"),
            (resets.double(), "resets has dtype float64, expected booleans"),
        ):
            with pytest.raises((TypeError, ValueError), match=told):
                module(x, h0, resets=wrong)
        with pytest.raises(ValueError, match=r"resets is .*, expected \(T,\)"):
            module(x[row], resets=resets)
        packed = torch.nn.utils.rnn.pack_sequence([x[0]])
        with pytest.raises(ValueError, match="resets were given beside a PackedSequence"):
            module(packed, resets=resets)


def test_resets_have_first_derivatives_alone():
    gru, module = made(reset_after=True)
    x, h0 = inputs(gru)
    with running("traced"):
        y, _ = module(x, h0, resets=torch.rand(T, B) < 0.5)
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives in reverse mode alone"):
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
    with pytest.raises(
        ValueError, match=r"does not match weight dtype .*: input.to\(torch.float64"
    ):
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


# parameters by their names -----------------------------------------------------------------------

NN = torch.nn.utils
W, U = "weight_ih_l0", "weight_hh_l0"


class Double(torch.nn.Module):
    """A parametrization of one's own."""

    def forward(self, v):
        return 2 * v


def tie(model):
    del model.bias_hh_l0
    model.bias_hh_l0 = model.bias_ih_l0


def set_again(model):
    parameter = model.weight_ih_l0
    del model.weight_ih_l0
    model.weight_ih_l0 = parameter


def replace(model):
    model.weight_hh_l0 = torch.nn.Parameter(model.weight_hh_l0.detach().flip(1).contiguous())


def add_parts(model):
    model.aside = torch.nn.Linear(2, 2).double()
    model.register_parameter("apart", torch.nn.Parameter(torch.ones(2)))
    model.register_buffer("count", torch.zeros(3))


def reverse_order(model):
    model._parameters = dict(reversed(model._parameters.items()))


def freeze(model):
    model.weight_hh_l0.requires_grad_(False)
    model.bias_ih_l0.requires_grad_(False)


def prune_all(model):
    for name in (W, U, "bias_ih_l0", "bias_hh_l0"):
        NN.prune.l1_unstructured(model, name, 0.5)


def prune_and_remove(model):
    prune_all(model)
    NN.prune.remove(model, U)


def old_norm(model, name):
    NN.weight_norm(model, name)
    with torch.no_grad():
        getattr(model, name + "_g").mul_(1.5)


def norm(model, *names):
    for name in names:
        NN.parametrizations.weight_norm(model, name)
        with torch.no_grad():
            model.parametrizations[name].original0.mul_(1.5)


def spectral(model):
    NN.parametrizations.spectral_norm(model, W)
    model.eval()  # in training each look at the weight changes it


TREATMENTS = {
    "nothing": lambda m: None,
    "random pruning": lambda m: NN.prune.random_unstructured(m, U, 0.5),
    "l1 pruning": lambda m: NN.prune.l1_unstructured(m, W, 0.5),
    "structured pruning": lambda m: NN.prune.ln_structured(m, U, 0.5, n=2, dim=0),
    "random structured pruning": lambda m: NN.prune.random_structured(m, U, 0.5, dim=1),
    "pruning of all": prune_all,
    "pruning made permanent": prune_and_remove,
    "old weight_norm": lambda m: old_norm(m, U),
    "old weight_norm of a bias": lambda m: old_norm(m, "bias_ih_l0"),
    "weight_norm": lambda m: norm(m, U),
    "weight_norm of two": lambda m: norm(m, W, U),
    "old spectral_norm": lambda m: NN.spectral_norm(m, U),
    "spectral_norm": spectral,
    "orthogonal": lambda m: NN.parametrizations.orthogonal(m, U),
    "a parametrized bias": lambda m: NN.parametrize.register_parametrization(
        m, "bias_hh_l0", Double()
    ),
    "tied biases": tie,
    "deleted and set again": set_again,
    "replaced": replace,
    "more parts": add_parts,
    "another order": reverse_order,
    "frozen": freeze,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", TREATMENTS)
def test_parameters_are_read_by_name_as_torch_does(name):
    gru, module = made(reset_after=True)
    theirs = torch.nn.GRU(I, H).double()
    theirs.load_state_dict(module.state_dict())
    plain, runs = gru(inputs(gru, grad=False)[0].numpy())[0], []
    for model in (module, theirs):
        torch.manual_seed(3)
        TREATMENTS[name](model)
        x, h0 = inputs(gru)
        y, h_n = model(x, h0)
        (y.pow(2).sum() + h_n.pow(3).sum()).backward()
        found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        runs.append({"y": y, "h_n": h_n, "dx": x.grad, "dh0": h0.grad, **found})
    assert runs[0].keys() == runs[1].keys()
    for key, expected in runs[1].items():
        assert torch.allclose(runs[0][key], expected, rtol=1e-10, atol=1e-12), key
    module.eval(), theirs.eval()
    x = inputs(gru, grad=False)[0]
    y, expected = module(x)[0], theirs(x)[0]
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
    assert np.array_equal(module.gru()(x.numpy())[0], y.detach().numpy())
    untouched = ("nothing", "deleted and set again", "more parts", "another order", "frozen")
    assert np.allclose(y.detach().numpy(), plain, atol=1e-6) == (name in untouched)


def test_functional_call_by_name():
    gru, module = made(reset_after=True)
    x, _ = inputs(gru)
    theirs = torch.nn.GRU(I, H).double()
    theirs.load_state_dict(module.state_dict())
    named = {U: torch.randn(3 * H, H, dtype=torch.float64, requires_grad=True)}
    grads = []
    for model in (module, theirs):
        y = torch.func.functional_call(model, named, (x,))[0]
        grads.append(torch.autograd.grad(y.sum(), [x, named[U], model.weight_ih_l0]))
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "weight_hh_l0 is a NoneType, expected a torch.Tensor"),
        (torch.zeros(H, H), ValueError, r"weight_hh_l0 is \(3, 3\), expected \(9, 3\)"),
        (torch.zeros(3 * H, H), TypeError, "weight_hh_l0 has dtype float32, expected float64 as"),
        (torch.zeros(3 * H, H).long(), TypeError, "weight_hh_l0 has dtype int64, expected one of"),
        (torch.zeros(3 * H, H).double().to_sparse(), TypeError, r"expected weight_hh_l0.to_dense"),
        (torch.zeros(3 * H, H).double().to("meta"), TypeError, "weight_hh_l0 is on meta"),
        ("deleted", AttributeError, "no attribute 'weight_hh_l0'"),
    ],
)
def test_parameters_that_do_not_fit(value, error, message):
    _, module = made()
    del module.weight_hh_l0
    if not isinstance(value, str):
        module.weight_hh_l0 = value
    for call in (lambda: module(torch.zeros(T, B, I).double()), module.gru):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((T, B, I)), r"input is a ndarray, expected a torch\.Tensor"),
        (torch.zeros(T, B, I).long(), "input has dtype int64"),
        (torch.zeros(T, B, I).double().to("meta"), "input is on meta"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    with pytest.raises(TypeError, match=message):
        made()[1](x)


# autocast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_w", [torch.float32, torch.bfloat16])
def test_autocast_as_in_torch(low, cell, of_x, of_w):
    torch.manual_seed(0)
    theirs = (torch.nn.GRUCell if cell else torch.nn.GRU)(I, H).to(of_w)
    ours = (GRUCell if cell else GRU)(I, H, reset_after=True)
    module = convert.torch.as_module(ours).to(of_w)
    module.load_state_dict(theirs.state_dict())
    x, found = torch.randn((B, I) if cell else (T, B, I)).to(of_x), []
    for model in (module, theirs):
        with torch.autocast("cpu", low):
            out = model(x)
            y = out if cell else out[0]
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters())])
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        difference = torch.linalg.vector_norm(got.float() - expected.float())
        assert difference <= 0.02 * torch.linalg.vector_norm(expected.float())
    assert found[0][1].dtype == of_w
    if cell:  # which is PyTorch's own
        assert torch.equal(found[0][0], found[1][0])
        return
    rounded = {k: v.detach().to(low).float().numpy() for k, v in theirs.named_parameters()}
    ours.load_params(rounded)
    y, _ = ours(x.to(low).float().numpy())
    assert torch.equal(found[0][0], torch.from_numpy(y).to(found[0][0].dtype))


def test_autocast_leaves_float64_alone():
    gru, module = made()
    x, _ = inputs(gru, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(module(x)[0].detach().numpy(), gru(x.numpy())[0])
        with pytest.raises(TypeError, match="input has dtype float32, expected float64"):
            module(x.float())


# derivatives -------------------------------------------------------------------------------------

MODULES = [
    pytest.param(lambda: (GRU(I, H, dtype="float64", seed=0), (T, B, I), (1, B, H)), id="GRU"),
    pytest.param(lambda: (GRUCell(I, H, dtype="float64", seed=0), (B, I), (B, H)), id="GRUCell"),
]
SECOND = "for second derivatives use torch.nn.GRU"
FORWARD = "for forward-mode derivatives use torch.nn.GRU"


def differentiable(make):
    """f(x, h0, *parameters) -> y, and its arguments."""
    model, of_x, of_h = make()
    module = convert.torch.as_module(model)
    names = list(model.params)
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64) for shape in (of_x, of_h)]
    given += [p.detach().clone() for p in module.parameters()]

    def run(x, h0, *params):
        named = dict(zip(names, params, strict=True))
        found = torch.func.functional_call(module, named, (x, h0))
        return found[0] if isinstance(found, tuple) else found

    return run, [v.requires_grad_() for v in given]


WAYS, FUNC = torch.autograd.functional, torch.func
# f is of one argument and gives one number
TWICE = {
    "jvp": lambda f, at: WAYS.jvp(f, at, torch.ones_like(at)),
    "hvp": lambda f, at: WAYS.hvp(f, at, torch.ones_like(at)),
    "hessian": WAYS.hessian,
    "vectorized hessian": lambda f, at: WAYS.hessian(f, at, vectorize=True),
    "grad of grad": lambda f, at: FUNC.grad(lambda u: FUNC.grad(f)(u).square().sum())(at),
}
FORWARDS = {
    "jvp": lambda f, at: FUNC.jvp(f, (at,), (torch.ones_like(at),)),
    "jacfwd": lambda f, at: FUNC.jacfwd(f)(at),
    "hessian": lambda f, at: FUNC.hessian(f)(at),
}


def one_by_one(run, given):
    """For each argument a function of it alone, the others without grad, and its value."""
    for i, v in enumerate(given):
        before, after = ([u.detach() for u in part] for part in (given[:i], given[i + 1 :]))
        yield (lambda u, b=before, a=after: run(*b, u, *a).square().sum()), v.detach()


@pytest.mark.parametrize("make", MODULES)
def test_second_derivatives_are_refused_for_every_input(make):
    run, given = differentiable(make)
    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.gradgradcheck(run, given)
    for of_one, at in one_by_one(run, given):
        v = at.clone().requires_grad_()
        value = of_one(v)
        (first,) = torch.autograd.grad(value, v, create_graph=True)
        with pytest.raises(RuntimeError, match=SECOND):
            (value + first.square().sum()).backward()
        for twice in TWICE.values():
            with pytest.raises(RuntimeError, match=SECOND):
                twice(of_one, at)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("make", MODULES)
def test_forward_mode_is_refused_and_func_grad_is_right(make):
    run, given = differentiable(make)
    for of_one, at in one_by_one(run, given):
        for forward in FORWARDS.values():
            with pytest.raises(RuntimeError, match=FORWARD):
                forward(of_one, at)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=FORWARD):
            of_one(torch.autograd.forward_ad.make_dual(at, torch.ones_like(at)))
        several = FUNC.vmap(of_one)(torch.stack([at, 2 * at]))
        assert torch.equal(several, torch.stack([of_one(at), of_one(2 * at)]))
        v = at.clone().requires_grad_()
        (expected,) = torch.autograd.grad(of_one(v), v)
        assert expected.any()
        assert torch.equal(FUNC.grad(of_one)(at), expected)


def test_first_derivatives_stay_as_they_are():
    gru, module = made(reset_after=True)
    theirs = torch.nn.GRU(I, H).double()
    theirs.load_state_dict(module.state_dict())
    x, h0 = inputs(gru)
    found = []
    for model in (module, theirs):
        y, h_n = model(x, h0)
        of_y = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], retain_graph=True)
        again = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(of_y, again, strict=True))
        of_h = torch.autograd.grad(h_n.square().sum(), [h0, *model.parameters()], create_graph=True)
        y = model(x)[0]
        y.mul_(3)  # y is the caller's
        found.append([*of_y, *of_h, *torch.autograd.grad(y.sum(), [x, *model.parameters()])])
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
    y = module(x)[0]
    y.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()
    with torch.inference_mode():
        assert torch.equal(module(x)[0], y)


@pytest.mark.parametrize("which", [0, 1])
def test_inputs_written_in_between_are_noticed(which):
    gru, module = made()
    given = list(inputs(gru, grad=False))
    y, _ = module(*given)
    given[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# cells and chains --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [True, False])
def test_a_cell_computes_what_torch_does(bias, batch):
    cell = GRUCell(I, H, bias=bias, reset_after=True, dtype="float64", seed=0)
    module = convert.torch.as_module(cell)
    theirs = torch.nn.GRUCell(I, H, bias=bias).double()
    theirs.load_state_dict(module.state_dict())
    torch.manual_seed(0)
    x = torch.randn(*(T, B, I) if batch else (T, I), dtype=torch.float64, requires_grad=True)
    grads = []
    for model in (module, theirs):
        h = None
        for x_t in x:
            h = model(x_t, h)
        grads.append([h, *torch.autograd.grad(h.pow(3).sum(), [x, *model.parameters()])])
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    torch.optim.SGD(module.parameters(), lr=0.1)
    assert np.shares_memory(cell.params["weight_hh"], module.weight_hh.detach().numpy())
    assert np.array_equal(module.cell()(x[0].detach().numpy()), cell(x[0].detach().numpy()))
    with pytest.raises(RuntimeError, match="dtype"):
        module(x[0], h.float())


def chain():
    return Chain(
        Embedding(7, I, dtype="float64", seed=0),
        GRU(I, H, reset_after=True, dtype="float64", seed=1),
        Dropout(0.5, dtype="float64"),
        GRU(H, 4, batch_first=False, dtype="float64", seed=2),
        Linear(4, 2, dtype="float64", seed=3),
    )


def test_a_chain_runs_as_a_module():
    model = chain()
    module = convert.torch.as_module(model).eval()
    assert list(module.state_dict()) == list(model.params)
    x = torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 1], [2, 2, 2]])
    state = [torch.randn(1, B, n, dtype=torch.float64, requires_grad=True) for n in (H, 4)]
    y, new = module(x, state, lengths=[4, 1, 2])
    host = [h.detach().numpy() for h in state]
    (expected, of_state), pullback = model.vjp(x.numpy(), host, [4, 1, 2])
    assert np.allclose(y.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    for h, other in zip(new, of_state, strict=True):
        assert np.allclose(h.detach().numpy(), other, rtol=1e-12, atol=1e-14)
    (y.square().sum() + new[0].sum()).backward()
    grads, _, dstate = pullback(2 * expected, [np.ones_like(of_state[0]), 0 * of_state[1]])
    for name, parameter in module.named_parameters():
        assert np.allclose(parameter.grad.numpy(), grads[name], rtol=1e-10, atol=1e-12), name
        assert np.shares_memory(model.params[name], parameter.detach().numpy())
    for h, other in zip(state, dstate, strict=True):
        assert np.allclose(h.grad.numpy(), other, rtol=1e-10, atol=1e-12)
    module.train()
    assert not torch.equal(module(x)[0], module(x)[0])
    with pytest.raises(ValueError, match="state holds 1, expected 2"):
        module(x, state[:1])
    resets = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
    with running("traced"):
        y, _ = module.eval()(x, state, resets=resets)
        expected, _ = model(x.numpy(), host, resets=resets.numpy())
    assert np.allclose(y.detach().numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("model", [None, GRU, torch.nn.GRU(I, H), Linear(2, 3), {"a": 1}])
def test_what_is_no_model_is_refused_at_the_door(model):
    with pytest.raises(TypeError, match="expected a GRU, a GRUCell or a Chain of gru_any"):
        convert.torch.as_module(model)


@pytest.mark.parametrize("name", ["weight_dropout", "recurrent_dropout", "zoneout"])
def test_what_drops_in_the_recurrence_acts_in_training_mode_alone(name):
    module = convert.torch.GRU(I, H, **{name: 0.5}).double()
    x = torch.randn(20, B, I, dtype=torch.float64)

    def run(seed, x=x):
        torch.manual_seed(seed)
        return module(x)[0]

    with running("traced"):
        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))
        assert not torch.equal(run(1)[:3], run(2, x[:3]))  # not by PyTorch's operator either
        short = x[:4].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v: run(3, v), short)
        with torch.no_grad():
            assert torch.equal(run(1), run(1))
            assert not torch.equal(run(1), run(2))
        module.eval()
        expected, _ = module.gru()(x.numpy())
        assert np.allclose(run(1).detach().numpy(), expected, rtol=0, atol=1e-14)
        assert torch.equal(run(1), run(2))
