"""Rows of tokens as a tree: what several rows begin with stands in it once, and padding not at all.

A causal model gives equal beginnings equal hidden states. So the rows of a batch are merged into a tree of their
beginnings, its N tokens go through the model as one row, and only attention knows better: a token attends to the
tokens on the way from the root to itself.

        system prompt - question 1 - answer a
                     |            \\ answer b        36 tokens in a padded batch of three rows, 24 here
                      \\ question 2 - answer c

Attention is computed once for all children of a node: their queries against the keys of the path to the node, which
are expanded over the children, and their own. No mask of N x N is made, and the model's own kernel does the work.

Shapes: B rows of T tokens, N tokens in the tree, H heads of D features; of a family of G children the longest has L
tokens, and the path to their parent has A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHORTEST_SHARED = 8
"""A beginning of fewer tokens is computed again for each row: a family costs a call of the kernel in every layer."""
MOST_PADDING = 1.3
"""Siblings are padded to the longest of them if it is at most this many times as long as the shortest."""


@dataclass(frozen=True)
class Node:
    """A stretch of tokens that stands in the tree once.

    Attributes:
        start: the place of its first token in the tree.
        length: its number of tokens.
        path: the nodes from the root down to its parent.
    """

    start: int
    length: int
    path: tuple[Node, ...]


@dataclass(frozen=True)
class Family:
    """Children of one node, attended together.

    Attributes:
        path: (start, length) of each node from the root down to the parent.
        lengths: of the children, G of them.
    """

    path: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]

    def is_plain(self, window: int | None) -> bool:
        """Whether a text's tokens attend to all before them, and no path stands before the text."""
        return not self.path and (window is None or self.width <= window)

    @property
    def width(self) -> int:
        """L, to which the children are padded."""
        return max(self.lengths)


@dataclass
class PrefixTree:
    """A batch as a tree, with what leads from the one layout to the other.

    Attributes:
        tokens: (N,) the tokens, each node's after its parent's.
        positions: (N,) their positions.
        place: (B, T) where in the tree each token of the batch stands; 0 for padding.
        families: in the order of `gathered`.
        gathered: (sum of G * L,) the tokens of all families, padded with token 0.
        back: (N,) where in `gathered` each token of the tree stands.
        padding: (sum of G * L,) True where `gathered` is padding.
        texts: how many texts stand in the batch, of which a packed row has several.
        front: how many keys stand in front of all tokens and are none of them, as those of a trained prefix.
    """

    tokens: Tensor
    positions: Tensor
    place: Tensor
    families: tuple[Family, ...]
    gathered: Tensor
    back: Tensor
    padding: Tensor
    texts: int
    front: int = 0
    _masks: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def pairs(self) -> int:
        """Queries times keys that attention computes, padding included."""
        return sum(len(f.lengths) * f.width * (f.width + sum(length for _, length in f.path)) for f in self.families)

    def mask(self, family: Family, window: int | None) -> Tensor:
        """(L, front + A + L), True where a child's token attends: to at most `window` tokens, its own the last."""
        before = self.front + sum(length for _, length in family.path)
        key = (before, family.width, window)
        if key not in self._masks:
            keys = torch.arange(before + family.width, device=self.tokens.device)
            behind = keys[before:, None] - keys[None, :]
            # Right padding needs no mask of its own: no token of a child stands behind it.
            self._masks[key] = (behind >= 0) & (behind < (window or len(keys)))
        return self._masks[key]


def prefix_tree(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> PrefixTree:
    """Merge the rows of a batch into a tree.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), 0 at padding; None where a row has none.
        position_ids: (B, T) or (1, T); where they begin anew within a row, another text begins.
    """
    rows, columns = input_ids.shape
    ids = input_ids.cpu().numpy()
    positions = np.broadcast_to(np.arange(columns) if position_ids is None else position_ids.cpu().numpy(), ids.shape)
    present = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy()
    texts = [text for row in range(rows) for text in _texts(row, ids[row], positions[row], present[row])]
    # Neighbours in the order of their tokens are those that share most.
    texts.sort(key=lambda text: (text.position, text.ids.tolist()))
    grown = _Growth(texts)
    grown.grow(range(len(texts)), 0, ())

    place = np.zeros_like(ids)
    for text, path in grown.paths:
        starts = [np.arange(node.start, node.start + node.length) for node in path]
        place[text.row, text.column : text.column + len(text.ids)] = np.concatenate(starts)
    families, gathered = _families(grown.nodes)
    is_real = gathered >= 0
    # The inverse of `gathered` where that is a token.
    back = np.zeros(is_real.sum(), dtype=np.int64)
    back[gathered[is_real]] = np.flatnonzero(is_real)
    tensors = (np.concatenate(grown.ids), np.concatenate(grown.positions), place, gathered.clip(0), back, ~is_real)
    tokens, places, place, gathered, back, padding = (torch.from_numpy(x).to(input_ids.device) for x in tensors)
    return PrefixTree(tokens, places, place, families, gathered, back, padding, len(texts))


@dataclass(frozen=True)
class _Text:
    """A text of the batch: where it begins in it, the position of its first token, and its tokens."""

    row: int
    column: int
    position: int
    ids: Any

    def common(self, other: _Text) -> int:
        """How many tokens both begin with."""
        if self.position != other.position:
            return 0
        shorter = min(len(self.ids), len(other.ids))
        differ = np.flatnonzero(self.ids[:shorter] != other.ids[:shorter])
        return int(differ[0]) if len(differ) else shorter


def _texts(row: int, ids: Any, positions: Any, present: Any) -> list[_Text]:
    """The texts in one row: each goes on as long as neither columns nor positions make a jump."""
    columns = np.flatnonzero(present)
    jumps = (np.diff(columns) != 1) | (np.diff(positions[columns]) != 1)
    stretches = np.split(columns, np.flatnonzero(jumps) + 1)
    return [_Text(row, int(c[0]), int(positions[c[0]]), ids[c]) for c in stretches if len(c)]


class _Growth:
    """The tree as it grows: depth first, so that the ancestors of a node stand before it."""

    def __init__(self, texts: Sequence[_Text]) -> None:
        self.texts = texts
        # What each text shares with the next; all of a range share the least of these.
        self.common = [one.common(other) for one, other in pairwise(texts)]
        self.ids: list[Any] = []
        self.positions: list[Any] = []
        self.nodes: list[Node] = []
        self.paths: list[tuple[_Text, tuple[Node, ...]]] = []

    def grow(self, texts: range, depth: int, path: tuple[Node, ...]) -> None:
        """Add what texts, sorted and alike in their first `depth` tokens, have below a node."""
        first, last = self.texts[texts[0]], self.texts[texts[-1]]
        shared = min((self.common[at] for at in texts[:-1]), default=len(first.ids))
        # The shortest of equal beginnings comes first, so if the last ends there, all do.
        if shared == len(first.ids) == len(last.ids):
            path = self._add(first, depth, shared, path)
            self.paths += [(self.texts[at], path) for at in texts]
            return
        if shared - depth >= SHORTEST_SHARED:
            path, depth = self._add(first, depth, shared, path), shared
        begin = texts.start
        for at in texts:
            if at == texts[-1] or self.common[at] == shared:
                self.grow(range(begin, at + 1), depth, path)
                begin = at + 1

    def _add(self, text: _Text, begin: int, end: int, path: tuple[Node, ...]) -> tuple[Node, ...]:
        if begin == end:
            return path
        start = self.nodes[-1].start + self.nodes[-1].length if self.nodes else 0
        node = Node(start, end - begin, path)
        self.nodes.append(node)
        self.ids.append(text.ids[begin:end])
        self.positions.append(np.arange(begin, end) + text.position)
        return (*path, node)


def _families(nodes: Sequence[Node]) -> tuple[tuple[Family, ...], Any]:
    """The families of a tree, and their tokens as they are gathered, -1 for padding."""
    families: list[Family] = []
    gathered: list[Any] = []

    def key(node: Node) -> tuple[tuple[int, int], ...]:
        return tuple((above.start, above.length) for above in node.path)

    for path, siblings in groupby(sorted(nodes, key=lambda node: (key(node), node.length)), key=key):
        children = list(siblings)
        while children:
            alike = [child for child in children if child.length <= MOST_PADDING * children[0].length]
            children = children[len(alike) :]
            family = Family(path, tuple(child.length for child in alike))
            families.append(family)
            for child in alike:
                gathered.append(np.arange(child.start, child.start + child.length))
                gathered.append(np.full(family.width - child.length, -1))
    return tuple(families), np.concatenate(gathered)


class _Gather(torch.autograd.Function):
    """(N, F) to the families' order. A token stands there once, so that the gradient is a gather, too, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tree: PrefixTree) -> Tensor:
        ctx.tree = tree
        return x.index_select(0, tree.gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].index_select(0, ctx.tree.back), None


class _PutBack(torch.autograd.Function):
    """The inverse of `_Gather`: padding is left out, and gets a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tree: PrefixTree) -> Tensor:
        ctx.tree = tree
        return x.index_select(0, tree.back)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tree = ctx.tree
        # Whatever stands in its place, padding must not ask anything of the keys.
        return gradients[0].index_select(0, tree.gathered).masked_fill_(tree.padding[:, None], 0), None


def tree_attention(
    attend: Callable[..., Any], tree: PrefixTree, module: Any, query: Tensor, key: Tensor, value: Tensor,
    mask_of: Callable[[Family, int | None, Tensor], Tensor | None], **options: Any,
) -> Tensor:  # fmt: skip
    """Attention over the tree, by an attention function of transformers: (1, N, H, D).

    Args:
        query: (1, H, N, D); `key` and `value` may have fewer heads, and have those in front of the tokens' own.
        mask_of: what `attend` takes as the mask of a family, by the window of the layer and the queries.
    """
    # (N, H * D) each, gathered into the families' order: (sum of G * L, H * D).
    own = (query, key[:, :, tree.front :], value[:, :, tree.front :])
    packed = [_Gather.apply(x[0].transpose(0, 1).flatten(1), tree) for x in own]
    front = ((-tree.front, tree.front),) if tree.front else ()
    window = options.get("sliding_window")
    answers: list[Tensor] = []
    begin = 0
    for family in tree.families:
        count, width = len(family.lengths), family.width
        q, k, v = (
            x[begin : begin + count * width].unflatten(0, (count, width)).unflatten(-1, whole.shape[1::2])
            for x, whole in zip(packed, (query, key, value), strict=True)
        )
        begin += count * width
        if path := (*front, *family.path):
            k, v = (
                torch.cat([*(_expanded(x, tree.front + at, length, count) for at, length in path), own], dim=1)
                for x, own in zip((key, value), (k, v), strict=True)
            )
        mask = mask_of(family, window, q)
        # attend takes (G, heads, tokens, D) and gives (G, L, H, D).
        answer, _ = attend(module, *(x.transpose(1, 2) for x in (q, k, v)), mask, **options)
        answers.append(answer.reshape(count * width, -1))
    joined = _PutBack.apply(torch.cat(answers), tree)
    return joined.unflatten(-1, (query.shape[1], -1))[None]


def _expanded(x: Tensor, at: int, length: int, count: int) -> Tensor:
    """A node's keys or values for each child: (G, length, heads, D); their gradients sum over the children."""
    return x[0, :, at : at + length].transpose(0, 1).expand(count, -1, -1, -1)
