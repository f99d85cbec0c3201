"""The baseline of JAX: `lax.scan` over a cell, with the whole call under `jit`."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastrnn.tools.bench.implementation import (
    Case,
    Prepared,
    Results,
    cell_step,
    missing_package,
    named_states,
)

__all__ = ["Jax"]


class Jax:
    """A layer in JAX. Weights are transposed once, into the layout that its products need. Training
    is one jitted call for outputs and gradients."""

    name = "JAX"

    _threads: ClassVar[int | None] = None  # of this process: JAX reads their number only once

    def available(self) -> str | None:
        return missing_package("jax")

    def supports(self, case: Case) -> str | None:
        if case.mode == "cell":
            return "has no cells of its own"
        if case.device != "cpu":
            return "written for CPUs here"
        if case.workload.dtype != "float32" or case.workload.lengths:
            return "written for dense float32 here"
        if self._threads is None and "jax" in sys.modules:
            return "was imported before its number of threads could be set"
        if self._threads not in (None, case.threads):
            return f"runs {self._threads} threads, as its number is fixed at the first use"
        return None

    def prepare(self, case: Case) -> Prepared:
        # JAX reads both variables only when it starts.
        Jax._threads = case.threads
        os.environ["NPROC"] = str(case.threads)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax = importlib.import_module("jax")
        assert isinstance(case.x, Tensor)
        weights = {
            name + suffix: jax.numpy.asarray(_to_jax(weight))
            for suffix, _, _, parameters in case.layer_weights()
            for name, weight in parameters.items()
        }
        x = jax.numpy.asarray(case.x.numpy())
        gradient = jax.numpy.asarray(case.gradient.numpy())
        network = _network(jax, case)

        if case.mode == "training":

            def loss(weights: Any, x: Any) -> Any:
                output, states = network(weights, x, None)
                return (output * gradient).sum(), (output, states)

            both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            both(weights, x)  # compiles
            return Prepared(
                lambda: jax.block_until_ready(both(weights, x)),
                lambda result: _read_training(case, result),
                nullcontext,
            )
        run = jax.jit(network)
        if case.mode == "inference":
            run(weights, x, None)  # compiles
            return Prepared(
                lambda: jax.block_until_ready(run(weights, x, None)),
                lambda result: _read(case, result),
                nullcontext,
            )
        zero = jax.numpy.zeros((case.workload.batch, case.workload.hidden))
        states: Any = ((zero,) * (2 if case.cell == "lstm" else 1),)
        run(weights, x, states)  # compiles

        def step() -> Any:
            nonlocal states
            output, states = jax.block_until_ready(run(weights, x, states))
            return output

        return Prepared(step, lambda y: {"output": _to_torch(y)}, nullcontext)


def _network(jax: Any, case: Case) -> Any:
    """A function from (weights, x [T, B, I], states or None) to the output [T, B, D*H] and the
    final states of each layer and direction."""
    places = [(suffix, layer, direction) for suffix, layer, direction, _ in case.layer_weights()]
    w = case.workload
    number = 2 if case.cell == "lstm" else 1

    def direction_scan(weights: Any, x: Any, states: Any, suffix: str, reverse: bool) -> Any:
        r, b = weights["weight_hh" + suffix], weights["bias_hh" + suffix]
        u = x @ weights["weight_ih" + suffix] + weights["bias_ih" + suffix]

        def step(states: Any, u: Any) -> Any:
            v = states[0] @ r + b
            new = cell_step(case.cell, u, v, states, jax.nn.sigmoid, jax.numpy.tanh)
            return new, new[0]

        if w.steps == 1:
            states, y = step(states, u[0])
            return states, y[None]
        return jax.lax.scan(step, states, u, reverse=reverse)

    def network(weights: Any, x: Any, initial: Any) -> Any:
        last: list[Any] = []
        outputs: list[Any] = []
        for n, (suffix, layer, direction) in enumerate(places):
            if direction == 0 and layer:
                x, outputs = jax.numpy.concatenate(outputs, -1), []
            zero = jax.numpy.zeros((w.batch, w.hidden))
            before = initial[n] if initial else (zero,) * number
            states, y = direction_scan(weights, x, before, suffix, direction == 1)
            outputs.append(y)
            last.append(states)
        return jax.numpy.concatenate(outputs, -1), tuple(last)

    return network


def _read(case: Case, result: Any) -> Results:
    output, last = result
    stacked = tuple(
        torch.stack([_to_torch(state) for state in part]) for part in zip(*last, strict=True)
    )
    states = named_states(case.cell, stacked if case.cell == "lstm" else stacked[0])
    return {"output": _to_torch(output), **states}


def _read_training(case: Case, result: Any) -> Results:
    (_, outputs), (by_weight, by_x) = result
    gradients = {f"gradient of {name}": _to_torch(g).t() for name, g in by_weight.items()}
    return {**_read(case, outputs), "gradient of x": _to_torch(by_x), **gradients}


def _to_jax(weight: Tensor) -> Any:
    """The weight as a NumPy array, transposed if it is a matrix."""
    return weight.detach().t().contiguous().numpy()


def _to_torch(array: Any) -> Tensor:
    return torch.tensor(importlib.import_module("numpy").asarray(array), device="cpu")
