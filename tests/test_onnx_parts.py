"""Parts of larger graphs, graphs that end in a last state, and what messages say."""

import random
import re

import pytest
from conftest import require
from test_onnx_changed import MODELS, change

from gru_any.convert import onnx as convert

onnx = require("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
INTERNAL = re.compile(
    r"\b(Atom|Array|Size|Layer|Zeros|Full|Positive|Range|Step|Before|Sum|Product|Function|Cell)\("
    r"|object at 0x|object has no attribute|<class|NoneType|\bAny\b"
)


# messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_messages_speak_of_the_graph(tmp_path, name):
    """No message shows how this library keeps what it reads."""
    rng, messages = random.Random(1), set()
    convert.save(tmp_path / "good.onnx", MODELS[name]())
    for _ in range(150):
        proto = onnx.load(tmp_path / "good.onnx")
        change(proto, rng)
        onnx.save(proto, tmp_path / "changed.onnx")
        try:
            convert.load(tmp_path / "changed.onnx")
        except ValueError as e:
            messages.add(str(e))
    assert len(messages) > 30
    assert not [m for m in messages if INTERNAL.search(m)]
