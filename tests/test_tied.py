"""Parameters that are one under several names: against PyTorch, and where weights are copied."""

import copy
import pickle

import numpy as np
import pytest
from conftest import require

from gru_any import (
    GRU,
    SGD,
    Adam,
    Chain,
    Dropout,
    Embedding,
    GRUCell,
    Linear,
    clip_by_global_norm,
    clip_by_value,
    convert,
    explain,
    gradcheck,
    load,
    save,
    softmax_cross_entropy,
)
from gru_any.stream import Stream
from gru_any.train.data import Batch
from gru_any.train.loop import fit

N, H = 7, 4
TIED = {"2.weight": "0.weight"}


def layers(dtype="float32", **home):
    return (
        Embedding(N, H, seed=0, dtype=dtype, **home),
        GRU(H, H, reset_after=True, seed=1, dtype=dtype, **home),
        Linear(H, N, seed=2, dtype=dtype, **home),
    )


def model(dtype="float32", tied=TIED, **home):
    return Chain(*layers(dtype, **home), tied=tied)


def indices(seed=0, T=6, B=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, N, (T, B)), rng.integers(0, N, (T, B))


def batches(epoch):
    return [Batch(*indices(10 * epoch + i)) for i in range(3)]


def is_tied(chain):
    one, other = chain.layers[0].params["weight"], chain.layers[2].params["weight"]
    return one is other and "0.weight" in chain.params and "2.weight" not in chain.params


def theirs(ours):
    """A PyTorch model with the same weights, tied."""
    torch = require("torch")

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.gru = torch.nn.Embedding(N, H), torch.nn.GRU(H, H)
            self.linear = torch.nn.Linear(H, N)
            self.double()
            self.linear.weight = self.embedding.weight

        def forward(self, x):
            return self.linear(self.gru(self.embedding(x))[0])

    module = Module()
    arrays = convert.torch.to_arrays(ours)
    names = {"0.": "embedding.", "1.": "gru.", "2.": "linear."}
    state = {names[k[:2]] + k[2:]: torch.tensor(v) for k, v in arrays.items()}
    module.load_state_dict(state)
    return module


def train_theirs(module, steps, lr=0.05, clip=0.5):
    torch = require("torch")
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    for step in range(steps):
        x, target = (torch.tensor(v) for v in indices(10 * (step // 3) + step % 3))
        optimiser.zero_grad()
        logits = module(x)
        torch.nn.functional.cross_entropy(logits.reshape(-1, N), target.reshape(-1)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimiser.step()
    names = {"embedding.": "0.", "gru.": "1.", "linear.": "2."}
    state = {k: v.detach().numpy() for k, v in module.named_parameters()}
    return {names[k.partition(".")[0] + "."] + k.partition(".")[2]: v for k, v in state.items()}


@pytest.mark.parametrize("by", ["hand", "fit"])
def test_twenty_steps_of_adam_are_pytorchs(by):
    ours = model("float64")
    module = theirs(ours)
    start = {k: v.copy() for k, v in ours.params.items()}
    optimiser = Adam(ours.params, lr=0.05)
    if by == "fit":
        fit(ours, softmax_cross_entropy, batches, optimiser, steps=20, clip=0.5, bar=False)
    else:
        for step in range(20):
            x, target = indices(10 * (step // 3) + step % 3)
            (y, _), pullback = ours.vjp(x)
            grads, _, _ = pullback(softmax_cross_entropy(y, target)[1])
            clip_by_global_norm(grads, 0.5)
            optimiser.step(ours.params, grads)
    expected = train_theirs(module, 20)
    assert set(expected) == set(ours.params)  # the shared one once, in both
    for name, w in expected.items():
        change = np.abs(w - start[name]).max()
        assert change > 0.1
        assert np.abs(ours.params[name] - w).max() < 1e-10
    assert is_tied(ours)


def test_the_gradient_moves_both(backend):
    ours = model("float64", backend=backend.name, device=backend.device)
    x = backend.put(indices()[0])
    assert max(gradcheck(ours, x).values()) < 1e-8
    host = model("float64")
    for chain, v in ((ours, x), (host, indices()[0])):
        (y, _), pullback = chain.vjp(v)
        grads, _, _ = pullback(y)
        Adam(chain.params, lr=0.1).step(chain.params, grads)
        assert is_tied(chain)
    assert np.allclose(backend.host(ours.params["0.weight"]), host.params["0.weight"], rtol=1e-12)


def test_the_name_on_the_right_may_come_later_and_ties_may_lie_within_a_layer():
    x = indices()[0]
    late = Chain(*layers("float64"), tied={"0.weight": "2.weight"})
    assert list(late.params)[-1] == "2.bias"
    assert "0.weight" not in late.params
    assert max(gradcheck(late, x).values()) < 1e-7
    gru = GRU(3, 3, 2, seed=0)
    within = Chain(
        gru, tied={"0.weight_hh_l1": "0.weight_hh_l0", "0.weight_ih_l1": "0.weight_hh_l0"}
    )
    assert (
        max(gradcheck(within, np.random.default_rng(0).standard_normal((4, 2, 3))).values()) < 1e-7
    )
    again = GRU(3, 3, seed=0)
    twice = Chain(again, again, tied={f"1.{k}": f"0.{k}" for k in again.params})
    assert (
        max(gradcheck(twice, np.random.default_rng(0).standard_normal((4, 2, 3))).values()) < 1e-7
    )


@pytest.mark.parametrize("way", ["save", "pickle", "deepcopy", "copy", "dtype", "there and back"])
def test_copies_are_tied(tmp_path, way):
    ours = model()
    if way == "save":
        save(tmp_path / "m", ours)
        new = load(tmp_path / "m")
    elif way == "dtype":
        new = ours.to(dtype="float64")
    elif way == "there and back":
        pytest.importorskip("array_api_strict")
        new = ours.to("array_api_strict")
        assert is_tied(new)
        new = new.to("numpy")
    else:
        make = {"pickle": lambda m: pickle.loads(pickle.dumps(m)), "copy": copy.copy,
                "deepcopy": copy.deepcopy}[way]  # fmt: skip
        new = make(ours)
    assert is_tied(new)
    assert dict(new.tied) == TIED
    for name, w in ours.params.items():
        assert np.array_equal(new.params[name], w.astype(new.dtype))


def test_it_is_told():
    assert "tied={'2.weight': '0.weight'}" in repr(model())
    assert explain(model()).endswith("2.weight is tied to 0.weight: they are one parameter.\n")
    assert "2.weight is tied to 0.weight" in explain(model(), format="latex")


def test_a_file_holds_it_once(tmp_path):
    from safetensors.numpy import load_file

    save(tmp_path / "m", model())
    assert set(load_file(tmp_path / "m")) == set(model().params)


@pytest.mark.parametrize("options", [
    {}, {"average": 0.9}, {"mixed": "float16"}, {"validated": True},
    {"average": 0.5, "validated": True},
])  # fmt: skip
def test_training_keeps_it_tied(tmp_path, options):
    """Averages, lowest weights and the twin in half precision; the run's folder holds the same."""
    options = dict(options)
    ours, seen = model(), []

    def valid():
        seen.append(ours.params["0.weight"].copy())
        assert is_tied(ours)
        return [3.0, 1.0, 2.0, 4.0, 5.0][len(seen) - 1]

    if options.pop("validated", False):
        options |= {"valid": valid, "validate_every": 2}
    fit(ours, softmax_cross_entropy, batches, Adam(ours.params, lr=0.05), steps=7, out=tmp_path,
        bar=False, **options)  # fmt: skip
    assert is_tied(ours)
    if "valid" in options:
        assert np.array_equal(ours.params["0.weight"], seen[1])
    again = load(tmp_path)
    assert is_tied(again)
    for name, w in ours.params.items():
        assert np.array_equal(again.params[name], w)


@pytest.mark.parametrize("average", [None, 0.5])
def test_training_is_the_same_everywhere(backend, average):
    found = []
    for home in ({}, {"backend": backend.name, "device": backend.device}):
        ours = model("float64", **home)
        fit(ours, softmax_cross_entropy, batches, Adam(ours.params, lr=0.05), steps=5, clip=0.5,
            average=average, valid=lambda: 1.0, bar=False)  # fmt: skip
        assert is_tied(ours)
        found.append({k: ours.backend.to_numpy(w) for k, w in ours.params.items()})
    for name, w in found[0].items():
        assert np.abs(found[1][name] - w).max() < 1e-10


def test_a_tied_run_goes_on_tied_and_bit_for_bit(tmp_path):
    def run(out, steps, tied=TIED):
        ours = model(tied=tied)
        fit(
            ours, softmax_cross_entropy, batches, Adam(ours.params), steps=steps, out=out, bar=False
        )
        return ours

    whole = run(None, 9)
    run(tmp_path, 4)
    parts = run(tmp_path, 9)
    assert is_tied(parts)
    for name, w in whole.params.items():
        assert np.array_equal(parts.params[name], w)
    with pytest.raises(ValueError, match="model was"):
        run(tmp_path, 9, tied=None)


def test_loading_takes_both_names_where_they_agree():
    ours, other = model(), model()
    arrays = {k: v + 1 for k, v in other.params.items()}
    ours.load_params(arrays)
    both = {**arrays, "2.weight": arrays["0.weight"].copy()}
    ours.load_params(both)
    assert np.array_equal(ours.layers[2].params["weight"], arrays["0.weight"])
    assert is_tied(ours)
    both["2.weight"][3, 1] = np.nextafter(both["2.weight"][3, 1], np.float32(9))
    with pytest.raises(ValueError, match=r"2\.weight holds other values than another name of 0"):
        ours.load_params(both)
    with pytest.raises(KeyError, match=r"missing \['0\.weight'\]"):
        ours.load_params({k: v for k, v in arrays.items() if k != "0.weight"})


def test_writing_sets_both_and_an_entry_replaced_alone_is_refused():
    ours, x = model(), indices()[0]
    ours.params["0.weight"] = np.ones((N, H), np.float32)
    assert is_tied(ours)
    stream = Stream(ours)
    (y, _), pullback = ours.vjp(x)
    ours.layers[2].params["weight"] = np.zeros((N, H), np.float32)
    optimiser = Adam({"0.weight": np.ones((N, H), np.float32)})
    for use in (
        lambda: ours(x), lambda: ours.vjp(x), lambda: ours.to(dtype="float64"),
        lambda: pickle.dumps(ours), lambda: save("unwritten", ours), lambda: Adam(ours.params),
        lambda: optimiser.step(ours.params, {"0.weight": np.ones((N, H), np.float32)}),
        stream.refresh, lambda: convert.torch.to_arrays(ours),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"'2\.weight' is tied to '0\.weight', but"):
            use()
    with pytest.raises(RuntimeError, match="replaced"):
        pullback(y)
    ours.params["0.weight"] = ours.params["0.weight"]  # the way out
    ours(x)


@pytest.mark.parametrize(
    ("tied", "error", "message"),
    [
        ({"2.weights": "0.weight"}, ValueError, r"no '2\.weights', only \['0\.weight'"),
        ({"2.weight": "weight"}, ValueError, "there is no 'weight'"),
        ({"2.weight": "2.weight"}, ValueError, "tied itself"),
        ({"2.weight": "0.weight", "0.weight": "2.weight"}, ValueError, "tied itself"),
        ({"1.weight_hh_l0": "1.weight_ih_l0", "1.weight_ih_l0": "0.weight"}, ValueError, "itself"),
        ({"2.bias": "0.weight"}, ValueError, r"they are \(7,\) and \(7, 4\)"),
        ({2: 0}, ValueError, "there is no 2"),
        ("2.weight", TypeError, "expected a dict such as"),
        ([("2.weight", "0.weight")], TypeError, "expected a dict such as"),
    ],
)
def test_impossible_ties_are_refused(tied, error, message):
    parts = layers()
    before = parts[2].params["weight"]
    with pytest.raises(error, match=message):
        Chain(*parts, tied=tied)
    assert parts[2].params["weight"] is before


def test_what_nobody_declared_is_refused(tmp_path, backend):
    home = {"backend": backend.name, "device": backend.device}
    told = r"'0\.weight' and '2\.weight' share their memory.*tied=\{'2\.weight': '0\.weight'\}"
    parts = layers(**home)
    ours = Chain(*parts)
    optimiser = SGD(ours.params)
    parts[2].params["weight"] = parts[0].params["weight"]
    grads = {k: backend.backend.xp.ones_like(v) for k, v in ours.params.items()}
    for use in (
        lambda: Chain(*parts), lambda: Adam(ours.params), lambda: save(tmp_path / "m", ours),
        lambda: optimiser.step(ours.params, grads),
        lambda: fit(ours, softmax_cross_entropy, batches, optimiser, steps=1, bar=False),
        lambda: pickle.loads(pickle.dumps(ours)), lambda: ours.to(dtype="float32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            use()
    Chain(*parts, tied=TIED)
    gru = GRU(3, 4, seed=0, **home)
    with pytest.raises(ValueError, match="share their memory"):
        Chain(gru, gru)
    dropout = Dropout(0.5, **home)
    Chain(dropout, gru, dropout)  # which has no parameters
    cell = GRUCell(4, 4, seed=0, **home)
    cell.params["weight_hh"] = cell.params["weight_ih"]
    with pytest.raises(ValueError, match="share their memory"):
        save(tmp_path / "m", cell)


def test_views_of_one_memory_are_refused():
    whole = np.zeros((8, 6))
    for one, other in ((whole[:5], whole[4:]), (whole, whole[:, 2]), (whole.T, whole)):
        with pytest.raises(ValueError, match="share their memory"):
            Adam({"a": one, "b": other})
        with pytest.raises(ValueError, match="share their memory"):
            clip_by_global_norm({"a": one, "b": other}, 1.0)
        with pytest.raises(ValueError, match="share their memory"):
            clip_by_value({"a": one, "b": other}, 1.0)
    Adam({"a": whole[:, :3], "b": whole[:, 3:], "c": np.zeros(0), "d": np.zeros(0)})
    torch = require("torch")
    t = torch.zeros(3)
    with pytest.raises(ValueError, match="share their memory"):
        Adam({"a": t, "b": t.detach()})
    Adam({"a": t, "b": t.clone(), "c": torch.zeros(0), "d": torch.zeros(0)})


def test_pytorchs_state_dict_stays_tied(tmp_path):
    torch = require("torch")
    module = theirs(model("float64"))
    prefixes = ["embedding.", "gru.", "linear."]
    ours = convert.torch.from_arrays(module.state_dict(), prefixes)
    assert is_tied(ours)
    torch.save(module.state_dict(), tmp_path / "m.pt")
    assert is_tied(convert.torch.load(tmp_path / "m.pt", prefixes))
    copies = {k: v.clone() for k, v in module.state_dict().items()}
    assert not convert.torch.from_arrays(copies, prefixes).tied
    convert.torch.save(tmp_path / "n.pt", ours)
    module.load_state_dict(
        {k.replace("0.", "embedding.", 1) if k[0] == "0" else
         k.replace("1.", "gru.", 1) if k[0] == "1" else k.replace("2.", "linear.", 1): v
         for k, v in torch.load(tmp_path / "n.pt").items()}
    )  # fmt: skip
    x = indices()[0]
    assert np.allclose(module(torch.tensor(x)).detach().numpy(), ours(x)[0], atol=1e-12)


def test_other_formats_hold_both_names(tmp_path):
    require("onnx"), require("onnxruntime")
    ours, x = model(), indices()[0]
    convert.onnx.save(tmp_path / "m.onnx", ours)
    assert np.allclose(convert.onnx.load(tmp_path / "m.onnx")(x)[0], ours(x)[0], atol=1e-6)
    pytest.importorskip("h5py")
    convert.keras.save(tmp_path / "m.keras", ours)
    assert np.allclose(
        convert.keras.load(tmp_path / "m.keras")(x.T)[0], ours(x)[0].swapaxes(0, 1), atol=1e-6
    )
