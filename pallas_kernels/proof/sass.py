"""What a GPU program does, read from its disassembly (SASS): instruction counts, whole and by part.

Loops are natural loops of the control flow graph: a static count over the program mixes prologues,
tails and both halves of a causal loop, a count over a loop's body is what one step costs. What a
vote of a warp decides about is counted by itself: a barrier there hangs, if warps vote differently.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Set

_LABEL = re.compile(r"^\s*(\.L_x_\d+):\s*$")
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P[T\d]+\s+)?(?P<opcode>[A-Z][A-Z0-9_]*[.\w]*)(?P<rest>[^/]*)"
)
_TARGET = re.compile(r"\.L_x_\d+")
_SECTION = re.compile(r"^\s*\.section\s+(\.text\.__cuda)?")
_VOTED = re.compile(r"(?:R\w+, )?(P\d),")
_ENDS = ("EXIT", "RET", "KILL", "RPCMOV")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction: opcode with its modifiers, on what condition it runs, where it may jump."""

    opcode: str
    guard: str  # "@P0" or "@!P0", often empty
    guarded: bool
    operands: str
    target: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """How often each opcode (with modifiers) occurs."""

    by_opcode: dict[str, int]

    def __getitem__(self, name: str) -> int:
        """The occurrences of an opcode: `name` itself or `name` with further modifiers."""
        return sum(
            count
            for opcode, count in self.by_opcode.items()
            if opcode == name or opcode.startswith(name + ".")
        )

    @property
    def total(self) -> int:
        """All instructions, which is also the issue slots of one pass by one warp."""
        return sum(self.by_opcode.values())

    @property
    def matrix_products(self) -> int:
        """Tensor core instructions: tcgen05.mma of Blackwell or wgmma of Hopper."""
        return self["UTCHMMA"] + self["HGMMA"]


def count(instructions: list[Instruction]) -> Counts:
    """The counts of some instructions."""
    return Counts(dict(collections.Counter(instruction.opcode for instruction in instructions)))


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a disassembly in order, and for each label the index it stands before.

    Padding after the last jump (NOP) is left out, and helper functions in sections of their own,
    which nvJitLink puts before the kernel.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    helper = False
    for line in text.splitlines():
        if section := _SECTION.match(line):
            helper = section[1] is not None
        elif helper:
            continue
        elif label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            opcode, rest = found["opcode"], found["rest"]
            jump = _TARGET.search(rest) if opcode.startswith(("BRA", "BRX", "CALL")) else None
            guard = (found["guard"] or "").strip()
            instructions.append(
                Instruction(
                    opcode=opcode,
                    guard=guard,
                    guarded=guard not in ("", "@PT", "@UPT") or opcode.startswith("BRA.U"),
                    operands=rest.strip(),
                    target=jump[0] if jump else None,
                )
            )
    while instructions and instructions[-1].opcode == "NOP":
        instructions.pop()
    return instructions, labels


def hot_loops(text: str, opcodes: tuple[str, ...]) -> list[Counts]:
    """Counts of the innermost loops that hold one of the opcodes, in program order."""
    instructions, blocks, successors = _graph(text)
    counted = [
        (body, _count_blocks(body, blocks, instructions)) for body in _natural_loops(successors)
    ]
    hot = [(body, found) for body, found in counted if any(found[opcode] for opcode in opcodes)]
    return [found for body, found in hot if not any(other < body for other, _ in hot)]


def registers_asked(text: str, warpgroups: int, at_launch: int) -> int:
    """The most registers that a block's warpgroups want at once, a thread of each, in sum.

    That is, once all have run their `setmaxnreg`. Whoever releases some is one warpgroup; all
    others may ask for the largest number that the program asks for, or keep what they start with.
    """
    released, largest = [], at_launch
    for instruction in parse(text)[0]:
        if instruction.opcode.startswith("USETMAXREG."):
            registers = int(instruction.operands.rstrip(" ;").split(", ")[-1], 16)
            if "DEALLOC" in instruction.opcode:
                released.append(registers)
            else:
                largest = max(largest, registers)
    return sum(released) + (warpgroups - len(released)) * largest


def vote_branches(text: str) -> list[Counts]:
    """Counts of what a warp does only if one of its lanes votes for it, vote by vote.

    That is all between the jump by the result of a vote and where both ways meet again.
    """
    instructions, blocks, successors = _graph(text)
    meeting = _postdominators(successors)
    return [
        _count_blocks(_between(number, meeting[number], successors), blocks, instructions)
        for number, (first, end) in enumerate(blocks)
        if _jumps_by_vote(instructions[first:end])
    ]


def _jumps_by_vote(block: list[Instruction]) -> bool:
    """Whether the last instruction of a block jumps, or not, as a vote before it says."""
    jump = block[-1]
    votes = [_VOTED.match(one.operands) for one in block if one.opcode == "VOTE.ANY"]
    voted = {vote[1] for vote in votes if vote is not None}
    return jump.target is not None and jump.guard.lstrip("@!") in voted


def _count_blocks(
    numbers: Set[int], blocks: list[tuple[int, int]], instructions: list[Instruction]
) -> Counts:
    """The counts of some basic blocks."""
    return count([instructions[i] for number in numbers for i in range(*blocks[number])])


def _graph(text: str) -> tuple[list[Instruction], list[tuple[int, int]], list[list[int]]]:
    """The instructions of a disassembly, its basic blocks, and what each leads to."""
    instructions, labels = parse(text)
    blocks = _blocks(instructions, labels)
    block_of = {start: number for number, (start, _) in enumerate(blocks)}
    successors = [
        list(_successors(number, blocks, instructions, labels, block_of))
        for number in range(len(blocks))
    ]
    _add_indirect_jumps(successors, blocks, instructions)
    return instructions, blocks, successors


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Basic blocks as half-open ranges of instruction indices."""
    starts = {0, *labels.values()}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None or instruction.opcode.startswith(_ENDS):
            starts.add(index + 1)
    ordered = sorted(start for start in starts if start < len(instructions))
    return list(zip(ordered, [*ordered[1:], len(instructions)], strict=True))


def _natural_loops(successors: list[list[int]]) -> list[frozenset[int]]:
    """The loops as sets of blocks, one for each loop head, ordered by head."""
    dominators, predecessors = _dominators(successors), _reversed(successors)
    bodies: dict[int, set[int]] = {}
    for block, nexts in enumerate(successors):
        for head in nexts:
            if block in dominators and head in dominators[block]:
                bodies.setdefault(head, {head}).update(_reaching(block, head, predecessors))
    return [frozenset(bodies[head]) for head in sorted(bodies)]


def _successors(
    number: int,
    blocks: list[tuple[int, int]],
    instructions: list[Instruction],
    labels: dict[str, int],
    block_of: dict[int, int],
) -> Iterator[int]:
    last = instructions[blocks[number][1] - 1]
    if last.target is not None and last.target in labels:
        destination = block_of.get(labels[last.target])
        if destination is not None:
            yield destination
        if not last.guarded and not _conditional(last):
            return
    elif last.opcode.startswith(_ENDS) and not last.guarded:
        return
    if number + 1 < len(blocks):
        yield number + 1


def _conditional(jump: Instruction) -> bool:
    """Whether a jump may fall through: a predicate or a divergence test among its operands."""
    return bool(re.match(r"!?U?P\d", jump.operands)) or jump.opcode.startswith(("BRA.DIV", "CALL"))


def _add_indirect_jumps(
    successors: list[list[int]], blocks: list[tuple[int, int]], instructions: list[Instruction]
) -> None:
    """Let jumps through a table (BRX) lead to every block that nothing else leads to.

    The disassembly does not say where they go. Roles of a kernel are often chosen that way.
    """
    indirect = [
        number for number, (_, end) in enumerate(blocks) if instructions[end - 1].opcode == "BRX"
    ]
    if not indirect:
        return
    reached = _reachable(0, successors)
    for block in range(len(blocks)):
        if block not in reached:
            for jump in indirect:
                successors[jump].append(block)
            reached |= _reachable(block, successors)


def _reachable(first: int, successors: list[list[int]]) -> set[int]:
    """A block and all that it leads to."""
    found = {first}
    stack = [first]
    while stack:
        new = set(successors[stack.pop()]) - found
        found |= new
        stack.extend(new)
    return found


def _reversed(successors: list[list[int]]) -> list[list[int]]:
    """For each block those that lead to it."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, nexts in enumerate(successors):
        for following in nexts:
            predecessors[following].append(block)
    return predecessors


def _postdominators(successors: list[list[int]]) -> list[set[int]]:
    """For every block the others on every path from it to an end of the program."""
    # Blocks are counted from 1 on: 0 is an end that all ends lead to.
    onward = [[]] + [[following + 1 for following in nexts] or [0] for nexts in successors]
    dominators = _dominators(_reversed(onward))
    return [
        {other - 1 for other in dominators.get(block + 1, ()) if other not in (0, block + 1)}
        for block in range(len(successors))
    ]


def _between(first: int, stops: set[int], successors: list[list[int]]) -> set[int]:
    """The blocks that a block leads to without passing one of `stops`."""
    found: set[int] = set()
    stack = list(successors[first])
    while stack:
        block = stack.pop()
        if block not in stops and block not in found:
            found.add(block)
            stack.extend(successors[block])
    return found


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """For every block reachable from block 0 the blocks on every path to it, itself included."""
    order: list[int] = []
    seen = {0}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    order.reverse()
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in successors[block]:
            predecessors[following].append(block)
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if common != dominators[block]:
                dominators[block] = common
                changed = True
    return dominators


def _reaching(tail: int, head: int, predecessors: list[list[int]]) -> set[int]:
    """The blocks that reach `tail` without passing `head`."""
    body: set[int] = set()
    stack = [tail]
    while stack:
        block = stack.pop()
        if block != head and block not in body:
            body.add(block)
            stack.extend(predecessors[block])
    return body
