"""scripts/pronounce.py on a package of the same form, which holds weights drawn at random."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import running

SCRIPTS = Path(__file__).parent.parent / "scripts"
SIZES = {"enc_emb": (29, 5), "dec_emb": (74, 5), "fc_w": (74, 6), "fc_b": (74,)}
SIZES |= {f"{side}_w_ih": (18, 5) for side in ("enc", "dec")}
SIZES |= {f"{side}_w_hh": (18, 6) for side in ("enc", "dec")}
SIZES |= {f"{side}_b_{at}": (18,) for side in ("enc", "dec") for at in ("ih", "hh")}


class Package:
    """What the script uses of g2p_en.G2p, in float64 and with sigmoid and tanh of its own."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.variables = {name: rng.standard_normal(shape) for name, shape in SIZES.items()}
        self.variables = {name: v.astype("float32") for name, v in self.variables.items()}
        vars(self).update(self.variables)
        self.g2idx = {
            c: i for i, c in enumerate(["<pad>", "<unk>", "</s>", *map(chr, range(97, 123))])
        }
        self.idx2p = {i: f"P{i}" for i in range(74)}
        self.homograph2features = dict.fromkeys(["absent", "use", "don't"])

    def cell(self, x, h, w_ih, w_hh, b_ih, b_hh):
        a_r, a_z, a_n = np.split(w_ih.astype("float64") @ x + b_ih, 3)
        q_r, q_z, q_n = np.split(w_hh.astype("float64") @ h + b_hh, 3)
        r, z = 1 / (1 + np.exp(-a_r - q_r)), 1 / (1 + np.exp(-a_z - q_z))
        return z * h + (1 - z) * np.tanh(a_n + r * q_n)

    def encode(self, word):
        return self.enc_emb[[[self.g2idx.get(c, 1) for c in word] + [2]]]

    def gru(self, x, steps, *weights):
        h, found = np.zeros(6), []
        for t in range(steps):
            h = self.cell(x[0, t], h, *weights)
            found.append(h)
        return np.stack(found)[None]

    def predict(self, word):
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        enc, dec = ([getattr(self, f"{side}_{n}") for n in names] for side in ("enc", "dec"))
        h, said, last = self.gru(self.encode(word), len(word) + 1, *enc)[0, -1], [], 2
        while len(said) < 20:
            h = self.cell(self.dec_emb[last], h, *dec)
            last = int((self.fc_w @ h + self.fc_b).argmax())
            if last == 3:
                break
            said.append(last)
        return [self.idx2p[i] for i in said]


@pytest.mark.parametrize("words", [[], ["activationist", "x"]])
def test_all_ways_say_what_the_package_says(words, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    import pronounce

    monkeypatch.setattr(pronounce, "theirs", Package)
    with running("traced"):
        pronounce.main([*words, "--rounds", "1"])
    said = capsys.readouterr().out
    assert float(re.search(r"the package's: (\S+)", said)[1]) < 1e-6
    count = len(words) or 2  # don't is no word of letters alone
    rows = dict(re.findall(r"^\| ([\w ]+) \| \d+ \| [\d.]+ \| (\d+) \|$", said, re.M))
    assert {"the package", "stream", "frozen", *(["C"] if shutil.which("cc") else [])} <= set(rows)
    for name, same in rows.items():
        assert name.endswith("int8") or int(same) == count
    assert ("Cortex-M7" in said) == bool(shutil.which("arm-none-eabi-gcc"))
