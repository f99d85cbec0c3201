"""A recurrent network is three matrices.

    h_t = tanh(Wxh x_t + Whh h_{t-1})    the memory after step t
    y_t = Why h_t                        what is read out of it

The weights are NumPy arrays. A loop of NumPy runs the network, then fastrnn does: the whole
sequence in one call, step by step, and with gradients. All agree.

    python examples/three_matrices.py
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import fastrnn
from fastrnn.nn.functional import rnn

Array = np.ndarray


def numpy_loop(x: Array, wxh: Array, whh: Array, why: Array) -> tuple[Array, Array]:
    """Run the network: memories [T, H] and readouts [T, O] of the inputs [T, I]."""
    h = np.zeros(len(whh), dtype=x.dtype)
    memories = []
    for x_t in x:
        h = np.tanh(wxh @ x_t + whh @ h)
        memories.append(h)
    return np.stack(memories), np.stack([why @ h for h in memories])


def numpy_gradient(x: Array, wxh: Array, whh: Array, why: Array) -> Array:
    """The gradient of the sum of the readouts to Whh, by back-propagation through time."""
    memories, _ = numpy_loop(x, wxh, whh, why)
    gradient, from_later = np.zeros_like(whh), np.zeros(len(whh), dtype=x.dtype)
    for t in reversed(range(len(x))):
        before_tanh = (why.sum(0) + from_later) * (1 - memories[t] ** 2)
        if t:
            gradient += np.outer(before_tanh, memories[t - 1])
        from_later = whh.T @ before_tanh
    return gradient


def main(quick: bool = False) -> dict[str, float]:
    """Returns the largest difference to NumPy of each way to run the network."""
    steps, inputs, hidden, outputs = (20, 3, 8, 2) if quick else (200, 8, 64, 4)
    draw = np.random.default_rng(0)
    wxh = draw.normal(0, inputs**-0.5, (hidden, inputs))
    whh = draw.normal(0, hidden**-0.5, (hidden, hidden))
    why = draw.normal(0, hidden**-0.5, (outputs, hidden))
    x = draw.normal(size=(steps, inputs))
    memories, y = numpy_loop(x, wxh, whh, why)
    difference = {}

    # 1. A function of the weights: torch and NumPy share the memory of an array.
    tensors = [torch.from_numpy(w) for w in (wxh, whh, why)]
    ours, h_last = rnn(fastrnn.cells.rnn_tanh, torch.from_numpy(x), [tensors[:2]])
    difference["one call"] = float(np.abs(ours.numpy() - memories).max())
    difference["readouts"] = float(np.abs((ours @ tensors[2].T).numpy() - y).max())
    assert torch.equal(h_last[0], ours[-1])  # the last memory

    # 2. A layer with these weights. It is a torch.nn.RNN with other kernels.
    layer = fastrnn.RNN(inputs, hidden, bias=False, dtype=torch.float64)
    layer.load_state_dict({"weight_ih_l0": tensors[0], "weight_hh_l0": tensors[1]})
    output, _ = layer(torch.from_numpy(x))
    difference["layer"] = float(np.abs(output.detach().numpy() - memories).max())

    # 3. Its gradient comes from one backward pass.
    (output @ tensors[2].T).sum().backward()
    gradient = layer.weight_hh_l0.grad
    assert isinstance(gradient, torch.Tensor)
    wanted = numpy_gradient(x, wxh, whh, why)
    difference["gradient"] = float(np.abs(gradient.numpy() - wanted).max() / np.abs(wanted).max())

    # 4. A stepper has the memory of one step and takes the next input when it comes.
    stepper = layer.stream()
    streamed = [np.array(stepper.step(x_t[None])[0]) for x_t in x]
    difference["step by step"] = float(np.abs(np.stack(streamed) - memories).max())

    print(f"{steps} steps, {inputs} inputs, {hidden} units; largest difference to NumPy:")
    for way, value in difference.items():
        print(f"  {way:12}  {value:.1e}")
        assert value < 1e-10, way
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller network")
    main(parser.parse_args().quick)
