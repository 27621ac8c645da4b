"""gds.py against independent oracles: enumeration of full policies, exact fractions, networkx, backward induction."""
import itertools
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest

import gds as module
from gds import (BudgetExceeded, DynamicMDP, bellman, concatenate, draw, evaluate, exhaustive, follow, gds, gridworld,
                 overrun_example, reach_by_induction)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KERNELS = ("deterministic", "sparse", "dense")


def make_mdp(rng, kernel, S, A, T, gamma=None, rewards=None):
    P = np.zeros((S, A, S))
    for s, a in np.ndindex(S, A):
        n = {"deterministic": 1, "sparse": rng.integers(1, 3), "dense": S}[kernel]
        n = min(n, S)
        P[s, a, rng.permutation(S)[:n]] = rng.dirichlet(np.ones(n)) if rng.random() < 0.6 else 1 / n
    rewards = rewards or rng.choice(["uniform", "ties", "rare", "zero", "falling"], p=[0.3, 0.25, 0.2, 0.05, 0.2])
    r = {"uniform": -rng.random((T, S, A)), "ties": -rng.integers(0, 3, (T, S, A)) / 2, "zero": np.zeros((T, S, A)),
         "rare": -1.0 * (rng.random((T, S, A)) < 0.3),
         "falling": -rng.random((T, S, A)) * 4.0 ** -np.arange(T)[:, None, None]}[rewards]
    return DynamicMDP(P, r, rng.choice([0.0, 0.3, 0.5, 0.9]) if gamma is None else gamma)


def enumerate_policies(mdp, start, goal, mode):
    """The best value over all policies with a rule for *every* state, on arrays: shares nothing with the module."""
    goal, best = set(goal), None
    rules = [list(rule) for rule in itertools.product(range(mdp.A), repeat=mdp.S)]
    everyone = np.arange(mdp.S)

    def visit(t, mu, support, value):
        nonlocal best
        ends = set(np.flatnonzero(support))
        if t > 0 and (ends <= goal if mode == "reach" else goal <= ends) and (best is None or value > best):
            best = value
        if t == mdp.T:
            return
        for rule in rules:
            step = mdp.P[everyone, rule]
            visit(t + 1, mu @ step, support @ (step > 0), value + mdp.gamma ** t * mu @ mdp.r[t, everyone, rule])

    visit(0, np.eye(mdp.S)[start], np.eye(mdp.S, dtype=bool)[start], 0.0)
    return best


def assert_sound_plan(mdp, plan, start, goal, mode):
    """A plan is what it says: its value, goal set and length are those of its policy, which meets the goal."""
    value, mu, ends = follow(mdp, plan.policy, start)
    assert plan.value == pytest.approx(value, abs=1e-10) and plan.value <= 0
    assert plan.goal_set == ends == set(np.flatnonzero(mu))
    assert 1 <= plan.length == len(plan.policy) <= mdp.T
    assert ends <= set(goal) if mode == "reach" else set(goal) <= ends


def assert_same(plan, value):
    assert (plan is None) == (value is None)
    if plan is not None:
        assert plan.value == pytest.approx(value, abs=1e-10)


# The model and its errors.

GOOD_P, GOOD_R = np.full((3, 2, 3), 1 / 3), -np.ones((4, 3, 2))


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize("P, r, gamma, message", [
    (changed(GOOD_P, (2, 0, 1), 0.2), GOOD_R, 0.9, r"P\[2, 0\] sums to 0\.86"),
    (changed(GOOD_P, (1, 1), [-0.5, 0.5, 1.0]), GOOD_R, 0.9, r"P\[1, 1, 0\] is -0\.5"),
    (changed(GOOD_P, (1, 1, 2), np.nan), GOOD_R, 0.9, r"P\[1, 1, 2\] is nan"),
    (GOOD_P[:2], GOOD_R, 0.9, r"P has shape \(2, 2, 3\)"),
    (GOOD_P[0], GOOD_R, 0.9, r"P has shape \(2, 3\)"),
    (GOOD_P, changed(GOOD_R, (3, 0, 1), 0.25), 0.9, r"r\[3, 0, 1\] is 0\.25"),
    (GOOD_P, changed(GOOD_R, (0, 2, 1), np.nan), 0.9, r"r\[0, 2, 1\] is nan"),
    (GOOD_P, changed(GOOD_R, (0, 2, 1), -np.inf), 0.9, r"r\[0, 2, 1\] is -inf"),
    (GOOD_P, GOOD_R[:, :2], 0.9, r"r has shape \(4, 2, 2\); with this P it must be \(T, 3, 2\)"),
    (GOOD_P, GOOD_R[:0], 0.9, r"r has shape \(0, 3, 2\)"),
    (GOOD_P, GOOD_R, 1.0, "gamma is 1.0"),
    (GOOD_P, GOOD_R, -0.1, "gamma is -0.1"),
    (GOOD_P, GOOD_R, float("nan"), "gamma is nan"),
])
def test_each_invalid_model_is_named(P, r, gamma, message):
    with pytest.raises(ValueError, match=message):
        DynamicMDP(P, r, gamma)


def test_lists_are_converted_and_the_model_is_frozen():
    mdp = DynamicMDP(GOOD_P.tolist(), GOOD_R.tolist(), 0)
    assert (mdp.T, mdp.S, mdp.A) == (4, 3, 2) and mdp.P.dtype == mdp.r.dtype == float
    with pytest.raises(FrozenInstanceError):
        mdp.gamma = 0.5


def test_float32_rows_leak_no_mass():
    P = np.random.default_rng(0).dirichlet(np.ones(7), size=(7, 2)).astype(np.float32)
    mdp = DynamicMDP(P, -np.ones((60, 7, 2)), 0.9)
    assert evaluate(mdp, np.zeros((60, 7), int), 0) == pytest.approx(-(1 - 0.9 ** 60) / 0.1, abs=1e-12)


@pytest.mark.parametrize("kwargs, message", [
    ({"start": 3}, "start is 3"), ({"start": -1}, "start is -1"), ({"start": 0.5}, r"start is 0\.5"),
    ({"goal": []}, "goal is empty"), ({"goal": 3}, "goal is 3; it must be an iterable of states"),
    ({"goal": [0, 7]}, "goal is 7"), ({"goal": [-1]}, "goal is -1"),
    ({"mode": "hit"}, "mode is 'hit'"), ({"pruning": "eager"}, "pruning is 'eager'"),
])
def test_each_invalid_argument_of_a_search_is_named(kwargs, message):
    mdp = DynamicMDP(GOOD_P, GOOD_R, 0.9)
    arguments = {"start": 0, "goal": [1], "mode": "reach", **kwargs}
    with pytest.raises(ValueError, match=message):
        gds(mdp, **arguments)
    if "pruning" not in kwargs:
        with pytest.raises(ValueError, match=message):
            exhaustive(mdp, **arguments)
    if not {"pruning", "mode"} & set(kwargs):
        with pytest.raises(ValueError, match=message):
            reach_by_induction(mdp, arguments["start"], arguments["goal"])


@pytest.mark.parametrize("policy, t0, message", [
    (np.zeros((5, 3), int), 0, "length 5 from t0=0 does not fit"),
    (np.zeros((3, 3), int), 2, "length 3 from t0=2 does not fit"),
    (np.zeros((3, 3), int), -1, "t0=-1"),
    ([{0: 1}, {0: 0, 1: 0}], 0, r"policy\[1\] has action None for state 2"),
    ([{0: 2}], 0, r"policy\[0\] has action 2 for state 0"),
    (np.full((1, 3), -1), 0, r"policy\[0\] has action -1"),
    (np.zeros((1, 3)), 0, r"policy\[0\] has action 0\.0"),
])
def test_each_invalid_policy_is_named(policy, t0, message):
    with pytest.raises(ValueError, match=message):
        evaluate(DynamicMDP(GOOD_P, GOOD_R, 0.9), policy, 0, t0)


# Backward induction, evaluation, concatenation.

def test_bellman_is_the_best_of_all_time_varying_policies():
    rng = np.random.default_rng(1)
    for kernel in KERNELS:
        mdp = make_mdp(rng, kernel, S=2, A=2, T=3)
        values, policy = bellman(mdp)
        assert values.shape == (4, 2) and policy.shape == (3, 2) and not values[3].any()
        for s in range(2):
            every = [evaluate(mdp, np.reshape(flat, (3, 2)), s) for flat in itertools.product(range(2), repeat=6)]
            assert values[0, s] == pytest.approx(max(every), abs=1e-12)
            assert evaluate(mdp, policy, s) == pytest.approx(values[0, s], abs=1e-12)
            assert evaluate(mdp, policy[1:], s, t0=1) == pytest.approx(values[1, s], abs=1e-12)


def test_evaluate_is_the_sum_over_all_paths():
    rng = np.random.default_rng(2)
    for kernel, t0 in itertools.product(KERNELS, (0, 2)):
        mdp = make_mdp(rng, kernel, S=3, A=2, T=6, gamma=0.8, rewards="uniform")
        policy, expected, mass = rng.integers(2, size=(4, 3)), 0.0, np.zeros(3)
        for path in itertools.product(range(3), repeat=5):
            actions = policy[np.arange(4), path[:4]]
            p = (path[0] == 1) * np.prod(mdp.P[path[:4], actions, path[1:]])
            mass[path[-1]] += p
            expected += p * sum(0.8 ** k * mdp.r[t0 + k, path[k], actions[k]] for k in range(4))
        assert evaluate(mdp, policy, 1, t0) == pytest.approx(expected, abs=1e-12)
        value, mu, goal_set = follow(mdp, policy, 1, t0)
        np.testing.assert_allclose(mu, mass, atol=1e-12)
        assert goal_set == set(np.flatnonzero(mass))
        rules = [dict(enumerate(row)) for row in policy.tolist()]
        assert evaluate(mdp, rules, 1, t0) == value == evaluate(mdp, policy.tolist(), 1, t0)


def concatenation(mdp, rng, shift):
    """A concatenation's value, and the sum of its parts with the second part valued from time T1 or, unshifted, 0."""
    first, second = rng.integers(mdp.A, size=(2, mdp.S)), rng.integers(mdp.A, size=(3, mdp.S))
    value, mu, _ = follow(mdp, first, 0)
    rest = [evaluate(mdp, second, s, t0=2 if shift else 0) for s in range(mdp.S)]
    return evaluate(mdp, concatenate(first, second), 0), value + mdp.gamma ** 2 * mu @ rest


def test_concatenation_splits_with_shifted_rewards_only():
    rng = np.random.default_rng(3)
    for kernel, gamma in itertools.product(KERNELS, (0.3, 0.5, 0.9)):
        mdp = make_mdp(rng, kernel, S=4, A=3, T=5, gamma=gamma, rewards="uniform")
        whole, parts = concatenation(mdp, rng, shift=True)
        assert whole == pytest.approx(parts, abs=1e-12)
        whole, parts = concatenation(mdp, rng, shift=False)
        assert abs(whole - parts) > 1e-6
        stationary = DynamicMDP(mdp.P, np.repeat(mdp.r[:1], 5, axis=0), gamma)
        whole, parts = concatenation(stationary, rng, shift=False)
        assert whole == pytest.approx(parts, abs=1e-12)


def test_concatenate_takes_rules_of_either_kind():
    mdp = DynamicMDP(GOOD_P, -np.arange(24.0).reshape(4, 3, 2), 0.9)
    first, second = [{0: 1}, {0: 0, 1: 1, 2: 0}], np.array([[1, 1, 0], [0, 1, 0]])
    both = concatenate(first, second)
    assert len(both) == 4
    assert evaluate(mdp, both, 0) == evaluate(mdp, [[1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 1, 0]], 0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9])
def test_static_policies_fall_short(gamma):
    """One state, rewards (0, 1) then (1, 0), shifted by -1: static policies earn at most 1, the best 1 + gamma."""
    mdp = DynamicMDP(np.ones((1, 2, 1)), [[[-1, 0]], [[0, -1]]], gamma)
    shift = 1 + gamma
    assert bellman(mdp)[0][0, 0] + shift == pytest.approx(1 + gamma)
    assert max(evaluate(mdp, [[a], [a]], 0) for a in range(2)) + shift == pytest.approx(1)


# GDS and the oracles against enumeration.

SIZES = {"deterministic": [(3, 2, 4), (4, 2, 3)], "sparse": [(3, 2, 4), (4, 2, 3)], "dense": [(3, 2, 3), (2, 3, 3)]}


@pytest.mark.parametrize("mode", ["reach", "cover"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_sound_is_optimal(kernel, mode):
    rng = np.random.default_rng([KERNELS.index(kernel), mode == "cover"])
    solvable = 0
    for i in range(40):
        mdp = make_mdp(rng, kernel, *SIZES[kernel][i % 2])
        start = int(rng.integers(mdp.S))
        goal = set(rng.permutation(mdp.S)[:rng.integers(1, mdp.S + 1)].tolist())
        truth = enumerate_policies(mdp, start, goal, mode)
        plans = [gds(mdp, start, goal, mode), gds(mdp, start, goal, mode, "none"), exhaustive(mdp, start, goal, mode)]
        if mode == "reach":
            plans.append(reach_by_induction(mdp, start, goal))
        for plan in plans:
            assert_same(plan, truth)
            if plan:
                assert_sound_plan(mdp, plan, start, goal, mode)
        solvable += truth is not None
    assert 8 < solvable < 40 or (kernel, mode) == ("dense", "cover")


@pytest.mark.parametrize("mode", ["reach", "cover"])
def test_sound_is_optimal_on_longer_horizons(mode):
    """Where plans take long and dominance across supports decides; the enumeration is the module's, checked above."""
    rng = np.random.default_rng(4)
    for i in range(200):
        size, gamma = [(8, 2, 8), (4, 2, 5)][i % 2], rng.choice([0, 0.3, 0.9, 0.99])
        mdp = module.random_mdp(rng, KERNELS[i % 2], *size, gamma)
        goal = module.random_goal(rng, mdp)
        truth = exhaustive(mdp, 0, goal, mode)
        assert_same(gds(mdp, 0, goal, mode), truth and truth.value)


@pytest.mark.parametrize("mode, optimum", [("reach", -1 - 0.9 * 6), ("cover", -0.0)])
def test_cheaper_so_far_is_not_better(mode, optimum):
    """0 goes to 1 with p=.9 for free, or with p=.6 at cost 1; else to 2. Then 2 gets to 3 for free, 1 at cost 10, or
    to 4 for free. After one step supports are equal, and the dearer plan has the better distribution.
    """
    P, r = np.zeros((5, 2, 5)), np.zeros((2, 5, 2))
    P[0, 0, [1, 2]], P[0, 1, [1, 2]] = (0.9, 0.1), (0.6, 0.4)
    P[1, 0, 3] = P[1, 1, 4] = P[2, :, 3] = P[3, :, 3] = P[4, :, 4] = 1.0
    r[0, 0, 1], r[1, 1, 0] = -1.0, -10.0
    mdp = DynamicMDP(P, r, 0.9)
    assert_same(gds(mdp, 0, [3], mode), optimum)
    assert_same(exhaustive(mdp, 0, [3], mode), optimum)


def test_values_are_exact():
    """The same optimum in rational arithmetic, by enumeration of rules on the support."""
    rng, third = np.random.default_rng(5), Fraction(1, 3)
    rows = [(0, third, 2 * third), (1, 0, 0), (third, third, third), (0, 0, 1)]
    for mode in ("reach", "cover") * 10:
        P = [[rows[rng.integers(4)] for _ in range(2)] for _ in range(3)]
        r = -rng.integers(0, 4, (3, 3, 2))
        goal = set(rng.permutation(3)[:rng.integers(1, 4)].tolist())
        found = []

        def visit(t, mu, value):
            ends = set(mu)
            if t and (ends <= goal if mode == "reach" else goal <= ends):
                found.append(value)
            for actions in itertools.product(range(2), repeat=len(mu)) if t < 3 else ():
                reward, next_mu = 0, {}
                for (s, p), a in zip(mu.items(), actions):
                    reward += p * int(r[t, s, a])
                    for s2, q in enumerate(P[s][a]):
                        if q:
                            next_mu[s2] = next_mu.get(s2, 0) + p * q
                visit(t + 1, next_mu, value + Fraction(9, 10) ** t * reward)

        visit(0, {0: Fraction(1)}, Fraction(0))
        plan = gds(DynamicMDP(np.array(P, dtype=float), r, 0.9), 0, goal, mode)
        assert_same(plan, float(max(found)) if found else None)


def test_reach_agrees_with_induction_where_no_enumeration_can():
    rng = np.random.default_rng(6)
    lengths, spread = [], 0
    for _ in range(40):
        mdp = make_mdp(rng, "deterministic", S=12, A=3, T=15, gamma=0.95, rewards="falling")
        P = mdp.P.copy()
        for s in rng.permutation(12)[:3]:  # a few of the moves may slip
            P[s, rng.integers(3)] = (np.eye(12)[rng.integers(12)] + np.eye(12)[s]) / 2
        mdp = DynamicMDP(P, mdp.r, mdp.gamma)
        goal = follow(mdp, rng.integers(3, size=(15, 12)), 0)[2]
        oracle = reach_by_induction(mdp, 0, goal)
        assert_sound_plan(mdp, oracle, 0, goal, "reach")
        plan = gds(mdp, 0, goal)
        assert plan.value == pytest.approx(oracle.value, abs=1e-10)
        lengths.append(plan.length)
        spread += max(map(len, plan.policy)) > 1
    assert max(lengths) > 3 and spread > 0


def test_agrees_with_backward_induction_at_fixed_length():
    """With the time as part of the state and all states of time T as the goal, a plan reaches it at length T only."""
    rng = np.random.default_rng(7)
    for kernel in KERNELS * 8:
        small = make_mdp(rng, kernel, *(2, 2, 3) if kernel == "dense" else (3, 2, 4))
        S, A, T = small.S, small.A, small.T
        P, r = np.zeros(((T + 1) * S, A, (T + 1) * S)), np.zeros((T, (T + 1) * S, A))
        for t in range(T + 1):
            here, there = slice(t * S, (t + 1) * S), slice(min(t + 1, T) * S, (min(t + 1, T) + 1) * S)
            P[here, :, there] = small.P
            r[:, here] = small.r
        mdp, goal = DynamicMDP(P, r, small.gamma), range(T * S, (T + 1) * S)
        for plan in (gds(mdp, 0, goal), reach_by_induction(mdp, 0, goal)):
            assert plan.length == T and plan.value == pytest.approx(bellman(small)[0][0, 0], abs=1e-10)


@pytest.mark.parametrize("mode", ["reach", "cover"])
def test_deterministic_grids_agree_with_networkx(mode):
    nx = pytest.importorskip("networkx")
    rng = np.random.default_rng(8)
    for n, T in [(3, 4), (4, 9), (6, 15), (6, 9)] * 3:
        rows = np.where(rng.random((n, n)) < 0.15, "#", ".")
        rows[0, 0], rows[-1, -1] = "S", "G"
        mdp, start, goal, *_ = gridworld("\n".join(map("".join, rows)), T, gamma=0.95)
        mdp = DynamicMDP(mdp.P, -rng.integers(0, 5, mdp.r.shape) * rng.random(), 0.95)
        graph = nx.DiGraph()
        for t, s, a in itertools.product(range(T), range(mdp.S), range(mdp.A)):
            edge, cost = ((t, s), (t + 1, int(mdp.P[s, a].argmax()))), -0.95 ** t * mdp.r[t, s, a]
            if not graph.has_edge(*edge) or cost < graph.edges[edge]["weight"]:
                graph.add_edge(*edge, weight=cost)
        graph.add_edges_from([((t, goal[0]), "goal") for t in range(1, T + 1)], weight=0.0)
        try:
            truth = -nx.dijkstra_path_length(graph, (0, start), "goal")
        except nx.NetworkXNoPath:
            truth = None
        plan = gds(mdp, start, goal, mode)
        assert_same(plan, truth)
        if plan:
            assert plan.expanded <= mdp.S * T


# The literal rule: minimal problems on which it fails, each by another mechanism.

def chain(edges, T, gamma, goal, costs=()):
    """Deterministic MDP from {state: (next state of action 0, of action 1)} and costs {(t, s, a): cost}, start 0."""
    r = np.zeros((T, len(edges), 2))
    for index, cost in dict(costs).items():
        r[index] = -cost
    return DynamicMDP(np.eye(len(edges))[[edges[s] for s in range(len(edges))]], r, gamma), 0, [goal]


def late_shortcut():
    """A chain of 23 steps of cost 1 and one of 24 free steps both end in x; then x -> z -> g, but T is 25."""
    x, z, g = 46, 47, 48
    edges = {s: (s + 1, s + 1) for s in range(1, 46)}
    edges |= {0: (1, 23), 22: (x, x), x: (z, z), z: (g, g), g: (g, g)}  # 1..22: the first chain, 23..45: the second
    costs = {(t, t, a): 1.0 for t in range(1, 23) for a in range(2)} | {(0, 0, 0): 1.0}
    return chain(edges, 25, 0.9, g, costs)


STAY_OR_GO = {(0, 0, 1): 1.0, (1, 0, 0): 0.5, (1, 0, 1): 1.0}
COUNTEREXAMPLES = {
    # Rewards are zero, so the slack is, too: an item is no better than its own entry in the table.
    "pruned by itself": (chain({0: (1, 1), 1: (2, 2), 2: (2, 2)}, 2, 0.5, 2), 0.0, None),
    # {1} is reached one step later for nothing; the plan there in time is dropped, the other overruns the horizon.
    "pruned by a longer plan": (overrun_example(), -1.0, None),
    # To stay twice costs 0.05, and to go then is free. But {0} after one stay has value 0, and going from there costs
    # 0.1: its future is discounted less than the slack, which knows the length of the dropped item only, allows for.
    "pruned by a shorter plan": (chain({0: (0, 1), 1: (1, 1)}, 3, 0.1, 1, STAY_OR_GO), -0.05, -0.1),
    # The same at gamma = 0, where the slack vanishes after one step: {0} falls to its own entry.
    "no slack without a future": (chain({0: (0, 1), 1: (1, 1)}, 3, 0.0, 1, STAY_OR_GO), 0.0, -1.0),
    # As the second, at a discount where the slack is useless for 22 steps: too wide, then too narrow.
    "pruned by a longer plan at gamma 0.9": (late_shortcut(), -(1 - 0.9 ** 23) / 0.1, None),
}


@pytest.mark.parametrize("mechanism", COUNTEREXAMPLES)
@pytest.mark.parametrize("mode", ["reach", "cover"])  # the same question if all goal sets are single states
def test_literal_rule_fails(mechanism, mode):
    (mdp, start, goal), optimum, literal = COUNTEREXAMPLES[mechanism]
    assert_same(reach_by_induction(mdp, start, goal), optimum)
    assert_same(gds(mdp, start, goal, mode), optimum)
    assert_same(gds(mdp, start, goal, mode, pruning="literal"), literal)


def test_literal_rule_fails_on_random_problems_and_sound_does_not(capsys):
    assert module.check(instances=60, seed=1) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(KERNELS)]
    assert len(rows) == 6 and all(row[2] == row[3] == "60" for row in rows)
    assert sum(int(row[5]) < 60 for row in rows) >= 4
    assert all(float(row[9]) <= float(row[11]) for row in rows)  # sound expands no more than no pruning does


# Edge cases.

@pytest.mark.parametrize("pruning", ["sound", "none"])
def test_the_empty_plan_does_not_count(pruning):
    leave = chain({0: (1, 1), 1: (0, 0)}, 2, 0.5, 0, {(0, 0, 0): 2.0, (0, 0, 1): 2.0, (1, 1, 0): 1.0, (1, 1, 1): 1.0})
    for plan in (gds(*leave, pruning=pruning), exhaustive(*leave), reach_by_induction(*leave)):
        assert plan.length == 2 and plan.value == -2.5
    one_step = DynamicMDP(leave[0].P, leave[0].r[:1], 0.5)
    for mode in ("reach", "cover"):
        assert gds(one_step, 0, [0], mode, pruning) is None and exhaustive(one_step, 0, [0], mode) is None
    assert reach_by_induction(one_step, 0, [0]) is None


@pytest.mark.parametrize("mode", ["reach", "cover"])
def test_one_step(mode):
    mdp = DynamicMDP([[[0.5, 0.5], [0, 1]], [[1, 0], [1, 0]]], [[[-3, -2], [0, 0]]], 0)
    plan = gds(mdp, 0, [1], mode)
    assert (plan.value, plan.policy, plan.goal_set, plan.length) == (-2.0, [{0: 1}], {1}, 1)
    plan = gds(mdp, 0, [0, 1], mode)
    assert plan.policy == ([{0: 1}] if mode == "reach" else [{0: 0}])


def test_goal_is_any_iterable_of_integers():
    mdp = DynamicMDP(GOOD_P, GOOD_R, 0.9)
    for solve in (gds, exhaustive, reach_by_induction):
        goals = (range(3), {0, 1, 2}, np.arange(3), (s for s in range(3)), (0, 1, 2, 2))
        assert [solve(mdp, np.int64(0), goal).value for goal in goals] == [-1.0] * 5


def test_a_possible_state_stays_possible_when_its_probability_underflows():
    P = np.zeros((3, 1, 3))
    P[0, 0, [0, 1]] = P[1, 0, [1, 2]] = 1.0, 1e-200
    P[2, 0, 2] = 1.0
    mdp = DynamicMDP(P, np.zeros((2, 3, 1)), 0.5)
    for plan in (gds(mdp, 0, [2], "cover"), exhaustive(mdp, 0, [2], "cover"), gds(mdp, 0, [0, 1, 2], "cover")):
        assert plan.goal_set == {0, 1, 2} and plan.length == 2
    assert follow(mdp, [[0, 0, 0]] * 2, 0)[2] == {0, 1, 2}


def test_budget():
    mdp, start, goal, *_ = gridworld()
    plan = gds(mdp, start, goal)
    assert gds(mdp, start, goal, budget=plan.expanded).value == plan.value
    with pytest.raises(BudgetExceeded, match=f"budget of {plan.expanded - 1} expansions") as error:
        gds(mdp, start, goal, budget=plan.expanded - 1)
    assert isinstance(error.value, RuntimeError) and error.value.expanded == plan.expanded - 1
    assert 0 < error.value.depth < mdp.T and plan.value <= error.value.best < 0
    with pytest.raises(BudgetExceeded):
        gds(mdp, start, goal, budget=0)


@pytest.mark.parametrize("pruning", ["sound", "none"])
def test_items_are_expanded_in_falling_value(pruning):
    rng, longest = np.random.default_rng(9), 0
    for _ in range(10):
        mdp = make_mdp(rng, "sparse", 4, 2, 4, gamma=0.9, rewards="uniform")
        trace = []
        plan = gds(mdp, 0, [2], "reach", pruning, trace=trace)
        values = [v for _, _, v in trace]
        assert values == sorted(values, reverse=True)
        assert plan is None or (plan.expanded == len(trace) and plan.value <= values[-1])
        assert all(0 <= t < mdp.T and sum(mu.values()) == pytest.approx(1) for t, mu, _ in trace)
        longest = max(longest, len(trace))
    assert longest > 10


# The worked example and the command.

def test_the_plan_waits_for_the_gate_or_the_patrol():
    world = gridworld()
    plan, static = gds(world.mdp, world.start, world.goal), exhaustive(world.mdp, world.start, world.goal, static=True)
    assert plan.length == 11 and plan.value > static.value + 1  # 8 moves and 3 waits
    assert sum(0 in rule.values() for rule in plan.policy) == 3
    assert evaluate(world.mdp, static.policy, world.start) == pytest.approx(static.value)
    assert all(static.policy[t].get(s, a) == a for rule in static.policy for s, a in rule.items()
               for t in range(static.length))

    closed = gridworld(gate_opens=99)
    plan = gds(closed.mdp, closed.start, closed.goal)
    static = exhaustive(closed.mdp, closed.start, closed.goal, static=True)
    states = [s for rule in plan.policy for s in rule] + [*plan.goal_set]
    assert plan.length == 13 and plan.value > static.value  # 12 moves round the gate, 1 wait for the patrol
    assert all(s != closed.patrol[t] for t, s in enumerate(states))
    assert plan.value == pytest.approx(-(1 - 0.95 ** 13) / 0.05)


def test_draw():
    world = gridworld("S|G\n#pp", T=4, gate_opens=2)
    assert draw(world, 0, 0) == "@|G\n#P." and draw(world, 1, 3) == "S@G\n#.P" and draw(world, 0, 2) == "@/G\n#P."


def test_import_needs_numpy_only():
    code = "import gds, sys; print(sorted({'torch', 'networkx', 'scipy', 'transformers', 'dlr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command():
    done = subprocess.run([sys.executable, "gds.py", "--instances", "10"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'literal': None" in done.stdout and "t = 11" in done.stdout
    assert sum(line.startswith(KERNELS) for line in done.stdout.splitlines()) == 6


@pytest.mark.parametrize("flags, word", [(["--nonsense"], "--nonsense"), (["--instances", "0"], "--instances is 0")])
def test_mistakes_get_one_sentence(flags, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gds.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    said = str(stopped.value.code)
    assert said.startswith("gds.py: ") and word in said and "\n" not in said and capsys.readouterr().err == ""
