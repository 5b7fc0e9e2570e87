"""N:M sparsity for any PyTorch model: capture, train with learned masks, freeze to exact zeros.

sparse    = nm.compile(model, (x,), pattern="2:4", method=nm.BiMask())   # or nm.LBC(), nm.SRSTE(), nm.Magnitude()
model     = nm.compile(model, method=nm.LBC())                           # without inputs: the model itself, live
scheduler = nm.SparsityScheduler(sparse, total_steps=steps)              # step() after every optimizer.step()
model     = nm.freeze(sparse)                                            # the plain model, zeros in its weights
fast      = nm.lower(model, (x,), backend="auto")                        # to a runtime with sparse kernels
fast      = nm.lower_parts(model, ["*.mlp"], run)                        # parts of it: a model that still has its generate()
print(nm.report(sparse))                                                 # a line per weight: sparse or dense, and why
nm.verify(model, "2:4"), nm.show(sparse)                                 # check any checkpoint, read the graph
nm.parameter_groups(sparse, weight_decay=5e-4)                           # for any torch optimizer
nm.save_checkpoint("run.pt", model=sparse, scheduler=scheduler)          # whole or not at all
nm.Magnitude(importance=nm.Wanda(nm.calibrate(model, loader)))           # one-shot masks that know the data
nm.prune_checkpoint("llama", "llama-2of4")                               # a checkpoint folder larger than memory
nm.permute(model, (x,)), nm.show_axes(model, (x,))                       # reorder channels so that masks keep more
"""

from nm_compiler.api import compile, show
from nm_compiler.calibrating import calibrate
from nm_compiler.calibration import Calibration
from nm_compiler.checkpoint import load_checkpoint, save_checkpoint
from nm_compiler.errors import NMError, Refusal
from nm_compiler.freezing import freeze
from nm_compiler.importance import RIA, Saliency, Wanda
from nm_compiler.lowering import lower
from nm_compiler.lowering_parts import lower_parts
from nm_compiler.methods.base import Method
from nm_compiler.methods.bimask import BiMask
from nm_compiler.methods.gradual import Gradual
from nm_compiler.methods.lbc import LBC
from nm_compiler.methods.lbc_bimask import LBCBiMask
from nm_compiler.methods.magnitude import Magnitude
from nm_compiler.methods.srste import SRSTE
from nm_compiler.methods.sste import SSTE
from nm_compiler.methods.transposable import Transposable
from nm_compiler.module import SparseModule
from nm_compiler.optim import parameter_groups
from nm_compiler.pattern import Pattern
from nm_compiler.permuting import permute, show_axes
from nm_compiler.planning import plan_bytes
from nm_compiler.reporting import report
from nm_compiler.runtime.verify import verify
from nm_compiler.scheduler import SparsityScheduler
from nm_compiler.streaming.prune import prune_checkpoint
from nm_compiler.telemetry import Telemetry

__version__ = "0.1.0"

__all__ = [
    "LBC",
    "RIA",
    "SRSTE",
    "SSTE",
    "BiMask",
    "Calibration",
    "Gradual",
    "LBCBiMask",
    "Magnitude",
    "Method",
    "NMError",
    "Pattern",
    "Refusal",
    "Saliency",
    "SparseModule",
    "SparsityScheduler",
    "Telemetry",
    "Transposable",
    "Wanda",
    "calibrate",
    "compile",
    "freeze",
    "load_checkpoint",
    "lower",
    "lower_parts",
    "parameter_groups",
    "permute",
    "plan_bytes",
    "prune_checkpoint",
    "report",
    "save_checkpoint",
    "show",
    "show_axes",
    "verify",
]
