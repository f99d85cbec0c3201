"""Loops in listings of machine code."""

from __future__ import annotations

from tests.csrc.cuda.machine_code import step_loop

# A loop at 0020, with a smaller one without a product inside, a branch to code behind the end, and
# a barrier at which threads meet again; another loop follows.
LISTING = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
                                                             /* 0x000ff00000000800 */
        /*0010*/               @P0 BRA 0x00b0 ;  /* 0x0000000000000947 */
        /*0020*/                   BSSY B0, 0x60 ;
        /*0030*/               @P1 BRA 0xd0 ;
        /*0040*/              @!P2 BRA 0x40 ;
        /*0050*/                   BSYNC B0 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12.reuse, R4 ;
        /*0070*/                   BRA.DIV UR4, 0xf0 ;
        /*0080*/               @P3 BRA 0x20 ;
        /*0090*/                   HFMA2.MMA R5, -RZ, RZ, 0, 0 ;
        /*00a0*/               @P0 BRA 0x90 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
        /*00d0*/                   YIELD ;
        /*00e0*/                   BSYNC B0 ;
        /*00f0*/                   WARPSYNC.COLLECTIVE R1, 0x110 ;
        /*0100*/                   NOP ;
        /*0110*/                   BRA 0x80 ;
		..........
"""


def test_a_loop_has_all_from_which_it_comes_back() -> None:
    """0020 to 0080, and 00d0 to 0110."""
    assert step_loop(LISTING) == 7 + 5


def test_code_without_a_product_in_a_loop_has_none() -> None:
    assert step_loop(LISTING.replace("HMMA", "FFMA")) == 0
    assert step_loop(LISTING.replace("@P3 BRA 0x20", "@P3 BRA 0x90")) == 0
