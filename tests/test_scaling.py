"""The cost model of scripts/benchmarks/scaling.py, against numbers computed by hand."""

import math
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import scaling_model

    return scaling_model


def close(found, expected):
    assert math.isclose(found, expected, rel_tol=1e-12), (found, expected)


def test_a_sum_takes_rounds_and_bytes(model):
    link = model.Link(latency=1e-6, bandwidth=1e9)
    close(model.all_reduce(1e6, 4, link), 4 * 1e-6 + 1.5e-3)  # two rounds each way; 2 * 3/4 MB
    close(model.all_reduce(1e6, 5, link), 6 * 1e-6 + 1.6e-3)
    assert model.all_reduce(1e6, 1, link) == 0


def test_boxes_sum_their_parts_side_by_side(model):
    inside, between = model.Link(1e-6, 1e9), model.Link(1e-5, 1e8)
    cluster = model.Cluster(inside, between, box=4, staging=5e8)
    alone = 4e-6 + 1.5e-3 + 2 * 1e6 / 5e8
    close(model.all_reduce_in_boxes(1e6, 4, cluster), alone)
    # two boxes: each rank a quarter of the buffer, one round each way, half of it sent twice
    close(model.all_reduce_in_boxes(1e6, 8, cluster), alone + 2e-5 + 0.25e6 / 1e8)
    assert model.all_reduce_in_boxes(1e6, 1, cluster) == 0


def test_messages_hide_behind_the_layers_that_are_left(model):
    close(model.exposed(8.0, 1.0, 4, 1.0), 1.0)  # the last one only
    close(model.exposed(8.0, 3.0, 4, 1.0), 6.0)  # sent from 2 to 5, 8, 11, 14
    close(model.exposed(8.0, 3.0, 4, 0.0), 12.0)
    close(model.exposed(8.0, 3.0, 4, 0.5), 9.0)


def test_a_step_and_where_it_stops_to_scale(model):
    link = model.Link(latency=0.5, bandwidth=1.0)
    work = model.Work(fixed=1.0, per_row=3.0, size=2.0, layers=1, overlap=1.0)
    cluster = model.Cluster(link)
    close(model.step(work, 4, 1, cluster), 13.0)
    close(model.step(work, 4, 2, cluster), 1 + 6 + (2 * 0.5 + 2.0))
    close(model.step(work, 5, 2, cluster), 1 + 9 + 3.0)  # the share of three rows counts
    close(model.step(work, 4, 2, cluster._replace(cores=1)), 2 + 12 + 3.0)
    close(model.efficiency(work, 4, 2, cluster), 13 / 20)
    # four ranks: 1 + 3 + (4 * 0.5 + 3) = 9, and 13 / 36 is below one half
    assert model.limit(work, 4, cluster) == 2
    assert model.limit(work, 4, cluster, least=0.36) == 4


def test_the_work_of_a_gru(model):
    work = model.gru_on_gpu(T=10, size=4, layers=2, flops=1e3, per_step=0.25)
    close(work.fixed, 10.0)
    close(work.size, 2 * 2 * 12 * 4 * 4)  # two layers, two matrices (12, 4), 4 bytes
    # forward 2 * 2 * 12 * 4 operations for a step and a layer, and twice that backward
    close(work.per_row, 3 * 2 * 2 * 12 * 4 * 10 * 2 / 1e3)


def test_the_fits_find_what_made_the_figures(model):
    fixed, per_row = model.fit_work([8, 16, 64], [0.5 + 0.25 * n for n in (8, 16, 64)])
    close(fixed, 0.5)
    close(per_row, 0.25)
    assert model.fit_work([1, 2], [1.0, 4.0]) == (0.0, pytest.approx(1.2))  # never below 0
    link, sizes, ranks = model.Link(2e-5, 3e9), [1e4, 1e6, 1e7, 1e5], [2, 2, 4, 3]
    times = [model.all_reduce(s, n, link) for s, n in zip(sizes, ranks, strict=True)]
    found = model.fit_link(sizes, ranks, times)
    close(found.latency, link.latency)
    close(found.bandwidth, link.bandwidth)


def test_the_tables_and_the_picture(model, tmp_path, capsys):
    import scaling

    scaling.main(["--picture", str(tmp_path / "scaling.png")])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    found = capsys.readouterr().out
    page = (SCRIPTS.parent / "docs" / "distributed.md").read_text("utf-8")
    lines = [line for line in found.splitlines() if line.startswith("|") and "--" not in line]
    assert len(lines) == 5 + 6 + 10
    assert all(line in page for line in lines)
