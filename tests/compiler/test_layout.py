"""Where the values of a step in stages lie in generated code."""

from __future__ import annotations

import pytest

from fastrnn import cells
from fastrnn.compiler.derive import derive
from fastrnn.compiler.layout import Layout, shape, site_of, values
from tests.support.derivations import make
from tests.support.shared import noisy, noisy_staged, peepholes, staged
from tests.support.staged import USERS

STAGED = [*USERS, staged, noisy_staged.noisy]


def reset_before(u, v, h):
    r = (u.r + v.r).sigmoid()
    return (u.n + v(r * h).n).tanh() * (u.z + v.z).sigmoid()


def test_the_shape_of_a_step_with_another_product() -> None:
    derived = derive(make("rzn", "h", reset_before))
    assert site_of(derived) == [-1, -1, 0]
    forward, backward = (shape(derived, forward=way) for way in (True, False))
    assert (forward.sites, forward.results, forward.operands) == (1, 0, (0,))
    # The products of state 0 come first, then that of a temporary; its transposed product before
    # the gradient of r.
    assert forward.gates == (0b011, 0b100)
    assert backward.gates == (0, 0b100)
    assert [written.sites for written in forward.written] == [0, 1]


@pytest.mark.parametrize("cell", STAGED, ids=lambda cell: cell.name)
def test_everything_is_written_once(cell: cells.Cell) -> None:
    derived = derive(cell)
    for forward in (True, False):
        layout, sizes = Layout(derived, forward), shape(derived, forward)
        for name, count in (
            ("states", len(cell.states)),
            ("temporaries", sizes.temporaries),
            ("saved", len(derived.saved) if forward else 0),
            ("du", 0 if forward else len(cell.gates)),
            ("dv", 0 if forward else len(cell.gates)),
            ("operands", 0 if forward else sizes.sites),
        ):
            bits = [getattr(written, name) for written in layout.written]
            assert sum(bits) == (1 << count) - 1, name
        reduced = {m.result for m in layout.moments} | {m.result + 1 for m in layout.moments}
        for written in layout.written:
            assert not written.sums & written.maxima
            reduced |= {k for k in range(sizes.results) if (written.sums | written.maxima) >> k & 1}
        own = range(0 if forward else sizes.saved_results, sizes.results)
        assert sorted(reduced) == list(own)


def test_values_of_a_step_besides_gates_and_states() -> None:
    assert values(derive(cells.get("lstm")), forward=True) == 0
    drawing = derive(noisy.noisy)
    assert values(drawing, forward=True) == len(drawing.draws) + len(drawing.params)
    derived = derive(peepholes)
    assert values(derived, forward=True) == len(derived.params)
    assert values(derived, forward=False) == 2 * len(derived.params)  # with their gradients
    slstm = derive(cells.get("slstm"))
    assert values(slstm, forward=False) == len(slstm.saved) - len(slstm.gates) > 0
    derived = derive(staged)
    for forward in (True, False):
        sizes = shape(derived, forward)
        held = len(derived.params) + sizes.temporaries + sizes.results + 1
        if not forward:
            held += len(derived.params) + max(0, len(derived.saved) - len(derived.gates))
        assert values(derived, forward) == held
