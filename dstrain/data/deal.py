"""Dealing the samples of a step to packs, so that no rank waits long for another."""

import heapq
from bisect import bisect_left, insort
from functools import partial

import numpy as np

_ROUNDS = 64  # swaps a micro-step at most, and one more for every two ranks
_TRIES = 64  # full packs that are passed over for one item
_PARTNERS = 32  # packs that the costliest one may swap with
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
    micros = -(-_bins(tokens, capacity) // ranks)
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
    least = min(token)
    packs: list[list[int]] = [[] for _ in range(bins)]
    room = [capacity] * bins
    for place in np.argsort(-weights, kind="stable").tolist():
        full = []
        while loads and room[loads[0][1]] < token[place]:
            entry = heapq.heappop(loads)
            if room[entry[1]] >= least:
                full.append(entry)
        if not loads or len(full) > _TRIES:
            return None
        load, number = loads[0]
        packs[number].append(place)
        room[number] -= token[place]
        heapq.heapreplace(loads, (load + weight[place], number))
        for entry in full:
            heapq.heappush(loads, entry)
    return packs


def _bins(tokens: np.ndarray, capacity: int) -> int:
    """Return the bins that best fit decreasing takes: where the search for fewer micro-steps begins."""
    rooms: list[int] = []
    for token in np.sort(tokens)[::-1].tolist():
        at = bisect_left(rooms, token)
        insort(rooms, (rooms.pop(at) if at < len(rooms) else capacity) - token)
    return max(1, len(rooms))


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
    """Swap items of the costliest pack with items of the cheapest for as long as that brings the costliest down."""
    loads = np.array([costs[pack].sum() for pack in packs])
    room = capacity - np.array([tokens[pack].sum() for pack in packs])
    partners = min(_PARTNERS, len(packs) - 1)
    for _ in range(_ROUNDS + len(packs) // 2):
        top = int(loads.argmax())
        if loads[top] <= loads.mean() * _EVEN:
            break
        cheapest = np.argpartition(loads, partners - 1)[:partners].tolist()
        owner = np.repeat(cheapest, [len(packs[other]) for other in cheapest])
        mine, theirs = np.array(packs[top]), np.concatenate([packs[other] for other in cheapest])
        given = costs[mine, None] - costs[theirs]  # [mine, theirs]: what the costliest pack would lose
        moved = tokens[mine, None] - tokens[theirs]
        fits = (given > 0) & (moved <= room[owner]) & (-moved <= room[top])
        after = np.where(fits, np.maximum(loads[top] - given, loads[owner] + given), loads[top])
        i, j = divmod(int(after.argmin()), len(theirs))
        if after[i, j] >= loads[top]:
            break
        other = int(owner[j])
        loads[[top, other]] += given[i, j] * np.array([-1, 1])
        room[[top, other]] += moved[i, j] * np.array([1, -1])
        packs[top][i] = int(theirs[j])
        packs[other][packs[other].index(int(theirs[j]))] = int(mine[i])
    return [sorted(pack) for pack in packs]
