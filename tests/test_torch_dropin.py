"""The drop-in for torch.nn.GRU: called, saved, moved, compiled and exported as PyTorch's own."""

import copy
import gc
import io
import os
import pickle
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import require

import gru_any
from gru_any import convert

torch = require("torch")
from gru_any.convert.torch import call as calls  # noqa: E402
from gru_any.convert.torch import module as ours  # noqa: E402
from gru_any.convert.torch import pieces  # noqa: E402

NN, FUNC, RNN = torch.nn, torch.func, torch.nn.utils.rnn
T, B, I, H = 5, 3, 2, 4
KINDS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
]
EACH = pytest.mark.parametrize("kind", KINDS, ids=["plain", "deep", "unbiased"])


@pytest.fixture(autouse=True)
def few_steps_too(monkeypatch):
    """Nothing is left to PyTorch's own operator."""
    monkeypatch.setattr(ours, "FEW", 0)


@pytest.fixture
def left(monkeypatch):
    """How many steps are left to PyTorch's operator, by a call of it or of its module."""
    monkeypatch.undo()
    found = {"operator": [], "module": []}

    def operator(x, *rest, original=ours._operator):
        found["operator"].append(x.shape[1 if rest[-1] else 0])
        return original(x, *rest)

    def forward(self, input, hx=None, original=ours._forward_of_torch):
        packed = isinstance(input, RNN.PackedSequence)
        T = len(input.batch_sizes) if packed else input.shape[self.batch_first]
        found["module"].append(T)
        return original(self, input, hx)

    monkeypatch.setattr(ours, "_operator", operator)
    monkeypatch.setattr(ours, "_forward_of_torch", forward)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_few_steps_are_left_to_pytorch(packed, left):
    """Up to three, with the same bits in training or not."""
    module = convert.torch.GRU(I, H, batch_first=True)
    for steps in (1, 3, 4):
        x = torch.randn(2, steps, I)
        x = RNN.pack_padded_sequence(x, [steps] * 2, True) if packed else x
        y = module(x)[1]
        with torch.no_grad():
            assert torch.equal(module(x)[1], y)
    assert left["module" if packed else "operator"] == [1, 1, 3, 3]
    assert left["operator" if packed else "module"] == []


@EACH
def test_few_steps_have_the_bits_of_pytorch(kind, left):
    theirs, module = pair(torch.float32, **kind)
    shape = (2, 3, I) if module.batch_first else (3, 2, I)
    states = module.num_layers * (1 + module.bidirectional)
    for hx in (None, torch.randn(states, 2, H)):
        found = []
        for model in (theirs, module):
            x = torch.ones(shape, requires_grad=True)
            torch.manual_seed(0)
            y, h_n = model(x, hx)
            found.append((y, h_n, *torch.autograd.grad((y * y).sum(), (x, *model.parameters()))))
        assert all(map(torch.equal, *found))
    assert left == {"operator": [3, 3], "module": []}


def test_few_steps_see_what_becomes_of_the_weights(left):
    theirs, module = pair(torch.float32)
    x = torch.randn(2, 3, I)

    def same():
        return torch.equal(module(x)[0], theirs(x)[0])

    assert same()
    with torch.no_grad():
        for model in (theirs, module):
            model.weight_hh_l0.mul_(2)
    assert same()
    for model in (theirs, module):
        model.weight_hh_l0.data = torch.ones(3 * H, H)
    assert same()
    for model in (theirs, module):
        model.weight_hh_l0 = torch.nn.Parameter(torch.zeros(3 * H, H))
    assert same()
    for model in (theirs, module):
        model._parameters["bias_hh_l0"] = torch.nn.Parameter(torch.ones(3 * H))
    assert same()
    new = {"weight_ih_l0": torch.ones(3 * H, I)}
    given = [torch.func.functional_call(model, new, x)[0] for model in (theirs, module)]
    assert torch.equal(*given)
    assert not torch.equal(given[0], module(x)[0])
    for model in (theirs, module):
        torch.nn.utils.parametrizations.weight_norm(model, "weight_ih_l0")
        model.parametrizations.weight_ih_l0.original0.data.mul_(3)
    assert same()
    assert left["module"], "what is not a parameter as it was is PyTorch's affair"


def test_few_steps_that_are_wrong_are_refused_in_the_same_words(left):
    theirs, module = pair(torch.float32)
    wrong = [
        (torch.ones(2, 3, I + 1), None),
        (torch.ones(2, 3, I), torch.ones(1, 2, H)),
        (torch.ones(2, 3, I), torch.ones(3, H)),
        (torch.ones(2, 3, I, dtype=torch.float64), None),
    ]
    for given in wrong:
        said = []
        for model in (theirs, module):
            with pytest.raises((ValueError, RuntimeError)) as e:
                model(*given)
            said.append(str(e.value))
        assert said[0] == said[1]
    for x in (torch.ones(2, 3, I, device="meta"), torch.ones(2, 3, I).to_sparse()):
        with pytest.raises(TypeError, match="input is"):
            module(x)
    assert left["operator"] == []


def test_rows_are_cut_where_that_leaves_out_most():
    lengths = np.array([9] * 20 + [5] * 20 + [2] * 20)
    cut = pieces.pieces(lengths)
    assert [(p.rows.start, p.rows.stop, p.steps) for p in cut] == [
        (0, 20, 9),
        (20, 40, 5),
        (40, 60, 2),
    ]
    for few in (lengths[:25], np.full(99, 7), np.array([3]), np.array([9] * 40 + [8] * 20)):
        assert pieces.pieces(few) == [(slice(0, len(few)), few[0])]
    random = np.sort(np.random.default_rng(0).integers(1, 90, 200))[::-1]
    cut = pieces.pieces(random)
    assert [i for p in cut for i in range(p.rows.start, p.rows.stop)] == list(range(200))
    assert all(p.steps == random[p.rows].max() for p in cut)
    assert sum(p.steps * len(random[p.rows]) for p in cut) < 0.7 * random.max() * 200


@pytest.fixture
def cut(monkeypatch):
    """Packed sequences are run in pieces, however few they are; how many pieces there were."""
    monkeypatch.setattr(pieces, "ROWS", 1)
    found = []

    def count(lengths, original=pieces.pieces):
        found.append(len(original(lengths)))
        return original(lengths)

    monkeypatch.setattr(calls, "pieces", count)
    return found


@EACH
@pytest.mark.parametrize("with_h0", [False, True])
def test_pieces_of_packed_sequences_give_what_pytorch_does(kind, with_h0, cut):
    theirs, module = pair(**kind)
    first, states = module.batch_first, module.num_layers * (1 + module.bidirectional)
    x = torch.randn((7, 6, I) if first else (6, 7, I), dtype=torch.float64)
    h0 = torch.randn(states, 7, H, dtype=torch.float64) if with_h0 else None
    for used in ("both", "y", "h_n"):
        found = []
        for model in (theirs, module):
            given = [v.clone().requires_grad_() for v in (x, h0) if v is not None]
            packed = RNN.pack_padded_sequence(given[0], [2, 6, 1, 3, 6, 2, 4], first, False)
            y, h_n = model(packed, *given[1:])
            loss = {"y": y.data.pow(2).sum(), "h_n": h_n.pow(3).sum()}
            loss["both"] = loss["y"] + loss["h_n"]
            grads = torch.autograd.grad(loss[used], (*given, *model.parameters()))
            with torch.no_grad():
                assert torch.equal(model(packed, *given[1:])[0].data, y.data)
            found.append((y.data, h_n, *grads))
        for ours_, theirs_ in zip(*found, strict=True):
            torch.testing.assert_close(ours_, theirs_, rtol=1e-10, atol=1e-12)
    assert min(cut) > 2


def test_pieces_drop_the_same_in_both_directions_of_a_call(cut):
    _, module = pair(num_layers=2, dropout=0.5)
    x = torch.randn(5, 4, I, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(3)
        y, h_n = module(RNN.pack_padded_sequence(x, [5, 3, 2, 1]))
        return y.data, h_n

    assert torch.autograd.gradcheck(run, x)
    assert not torch.equal(
        run(x)[0], module.eval()(RNN.pack_padded_sequence(x, [5, 3, 2, 1]))[0].data
    )
    assert min(cut) > 1


def test_there_are_no_pieces_where_weights_are_dropped_for_the_whole_batch(cut):
    module = convert.torch.GRU(I, H, weight_dropout=0.5)
    packed = RNN.pack_padded_sequence(torch.randn(5, 4, I), [5, 3, 2, 1])
    module(packed)
    assert not cut
    module.eval()(packed)
    assert min(cut) > 1


def pair(dtype=torch.float64, **kind):
    """torch.nn.GRU and ours, of the same seed."""
    made = []
    for cls in (NN.GRU, convert.torch.GRU):
        torch.manual_seed(0)
        made.append(cls(I, H, **kind).to(dtype))
    return made


def given(kind, dtype=torch.float64):
    """x and h0."""
    torch.manual_seed(1)
    shape = (B, T, I) if kind.get("batch_first") else (T, B, I)
    states = kind.get("num_layers", 1) * (1 + kind.get("bidirectional", False))
    x, h = torch.randn(shape, dtype=dtype), torch.randn(states, B, H, dtype=dtype)
    return x.requires_grad_(), h.requires_grad_()


def results(module, x, *rest, **named):
    """y, h_n and all gradients of a call."""
    y, h_n = module(x, *rest, **named)
    y = y.data if isinstance(y, RNN.PackedSequence) else y
    leaves = [t for t in (x, *rest, *named.values()) if torch.is_tensor(t) and t.requires_grad]
    leaves += list(module.parameters())
    return [y, h_n, *torch.autograd.grad(y.square().sum() + h_n.pow(3).sum(), leaves)]


def close(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


# called as torch.nn.GRU --------------------------------------------------------------------------


@EACH
def test_made_and_called_as_torch_s(kind):
    theirs, ours = pair(**kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(w, theirs.state_dict()[k]) for k, w in ours.state_dict().items())
    x, h = given(kind)
    close(results(ours, x, h), results(theirs, x, h))
    close(results(ours, x, hx=h), results(theirs, x, hx=h))
    close(results(ours, x), results(theirs, x))
    with torch.no_grad():
        close(ours(x[:, :1]), theirs(x[:, :1]))  # with batch_first a single step
    close(results(ours, x[0].detach()), results(theirs, x[0].detach()))  # unbatched
    one, other = ours.all_weights, theirs.all_weights
    assert [len(group) for group in one] == [len(group) for group in other]
    ours.flatten_parameters()
    assert isinstance(ours, NN.RNNBase)
    assert repr(ours) == f"gru_any.{theirs!r}"


@EACH
@pytest.mark.parametrize("lengths", [[5, 3, 1], [2, 5, 3]])
def test_packed_sequences(kind, lengths):
    theirs, ours = pair(**kind)
    x, h = given(kind)
    first, sort = kind.get("batch_first", False), lengths == sorted(lengths)[::-1]
    found = []
    for module in (ours, theirs):
        packed = RNN.pack_padded_sequence(x, lengths, first, enforce_sorted=sort)
        y, h_n = module(packed, h)
        padded, _ = RNN.pad_packed_sequence(y, first)
        loss = padded.square().sum() + h_n.pow(3).sum()
        found.append([padded, h_n, *torch.autograd.grad(loss, [x, h, *module.parameters()])])
    close(*found)
    y, h_n = ours(x, h, lengths=lengths)  # without packing
    close([y, h_n], found[1][:2])
    with pytest.raises(ValueError, match="a PackedSequence, which has its own"):
        ours(packed, h, lengths)


def test_the_other_variant_and_other_options():
    torch.manual_seed(0)
    module = convert.torch.GRU(I, H, 2, reset_after=False, reverse=True, recompute="sqrt").double()
    names = [f"{n}_l{i}_reverse" for i in (0, 1) for n in ("weight_ih", "weight_hh", "bias_ih")]
    assert list(module.state_dict()) == names
    assert [len(group) for group in module.all_weights] == [3, 3]
    assert "'reset_after': False" in repr(module)
    x, h = given({"num_layers": 2})
    ours = gru_any.GRU(I, H, 2, reverse=True, dtype="float64")
    ours.load_params(module.state_dict())
    expected, h_n = ours(x.detach().numpy(), h.detach().numpy())
    y, state = module(x, h)
    assert np.array_equal(y.detach().numpy(), expected)
    assert np.array_equal(state.detach().numpy(), h_n)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, h)[0], y)
    with pytest.raises(TypeError, match="nonsense"):
        convert.torch.GRU(I, H, nonsense=1)
    with pytest.raises(TypeError, match="reset_after"):
        convert.torch.GRU(I, H, reset_after="False")
    with pytest.raises(ValueError, match="a Linear after the GRU"):
        convert.torch.GRU(I, H, proj_size=2)


def test_a_cell_of_the_other_variant():
    cell = convert.torch.GRUCell(I, H, reset_after=False).double()
    assert cell.bias_hh is None
    ours = cell.cell()
    x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, H, dtype=torch.float64)
    expected, pullback = ours.vjp(x.detach().numpy(), h.numpy())
    found = cell(x, h)
    assert np.allclose(found.detach().numpy(), expected, rtol=1e-12)
    found.sum().backward()
    grads, dx, _ = pullback(np.ones_like(expected))
    assert np.allclose(x.grad.numpy(), dx, rtol=1e-12)
    for name, array in grads.items():
        assert np.allclose(getattr(cell, name).grad.numpy(), array, rtol=1e-10, atol=1e-14)
    assert np.allclose(cell(x[0], h[0]).detach().numpy(), expected[0], rtol=1e-12)
    with pytest.raises(ValueError, match=r"hx is \(2, 4\), expected \(B, H\) with B = 3, H = 4"):
        cell(x, h[:2])


def test_wrong_arguments():
    _, ours = pair()
    x, h = given({})
    for call, error, message in [
        (lambda: ours(x, h[:, 0]), RuntimeError, r"hx is \(1, 4\), expected \(L\*D, B, H\)"),
        (lambda: ours(x, h[:, :2]), RuntimeError, r"Expected hidden size \(1, 3, 4\)"),
        (lambda: ours(x[0], None, [1]), ValueError, r"input \(T, I\) has no batch"),
        (lambda: ours(x, None, [9, 1, 1]), ValueError, "lengths"),
        (lambda: ours(x, h.float()), TypeError, r"hx\.to\(torch\.float64\)"),
    ]:
        with pytest.raises(error, match=message):
            call()


# weights that change -----------------------------------------------------------------------------


def test_weights_are_those_of_the_call():
    """Written, replaced, moved, shared: what the module holds at the call counts."""
    theirs, ours = pair()
    x = given({})[0].detach()
    ways = [
        lambda m: torch.nn.init.constant_(m.weight_hh_l0, 0.5),
        lambda m: setattr(m, "weight_ih_l0", NN.Parameter(m.weight_ih_l0.detach() * 2)),
        lambda m: setattr(m.weight_hh_l0, "data", m.weight_hh_l0.data.flip(0)),
        lambda m: setattr(m.weight_hh_l0, "data", m.weight_hh_l0.data.t().contiguous().t()),
        lambda m: m.share_memory(),
        lambda m: m.float().double(),
        lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    ]
    with torch.no_grad():
        for way in ways:
            way(ours), way(theirs)
            close(ours(x), theirs(x))
        twin = copy.deepcopy(ours)
        twin.weight_hh_l0.zero_()
        close(ours(x), theirs(x))
        named = {"weight_hh_l0": torch.randn(3 * H, H, dtype=torch.float64)}
        close(*(FUNC.functional_call(m, named, (x,)) for m in (ours, theirs)))
        close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions(dtype):
    theirs, ours = pair(dtype, num_layers=2)
    x, h = given({"num_layers": 2}, dtype)
    close(results(ours, x, h), results(theirs, x, h), 0.05)


def test_dropout_acts_in_training_mode():
    torch.manual_seed(0)
    module = convert.torch.GRU(I, 64, 2, dropout=0.25)
    x = torch.randn(T, B, I)
    torch.manual_seed(3)
    first = module(x)[0]
    torch.manual_seed(3)
    assert torch.equal(module(x)[0], first)
    assert not torch.equal(module(x)[0], first)
    module.dropout = 0.0
    plain = module(x)[0]
    module.dropout = 0.25
    assert torch.equal(module.eval()(x)[0], plain)


def test_results_and_pullbacks_are_released():
    """Nothing is kept after a backward pass, nor of a call whose results are gone."""
    from gru_any.convert.torch import autograd

    module = pair()[1]
    x, _ = given({})
    y, _ = module(x)
    before = len(autograd._handles)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert len(autograd._handles) == before - 1
    y = module(x)[0]
    del y
    gc.collect()
    assert len(autograd._handles) == before - 1


# replaced in a model -----------------------------------------------------------------------------


class Model(NN.Module):
    """Two GRUs, one of them twice, and more."""

    def __init__(self):
        super().__init__()
        self.embed = NN.Embedding(7, I)
        self.encoder = NN.GRU(I, H, batch_first=True, bidirectional=True)
        self.decoder = NN.Sequential(NN.GRU(2 * H, H, batch_first=True))
        self.again = self.encoder
        self.cell = NN.GRUCell(H, H)

    def forward(self, x):
        y, _ = self.encoder(self.embed(x))
        y, h = self.decoder(y)
        return self.cell(y[:, -1], h[-1])


class Own(NN.GRU):
    """A class of a user."""


def test_accelerate_in_place_and_back():
    torch.manual_seed(0)
    model = Model()
    theirs = copy.deepcopy(model)
    calls, optimiser = [], torch.optim.SGD(model.parameters(), 0.1)
    hook = model.encoder.register_forward_hook(lambda *a: calls.append(1))
    NN.utils.parametrizations.weight_norm(model.decoder[0], "weight_hh_l0")
    NN.utils.parametrizations.weight_norm(theirs.decoder[0], "weight_hh_l0")
    found = convert.torch.accelerate(model)
    assert found.replaced == ["encoder", "decoder.0"]
    assert list(found.left) == ["cell"]
    assert "cell: left alone, PyTorch is as fast in a single step" in str(found)
    assert type(model.encoder) is convert.torch.GRU is type(model.again)
    assert list(model.state_dict()) == list(theirs.state_dict())
    x = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 0]])
    for one in (model, theirs):
        one(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name
    assert len(calls) == 1
    hook.remove()
    optimiser.step()
    NN.utils.parametrize.remove_parametrizations(model.decoder[0], "weight_hh_l0")
    assert type(model.decoder[0]) is convert.torch.GRU
    expected = model(x)
    assert convert.torch.accelerate(model).replaced == []
    assert convert.torch.restore(model) == ["encoder", "decoder.0"]
    assert type(model.encoder) is NN.GRU
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_an_accelerated_model_is_saved_whole():
    model, content = Model(), io.BytesIO()
    convert.torch.accelerate(model)
    torch.save(model, content)
    content.seek(0)
    again, x = torch.load(content, weights_only=False), torch.tensor([[1, 2, 3, 4]])
    assert type(again.encoder) is convert.torch.GRU
    assert torch.equal(again(x), model(x))


def test_what_accelerate_leaves_alone():
    replaced = NN.GRU(I, H)
    replaced.forward = lambda x: x
    scripted = quiet(torch.jit.script, NN.GRU(I, H))
    quantised = quiet(torch.ao.quantization.quantize_dynamic, NN.Sequential(NN.GRU(I, H)))[0]
    projection, wrong = NN.GRU(I, H), NN.GRU(I, H)
    projection.proj_size = 2
    wrong.weight_hh_l0 = NN.Parameter(torch.zeros(3 * H, H, dtype=torch.complex64))
    reasons = {
        "a class of its own: derive it from": Own(I, H),
        "its forward was replaced": replaced,
        "it is scripted": scripted,
        "not a torch.nn.GRU": quantised,
        "it has a projection": projection,
        "its weights are torch.complex64": wrong,
        "it is of gru_any already": convert.torch.GRU(I, H),
    }
    model = NN.ModuleList(reasons.values())
    found = convert.torch.accelerate(model)
    assert not found.replaced
    for reason, why in zip(reasons, found.left.values(), strict=True):
        assert reason in why
    assert str(convert.torch.accelerate(NN.Linear(2, 2))) == "there is no GRU in the model"
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        convert.torch.accelerate({"a": 1})
    other = convert.torch.GRU(I, H, reset_after=False)
    with pytest.raises(TypeError, match="which PyTorch does not have"):
        convert.torch.restore(NN.ModuleList([NN.Linear(2, 2), other]))


def quiet(call, *given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*given)


# compiled, exported, scripted, traced -------------------------------------------------------------


DYNAMO = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@DYNAMO
@pytest.mark.parametrize("kind", [{}, {"num_layers": 2, "dropout": 0.5}, {"reset_after": False}])
def test_compile_without_a_graph_break(kind):
    torch.compiler.reset()
    torch.manual_seed(0)
    module = convert.torch.GRU(I, H, **kind).double()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for one in (compiled, module):
        torch.manual_seed(2)
        found.append(results(one, given({})[0]))
    close(*found)
    with torch.no_grad():
        module.eval()
        close(compiled(given({})[0][:, :2]), module(given({})[0][:, :2]))


@DYNAMO
def test_compile_packed_sequences():
    torch.compiler.reset()
    _, module = pair()
    packed = RNN.pack_sequence([torch.randn(n, I, dtype=torch.float64) for n in (5, 2)])
    y, h = torch.compile(module, fullgraph=True, backend="aot_eager")(packed)
    close([y.data, h], [module(packed)[0].data, module(packed)[1]])


def test_export_with_any_length_and_batch(tmp_path):
    theirs, ours = pair(num_layers=2)
    sizes = (
        {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B")},
        {1: torch.export.Dim("B")},
    )
    exported = torch.export.export(ours.eval(), given({"num_layers": 2}), dynamic_shapes=sizes)
    assert any("gru_any.gru" in str(node.target) for node in exported.graph.nodes)
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    x, h = torch.randn(9, 2, I, dtype=torch.float64), torch.randn(2, 2, H, dtype=torch.float64)
    close(again(x, h), theirs(x, h))


def test_the_operators_keep_the_rules():
    _, module = pair()
    weights, x = list(module.parameters()), given({})[0].detach()
    rest = None, None, None, True, 0.0, module._settings()
    made = torch.ops.gru_any.gru(x, None, weights, *rest)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.gru_any.gru.default, (x, None, weights, *rest), test_utils=checks
    )
    back = (made[2], made[0], None, x, None, weights, None, None, None, 0.0, module._settings())
    torch.library.opcheck(torch.ops.gru_any.gru_backward.default, back, test_utils=checks)
    expected = torch.ops.gru_any.gru_backward(*back)
    lost = torch.ops.gru_any.gru_backward(torch.tensor([0]), *back[1:])  # its handle is no longer
    close(lost, expected)


def test_torchscript():
    theirs, ours = pair(num_layers=2)
    model = NN.Sequential(ours)
    x, _ = given({})
    traced = quiet(torch.jit.trace, model, (x,))
    script = quiet(torch.jit.script, model)  # which puts PyTorch's into the model too
    longer = torch.randn(7, 2, I, dtype=torch.float64)
    for one in (script, traced):
        close(one(longer), theirs(longer))
    assert type(model[0]) is NN.GRU
    other = convert.torch.GRU(I, H, reset_after=False)
    with pytest.raises(RuntimeError, match="TorchScript has no GRU with these equations"):
        quiet(torch.jit.script, other)
    with pytest.raises(RuntimeError, match=r"use torch\.export"):
        quiet(torch.jit.trace, other, (x.float(),))


# derivatives and transformations ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_derivatives_beyond_the_first_are_torch_s():
    theirs, ours = pair()
    x = given({})[0].detach()
    ways = {
        "grad": FUNC.grad,
        "hessian": FUNC.hessian,
        "jvp": lambda f: lambda x: FUNC.jvp(f, (x,), (x,))[1],
        "third": lambda f: (
            FUNC.grad(lambda u: FUNC.grad(FUNC.grad(f))(u).sum())
            if False
            else FUNC.grad(lambda u: FUNC.grad(f)(u).square().sum())
        ),
        "of autograd": lambda f: lambda x: torch.autograd.functional.hessian(f, x),
    }
    for name, way in ways.items():
        one, other = (way(lambda x, m=m: m(x)[0].square().sum())(x) for m in (ours, theirs))
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12), name
    x.requires_grad_()
    found = []
    for module in (ours, theirs):  # a penalty on the gradient
        (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), list(module.parameters())[:2]))
    close(*found)
    module = convert.torch.GRU(I, H, 2, dropout=0.5).double()
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="for second derivatives use"):
        dx.square().sum().backward()
    for active in (x, x.detach()):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(active, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="for forward-mode derivatives use"):
                module(dual, lengths=[5, 4, 3])


def test_gradients_of_each_example():
    _, module = pair()
    x = torch.randn(3, T, 1, I, dtype=torch.float64)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params, x):
        return FUNC.functional_call(module, params, (x,))[0].square().sum()

    found = FUNC.vmap(FUNC.grad(loss), in_dims=(None, 0))(params, x)
    for i, example in enumerate(x):
        expected = torch.autograd.grad(module(example)[0].square().sum(), module.parameters())
        close([grad[i] for grad in found.values()], expected)


def test_anomaly_mode_hooks_and_checkpoints():
    from torch.utils.checkpoint import checkpoint

    theirs, ours = pair()
    x, _ = given({})
    expected = results(theirs, x)[2:]
    with quiet(torch.autograd.detect_anomaly), torch.autograd.graph.save_on_cpu():
        y, h_n = ours(x)
        loss = y.square().sum() + h_n.pow(3).sum()
        close(torch.autograd.grad(loss, [x, *ours.parameters()]), expected)
    y, h_n = checkpoint(ours, x, use_reentrant=False)
    loss = y.square().sum() + h_n.pow(3).sum()
    close(torch.autograd.grad(loss, [x, *ours.parameters()]), expected)


PARALLEL = """
import os, sys, torch
from torch import distributed
from gru_any import convert

rank, meeting, result = int(sys.argv[1]), *sys.argv[2:]
distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(convert.torch.GRU(2, 3))
x = torch.randn(4, 6, 2)
model(x[:, rank::2])[0].square().mean().backward()
grads = [p.grad for p in model.module.parameters()]
if rank == 0:
    torch.save([model.module.state_dict(), x, grads], result)
distributed.barrier()
os._exit(0)  # gloo's threads may wait for the interpreter while it waits for them
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    paths = [str(tmp_path / name) for name in ("meeting", "result")]
    local = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": local[0]}
    ranks = [
        subprocess.Popen([sys.executable, "-c", PARALLEL, str(rank), *paths],
                         env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=100)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    state, x, grads = torch.load(paths[1])
    theirs = NN.GRU(2, 3)
    theirs.load_state_dict(state)
    theirs(x)[0].square().mean().backward()
    for grad, q in zip(grads, theirs.parameters(), strict=True):
        assert torch.allclose(grad, q.grad, atol=1e-6)
