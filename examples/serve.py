"""Compile a model of interests ahead of time, and run it from C++, without Python.

AOTInductor makes a package of the model: its weights and compiled code, which calls the kernels of capsroute's library.
serve.cpp loads both. It is compiled here with the headers and libraries of the installed torch.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

import capsroute

SOURCE = Path(__file__).with_name("serve.cpp")
LIBRARY = Path(capsroute.__file__).with_name("libcapsroute.so")

torch.manual_seed(0)
model = capsroute.nn.MultiInterest(50, 64, 4, 64, adaptive=True).eval().requires_grad_(False)
clicks, lengths = torch.randn(3, 50, 64), torch.tensor([50, 7, 0])

with tempfile.TemporaryDirectory() as directory:
    program, package, inputs, outputs = (Path(directory) / name for name in ("serve", "model.pt2", "in.pt", "out.pt"))
    users = torch.export.Dim("users", min=1, max=4096)
    exported = torch.export.export(
        model, (clicks,), {"lengths": lengths}, dynamic_shapes={"u": {0: users}, "lengths": {0: users}}
    )
    torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    torch.save([clicks, lengths], inputs)

    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [word for path in cpp_extension.library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    names = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run(["g++", "-std=c++20", *includes, SOURCE, "-o", program, *libraries, *names], check=True)
    checking = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}  # the package does not by itself
    subprocess.run([program, LIBRARY, package, inputs, outputs], env=checking, check=True)
    interests = torch.load(outputs)

torch.testing.assert_close(interests, model(clicks, lengths=lengths))
