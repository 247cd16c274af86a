"""The page that runs a GRU in a browser, held against the library."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import finished, refuse, running

from gru_any import GRU, Chain, Dropout, Embedding, Linear
from gru_any.codegen.schedule import HOST, forward_schedule

ROOT = Path(__file__).parent.parent
CHARACTERS = "\n \"$<ab'é漢"
TEXT = 'ab <a é>$\nb漢\'a "b" a$HEDATA'
KNOWN = [c for c in TEXT if c in CHARACTERS]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def interactive():
    with pytest.MonkeyPatch.context() as patch, running("traced"):
        patch.syspath_prepend(str(ROOT / "scripts"))
        import interactive

        yield interactive


@pytest.fixture(scope="module", params=[False, True], ids=["before", "after"])
def model(request):
    """Weights so large that gates and states move, and of few bits: the page adds two biases."""
    n = len(CHARACTERS)
    model = Chain(
        Embedding(n, 6, seed=0), GRU(6, 8, 2, reset_after=request.param, seed=1), Dropout(0.5),
        Linear(8, n, seed=2),
    )  # fmt: skip
    for array in model.params.values():
        array[:] = np.round(array * 3 * 256) / 256
    return model


def expected(model, dtype):
    """What the library makes of the text: r, z, n, h (T, H) of the last layer, p (T, N)."""
    model = model.to(dtype=dtype)
    x = np.array([CHARACTERS.index(c) for c in KNOWN])[:, None]
    embedding, gru = model.layers[0], model.layers[1]
    with running("plain"):
        found = {k: v[-1, :, 0] for k, v in gru.taps(embedding(x)).items()}
        logits = model(x)[0][:, 0]
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return {**found, "p": e / e.sum(axis=-1, keepdims=True)}


def check(found, model):
    assert "".join(step["character"] for step in found) == "".join(KNOWN)
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
        for name, values in expected(model, dtype).items():
            ours = np.array([list(step[name].values()) for step in found])
            assert np.abs(ours - values).max() < tolerance


def read_with_node(source):
    if not shutil.which("node"):
        refuse("node", "not found")
    command = ["node", "-"]
    return json.loads(finished(command, input=source, code=0).stdout)


def read_with_browser(page, tmp_path):
    """The page after its scripts have run, as the browser writes it out."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        refuse("chromium", f"none of {', '.join(BROWSERS)} found")
    (tmp_path / "page.html").write_text(page, "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    command = [path, *flags, "--dump-dom", (tmp_path / "page.html").as_uri()]
    return finished(command, code=0, encoding="utf-8").stdout


def test_node_computes_what_the_library_does(interactive, model):
    page = interactive.page(CHARACTERS, model, "ab")
    script = re.search(r'<script id="model">(.*?)</script>', page, re.DOTALL)[1]
    found = read_with_node(f"{script}\nconsole.log(JSON.stringify(follow({json.dumps(TEXT)})))")
    check(found, model)


def test_the_browser_computes_and_shows_what_the_library_does(interactive, model, tmp_path):
    """A text is typed, a letter is chosen with the slider, and the page is read."""
    page = interactive.page(CHARACTERS, model, "ab")
    typing = f"""
    const text = document.getElementById("text"), where = document.getElementById("where");
    text.value = {json.dumps(TEXT).replace("<", chr(92) + "u003c")};
    text.dispatchEvent(new Event("input"));
    where.value = 3;
    where.dispatchEvent(new Event("input"));
    document.body.dataset.found = JSON.stringify(steps);
    """
    page = page.replace("</body>", f"<script>{typing}</script></body>")
    seen = read_with_browser(page, tmp_path)
    check(json.loads(html.unescape(re.search(r'data-found="(.*?)"', seen)[1])), model)

    p = expected(model, "float64")["p"][2]
    shown = re.search(r'<ol id="next">(.*?)</ol>', seen, re.DOTALL)[1]
    bars = re.findall(r"<kbd>(.*?)</kbd>.*?<output>(.*?) %</output>", shown)
    letters = {"␣": " ", "↵": "\n"}
    for (letter, percent), i in zip(bars[:7], np.argsort(-p), strict=False):
        assert letters.get(html.unescape(letter), html.unescape(letter)) == CHARACTERS[i]
        assert float(percent) == pytest.approx(100 * p[i], abs=0.51)
    assert f"letter 3 of {len(KNOWN)}" in seen
    assert "It has never seen" in seen
    kept = (expected(model, "float64")["z"][2] > 0.9).sum()
    assert f"{kept} of 8 units keep their state" in seen


def test_every_operation_becomes_javascript(interactive):
    def step(xp, a, h, U, c):
        q = (h - 2.0) @ U[1:, :].T
        first, second = q[..., :1], q[..., 1:]
        new = xp.tanh(first) * c + a[..., 1:2] / (1.0 + h * h)
        return new - second, (first + 0.25, new, 3.0 - new)

    source = interactive.javascript(forward_schedule(step, 1, True, HOST))
    product = re.search(r"function product.*?\n}", interactive.TEMPLATE.read_text("utf-8"), re.S)[0]
    rng, H = np.random.default_rng(0), 4
    a, h, U, c = (rng.standard_normal(n) for n in (3 * H, H, 3 * H * H, H))
    arguments = ", ".join(f"Float64Array.from({v.tolist()})" for v in (a, h, U, c))
    found = read_with_node(f"{product}\n{source}\nconsole.log(JSON.stringify(step({arguments})))")

    q = (h - 2) @ U.reshape(3 * H, H)[H:].T
    new = np.tanh(q[:H]) * c + a[H : 2 * H] / (1 + h * h)
    wanted = {"h": new - q[H:], "r": q[:H] + 0.25, "z": new, "n": 3 - new}
    for name, values in wanted.items():
        assert np.allclose(list(found[name].values()), values, rtol=1e-12)


def test_what_javascript_cannot_do_is_said(interactive):
    schedule = forward_schedule(lambda xp, a, h, U: (h @ U, ()), 0, True, HOST)
    with pytest.raises(NotImplementedError, match="no product of the state"):
        interactive.javascript(schedule)


def test_the_page_of_the_documentation_is_what_the_command_writes(interactive):
    """Its data are a trained model's; all else follows from the template and the equations."""
    page = (ROOT / "docs" / "interactive.html").read_text("utf-8")
    data = re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1]
    filled = {
        "H": str(json.loads(data)["H"]),
        "TEXT": re.search(r"<textarea.*?>(.*?)</textarea>", page, re.DOTALL)[1],
        "DATA": data,
        "STEP": interactive.javascript(interactive.forward(False)),
    }
    template = interactive.Page(interactive.TEMPLATE.read_text("utf-8"))
    assert template.substitute(filled) == page, "write it again; docs/inside.md has the commands"
    assert len(page) < 300_000
    assert not re.findall(r"https?:|\bsrc=|@import|fetch\(|XMLHttpRequest", page)


def test_models_that_do_not_fit(interactive):
    two = Chain(Embedding(3, 2), GRU(2, 2, bidirectional=True), Linear(4, 3))
    with pytest.raises(SystemExit, match="a GRU that reads forward"):
        interactive.page("abc", two, "a")
    normalised = GRU(2, 2, reset_after=True, layer_norm=True)
    with pytest.raises(SystemExit, match="without layer normalisation"):
        interactive.page("abc", Chain(Embedding(3, 2), normalised, Linear(2, 3)), "a")
    one = Chain(Embedding(3, 2), GRU(2, 2), Linear(2, 3))
    with pytest.raises(SystemExit, match="holds nothing that the model knows"):
        interactive.page("abc", one, "xyz")


def test_the_command(interactive, tmp_path, capsys):
    from gru_any import save

    (tmp_path / "characters.json").write_text('"abc"', "utf-8")
    save(tmp_path / "model.safetensors", Chain(Embedding(3, 2), GRU(2, 2), Linear(2, 3)))
    out = tmp_path / "new" / "page.html"
    interactive.main(["--load", str(tmp_path), "--out", str(out), "--text", "abba"])
    assert "open it in a browser" in capsys.readouterr().out
    assert ">abba</textarea>" in out.read_text("utf-8")
