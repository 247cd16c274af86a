"""PyTorch's own tests of `torch.nn.GRU` and `GRUCell`, on ours: its samples, from its package.

The samples are those that PyTorch tests its modules with (`torch.testing._internal`); what is
tested with each is what its test_modules.py tests. No sample is left to PyTorch's own operator.
Gradients are checked for a few of the samples; for all with GRU_ANY_THOROUGH=1.
"""

import copy
import io
import pickle

import pytest
from conftest import THOROUGH, require

torch = require("torch")
require("expecttest")  # which PyTorch's package for tests needs
database = pytest.importorskip("torch.testing._internal.common_modules")

from gru_any.convert.torch import GRU, GRUCell  # noqa: E402
from gru_any.convert.torch import module as ours  # noqa: E402

KINDS = {torch.nn.GRU: GRU, torch.nn.GRUCell: GRUCell}
INFO = {info.module_cls: info for info in database.module_db if info.module_cls in KINDS}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_steps_too(monkeypatch):
    monkeypatch.setattr(ours, "FEW", 0)


def samples():
    """Each sample of PyTorch: kind, number, with packed sequences too, in training mode or not."""
    for kind, info in INFO.items():
        packed = [{}, {"with_packed_sequence": True}] if kind is torch.nn.GRU else [{}]
        for given in packed:
            made = info.module_inputs_func(info, CPU, torch.float64, False, True, **given)
            for i, sample in enumerate(made):
                if given and not isinstance(sample.forward_input.args[0], tuple):
                    continue  # it stands in the other list too
                name = f"{kind.__name__}-{i}{'-packed' * bool(given)}"
                yield pytest.param(kind, i, given, id=name)


EACH = pytest.mark.parametrize(("kind", "number", "given"), list(samples()))


def drawn(kind, number, given, dtype=torch.float64, grad=False):
    """A module of ours, its sample, and the tensors of the call."""
    torch.manual_seed(0)
    info = INFO[kind]
    sample = info.module_inputs_func(info, CPU, dtype, grad, True, **given)[number]
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    return KINDS[kind](*args, **kwargs).to(dtype), sample, sample.forward_input.args


def flat(results):
    """The tensors in what a module returns."""
    if isinstance(results, torch.nn.utils.rnn.PackedSequence):
        return [results.data]
    if torch.is_tensor(results):
        return [results]
    return [tensor for part in results for tensor in flat(part)]


def same(found, expected):
    for one, other in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(one, other)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_forward(kind, number, given, dtype, training):
    module, sample, args = drawn(kind, number, given, dtype)
    module.train(training)
    with torch.no_grad():
        found = module(*args)
        if not isinstance(args[0], torch.nn.utils.rnn.PackedSequence):
            expected = sample.reference_fn(module, *args)
        else:  # for which its function is not written
            theirs = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            theirs.to(dtype).load_state_dict(module.state_dict())
            expected = theirs(*args)
        same(found, expected)


@pytest.mark.parametrize(("kind", "number", "given"), list(samples())[:: None if THOROUGH else 9])
def test_gradients(kind, number, given):
    """Of the inputs and the parameters, once and twice, against differences."""
    module, _, args = drawn(kind, number, given, grad=True)
    names, params = zip(*module.named_parameters(), strict=True)
    packed = args[0] if isinstance(args[0], tuple) else None
    tensors = [packed.data if packed else args[0], *args[1:]]

    def call(*tensors):
        first, *rest = tensors[: len(args)]
        if packed is not None:
            first = torch.nn.utils.rnn.PackedSequence(first, *packed[1:])
        named = dict(zip(names, tensors[len(args) :], strict=True))
        return tuple(flat(torch.func.functional_call(module, named, (first, *rest))))

    given = [t.detach().clone().requires_grad_() for t in (*tensors, *params)]
    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    if packed is None:
        assert torch.autograd.gradgradcheck(call, given, fast_mode=True)
    else:
        with pytest.raises(RuntimeError, match=r"for second derivatives use torch\.nn\.GRU"):
            torch.autograd.gradgradcheck(call, given, fast_mode=True)


@EACH
def test_saved_loaded_copied_emptied(kind, number, given):
    module, sample, args = drawn(kind, number, given)
    constructor, content = sample.constructor_input, io.BytesIO()
    expected = module(*args)
    torch.save(module.state_dict(), content)
    content.seek(0)
    again = KINDS[kind](*constructor.args, **constructor.kwargs, dtype=torch.float64)
    again.load_state_dict(torch.load(content))
    emptied = KINDS[kind](*constructor.args, **constructor.kwargs, device="meta").double()
    emptied.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert all(p.device.type == "cpu" for p in emptied.parameters())
    for other in (again, emptied, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        same(other(*args), expected)
        assert list(other.state_dict()) == list(module.state_dict())
    assert repr(module)
    assert str(module)


@EACH
def test_tensors_that_are_not_contiguous(kind, number, given):
    module, _, args = drawn(kind, number, given)
    if isinstance(args[0], tuple):
        args = (args[0]._replace(data=strided(args[0].data)), *args[1:])
        expected = module(args[0]._replace(data=args[0].data.contiguous()), *args[1:])
    else:
        expected = module(*args)
        args = [strided(t) for t in args]
    assert not flat(args)[0].is_contiguous()
    same(module(*args), expected)


def strided(tensor):
    """The same numbers with a gap after each."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


def errors():
    for kind, info in INFO.items():
        made = info.module_error_inputs_func(info, CPU, torch.float32, False, True)
        for i, sample in enumerate(made):
            yield pytest.param(kind, sample, id=f"{kind.__name__}-{i}")


@pytest.mark.parametrize(("kind", "sample"), list(errors()))
def test_errors(kind, sample):
    constructor = sample.module_error_input.constructor_input
    call = sample.module_error_input.forward_input

    def make_and_call():
        module = KINDS[kind](*constructor.args, **constructor.kwargs)
        if call is not None:
            module(*call.args, **call.kwargs)

    with pytest.raises(sample.error_type, match=sample.error_regex):
        make_and_call()
