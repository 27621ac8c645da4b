"""General Dijkstra Search (GDS): the best plan that reaches or covers a set of states when rewards change with time.

A *dynamic MDP* has a fixed kernel P(s'|s,a), a horizon of T steps and a reward r_t(s,a) <= 0 that depends on the time.
So does its optimal policy, by the dynamic Bellman equations (V_T = 0):

    Q_t(s,a) = r_t(s,a) + gamma * sum_s' P(s'|s,a) V_{t+1}(s'),        V_t(s) = max_a Q_t(s,a).

The states in which a policy may end are its *goal set*. It reaches G* if its goal set lies inside G*, and covers G* if
its goal set contains G*. Which policy of length 1..T has the largest value among those that reach (cover) G*? GDS does
what Dijkstra did: keep partial plans in a queue, extend the best by every one-step decision rule, stop when a plan that
meets the goal comes out. As rewards are at most zero, nothing still in the queue can end up better. With a
deterministic kernel the support is a single state, and this is Dijkstra's algorithm on the time-expanded graph.

After "Dynamic Latent Routing" (F. Yu, X. Su, A. Abdullah, arXiv 2605.14323, 2026), with these differences:
1. In a concatenation the second policy is valued on the rewards it meets, from time T1, not as if it started at time 0.
2. Decision rules cover the current support only, |A|^|support| of them instead of |A|^|S|. Plans have a step at least.
3. Pruning is "sound" by default. The paper's rule, "literal", misses goals and returns plans that are not optimal.
4. Optimal *reaching* needs no search: `reach_by_induction` is polynomial. *Coverage* is where GDS earns its keep.

`python gds.py` checks optimality on thousands of random problems (15 s); with --scaling it shows how searches grow.
"""
import argparse
import sys
import time
from collections import defaultdict, namedtuple
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, product

import numpy as np


@dataclass(frozen=True, eq=False)
class DynamicMDP:
    """A finite-horizon MDP of T steps, S states and A actions, whose rewards depend on time.

    Raises ValueError that names the first entry of P (S, A, S), r (T, S, A) or gamma which does not fit.
    """
    P: np.ndarray  # (S, A, S) transition probabilities, each row P[s, a] a distribution over next states
    r: np.ndarray  # (T, S, A) rewards at times 0..T-1, at most 0 (from any bounded reward, subtract its maximum)
    gamma: float  # discount per step, in [0, 1)

    def __post_init__(self):
        P, r = np.asarray(self.P, dtype=float), np.asarray(self.r, dtype=float)
        if P.ndim != 3 or P.shape[0] != P.shape[2] or P.size == 0:
            raise ValueError(f"P has shape {P.shape}; it must be (S, A, S) with at least one state and one action.")
        if r.ndim != 3 or r.shape[1:] != P.shape[:2] or len(r) == 0:
            raise ValueError(f"r has shape {r.shape}; with this P it must be (T, {P.shape[0]}, {P.shape[1]}), T >= 1.")
        sums = P.sum(axis=2)
        for name, entries, fine, demand in [
                ("P{} is", P, P >= 0, "probabilities are not negative"),
                ("P{} sums to", sums, abs(sums - 1) < 1e-6, "each row of P must be a distribution over next states"),
                ("r{} is", r, (r <= 0) & (r > -np.inf), "rewards are finite and at most 0 (subtract the largest)")]:
            for index in np.argwhere(~fine)[:1].tolist():
                raise ValueError(f"{name.format(index)} {entries[tuple(index)]:.9g}; {demand}.")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma is {self.gamma}; the discount must lie in [0, 1).")
        for name, value in zip(["P", "r", "T", "S", "A"], [P / sums[:, :, None], r, *r.shape]):
            object.__setattr__(self, name, value)  # P divided: float32 rows miss 1 by 1e-8, and no mass may leak


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
    _check_states(mdp, "start", [start])
    if t0 < 0 or t0 + len(policy) > mdp.T:
        raise ValueError(f"A policy of length {len(policy)} from t0={t0} does not fit into the times 0..{mdp.T}.")
    value, mu, support = 0.0, np.eye(mdp.S)[start], [int(start)]
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
    """First `first`, then `second`. With mu the distribution reached at time T1 = len(first), its value is
    value(first) + gamma^T1 * sum_s mu(s) * value(second from s, t0=T1).
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

    A queued item is a policy of length t with state distribution mu and value v. Pruning says which are dropped:

    "sound": (mu, v) is dropped if an *expanded* (mu', v') of the *same t* has its support inside that of mu (cover:
        around it) and v <= v' - gamma^t sum_s (mu'(s) - mu(s))^+ W_t(s), W_t(s) = the highest cost to come from s.
        Proof. Continued alike, mu' ends in a smaller (larger) support and pays at most that sum more than mu does, so
        each completion of mu has a rival among those of mu'. By induction a prefix of some optimal plan is always in
        the queue, hence the first item to meet the goal is optimal.
    "literal": the paper's rule (see `_literal_pruning`). "none": nothing is dropped.

    goal: an iterable of states. budget: the number of expansions after which to raise BudgetExceeded. trace: a list
    that receives (t, mu, v) of each item expanded. Returns a Plan, or None if no policy of length 1..T meets the goal.
    Raises ValueError for a state, mode or pruning that does not exist, and for a goal that is no iterable or empty.
    """
    goal, meets = _check_goal(mdp, start, goal, mode)
    if pruning not in PRUNING:
        raise ValueError(f"pruning is {pruning!r}; it must be one of {', '.join(map(repr, PRUNING))}.")
    pushed, popped = PRUNING[pruning](mdp, meets)  # is this item to be dropped on its way into, out of the queue?
    step, order, expanded, depth = _stepper(mdp, merge=True), count(), 0, 0
    # -value, False if the goal is met (it then wins ties), order of arrival, t, mu as {state: p}, and in place of the
    # policy, so that none is copied during the search, its last actions and the item that they extended
    queue = [(0.0, True, next(order), 0, {int(start): 1.0}, None, None)]
    pushed(*queue[0][3:5], 0.0)
    while queue:
        cost, unmet, _, t, mu, actions, parent = item = heappop(queue)
        if not unmet:
            policy = []
            while parent:
                policy.append(dict(zip(parent[4], actions)))
                *_, actions, parent = parent
            return Plan(0.0 - cost, policy[::-1], frozenset(mu), expanded)
        if popped(t, mu, -cost):
            continue
        if budget is not None and expanded >= budget:
            raise BudgetExceeded(expanded, depth, mdp.T, -cost)
        expanded, depth = expanded + 1, max(depth, t)
        if trace is not None:
            trace.append((t, mu, -cost))
        for actions, reward, next_mu in step(t, mu):
            if not pushed(t + 1, next_mu, reward - cost) and (t + 1 < mdp.T or meets(frozenset(next_mu), goal)):
                unmet = not meets(frozenset(next_mu), goal)
                heappush(queue, (cost - reward, unmet, next(order), t + 1, next_mu, actions, item))
    return None


def _stepper(mdp, merge=False):
    """Return step(t, mu): (actions, gamma^t E[r_t], next distribution) of each decision rule on the support of mu.

    With merge=True actions with equal rows of P share a rule: the one with the best reward at the time will do for all.
    """
    rows, kernel = defaultdict(dict), [{} for _ in range(mdp.S)]
    for (s, a, s2), p in zip(np.argwhere(mdp.P).tolist(), mdp.P[mdp.P > 0].tolist()):
        rows[s, a][s2] = p  # positive entries only: supports are taken from here
    for (s, a), row in rows.items():
        kernel[s].setdefault(tuple(row.items()) if merge else a, ([], row))[0].append(a)
    rewards = mdp.gamma ** np.arange(mdp.T)[:, None, None] * mdp.r

    def step(t, mu):
        rules, now = [((), 0.0, {})], rewards[t]
        for s, p in mu.items():
            r = now[s].tolist()
            choices = [(max(same, key=r.__getitem__) if same[1:] else same[0], row) for same, row in kernel[s].values()]
            if len(mu) == 1:  # nothing to mix: the rows of the kernel as they are
                return [((a,), r[a], row) for a, row in choices]
            choices = [((a,), p * r[a], {s2: p * q for s2, q in row.items()}) for a, row in choices]
            rules = [(actions + a, total + reward, {**mix, **{s2: mix.get(s2, 0.0) + q for s2, q in row.items()}})
                     for actions, total, mix in rules for a, reward, row in choices]
        return rules

    return step


def _check_states(mdp, name, states):
    for s in states:
        if not isinstance(s, (int, np.integer)) or not 0 <= s < mdp.S:
            raise ValueError(f"{name} is {s!r}; states are the integers 0..{mdp.S - 1}.")


def _check_goal(mdp, start, goal, mode):
    """Check the arguments of a search; return the goal as a set, and meets(ends, goal) for sets of states."""
    _check_states(mdp, "start", [start])
    if not isinstance(goal, Iterable):
        raise ValueError(f"goal is {goal!r}; it must be an iterable of states.")
    goal = frozenset(goal)
    if not goal:
        raise ValueError("goal is empty; it must contain at least one state.")
    _check_states(mdp, "a state of goal", goal)
    if mode not in ("reach", "cover"):
        raise ValueError(f"mode is {mode!r}; it must be 'reach' or 'cover'.")
    return goal, frozenset.issubset if mode == "reach" else frozenset.issuperset


def _sound_pruning(mdp, meets):
    """See `gds`. The case mu' = mu, where the sum is zero, is caught before a duplicate enters the queue."""
    best = [{} for _ in range(mdp.T + 1)]  # t -> {distribution: best value queued}
    expanded = [defaultdict(list) for _ in range(mdp.T)]  # t -> {support: [(mu, value)]}
    deterministic = np.count_nonzero(mdp.P) == mdp.S * mdp.A  # then a single state has no rivals but duplicates
    worst = np.zeros((mdp.T + 1, mdp.S))  # gamma^t W_t(s)
    for t in reversed(range(0 if deterministic else mdp.T)):
        worst[t] = (mdp.P @ worst[t + 1] - mdp.gamma ** t * mdp.r[t]).max(axis=1)
    worst = worst.tolist()  # indexed in the inner loop, where numpy is slow

    def key(mu):  # sums in another order differ in the last digits
        return tuple(mu) if len(mu) == 1 else frozenset([(s, round(p, 12)) for s, p in mu.items()])

    def pushed(t, mu, value):
        k = key(mu)
        if k in best[t] and value <= best[t][k] + 1e-12:
            return True
        best[t][k] = value
        return False

    def popped(t, mu, value):
        if deterministic or value < best[t][key(mu)]:
            return value < best[t][key(mu)]  # a better duplicate came later
        for support, rivals in expanded[t].items():
            for rival, v in rivals if meets(support, mu) else ():  # then it meets each goal that mu does
                extra = sum([(p - mu.get(s, 0.0)) * worst[t][s] for s, p in rival.items() if p > mu.get(s, 0.0)])
                if value <= v - extra + 1e-12:
                    return True
        expanded[t][frozenset(mu)].append((mu, value))
        return False

    return pushed, popped


def _literal_pruning(mdp, meets):
    """The paper's rule: a table of the best value known for each goal set, whatever the length of the plan behind it.

    An item of length t, goal set G and value v is dropped if a stored (G', v') has G' inside G (cover: around it) and
    v <= v' - r_max gamma^t / (1-gamma)^2, so even by its own entry. A new item raises all stored sets around (inside)
    its own; that the paper spares those popped before makes no difference, as values fall from pop to pop.
    """
    slack, table = -mdp.r.min() * mdp.gamma ** np.arange(mdp.T) / (1 - mdp.gamma) ** 2, {}

    def pushed(t, mu, value):
        goal_set = frozenset(mu)
        table.update({other: value for other, v in table.items() if v < value and meets(goal_set, other)})
        table.setdefault(goal_set, value)
        return False

    def popped(t, mu, value):
        return any(value <= v - slack[t] and meets(goal_set, mu) for goal_set, v in table.items())

    return pushed, popped


PRUNING = {"sound": _sound_pruning, "literal": _literal_pruning, "none": lambda *_: [lambda *_: False] * 2}


def exhaustive(mdp, start, goal, mode="reach", static=False):
    """The same optimum by enumerating all policies of length 1..T; with static=True those with a single rule only."""
    goal, meets = _check_goal(mdp, start, goal, mode)
    step, best, expanded = _stepper(mdp), (-np.inf, None, None), 0
    stack = [(0, {int(start): 1.0}, 0.0, [])]
    while stack:
        t, mu, value, policy = stack.pop()
        if t > 0 and value > best[0] and meets(frozenset(mu), goal):
            best = value, policy, frozenset(mu)
        expanded += t < mdp.T
        for actions, reward, next_mu in step(t, mu) if t < mdp.T else ():
            rule = dict(zip(mu, actions))
            if not static or all(earlier.get(s, a) == a for earlier in policy for s, a in rule.items()):
                stack.append((t + 1, next_mu, value + reward, [*policy, rule]))
    return Plan(*best, expanded) if best[1] else None


def reach_by_induction(mdp, start, goal):
    """The optimal *reaching* plan in O(T^2 S^2 A), without search; None if there is none.

    A plan of length L reaches the goal if and only if none of its actions risks a state from which the goal cannot be
    made sure of by time L. So: backward induction from V_L = 0 on the goal and -infinity elsewhere, for every L, all
    such actions forbidden. Coverage has no such form, because no single state can tell what the others will cover.
    """
    goal, _ = _check_goal(mdp, start, goal, "reach")
    values = np.full((mdp.T, mdp.S), -np.inf)  # row L-1: plans of length L
    values[:, list(goal)] = 0.0
    policy = np.zeros((mdp.T, mdp.T, mdp.S), dtype=np.int16)  # (t, L-1, S)
    for t in reversed(range(mdp.T)):
        lost = np.isinf(values[t:])  # (lengths > t, S)
        q = mdp.r[t] + mdp.gamma * np.tensordot(np.where(lost, 0.0, values[t:]), mdp.P, axes=(1, 2))  # (lengths, S, A)
        q[np.tensordot(lost, mdp.P, axes=(1, 2)) > 0] = -np.inf
        values[t:], policy[t, t:] = q.max(axis=2), q.argmax(axis=2)
    last = values[:, start].argmax()
    if np.isinf(values[last, start]):
        return None
    support, rules = [int(start)], []
    for actions in policy[:last + 1, last]:
        rules.append(dict(zip(support, actions[support].tolist())))
        support = np.flatnonzero(mdp.P[support, actions[support]].any(axis=0)).tolist()
    return Plan(float(values[last, start]), rules, frozenset(support), 0)


GridWorld = namedtuple("GridWorld", "mdp start goal text cells gate_opens patrol")  # cells: of each state, in text


def gridworld(text="S...|...G .#######. ......p.. ######p## ######p##", T=16, gate_opens=7, gamma=0.95):
    """A map as a dynamic MDP: S start, G goal, # wall, | gate, p the patrol's beat (in reading order, to and fro).

    Moves are wait, up, down, left, right; to bump into a wall is to wait. A step costs 1, into the closed gate 8 more,
    onto the patrol 4 more: both live in the rewards, for the kernel does not change with time.
    """
    width = max(map(len, text.split())) + 1
    text = "\n".join(row.ljust(width - 1, "#") for row in text.split())
    states = {k: s for s, k in enumerate([k for k, mark in enumerate(text) if mark not in "#\n"])}
    marked = {mark: [s for k, s in states.items() if text[k] == mark] for mark in "SG|p"}
    next_state = np.array([[states.get(k + move, s) for move in (0, -width, width, -1, 1)] for k, s in states.items()])
    cost = np.ones((T + 1, len(states)))  # of being in a cell at a time
    cost[:gate_opens, marked["|"]] += 8.0
    patrol = ((marked["p"] + marked["p"][-2:0:-1]) * (T + 1))[:T + 1]
    cost[np.arange(len(patrol)), patrol] += 4.0
    mdp = DynamicMDP(np.eye(len(states))[next_state], -cost[1:, next_state], gamma)
    return GridWorld(mdp, marked["S"][0], marked["G"], text, list(states), gate_opens, patrol)


def draw(world, s, t):
    """The map at time t as text, with @ the agent in state s, P the patrol, and / the gate once it is open."""
    canvas = list(world.text.replace("p", ".").replace("|", "/" if t >= world.gate_opens else "|"))
    for state, mark in [*zip(world.patrol[t:t + 1], "P"), (s, "@")]:
        canvas[world.cells[state]] = mark
    return "".join(canvas)


def overrun_example():
    """(mdp, start, goal), T = 3: wait in 0, or leave for 1 -> 2 -> 3; only leaving at t = 0 costs something. The
    literal table keeps the value of leaving later, too late for 3, and so the plan that leaves in time is dropped.
    """
    r = np.zeros((3, 4, 2))
    r[0, 0, 1] = -1.0
    return DynamicMDP(np.eye(4)[[[0, 1], [2, 2], [3, 3], [3, 3]]], r, gamma=0.3), 0, [3]


def random_mdp(rng, kernel, S, A, T, gamma):
    """kernel: "deterministic", "sparse" (a third of all (s, a) have two successors) or "dense" (two or more each)."""
    P, corridor = np.zeros((S, A, S)), rng.random() < 0.5
    for s, a in np.ndindex(S, A):
        near = np.arange(S)[s:s + 3] if corridor else np.arange(S)  # in a corridor plans are longer
        n = {"deterministic": 1, "sparse": 1 + (rng.random() < 1 / 3), "dense": rng.integers(2, S + 1)}[kernel]
        n = min(n, len(near))
        P[s, a, rng.choice(near, n, replace=False)] = rng.dirichlet(np.ones(n)) if rng.random() < 0.5 else 1 / n
    r = -rng.random((T, S, A))  # as it is, tied, mostly zero, or falling in cost, so that it pays to wait:
    r = [r, -rng.integers(0, 3, r.shape), r * (rng.random(r.shape) < 0.3), r * 3.0 ** -np.arange(T)[:, None, None]]
    return DynamicMDP(P, r[rng.integers(4)], gamma)


def random_goal(rng, mdp):
    """Where a random policy from state 0 may end or, one time in five, any states (which may be out of reach)."""
    if rng.random() < 0.2:
        return rng.choice(mdp.S, rng.integers(1, mdp.S + 1), replace=False).tolist()
    return follow(mdp, rng.integers(mdp.A, size=(mdp.T, mdp.S)), 0)[2]


def check(instances=600, seed=0):
    """Compare GDS with enumeration (reach: also induction) on random dynamic MDPs of small size; print a table.

    An answer is right if its value is that of the enumeration, or if both find no plan. The literal rule's errors are
    shown for what they are: goals it missed, plans that are worse, and by how much at most. Returns all other errors.
    """
    sizes = {"deterministic": [(8, 2, 8), (6, 3, 5)], "sparse": [(5, 2, 4), (3, 2, 6)], "dense": [(4, 2, 3), (3, 2, 4)]}
    rng, errors = np.random.default_rng(seed), 0
    row = "{:14}{:6}{:>9}{:>8}{:>11}{:>9}{:>10}{:>7}{:>6}{:>9}{:>9}{:>8}".format
    print(f"{'':29}{'same as enumeration':^28}   {'literal rule':^20}   {'mean expansions':^23}")
    print(row("kernel", "mode", "instances", "sound", "induction", "literal", "missed", "worse", "by", *PRUNING))
    for kernel, mode in product(sizes, ("reach", "cover")):
        values, traces = defaultdict(list), {pruning: [] for pruning in PRUNING}
        for i in range(instances):
            mdp = random_mdp(rng, kernel, *sizes[kernel][i % 2], gamma=rng.choice([0.0, 0.3, 0.5, 0.9, 0.99]))
            goal = random_goal(rng, mdp)
            plans = {name: gds(mdp, 0, goal, mode, name, trace=trace) for name, trace in traces.items()}
            plans["truth"] = exhaustive(mdp, 0, goal, mode)
            if mode == "reach":
                plans["induction"] = reach_by_induction(mdp, 0, goal)
            for name, plan in plans.items():
                values[name].append(plan.value if plan else np.nan)
        truth, literal = np.array(values.pop("truth")), np.array(values["literal"])
        right = {name: np.isclose(v, truth, rtol=0, atol=1e-9, equal_nan=True).sum() for name, v in values.items()}
        errors += sum(instances - n for name, n in right.items() if name != "literal")
        missed, worst = np.isnan(literal[~np.isnan(truth)]).sum(), np.nanmax([0.0, *(truth - literal)])
        print(row(kernel, mode, instances, right["sound"], right.get("induction", "-"), right["literal"], missed,
                  instances - right["literal"] - missed, f"{worst:.2f}",
                  *[f"{len(trace) / instances:.1f}" for trace in traces.values()]))
    return errors


def scaling(problems=10):
    """Print mean expansions and seconds on random problems whose goal cannot be met: what is not pruned is searched."""
    sizes = {"deterministic": [(100, 2, 50), (400, 2, 50), (100, 8, 50), (100, 2, 200)],
             "sparse": [(5, 2, 6), (9, 2, 6), (5, 3, 6), (5, 2, 9)]}
    print(f"{'kernel':14}{'mode':6}{'|S|':>5}{'|A|':>5}{'T':>5}{'expansions':>12}{'seconds':>9}")
    for kernel, mode in product(sizes, ("reach", "cover")):
        for S, A, T in sizes[kernel]:
            trace, seconds = [], 0.0
            for seed in range(problems):
                mdp = random_mdp(np.random.default_rng(seed), kernel, S, A, T, gamma=0.9)
                mdp.P[:, :, 0] += mdp.P[:, :, -1]  # whoever would enter the goal, the last state, starts again
                mdp.P[:, :, -1] = 0.0
                began = time.perf_counter()
                gds(mdp, 0, [S - 1], mode, trace=trace)
                seconds += time.perf_counter() - began
            print(f"{kernel:14}{mode:6}{S:5}{A:5}{T:5}{len(trace) / problems:12.0f}{seconds / problems:9.3f}")


def main():
    parser = argparse.ArgumentParser(description="Optimality check of General Dijkstra Search, and two examples.")
    parser.error = lambda message: sys.exit(f"gds.py: {message}; see --help.")
    parser.add_argument("--instances", type=int, default=600, help="random dynamic MDPs per row of the check's table")
    parser.add_argument("--scaling", action="store_true", help="print expansions and seconds against size instead")
    args = parser.parse_args()
    if args.instances < 1:
        parser.error(f"--instances is {args.instances}, it must be at least 1")
    if args.scaling:
        return scaling()
    errors = check(args.instances)
    plans = {pruning: gds(*overrun_example(), pruning=pruning) for pruning in ("sound", "literal")}
    print("\nA goal that the literal rule misses:", {name: plan and plan.value for name, plan in plans.items()})
    world = gridworld()
    plan, static = gds(*world[:3]), exhaustive(*world[:3], static=True)
    print(f"\nA gate that opens at t={world.gate_opens}: the best static policy earns {static.value:.2f}, "
          f"the best plan {plan.value:.2f} in {plan.length} steps:")
    states = [s for rule in plan.policy for s in rule] + [*plan.goal_set]  # one per step: the kernel is deterministic
    for t, s in list(enumerate(states))[3::4]:
        print(f"\nt = {t}\n{draw(world, s, t)}")
    if errors:
        raise SystemExit(f"{errors} answers differ from the enumeration's.")


if __name__ == "__main__":
    main()
