"""What i-SpaSP keeps and in which order channels go, given the response of the consumers. Tensors only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .spasp_math import BLOCK, CACHED, Response


def select(response: Response, sizes: Tensor, iterations: int) -> Tensor:
    """Run Algorithm 1 for several target sizes at once.

    Each iteration takes the ``2 s`` units of largest importance and the present set, and keeps the ``s`` of
    largest activation. The sum of activations over the set never falls, so that a set that repeats is final.
    Ties go to the unit of lower number.

    Args:
        response: see there.
        sizes: ``(m,)`` int64, each from 1 to U - 1.
        iterations: at most so many.

    Returns:
        ``(m, U)`` bool, the sets S.
    """
    units = response.activation.numel()
    by_activation = torch.sort(response.activation, descending=True, stable=True).indices
    chosen = torch.zeros(len(sizes), units, dtype=torch.bool, device=response.activation.device)
    sizes = sizes.to(chosen.device)
    for rows in torch.arange(len(sizes), device=chosen.device).split(max(1, BLOCK // units)):
        for iteration in range(iterations):
            if iteration:
                importance = response.importance((~chosen[rows]).double())
            else:  # nothing is chosen yet: the same for all sizes
                importance = response.importance(torch.ones_like(response.activation)[None]) + response.offset
            size = sizes[rows, None]
            order = torch.sort(importance, dim=1, descending=True, stable=True).indices
            numbers = torch.arange(units, device=order.device).expand_as(order)
            place = torch.empty_like(order).scatter_(1, order, numbers)
            candidates = (place < 2 * size) | chosen[rows]
            ranked = candidates[:, by_activation]
            kept = ranked & (ranked.cumsum(1) <= size)
            merged = torch.zeros_like(kept).scatter_(1, by_activation.expand_as(kept), kept)
            moved = (merged != chosen[rows]).any(1)
            chosen[rows] = merged
            # Where 2 s covers everything the importances do not matter, and the set is final.
            rows = rows[moved & (2 * sizes[rows] < units)]
            if not rows.numel():
                break
    return chosen


def ascending_ranks(values: Tensor) -> Tensor:
    """``(U,)`` float64: 0 for the smallest value; of equal values the first ranks highest."""
    ranks = torch.empty(values.numel(), dtype=torch.float64, device=values.device)
    order = torch.sort(values, descending=True, stable=True).indices
    ranks[order] = torch.arange(values.numel() - 1, -1, -1, dtype=torch.float64, device=values.device)
    return ranks


def cut_scores(response: Response, size: int, iterations: int) -> Tensor:
    """``(U,)`` float64 scores of which the ``size`` largest are the set S of that size."""
    chosen = select(response, torch.tensor([size]), iterations)[0]
    return chosen + 0.999 * ascending_ranks(response.activation) / response.activation.numel()


def vote_scores(response: Response, iterations: int) -> Tensor:
    """``(U,)`` float64 scores in [0, 1): the share of all target sizes whose S holds the unit.

    For targets of half the units and more S is the top of the activations. The cut of these scores is near it, but
    a unit that many small targets hold can stand before one of larger activation.
    """
    units = response.activation.numel()
    ranks = ascending_ranks(response.activation)
    if units < 2:
        return ranks
    votes = torch.zeros_like(response.activation)
    half = (units + 1) // 2  # from here on 2 s >= U and S is the top s by activation
    for sizes in torch.arange(1, half).split(max(1, BLOCK // units)):
        votes += select(response, sizes, iterations).sum(0)
    votes += ranks.clamp(max=units - half)  # a unit of rank r is in the top s for s >= U - r
    return (votes + ranks / units) / units


def removal_energy(contribution: Callable[[Tensor], Tensor], rank: Tensor, units: int, size: int) -> Tensor:
    """Energy of what is missing from an output as units are removed one after the other.

    Args:
        contribution: ``(b,)`` channel numbers 0..k-1 -> ``(b, D)``, what each brings to the output.
        rank: ``(k,)`` int64, when each channel is removed, 0..units-1.
        units: how many removals there are.
        size: D, or an estimate.

    Returns:
        ``(units,)`` float64, after each removal.
    """
    order = torch.argsort(rank)
    ends = torch.bincount(rank, minlength=units).cumsum(0).tolist()
    energies, missing = [], torch.zeros((), dtype=torch.float64, device=rank.device)
    start = done = 0
    while start < units:
        stop = start + 1
        while stop < units and (ends[stop] - done) * size <= CACHED:
            stop += 1
        channels = order[done : ends[stop - 1]]
        parts = contribution(channels) if len(channels) else missing.expand(0, max(1, missing.numel()))
        by_unit = parts.new_zeros(stop - start, parts.shape[1]).index_add_(0, rank[channels] - start, parts)
        path = by_unit.cumsum_(0).add_(missing)
        energies.append(torch.linalg.vector_norm(path, dim=1).square())
        missing, start, done = path[-1].clone(), stop, ends[stop - 1]
    return torch.cat(energies)


def removal_energy_of_matrix(products: Tensor) -> Tensor:
    """The same from inner products of what the units bring, ``(U, U)`` in the order of their removal."""
    return products.cumsum(0).cumsum(1).diagonal()


def removal_scores(response: Response, iterations: int) -> Tensor:
    """``(U,)`` float32 scores that can be compared between groups; within a group in the order of the votes.

    This scale is ours; the paper has none. The score of a unit is the part of the outputs' energy that is lost
    once it and all below it are gone, ``|V|^2 / |U|^2`` without biases, summed over consumers and made
    increasing. Energies are those of the output averaged over the samples, so that first moments suffice. A
    threshold on such scores bounds the relative error of every group alike.
    """
    order = torch.sort(vote_scores(response, iterations)).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    lost = torch.zeros_like(response.activation)
    for removal in response.removals:
        energy = removal(rank)
        lost += torch.where(energy[-1] > 0, energy / energy[-1], 0)
    scores = torch.empty(len(order), dtype=torch.float32, device=order.device)
    scores[order] = strictly_increasing(lost.cummax(0).values)
    return scores


def strictly_increasing(values: Tensor) -> Tensor:
    """The smallest float32 sequence that is not below ``values``, positive, and rises at every step.

    Args:
        values: ``(n,)`` finite.
    """
    # Positive floats order as their bit patterns do, so that a step of one is the next representable number.
    bits = values.float().clamp(min=torch.finfo(torch.float32).tiny).contiguous().view(torch.int32).long()
    steps = torch.arange(bits.numel(), device=bits.device)
    return ((bits - steps).cummax(0).values + steps).int().view(torch.float32)
