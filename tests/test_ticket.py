"""A model of the ticket in csrc/cuda/kernel/fixup.h, checked over all interleavings of small cases.

The model: each unit stores the partials of the unfinished segments of its share, as the real
schedule has them. At the end of the share it draws a ticket for each, puts the counters whose last
ticket it drew back to zero and merges those items. Each of these is one step, and any unit may be
next. A store is on its way at first and lands later, at any time; a release waits for the unit's
own stores, and so does the end of the launch. The next launch, of the same graph or with other
lengths, finds counters and partials as the last one left them.

A merge may be one step, for a slot is written once a launch. That it sees what has landed (acquire,
loads from L2) is taken for granted. Change the model with the protocol; the broken variants show
that the check can see.
"""

from typing import NamedTuple

import pytest
from test_schedule import cut_items, make_case, schedule


class Violation(Exception):
    """The protocol lets something happen that must not."""


class Partial(NamedTuple):
    """What a unit stores of an item, where, and what it knows of those who share it."""

    item: tuple
    unit: int
    slot: int
    partners: tuple  # (unit, slot), in the merge order
    counter: int


class Protocol(NamedTuple):
    """The steps of a unit, each for all its partials; those after the draw, where it came last."""

    steps: tuple = ("store", "draw", "reset", "merge")
    release: bool = True  # a ticket is drawn when the unit's stores have landed
    last_ticket: int = -1  # plus the number of partners
    own_counters: bool = True  # of one item; else one for all
    own_slots: bool = True  # of one partial; else one a unit
    memset: bool = False  # zero counters before each launch


TICKET = Protocol()


# --- The model -----------------------------------------------------------------------------------


class Unit(NamedTuple):
    step: int = 0
    last_of: frozenset = frozenset()  # items whose last ticket it drew
    pending: frozenset = frozenset()  # (address, value) of stores on their way


class State(NamedTuple):
    units: tuple
    memory: frozenset  # (address, value)
    merged: frozenset  # (item, unit that merged it)


def read(memory, address):
    return dict(memory).get(address, 0)


def write(memory, address, value):
    return frozenset({**dict(memory), address: value}.items())


def with_unit(state, number, unit):
    return state._replace(units=(*state.units[:number], unit, *state.units[number + 1 :]))


def landings(state):
    """States in which one store more has landed."""
    for number, unit in enumerate(state.units):
        for address, value in unit.pending:
            landed = unit._replace(pending=unit.pending - {(address, value)})
            memory = write(state.memory, address, value)
            yield with_unit(state, number, landed)._replace(memory=memory)


def advances(state, programs, protocol, launch):
    """States in which one unit has done its next step."""
    for number, unit in enumerate(state.units):
        if unit.step < len(programs[number]):
            step, partial = programs[number][unit.step]
            after = STEPS[step](state, number, unit._replace(step=unit.step + 1), partial,
                                protocol, launch)  # fmt: skip
            if after is not None:
                yield after


def slot_address(unit, slot, protocol):
    return "slot", unit, slot if protocol.own_slots else 0


def counter_address(partial, protocol):
    return "counter", partial.counter if protocol.own_counters else 0


def store(state, number, unit, partial, protocol, launch):
    address = slot_address(partial.unit, partial.slot, protocol)
    value = (launch, partial.item, partial.unit)
    return with_unit(state, number, unit._replace(pending=unit.pending | {(address, value)}))


def draw(state, number, unit, partial, protocol, launch):
    if protocol.release and unit.pending:
        return None
    address = counter_address(partial, protocol)
    ticket = read(state.memory, address)
    if ticket == len(partial.partners) + protocol.last_ticket:
        unit = unit._replace(last_of=unit.last_of | {partial.item})
    memory = write(state.memory, address, ticket + 1)
    return with_unit(state, number, unit)._replace(memory=memory)


def reset(state, number, unit, partial, protocol, launch):
    if partial.item in unit.last_of:
        zero = (counter_address(partial, protocol), 0)
        unit = unit._replace(pending=unit.pending | {zero})
    return with_unit(state, number, unit)


def merge(state, number, unit, partial, protocol, launch):
    if partial.item not in unit.last_of:
        return with_unit(state, number, unit)
    for other, slot in partial.partners:
        found = read(state.memory, slot_address(other, slot, protocol))
        if found != (launch, partial.item, other):
            raise Violation(f"merged without the partial of a partner: found {found}")
    if any(item == partial.item for item, _ in state.merged):
        raise Violation("merged twice")
    merged = state.merged | {(partial.item, number)}
    return with_unit(state, number, unit)._replace(merged=merged)


STEPS = {"store": store, "draw": draw, "reset": reset, "merge": merge}


def check_end(state, programs):
    items = {partial.item for program in programs for _, partial in program}
    if {item for item, _ in state.merged} != items:
        raise Violation("an item was never merged")
    if any(address[0] == "counter" and value != 0 for address, value in state.memory):
        raise Violation("a counter was not zero at the end")


def run_launch(partials, memories, protocol, launch):
    """All final states of one launch, from each of these memories."""
    programs = [[(step, p) for step in protocol.steps for p in unit] for unit in partials]
    units = tuple(Unit() for _ in programs)
    stack = [State(units, memory, frozenset()) for memory in memories]
    seen, final = set(stack), set()
    while stack:
        state = stack.pop()
        following = [*landings(state), *advances(state, programs, protocol, launch)]
        if not following:
            check_end(state, programs)
            final.add(state)
        for after in following:
            if after not in seen:
                seen.add(after)
                stack.append(after)
    return final


def run_launches(launches, protocol, memory=frozenset()):
    """The final states of each of several launches, one after the other on one workspace."""
    memories, results = {memory}, []
    for launch, partials in enumerate(launches):
        if protocol.memset:
            memories = {frozenset(m for m in memory if m[0][0] == "slot") for memory in memories}
        results.append(run_launch(partials, memories, protocol, launch))
        memories = {state.memory for state in results[-1]}
    return results


# --- Cases: the schedule's own -------------------------------------------------------------------

# Tiles of each item and number of units; the comments show the units' shares.
CASES = {
    "one item, two units": ([4], 2),  # aa|aa
    "one item, three units": ([6], 3),  # aa|aa|aa
    "two cut items, one unit in both": ([5, 4], 3),  # aaa|aab|bbb
    "a whole item between two cut ones": ([4, 1, 4], 3),  # aaa|abc|ccc
    "a cut item beside whole ones": ([3, 4, 2], 3),  # aaa|bbb|bcc
    "four units, all of the inner ones in two items": ([4, 4, 4], 4),  # aaa|abb|bbc|ccc
    "an item over three units and one over two": ([7, 5], 4),  # aaa|aaa|abb|bbb
    "more units than tiles": ([2, 1], 5),  # a|a|b
    "nothing is cut": ([3, 3], 2),  # aaa|bbb
}
NUMBERINGS = ["counter_of_unit", "counter_of_item"]


def partials_of(headers, name, numbering="counter_of_unit"):
    """What each unit stores in its order: slots, partners and counters are the headers' own."""
    tiles, units = CASES[name]
    case = make_case(tiles, num_heads_kv=1, tile_tokens_log2=0)
    _, line, table = schedule(headers, case, units)
    partials = [[] for _ in range(line.shares.num_units)]
    for item, segments in cut_items(table).items():
        partners = tuple((int(s["unit"]), int(s["slot"])) for s in segments)
        for s in segments:
            unit, slot = int(s["unit"]), int(s["slot"])
            partials[unit].append(Partial(item, unit, slot, partners, int(s[numbering])))
    return partials


def counters_after(final):
    return {frozenset(m for m in state.memory if m[0][0] == "counter") for state in final}


@pytest.mark.parametrize("numbering", NUMBERINGS)
@pytest.mark.parametrize("name", CASES)
def test_every_item_is_merged_once_when_all_is_there(headers, name, numbering):
    """A lost ticket, a merge before the last partial, or a counter that is not put back."""
    partials = partials_of(headers, name, numbering)
    (final,) = run_launches([partials], TICKET)
    for item in {p.item for unit in partials for p in unit}:
        partners = {p.unit for unit in partials for p in unit if p.item == item}
        # The search is only worth something if everyone comes last some time.
        assert {unit for state in final for i, unit in state.merged if i == item} == partners


@pytest.mark.parametrize("name", CASES)
def test_replays(headers, name):
    """A graph that runs again finds its own old partials and must not take them for new."""
    first, second = run_launches([partials_of(headers, name)] * 2, TICKET)
    # The third would find what the second found, and so on.
    assert len(counters_after(first)) == 1 and counters_after(first) == counters_after(second)


@pytest.mark.parametrize("numbering", NUMBERINGS)
@pytest.mark.parametrize("second", CASES)
def test_lengths_change_between_launches(headers, second, numbering):
    """The same counters serve other items with other numbers of partners the next time."""
    first = "two cut items, one unit in both"
    launches = [partials_of(headers, name, numbering) for name in (first, second, first)]
    run_launches(launches, TICKET)


def test_memory_as_it_comes(headers):
    """A fresh workspace holds anything: with the memset neither old counters nor partials count."""
    partials = partials_of(headers, "two cut items, one unit in both")
    garbage = {("counter", i): 77 for i in range(3)}
    garbage |= {("slot", unit, slot): "garbage" for unit in range(3) for slot in range(2)}
    run_launches([partials] * 2, Protocol(memset=True), frozenset(garbage.items()))
    with pytest.raises(Violation, match="never merged"):
        run_launches([partials], TICKET, frozenset(garbage.items()))


def test_merge_before_reset_is_right_too(headers):
    """The order of these two is free: nobody looks at the counter again."""
    partials = partials_of(headers, "two cut items, one unit in both")
    run_launches([partials] * 2, Protocol(("store", "draw", "merge", "reset")))


# --- The check itself ----------------------------------------------------------------------------

BROKEN = {
    "ticket before store": (Protocol(("draw", "store", "reset", "merge")), "without the partial"),
    "ticket without release": (Protocol(release=False), "without the partial"),
    "one ticket too few": (Protocol(last_ticket=-2), "without the partial"),
    "one ticket too many": (Protocol(last_ticket=0), "never merged"),
    "no reset": (Protocol(("store", "draw", "merge")), "not zero"),
    "one counter for all items": (Protocol(own_counters=False), "without the partial|never merged"),
    "one slot for both partials": (Protocol(own_slots=False), "without the partial"),
}


@pytest.mark.parametrize("protocol, hazard", BROKEN.values(), ids=BROKEN)
def test_broken_protocols_are_caught(headers, protocol, hazard):
    """A check that finds nothing wrong with these would find nothing wrong with anything."""
    partials = partials_of(headers, "two cut items, one unit in both")
    with pytest.raises(Violation, match=hazard):
        run_launches([partials], protocol)


def test_no_reset_breaks_the_next_launch(headers, monkeypatch):
    """Not only the count at the end is wrong: the next call loses its items."""
    monkeypatch.setitem(globals(), "check_end", lambda state, programs: None)
    partials = partials_of(headers, "one item, two units")
    protocol = Protocol(("store", "draw", "merge"))
    final = run_launches([partials] * 2, protocol)[-1]
    assert {state.merged for state in final} == {frozenset()}
    run_launches([partials] * 2, protocol._replace(memset=True))


def test_old_partials_are_told_from_new(headers):
    """Replays would hide a merge that comes too early, for the slots look full."""
    partials = partials_of(headers, "one item, two units")
    broken = Protocol(("draw", "store", "reset", "merge"))
    old = frozenset({(("slot", p.unit, p.slot), (0, p.item, p.unit)) for [p] in partials})
    with pytest.raises(Violation, match=r"found \(0,"):
        run_launch(partials, {old}, broken, launch=1)
