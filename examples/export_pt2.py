"""Export a capsule layer to a .pt2 file and run it in a fresh process.

The file holds the graph and the weights; the kernels live in capsroute, so the process that loads it must
`import capsroute` first. Without, torch.export.load fails with "failed to resolve torch.ops.capsroute.route.default ...
Please import the custom op to register it before deserializing".
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import capsroute

LOADER = """
import sys, torch
import capsroute  # registers the operators that the file calls
program, inputs, outputs = sys.argv[1:]
v = torch.export.load(program).module()(torch.load(inputs))
torch.save(v, outputs)
"""

torch.manual_seed(0)
layer = capsroute.nn.CapsuleLinear(288, 8, 10, 16).eval().requires_grad_(False)
u = torch.randn(5, 288, 8)

with tempfile.TemporaryDirectory() as directory:
    program, inputs, outputs = (Path(directory) / name for name in ("layer.pt2", "inputs.pt", "outputs.pt"))
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(layer, (u[:2],), dynamic_shapes={"u": {0: batch}}), program)
    torch.save(u, inputs)
    subprocess.run([sys.executable, "-c", LOADER, program, inputs, outputs], check=True)
    v = torch.load(outputs)
    print(f"{program.name}, {program.stat().st_size / 1024:.0f} KiB, gave {list(v.shape)} in a fresh process")

torch.testing.assert_close(v, layer(u))
