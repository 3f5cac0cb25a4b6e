"""The KV blocks of one LLM engine, one by one: the meaning of ``native/include/sage/kv_cache.hpp``.

A block is free or used by one or more sequences. With prefix caching, a full block has a content: an id that stands for
its tokens *and every token before them* (a chained hash), so equal ids mean equal prefixes. Rules, as in vLLM v1:

* Free blocks queue for reuse. What is taken comes from the front and loses its content; what a sequence gives back goes
  to the end, its last block first, so that the end of a sequence is overwritten before its beginning.
* A content stays findable until its block is overwritten. Finding it brings the block back from the queue.
* Blocks are not deduplicated: two sequences that compute the same content at the same time keep a block each, and the
  one that had the content first is found.

Only full blocks have contents. Those of a prompt are findable as soon as they are scheduled; those that fill up while
decoding, once the sequence has given them back (vLLM: at once; nobody can know the text before, except a copy of the
same request). Without prefix caching no block ever has a content and only their number matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Content: TypeAlias = int | tuple[int, int]
"""Given by the load; or (task, index of the block), which nobody but the task itself can ask for."""


@dataclass(eq=False, slots=True)
class Block:
    """A block with a content. ``users``: sequences that hold it; 0 while it queues for reuse."""

    content: Content
    users: int


Held: TypeAlias = list[Block | None]
"""The blocks of a sequence, in the order of its tokens. None: no content (yet), so of no interest to others."""


class KvCache:
    """``blocks`` blocks, all free. ``caching``: keep contents."""

    def __init__(self, blocks: int, caching: bool) -> None:
        self.caching = caching
        self.queue: Held = [None] * blocks
        self.found: dict[Content, list[Block]] = {}

    @property
    def free(self) -> int:
        return len(self.queue)

    def find(self, contents: Sequence[Content]) -> list[Block]:
        """The longest run of blocks, from the first content on, that are still there."""
        blocks = []
        for content in contents if self.caching else ():
            if content not in self.found:
                break
            blocks.append(self.found[content][0])
        return blocks

    def hold(self, blocks: Sequence[Block]) -> None:
        """One more sequence uses these."""
        for block in blocks:
            if block.users == 0:
                self.queue.remove(block)
            block.users += 1

    def take(self, count: int) -> Held:
        """The next ``count`` free blocks; there must be as many."""
        taken, self.queue = self.queue[:count], self.queue[count:]
        assert len(taken) == count
        for block in taken:
            if block is not None:
                self.found[block.content].remove(block)
                if not self.found[block.content]:
                    del self.found[block.content]
        return [None] * count

    def fill(self, held: Held, contents: Sequence[Content]) -> None:
        """The first blocks of ``held`` are full and have these contents; those that have one keep it."""
        for index, content in enumerate(contents if self.caching else ()):
            if held[index] is None:
                block = held[index] = Block(content, 1)
                self.found.setdefault(content, []).append(block)

    def give_back(self, held: Held) -> None:
        """A sequence is done with its blocks."""
        for block in reversed(held):
            if block is not None:
                block.users -= 1
            if block is None or block.users == 0:
                self.queue.append(block)
