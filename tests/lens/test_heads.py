"""Heads of known sorts: planted ones are named and no others; scores against transformer_lens and loops in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor
from transformer_lens import head_detector

import mechinterp as mi
from mechinterp.core.resampling import sign_test
from mechinterp.errors import SelectorError, TaskError
from mechinterp.lens.looking import said_twice
from tests.core.conftest import ARCHITECTURES, HEADS, Plain, module_of

# Few different tokens, so that much is repeated, at places that differ from prompt to prompt.
TOKENS = torch.randint(1, 9, (5, 10), generator=torch.Generator().manual_seed(3))


# -- planted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toy", "labels"),
    [
        (
            "induction",
            {
                "a0.h3": "previous token",
                "a1.h5": "induction",
                # The decoys that look like one of them, or at duplicates; they say nothing.
                "a0.h6": "previous token",
                "a1.h2": "prefix matching",
                "a0.h0": "duplicate token",
            },
        ),
        ("gqa_induction", {"a0.h2": "previous token", "a1.h1": "induction", "a1.h0": "prefix matching"}),
        ("copy", {"a1.h2": "copying", "a0.h1": "copy suppression"}),
        ("memory", {}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_heads_are_named_and_no_others(toy: str, labels: dict[str, str], seed: int) -> None:
    scores = mi.head_scores(mi.toys.build(toy).model, seed=seed)
    assert scores.labels() == labels
    # Nor are they close to the line.
    assert scores.labels(least=0.1) == labels


def test_the_name_mover_of_a_task() -> None:
    toy = mi.toys.copy()
    scores = mi.head_scores(toy.model, toy.task)
    assert scores.labels() == {"a1.h2": "name mover", "a0.h1": "copy suppression"}
    assert float(scores["name_mover"].values[1, 2]) > 0.8
    # The look-alikes attend there as well, and move nothing that is said.
    assert float(scores["name_mover"].values[0, 2]) == float(scores["name_mover"].values[1, 1]) == 0.0


def test_labels_flow_into_diagrams() -> None:
    toy = mi.toys.induction()
    labels = mi.head_scores(toy.model, seed=0).labels()
    drawn = mi.draw(toy.truth["resample"], labels=labels).svg
    assert "induction" in drawn and "previous token" in drawn and "duplicate token" not in drawn


def test_a_head_at_a_fixed_distance() -> None:
    """The previous-token head of the toy, its keys moved by one more position."""
    toy = mi.toys.induction()
    with torch.no_grad():
        weight = toy.model.hf.transformer.h[0].attn.c_attn.original_component.weight
        d_model, columns = toy.model.cfg.d_model, slice(3 * 28, 4 * 28)
        key = weight[:, d_model:][:, columns].clone()
        weight[:, d_model:][:, columns] = key.roll(1, dims=1)
    scores = mi.head_scores(toy.model, seed=0)
    assert scores.labels()["a0.h3"] == "2 tokens back"
    assert int(scores.distance[0, 3]) == 2


# -- oracles ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: pytest.FixtureRequest) -> tuple[mi.Model, Plain]:
    module = module_of(request.param)
    plain = Plain(request.param, copy.deepcopy(module))
    return mi.load(module, name=f"tiny-{request.param}"), plain


def test_attention_scores_are_those_of_transformer_lens(both: tuple[mi.Model, Plain]) -> None:
    model, plain = both
    scores = mi.head_scores(model, TOKENS)
    makers = {
        "duplicate_token": head_detector.get_duplicate_token_head_detection_pattern,
        "prefix_matching": head_detector.get_induction_head_detection_pattern,
    }
    for layer in range(2):
        pattern = plain.values(TOKENS, layer)["pattern"]
        for name, make in makers.items():
            for row in range(len(TOKENS)):
                wanted = make(TOKENS[row : row + 1])
                # Theirs is the share of all rows' attention, ours the mean over the rows that have a target.
                rows = int(wanted.any(dim=1).sum())
                for head in range(HEADS):
                    theirs = head_detector.compute_head_attention_similarity_score(
                        pattern[row, head], wanted, exclude_bos=False, exclude_current_token=False, error_measure="mul"
                    )
                    ours = float(scores[name].per_example[layer, head, row])
                    assert ours * rows / TOKENS.shape[1] == pytest.approx(theirs, abs=1e-5)


def test_places_are_counted_by_hand(both: tuple[mi.Model, Plain]) -> None:
    model, plain = both
    scores = mi.head_scores(model, TOKENS)
    for layer in range(2):
        pattern = plain.values(TOKENS, layer)["pattern"]
        for row, head in [(0, 0), (3, 2), (4, 3)]:
            seen = pattern[row, head]
            at = {d: sum(float(seen[q, q - d]) for q in range(d + 1, 10)) / (9 - d) for d in range(6)}
            keys = [sum(float(seen[q, k]) for q in range(5, 10)) / 5 for k in range(5)]
            best = int(scores.distance[layer, head])
            expected = {
                "previous_token": (at[1], max(value for d, value in at.items() if d != 1)),
                "positional": (at[best], max(value for d, value in at.items() if d != best)),
                "bos_sink": (keys[0], max(keys[1:])),
            }
            for name, (score, null) in expected.items():
                assert float(scores[name].per_example[layer, head, row]) == pytest.approx(score, abs=1e-5)
                assert float(scores.nulls[name].per_example[layer, head, row]) == pytest.approx(null, abs=1e-5)


def copied(plain: Plain, layer: int, tokens: Tensor) -> Tensor:
    """``[batch head k_pos]`` token by token: how many others a head's writing raises less than the token itself, minus more."""
    values, module = plain.values(tokens, layer), plain.module
    norm, words = plain.roots.norm, module.get_output_embeddings().weight.detach()
    gain = norm.weight.detach() + (1 if plain.architecture == "gemma2" else 0)
    found = torch.zeros(len(tokens), HEADS, tokens.shape[1])
    for row in range(len(tokens)):
        for head in range(HEADS):
            for k in range(1, tokens.shape[1]):
                value = values["v"][row, k, head * values["v"].shape[2] // HEADS]
                out = value @ plain.output_weight(layer)[head]
                if plain.architecture == "gemma2":
                    out = out * (1 + plain.parts(layer).attn_end.weight.detach())
                if plain.architecture in ("gpt2", "neox"):
                    out = out - out.mean()
                logits = words @ (out * gain)
                ids = tokens[row].tolist()
                others = [t for i, t in enumerate(ids) if i > 0 and t != ids[k]]
                wins = sum(1 if logits[ids[k]] > logits[t] else -1 for t in others)
                found[row, head, k] = wins / len(others)
    return found


def test_copying_by_hand(both: tuple[mi.Model, Plain]) -> None:
    model, plain = both
    scores = mi.head_scores(model, TOKENS)
    for layer in range(2):
        verdict, pattern = copied(plain, layer, TOKENS), plain.values(TOKENS, layer)["pattern"]
        moved = torch.einsum("bhqk,bhk->bhq", pattern, verdict)[..., 1:].mean(-1)
        assert torch.allclose(scores["copying"].per_example[layer], moved.T, atol=1e-5)
        assert torch.allclose(scores["copy_suppression"].per_example[layer], -moved.T, atol=1e-5)
        wanted = torch.stack([head_detector.get_induction_head_detection_pattern(row[None]) for row in TOKENS])
        found = torch.einsum("bhqk,bhk,bqk->bh", pattern, verdict, wanted) / wanted.any(2).sum(1)[:, None]
        assert torch.allclose(scores["induction"].per_example[layer], found.T, atol=1e-5)


def test_movers_by_hand(both: tuple[mi.Model, Plain]) -> None:
    model, plain = both
    right, wrong = TOKENS[:, 4], torch.full((5,), 40)
    task = mi.Task(name="t", clean=TOKENS, corrupt=TOKENS, right=right, wrong=wrong, answer_pos=[9, 8, 9, 7, 9])
    scores = mi.head_scores(model, task)
    for layer in range(2):
        verdict, pattern = copied(plain, layer, TOKENS), plain.values(TOKENS, layer)["pattern"]
        for row in range(5):
            for head in range(HEADS):
                by_token: dict[int, float] = {}
                for k in range(1, 10):
                    by_token.setdefault(int(TOKENS[row, k]), 0.0)
                for k in range(10):
                    moved = float(pattern[row, head, task.answer_pos[row], k] * verdict[row, head, k])
                    if int(TOKENS[row, k]) in by_token:
                        by_token[int(TOKENS[row, k])] += moved
                score = by_token.pop(int(right[row]))
                null = max(0.0, *by_token.values())
                assert float(scores["name_mover"].per_example[layer, head, row]) == pytest.approx(score, abs=1e-5)
                assert float(scores.nulls["name_mover"].per_example[layer, head, row]) == pytest.approx(null, abs=1e-5)


def test_the_null_of_a_text_is_what_other_prompts_get_at_its_places(both: tuple[mi.Model, Plain]) -> None:
    model, plain = both
    null = mi.head_scores(model, TOKENS).nulls["prefix_matching"].per_example
    pattern = plain.values(TOKENS, 1)["pattern"]
    for row in range(5):
        wanted = head_detector.get_induction_head_detection_pattern(TOKENS[row : row + 1])
        others = pattern[torch.arange(5) != row].mean(0)
        expected = (others * wanted).sum((1, 2)) / wanted.any(1).sum()
        assert torch.allclose(null[1, :, row], expected, atol=1e-5)


def test_what_suppresses_elsewhere_does_not_make_an_induction_head(both: tuple[mi.Model, Plain]) -> None:
    model, plain = both
    null = mi.head_scores(model, TOKENS).nulls["induction"].per_example[1]
    moved = plain.values(TOKENS, 1)["pattern"] * copied(plain, 1, TOKENS)[:, :, None]
    wanted = torch.stack([head_detector.get_induction_head_detection_pattern(row[None]) for row in TOKENS])
    others = (moved.sum(0) - moved) / 4
    elsewhere = torch.einsum("bhqk,bqk->bh", others, wanted) / wanted.any(2).sum(1)[:, None]
    # Below 0 it would be easier to be more than chance.
    assert bool((elsewhere < -1e-3).any())
    assert torch.allclose(null, elsewhere.clamp(min=0).T, atol=1e-5)


def test_what_a_sort_implies_is_not_said_again() -> None:
    values = {"induction": 0.5, "prefix_matching": 0.6, "copying": 0.7, "duplicate_token": 0.3, "bos_sink": 0.9}
    coords: dict[str, tuple[int, ...]] = {"layer": (0,), "head": (0, 1)}

    def scored(name: str, value: float) -> mi.Effects:
        # The second head does nothing but rest on the first token.
        return mi.Effects(
            name, ("layer", "head"), coords, torch.tensor([[[value] * 2, [value if name == "bos_sink" else 0.0] * 2]])
        )

    effects = {name: scored(name, value) for name, value in values.items()}
    p = {name: torch.full((1, 2), 1e-9, dtype=torch.float64) for name in values}
    scores = mi.HeadScores(effects, effects, p, torch.tensor([[2, 2]]))
    assert scores.named() == {"a0.h0": ("induction", "duplicate_token"), "a0.h1": ("bos_sink",)}
    # Mere sinks come last, however strong, and are no label unless asked for.
    assert list(scores.named()) == ["a0.h0", "a0.h1"]
    assert scores.labels() == {"a0.h0": "induction, duplicate token"}
    assert scores.labels(sinks=True) == {"a0.h0": "induction, duplicate token", "a0.h1": "BOS sink"}
    assert repr(scores).endswith("; 1 induction, 1 duplicate token, 1 BOS sink")
    assert scores.named(least=0.95) == {} == scores.named(alpha=1e-9)


def test_the_null_of_random_tokens_is_the_run_without_repetition() -> None:
    model = mi.load(module_of("llama"), name="m")
    scores = mi.head_scores(model, seed=4, n=3, length=5)
    plain, repeated = said_twice(model, n=3, length=5, seed=4)
    assert repeated.tokens.shape == (3, 11) and torch.equal(repeated.tokens[:, 1:6], repeated.tokens[:, 6:])
    assert torch.equal(plain.tokens[:, 6:], repeated.tokens[:, 6:])
    assert all(len(set(row)) == 11 for row in plain.tokens.tolist())
    for batch, effects in ((repeated, scores["prefix_matching"]), (plain, scores.nulls["prefix_matching"])):
        pattern = mi.attention(model, batch.tokens)["L1.H2"]
        looked = torch.stack([pattern[:, q, q - 4] for q in range(6, 11)]).mean(0)
        assert torch.allclose(effects.per_example[1, 2], looked, atol=1e-6)


def test_in_parts_and_padded_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mi.load(module_of("gemma2"), name="m")
    rows = [TOKENS[0].tolist(), TOKENS[1, :7].tolist(), TOKENS[2].tolist(), TOKENS[3, :8].tolist()]
    whole = mi.head_scores(model, rows)
    monkeypatch.setattr("mechinterp.lens.looking.rows_per_forward", lambda *_: 3)
    parts = mi.head_scores(model, rows)
    for name in whole.scores:
        for one, other in ((whole.scores, parts.scores), (whole.nulls, parts.nulls)):
            assert torch.allclose(one[name].per_example, other[name].per_example, atol=1e-5), name
    # A prompt's scores do not depend on the padding that others bring.
    alone = mi.head_scores(model, [rows[1]])
    for name in ("previous_token", "copying", "bos_sink", "prefix_matching"):
        assert torch.allclose(alone[name].per_example[..., 0], whole[name].per_example[..., 1], atol=1e-5), name


# -- chance -------------------------------------------------------------------------------------------


def test_a_first_token_outside_of_the_vocabulary_is_none() -> None:
    """What a configuration says of a tokenizer that is not the model's (GPT-2's default, over a small vocabulary)."""
    module = module_of("gpt2")
    module.config.bos_token_id = 50256
    plain, repeated = said_twice(mi.load(module, name="m"), n=2, length=5, seed=0)
    assert plain.tokens.shape == repeated.tokens.shape == (2, 10)


def test_sign_test_is_the_binomial_one() -> None:
    differences = torch.randn(20, 13, generator=torch.Generator().manual_seed(0)) + 0.3
    for row, p in zip(differences, sign_test(differences).tolist(), strict=True):
        above = int((row > 0).sum())
        assert p == pytest.approx(binomtest(above, 13, 0.5, alternative="greater").pvalue, abs=1e-12)
    assert sign_test(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]])).isnan().all()


def test_heads_that_were_never_trained_match_no_prefixes() -> None:
    for seed in range(3):
        scores = mi.head_scores(mi.load(module_of("gpt2", seed), name="random"), seed=seed, length=10)
        # However small the score: it is no larger than where nothing is repeated.
        sorts = {name for each in scores.named(least=0.0).values() for name in each}
        assert not sorts & {"prefix_matching", "induction"}
        adjusted = scores.adjusted()
        assert all(bool((adjusted[name] >= p).all()) for name, p in scores.p_values.items())


# -- showing itself, and messages ---------------------------------------------------------------------


def test_tables_and_headlines() -> None:
    scores = mi.head_scores(mi.toys.gqa_induction().model, seed=0)
    assert repr(scores) == "HeadScores: toy:gqa_induction, 32 prompts; 1 previous token, 1 prefix matching, 1 induction"
    frame = scores.to_frame()
    assert list(frame.columns) == ["layer", "head", "detector", "score", "null", "p_value", "adjusted"]
    assert len(frame) == 8 * 2 * 4
    row = frame[(frame.layer == 1) & (frame["head"] == 1) & (frame.detector == "induction")].iloc[0]
    assert row.score > 0.9 and row.null < 0.1 and row.p_value == 2.0**-32 and row.adjusted < 1e-6
    page = scores._repr_html_()
    assert page.count("<tr>") == 4 and "http" not in page
    assert scores.provenance["seed"] == 0 and scores["induction"].provenance["length"] == 9


@pytest.mark.usefixtures("unchecked_types")
def test_messages() -> None:
    toy = mi.toys.copy()
    for call, error, message in [
        (
            lambda: mi.head_scores(toy.model),
            TaskError,
            "random tokens are drawn where no prompts are given: say seed=0, or pass prompts",
        ),
        (
            lambda: mi.head_scores(toy.model, toy.task, seed=0),
            TaskError,
            "seed= and length= are for random tokens; leave them out with prompts of your own",
        ),
        (
            lambda: mi.head_scores(toy.model, seed=0, length=20),
            TaskError,
            "length=20: toy:copy can be told 7 random tokens twice (it reads 16 and has 15 to draw from, twice as many as are "
            "said); give 4 to 7",
        ),
        (
            lambda: mi.head_scores(toy.model, seed=0, n=0),
            TaskError,
            "n=0: give the number of random prompts, 1 or more; 32 are usual",
        ),
        (
            lambda: mi.head_scores(toy.model, [[1, 2, 3]]),
            TaskError,
            "a prompt has 3 tokens; heads are told apart on prompts of 4 and more",
        ),
        (
            lambda: mi.head_scores(toy.model, seed=0)["inducton"],
            SelectorError,
            "there is no detector 'inducton' here. Did you mean 'induction'?",
        ),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message
