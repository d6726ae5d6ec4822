"""Which decodes of a step begin with the same slots, so that attention can read those once for all of them.

Requests share slots by sharing nodes of the prefix tree. A group is decodes that have a node on their paths, and shares
the tokens of that node's path; each decode is in one group at most, chosen so that few tokens are read twice. This never
looks at tokens or slots. Caller: the scheduler, when it plans.
"""

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from light_core.kv.radix import Node, RadixCache
from light_core.scheduler.request import ScheduledRequest
from light_core.scheduler.rows import Rows

__all__ = ["MIN_MEMBERS", "MIN_SAVED", "MIN_SHARED_LEN", "PrefixGroups"]

MIN_MEMBERS, MIN_SHARED_LEN = 4, 1024
"""Smaller groups and shorter prefixes, in tokens, are read request by request."""
MIN_SAVED = 24576
"""Tokens whose reading a step must save, or nothing is shared: one more pass over queries and results has its price, and
the second reader of a prefix often finds it in the GPU's L2. Measured on an H200 with 4 KiB of keys and values a token:
16 requests that share 2,048 tokens take 28 microseconds a layer for 33, 64 that share 512 would take 67 for 53."""

MAX_NODES = 4096
"""Nodes that are looked at for one step. Decodes that come after them, in trees that thousands of short turns have cut
up, go ungrouped until fewer run."""

Ints = npt.NDArray[np.int32]


class PrefixGroups:
    """Groups the decodes of each step.

    Args:
        tree: whose nodes the requests share.
        rows: state of the requests.
        records: row to record.
    """

    def __init__(self, tree: RadixCache, rows: Rows, records: npt.NDArray[np.object_]) -> None:
        self._tree, self._rows, self._records = tree, rows, records
        self._clock = -1
        self._decodes: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._table: Ints | None = None

    def table(self, decodes: npt.NDArray[np.int64]) -> Ints | None:
        """`Step.shared_prefixes` for a step.

        Costs a comparison while the same requests go on decoding, or where less is shared than is worth it; else
        O(decodes + nodes of their paths), about 0.2 ms for 512 decodes.

        Args:
            decodes: rows that decode, int64 [num_decodes].

        Returns:
            int32 [3, num_decodes], not to be written; None if nothing is shared.
        """
        if len(decodes) < MIN_MEMBERS or self._tree.shared_tokens < MIN_SHARED_LEN:
            return None
        # The holders of the tree's nodes change with its clock alone, and who shares what with them.
        if self._clock != self._tree.clock or not np.array_equal(decodes, self._decodes):
            self._clock, self._decodes = self._tree.clock, decodes
            self._table = self._find(decodes)
        return self._table

    def _find(self, decodes: npt.NDArray[np.int64]) -> Ints | None:
        records: list[ScheduledRequest] = self._records[decodes].tolist()
        lens, loose = _climb([record.node for record in records], self._rows.tree_len[decodes].tolist())
        groups = _choose(lens, loose)
        return _create_table(len(decodes), groups) if sum(group.saved for group in groups) >= MIN_SAVED else None


@dataclass(slots=True, eq=False)
class _Group:
    """Decodes, by index, that share `length` tokens."""

    members: list[int]
    length: int

    @property
    def saved(self) -> int:
        """Tokens that are not read again."""
        return (len(self.members) - 1) * self.length


def _climb(ends: list[Node | None], path_lens: list[int]) -> tuple[dict[Node, int], dict[Node, list[int]]]:
    """Goes up the paths of all decodes, as far as they are long enough to be shared, each node of many holders once.

    Args:
        ends: of the path of each decode; None for a decode that is not in the tree.
        path_lens: tokens of these paths.

    Returns:
        The nodes with `MIN_MEMBERS` holders or more, to the length of their paths; and of these the lowest of each
        decode, to such decodes.
    """
    lens: dict[Node, int] = {}
    lowest: dict[Node, list[int]] = {}
    left = MAX_NODES
    for index, (node, length) in enumerate(zip(ends, path_lens, strict=True)):
        while node is not None and length >= MIN_SHARED_LEN and node.ref < MIN_MEMBERS and left:
            length -= len(node.tokens)
            node, left = node.parent, left - 1
        if node is None or length < MIN_SHARED_LEN or not left:
            continue
        lowest.setdefault(node, []).append(index)
        while node is not None and length >= MIN_SHARED_LEN and node not in lens and left:
            lens[node] = length
            length -= len(node.tokens)
            node, left = node.parent, left - 1
    return lens, lowest


def _choose(lens: dict[Node, int], lowest: dict[Node, list[int]]) -> list[_Group]:
    """Puts decodes together from the longest prefixes to the shortest, by what each choice saves.

    At a node, decodes below that have no group yet make one, if they are enough. So do groups below that are better off
    in a group of this node, once there is one, and all of them if they are better off together.
    """
    settled: list[_Group] = []
    below: dict[Node, list[_Group]] = {}
    for node, length in sorted(lens.items(), key=itemgetter(1), reverse=True):
        loose, groups = lowest.pop(node, []), below.pop(node, [])
        joining = [group for group in groups if len(group.members) * length > group.saved]
        # Nodes further up are shorter, and worth less still to the others.
        settled += [group for group in groups if len(group.members) * length <= group.saved]
        together = _Group([*loose, *(member for group in joining for member in group.members)], length)
        if len(together.members) >= MIN_MEMBERS and together.saved > sum(group.saved for group in joining):
            loose, joining = [], [together]
        parent = node.parent
        if parent in lens:
            lowest.setdefault(parent, []).extend(loose)
            below.setdefault(parent, []).extend(joining)
        else:
            settled += joining
    return settled


def _create_table(num_decodes: int, groups: list[_Group]) -> Ints:
    """`Step.shared_prefixes` of `groups`; the other decodes follow them."""
    table = np.zeros((3, num_decodes), dtype=np.int32)
    alone = np.ones(num_decodes, dtype=np.bool_)
    begin = 0
    for group in groups:
        end = begin + len(group.members)
        table[:, begin:end] = group.members, [group.length] * len(group.members), range(len(group.members))
        alone[group.members] = False
        begin = end
    table[0, begin:] = np.flatnonzero(alone)
    table.flags.writeable = False  # given out again while nothing changes
    return table
