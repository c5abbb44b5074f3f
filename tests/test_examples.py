"""Every example runs, and says what it should."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"

SAYS = {
    "replace_layer": "accelerate: 1 (DenseCapsule): swapped: the same outputs and gradients on a probe",
    "segmentation": "disc: intersection over union 0.",
    "export_pt2": "gave [5, 10, 16] in a fresh process",
    "serve": "interests of 3 users, without Python",
    "per_sample_gradients": "length of each sample's gradient: ",
    "compare_gradients": "gradient of logits",
}


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name, capfd, request):
    if name == "serve":  # from C++ there is no reference to take in the kernels' place
        request.getfixturevalue("cpu")
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capfd.readouterr().out
    if name == "segmentation":
        assert (names["found"] == names["labels"]).float().mean() > 0.95
        assert ((names["found"] == 2) & (names["labels"] == 2)).sum() > 0.7 * (names["labels"] == 2).sum()


def test_a_pt2_without_capsroute_says_what_to_import(tmp_path):
    import capsroute

    layer = capsroute.nn.CapsuleLinear(9, 4, 3, 5)
    torch.export.save(torch.export.export(layer, (torch.randn(2, 9, 4),)), tmp_path / "layer.pt2")
    load = f"import torch; torch.export.load({str(tmp_path / 'layer.pt2')!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert done.returncode != 0
    assert "failed to resolve torch.ops.capsroute.route.default to an operator" in done.stderr
    assert "Please import the custom op" in done.stderr
