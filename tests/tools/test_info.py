"""`python -m fastrnn info` and `plan`: their output, and that the self-check can fail."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import __main__, cache, cells, hardware, plan
from fastrnn._version import __version__
from fastrnn.compiler.derive import derive
from fastrnn.extension import _C
from fastrnn.kernels import device
from fastrnn.tools import info
from tests.support.command import run


def test_info_names_machine_build_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert __version__ in out and torch.__version__ in out
    assert hardware.processor() in out
    for name in plan.KERNELS:
        assert f"kernel {name}" in out
    assert "self-check" in out and "passed" in out


def test_info_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["versions"]["fastrnn"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["instruction_set"] in facts["instruction_sets"]
    assert facts["binding"] in facts["bindings"]
    assert torch.__version__.startswith(f"{facts['binding']}.")
    assert facts["compiled_cells"] == str(cache.folder())
    assert facts["kernels"]["cpu"] is None
    assert facts["self_check"]["passed"] is True
    assert 0 < facts["self_check"]["error"] < 1e-4


def test_info_markdown_is_a_table_of_all_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "--markdown")
    header, rule, *rows = out.strip().splitlines()
    assert code == 0
    assert header == "| | " + " | ".join(f"`{name}`" for name in plan.KERNELS) + " |"
    assert all(line.count("|") == len(plan.KERNELS) + 2 for line in (header, rule, *rows))
    by_label = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in rows}
    assert by_label["float32"][0].strip() == "✓"
    assert "no compiled code" in by_label["custom cell, no compiler"][0]


def test_info_says_why_kernels_do_not_run_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = device.current

    def current(kind: str, *arguments: Any, **keywords: Any) -> plan.Device:
        facts = real(kind, *arguments, **keywords) if kind == "cpu" else plan.Device(kind=kind)
        return replace(facts, cuda=f"an error of {kind}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "current", current)
    found = info.collect().kernels
    assert found["cuda"] == "an error of cuda"
    assert found["cpu"] is None and found["reference"] is None


@pytest.mark.parametrize("wrong", [0.999, float("nan")])
def test_self_check_notices_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    class Wrong(fastrnn.LSTM):
        def forward(self, *args, **kwargs):
            y: Any
            y, states = super().forward(*args, **kwargs)
            return y * wrong, states

    monkeypatch.setattr(info, "LSTM", Wrong)
    code, out, _ = run(capsys, "info")
    assert code == 1
    assert "FAILED" in out


def test_self_check_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert info.self_check().passed
    assert torch.equal(before, torch.get_rng_state())


def test_plan_follows_the_shape(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--shape", "100,32,64,256", "--cell", "gru", "--backward")
    assert code == 0
    assert "steps=100, batch=32, inputs=64, hidden=256, gates=3, states=1" in out
    assert "kernel" in out and "of 3200 rows" in out


def test_plan_knows_what_the_function_says(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--shape", "7,3,5,16"
    _, out, _ = run(capsys, "plan", *shape, "--cell", "layer_norm_lstm")
    stages = derive(cells.get("layer_norm_lstm")).stages
    assert stages > 1 and f"projectable=True, stages={stages}, draws=0," in out

    @fastrnn.cell(gates="a", states="h")
    def drops_in_training(u: Any, v: Any, h: Tensor) -> Tensor:
        return fastrnn.dropout(torch.tanh(u.a + v.a), 0.25)

    for training, count in ((["--train"], 1), (["--backward"], 1), ([], 0)):
        _, out, _ = run(capsys, "plan", *shape, "--cell", drops_in_training.name, *training)
        assert f"stages=1, draws={count}," in out


def test_plan_as_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "plan", "--shape", "7,3,5,16", "--directions", "2", "--dtype", "float64", "--json"
    )
    made = json.loads(out)
    assert code == 0
    problem = plan.Problem(**made["problem"])
    assert problem == plan.Problem(
        "lstm",
        *(7, 3, 5, 16),
        gates=4,
        input_gates=4,
        recurrent_gates=4,
        states=2,
        recurrences=2,
        dtype="float64",
        format="float64",
    )
    device = plan.Device(**made["device"] | {"cpu": plan.CpuFacts(**made["device"]["cpu"])})
    chosen = plan.choose(problem, device)
    assert made["plan"]["kernel"] == chosen.kernel
    assert made["plan"]["chunk_rows"] == chosen.chunk_rows
    assert made["plan"]["config"] == asdict(chosen.cpu)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_plan_is_the_one_that_a_call_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, taken = plan.choose, dict[bool, tuple[plan.Device, plan.Plan]]()

    def chosen(problem: plan.Problem, offered: plan.Device) -> plan.Plan:
        made = choose(problem, offered)
        taken[problem.backward] = offered, made
        return made

    layer: Any = fastrnn.Recurrent(cells.get(name), 64, 128)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "choose", chosen)
        _C.forget_plans()
        layer(torch.randn(64, 32, 64))[0].sum().backward()
    _C.forget_plans()
    for backward in (False, True):
        problem, _, _ = info.plan_for(name, (64, 32, 64, 128), tape=True, backward=backward)
        offered, made = taken[backward]  # the device's threads may have been late for a call
        shown = choose(problem, offered)
        assert (shown.config, shown.chunk_rows) == (made.config, made.chunk_rows)


@pytest.mark.compiles
def test_plan_of_a_cell_with_stages_has_its_format(capsys: pytest.CaptureFixture[str]) -> None:
    name = "gru_reset_before"
    options = ("--shape", "100,1,64,512", "--cell", name, "--dtype", "bfloat16", "--json")
    code, out, _ = run(capsys, "plan", *options)
    made = json.loads(out)
    assert code == 0
    assert made["problem"]["stages"] == derive(fastrnn.cells.get(name)).stages > 1
    assert made["problem"]["format"] == _C.format_of(torch.empty(0, dtype=torch.bfloat16))
    assert made["plan"]["kernel"] == "cpu"


def test_plan_says_why_a_kernel_is_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--shape", "7,3,5,16", "--dtype", "complex64")
    assert code == 0
    assert re.search(r"^kernel +reference$", out, re.M)
    assert re.search(r"^not cpu +.*complex64", out, re.M)
    assert "threads  " not in out, "what is said of threads holds for the cpu kernel alone"


def test_a_kernel_that_is_forced_and_refuses_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTRNN_KERNEL", "cpu")
    code, out, err = run(capsys, "plan", "--shape", "7,3,5,16", "--dtype", "complex64")
    assert (code, out) == (2, "")
    assert "'cpu' was asked for but refuses" in err


@pytest.mark.parametrize("shape", ["100,32,64", "a,b,c,d", "1,2,3,-4", "1,2,3,4,5"])
def test_plan_refuses_what_is_no_shape(capsys: pytest.CaptureFixture[str], shape: str) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(["plan", "--shape", shape])
    assert stop.value.code == 2
    assert repr(shape) in capsys.readouterr().err


@pytest.mark.parametrize("argument", [("--dtype", "foo"), ("--device", "tpu")])
def test_plan_refuses_what_there_is_not(
    capsys: pytest.CaptureFixture[str], argument: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(["plan", "--shape", "7,3,5,16", *argument])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"argument {argument[0]}: invalid choice: {argument[1]!r}" in err
