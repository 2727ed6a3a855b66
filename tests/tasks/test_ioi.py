from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mechinterp.errors import TaskError
from mechinterp.tasks import ioi, word_tokenizer
from mechinterp.tasks.ioi import NAMES, TEMPLATES
from mechinterp.tasks.words import check_tokenizer

SHORT = "Then {A} and {B} met, and {S} gave a ring to"


def test_prompts_align_and_differ_first_at_s2(tokenizer: Any) -> None:
    task = ioi(tokenizer, n=20, seed=0)
    assert task.clean.shape == (20, 17)
    assert task.mask is None
    assert task.first_difference.tolist() == task.positions["S2"].tolist() == [12] * 20
    assert task.differs.sum(dim=1).tolist() == [1] * 20
    assert task.positions["end"].tolist() == task.answer_pos.tolist() == [16] * 20
    assert (task.clean[:, 0] == tokenizer.bos_token_id).all()


def test_named_positions_hold_the_names(tokenizer: Any) -> None:
    task = ioi(tokenizer, n=20, seed=0)
    at = {name: task.clean.gather(1, where[:, None]) for name, where in task.positions.items()}
    assert (at["IO"] == task.right).all()
    assert (at["S1"] == task.wrong).all() and (at["S2"] == task.wrong).all()
    assert (task.positions["S1+1"] == task.positions["S1"] + 1).all()


def test_orders_and_templates_are_balanced_and_prompts_distinct(tokenizer: Any) -> None:
    task = ioi(tokenizer, n=20, seed=0)
    assert task.provenance["orders"] == {"ABBA": 10, "BABA": 10}
    assert task.provenance["templates"] == dict.fromkeys(TEMPLATES, 4)
    assert Counter((task.positions["IO"] < task.positions["S1"]).tolist()) == {True: 10, False: 10}
    assert task.texts is not None and len(set(task.texts)) == 20


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_one_order_alone_has_common_spans(tokenizer: Any, order: Any) -> None:
    task = ioi(tokenizer, n=20, seed=0, order=order)
    assert task.provenance["orders"] == {order: 20} and task.provenance["order"] == order
    assert ((task.positions["IO"] < task.positions["S1"]) == (order == "ABBA")).all()
    assert task.provenance["templates"] == dict.fromkeys(TEMPLATES, 4)
    assert task.spans.filled[1] == ("IO" if order == "ABBA" else "S1")
    with pytest.raises(TaskError) as caught:
        ioi(tokenizer, n=20, seed=0).spans  # noqa: B018
    assert str(caught.value).endswith(
        "dataclasses.replace(task, positions={...}). Prompts of ioi are made in one order with order='ABBA' "
        "(on the command line --option order=ABBA)"
    )
    with pytest.raises(TaskError) as caught:
        ioi(tokenizer, n=2, seed=0, order="abba")  # type: ignore[arg-type]
    assert str(caught.value) == "ioi has no order 'abba' of the names. There are: ABBA, BABA."


def test_third_name_is_new_to_the_prompt(tokenizer: Any) -> None:
    task = ioi(tokenizer, n=20, seed=0)
    third = task.corrupt.gather(1, task.positions["S2"][:, None])
    assert not (task.clean == third).any()
    assert {task.string(token) for token in third[:, 0].tolist()} <= set(NAMES)


def test_swap_makes_the_wrong_answer_right(tokenizer: Any) -> None:
    task = ioi(tokenizer, n=20, seed=0, corruption="swap")
    assert (task.corrupt.gather(1, task.positions["S2"][:, None]) == task.right).all()
    assert task.first_difference.tolist() == [12] * 20


def test_abc_removes_both_names(tokenizer: Any) -> None:
    task = ioi(tokenizer, n=20, seed=0, corruption="abc")
    assert not (task.corrupt == task.right).any() and not (task.corrupt == task.wrong).any()
    assert task.differs.sum(dim=1).tolist() == [3] * 20


def test_corruptions_share_their_clean_prompts(tokenizer: Any) -> None:
    tasks = [ioi(tokenizer, n=6, seed=0, corruption=kind) for kind in ("third-name", "swap", "abc")]
    assert tasks[0].clean.tolist() == tasks[1].clean.tolist() == tasks[2].clean.tolist()


def test_the_seed_decides(tokenizer: Any) -> None:
    first, again, other = (ioi(tokenizer, n=6, seed=seed) for seed in (0, 0, 1))
    assert first.clean.tolist() == again.clean.tolist()
    assert first.corrupt.tolist() == again.corrupt.tolist()
    assert first.clean.tolist() != other.clean.tolist()


def test_provenance_says_how_it_was_made(tokenizer: Any) -> None:
    provenance = dict(ioi(tokenizer, n=6, seed=4, bos=False).provenance)
    assert provenance.pop("templates")
    assert provenance == {
        "generator": "ioi",
        "n": 6,
        "seed": 4,
        "corruption": "third-name",
        "orders": {"ABBA": 5, "BABA": 1},
        "names": len(NAMES),
        "tokenizer": "words",
        "bos": False,
    }


def test_bos_can_be_left_out(tokenizer: Any) -> None:
    assert ioi(tokenizer, n=2, seed=0, bos=False).clean.shape == (2, 16)


def test_names_and_templates_of_your_own() -> None:
    names = ["Ada", "Bo", "Cy", "Di", "Ed"]
    tokenizer = word_tokenizer([*["Then", "and", "met", "gave", "a", "ring", "to", ","], *names])
    task = ioi(tokenizer, n=10, seed=0, templates=[SHORT], names=names)
    assert task.clean.shape == (10, 13)
    assert task.provenance["templates"] == {SHORT: 10}


def test_names_that_are_several_tokens_are_left_out() -> None:
    words = [*["Then", "and", "met", "gave", "a", "ring", "to", ","], *NAMES[:6]]
    task = ioi(word_tokenizer(words), n=5, seed=0, templates=[SHORT])
    assert task.provenance["names"] == 6


def test_default_templates_of_the_commonest_length_are_kept() -> None:
    words = [word for text in TEMPLATES[:4] for word in text.replace(",", " , ").split() if "{" not in word]
    task = ioi(word_tokenizer([*words, ".", *NAMES, "store", "drink"]), n=8, seed=0)
    assert task.provenance["templates"] == dict.fromkeys(TEMPLATES[:4], 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "ioi was asked for 0 pairs: n is at least 1."),
        (
            {"corruption": "third-nam"},
            "ioi has no corruption 'third-nam'. Did you mean 'third-name'?",
        ),
        (
            {"names": ["Mary", "John", "Zebulon", "Adam", "Alan", "Amy"]},
            ("'Zebulon' is not one token after a space for this tokenizer: an answer is one token, so leave it out of names=."),
        ),
        (
            {"names": ["Mary", "Zebulon", "Ophelia"]},
            (
                "'Zebulon', 'Ophelia' are not one token after a space for this tokenizer: an answer is one "
                "token, so leave them out of names=."
            ),
        ),
        (
            {"names": ["Mary", "John"]},
            "2 of 2 names are single tokens for this tokenizer, and ioi needs 5: pass names=[...] that are.",
        ),
        (
            {"templates": []},
            "templates is a list of prompts with the fields {A}, {B} and {S}, at least one.",
        ),
        (
            {"templates": TEMPLATES[0]},
            "templates is a list of prompts with the fields {A}, {B} and {S}, at least one.",
        ),
        (
            {"templates": ["Then {A} and {B"]},
            "template 'Then {A} and {B' cannot be read (expected '}' before end of string).",
        ),
        (
            {"templates": ["Then {A} and {B} saw the {plase}, {S} gave a ring to"]},
            ("template 'Then {A} and {B} saw the {plase}, {S} gave a ring to' has a field {plase}. Did you mean 'place'?"),
        ),
        (
            {"templates": ["Then {A} and {S} met, and gave a ring to"]},
            (
                "template 'Then {A} and {S} met, and gave a ring to' has the people ['A', 'S']: it "
                "needs {A}, {B} and then {S}, each once."
            ),
        ),
        (
            {"templates": ["{A} and {B} met, and {S} gave a ring to"]},
            (
                "template '{A} and {B} met, and {S} gave a ring to' has no space before {A}: a word at the "
                "start of a sentence is another token, so begin with another word, such as 'Then, {A} and "
                "...'."
            ),
        ),
        (
            {"templates": ["Then {A} and {B} met, and {S}"]},
            ("template 'Then {A} and {B} met, and {S}' ends in a field or a space: end with the word before the answer."),
        ),
        (
            {"templates": [SHORT, "Then {A} and {B} met, and when {S} gave a ring to"]},
            (
                "the templates have different lengths, and all prompts of a task have the same. 12 tokens: "
                "'Then {A} and {B} met, and {S} gave a ring to'; 13 tokens: 'Then {A} and {B} met, and when "
                "{S} gave a ring to'"
            ),
        ),
        (
            {"n": 500, "names": list(NAMES[:5]), "templates": [SHORT]},
            (
                "only 40 distinct prompts were found in 25100 draws, and 500 were asked: ask for fewer, or "
                "pass more names or templates."
            ),
        ),
    ],
)
def test_messages(tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        ioi(tokenizer, **{"n": 4, "seed": 0, **arguments})
    assert str(caught.value) == message


def test_messages_about_tokenizers(tokenizer: Any) -> None:
    few = word_tokenizer(["to", "the", *NAMES[:3]])
    with pytest.raises(TaskError) as caught:
        ioi(few, n=2, seed=0)
    assert str(caught.value) == (
        f"3 of {len(NAMES)} names are single tokens for this tokenizer, and ioi needs 5: pass names=[...] that are."
    )
    with pytest.raises(TaskError) as caught:
        ioi(word_tokenizer(NAMES[:6]), n=2, seed=0)
    assert str(caught.value) == (
        "no default template of ioi suits this tokenizer, pass templates=. The last reason: no place is a "
        "single token for this tokenizer: use a template without {place}."
    )
    with pytest.raises(TaskError) as caught:
        check_tokenizer("gpt2")
    assert str(caught.value) == (
        "a str was given where a tokenizer is needed: pass model.tokenizer, or a Hugging Face tokenizer."
    )


def test_a_tokenizer_that_splits_names_by_context_is_refused() -> None:
    # "Adam" is one token after "to the", but not behind "and".
    tokenizer = word_tokenizer([*["Then", "and", "met", "gave", "a", "ring", "to", "the", ","], *NAMES[:5]])

    class Splitting:
        bos_token_id = None

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            ids = tokenizer.encode(text.replace("and Adam", "and the Adam"), add_special_tokens=add_special_tokens)
            return list(ids)

        def decode(self, token_ids: list[int]) -> str:
            return str(tokenizer.decode(token_ids))

    with pytest.raises(TaskError) as caught:
        ioi(Splitting(), n=20, seed=0, templates=[SHORT])
    assert "this tokenizer splits names by context; pass templates= or names= that it does not." in str(caught.value)
