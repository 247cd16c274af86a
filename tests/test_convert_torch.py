"""State dicts of PyTorch: cells, weights that are computed from others, names beside a GRU's."""

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Linear, convert

torch = require("torch")
require("torch.nn.utils.prune")
NN = torch.nn.utils
T, B, I, H = 5, 2, 3, 4
U, W, BIAS = "weight_hh_l0", "weight_ih_l0", "bias_hh_l0"
from_arrays, to_arrays = convert.torch.from_arrays, convert.torch.to_arrays


def theirs(kind=torch.nn.GRU, sizes=(I, H), **settings):
    torch.manual_seed(0)
    return kind(*sizes, **settings).double()


def under(prefix, module):
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def same_outputs(ours, module):
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert np.allclose(ours(x.numpy())[0], module(x)[0].detach().numpy(), rtol=1e-12, atol=1e-14)


# cells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_cell_there_and_back(tmp_path, bias, ending):
    module = theirs(torch.nn.GRUCell, bias=bias)
    torch.save(module.state_dict(), tmp_path / "cell.pt")
    cell = convert.torch.load(tmp_path / "cell.pt")
    assert isinstance(cell, GRUCell)
    assert (cell.bias, cell.reset_after, cell.dtype) == (bias, True, "float64")
    x, h = (torch.randn(B, n, dtype=torch.float64) for n in (I, H))
    expected = module(x, h).detach().numpy()
    assert np.allclose(cell(x.numpy(), h.numpy()), expected, rtol=1e-12, atol=1e-14)
    convert.torch.save(tmp_path / f"again.{ending}", cell)
    again = convert.torch.load(tmp_path / f"again.{ending}")
    assert all(np.array_equal(again.params[name], a) for name, a in cell.params.items())
    other = torch.nn.GRUCell(I, H, bias=bias).double()
    other.load_state_dict({name: torch.from_numpy(a) for name, a in to_arrays(cell).items()})
    assert torch.equal(other(x, h), module(x, h))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s | {"weight_ih_l0": s["weight_ih"]}, KeyError, "of a GRU and of a GRUCell"),
        (
            lambda s: {k: s[k] for k in s if k != "bias_hh"},
            KeyError,
            "the cell has .*bias_ih.*expec",
        ),
        (
            lambda s: {k: s[k] for k in s if k != "weight_hh"},
            KeyError,
            "the cell lacks .*weight_hh",
        ),
        (lambda s: s | {"bias_hh": s["bias_hh"].float()}, TypeError, "float32 and float64"),
        (lambda s: s | {"bias_hh": s["bias_hh"][1:]}, ValueError, r"bias_hh is \(11,\), expected"),
        (
            lambda s: s | {"weight_hh": s["bias_hh"]},
            ValueError,
            r"weight_hh is \(12,\), expected a m",
        ),
        (lambda s: theirs(torch.nn.LSTMCell).state_dict(), ValueError, r"weight_ih is \(16, 3\)"),
    ],
)
def test_what_is_no_cell(change, error, message):
    with pytest.raises(error, match=message):
        from_arrays(change(dict(theirs(torch.nn.GRUCell).state_dict())))


def test_what_has_no_home():
    with pytest.raises(ValueError, match=r"U_n \(r \* h\) .* has no counterpart in PyTorch"):
        to_arrays(GRUCell(I, H))
    with pytest.raises(ValueError, match="a GRUCell has no axis of time"):
        from_arrays(theirs(torch.nn.GRUCell).state_dict(), batch_first=True)
    for model in (None, theirs(), GRU):
        with pytest.raises(TypeError, match="expected a GRU, GRUCell or Chain"):
            to_arrays(model)


# weights computed from others --------------------------------------------------------------------


def trained(module, name):
    """What a step of training leaves: no part as it was at first."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    module(torch.randn(T, B, I, dtype=torch.float64))  # spectral_norm goes on in training
    return module.eval()


def old_norm(dim):
    return lambda m: NN.weight_norm(m, U, dim=dim)


def norm(dim):
    return lambda m: NN.parametrizations.weight_norm(m, U, dim=dim)


COMPUTED = {
    "weight_norm": norm(0),
    "weight_norm, dim=1": norm(1),
    "weight_norm, dim=None": norm(None),
    "old weight_norm": old_norm(0),
    "old weight_norm, dim=1": old_norm(1),
    "old weight_norm, dim=None": old_norm(None),
    "of a bias": lambda m: NN.parametrizations.weight_norm(m, BIAS),
    "of two": lambda m: (norm(0)(m), NN.weight_norm(m, W)),
    "spectral_norm": lambda m: NN.parametrizations.spectral_norm(m, U),
    "old spectral_norm": lambda m: NN.spectral_norm(m, U),
    "pruning": lambda m: NN.prune.l1_unstructured(m, U, 0.5),
    "pruning of a bias": lambda m: NN.prune.random_unstructured(m, BIAS, 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("prefix", ["", "encoder.rnn."])
def test_weights_are_computed_as_torch_computes_them(tmp_path, name, prefix):
    module = theirs()
    COMPUTED[name](module)
    trained(module, name)
    assert set(module.state_dict()) != set(theirs().state_dict())
    torch.save(under(prefix, module), tmp_path / "m.pt")
    ours = convert.torch.load(tmp_path / "m.pt", prefix)
    for key, found in ours.params.items():
        expected = getattr(module, key).detach().numpy()
        assert np.allclose(found, expected, rtol=1e-12, atol=1e-14), key
    same_outputs(ours, module)


def test_layers_and_directions_of_weight_norm():
    module = theirs(num_layers=2, bidirectional=True)
    for key in list(theirs(num_layers=2, bidirectional=True).state_dict()):
        NN.parametrizations.weight_norm(module, key)
    same_outputs(from_arrays(trained(module, "").state_dict()), module)


def test_a_linear_in_a_row_may_have_weight_norm():
    linear = NN.parametrizations.weight_norm(theirs(torch.nn.Linear, (H, 2)))
    state = under("rnn.", theirs()) | under("out.", linear)
    model = from_arrays(state, ["rnn.", "out."])
    assert np.allclose(model.params["1.weight"], linear.weight.detach().numpy(), rtol=1e-12)


def parametrized(register, sizes=(I, H)):
    module = theirs(sizes=sizes)
    register(module)
    return dict(module.state_dict())


def nested(module):
    norm(0)(module)
    NN.prune.l1_unstructured(module.parametrizations[U], "original1", 0.5)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            lambda: parametrized(lambda m: NN.parametrizations.orthogonal(m, U)),
            KeyError,
            "weight_hh_l0 is computed from .*original.*remove_parametrizations",
        ),
        (
            lambda: parametrized(
                lambda m: NN.parametrize.register_parametrization(m, BIAS, torch.nn.Tanh())
            ),
            KeyError,
            "bias_hh_l0 is computed from .*original.*which is not read",
        ),
        (lambda: parametrized(nested), KeyError, "weight_hh_l0 is computed from .*original1_mask"),
        (
            lambda: parametrized(norm(0)) | {U: torch.zeros(3 * H, H)},
            KeyError,
            "weight_hh_l0 stands beside .*original0",
        ),
        (
            lambda: {f"{U}_g": torch.zeros(3, 1), f"{U}_v": torch.zeros(3 * H, H)},
            ValueError,
            r"from g \(3, 1\) and v \(12, 4\), expected g \(12, 1\)",
        ),
        (
            lambda: parametrized(
                lambda m: NN.parametrizations.spectral_norm(m, W), sizes=(3 * H, H)
            ),
            ValueError,
            r"weight_ih_l0 is \(12, 12\), of which spectral_norm with dim=0 and dim=1",
        ),
        (
            lambda: parametrized(lambda m: NN.parametrizations.spectral_norm(m, U, dim=1)),
            ValueError,
            r"u \(4,\) and v \(12,\), expected",
        ),
        (
            lambda: {f"{U}_orig": torch.zeros(3 * H, H), f"{U}_mask": torch.zeros(3)},
            ValueError,
            r"weight_hh_l0_mask is \(3,\)",
        ),
        (
            lambda: {f"{U}_g": torch.zeros(12, 1), f"{U}_v": torch.zeros(12, 4).double()},
            TypeError,
            "weight_hh_l0 is computed from float32 and float64",
        ),
    ],
)
def test_what_cannot_be_computed_is_named(state, error, message):
    with pytest.raises(error, match=message):
        from_arrays(state())


# names -------------------------------------------------------------------------------------------


def test_names_beside_a_gru_are_named():
    layer_norm = theirs(torch.nn.LayerNorm, (H,))
    state = dict(theirs().state_dict()) | under("norm.", layer_norm)
    with pytest.raises(KeyError, match=r"GRUCell: norm\.bias, norm\.weight; there are bias_hh_l0"):
        from_arrays(state)
    state = {f"rnn.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(KeyError, match=r"GRUCell: norm\.bias, norm\.weight; there are bias_hh_l0"):
        from_arrays(state, "rnn.")
    with pytest.raises(KeyError, match=r"weight_hh stands under .*rnn\."):
        from_arrays(state)
    with pytest.raises(ValueError, match=r"layer 1 is .*'weight': \(4,\).*expected a matrix"):
        from_arrays(under("0.", theirs()) | under("1.", layer_norm), ["0.", "1."])
    both = under("encoder.rnn.", theirs()) | under("decoder.rnn.", theirs(torch.nn.GRUCell))
    with pytest.raises(KeyError, match=r"with 'rnn\.'.* under 'decoder\.rnn\.', 'encoder\.rnn\.'"):
        from_arrays(both, "rnn.")
    assert isinstance(from_arrays(both, "encoder.rnn."), GRU)
    assert isinstance(from_arrays(both, "decoder.rnn."), GRUCell)


def test_a_layer_has_one_name():
    state = dict(theirs(num_layers=2).state_dict())
    with pytest.raises(KeyError, match=r"GRUCell: weight_hh_l01; there are"):
        from_arrays(state | {"weight_hh_l01": state["weight_hh_l1"]})


def test_a_prefix_may_lack_its_dot():
    module = theirs()
    others = under("rnn2.", theirs(num_layers=2)) | under("out.", theirs(torch.nn.Linear, (H, 2)))
    state = under("rnn.", module) | others
    same_outputs(from_arrays(state, "rnn"), module)
    model = from_arrays(state, ["rnn", "out"])
    assert np.array_equal(model.params["1.weight"], state["out.weight"].numpy())
    same_outputs(from_arrays(under("rnn_", module), "rnn_"), module)
    for part in ("rn", "encoder"):
        with pytest.raises(KeyError, match="weight_hh stands under"):
            from_arrays(state, part)


@pytest.mark.parametrize("prefix", [None, 3, [1], ["rnn.", None]])
def test_a_prefix_that_is_none(prefix):
    with pytest.raises(TypeError, match=r"prefix is .*, expected a string such as"):
        from_arrays(under("rnn.", theirs()), prefix)


@pytest.mark.parametrize("arrays", [None, theirs(), [1, 2], {3: 4}])
def test_what_is_no_state_dict(arrays):
    with pytest.raises(TypeError, match=r"expected a mapping|expected a string such as"):
        from_arrays(arrays)


@pytest.mark.parametrize("value", ["False", 0, None])
@pytest.mark.parametrize("name", ["chainer", "equinox", "haiku", "haste", "mlx"])
def test_switches_are_true_or_false(name, value):
    library = getattr(convert, name)
    arrays = library.to_arrays(GRU(I, H, 2, reset_after=name != "haiku", seed=0))
    for switch in ("bidirectional", "batch_first"):
        with pytest.raises(TypeError, match=f"{switch} is {value!r}, expected True or False"):
            library.from_arrays(arrays, **{switch: value})
    with pytest.raises(TypeError, match=f"batch_first is {value!r}, expected True or False"):
        from_arrays(theirs().state_dict(), batch_first=value)


def test_a_chain_with_dropout_goes_out_and_in():
    layers = (Embedding(7, I, seed=0), Dropout(0.5), GRU(I, H, reset_after=True), Linear(H, 2))
    arrays = to_arrays(Chain(*layers))
    again = from_arrays(arrays, ["0.", "2.", "3."])
    assert np.array_equal(again(np.array([[1]]))[0], Chain(*layers)(np.array([[1]]))[0])
