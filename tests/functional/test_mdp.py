"""The token MDP of "From r to Q*": its equations on a tree small enough to enumerate, and its invariants on any batch.

The tree: 3 symbols, 4 steps, 40 states, 81 sequences. Rewards and reference policy are random; `qkernels.tabular`
solves the soft Bellman backup in float64, and the resulting Q* is handed to qkernels as if it were a trained model's
logits. Equation numbers are the paper's.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assertions import assert_within
from cases import IGNORE, generator, make_pairs, make_rows, pack
from mutations import SLIGHTLY, expect_failure, perturb_field
from qkernels import fused_token_dpo, token_logps, token_mdp, token_stats
from qkernels.functional import mdp as functional_mdp
from qkernels.tabular import TabularMDP, random_mdp, solve_mdp

SYMBOLS, STEPS = 3, 4
LABELS = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=STEPS)))


class Tree:
    """A solved MDP looked up along all 81 sequences."""

    def __init__(self, mdp: TabularMDP):
        self.mdp, self.beta = mdp, mdp.beta

    def rows(self, tables) -> Tensor:
        """`[81, 4, 3]`: the vector of each state along each sequence."""
        return self.mdp.rows(tables, LABELS)

    def along(self, tables) -> Tensor:
        """`[81, 4]`: the entry of the action taken."""
        return self.mdp.along(tables, LABELS)

    def value_of(self, shift: int) -> Tensor:
        """`[81, 4]`: V of the state before (0) or after (1) each action; 0 after the end."""
        before = self.along(self.mdp.V)
        return before if shift == 0 else torch.nn.functional.pad(before[:, 1:], (0, 1))

    @property
    def q(self):
        return self.mdp.Q

    @property
    def v0(self) -> float:
        return self.mdp.V[0].item()


def random_tree(seed: int, beta: float) -> Tree:
    return Tree(random_mdp(SYMBOLS, STEPS, beta, generator(seed)))


BETAS = (0.5, 1.0)


def unit(dtype: torch.dtype) -> float:
    """Error of a reward of order 1 to 10 in this dtype: rounding of Q*/beta as logits, then of the log-probs."""
    return 1e-11 if dtype == torch.float64 else 4e-6


def mdp_of(tree: Tree, backend, dtype):
    logits = tree.rows(tree.q) / tree.beta
    return token_mdp(
        logits.to(backend.device, dtype), LABELS.to(backend.device),
        reference_logits=tree.rows(tree.mdp.reference_logps).to(backend.device, dtype), beta=tree.beta,
        backend=backend.name,
    )  # fmt: skip


EXACT = (torch.float32, torch.float64)


@pytest.mark.quick
@pytest.mark.dtypes(*EXACT)
@pytest.mark.parametrize("beta", BETAS)
def test_logits_are_q_values(backend, dtype, beta):
    """(5), (6): Q, V and A come back from Q*/beta as logits; pi* is the optimal policy."""
    tree = random_tree(1, beta)
    mdp = mdp_of(tree, backend, dtype)
    scale = 1 + tree.rows(tree.q).abs().amax()
    assert_within(mdp.Q, tree.along(tree.q), unit(dtype) * scale, "Q")
    assert_within(mdp.V, tree.value_of(0), unit(dtype) * scale, "V")
    advantage = tree.along(tree.q) - tree.value_of(0)
    assert_within(mdp.A, advantage, unit(dtype) * scale, "A")
    assert bool((mdp.A <= 0).all())


@pytest.mark.quick
@pytest.mark.dtypes(*EXACT)
@pytest.mark.parametrize("beta", BETAS)
def test_bellman_rewards_recover_the_rewards(backend, dtype, beta):
    """(7): r = Q - beta log pi_ref - V', exactly the rewards the tree was made with."""
    for seed in range(5):
        tree = random_tree(seed, beta)
        rewards = tree.along(tree.mdp.rewards)
        assert_within(mdp_of(tree, backend, dtype).bellman_rewards, rewards, 10 * unit(dtype), "Bellman rewards")


def test_forbidden_actions_and_states_out_of_range():
    """An action that the reference forbids has no reward, as in the engine; a token outside is no other state's."""
    forbidding = torch.tensor([[0.0, -torch.inf]])
    mdp = solve_mdp([torch.zeros(1, 2), torch.zeros(2, 2)], [forbidding, torch.full((2, 2), 0.5).log()], 0.5)
    assert mdp.implicit_rewards[0].tolist() == [[0.0, 0.0]]
    assert mdp.value_after(torch.tensor([[0]])).shape == (1,) and mdp.value_after(torch.zeros(3, 0).long()).shape == (
        3,
    )
    for tokens in (torch.tensor([[7]]), torch.tensor([[0, 2]]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match=r"tokens must lie in \[0, 2\)"):
            mdp.value_after(tokens)


@pytest.mark.dtypes(*EXACT)
@pytest.mark.parametrize("beta", BETAS)
def test_implicit_rewards_are_rewards_shaped_by_the_value(backend, dtype, beta):
    """(10): beta log(pi/pi_ref) = r + V' - V, and over a sequence the difference is V(s_0)."""
    tree = random_tree(2, beta)
    mdp = mdp_of(tree, backend, dtype)
    shaped = tree.along(tree.mdp.rewards) + tree.value_of(1) - tree.value_of(0)
    assert_within(mdp.implicit_rewards, shaped, 10 * unit(dtype), "implicit rewards")
    gap = (mdp.bellman_rewards - mdp.implicit_rewards).double().sum(1)
    assert_within(gap, torch.full((81,), tree.v0, dtype=torch.float64), 40 * unit(dtype), "V(s_0)")


@pytest.mark.dtypes(*EXACT)
def test_sequence_preferences_follow_the_rewards(backend, dtype):
    """(8): sigma(difference of implicit returns) is Bradley-Terry on the true returns, for all 81 x 81 pairs."""
    tree = random_tree(3, 0.5)
    mdp = mdp_of(tree, backend, dtype)
    implicit, true = mdp.implicit_rewards.double().sum(1).cpu(), tree.along(tree.mdp.rewards).sum(1)
    preference = torch.sigmoid(implicit[:, None] - implicit[None])
    assert_within(preference, torch.sigmoid(true[:, None] - true[None]), 40 * unit(dtype), "p(tau_w > tau_l)")


@pytest.mark.dtypes(*EXACT)
def test_the_loss_is_the_negative_log_likelihood_of_the_preferences(backend, dtype):
    """(9): on data whose policy is optimal, the loss is the cross-entropy of the true returns."""
    tree = random_tree(4, 0.5)
    true = tree.along(tree.mdp.rewards).sum(1)
    order = torch.randperm(81, generator=generator(9))[:80]
    logits = (tree.rows(tree.q) / tree.beta)[order].to(backend.device, dtype)
    reference = tree.rows(tree.mdp.reference_logps)[order].to(backend.device, dtype)
    out = fused_token_dpo(
        logits, LABELS[order].to(backend.device), reference_logits=reference, beta=tree.beta, reduction="none",
        backend=backend.name,
    )  # fmt: skip
    chosen, rejected = true[order].chunk(2)
    expected = torch.log1p(torch.exp(-(chosen - rejected)))
    assert_within(out.loss, expected, 40 * unit(dtype), "negative log-likelihood")
    v0 = tree.v0
    assert_within(out.chosen_rewards, chosen - v0, 40 * unit(dtype), "chosen rewards")
    assert_within(out.rejected_rewards, rejected - v0, 40 * unit(dtype), "rejected rewards")


@pytest.mark.dtypes(*EXACT)
def test_every_reward_of_a_shaping_class_has_the_same_representative(backend, dtype):
    """Theorem 1, (11): rewards that differ by a potential have one optimal policy, hence one implicit reward."""
    tree = random_tree(5, 0.7)
    g = generator(77)
    mdp = tree.mdp
    potential = [torch.randn(SYMBOLS**t, generator=g, dtype=torch.float64) for t in range(STEPS)]
    potential[0].zero_()
    after = [*(p.view(-1, SYMBOLS) for p in potential[1:]), torch.zeros(SYMBOLS ** (STEPS - 1), SYMBOLS)]
    reward = [r + a - p[:, None] for r, a, p in zip(mdp.rewards, after, potential, strict=True)]
    shaped = Tree(solve_mdp(reward, mdp.reference_logps, mdp.beta))
    moved = max((a - b).abs().max() for a, b in zip(shaped.q, tree.q, strict=True))
    assert moved > 0.5, "another Q, but the same policy"
    implicit = mdp_of(tree, backend, dtype).implicit_rewards
    again = mdp_of(shaped, backend, dtype)
    assert_within(again.implicit_rewards, implicit.double(), 20 * unit(dtype), "implicit rewards")
    # (11): the representative, taken as a reward itself, has V = 0 everywhere and the same policy.
    representative = mdp.implicit_rewards
    own = Tree(solve_mdp(representative, mdp.reference_logps, mdp.beta))
    assert max(v.abs().max() for v in own.mdp.V) < 1e-12
    fixed = mdp_of(own, backend, dtype)
    assert_within(fixed.bellman_rewards, fixed.implicit_rewards.double(), 20 * unit(dtype), "fixed point")
    assert_within(fixed.implicit_rewards, tree.along(representative), 20 * unit(dtype), "representative")
    assert_within(implicit, tree.along(representative), 20 * unit(dtype), "implicit rewards")


@pytest.mark.dtypes(*EXACT)
def test_the_optimal_policy_tilts_the_reference_by_the_return(backend, dtype):
    """What KL-regularised return maximisation means on whole sequences: pi*(tau) ~ pi_ref(tau) exp(R(tau)/beta)."""
    tree = random_tree(6, 0.5)
    logits = (tree.rows(tree.q) / tree.beta).to(backend.device, dtype)
    log_pi = token_logps(logits, LABELS.to(backend.device), backend=backend.name).double().sum(1)
    tilted = (
        tree.along(tree.mdp.reference_logps).sum(1) + tree.along(tree.mdp.rewards).sum(1) / tree.beta
    ).log_softmax(0)
    assert_within(log_pi, tilted, 20 * unit(dtype), "log pi*(tau)")


def beam_search(tree: Tree, backend, width: int, steps: int) -> list[list[int]]:
    """Likelihood beam search on the policy: log pi of qkernels as score, no length penalty. Best first."""
    beams, scores = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    for t in range(steps):
        grown = torch.cat([beams.repeat_interleave(SYMBOLS, 0), torch.arange(SYMBOLS).repeat(len(beams))[:, None]], 1)
        logits = tree.mdp.rows(tree.mdp.logits, grown)[:, t].to(backend.device, torch.float32)
        logps = token_logps(logits, grown[:, t].to(backend.device), backend=backend.name)
        scores, best = (scores.repeat_interleave(SYMBOLS) + logps.double().cpu()).sort(descending=True)
        beams, scores = grown[best[:width]], scores[:width]
    return beams.tolist()


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_beam_as_wide_as_the_tree_finds_the_best_plan(backend, steps):
    """(12) -> (13): the sequence that maximises reward, reference and value is the likeliest under pi*."""
    greedy_misses = 0
    for seed in range(20):
        tree = random_tree(100 + seed, 0.8)
        sequences = tree.mdp.sequences(steps)
        values, order = tree.mdp.plan_values(sequences).sort(descending=True)
        plans = sequences[order].tolist()
        beam = beam_search(tree, backend, SYMBOLS**steps, steps)
        assert beam[:3] == plans[:3], "the whole order agrees, not only its head"
        score = tree.beta * tree.mdp.along(tree.mdp.logps, sequences[order[:1]]).sum()
        assert (values[0] - tree.v0).item() == pytest.approx(score.item(), abs=1e-9)  # (13)
        greedy_misses += beam_search(tree, backend, 1, steps)[0] != plans[0]
    assert greedy_misses > 0 or steps == 1, "a greedy search should miss some plans, or the test shows nothing"


def test_the_solver_against_enumeration():
    """V*(s) and pi*(tau) out of all continuations, without a backup: V* = beta log E_ref[exp(return / beta)]."""
    mdp = random_mdp(SYMBOLS, STEPS, 0.6, generator(8))
    returns = mdp.along(mdp.rewards, LABELS)
    log_ref = mdp.along(mdp.reference_logps, LABELS)
    for t in range(STEPS):
        tail = (log_ref[:, t:].sum(1) + returns[:, t:].sum(1) / mdp.beta).view(SYMBOLS**t, -1)
        assert_within(mdp.V[t], mdp.beta * tail.logsumexp(1), 1e-12, f"V at depth {t}")
    weight = (log_ref.sum(1) + returns.sum(1) / mdp.beta).log_softmax(0)
    assert_within(mdp.along(mdp.logps, LABELS).sum(1), weight, 1e-12, "log pi*(tau)")


def test_forbidden_actions_and_wrong_tables():
    """An action that the reference forbids stays forbidden; tables of a wrong shape, type or value are refused."""
    rewards = [torch.zeros(1, 2), torch.ones(2, 2)]
    reference = [torch.tensor([[0.0, -torch.inf]]), torch.zeros(2, 2)]
    mdp = solve_mdp(rewards, reference, 1.0)
    assert mdp.logps[0].tolist() == [[0.0, -torch.inf]] and mdp.V[0].item() == pytest.approx(1.0)
    assert mdp.states(torch.tensor([[1, 0]])).tolist() == [[0, 1]]
    for bad, message in (
        (([], [], 1.0), "one table for each depth"),
        ((rewards, reference[:1], 1.0), "one table for each depth"),
        ((rewards, reference, 0.0), "beta must be finite"),
        (([rewards[0], torch.ones(3, 2)], reference, 1.0), r"rewards\[1\] must have shape"),
        (([rewards[0] / 0, rewards[1]], reference, 1.0), "rewards must be finite"),
        ((rewards, [torch.full((1, 2), -torch.inf), reference[1]], 1.0), "needs a finite entry"),
        (([torch.zeros(1, 3)] * 20, [torch.zeros(1, 3)] * 20, 1.0), "states"),
    ):
        with pytest.raises(ValueError, match=message):
            solve_mdp(*bad)
    with pytest.raises(TypeError, match="floating point"):
        solve_mdp([torch.zeros(1, 2, dtype=torch.int64)], reference[:1], 1.0)
    with pytest.raises(ValueError, match="lie in"):
        mdp.along(mdp.Q, torch.tensor([[2, 0]]))
    with pytest.raises(ValueError, match="length must"):
        mdp.sequences(3)


# --- invariants on any batch -----------------------------------------------------------------------------------------


def mdp_inputs(batch, backend):
    return {"reference_logits": batch.reference, "cu_seqlens": batch.cu_seqlens, "backend": backend.name}


@pytest.mark.parametrize("packed", [False, True])
def test_bellman_and_implicit_returns_differ_by_the_first_value(backend, dtype, packed):
    batch = make_pairs(3, 9, 50, dtype, backend.device)
    dense_valid = batch.labels != IGNORE
    batch = pack(batch) if packed else batch
    beta = 0.2
    mdp = token_mdp(batch.logits, batch.labels, beta=beta, **mdp_inputs(batch, backend))
    gap = (mdp.bellman_rewards - mdp.implicit_rewards).double().cpu().view(6, 9).sum(1)
    value = beta * (batch.logits.double().logsumexp(-1)).cpu().view(6, 9)
    first = dense_valid.cpu().double().argmax(1)
    expected = value[torch.arange(6), first]
    assert_within(gap, expected, (1e-12 if dtype == torch.float64 else 1e-5), "V(s_0)")
    for name, values in mdp._asdict().items():
        assert values.shape == batch.labels.shape
        assert bool((values[batch.labels == IGNORE] == 0).all()), f"{name} at ignored rows"


def test_packed_and_dense_agree(backend, dtype):
    """Rows of 48 elements have the same alignment modulo 16 bytes wherever they stand, as equal bits on a GPU need."""
    batch = make_pairs(3, 9, 48, dtype, backend.device)
    dense = token_mdp(batch.logits, batch.labels, **mdp_inputs(batch, backend))
    for keep_ignored in (True, False):
        packed = pack(batch, keep_ignored=keep_ignored)
        keep = batch.labels == batch.labels if keep_ignored else batch.labels != IGNORE
        flat = token_mdp(packed.logits, packed.labels, **mdp_inputs(packed, backend))
        for name in dense._fields:
            assert torch.equal(getattr(flat, name), getattr(dense, name)[keep]), name


def test_more_leading_dimensions_and_one_sequence(backend):
    batch = make_rows((2, 3, 5), 11, torch.float32, backend.device)
    whole = token_mdp(batch.logits, batch.labels, reference_logits=batch.reference, backend=backend.name)
    for i, j in itertools.product(range(2), range(3)):
        one = token_mdp(
            batch.logits[i, j], batch.labels[i, j], reference_logits=batch.reference[i, j], backend=backend.name
        )
        for name in whole._fields:
            assert_within(getattr(one, name), getattr(whole, name)[i, j], 1e-6, name)


@given(seed=st.integers(0, 500), beta=st.sampled_from([0.05, 0.3, 1.0]))
def test_expectations_of_the_implicit_reward(backend, seed, beta):
    """(16) at each position, with every action taken once: E_ref = -beta KL(ref||pi), E_pi = beta KL(pi||ref),
    E_ref[exp(implicit/beta)] = 1 and E_pi[exp(-implicit/beta)] = 1."""
    vocab = 23
    rows = make_rows((1,), vocab, torch.float32, backend.device, key=(seed,), scale=1.0)
    every = rows.logits.expand(vocab, vocab).contiguous()
    every_ref = rows.reference.expand(vocab, vocab).contiguous()
    actions = torch.arange(vocab, device=backend.device)
    implicit = token_mdp(
        every, actions, reference_logits=every_ref, beta=beta, backend=backend.name
    ).implicit_rewards.double().cpu()  # fmt: skip
    p = rows.logits.cpu().double()[0].softmax(-1)
    q = rows.reference.cpu().double()[0].softmax(-1)
    stats = token_stats(
        every[:1], actions[:1], reference_logits=every_ref[:1], backend=backend.name,
        outputs=("kl_reference_policy", "kl_policy_reference"),
    )  # fmt: skip
    assert_within((q * implicit).sum(), -beta * stats.kl_reference_policy[0].double().cpu(), 1e-5 * beta, "E_ref")
    assert_within((p * implicit).sum(), beta * stats.kl_policy_reference[0].double().cpu(), 1e-5 * beta, "E_pi")
    one = torch.ones((), dtype=torch.float64)
    assert_within((q * torch.exp(implicit / beta)).sum(), one, 1e-5, "E_ref exp")
    assert_within((p * torch.exp(-implicit / beta)).sum(), one, 1e-5, "E_pi exp")


@given(seed=st.integers(0, 500))
@pytest.mark.dtypes(torch.float32)
def test_a_constant_added_to_a_row_shapes_the_bellman_rewards(backend, dtype, seed):
    """Implicit rewards stay; the Bellman reward gains beta c_t - beta c_{t+1}: shaping by the potential."""
    beta = 0.25
    rows = make_rows((2, 5), 13, dtype, "cpu", key=(seed,))
    labels = torch.randint(0, 13, (2, 5), generator=generator(seed))
    constants = torch.randn(2, 5, generator=generator(seed, 1)).mul(64).round() / 4
    exact = (rows.logits * 256).round() / 256  # constants can be added without rounding
    how = {"reference_logits": rows.reference.to(backend.device), "beta": beta, "backend": backend.name}
    before, after = (
        token_mdp(x.to(backend.device), labels.to(backend.device), **how) for x in (exact, exact + constants[..., None])
    )
    assert_within(after.implicit_rewards, before.implicit_rewards.double(), 1e-6, "implicit rewards")
    c = constants.double()
    shaped = before.bellman_rewards.double().cpu() + beta * (c - torch.nn.functional.pad(c[:, 1:], (0, 1)))
    assert_within(after.bellman_rewards, shaped, 1e-5, "Bellman rewards")
    assert_within(after.Q, before.Q.double().cpu() + beta * c, 1e-5, "Q")


def test_rewards_of_the_reference_itself_are_zero(backend, dtype):
    batch = make_rows((2, 5), 300, dtype, backend.device)
    mdp = token_mdp(batch.logits, batch.labels, reference_logits=batch.logits.clone(), backend=backend.name)
    assert bool((mdp.implicit_rewards == 0).all())


def test_cached_reference_and_reference_free(backend, dtype):
    batch = make_rows((2, 5), 30, dtype, backend.device)
    cached = token_logps(batch.reference, batch.labels, backend=backend.name)
    live = token_mdp(batch.logits, batch.labels, reference_logits=batch.reference, beta=0.3, backend=backend.name)
    again = token_mdp(batch.logits, batch.labels, reference_logps=cached, beta=0.3, backend=backend.name)
    for name in live._fields:
        assert_within(getattr(again, name), getattr(live, name).double(), 4e-6, name)
    free = token_mdp(batch.logits, batch.labels, reference_logps=0.0, beta=0.3, backend=backend.name)
    assert torch.equal(free.implicit_rewards, free.A)


def test_no_gradient_and_no_graph(backend):
    batch = make_rows((2, 5), 30, torch.float32, backend.device)
    leaf = batch.logits.clone().requires_grad_()
    mdp = token_mdp(leaf, batch.labels, reference_logps=0.0, backend=backend.name)
    assert not any(values.requires_grad for values in mdp)


def test_token_rewards_of_the_loss_are_the_implicit_rewards(backend, dtype):
    """(11): what fused_token_dpo returns per token, and its sums per sequence."""
    batch = make_pairs(2, 6, 30, dtype, backend.device)
    out = fused_token_dpo(batch.logits, batch.labels, reference_logits=batch.reference, beta=0.3, backend=backend.name)
    mdp = token_mdp(batch.logits, batch.labels, reference_logits=batch.reference, beta=0.3, backend=backend.name)
    assert torch.equal(out.token_rewards, mdp.implicit_rewards)
    sums = mdp.implicit_rewards.double().sum(1).cpu()
    assert_within(torch.cat([out.chosen_rewards, out.rejected_rewards]), sums, 1e-5, "sequence rewards")
    assert_within(0.3 * out.logsumexp, mdp.V.double(), 1e-6 * (1 + mdp.V.double().abs().cpu()), "V")


# --- the check of these checks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, check",
    [("Q", test_logits_are_q_values), ("V", test_logits_are_q_values),
     ("A", test_logits_are_q_values),
     ("bellman_rewards", test_bellman_rewards_recover_the_rewards),
     ("implicit_rewards", test_implicit_rewards_are_rewards_shaped_by_the_value)],
)  # fmt: skip
@pytest.mark.dtypes(torch.float32)
def test_the_mdp_is_checked(backend, dtype, field, check, monkeypatch):
    real = functional_mdp.token_mdp_from_logps

    def wrong(*args, **options):
        result = real(*args, **options)
        return result._replace(**{field: getattr(result, field) * SLIGHTLY})

    expect_failure(
        lambda: check(backend, dtype, 0.5), lambda: monkeypatch.setattr(functional_mdp, "token_mdp_from_logps", wrong)
    )


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize(
    "check",
    [test_sequence_preferences_follow_the_rewards,
     test_the_loss_is_the_negative_log_likelihood_of_the_preferences,
     test_every_reward_of_a_shaping_class_has_the_same_representative,
     test_the_optimal_policy_tilts_the_reference_by_the_return],
    ids=["(8)", "(9)", "(11)", "tilt"],
)  # fmt: skip
def test_the_theorems_are_checked(backend, dtype, check, monkeypatch):
    """A log-prob off by 1 % breaks each of the paper's statements."""
    expect_failure(lambda: check(backend, dtype), perturb_field(monkeypatch, backend, "logps"))


def test_beam_search_is_checked(backend, monkeypatch):
    """Scores of the wrong sign find the worst plan."""
    expect_failure(
        lambda: test_a_beam_as_wide_as_the_tree_finds_the_best_plan(backend, 3),
        perturb_field(monkeypatch, backend, "logps", -1.0),
    )
