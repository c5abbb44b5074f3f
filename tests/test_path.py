"""The path of the CPU kernels: chosen by shape, at known borders, and told by `bench --explain` and `--roofline`."""

import json
import os
import re

import pytest
import torch

import capsroute
from capsroute.bench import roofline, sweep
from capsroute.bench.measure import Timing
from capsroute.bench.path import explain, operations, path_of
from capsroute.bench.registry import CASES, Case, make_problem
from capsroute.bench.roofline import Machine, Point
from capsroute.cli import main

# Where somebody asked for a build without kernels there is nothing to plan; anywhere else their absence fails.
if os.environ.get("CAPSROUTE_NO_EXT") == "1":
    pytest.skip("CAPSROUTE_NO_EXT=1: there are no kernels to plan", allow_module_level=True)


def planned(*sizes, backward=False, threads=1, **options):
    """The path of a layer (B, I, D, J, O)."""
    return planned_for(Case("layer", *sizes, **options), backward, threads)


def planned_for(case, backward=False, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return path_of(make_problem(case), backward)
    finally:
        torch.set_num_threads(before)


def tiles(path):
    """The samples of a tile, and how many tiles there are."""
    return path.tile, path.tiles


def shares(path):
    return *tiles(path), path.groups, path.by_group


def has_wide_vectors():
    return torch.ops.capsroute.cpu_capability().startswith("avx512")


@pytest.fixture
def wide_vectors():
    """For what is planned with AVX-512 alone: with fewer or shorter registers a lane is never a sample, nor are there
    kernels for half a vector.
    """
    if not has_wide_vectors():
        pytest.skip("only with AVX-512 a lane is a sample, or half a vector wide enough")


def test_a_weight_in_another_order_is_dealt_with_as_it_is_read_up_to_three_times():
    """Here once for a tile of four samples, whose votes are kept, and once more for the gradients."""
    sizes = (1152, 8, 10, 16)
    for batch, backward, as_read in ((12, False, True), (13, False, False), (8, True, True), (9, True, False)):
        path = planned(batch, *sizes, backward=backward, order="IJOD")
        assert (path.as_read, path.copied) == (as_read, not as_read)
        path = planned(batch, *sizes, backward=backward)
        assert not path.as_read
        assert not path.copied


def test_a_weight_of_more_than_32_mib_is_dealt_with_as_it_is_read_up_to_six_times():
    """Here in each of three passes, for 128 samples at a time."""
    assert tiles(planned(256, 257, 8, 256, 16)) == (128, 2)
    assert planned(256, 257, 8, 256, 16, order="IJOD").as_read
    assert planned(257, 257, 8, 256, 16, order="IJOD").copied
    assert planned(256, 256, 8, 256, 16, order="IJOD").copied


def test_a_weight_whose_outputs_do_not_fill_vectors_is_in_no_order_of_the_kernels():
    assert planned(2, 64, 8, 3, 17).as_read


def test_votes_are_kept_up_to_6_mib():
    """4 samples of J x O = 20 x 16 numbers of 4 bytes: 5120 for each input capsule, 6 MiB at 1228 of them."""
    assert planned(9, 1216, 2, 20, 16).kept_inputs == 1216  # a multiple of every lane count
    assert planned(9, 1232, 2, 20, 16).kept_inputs == 0
    assert planned(9, 16, 2, 20, 16, iterations=1).kept_inputs == 0  # there is no second pass to keep them for
    assert planned(9, 16, 2, 20, 16, weight="JOD").kept_inputs == 0


def test_a_tile_is_larger_where_votes_are_made_anew():
    assert tiles(planned(33, 16, 2, 20, 16)) == (4, 9)
    assert tiles(planned(128, 1648, 2, 20, 16)) == (128, 1)
    assert tiles(planned(129, 1648, 2, 20, 16)) == (68, 2)  # even tiles, of whole fours
    assert planned(0, 1648, 2, 20, 16).tiles == planned(0, 48, 2, 1024, 16).tiles == 0
    # 4 MiB hold V and sums, 2 x 4 bytes for each of J x O, of 32 samples, and of 15, of which 16 are taken
    assert tiles(planned(128, 16, 2, 1024, 16, iterations=1)) == (32, 4)
    assert tiles(planned(128, 16, 2, 2176, 16, iterations=1)) == (16, 8)


@pytest.mark.parametrize(("threads", "expected"), [(1, (96, 1)), (3, (32, 3)), (6, (16, 6)), (9, (96, 1))])
def test_each_thread_has_a_share_of_the_long_tiles(threads, expected):
    """96 samples; of less than 16, a tile would read the weight too often, and then threads share out its groups."""
    path = planned(96, 1648, 2, 20, 16, threads=threads)
    assert tiles(path) == expected
    assert path.by_group == (threads == 9)
    assert planned(12, 48, 2, 1024, 16, threads=threads).tiles == min(threads, 3)  # one group: by samples, however few


@pytest.mark.usefixtures("wide_vectors")
def test_threads_share_out_groups_where_one_would_have_too_many_samples():
    # vectors of 16 samples: three of them, of which one of two threads would have two
    assert shares(planned(43, 2000, 8, 10, 16, threads=2)) == (48, 1, 32, True)
    assert shares(planned(43, 2000, 8, 10, 16, threads=3)) == (16, 3, 32, False)
    assert shares(planned(64, 2000, 8, 10, 16, threads=2)) == (32, 2, 32, False)
    assert shares(planned(43, 64, 3, 10, 16, threads=2)) == (32, 2, 1, False)  # there is one group


@pytest.mark.parametrize(
    ("threads", "tile", "by_group"), [(1, 32, False), (2, 16, False), (8, 16, True), (16, 8, True)]
)
def test_threads_share_out_groups_of_several_tiles_where_groups_are_few(threads, tile, by_group):
    """Three groups of 192 input capsules: of one tile they would be work for three threads."""
    path = planned(32, 192, 2, 1000, 16, threads=threads)
    assert (path.tile, path.groups, path.by_group) == (tile, 3, by_group)


@pytest.mark.parametrize(("batch", "by_group"), [(4, True), (8, False)])
def test_threads_share_out_groups_where_tiles_are_few(batch, by_group):
    two, one = (planned(batch, 130, 12, 3, 5, threads=threads) for threads in (2, 1))
    assert two.by_group == by_group
    assert not one.by_group
    assert two.groups == one.groups == 3
    # nothing that decides on bits depends on the threads
    assert (two.kept_inputs, two.tile, two.tiles, two.chunk) == (one.kept_inputs, one.tile, one.tiles, one.chunk)


def test_of_a_few_samples_as_many_votes_are_kept_as_12_mib_hold():
    # 20 x 16 numbers of 4 bytes for each of B samples and input capsules; in groups of 64
    assert planned(4, 2432, 2, 20, 16).kept_inputs == 2432
    assert planned(4, 2464, 2, 20, 16).kept_inputs == 2432
    assert planned(1, 9792, 2, 20, 16).kept_inputs == 9792
    assert planned(1, 9856, 2, 20, 16).kept_inputs == 9792
    assert planned(5, 2432, 2, 20, 16).kept_inputs == 0  # two tiles, and the weight is read for both


def test_pairs_are_kept_while_16_samples_of_them_fit_in_a_chunk():
    # A sample's: 4 slots of 100 numbers of 4 bytes for each i, and 5 terms of 100 x 16. A chunk has 32 MiB,
    assert planned(16, 1280, 1, 100, 16, backward=True).keeps_pairs
    assert not planned(16, 1296, 1, 100, 16, backward=True).keeps_pairs
    # and where the weight is large 64,
    assert planned(16, 2592, 8, 100, 16, backward=True).keeps_pairs
    assert not planned(16, 2608, 8, 100, 16, backward=True).keeps_pairs
    # but no more than three tenths of the votes, which with 4 features are as many as the numbers of the pairs.
    assert not planned(16, 1600, 8, 100, 4, backward=True).keeps_pairs


def test_a_chunk_is_four_times_the_weight_and_whole_sub_batches():
    # A sample's pairs and terms take 16 (I J + 5 / 4 J O) bytes, here 16 x 10 x (4096 + 20); W takes 4 I D J O.
    assert planned(1000, 4096, 4, 10, 16, backward=True).chunk == 56  # 63 fit into 40 MiB
    assert planned(1000, 4096, 8, 10, 16, backward=True).chunk == 96  # 101 fit into 64 MiB
    assert planned(100, 4096, 8, 10, 16, backward=True).chunk == 56  # of two
    assert planned(50, 4096, 8, 10, 16, backward=True).chunk == 50


def test_few_input_capsules_are_taken_at_a_time_where_the_weights_of_a_block_pass_256_kib():
    # Four share loads, and a block has as many as a vector has lanes, which may be no more. W and dW: 2 D numbers of 4
    # bytes for each of J x O = 4 x 32.
    lanes = {"avx2": 8, "avx512": 16}.get(torch.ops.capsroute.cpu_capability().removesuffix("_bf16"), 4)
    border = (256 << 10) // (2 * 4 * 4 * 32 * lanes)
    assert not planned(9, 16, border, 4, 32, backward=True).few_inputs
    assert planned(9, 16, border + 1, 4, 32, backward=True).few_inputs == (lanes > 4)
    assert not planned(9, 16, border + 1, 4, 32, backward=True, weight="JOD").few_inputs
    assert planned(16, 1280, 2, 1000, 16, backward=True)[7:9] == (False, False)  # it must make the coupling of a block


def test_a_chunk_of_the_backward_is_a_share_of_the_batch():
    path = planned(256, 2560, 8, 10, 32, backward=True)
    assert 16 <= path.chunk < 256
    assert planned(16, 2560, 8, 10, 32, backward=True).chunk == 16


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_be_explained(name):
    case = CASES[name]._replace(batch=8)
    problem = make_problem(case)
    for backward in (False, True):
        path = path_of(problem, backward)
        assert path.scratch > 0
        assert re.search(r"; scratch (< 1|[1-9][0-9.]*) [MG]iB$", explain(case, path, backward))
        assert operations(case, path, backward) > 0


def test_operations_of_mnist():
    """One making of the votes, three sums and two agreements: 2 (8 + 5) for each vote."""
    case = CASES["mnist-1"]
    assert operations(case, planned_for(case), False) == 2 * 13 * case.votes


def test_operations_of_many_terms():
    """One making of the votes, three sums and two agreements: 2 (64 + 5) for each vote."""
    case = CASES["comirec"]
    assert operations(case, planned_for(case), False) == 2 * 69 * case.votes


def test_with_avx512_a_lane_is_a_sample_where_votes_stay_near():
    # 16 samples of J x O numbers of 4 bytes: 16 KiB at 256
    wide = has_wide_vectors()
    assert planned(16, 50, 1, 16, 16).by_samples == wide
    assert not planned(15, 50, 1, 16, 16).by_samples
    assert not planned(16, 50, 1, 17, 16).by_samples
    assert not planned(16, 50, 1, 16, 16, weight="JOD").by_samples
    assert planned(16, 50, 1, 16, 16, coupling="in").by_samples == wide
    assert planned(16, 50, 1, 16, 16, backward=True).by_samples == wide


@pytest.mark.usefixtures("wide_vectors")
def test_vectors_of_half_the_width_serve_rows_that_fill_them_and_not_whole_ones():
    """16 numbers of float32 fill a vector of AVX-512, 8 its half."""

    def halved(O, J=4, dtype=torch.float32, **options):
        problem = make_problem(Case("layer", 3, 48, 8, J, O, **options), dtype)
        forward, backward = path_of(problem, False), path_of(problem, True)
        assert forward.half_vectors == backward.half_vectors  # or one could not read what the other leaves
        return forward.half_vectors

    assert [O for O in range(1, 64) if halved(O)] == [8, 24]
    assert not halved(8, J=3)  # rather samples as lanes
    assert [O for O in range(1, 32) if halved(O, dtype=torch.float64)] == [4, 12]
    assert halved(24, dtype=torch.float16)
    pairs = torch.ops.capsroute.cpu_capability() == "avx512_bf16"  # which only vectors of AVX-512 take at once
    assert halved(24, dtype=torch.bfloat16) == (not pairs)
    assert halved(8, dtype=torch.bfloat16)
    assert [O for O in range(1, 64) if halved(O, J=1, weight="")] == [8, 24, 40, 56]
    assert not halved(8, weight="", dtype=torch.float16)  # given votes are widened to whole vectors
    assert not halved(8, weight="JOD")  # u itself is read, and little of it is padding


@pytest.mark.usefixtures("wide_vectors")
def test_explain_tells_of_vectors_of_half_the_width():
    case = Case("layer", 3, 48, 8, 4, 8)
    assert "in vectors of half the width" in explain(case, planned_for(case), False)
    case = case._replace(out_features=16)
    assert "in vectors of half the width" not in explain(case, planned_for(case), False)


@pytest.mark.usefixtures("wide_vectors")
def test_votes_by_samples_are_kept_up_to_96_kib_for_each_term():
    # 16 samples of 4 x 16 numbers of 4 bytes: 4 KiB for each input capsule
    assert planned(16, 48, 2, 4, 16).kept_inputs == 48
    assert planned(16, 64, 2, 4, 16).kept_inputs == 0
    assert planned(16, 64, 4, 4, 16).kept_inputs == 64
    assert planned(32, 80, 64, 4, 64)[1:3] == (80, 32)  # all, whatever else could be kept by fours
    assert tiles(planned(64, 48, 2, 4, 16)) == (32, 2)  # two vectors' samples read a weight together,
    assert tiles(planned(64, 48, 2, 4, 16, threads=4)) == (16, 4)  # unless a thread would have nothing to do
    assert tiles(planned(100, 80, 2, 4, 16)) == (112, 1)  # whole vectors


@pytest.mark.usefixtures("wide_vectors")
def test_where_a_lane_could_be_a_sample_votes_of_large_weights_are_kept_by_fours():
    def kept_by_fours(*sizes):
        path = planned(*sizes)
        assert path.by_samples == path.product_first == (path.kept_inputs == 0)
        return path.kept_inputs

    # a weight of D x 160 numbers for each input capsule: 512 for D = 3.2
    assert kept_by_fours(16, 1152, 4, 10, 16)
    assert not kept_by_fours(16, 1152, 3, 10, 16)
    # 4 samples of 160 numbers of 4 bytes: 3.5 MiB at 1433 input capsules, which have 22 whole groups of 64
    assert kept_by_fours(16, 1424, 8, 10, 16) == 1424
    assert kept_by_fours(16, 1440, 8, 10, 16) == 22 * 64
    # at 1911 of them these are three quarters
    assert kept_by_fours(16, 1904, 8, 10, 16) == 22 * 64
    assert not kept_by_fours(16, 1920, 8, 10, 16)
    # the weight: 12 MiB at D = 17.07
    assert kept_by_fours(16, 1152, 17, 10, 16)
    assert not kept_by_fours(16, 1152, 18, 10, 16)


@pytest.mark.parametrize("inputs", [48, 1152, 1440, 1920])
def test_how_the_first_pass_sums_does_not_depend_on_the_batch(inputs):
    """That is why a sample has the same bits in every batch."""
    assert len({planned(batch, inputs, 8, 10, 16).product_first for batch in (1, 4, 5, 15, 16, 128)}) == 1


def test_operations_where_votes_are_made_anew():
    """Three makings of the votes, the first of which is already a sum; two sums and two agreements: 2 (24 + 4)."""
    case = CASES["cifar10"]._replace(batch=8)
    assert operations(case, planned_for(case), False) == 2 * 28 * case.votes


def test_the_backward_of_a_few_samples_makes_no_votes():
    """Two agreements with V, two with ds, two sums, dh of five terms, du and dW: 2 (6 + 5 + 2 8) for each vote."""
    case = CASES["mnist-1"]
    path = planned_for(case, backward=True)
    assert path.handed
    assert operations(case, path, True) == 2 * 27 * case.votes
    assert "those of 1152 input capsules are there from the forward, which kept them" in explain(case, path, True)
    five = case._replace(batch=5)
    path = planned_for(five, backward=True)
    assert not path.handed
    assert operations(five, path, True) == 2 * 35 * five.votes


def test_operations_where_the_coupling_is_made_anew():
    """The votes once more, and two agreements: 2 (8 + 2 * 2) for each vote."""
    case = CASES["mnist"]
    path = planned_for(case, backward=True)
    anew, kept = (operations(case, path._replace(keeps_pairs=keeps), True) for keeps in (False, True))
    assert anew - kept == 2 * 12 * case.votes


def test_operations_where_some_votes_are_kept():
    """Half of the votes are made twice, the first time as a sum, and half three times: 2 (2.5 x 8 + 4)."""
    case = CASES["cifar10"]._replace(batch=1, inputs=2 * 19648)
    path = planned_for(case)
    assert path.kept_inputs == 19648  # 12 MiB, in groups of 64
    assert operations(case, path, False) == 2 * 24 * case.votes
    words = explain(case, path, False)
    assert "made anew in each pass, as those of one sample are too many to keep, but for the first 19648" in words


def test_explain_tells_people_and_programs(capsys):
    assert main(["bench", "--explain", "--case", "mnist-1", "--json"]) == 0
    out, err = capsys.readouterr()
    forward, backward = json.loads(out)["results"]
    assert forward["why"] in err
    assert backward["path"]["chunk"] == 1


def test_explain_tells_of_a_weight_in_another_order(capsys):
    main(["bench", "--explain", "--case", "mnist", "mind", "--batch", "1", "128", "--order", "JIDO"])
    one, _, many, *shared = capsys.readouterr().out.splitlines()[1:]
    assert one.startswith("mnist B=1 JIDO, forward: ")
    assert "W is read as it lies, or put into the kernels' order as it is read" in one
    assert "W is put into the kernels' order before" in many
    assert not any("JIDO" in line for line in shared[1:])


def test_a_point_below_its_roof():
    machine = Machine(flops=1e11, bandwidth=1e10)
    assert Point("memory", 1.0, 10, 10, "").roof(machine) == 1e10
    assert Point("arithmetic", 1.0, 1000, 10, "").roof(machine) == 1e11


def test_a_point_above_the_roof_is_told():
    machine = Machine(1e9, 1e9)
    assert "Above the roof" in roofline.rows(machine, [Point("a, forward", 0.5, 10**9, 10**6, "")])
    assert "Above the roof" not in roofline.rows(machine, [Point("a, forward", 2.0, 10**9, 10**6, "")])


def test_a_backward_under_the_roof_counts_its_forward():
    case = CASES["mnist-1"]
    point = roofline.measure(case, True, torch.float32, 0)
    paths = [path_of(make_problem(case), backward) for backward in (False, True)]
    assert point.operations == sum(operations(case, paths[b], b) for b in (False, True))
    assert point.path == explain(case, paths[1], True)


@pytest.mark.parametrize(
    ("dtype", "convolving", "flops"),
    [
        (torch.float32, 9.0, 2 * 8**3 / 0.5),  # the product is faster
        (torch.float32, 0.25, 2 * 3 * 3 * 2 * 2 * 9 / 0.25),
        (torch.float64, 0.125, 2 * 3 * 3 * 2 * 2 * 9 / 0.125 / 2),
    ],
    ids=str,
)
def test_the_roof_is_of_the_fastest_that_the_machine_did(monkeypatch, dtype, convolving, flops):
    calls = {}

    def timed(given, _):
        calls.update(given)
        return {name: Timing(9.0, convolving if name == "conv" else 0.5, 9.0, 3) for name in given}

    for name, size in {"SIZE": 8, "CHANNELS": 3, "SIDE": 4, "BYTES": 64}.items():
        monkeypatch.setattr(roofline, name, size)
    monkeypatch.setattr(roofline, "alternate", timed)
    assert roofline.measure_machine(dtype) == Machine(flops, 64 / 0.5, str(dtype).removeprefix("torch."))
    assert calls["sum"].args[0].nbytes == 64
    assert calls["conv"]().shape == (1, 3, 2, 2)


def test_roofline_measures_and_draws(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "SIZE", 64)
    monkeypatch.setattr(roofline, "BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "SECONDS", 0.1)
    file = tmp_path / "roof.png"
    command = ["bench", "--roofline", "--case", "mnist-1", "efficient", "--seconds", "0.1", "--plot", str(file)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "| mnist-1, forward + backward |" in said
    assert "kept between passes" in said
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_step_up_is_told_from_a_tile_that_is_not_full():
    times = {1: 1.0, 2: 1.6, 4: 2.0, 5: 4.2, 8: 4.4, 9: 9.0}  # 5 samples take two tiles as 8 do, 9 three, worth 6.6
    found = sweep.steps(times, dict.fromkeys(times, 4))
    assert [round(step.growth, 2) for step in found] == [1, 0.8, 0.62, 1.05, 0.65, 1.36]
    curve = sweep.Curve("case, forward", "batch", found)
    assert [step.size for step in curve.cliffs()] == [9]
    assert sweep.rows(curve).endswith("beyond what a tile that is not full explains: at 9 (1.36x)\n")


@pytest.mark.parametrize("by_samples", [False, True])
def test_a_tile_of_a_sweep_is_what_shares_a_load_or_a_vector(monkeypatch, by_samples):
    path = planned_for(CASES["mnist"])._replace(by_samples=by_samples)
    monkeypatch.setattr(sweep, "path_of", lambda *_: path)
    tiles = [sweep._tile(None, axis, False) for axis in ("batch", "inputs", "outputs")]
    assert tiles == [16 if by_samples else 4, 16, 1]


@pytest.mark.parametrize("axis", sweep.MOST)
def test_a_sweep_goes_to_the_end_by_the_borders_of_tiles(axis):
    found = sweep.sizes(axis)
    assert found == sorted(set(found))
    assert {1, 4, 5, 8, 9, 16, 17, 64, 65, sweep.MOST[axis]} <= set(found)
    assert found[-1] == sweep.MOST[axis]


def test_sweep_measures_and_draws(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sweep.MOST, "batch", 5)
    file = tmp_path / "sweep.png"
    command = ["bench", "--sweep", "batch", "--case", "efficient", "--seconds", "0.1", "--plot", str(file)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "| efficient, forward + backward: batch | time" in said
    assert "| 5 | " in said
    assert file.read_bytes().startswith(b"\x89PNG")


def test_what_is_shown_instead_of_times_cannot_be_compared(capsys):
    assert main(["bench", "--explain", "--save", "base.json"]) == 2
    assert "--save, --compare and --memory are for implementations" in capsys.readouterr().err


def test_a_plot_needs_the_measurement(capsys):
    assert main(["bench", "--plot", "roof.png"]) == 2
    assert "--plot draws what --roofline or --sweep measures" in capsys.readouterr().err


def test_without_kernels_there_is_no_path(monkeypatch, capsys):
    monkeypatch.setattr("capsroute._ops._loaded", (False, "the C++ kernels were not built"))
    for instead in (["--explain"], ["--roofline"], ["--sweep", "inputs"]):
        assert main(["bench", *instead]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith(
            "error: --explain, --roofline and --sweep look at the CPU kernels: the C++ kernels were not built\n"
        )
    with pytest.raises(ValueError, match="were not built"):
        planned(2, 3, 4, 5, 6)
    assert not capsroute.backends()["cpu"][0]
