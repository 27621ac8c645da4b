"""
General Dijkstra Search (GDS): the best plan that reaches, or covers, a set of states when rewards change with time.

A *dynamic MDP* has a fixed kernel P(s'|s,a), a horizon of T steps and a reward r_t(s,a) <= 0 that depends on the time.
So does its optimal policy, by the dynamic Bellman equations (V_T = 0):

    Q_t(s,a) = r_t(s,a) + gamma * sum_s' P(s'|s,a) V_{t+1}(s'),        V_t(s) = max_a Q_t(s,a).

The states in which a policy may end are its *goal set*. It reaches G* if its goal set lies inside G*, and covers G* if
its goal set contains G*. Which policy of length 1..T has the largest value among those that reach (cover) G*? GDS does
what Dijkstra did: keep partial plans in a queue, extend the best by every one-step decision rule, stop when a plan that
meets the goal comes out. As rewards are at most zero, nothing still in the queue can end up better. With a
deterministic kernel this is Dijkstra's algorithm on the time-expanded graph.

From "Dynamic Latent Routing" (F. Yu, X. Su, A. Abdullah, arXiv 2605.14323, 2026). What differs from the paper, and why:

1. In a concatenation the second policy is valued on the rewards it meets, r_{T1}, r_{T1+1}, ...; the paper writes its
   value as if it started at time 0, which is wrong as soon as rewards change with time.
2. Decision rules assign actions on the current support only: |A|^|support| of them instead of |A|^|S|.
3. Pruning is "sound" by default (see `gds`). The paper's rule, pruning="literal", compares plans of different lengths
   and a plan with itself; it misses goals that can be met and returns plans that are not optimal.
4. A plan has at least one step, even if the start already meets the goal.
5. `reach_by_induction` finds the optimal *reaching* plan in polynomial time without any search. It checks GDS at sizes
   that no enumeration can, and it shows that *coverage* is where the search earns its keep.

    python gds.py             # optimality check on thousands of random dynamic MDPs, then two examples (15 s)
    python gds.py --scaling   # expansions and seconds against T, |A| and |S| (20 s)
"""
import argparse
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count, product
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class DynamicMDP:
    """A finite-horizon MDP whose rewards depend on time.

    P: (S, A, S) transition probabilities, each row P[s, a] a distribution over next states.
    r: (T, S, A) rewards at times 0..T-1, none positive (any bounded reward becomes so by subtracting its maximum).
    gamma: discount per step, in [0, 1).
    Raises ValueError that names the first entry which does not fit.
    """
    P: np.ndarray
    r: np.ndarray
    gamma: float

    T = property(lambda self: self.r.shape[0], doc="Horizon, in steps.")
    S = property(lambda self: self.r.shape[1], doc="Number of states.")
    A = property(lambda self: self.r.shape[2], doc="Number of actions.")

    def __post_init__(self):
        P, r = np.asarray(self.P, dtype=float), np.asarray(self.r, dtype=float)
        if P.ndim != 3 or P.shape[0] != P.shape[2] or P.size == 0:
            raise ValueError(f"P has shape {P.shape}; it must be (S, A, S) with at least one state and one action.")
        if r.ndim != 3 or r.shape[1:] != P.shape[:2] or len(r) == 0:
            raise ValueError(f"r has shape {r.shape}; with this P it must be (T, {P.shape[0]}, {P.shape[1]}), T >= 1.")
        sums = P.sum(axis=2)
        for name, entries, fine, demand in [
                ("P{} is", P, P >= 0, "probabilities are not negative"),
                ("P{} sums to", sums, abs(sums - 1) < 1e-6,
                 "each row of P must be a probability distribution over next states"),
                ("r{} is", r, (r <= 0) & (r > -np.inf), "rewards are finite and at most 0 (subtract the largest)")]:
            for index in np.argwhere(~fine)[:1].tolist():
                raise ValueError(f"{name.format(index)} {entries[tuple(index)]:.9g}; {demand}.")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma is {self.gamma}; the discount must lie in [0, 1).")
        object.__setattr__(self, "P", P / sums[:, :, None])  # float32 rows miss 1 by 1e-8: let no mass leak
        object.__setattr__(self, "r", r)


def bellman(mdp):
    """Backward induction on the dynamic Bellman equations: values (T+1, S), the last row 0, and policy (T, S)."""
    values, policy = np.zeros((mdp.T + 1, mdp.S)), np.zeros((mdp.T, mdp.S), dtype=int)
    for t in reversed(range(mdp.T)):
        q = mdp.r[t] + mdp.gamma * mdp.P @ values[t + 1]  # (S, A)
        values[t], policy[t] = q.max(axis=1), q.argmax(axis=1)
    return values, policy


def follow(mdp, policy, start, t0=0):
    """Follow `policy` from state `start` at time t0; return its value, the final distribution (S,) and the goal set.

    policy: one decision rule per step, each a dict {state: action} on (at least) the states it can be in, or all S
    actions; so an integer array (T', S) will do. The value is discounted to time t0.
    Raises ValueError if the policy overruns the horizon or if an action it needs is missing or does not exist.
    """
    _check_state(mdp, start, "start")
    if t0 < 0 or t0 + len(policy) > mdp.T:
        raise ValueError(f"A policy of length {len(policy)} from t0={t0} does not fit into the times 0..{mdp.T}.")
    value, mu, support = 0.0, np.zeros(mdp.S), [int(start)]
    mu[start] = 1.0
    for k, rule in enumerate(policy):
        rule = rule if isinstance(rule, Mapping) else dict(enumerate(rule))
        actions = [rule.get(s) for s in support]
        for s, a in zip(support, actions):
            if not isinstance(a, (int, np.integer)) or not 0 <= a < mdp.A:
                raise ValueError(f"policy[{k}] has action {a} for state {s}; actions are the integers 0..{mdp.A - 1}.")
        rows = mdp.P[support, actions]  # (|support|, S)
        value += mdp.gamma ** k * mu[support] @ mdp.r[t0 + k, support, actions]
        mu, support = mu[support] @ rows, np.flatnonzero(rows.any(axis=0)).tolist()  # a product may underflow to 0
    return float(value), mu, frozenset(support)


def evaluate(mdp, policy, start, t0=0):
    """Expected discounted reward of following `policy` from state `start` at time t0 (arguments as in `follow`)."""
    return follow(mdp, policy, start, t0)[0]


def concatenate(first, second):
    """First `first`, then `second`. Its value splits at T1 = len(first), where mu is the distribution reached by then:

        value(both) = value(first) + gamma^T1 * sum_s mu(s) * value(second from s, t0=T1).
    """
    return [*first, *second]


@dataclass(frozen=True)
class Plan:
    """A policy of length 1..T that meets the goal."""
    value: float  # V_0(start)
    policy: list  # one decision rule per step: {state: action} on the support at that step
    goal_set: frozenset  # the states it may end in
    expanded: int  # partial plans that were extended to find it; 0 where nothing was searched

    length = property(lambda self: len(self.policy), doc="Steps.")


class BudgetExceeded(RuntimeError):
    """Says how far the search got: `expanded` plans extended, of up to `depth` steps; the `best` value in the queue."""

    def __init__(self, expanded, depth, horizon, best):
        super().__init__(f"gds found no plan within its budget of {expanded} expansions: it extended plans of up to "
                         f"{depth} steps (T={horizon}), and the best one in the queue is worth {best:.6g}.")
        self.expanded, self.depth, self.best = expanded, depth, best


def gds(mdp, start, goal, mode="reach", pruning="sound", budget=None, trace=None):
    """Best-first search for the policy of length 1..T with the largest value among those that reach (cover) `goal`.

    A queued item is a policy of length t with its state distribution mu and its value v. Popped items are extended by
    every decision rule on the support of mu: v_{t+1} = v_t + gamma^t E[r_t]; of actions with equal rows of P, only the
    best one counts. Pruning says which items are dropped instead:

    "sound": (mu, v) is dropped if an *expanded* (mu', v') of the *same t* has its support inside that of mu (cover:
        around it) and v <= v' - gamma^t sum_s (mu'(s) - mu(s))^+ W_t(s), W_t(s) = the highest cost to come from s.
        Proof. Continued alike, mu' ends in a smaller (larger) support and pays at most that sum more than mu does, so
        each completion of mu has a rival among those of mu'. By induction a prefix of some optimal plan is always in
        the queue, hence the first item to meet the goal is optimal.
    "literal": the paper's rule (see `_LiteralPruning`); may miss the goal or return a plan that is not optimal.
    "none": nothing is dropped.

    goal: an iterable of states. budget: the number of expansions after which to raise BudgetExceeded. trace: a list
    that receives (t, mu, v) of each item expanded. Returns a Plan, or None if no policy of length 1..T meets the goal.
    Raises ValueError for a state, mode or pruning that does not exist, and for an empty goal.
    """
    meets_goal = _goal_test(mdp, start, goal, mode)
    if pruning not in PRUNING:
        raise ValueError(f"pruning is {pruning!r}; it must be one of {', '.join(map(repr, PRUNING))}.")
    prune = PRUNING[pruning](mdp, start, mode)
    kernel, rewards = _successors(mdp, merge=True), _discounted_rewards(mdp)
    order, expanded, depth = count(), 0, 0
    # -value, False if the goal is met (it then wins ties), order of arrival, t, mu as {state: p}, last actions, parent
    queue = [(0.0, True, next(order), 0, {int(start): 1.0}, None, None)]
    while queue:
        item = heappop(queue)
        cost, unmet, _, t, mu, *_ = item
        if not unmet:
            return Plan(0.0 - cost, _read_off(item), frozenset(mu), expanded)
        if prune.popped(t, mu, -cost):
            continue
        if budget is not None and expanded >= budget:
            raise BudgetExceeded(expanded, depth, mdp.T, -cost)
        expanded, depth = expanded + 1, max(depth, t)
        if trace is not None:
            trace.append((t, mu, -cost))
        for actions, reward, next_mu in _extensions(kernel, rewards[t], mu):
            if not prune.pushed(t + 1, next_mu, reward - cost):
                unmet = not meets_goal(next_mu)
                if t + 1 < mdp.T or not unmet:
                    heappush(queue, (cost - reward, unmet, next(order), t + 1, next_mu, actions, item))
    return None


def _read_off(item):
    """The policy of a queue item. None is copied during the search: each item knows its last rule and its parent."""
    policy = []
    while item[-1] is not None:
        *_, actions, item = item
        policy.append(dict(zip(item[4], actions)))
    return policy[::-1]


def _extensions(kernel, rewards, mu):
    """List (actions, expected reward, next distribution) for each decision rule on the support of `mu`."""
    rules = [((), 0.0, {})]
    for s, p in mu.items():
        r = rewards[s].tolist()
        choices = [(max(actions, key=r.__getitem__) if actions[1:] else actions[0], row) for actions, row in kernel[s]]
        if len(mu) == 1:  # nothing to mix: the rows of the kernel as they are
            return [((a,), r[a], row) for a, row in choices]
        choices = [((a,), p * r[a], {s2: p * q for s2, q in row.items()}) for a, row in choices]
        rules = [(actions + a, total + reward, {**mix, **{s2: mix.get(s2, 0.0) + q for s2, q in row.items()}})
                 for actions, total, mix in rules for a, reward, row in choices]
    return rules


def _successors(mdp, merge=False):
    """kernel[s] = [(actions, row), ...] with row = {next state: probability > 0}, from which supports are taken.

    With merge=True actions of equal rows share an entry: the one with the best reward at the time will do for all.
    """
    index = np.nonzero(mdp.P)
    rows = [[{} for _ in range(mdp.A)] for _ in range(mdp.S)]
    for s, a, s2, p in zip(*(axis.tolist() for axis in index), mdp.P[index].tolist()):
        rows[s][a][s2] = p
    if not merge:
        return [[((a,), row) for a, row in enumerate(choices)] for choices in rows]
    return [[([a for a, row in enumerate(choices) if row == first], first)
             for i, first in enumerate(choices) if first not in choices[:i]] for choices in rows]


def _discounted_rewards(mdp):
    return mdp.gamma ** np.arange(mdp.T)[:, None, None] * mdp.r  # (T, S, A)


def _check_state(mdp, s, name):
    if not isinstance(s, (int, np.integer)) or not 0 <= s < mdp.S:
        raise ValueError(f"{name} is {s!r}; states are the integers 0..{mdp.S - 1}.")


def _goal_test(mdp, start, goal, mode):
    """Check the arguments of a search; return the function that tells if a distribution {state: p} meets the goal."""
    goal = frozenset(goal)
    _check_state(mdp, start, "start")
    for s in goal:
        _check_state(mdp, s, "a state of goal")
    if not goal:
        raise ValueError("goal is empty; it must contain at least one state.")
    if mode not in ("reach", "cover"):
        raise ValueError(f"mode is {mode!r}; it must be 'reach' or 'cover'.")
    return goal.issuperset if mode == "reach" else goal.issubset


class _NoPruning:
    def __init__(self, mdp, start, mode):
        self.reach = mode == "reach"

    def pushed(self, t, mu, value):
        """Drop this item before it enters the queue?"""
        return False

    def popped(self, t, mu, value):
        """Drop this item, which has left the queue, instead of expanding it?"""
        return False

    def dominates(self, support, mu):
        """Would each continuation that meets the goal from mu do so from this support?"""
        return support.issubset(mu) if self.reach else support.issuperset(mu)


class _SoundPruning(_NoPruning):
    """See `gds`. The case mu' = mu, where the sum is zero, is caught before a duplicate enters the queue."""

    def __init__(self, mdp, start, mode):
        super().__init__(mdp, start, mode)
        self.best = [{} for _ in range(mdp.T + 1)]  # t -> {distribution: best value queued}
        self.expanded = [defaultdict(list) for _ in range(mdp.T)]  # t -> {support: [(mu, value)]}
        self.deterministic = not ((0 < mdp.P) & (mdp.P < 1)).any()
        worst = np.zeros((mdp.T + 1, mdp.S))  # gamma^t W_t(s)
        if not self.deterministic:
            for t, rewards in reversed(list(enumerate(_discounted_rewards(mdp)))):
                worst[t] = (mdp.P @ worst[t + 1] - rewards).max(axis=1)
        self.worst = worst.tolist()  # indexed in the inner loop, where numpy is slow

    @staticmethod
    def key(mu):  # sums in another order differ in the last digits
        return tuple(mu) if len(mu) == 1 else frozenset([(s, round(p, 12)) for s, p in mu.items()])

    def pushed(self, t, mu, value):
        best, key = self.best[t], self.key(mu)
        if key in best and value <= best[key] + 1e-12:
            return True
        best[key] = value
        return False

    def popped(self, t, mu, value):
        if value < self.best[t].get(self.key(mu), value):
            return True  # a better duplicate came later
        if self.deterministic:
            return False  # a single state has no rivals but duplicates
        worst = self.worst[t]
        for support, rivals in self.expanded[t].items():
            if self.dominates(support, mu):
                for rival, v in rivals:
                    extra = sum([(p - mu.get(s, 0.0)) * worst[s] for s, p in rival.items() if p > mu.get(s, 0.0)])
                    if value <= v - extra + 1e-12:
                        return True
        self.expanded[t][frozenset(mu)].append((mu, value))
        return False


class _LiteralPruning(_NoPruning):
    """The paper's rule: a table of the best value known for each goal set, whatever the length of the plan behind it.

    An item of length t, goal set G and value v is dropped if a stored (G', v') has G' inside G (cover: around it) and
    v <= v' - r_max gamma^t / (1-gamma)^2. A new item raises every stored set around (inside) its own; the paper's
    proviso that this set be not popped yet never bites, since values fall from pop to pop. An item's value extends its
    parent's; the pseudo-code can also be read as extending the table's value of the parent's goal set, but what comes
    out of that need not be the value of any policy.
    """

    def __init__(self, mdp, start, mode):
        super().__init__(mdp, start, mode)
        self.slack = -mdp.r.min() * mdp.gamma ** np.arange(mdp.T) / (1 - mdp.gamma) ** 2
        self.table = {frozenset([int(start)]): 0.0}

    def pushed(self, t, mu, value):
        for goal_set, v in self.table.items():
            if v < value and (goal_set.issuperset(mu) if self.reach else goal_set.issubset(mu)):
                self.table[goal_set] = value
        self.table.setdefault(frozenset(mu), value)
        return False

    def popped(self, t, mu, value):
        return any(value <= v - self.slack[t] and self.dominates(goal_set, mu) for goal_set, v in self.table.items())


PRUNING = {"sound": _SoundPruning, "literal": _LiteralPruning, "none": _NoPruning}


def exhaustive(mdp, start, goal, mode="reach", static=False):
    """The same optimum by enumerating all policies of length 1..T; with static=True those with a single rule only."""
    meets_goal = _goal_test(mdp, start, goal, mode)
    kernel, rewards = _successors(mdp), _discounted_rewards(mdp)
    best, expanded = None, 0

    def visit(t, mu, value, policy):
        nonlocal best, expanded
        if t > 0 and meets_goal(mu) and (best is None or value > best[0]):
            best = value, policy, frozenset(mu)
        if t < mdp.T:
            expanded += 1
            for actions, reward, next_mu in _extensions(kernel, rewards[t], mu):
                rule = dict(zip(mu, actions))
                if not static or all(earlier.get(s, a) == a for earlier in policy for s, a in rule.items()):
                    visit(t + 1, next_mu, value + reward, [*policy, rule])

    visit(0, {int(start): 1.0}, 0.0, [])
    return Plan(*best, expanded) if best else None


def reach_by_induction(mdp, start, goal):
    """The optimal *reaching* plan in O(T^2 S^2 A), without search; None if there is none.

    A plan of length L reaches the goal if and only if none of its actions risks a state from which the goal cannot be
    made sure of by time L. So: backward induction from V_L = 0 on the goal and -infinity elsewhere, for every L, all
    such actions forbidden. Coverage has no such form, because no single state can tell what the others will cover.
    """
    goal = list(goal)
    _goal_test(mdp, start, goal, "reach")
    possible = (mdp.P > 0).astype(float)
    values = np.full((mdp.T, mdp.S), -np.inf)  # row L-1: plans of length L
    values[:, goal] = 0.0
    policy = np.zeros((mdp.T, mdp.T, mdp.S), dtype=np.int16)  # (t, L-1, S)
    for t in reversed(range(mdp.T)):
        lost = np.isinf(values[t:])  # (lengths > t, S)
        q = mdp.r[t] + mdp.gamma * np.tensordot(np.where(lost, 0.0, values[t:]), mdp.P, axes=(1, 2))  # (lengths, S, A)
        q[np.tensordot(lost.astype(float), possible, axes=(1, 2)) > 0] = -np.inf
        values[t:], policy[t, t:] = q.max(axis=2), q.argmax(axis=2)
    last = values[:, start].argmax()
    if np.isinf(values[last, start]):
        return None
    support, rules = [int(start)], []
    for t in range(last + 1):
        rules.append({s: int(policy[t, last, s]) for s in support})
        support = np.flatnonzero(mdp.P[support, list(rules[-1].values())].any(axis=0)).tolist()
    return Plan(float(values[last, start]), rules, frozenset(support), 0)


MOVES = {"wait": (0, 0), "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

CORRIDORS = """
S...|...G
.#######.
......p..
######p##
######p##
"""


class GridWorld(NamedTuple):
    mdp: DynamicMDP
    start: int
    goal: list
    cells: list  # (row, column) of each state
    rows: list  # the map, as lines of text
    gate_opens: int  # the first time at which the gate is open
    patrol: list  # the patrol's state at times 0..T; empty without one


def gridworld(text=CORRIDORS, T=16, gate_opens=7, gamma=0.95):
    """A map as a dynamic MDP: S start, G goal, # wall, | gate, p the patrol's beat (in reading order, to and fro).

    Moves are deterministic; to bump into a wall is to wait. A step costs 1, into the closed gate 8 more, onto the
    patrol 4 more: gate and patrol live in the rewards, for the kernel of a dynamic MDP does not change with time.
    """
    rows = text.split()
    cells = [(i, j) for i, row in enumerate(rows) for j, mark in enumerate(row) if mark != "#"]
    states = {cell: s for s, cell in enumerate(cells)}
    marked = {mark: [s for s, (i, j) in enumerate(cells) if rows[i][j] == mark] for mark in "SG|p"}
    next_state = np.array([[states.get((i + di, j + dj), s) for di, dj in MOVES.values()]
                           for s, (i, j) in enumerate(cells)])  # (S, A)
    cost = np.ones((T + 1, len(cells)))  # of being in a cell at a time
    cost[:gate_opens, marked["|"]] += 8.0
    beat = marked["p"] + marked["p"][-2:0:-1]
    patrol = [beat[t % len(beat)] for t in range(T + 1)] if beat else []
    cost[np.arange(len(patrol)), patrol] += 4.0
    mdp = DynamicMDP(np.eye(len(cells))[next_state], -cost[1:, next_state], gamma)
    return GridWorld(mdp, marked["S"][0], marked["G"], cells, rows, gate_opens, patrol)


def draw(world, s, t):
    """The map at time t as text, with @ the agent in state s, P the patrol, and / the gate once it is open."""
    canvas = [list(row.replace("p", ".").replace("|", "/" if t >= world.gate_opens else "|")) for row in world.rows]
    for mark, state in [("P", world.patrol[t:t + 1]), ("@", [s])]:
        for i, j in [world.cells[k] for k in state]:
            canvas[i][j] = mark
    return "\n".join(map("".join, canvas))


def overrun_example():
    """(mdp, start, goal) on which the literal rule fails. State 0: wait, or go to 1; then 1 -> 2 -> 3; T = 3.

    Going to 1 costs something at time 0 only. The table keeps the value of going later, for which the plan that sets
    out in time is dropped; the later one cannot get to 3 within the horizon.
    """
    r = np.zeros((3, 4, 2))
    r[0, 0, 1] = -1.0
    return DynamicMDP(np.eye(4)[[[0, 1], [2, 2], [3, 3], [3, 3]]], r, gamma=0.3), 0, [3]


def random_mdp(rng, kernel, S, A, T, gamma):
    """kernel: "deterministic", "sparse" (a third of the (s, a) have two successors) or "dense" (all have two or more).

    Successors are any states or, in half of the cases, at most two steps ahead in a corridor, which makes for longer
    plans. Rewards are uniform, tied (integers), mostly zero, or falling in cost, so that it pays to wait.
    """
    corridor = rng.random() < 0.5
    P = np.zeros((S, A, S))
    for s, a in np.ndindex(S, A):
        near = np.arange(s, min(s + 3, S)) if corridor else np.arange(S)
        n = {"deterministic": 1, "sparse": 1 + (rng.random() < 1 / 3), "dense": rng.integers(2, S + 1)}[kernel]
        n = min(n, len(near))
        P[s, a, rng.choice(near, n, replace=False)] = rng.dirichlet(np.ones(n)) if rng.random() < 0.5 else 1 / n
    r = -rng.random((T, S, A))
    r = [r, -rng.integers(0, 3, r.shape), r * (rng.random(r.shape) < 0.3), r * 3.0 ** -np.arange(T)[:, None, None]]
    return DynamicMDP(P, r[rng.integers(4)], gamma)


def random_goal(rng, mdp):
    """Where a random policy from state 0 may end or, one time in five, any states (which may be out of reach)."""
    if rng.random() < 0.2:
        return rng.choice(mdp.S, rng.integers(1, mdp.S + 1), replace=False).tolist()
    return follow(mdp, rng.integers(mdp.A, size=(mdp.T, mdp.S)), 0)[2]


SIZES = {"deterministic": [(8, 2, 8), (6, 3, 5)], "sparse": [(5, 2, 4), (3, 2, 6)], "dense": [(4, 2, 3), (3, 2, 4)]}


def check(instances=600, seed=0):
    """Compare GDS with enumeration (reach: also induction) on random dynamic MDPs of SIZES (S, A, T); print a table.

    An answer is right if its value is that of the enumeration, or if both find no plan. The literal rule's errors are
    shown for what they are: goals it missed, plans that are worse, and by how much at most. Returns all other errors.
    """
    rng = np.random.default_rng(seed)
    row = "{:14}{:6}{:>9}{:>8}{:>11}{:>9}{:>10}{:>7}{:>6}{:>9}{:>9}{:>8}".format
    print(f"{'':29}{'same as enumeration':^28}   {'literal rule':^20}   {'mean expansions':^23}")
    print(row("kernel", "mode", "instances", "sound", "induction", "literal", "missed", "worse", "by", *PRUNING))
    errors, worth = 0, lambda plan: plan.value if plan else -np.inf
    for kernel, mode in product(SIZES, ("reach", "cover")):
        gaps, expansions = defaultdict(list), defaultdict(int)
        for i in range(instances):
            mdp = random_mdp(rng, kernel, *SIZES[kernel][i % 2], gamma=rng.choice([0.0, 0.3, 0.5, 0.9, 0.99]))
            goal = random_goal(rng, mdp)
            truth = worth(exhaustive(mdp, 0, goal, mode))
            values = {"induction": worth(reach_by_induction(mdp, 0, goal))} if mode == "reach" else {}
            for pruning in PRUNING:
                trace = []
                values[pruning] = worth(gds(mdp, 0, goal, mode, pruning, trace=trace))
                expansions[pruning] += len(trace)
            for name, value in values.items():
                gaps[name].append(0.0 if value == truth else abs(value - truth))  # infinite if only one found a plan
        right = {name: sum(gap < 1e-9 for gap in gaps[name]) for name in gaps}
        errors += sum(instances - n for name, n in right.items() if name != "literal")
        missed, worst = gaps["literal"].count(np.inf), max(gap for gap in gaps["literal"] if gap < np.inf)
        print(row(kernel, mode, instances, right["sound"], right.get("induction", "-"), right["literal"], missed,
                  instances - right["literal"] - missed, f"{worst:.2f}",
                  *[f"{n / instances:.1f}" for n in expansions.values()]))
    return errors


def scaling():
    """Print mean expansions and seconds of two kinds of search, both with costs that change at random with time.

    Grids: from corner to corner, five moves. Others: ten problems whose goal is an additional state that cannot be
    entered, so that everything is searched which is not pruned.
    """
    print(f"{'':34}{'reach':^19}    {'cover':^19}")
    print(f"{'kernel':14}{'|S|':>6}{'|A|':>5}{'T':>5}" + f"{'expansions':>14}{'seconds':>9}" * 2)
    jobs = [("grid", n * n, 5, 4 * n) for n in (8, 16, 24, 32)] + [("deterministic", 100, A, 50) for A in (2, 4, 8)] + [
        ("sparse", S, 2, 6) for S in (4, 5, 6, 8)] + [("sparse", 4, A, 6) for A in (3, 4)] + [
        ("sparse", 4, 2, T) for T in (8, 10, 12)]
    for kernel, S, A, T in jobs:
        print(f"{kernel:14}{S:6}{A:5}{T:5}", end="")
        for mode in ("reach", "cover"):
            trace, seconds, problems = [], 0.0, 1 if kernel == "grid" else 10
            for seed in range(problems):
                rng = np.random.default_rng(seed)
                if kernel == "grid":
                    text = "S" + "." * (S - 2) + "G"
                    mdp, _, goal, *_ = gridworld("\n".join(text[i:i + T // 4] for i in range(0, S, T // 4)), T)
                    mdp = replace(mdp, r=-rng.random(mdp.r.shape))
                else:
                    mdp, goal = random_mdp(rng, kernel, S, A, T, gamma=0.9), [S]
                    P, r = np.pad(mdp.P, ((0, 1), (0, 0), (0, 1))), np.pad(mdp.r, ((0, 0), (0, 1), (0, 0)))
                    P[S, :, S] = 1.0
                    mdp = DynamicMDP(P, r, mdp.gamma)
                began = time.perf_counter()
                gds(mdp, 0, goal, mode, trace=trace)
                seconds += time.perf_counter() - began
            print(f"{len(trace) / problems:14.0f}{seconds / problems:9.3f}", end="")
        print()


def main():
    parser = argparse.ArgumentParser(description="Optimality check of General Dijkstra Search, and two examples.")
    parser.add_argument("--instances", type=int, default=600, help="random dynamic MDPs per row of the check's table")
    parser.add_argument("--scaling", action="store_true", help="print expansions and seconds against size instead")
    args = parser.parse_args()
    if args.scaling:
        scaling()
        return
    errors = check(args.instances)
    plans = {pruning: gds(*overrun_example(), pruning=pruning) for pruning in ("sound", "literal")}
    print("\nA goal that the literal rule misses:", {name: plan and plan.value for name, plan in plans.items()})

    world = gridworld()
    plan = gds(world.mdp, world.start, world.goal)
    static = exhaustive(world.mdp, world.start, world.goal, static=True)
    print(f"\nA gate that opens at t={world.gate_opens}: the best static policy earns {static.value:.2f}, "
          f"the best plan {plan.value:.2f} in {plan.length} steps:\n")
    states = [s for rule in plan.policy for s in rule] + [*plan.goal_set]  # one per step: the kernel is deterministic
    frames = [draw(world, s, t).split("\n") for t, s in enumerate(states)]
    for first in range(0, len(frames), 6):
        print("   ".join(f"t = {t:<5}" for t in range(first, min(first + 6, len(frames)))))
        print("\n".join("   ".join(line) for line in zip(*frames[first:first + 6])) + "\n")
    if errors:
        raise SystemExit(f"{errors} answers differ from the enumeration's.")


if __name__ == "__main__":
    main()
