"""Opacus and our layers: it refuses in one sentence, and its fix gives the same weights."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from opacus import GradSampleModule, PrivacyEngine
    from opacus.layers import DPGRU, DPLSTM, DPRNN
    from opacus.validators import ModuleValidator
    from opacus.validators.errors import UnsupportedModuleError

    import fastrnn.integrations.opacus

LAYERS = {"RNN": DPRNN, "LSTM": DPLSTM, "GRU": DPGRU}
CELLS = ("RNNCell", "LSTMCell", "GRUCell")

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.out = nn.Linear(rnn.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.rnn, nn.RNNCellBase):
            zeros = torch.zeros(len(x), self.rnn.hidden_size)
            state: Any = (zeros, zeros) if isinstance(self.rnn, nn.LSTMCell) else zeros
            for step in x.unbind(1):
                state = self.rnn(step, state)
            return self.out(state[0] if isinstance(state, tuple) else state)
        return self.out(self.rnn(x)[0][:, -1])


def model(name: str, **options: Any) -> Model:
    """A replaced model; the report of `replace_` must have its note on Opacus."""
    options = options if name in CELLS else {"batch_first": True, **options}
    made = Model(getattr(nn, name)(3, 5, **options))
    report = fastrnn.replace_(made)
    assert "opacus.validators.ModuleValidator.fix(model)" in dict(report.notes)["opacus"]
    return made


def private(module: nn.Module) -> Any:
    data = torch.utils.data.TensorDataset(torch.randn(8, 6, 3), torch.arange(8) % 2)
    return PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


SENTENCE = (
    r"Opacus has no per-sample gradients of fastrnn\.{name}, whose states its hooks miss; {way}"
)


def sentence(name: str) -> str:
    way = (
        r"use opacus\.layers\.DP" if name in CELLS else r"opacus\.validators\.ModuleValidator\.fix"
    )
    return SENTENCE.format(name=name, way=way)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_privacy_engine_refuses_in_one_sentence(name: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=sentence(name)):
        private(model(name))
    assert not ModuleValidator.is_valid(model(name))


# Opacus's hooks take no tuples as arguments, so an LSTMCell raises there without our help.
@pytest.mark.parametrize("name", [*LAYERS, "RNNCell", "GRUCell"])
def test_grad_sample_module_refuses_in_one_sentence(name: str) -> None:
    module = GradSampleModule(model(name))
    with pytest.raises(NotImplementedError, match=sentence(name)):
        module(torch.randn(4, 6, 3)).sum().backward()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_the_fix_gives_opacus_layer_with_the_same_weights(
    name: str, options: dict[str, Any]
) -> None:
    ours = fastrnn.from_torch(getattr(nn, name)(3, 5, batch_first=True, **options))
    fixed = ModuleValidator.fix(ours)
    assert type(fixed) is LAYERS[name]
    x = torch.randn(4, 6, 3)
    torch.testing.assert_close(fixed(x)[0], ours(x)[0])


def test_the_fix_keeps_the_nonlinearity() -> None:
    ours = fastrnn.RNN(3, 5, nonlinearity="relu")
    x = torch.randn(6, 4, 3)
    torch.testing.assert_close(ModuleValidator.fix(ours)(x)[0], ours(x)[0])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: fastrnn.LSTM(3, 5, proj_size=2), "no proj_size, got proj_size=2"),
        (lambda: fastrnn.GRU(3, 6, heads=3), "no heads, got heads=3"),
    ],
)
def test_the_fix_refuses_what_opacus_has_not(layer: Any, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        ModuleValidator.fix(layer())


@pytest.mark.parametrize("name", LAYERS)
def test_what_was_fixed_trains(name: str) -> None:
    fixed = ModuleValidator.fix(model(name))
    module, optimizer, loader = private(fixed)
    before = [p.detach().clone() for p in module.parameters()]
    for x, target in loader:
        if len(x):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), target).backward()
            optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_restored_layers_are_judged_as_torchs() -> None:
    module = model("LSTM")
    fastrnn.restore_(module)
    with pytest.raises(UnsupportedModuleError, match=r"We do not support nn\.LSTM"):
        private(module)


def test_without_the_integration_a_cells_gradients_would_be_wrong() -> None:
    """Why cells are refused: Opacus samples them as if every step began from zeros."""
    program = """
import torch, warnings
warnings.simplefilter("ignore")
from opacus import GradSampleModule
from torch import nn
import fastrnn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = fastrnn.GRUCell(3, 5)
    def forward(self, x):
        h = torch.zeros(len(x), 5)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return h
model = Model()
private = GradSampleModule(model, loss_reduction="sum")
private(torch.randn(4, 3, 3)).sum().backward()
print(model.cell.weight_hh.grad_sample.abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0  # because no state differed from zero
