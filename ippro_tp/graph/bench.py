"""Which groups pass when they are tried on copies, and what mends those that do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .axes import Axis
from .dependency import RepairedGraph
from .numbers import proposals, ties
from .trial import REFUSED, Trial
from .verdicts import Verdict, counts_of, kind_of

Leaves = set[tuple[str, str]]


class Bench:
    """Looks for the groups that pass.

    A quarter of the units of all groups go at once; where the model then computes what it should, all of them are
    proved. Otherwise those that fail are looked for.
    """

    def __init__(self, graph: RepairedGraph, seed: int) -> None:
        self.graph, self.seed = graph, seed
        self._trial = Trial(graph, seed)
        self.numbers: list[Axis] = []
        self.used: list[Axis] = []
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.why: dict[str, str] = {}
        self.multiples: dict[str, int] = {}
        self.worked: list[Leaves] = []
        self.failed: str | None = None
        self._proved: frozenset[str] = frozenset()

    def prove(self) -> dict[str, Verdict]:
        """Try all groups, mend what fails, and try together what passes."""
        graph = self.graph
        verdicts = {key: Verdict("whole", reason) for key, reason in graph.left_whole.items()}
        keys = [k for k in graph._keys.values() if k not in graph.left_whole]
        self.numbers = proposals(graph)
        passed, repaired = self._passing(keys), dict[str, str]()
        if len(passed) < len(keys):
            passed, repaired = self._mended(keys, passed)
        for key in (k for k in graph._keys.values() if k not in graph.left_whole):
            if key not in passed:
                verdicts[key] = Verdict("whole", self.why.get(key, "it fails together with others"))
            elif key in repaired:
                verdicts[key] = Verdict("repaired", repaired[key], self.multiples.get(key, 1))
            else:
                verdicts[key] = Verdict("proved")
        self.used = self._used(passed)
        graph.axes += self.used
        graph._find_groups_again()
        return verdicts

    def _mended(self, keys: list[str], passed: list[str]) -> tuple[list[str], dict[str, str]]:
        """Keys that pass together, and what was repaired of some, where they do not all pass as they are."""
        graph = self.graph
        repaired = self._repair([key for key in keys if key not in passed])
        repaired |= self._tied([key for key in keys if key not in passed and key not in repaired])
        known = [k for k in graph._keys.values() if k not in graph.left_whole]
        return self._together([*(key for key in passed if key in known), *repaired]), repaired

    def _used(self, keys: Sequence[str]) -> list[Axis]:
        classes = torch.cat([torch.zeros(1, dtype=torch.long), *(self._classes(key) for key in keys)])
        classes = classes[classes > 0]
        return [axis for axis in self.numbers if bool(torch.isin(axis.classes, classes).any())]

    def _passing(self, keys: list[str]) -> list[str]:
        """Those of ``keys`` that pass: tried together, then without the kinds around the module that failed."""
        if not keys:
            return []
        problem = self._try(keys)
        if problem is None:
            return keys
        if len(keys) == 1:
            self.why[keys[0]] = problem
            return []
        kinds = list(dict.fromkeys(map(kind_of, keys)))
        if len(kinds) == 1:
            return self._of_one_kind(keys)
        near = {kind_of(key) for key in keys if self._near(key, self.failed)} if self.failed is not None else set()
        if not near or len(near) == len(kinds):
            near = set(kinds[: len(kinds) // 2])
        passed = self._passing([key for key in keys if kind_of(key) not in near])
        for kind in kinds:
            if kind in near:
                passed += self._passing([key for key in keys if kind_of(key) == kind])
        return passed

    def _of_one_kind(self, keys: list[str]) -> list[str]:
        """The same of groups at the same place of repeated blocks: where the first and the last fail, all do."""
        ends = [keys[0], keys[-1]] if len(keys) > 1 else keys
        passed = [key for key in ends if self._passing([key])]
        rest = keys[1:-1]
        if not passed:
            if rest and self._try(rest) is None:
                return rest
            for key in rest:
                self.why[key] = self.why[keys[0]]
            return []
        half = len(rest) // 2
        return passed + self._passing(rest[:half]) + self._passing(rest[half:])

    def _near(self, key: str, failed: str) -> bool:
        """Whether a group has a layer in the module, or in its parent where it has none itself."""
        number = next(n for n, k in self.graph._keys.items() if k == key)
        return any(a.owner == failed or a.owner.startswith(f"{failed}.") for a, _ in self.graph._members[number])

    def _together(self, keys: list[str]) -> list[str]:
        """Those that pass together, with a quarter of their units gone."""
        if frozenset(keys) == self._proved:
            return keys
        passed = self._passing(keys)
        if not passed or len(passed) == len(keys) or self._try(passed) is None:
            return passed
        kept: list[str] = []
        for key in passed:
            if self._try([*kept, key]) is None:
                kept.append(key)
        return kept

    def _repair(self, keys: list[str]) -> dict[str, str]:
        """Keys that pass with other numbers; what was found for one is tried on all of its kind."""
        repaired: dict[str, str] = {}
        if not keys:
            return repaired
        for kind in dict.fromkeys(map(kind_of, keys)):
            waiting = [key for key in keys if kind_of(key) == kind]
            own = torch.cat([self._classes(key) for key in waiting])
            more = proposals(self.graph, children=True, of=own)
            while waiting:
                found = self._repaired([waiting[0]], more)
                if found is None:
                    repaired |= self._in_multiples(waiting)
                    break
                done = [waiting[0]]
                if len(waiting) > 1 and self._repaired(waiting[1:], more, [found]) is not None:
                    done = waiting
                names = ", ".join(sorted(f"{owner}.{leaf}" for owner, leaf in found))
                repaired |= dict.fromkeys(done, f"numbers found by trial: {names or 'none'}")
                waiting = waiting[len(done) :]
        return repaired

    def _in_multiples(self, keys: list[str]) -> dict[str, str]:
        """Keys of one kind that pass where a multiple of a number of units stays, the smallest there is."""
        units = len(self._classes(keys[0]))
        factors = [f for f in range(units // 4, 1, -1) if units % f == 0]
        # What an operation does not take, a reshape to another number say, might fit a multiple by chance.
        if not factors or not self.why.get(keys[0], "").startswith(REFUSED):
            return {}
        found = factors[0]
        if not self._passes_in(keys[:1], found):
            return {}
        for smaller in reversed(factors[1:]):
            if found % smaller == 0 and self._passes_in(keys[:1], smaller):
                found = smaller
                break
        keys = [key for key in keys if len(self._classes(key)) % found == 0]
        if len(keys) > 1 and not self._passes_in(keys, found):
            for key in keys[1:]:
                self.multiples.pop(key, None)
            keys = keys[:1]
        self.multiples |= dict.fromkeys(keys, found)
        return dict.fromkeys(keys, f"its width stays a multiple of {found} units")

    def _passes_in(self, keys: list[str], multiple: int) -> bool:
        self.multiples |= dict.fromkeys(keys, multiple)
        if self._try(keys) is None:
            return True
        for key in keys:
            self.multiples.pop(key)
        return False

    def _tied(self, failed: list[str]) -> dict[str, str]:
        """Keys that pass once their channels are those of another group of as many, one by one.

        A forward pass that reshapes what an inner layer makes to the width of its input (``reshape(B, N, C)``)
        says no other number: the two have to lose as many channels.
        """
        graph, known, numbers = self.graph, self.graph.facts.classes, self.numbers
        pairs = ties(graph, {key: self._classes(key) for key in failed})
        wanted: list[str] = []
        if not pairs:
            return {}
        while pairs:
            graph.tie(known, pairs)
            merged = {key: self._classes(key) for key in graph._keys.values()}
            of = [next((k for k, c in merged.items() if bool(torch.isin(one, c).any())), "") for one, _ in pairs]
            wanted = list(dict.fromkeys(filter(None, of)))
            rest = [key for key in failed if key in merged and key not in wanted]  # a part of them was tied
            involved = torch.cat([torch.zeros(1, dtype=torch.long), *(merged[key] for key in (*wanted, *rest))])
            involved = torch.cat([involved, *(labels for pair in pairs for labels in pair)])
            involved = involved[involved > 0]
            self.numbers = [a for a in numbers if not bool(torch.isin(a.classes, involved).any())]
            self.numbers += [a for a in proposals(graph) if bool(torch.isin(a.classes, involved).any())]
            passed = self._passing(wanted)
            passed += self._repair([key for key in wanted if key not in passed])
            if len(passed) == len(wanted):
                self.ties = pairs
                passed = self._passing(rest)
                wanted += [*passed, *self._repair([key for key in rest if key not in passed])]
                break
            pairs = [pair for pair, key in zip(pairs, of, strict=True) if key in passed]
        else:
            graph.tie(known, [])
            self.numbers, wanted = numbers, []
        return dict.fromkeys(wanted, "its channels go with as many of another layer, one by one")

    def _repaired(self, keys: list[str], more: list[Axis], trials: list[Leaves] | None = None) -> Leaves | None:
        """Numbers with which these groups pass together; they stay in force."""
        classes = torch.cat([self._classes(key) for key in keys])
        mine = [a for a in more if bool(torch.isin(a.classes, classes).any())]
        leaves = list(dict.fromkeys(self._leaf(a) for a in mine))
        others = [a for a in self.numbers if not bool(torch.isin(a.classes, classes).any())]
        moved = {_place(a) for a in mine} & {_place(a) for a in others}  # they could count other channels as well
        known = self.numbers
        problems: list[str] = []
        if trials is None:
            problems.append(self.why.get(keys[0], ""))
            trials = [set(), *({leaf} for leaf in leaves)]
            trials += [set(leaves) - {leaf} for leaf in leaves if len(leaves) > 2]
            trials = sorted(trials, key=lambda t: t not in self.worked)[:10]
        for trial in trials:
            chosen = [a for a in mine if self._leaf(a) in trial]
            taken = {_place(a) for a in chosen}
            self.numbers = [*(a for a in others if _place(a) not in taken), *chosen]
            problem = self._try(keys)
            if problem is None:
                self.worked.append(trial)
                return trial
            if not trial and problem in problems and not moved:  # the same with all numbers and with none
                break
            problems.append(problem)
        self.numbers = known
        return None

    def _leaf(self, axis: Axis) -> tuple[str, str]:
        return type(self.graph.model.get_submodule(axis.owner)).__name__, axis.pruner.leaf

    def _classes(self, key: str) -> Tensor:
        graph = self.graph
        number = next(n for n, k in graph._keys.items() if k == key)
        root, members = graph._roots[number], graph._members[number]
        index = next(i for a, i in members if a is root)
        found: Tensor = root.classes[index].unique()
        return found

    def _removed(self, keys: Sequence[str]) -> Tensor:
        """Classes of these groups that are tried: some quarter of each, and not as many of all.

        If they were, widths that have to be the same would still be.
        """
        random = torch.Generator().manual_seed(self.seed)
        chosen = []
        for number, key in enumerate(keys):
            classes = self._classes(key)
            multiple = self.multiples.get(key, 1)
            counts = [count * multiple for count in counts_of(len(classes) // multiple)]
            chosen.append(classes[torch.randperm(len(classes), generator=random)[: counts[number % len(counts)]]])
        return torch.cat(chosen)

    def _try(self, keys: Sequence[str]) -> str | None:
        """What goes wrong when units of these groups go; ``None`` if nothing does."""
        problem, self.failed = self._trial(self._removed(keys), [*self.graph.axes, *self.numbers])
        if problem is None:
            self._proved = frozenset(keys)
        return problem


def _place(axis: Axis) -> tuple[str, str, int | None]:
    """Where a number is kept."""
    return axis.owner, axis.pruner.leaf, axis.pruner.entry
