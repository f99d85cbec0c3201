"""Writes one step of one recurrence as a function in C: products, then stages of formulas with
reductions and further products between them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastrnn.compiler.c import filled, functions_of, statements, type_of
from fastrnn.compiler.c_plan import Plan, Product, Reduction, parts_of
from fastrnn.compiler.derive import Derived
from fastrnn.compiler.expression import uses
from fastrnn.compiler.stages import Stage

__all__ = ["step_function"]


def step_function(
    derived: Derived, plan: Plan, arrays: Mapping[str, Tensor], name: str
) -> tuple[str, set[str]]:
    """The function `step_layer`, with the arrays as its last arguments, and the functions that it
    calls."""
    writer = _Step(derived, plan, arrays, name)
    return writer.text(), writer.called


class _Step:
    def __init__(
        self, derived: Derived, plan: Plan, arrays: Mapping[str, Tensor], name: str
    ) -> None:
        self.derived, self.plan, self.arrays, self.name = derived, plan, arrays, name
        self.called: set[str] = set()
        upper = name.upper()
        several = plan.heads > 1
        self.hidden = f"{upper}_HEAD_SIZE" if several else f"{upper}_HIDDEN_SIZE"
        self.output = self.hidden if several else f"{upper}_OUTPUT_SIZE"
        self.targets = {f"next.{state}": f"s{k}[i]" for k, state in enumerate(derived.states)}
        for number, k in enumerate(plan.held):
            self.targets[f"next.{derived.states[k]}"] = f"next[{self.at(number)}]"
        if plan.projected:
            self.targets[f"next.{derived.states[0]}"] = "h[i]"
        self.places = self.elements()

    def block(self, array: str, number: int) -> str:
        """The address of a block of an array."""
        return f"{array} + {number} * {self.hidden}" if number else array

    def numbers(self, blocks: int) -> str:
        """The size of blocks of an array."""
        return f"{blocks} * {self.hidden}" if blocks > 1 else self.hidden

    def at(self, number: int) -> str:
        """The index of unit `i` in a block."""
        return f"{number} * {self.hidden} + i" if number else "i"

    def elements(self) -> dict[str, str]:
        """The element of an array in which unit `i` finds each input."""
        plan = self.plan
        places = {label: f"gates[{self.at(k)}]" for k, label in enumerate(plan.labels)}
        places |= {f"s.{name}": f"s{k}[i]" for k, name in enumerate(self.derived.states)}
        places |= {f"unit.{k}": f"learned[{self.at(k)}]" for k in range(len(plan.units))}
        after = f"{len(plan.units)} * {self.hidden} + " if plan.units else ""
        places |= {f"shared.{k}": f"learned[{after}{k}]" for k in range(len(plan.shared))}
        return places | {f"temp.{k}": f"temp[{self.at(k)}]" for k in range(plan.temporaries)}

    def text(self) -> str:
        plan = self.plan
        arguments = [f"struct {self.name}_state *state", "int layer"]
        if plan.heads > 1:
            arguments.append("int head")
        if plan.from_x:
            arguments += ["const float *x", "int inputs"]
        arguments += [f"const {type_of(a)} *{kind}" for kind, a in self.arrays.items()]
        body = [*self.declarations()]
        if plan.from_x:
            body.append(self.product("ih", "inputs", len(plan.from_x), "x", "gates"))
        for k, stage in enumerate(plan.stages):
            body += [self.recurrent(p) for p in plan.products if p.stage == k]
            body += [line for r in plan.reductions if r.stage == k for line in self.reduced(r)]
            body += self.stage(stage)
        for number, k in enumerate(plan.held):
            self.called.add("memcpy")
            body.append(
                f"memcpy(s{k}, {self.block('next', number)}, {self.hidden} * sizeof *s{k});"
            )
        if plan.projected:
            body += [
                f"for (int i = 0; i < {self.output}; ++i) {{",
                "  s0[i] = 0.0f;",
                "}",
                self.product("hr", self.hidden, 0, "h", "s0"),
            ]
        head = filled("static void step_layer(", arguments, ") {")
        return "\n".join([head, *(f"  {line}" for line in body), "}"])

    def declarations(self) -> list[str]:
        """The arrays of a step, with the biases in that of the gates."""
        plan, hidden = self.plan, self.hidden
        first = f" + head * {hidden}" if plan.heads > 1 else ""
        body = [
            f"float *restrict s{k} = state->{member}[layer]{first};"
            for k, member in enumerate(plan.members)
        ]
        if plan.projected:
            body.append(f"float h[{hidden}];")
        for array, blocks in (
            ("part", plan.columns),
            ("temp", plan.temporaries),
            ("terms", plan.parts),
            ("next", len(plan.held)),
            ("gates", len(plan.labels)),
        ):
            if blocks:
                body.append(f"float {array}[{self.numbers(blocks)}];")
        if plan.labels:
            body += [
                f"for (int i = 0; i < {self.numbers(len(plan.labels))}; ++i) {{",
                f"  gates[i] = {'bias[i]' if plan.biased else '0.0f'};",
                "}",
            ]
        return body

    def product(self, side: str, rows: str, gates: int, x: str, to: str) -> str:
        """The call that adds a product to an array."""
        columns = self.numbers(gates) if gates else self.output
        rounded = self.plan.rounded
        function = "add_rounded_product" if rounded else "add_product"
        self.called.add(function)
        scaled, part = (f", scale_{side}", ", part") if rounded else ("", "")
        return f"{function}({rows}, {columns}, w_{side}{scaled}, {x}{part}, {to});"

    def recurrent(self, product: Product) -> str:
        to, rows = self.block("gates", product.block), self.hidden
        if product.operand is None:
            return self.product(product.name, self.output, len(product.gates), "s0", to)
        x = self.block("temp", product.operand)
        return self.product(product.name, rows, len(product.gates), x, to)

    def reduced(self, reduction: Reduction) -> list[str]:
        """The results of a reduction, from arrays side by side."""
        names = [result.replace(".", "_") for result in reduction.results]
        read = {label for stage in self.plan.stages for label in uses(stage.rows)}
        runs: list[tuple[str, int, int]] = []  # an array, its first block, the number of blocks
        for label in reduction.sources:
            array, block = self.array_of(label)
            if runs and runs[-1][0] == array and sum(runs[-1][1:]) == block:
                runs[-1] = (array, runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((array, block, 1))

        def over(function: str, *more: str) -> str:
            self.called.add(function)
            calls = [
                [self.numbers(count), self.block(array, first), *more]
                for array, first, count in runs
            ]
            return " + ".join(f"{function}({', '.join(given)})" for given in calls)

        if reduction.kind == "sum":
            return [f"const float {names[0]} = {over('sum_of')};"]
        if reduction.kind == "amax":
            return [f"const float {names[0]} = {over('largest_of')};"]
        mean, deviations = names
        total, sum_of = self.numbers(len(reduction.sources)), over("sum_of")
        sum_of = f"({sum_of})" if len(runs) > 1 else sum_of
        lines = [f"const float {mean} = {sum_of} / (float)({total});"]
        if reduction.results[1] in read:
            lines.append(f"const float {deviations} = {over('deviations_of', mean)};")
        return lines

    def array_of(self, label: str) -> tuple[str, int]:
        """The array and the block of what a reduction reads."""
        if label.startswith("part."):
            places = [parts_of(stage) for stage in self.plan.stages if label in stage.outputs]
            return "terms", places[0].index(label)
        if label.startswith("temp."):
            return "temp", int(label.split(".")[1])
        return "gates", self.plan.labels.index(label)

    def stage(self, stage: Stage) -> list[str]:
        """The formulas of a row, and the loop over the units."""
        if not stage.outputs:
            return []
        rows = {label: label.replace(".", "_") for label in uses(stage.rows)}
        names = {node: f"row_{k}" for k, node in enumerate(stage.rows) if node.args}
        before, texts = statements(stage.rows, rows, names)
        self.called |= functions_of([*stage.rows, *stage.outputs.values()])
        own = {f"row.{k}": text for k, text in enumerate(texts)}

        # Everything is read before the first state is written.
        used = uses(stage.outputs.values())
        local = {label: _local(label, k) for k, label in enumerate(self.places) if label in used}
        lines, results = statements(list(stage.outputs.values()), local | own)
        places = self.places | {
            label: f"terms[{self.at(k)}]" for k, label in enumerate(parts_of(stage))
        }
        places |= self.targets
        body = [f"const float {to} = {self.places[label]};" for label, to in local.items()]
        body += lines
        body += [
            f"{places[label]} = {text};" for label, text in zip(stage.outputs, results, strict=True)
        ]
        loop = [f"for (int i = 0; i < {self.hidden}; ++i) {{", *(f"  {b}" for b in body), "}"]
        if not before:
            return loop
        return ["{", *(f"  {line}" for line in (*before, *loop)), "}"]


def _local(label: str, place: int) -> str:
    """A variable for an input: `u.f` becomes `u_f`."""
    kind, name = label.split(".", 1)
    return f"{kind}_{name if name.isascii() else place}"
