"""What drives neurons and what they write: planted facts, Hugging Face's own MLPs, and a corpus read all at once."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Iterator

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import ModelError, SelectorError, TaskError
from tests.core.conftest import ARCHITECTURES, VOCAB, Plain, module_of

TOKENS = torch.randint(0, VOCAB, (150, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: pytest.FixtureRequest) -> tuple[mi.Model, Plain]:
    module = module_of(request.param)
    plain = Plain(request.param, copy.deepcopy(module))
    return mi.load(module, name=f"tiny-{request.param}"), plain


# -- what drives them ---------------------------------------------------------------------------------


def test_top_tokens_are_those_of_the_whole_corpus(both: tuple[mi.Model, Plain]) -> None:
    model, plain = both
    found = mi.top_tokens(model, TOKENS, "L1.N3,7.mlp_post | L1.N2.resid_post", k=4, window=2)
    for site in ("L1.N3.mlp_post", "L1.N7.mlp_post", "L1.N2.resid_post"):
        neuron = int(site.split(".")[1][1:])
        whole = plain.values(TOKENS, 1)[site.split(".")[-1]][..., neuron]
        values = whole[:, 1:]
        strongest, where = values.flatten().topk(4)
        places = found[site]
        assert [place.value for place in places] == pytest.approx(strongest.tolist(), abs=1e-5)
        assert [(place.prompt, place.pos) for place in places] == [(int(i) // 5, int(i) % 5 + 1) for i in where]
        for place in places:
            around = TOKENS[place.prompt, max(0, place.pos - 2) : place.pos + 3].tolist()
            assert list(place.window) == around and around[place.at] == int(TOKENS[place.prompt, place.pos])
        index = [str(each) for each in found.sites].index(site)
        assert float(found.mean[index]) == pytest.approx(float(values.mean()), abs=1e-5)
        assert float(found.active[index]) == pytest.approx(float((values > 0).float().mean()), abs=1e-6)
    assert (found.tokens, found.prompts) == (150 * 5, 150)
    first = mi.top_tokens(model, TOKENS, "L0.N3.mlp_post", k=1, skip_first=False)
    assert first.tokens == 900


def test_a_corpus_is_read_once_in_any_parts_and_of_any_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mi.load(module_of("llama"), name="m")
    rows = [row[: 2 + i % 5].tolist() for i, row in enumerate(TOKENS)]
    whole = mi.top_tokens(model, rows, "L1.N*.mlp_post", k=3)

    def once() -> Iterator[list[int]]:
        yield from rows

    monkeypatch.setattr("mechinterp.lens.neurons._AT_ONCE", 7)
    parts = mi.top_tokens(model, once(), "L1.N*.mlp_post", k=3)
    assert parts.tokens == whole.tokens == sum(len(row) - 1 for row in rows)
    for one, other in zip(whole.found, parts.found, strict=True):
        assert [(p.prompt, p.pos, p.window) for p in one] == [(p.prompt, p.pos, p.window) for p in other]
        assert [p.value for p in one] == pytest.approx([p.value for p in other], abs=1e-6)
    assert torch.allclose(whole.mean, parts.mean, atol=1e-6) and torch.allclose(whole.active, parts.active)


def test_a_window_of_one_token() -> None:
    (place,) = mi.top_tokens(mi.toys.memory().model, [[1, 2, 3]], "L0.N5.mlp_post", k=1, window=0)["L0.N5.mlp_post"]
    assert len(place.window) == 1 and place.at == 0


def test_memory_does_not_grow_with_the_corpus() -> None:
    model = mi.load(module_of("gpt2"), name="m")

    def corpus(n: int) -> Iterator[list[int]]:
        return (TOKENS[i % 150].tolist() for i in range(n))

    peaks = []
    mi.top_tokens(model, corpus(64), "L0.N3.mlp_post", k=2)
    for n in (128, 1280):
        tracemalloc.start()
        mi.top_tokens(model, corpus(n), "L0.N3.mlp_post", k=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_a_fact_s_neuron_is_driven_by_the_prompts_that_ask_it() -> None:
    toy = mi.toys.memory()
    for fact in toy.facts:
        name = f"L{fact.layer}.N{fact.neuron}.mlp_post"
        places = mi.top_tokens(toy.model, toy.task, name, k=5)[name]
        texts = {toy.task.texts[place.prompt] for place in places}
        assert texts == {f"the {fact.relation} of {fact.subject} is"} and {place.pos for place in places} == {5}


# -- what they write ----------------------------------------------------------------------------------


def test_facts_are_read_from_value_vectors() -> None:
    toy = mi.toys.memory()
    said = mi.value_vectors(toy.model, "L*.N*.mlp_post", k=1)
    for fact in toy.facts:
        assert said[f"L{fact.layer}.N{fact.neuron}.mlp_post"] == [fact.answer]
    # Neurons that hold no fact write where the logits do not read.
    facts = {f"L{fact.layer}.N{fact.neuron}.mlp_post" for fact in toy.facts}
    speaking = {str(site) for site, by in zip(said.sites, said.raised_by[:, 0], strict=True) if float(by) > 1e-6}
    assert speaking == facts


def test_value_vectors_raise_the_logits_that_they_say(both: tuple[mi.Model, Plain]) -> None:
    """One neuron alone on the stream, through the plain model's own norm and unembedding: the order of all tokens is the same."""
    model, plain = both
    found = mi.value_vectors(model, "L1.N4,9.mlp_post", k=VOCAB)
    assert found.raised.tolist() == found.lowered.flip(1).tolist()
    for row, neuron in enumerate((4, 9)):
        post = plain.parts(1).post
        value = post.weight[neuron] if plain.architecture == "gpt2" else post.weight[:, neuron]
        if plain.architecture == "gemma2":
            value = value * (1 + plain.parts(1).mlp_end.weight)
        norm = plain.roots.norm
        with torch.no_grad():
            bias = norm(torch.zeros_like(value)[None])
            logits = plain.module.get_output_embeddings().weight @ (norm(1e4 * value[None]) - bias)[0]
        assert found.raised[row].tolist() == logits.argsort(descending=True).tolist()
        # And in proportion.
        by = found.raised_by[row]
        assert torch.allclose(by / by.norm(), logits[found.raised[row]] / logits.norm(), atol=1e-4)


def test_sub_updates_sum_to_the_output(both: tuple[mi.Model, Plain]) -> None:
    model, plain = both
    for layer in range(2):
        values = plain.values(TOKENS[:3], layer)
        parts = mi.sub_updates(model, TOKENS[:3], layer)
        assert torch.allclose(parts.total().float(), values["mlp_out"], atol=1e-4)
        # One of them by hand: what is missing of the sum, behind the scale of a norm, without this neuron.
        one = parts.coefficients[1, 2, 5] * parts.values[5]
        rest = parts.coefficients[1, 2] @ parts.values - one
        assert torch.allclose((one + rest + parts.rest.expand(3, 6, -1)[1, 2]).float(), values["mlp_out"][1, 2], atol=1e-4)
        if plain.architecture != "gemma2":
            post = plain.parts(layer).post
            value = post.weight[5] if plain.architecture == "gpt2" else post.weight[:, 5]
            assert torch.allclose(one.float(), values["mlp_post"][1, 2, 5] * value, atol=1e-5)
        assert torch.allclose(parts.sizes()[1, 2, 5], one.norm(), atol=1e-9)
        norm, word = plain.roots.norm, plain.module.get_output_embeddings().weight.detach()[7]
        gain = norm.weight.detach() + (1 if plain.architecture == "gemma2" else 0)
        read = one - one.mean() if plain.architecture in ("gpt2", "neox") else one
        toward = parts.toward(7)[1, 2, 5]
        # Up to the size at which the norm's weight is written: the same for all tokens and neurons.
        other = parts.coefficients[1, 2, 6] * parts.values[6]
        other = other - other.mean() if plain.architecture in ("gpt2", "neox") else other
        expected = float((word * gain) @ read.float()) / float((word * gain) @ other.float())
        assert float(toward / parts.toward(7)[1, 2, 6]) == pytest.approx(expected, rel=1e-3)


def test_the_fact_is_the_strongest_sub_update_and_points_at_its_answer() -> None:
    toy = mi.toys.memory()
    fact = toy.facts[8]
    row = toy.task.texts.index(f"the {fact.relation} of {fact.subject} is")
    parts = mi.sub_updates(toy.model, toy.task[row : row + 1], fact.layer)
    answer = int(toy.task.right[row, 0])
    toward = parts.toward(answer)[0, -1]
    assert int(toward.argmax()) == fact.neuron and float(toward[fact.neuron]) > 5
    others = toward.clone()
    others[fact.neuron] = 0
    assert float(others.abs().max()) < 1e-6
    assert parts.strongest(0, -1, k=1)[0][0] in {f"L{fact.layer}.N{i}.mlp_post" for i in range(32)}


# -- showing themselves, and messages -----------------------------------------------------------------


def test_tables_and_headlines() -> None:
    toy = mi.toys.memory()
    top = mi.top_tokens(toy.model, toy.task, "L0.N0,5.mlp_post", k=2)
    assert repr(top).startswith("TopTokens: 2 neurons over 300 tokens of 60 prompts; L0.N0.mlp_post is ")
    assert list(top.to_frame().columns) == ["neuron", "value", "token", "prompt", "pos", "text"] and len(top.to_frame()) == 4
    page = top._repr_html_()
    assert page.count("<tr>") == 5 and "&lt;s&gt;" in page and "<s>" not in page
    said = mi.value_vectors(toy.model, "L0.N0,5.mlp_post", k=3)
    assert repr(said).startswith("ValueVectors: 2 of toy:memory; L0.N0.mlp_post raises 'paris', ")
    assert list(said.to_frame().columns) == ["neuron", "rank", "token", "logit", "lowered", "lowered_logit"]
    assert len(said.to_frame()) == 6 and said._repr_html_().count("<tr>") == 3
    parts = mi.sub_updates(toy.model, toy.task[:2], -1)
    assert repr(parts) == "SubUpdates: 32 neurons of layer 1 of toy:memory, 2 prompts of 6 tokens"


@pytest.mark.usefixtures("unchecked_types")
def test_messages() -> None:
    toy = mi.toys.memory()
    model, task = toy.model, toy.task
    top, said = mi.top_tokens(model, task, "L0.N0.mlp_post"), mi.value_vectors(model, "L0.N0.mlp_post")
    for call, error, message in [
        (
            lambda: mi.top_tokens(model, task, "L0.mlp_post"),
            SelectorError,
            "L0.mlp_post is no neuron; write 'L3.N17.mlp_post', or 'L3.N*.mlp_post' for all of a layer",
        ),
        (
            lambda: mi.top_tokens(model, task, "L0.H0.N3.z"),
            SelectorError,
            "L0.H0.N3.z is no neuron; write 'L3.N17.mlp_post', or 'L3.N*.mlp_post' for all of a layer",
        ),
        (
            lambda: mi.top_tokens(model, task, "L0.N0.mlp_post", k=0),
            SelectorError,
            "k=0: give the number of places for each neuron, 1 or more",
        ),
        (
            lambda: mi.top_tokens(model, task, "L0.N0.mlp_post", window=-1),
            SelectorError,
            "window=-1: give the number of tokens to keep on each side, 0 or more",
        ),
        (
            lambda: mi.top_tokens(model, [[1], [2]], "L0.N0.mlp_post"),
            TaskError,
            "the corpus has no token to look at; the first of each prompt is skipped",
        ),
        (lambda: top["L0.N1.mlp_post"], SelectorError, "L0.N1.mlp_post was not watched; watched are L0.N0.mlp_post"),
        (
            lambda: mi.value_vectors(model, "L0.N0.mlp_out"),
            SelectorError,
            "L0.N0.mlp_out is no neuron of an MLP; write 'L3.N17.mlp_post', or 'L3.N*.mlp_post' for all of a layer",
        ),
        (
            lambda: mi.value_vectors(model, "L0.N0.mlp_post", k=100),
            SelectorError,
            "k=100: give a number of tokens, from 1 to 25",
        ),
        (lambda: said["L0.N1.mlp_post"], SelectorError, "L0.N1.mlp_post was not looked at; there are L0.N0.mlp_post"),
        (
            lambda: mi.sub_updates(model, task, 2),
            SelectorError,
            "there is no layer 2: toy:memory has layers 0 to 1",
        ),
        (
            lambda: mi.sub_updates(model, task, 0).toward(99),
            SelectorError,
            "there is no token 99; toy:memory knows 0 to 24",
        ),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message


def test_experts_have_no_value_vectors() -> None:
    from tests.core.architectures import module_of as wider

    model = mi.load(wider("Mixtral"), name="experts")
    with pytest.raises(ModelError) as caught:
        mi.value_vectors(model, "L0.N0.mlp_post")
    assert str(caught.value) == (
        "the MLP of layer 0 of experts (MixtralForCausalLM) is a mixture of experts: it has no one set of neurons"
    )
