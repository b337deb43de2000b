"""Dealing the samples of a step to packs, so that no rank waits long for another."""

import heapq
from bisect import bisect_left, insort
from functools import partial

import numpy as np

_ROUNDS = 64  # swaps a micro-step at most
_EVEN = 1.005  # costliest pack over the mean: nothing is gained below


def deal(tokens: np.ndarray, costs: np.ndarray, *, ranks: int, capacity: int) -> list[list[list[int]]]:
    """Deal items to micro-steps, and each of those to ranks: `[micro][rank] -> [place, ...]`, places in order.

    tokens, costs: int64 [n]; a pack holds at most `capacity` tokens. The micro-steps are the fewest that the packing
    below finds; the costliest come first, and the packs of one are made alike, for under ZeRO-3 every rank waits for
    the slowest in every block. No pack is empty if n is a multiple of `ranks` or two items always fit one pack.

    Longest first into the least loaded (LPT, Graham 1969) by cost, or by tokens where that does not fit, or into the
    fullest that has room (best fit decreasing, Johnson 1973) where that does not either; then swaps between the
    costliest pack of a micro-step and the others of it.
    """
    micros = max(1, -(-int(tokens.sum()) // (ranks * capacity)))
    while True:
        assert micros <= max(1, len(tokens) // ranks), "the caller has seen to it that one sample a pack fits"
        bins = micros * ranks
        for pack_up in (
            partial(_longest_first, costs, tokens, bins, capacity),
            partial(_longest_first, tokens, tokens, bins, capacity),
            partial(_best_fit, tokens, bins, capacity),
        ):
            packs = pack_up()
            if packs is not None:
                loads = [-int(costs[pack].sum()) for pack in packs]
                packs = [packs[i] for i in np.argsort(loads, kind="stable").tolist()]
                steps = [packs[first : first + ranks] for first in range(0, len(packs), ranks)]
                return [_even(step, tokens, costs, capacity) for step in steps]
        micros += 1


def _longest_first(weights: np.ndarray, tokens: np.ndarray, bins: int, capacity: int) -> list[list[int]] | None:
    """Put each item into the least loaded bin that has room for it; None if one finds no room."""
    weight, token = weights.tolist(), tokens.tolist()
    loads = [(0, number) for number in range(bins)]
    packs: list[list[int]] = [[] for _ in range(bins)]
    room = [capacity] * bins
    for place in np.argsort(-weights, kind="stable").tolist():
        full = []
        while loads and room[loads[0][1]] < token[place]:
            full.append(heapq.heappop(loads))
        if not loads:
            return None
        load, number = loads[0]
        packs[number].append(place)
        room[number] -= token[place]
        heapq.heapreplace(loads, (load + weight[place], number))
        for entry in full:
            heapq.heappush(loads, entry)
    return packs


def _best_fit(tokens: np.ndarray, bins: int, capacity: int) -> list[list[int]] | None:
    """Put each item, longest first, into the fullest bin that has room for it; None if one finds no room.

    Each bin begins with one of the longest items, so that none is empty.
    """
    token = tokens.tolist()
    places = np.argsort(-tokens, kind="stable").tolist()
    packs = [[place] for place in places[:bins]]
    rooms = sorted((capacity - token[place], number) for number, place in enumerate(places[:bins]))
    if len(packs) < bins or rooms[0][0] < 0:
        return None
    for place in places[bins:]:
        at = bisect_left(rooms, (token[place], -1))
        if at == bins:
            return None
        room, number = rooms.pop(at)
        packs[number].append(place)
        insort(rooms, (room - token[place], number))
    return packs


def _even(packs: list[list[int]], tokens: np.ndarray, costs: np.ndarray, capacity: int) -> list[list[int]]:
    """Swap items of the costliest pack with items of others for as long as that brings the costliest down."""
    items = np.concatenate([np.array(pack) for pack in packs])
    owner = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
    cost, token = costs[items], tokens[items]
    loads = np.bincount(owner, cost).astype(np.int64)
    room = capacity - np.bincount(owner, token).astype(np.int64)
    for _ in range(_ROUNDS):
        top = int(loads.argmax())
        if loads[top] <= loads.mean() * _EVEN:
            break
        mine = np.flatnonzero(owner == top)
        given = cost[mine, None] - cost  # [mine, items]: what the costliest pack would lose
        moved = token[mine, None] - token
        fits = (given > 0) & (owner != top) & (moved <= room[owner]) & (-moved <= room[top])
        after = np.where(fits, np.maximum(loads[top] - given, loads[owner] + given), loads[top])
        best = int(after.argmin())
        if after.flat[best] >= loads[top]:
            break
        i, j = int(mine[best // len(items)]), best % len(items)
        other = int(owner[j])
        loads[[top, other]] += (cost[j] - cost[i]) * np.array([1, -1])
        room[[top, other]] += (token[i] - token[j]) * np.array([1, -1])
        owner[[i, j]] = other, top
    return [sorted(items[owner == pack].tolist()) for pack in range(len(packs))]
