"""The prefix cache: a radix tree over token ids, one token fine, that says which slots hold the KV of a prefix.

The tree owns the slots of its nodes. Requests lock the path that they read; what nobody locks can be evicted, least
recently used leaf first. Not here: the pool (evicted slots are returned to the caller, who frees them) and any
decision about what to insert. Caller: the scheduler, from one thread. Nothing recurses; paths and prompts may be long.

Radix trees for KV reuse: RadixAttention, Zheng et al., "SGLang: Efficient Execution of Structured Language Model
Programs" (arXiv 2312.07104, section 3).
"""

import heapq
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["Node", "RadixCache"]

Tokens = npt.NDArray[np.int32]
Slots = npt.NDArray[np.int32]

_EMPTY: Slots = np.empty(0, dtype=np.int32)


class Node:
    """A run of tokens and the slots of their KV. Everything is set by `RadixCache` alone.

    A handle to a node means the path from the root to the node's last token. When a node is split its object keeps
    the lower part, so handles keep their meaning.

    Attributes:
        parent: None for a root and for a node that has been removed.
        children: first token id to child.
        tokens, slots: int32 [n]; empty for a root.
        ref: how many holders lock it. A parent's is at least the sum of its children's.
        holders: XOR of the ids of its holders; with `ref` 1, the only holder's id.
        time: clock of the last lock or unlock that passed it.
        salt: of a root; "" elsewhere.
    """

    __slots__ = ("children", "holders", "parent", "ref", "salt", "slots", "time", "tokens")

    def __init__(self, parent: "Node | None", tokens: Tokens, slots: Slots, salt: str = "") -> None:
        self.parent, self.tokens, self.slots, self.salt = parent, tokens, slots, salt
        self.children: dict[int, Node] = {}
        self.ref = self.holders = self.time = 0


class RadixCache:
    """Prefixes and their slots, one isolated tree for each salt.

    Args:
        num_holders: holder ids are 0 … num_holders - 1; a holder locks at most one path at a time.

    Attributes:
        total_tokens: in all trees.
        locked_tokens: of nodes with a holder.
        shared_tokens: of nodes with two holders or more.
        num_nodes: roots not counted.
        evicted_tokens: since the start.
        clock: locks and unlocks since the start; while it stands, so do the holders of every node.
        own_tokens: int64 [num_holders], tokens that this holder alone locks. Their sum plus `shared_tokens` is
            `locked_tokens`, always.
    """

    def __init__(self, num_holders: int) -> None:
        self.total_tokens = self.locked_tokens = self.shared_tokens = self.num_nodes = self.evicted_tokens = 0
        self.own_tokens = np.zeros(num_holders, dtype=np.int64)
        self._roots: dict[str, Node] = {}
        self.clock = 0
        # Candidates for eviction as (time, serial, node). Entries go stale when a node is locked, gets a child or is
        # removed; `_is_candidate` tells. Every unlocked leaf has a valid entry.
        self._heap: list[tuple[int, int, Node]] = []
        self._serial = itertools.count()

    @property
    def evictable_tokens(self) -> int:
        """Tokens that nobody locks; `evict` can give all of them."""
        return self.total_tokens - self.locked_tokens

    def match(self, salt: str, tokens: Tokens) -> tuple[Node, Slots, int]:
        """The longest cached prefix of `tokens`.

        Args:
            salt: of the tree to look in.
            tokens: int32 [n], possibly empty.

        Returns:
            The node at whose end the prefix ends (a node is split where needed), its slots int32 [length], and its
            length. Lock the node before anything is evicted.
        """
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(None, _EMPTY, _EMPTY, salt)
        return self.match_from(root, tokens)

    def match_from(self, node: Node, tokens: Tokens) -> tuple[Node, Slots, int]:
        """As `match`, for tokens that follow the path of `node`."""
        found: list[Slots] = []
        length = 0
        while length < len(tokens):
            child = node.children.get(tokens.item(length))
            if child is None:
                break
            common = _common_prefix_len(child.tokens, tokens[length:])
            node = child if common == len(child.tokens) else self._split(child, common)
            found.append(node.slots)
            length += common
        if len(found) == 1:
            return node, found[0], length
        return node, np.concatenate(found) if found else _EMPTY, length

    def covered(self, salt: str, tokens: Tokens) -> int:
        """How many of `tokens`, from the front, are there; changes nothing."""
        node, length = self._roots.get(salt), 0
        while node is not None and length < len(tokens):
            child = node.children.get(tokens.item(length))
            common = 0 if child is None else _common_prefix_len(child.tokens, tokens[length:])
            length += common
            node = child if child is not None and common == len(child.tokens) else None
        return length

    def insert(self, node: Node, tokens: Tokens, slots: Slots) -> tuple[Node, int]:
        """Adds `tokens` with their `slots` (int32 [n] both; copied) below the path of `node`.

        Returns:
            The node at the end of `tokens`, unlocked by this call, and how many of the tokens, from the front, were
            there already: the caller keeps (and usually frees) their slots; the tree owns the others from now on.
        """
        end, _, known = self.match_from(node, tokens)
        if known == len(tokens):
            return end, known
        leaf = Node(end, tokens[known:].copy(), slots[known:].copy())
        leaf.time = self.clock
        end.children[leaf.tokens.item(0)] = leaf
        self.total_tokens += len(leaf.tokens)
        self.num_nodes += 1
        self._offer(leaf)
        return leaf, known

    def lock(self, node: Node, holder: int, above: Node | None = None) -> None:
        """Adds `holder` to the path of `node`, up to the root or to `above` (excluded), which it locks already."""
        self.clock += 1
        step: Node | None = node
        while step is not None and step is not above:
            length = len(step.tokens)
            if step.ref == 0:
                self.own_tokens[holder] += length
                self.locked_tokens += length
            elif step.ref == 1:
                self.own_tokens[step.holders] -= length
                self.shared_tokens += length
            step.ref += 1
            step.holders ^= holder
            step.time = self.clock
            step = step.parent

    def unlock(self, node: Node, holder: int) -> None:
        """Takes `holder` off the whole path of `node`."""
        self.clock += 1
        step: Node | None = node
        while step is not None:
            length, parent = len(step.tokens), step.parent
            assert step.ref > 0, "a node is unlocked that nobody holds"
            step.ref -= 1
            step.holders ^= holder
            step.time = self.clock
            if step.ref == 0:
                self.own_tokens[holder] -= length
                self.locked_tokens -= length
                self._offer(step)
            elif step.ref == 1:
                self.own_tokens[step.holders] += length
                self.shared_tokens -= length
            step = parent

    def evict(self, count: int) -> Slots:
        """Removes `count` tokens that nobody locks (fewer if there are fewer), least recently used leaf first and
        each leaf from its end; returns their slots. O(log nodes) for each leaf, amortised."""
        freed: list[Slots] = []
        while count > 0 and self._heap:
            time, _, node = heapq.heappop(self._heap)
            if not _is_candidate(node, time):
                continue
            if len(node.tokens) > count:
                freed.append(node.slots[-count:])
                self._trim(node, count)
                self._offer(node)
                count = 0
            else:
                freed.append(node.slots)
                count -= len(node.slots)
                self._remove(node)
        slots = np.concatenate(freed) if freed else _EMPTY
        self.evicted_tokens += len(slots)
        return slots

    def discard(self, node: Node) -> Slots:
        """Removes the end of the path of `node` as far up as nobody locks it or branches off it; returns the slots.
        For KV that must not be used again."""
        freed: list[Slots] = []
        while node.parent is not None and node.ref == 0 and not node.children:
            parent = node.parent
            freed.append(node.slots)
            self._remove(node)
            node = parent
        return np.concatenate(freed) if freed else _EMPTY

    def reset(self) -> Slots:
        """Removes everything that nobody locks; returns the slots."""
        return self.evict(self.evictable_tokens)

    def has_child(self, node: Node, token: int) -> bool:
        """Whether the tree goes on below the path of `node` with `token`."""
        return token in node.children

    def nodes(self) -> Iterator[Node]:
        """Every node, roots among them; parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Asserts what the attributes promise. O(tokens)."""
        offered = {id(node) for time, _, node in self._heap if _is_candidate(node, time)}
        total = locked = shared = nodes = 0
        own = np.zeros_like(self.own_tokens)
        for node in self.nodes():
            length = len(node.tokens)
            assert length == len(node.slots)
            assert node.ref >= sum(child.ref for child in node.children.values())
            assert all(child.parent is node and child.tokens.item(0) == token for token, child in node.children.items())
            if node.parent is None:
                assert length == 0 and (node.children or node.ref), "a root without purpose"
                continue
            assert length > 0
            assert node.ref or node.children or id(node) in offered, "an unlocked leaf cannot be evicted"
            nodes, total = nodes + 1, total + length
            locked += length * (node.ref > 0)
            shared += length * (node.ref > 1)
            if node.ref == 1:
                own[node.holders] += length
        assert (total, locked, shared, nodes) == (self.total_tokens, self.locked_tokens, self.shared_tokens, self.num_nodes)
        assert np.array_equal(own, self.own_tokens)

    def _split(self, node: Node, length: int) -> Node:
        """Cuts `node` after `length` tokens; returns the new upper part. Counters do not change."""
        assert node.parent is not None and 0 < length < len(node.tokens)
        # Copies, so that neither part keeps the memory of the whole alive.
        upper = Node(node.parent, node.tokens[:length].copy(), node.slots[:length].copy())
        upper.ref, upper.holders, upper.time = node.ref, node.holders, node.time
        node.parent.children[node.tokens.item(0)] = upper
        node.tokens, node.slots, node.parent = node.tokens[length:].copy(), node.slots[length:].copy(), upper
        upper.children[node.tokens.item(0)] = node
        self.num_nodes += 1
        return upper

    def _trim(self, node: Node, count: int) -> None:
        """Drops the last `count` tokens of an unlocked leaf."""
        tokens, slots = node.tokens[:-count], node.slots[:-count]
        # A view keeps the whole array alive; copying at each halving costs O(1) a token.
        base = tokens.base
        if isinstance(base, np.ndarray) and len(tokens) * 2 <= len(base):
            tokens, slots = tokens.copy(), slots.copy()
        node.tokens, node.slots = tokens, slots
        self.total_tokens -= count

    def _remove(self, node: Node) -> None:
        """Takes an unlocked leaf out of the tree."""
        parent = node.parent
        assert parent is not None and node.ref == 0 and not node.children
        del parent.children[node.tokens.item(0)]
        node.parent = None
        self.total_tokens -= len(node.tokens)
        self.num_nodes -= 1
        self._offer(parent)

    def _offer(self, node: Node) -> None:
        """Makes `node` a candidate for eviction if it is an unlocked leaf; drops a root that has become useless."""
        if node.ref or node.children:
            return
        if node.parent is None:
            self._roots.pop(node.salt, None)
            return
        heapq.heappush(self._heap, (node.time, next(self._serial), node))
        if len(self._heap) > 2 * self.num_nodes + 64:
            valid = {id(entry[2]): entry for entry in self._heap if _is_candidate(entry[2], entry[0])}
            self._heap = list(valid.values())
            heapq.heapify(self._heap)


def _is_candidate(node: Node, time: int) -> bool:
    """Whether a heap entry still tells the truth."""
    return node.ref == 0 and node.time == time and not node.children and node.parent is not None


def _common_prefix_len(a: Tokens, b: Tokens) -> int:
    length = min(len(a), len(b))
    equal = a[:length] == b[:length]
    first = int(equal.argmin())
    return first if not equal[first] else length
