"""Addresses that reach products and addresses that are lost on the way, in machine code as nvdisasm prints it."""

import pytest

from light_sdk.testing.descriptors import _lost

BASE = ["UMOV UR16, 0x400", "S2UR UR4, SR_CgaCtaId", "ULEA UR16, UR4, UR16, 0x18"]
"""The address of shared memory, in UR16."""
LEFT = ["USHF.R.U32.HI UR8, URZ, 0x4, UR16", "UMOV UR9, 0xc0000010"]
RIGHT = ["UIADD3 UR10, UR16, 0x3000, URZ", "USHF.R.U32.HI UR10, URZ, 0x4, UR10", "UMOV UR11, 0xc0000010"]
PRODUCT = "HGMMA.64x16x16.F32.BF16 R56, gdesc[UR8], R56, gsb0"
OF_REGISTERS = "HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR8].tnspB, R56, gsb0"


def printed(*lines: str) -> str:
    """`lines`, of which those that begin with a dot are labels, with addresses."""
    return "\n".join(
        line if line.startswith(".") else f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("lines", "registers"),
    [
        ([*BASE, *LEFT, *RIGHT, PRODUCT, "EXIT"], []),
        ([*BASE, *LEFT, PRODUCT, "EXIT"], ["UR10"]),
        ([*BASE, *RIGHT, PRODUCT, "EXIT"], ["UR8"]),
        ([*BASE, *RIGHT, OF_REGISTERS, "EXIT"], []),
        # What this was made for: UR10 is counted up and was never there.
        ([*BASE, "UIADD3 UR10, UP0, UR10, 0x20, URZ", OF_REGISTERS, "EXIT"], ["UR10"]),
        ([*BASE, *RIGHT, "USHF.R.S32.HI UR10, URZ, 0x1f, UR39", OF_REGISTERS, "EXIT"], ["UR10"]),
        # Through registers of threads, and through memory where they are spilled.
        ([*BASE, "IMAD.U32 R3, RZ, RZ, UR16", "R2UR UR10, R3", OF_REGISTERS, "EXIT"], []),
        ([*BASE, "LDL R3, [R1]", "R2UR UR10, R3", OF_REGISTERS, "EXIT"], []),
        ([*BASE, "LDG.E R3, desc[UR20][R2.64]", "R2UR UR10, R3", OF_REGISTERS, "EXIT"], ["UR10"]),
        # One of two ways to a product.
        ([*BASE, "@P0 BRA `(.L_x_0)", *RIGHT, ".L_x_0:", OF_REGISTERS, "EXIT"], ["UR10"]),
        ([*BASE, *RIGHT, "@P0 BRA `(.L_x_0)", "UIADD3 UR10, UR10, 0x20, URZ", ".L_x_0:", OF_REGISTERS, "EXIT"], []),
        ([*BASE, "BRA `(.L_x_0)", OF_REGISTERS, ".L_x_0:", "EXIT"], []),
        # The second time around a loop.
        ([*BASE, *RIGHT, ".L_x_0:", OF_REGISTERS, "ULDC UR10, c[0x0][0x268]", "@!P6 BRA `(.L_x_0)", "EXIT"], ["UR10"]),
        ([*BASE, *RIGHT, ".L_x_0:", OF_REGISTERS, "UIADD3 UR10, UR10, 0x40, URZ", "@!P6 BRA `(.L_x_0)", "EXIT"], []),
    ],
    ids=str,
)
def test_lost(lines: list[str], registers: list[str]) -> None:
    found = _lost(printed(*lines))
    assert len(found) == bool(registers)
    assert all(f"shared memory at {register}," in found[0] for register in registers)
