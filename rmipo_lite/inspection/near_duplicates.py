"""Texts that are nearly the same: among all pairs, and the two responses of one.

Among all: MinHash with banding, every candidate verified. A text is the set of its three-word
shingles, hashed. Its signature holds the smallest value of the set under each of `_HASHES` hash
functions; two texts agree in a place with the probability of their Jaccard similarity (Broder
1997). Texts whose signatures agree on a whole band meet in a bucket, and inside a bucket each is
compared with a few leaders and not with every other: a thousand copies of one text cost a thousand
comparisons. What meets is compared exactly before it counts.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from rmipo_lite.data.rows import Texts

Hashes = NDArray[np.uint64]

ALMOST_EQUAL = 0.9  # similarity from which the two responses of a pair are almost equal
THRESHOLD = 0.8  # Jaccard similarity from which texts are near duplicates
_BANDS, _ROWS_IN_BAND = 16, 5  # a pair at the threshold is missed once in 500
_HASHES = _BANDS * _ROWS_IN_BAND
# Agreement of the signatures from which a pair is worth comparing exactly: three standard
# deviations of the estimate below the threshold.
_ESTIMATE = 0.66
_LEADERS = 8  # of a bucket that the others are compared with
_BATCH = 512  # texts hashed together: what they take stays in the processor's cache
_WORDS_REMEMBERED = 2**18
_MOST_COMPARED = 2000  # words of a difference that are compared in order
# Scripts without spaces between words count every character as one.
_NO_SPACES = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")


class _WordHashes(dict[str, int]):
    """Hash of every word met, the same in every process (Python's own isn't)."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _WORDS_REMEMBERED:
            self.clear()
        # Never 0, which stands for the end of a text.
        value = self[word] = crc32(word.encode("utf-8", "replace")) + 1
        return value


def near_duplicate_groups(
    count: int, texts_of: Callable[[int], Texts], threshold: float = THRESHOLD
) -> list[list[int]]:
    """Groups of near duplicates among `count` pairs, each in order, the largest first.

    Two pairs are near duplicates when the three-word shingles of prompt, chosen and rejected
    together, and those of the two responses alone, have at least this Jaccard similarity: pairs
    that share a long prompt and answer it differently are none.

    Args:
        count: how many pairs.
        texts_of: texts of a pair by its position; asked again for every pair that is compared.
        threshold: in (0, 1].
    """
    hashes = _WordHashes()
    signatures, positions = _signatures(count, texts_of, hashes)
    groups = _Groups(len(positions))
    for band in range(_BANDS):
        columns = signatures[:, band * _ROWS_IN_BAND : (band + 1) * _ROWS_IN_BAND]
        for members in _buckets(columns):
            _join(members, signatures, groups, _Comparison(positions, texts_of, hashes, threshold))
    found = [[int(positions[member]) for member in group] for group in groups.several()]
    return sorted(found, key=lambda group: (-len(group), group[0]))


def _mixed(values: Hashes) -> Hashes:
    """Spread over all 64 bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _shingles(texts: Sequence[list[int]]) -> Hashes:
    """Hashes of every word of the texts with the two after it, or with the end of its text."""
    words = np.array([word for text in texts for word in (*text, 0, 0)], np.uint64)
    first, second, third = words[:-2], words[1:-1], words[2:]
    return _mixed(_mixed(_mixed(first) + second) + third)[first != 0]


def _words(text: str, hashes: _WordHashes) -> list[int]:
    return list(map(hashes.__getitem__, _WORD.findall(text.lower())))


def _signatures(
    count: int, texts_of: Callable[[int], Texts], hashes: _WordHashes
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """(M, _HASHES) signatures and (M,) positions of the pairs that have a word at all."""
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**64, (2, _HASHES), dtype=np.uint64)
    signatures, positions = [], []
    for start in range(0, count, _BATCH):
        batch: list[list[int]] = []
        for position in range(start, min(count, start + _BATCH)):
            found = [word for text in texts_of(position) for word in _words(text, hashes)]
            if found:
                positions.append(position)
                batch.append(found)
        if batch:
            starts = np.cumsum([0, *map(len, batch[:-1])])
            signatures.append(_minima(_shingles(batch), starts, keys))
    if not positions:
        return np.empty((0, _HASHES), np.uint32), np.empty(0, np.int64)
    return np.concatenate(signatures), np.array(positions)


def _minima(shingles: Hashes, starts: NDArray[np.int64], keys: Hashes) -> NDArray[np.uint32]:
    """(texts, _HASHES) smallest value of every text under every hash function."""
    minima = np.empty((len(starts), _HASHES), np.uint32)
    for place, (mask, factor) in enumerate(keys.T):
        values = ((shingles ^ mask) * (factor | np.uint64(1))) >> np.uint64(32)
        minima[:, place] = np.minimum.reduceat(values, starts)
    return minima


def _buckets(band: NDArray[np.uint32]) -> Iterator[NDArray[np.int64]]:
    """Members of every bucket that has more than one, in order."""
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = _mixed(keys + column)
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    sizes = np.diff(starts, append=len(order))
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        yield order[start : start + size]


class _Groups:
    """Which texts belong together (union-find)."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, member: int) -> int:
        parents = self._parents
        while parents[member] != member:
            parents[member] = member = parents[parents[member]]
        return member

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.root(one), self.root(other)))
        self._parents[second] = first

    def several(self) -> list[list[int]]:
        """The groups of more than one."""
        groups: dict[int, list[int]] = {}
        for member in range(len(self._parents)):
            groups.setdefault(self.root(member), []).append(member)
        return [group for group in groups.values() if len(group) > 1]


class _Comparison:
    """Compares pairs exactly; remembers the one that others are compared with."""

    def __init__(
        self,
        positions: NDArray[np.int64],
        texts_of: Callable[[int], Texts],
        hashes: _WordHashes,
        threshold: float,
    ) -> None:
        self._positions = positions
        self._texts_of = texts_of
        self._hashes = hashes
        self._threshold = threshold
        self._leader: tuple[int, tuple[Hashes, Hashes]] | None = None

    def _sets(self, member: int) -> tuple[Hashes, Hashes]:
        """Shingles of the whole pair, and of its responses alone."""
        texts = self._texts_of(int(self._positions[member]))
        prompt, *responses = (_words(text, self._hashes) for text in texts)
        answers = [word for response in responses for word in response]
        whole, alone = (np.unique(_shingles([words])) for words in (prompt + answers, answers))
        return whole, alone

    def alike(self, leader: int, other: int) -> bool:
        if self._leader is None or self._leader[0] != leader:
            self._leader = (leader, self._sets(leader))
        return all(
            _jaccard(one, two) >= self._threshold
            for one, two in zip(self._leader[1], self._sets(other), strict=True)
        )


def _jaccard(one: Hashes, other: Hashes) -> float:
    if not len(one) and not len(other):
        return 1.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _join(
    members: NDArray[np.int64],
    signatures: NDArray[np.uint32],
    groups: _Groups,
    comparison: _Comparison,
) -> None:
    """Join the members of one bucket that are alike."""
    for _ in range(_LEADERS):
        if not len(members):
            return
        leader, members = int(members[0]), _others(members[1:], int(members[0]), groups)
        agreement = (signatures[members] == signatures[leader]).mean(1)
        for member in members[agreement >= _ESTIMATE].tolist():
            if groups.root(member) != groups.root(leader) and comparison.alike(leader, member):
                groups.join(leader, member)
        members = _others(members, leader, groups)


def _others(members: NDArray[np.int64], leader: int, groups: _Groups) -> NDArray[np.int64]:
    """The members that aren't in the leader's group."""
    root = groups.root(leader)
    return np.array([m for m in members.tolist() if groups.root(m) != root], np.int64)


def similarity(chosen: str, rejected: str) -> float | None:
    """Share of the words that two texts have in common in order, None below `ALMOST_EQUAL`.

    2 * matching words / words of both, as difflib's ratio; of differences longer than
    `_MOST_COMPARED` words the order is not looked at.
    """
    one, other = chosen.split(), rejected.split()
    total = len(one) + len(other)
    if not total or 2 * min(len(one), len(other)) < ALMOST_EQUAL * total:
        return None
    # What is the same at both ends is nearly all of such a pair, and needs no search.
    front = _common(one, other)
    one, other = one[front:], other[front:]
    back = _common(one[::-1], other[::-1])
    one, other = one[: len(one) - back], other[: len(other) - back]
    shared = sum((Counter(one) & Counter(other)).values())
    if 2 * (front + back + shared) < ALMOST_EQUAL * total:
        return None
    if max(len(one), len(other)) <= _MOST_COMPARED:
        blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
        shared = sum(block.size for block in blocks)
    value = 2 * (front + back + shared) / total
    return value if value >= ALMOST_EQUAL else None


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
