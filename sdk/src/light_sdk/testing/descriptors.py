"""Do Hopper's matrix products read the shared memory that they were given? Found out from a kernel's machine code.

`wgmma` is told where a factor lies by a descriptor in uniform registers, whose low word is made of the address of the
program's shared memory. The ptxas of CUDA 12.8, which Triton 3.6 ships, loses that address where two factors of one kernel
lie at the same place, one after the other, in different layouts: the second one's descriptors are then made of whatever a
register held before. Such a kernel computes wrong numbers or makes illegal memory accesses, and nothing in Triton's code or
in PTX shows it. `lost_descriptors` follows the address from where it is made to each product.

Called by `compiling.py` for every kernel that it compiles, and by tests of single kernels.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping

__all__ = ["lost_descriptors"]

_LINE = re.compile(r"^(?P<label>\.L\w+):|/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<code>[^;]*?)\s*;", re.MULTILINE)
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_REGISTER = re.compile(r"\b(UR|R)(\d+)\b")
_BRANCH = re.compile(r"BRA\b.*`\((\.L\w+)\)")
_DESCRIPTOR = re.compile(r"\bgdesc\[UR(\d+)\]")

_State = dict[str, bool]
"""For each register that was written on every way to here, whether it was made of the address of shared memory."""


def lost_descriptors(cubin: bytes) -> list[str]:
    """Products of a compiled kernel one of whose factors in shared memory is at an address that was not made of shared memory's.

    Args:
        cubin: machine code of one kernel, for compute capability 9.

    Returns:
        A line for each such product, its address in the code first; [] where all is well, or where nothing is multiplied by
        `wgmma`.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return _lost(printed) if "gdesc[" in printed else []


def _lost(code: str) -> list[str]:
    """As `lost_descriptors`, of what nvdisasm prints."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for match in _LINE.finditer(code):
        if match["label"]:
            labels[match["label"]] = len(instructions)
        else:
            instructions.append((match["address"], match["code"]))
    begins = set(labels.values())
    # Where ways meet, only what holds on all of them holds; a block is gone through again while that shrinks.
    states: dict[int, _State] = {0: {}}
    found: dict[str, str] = {}
    pending = [0]

    def enter(begin: int, state: _State) -> None:
        known = states.get(begin)
        met = dict(state) if known is None else {name: known[name] and state[name] for name in known.keys() & state.keys()}
        if met != known:
            states[begin] = met
            pending.append(begin)

    while pending:
        at = pending.pop()
        state = dict(states[at])
        while at < len(instructions):
            address, instruction = instructions[at]
            if registers := _execute(instruction, state):
                found[address] = f"{address}: {instruction} reads shared memory at {' and '.join(registers)}, which is no address of it"
            if (branch := _BRANCH.search(instruction)) and branch[1] in labels:
                enter(labels[branch[1]], state)
            if re.match(r"(EXIT|RET|BRA `)", instruction):
                break
            at += 1
            if at in begins:
                enter(at, state)
                break
    return [found[address] for address in sorted(found, key=lambda address: int(address, 16))]


def _execute(instruction: str, state: _State) -> list[str]:
    """Changes `state` as `instruction` does, and names its descriptors that are made of something else than addresses."""
    operation, _, rest = _PREDICATE.sub("", instruction).partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    if descriptor := _DESCRIPTOR.search(rest):
        # Four registers: two for the left factor, which are idle where it is in registers, and two for the right one.
        first = int(descriptor[1])
        lows = [first + 2] if re.match(r"R\d", operands[1]) else [first, first + 2]
        return [f"UR{low}" for low in lows if not state.get(f"UR{low}", False)]
    target = re.match(r"(UR|R)(\d+)\b", operands[0])
    if target is None or operation.startswith(("ST", "RED", "ATOM")):
        return []
    kind, number = target[1], int(target[2])
    if operation.startswith("LD"):
        # What was spilled may be an address again; what comes from memory and constants is none.
        values = [operation.startswith("LDL")] * (4 if ".128" in operation else 2 if ".64" in operation else 1)
    else:
        derived = "SR_CgaCtaId" in rest or _is_derived(operands[1:], state)
        values = [derived, derived] if re.search(r"\.(64|WIDE)\b", operation) else [derived]
    for place, value in enumerate(values):
        state[f"{kind}{number + place}"] = value
    return []


def _is_derived(operands: list[str], state: Mapping[str, bool]) -> bool:
    return any(state.get("".join(register), False) for operand in operands for register in _REGISTER.findall(operand))
