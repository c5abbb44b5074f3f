"""`capsroute tune` where tiles do not fit: without a GPU, whose clock is made up here."""

import json

import pytest
import torch

from capsroute._triton import tuning
from capsroute.bench import tune
from capsroute.cli import main

errors = pytest.importorskip("triton.runtime.errors")
START = tuning.Tuning(row=7)  # none of the alternatives


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU on which the tiles that `fits` says yes to take a millisecond, and the others do not fit."""

    def take(fits):
        def seconds(call):
            if not fits(tuning.for_shape()):
                raise errors.OutOfResources(99, 48, "shared memory")
            return 1e-3

        monkeypatch.setattr(tune, "gpu_seconds", seconds)

    monkeypatch.setattr("capsroute._triton.load", lambda: (True, ""))
    for name, value in (
        ("is_available", lambda: True),
        ("get_device_properties", lambda: None),
        ("get_device_name", lambda device=None: "a GPU"),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(tune, "make_problem", lambda case, dtype: None)
    monkeypatch.setattr(tuning, "for_device", lambda properties: START)
    monkeypatch.setenv("CAPSROUTE_TUNING", str(tmp_path / "tuning.json"))
    tuning.measured.cache_clear()
    yield take
    tuning.measured.cache_clear()


def test_where_the_first_tiles_do_not_fit_the_rest_are_told(gpu, capsys):
    gpu(lambda candidate: candidate != START)
    assert main(["tune", "--case", "efficient", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "efficient: did not fit -> 1 ms forward + backward, kept in" in err
    assert torch.get_default_device().type == "cpu"
    (result,) = json.loads(out)["results"]
    assert (result["before"], result["seconds"]) == (None, 1e-3)
    (stored,) = tuning.measured()["a GPU"].values()
    assert stored != START


def test_a_layer_of_ones_own_is_tuned(gpu):
    gpu(lambda candidate: True)
    assert main(["tune", "--case", "mnist", "--dtype", "bfloat16", "--sizes", "B=32", "I=50", "J=7", "O=24"]) == 0
    assert list(tuning.measured()["a GPU"]) == ["pair J=7 O=24 D=8 bfloat16"]
    assert main(["tune", "--case", "segcaps", "--sizes", "D=3"]) == 2
    assert main(["tune", "--sizes", "D=3"]) == 2


def test_where_no_tile_fits_none_is_kept(gpu, capsys):
    gpu(lambda candidate: False)
    assert main(["tune", "--case", "efficient"]) == 2
    assert "tune: error: efficient: no tile that is tried fits on this GPU" in capsys.readouterr().err
    assert not tuning.cache_file().exists()


@pytest.mark.parametrize("content", ["no json", "[]"])
def test_a_broken_file_is_named_before_anything_takes_long(gpu, capsys, content):
    tuning.cache_file().write_text(content)
    gpu(lambda candidate: pytest.fail("it was measured"))
    assert main(["tune", "--case", "efficient"]) == 2
    assert f"{tuning.cache_file()} is not what `capsroute tune` writes, delete it" in capsys.readouterr().err
