"""QK, OV, copying and composition, against Hugging Face's own attention, transformer_lens, numpy and random rotations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import GraphError, ModelError
from mechinterp.lens.folding import reading, writing
from tests.core.architectures import module_of as wider_module_of
from tests.core.conftest import ARCHITECTURES, D_HEAD, HEADS, VOCAB, Plain, module_of

TOKENS = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))
LAYER = 1


def unbiased(architecture: str) -> Any:
    """Circuits leave biases out: a model without any."""
    module = module_of(architecture)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return module


def normed(plain: Plain, stream: Tensor) -> Tensor:
    """The stream over the norm's scale (eps included), its weight left out; centring is the circuit's own business."""
    norm = plain.parts(LAYER).norm1
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0
    centre = stream - stream.mean(-1, keepdim=True) if plain.architecture in ("gpt2", "neox") else stream
    return stream * (centre.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_circuits_give_the_patterns_and_outputs_of_hugging_face(architecture: str) -> None:
    module = unbiased(architecture)
    plain = Plain(architecture, copy.deepcopy(module))
    model = mi.load(module, name="m")
    values = plain.values(TOKENS, LAYER)
    x = normed(plain, values["resid_pre"])
    rotary = architecture != "gpt2"
    for head in range(HEADS):
        scores = torch.zeros(len(TOKENS), 6, 6)
        for distance in range(6):
            circuit = mi.qk_circuit(model, f"L{LAYER}.H{head}", distance=distance if rotary else 0).AB
            at = torch.einsum("bqm,mn,bkn->bqk", x, circuit, x) * D_HEAD**-0.5
            keys = torch.arange(6)
            scores = torch.where(keys[:, None] - keys[None] == distance, at, scores)
        if architecture == "gemma2":
            scores = 50 * torch.tanh(scores / 50)
        pattern = values["pattern"][:, head]
        # What is masked has no score: causal, and Gemma's window.
        found = scores.masked_fill(pattern == 0, -torch.inf).softmax(-1)
        assert torch.allclose(found, pattern, atol=2e-5), (architecture, head)
        written = pattern @ x @ mi.ov_circuit(model, f"a{LAYER}.h{head}").AB
        expected = values["head_out"][:, :, head]
        if architecture == "gemma2":
            expected = expected * (1 + plain.parts(LAYER).attn_end.weight)
        elif architecture in ("gpt2", "neox"):
            # What all coordinates share is read by no LayerNorm.
            expected = expected - expected.mean(-1, keepdim=True)
        assert torch.allclose(written, expected, atol=1e-4), (architecture, head)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_raw_circuits_are_those_of_transformer_lens(architecture: str) -> None:
    model = mi.load(module_of(architecture), name="m")
    theirs = model.bridge.QK, model.bridge.OV
    for layer in range(2):
        for head in range(HEADS):
            ours = [make(model, f"L{layer}.H{head}", folded=False).AB for make in (mi.qk_circuit, mi.ov_circuit)]
            for one, other in zip(ours, theirs, strict=True):
                assert torch.allclose(one, other[layer, head].AB.squeeze(), atol=1e-5)


def test_through_tokens_a_word_of_the_toy_is_looked_for_and_said() -> None:
    toy = mi.toys.induction()
    looks = mi.qk_circuit(toy.model, "L0.H0", through="tokens").AB
    said = mi.ov_circuit(toy.model, "L1.H5", through="tokens").AB
    words = torch.arange(2, 20)
    # The decoy a0.h0 looks for the current token, the induction head says what it looks at.
    assert torch.equal(looks[2:, 2:].argmax(-1), words - 2)
    assert torch.equal(said[2:].argmax(-1), words)
    assert float(mi.ov_circuit(toy.model, "L1.H2", through="tokens").AB.abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["gqa_induction"])
def test_a_rotary_head_looks_one_back(name: str) -> None:
    toy = getattr(mi.toys, name)()
    # Every word asks alike: the best of all distances is 1.
    at = [float(mi.qk_circuit(toy.model, "L0.H2", distance=d, through="tokens").AB[3, 4]) for d in range(8)]
    assert at.index(max(at)) == 1


# -- copying ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("mlp0", [False, True])
def test_copying_scores_are_those_of_the_whole_circuit(architecture: str, mlp0: bool) -> None:
    model = mi.load(module_of(architecture), name="m")
    found = mi.copying_scores(model, mlp0=mlp0).values
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    plain = model.hf
    embed = plain.get_input_embeddings().weight.detach()
    if mlp0:
        embed = embed + model.mlp_adds(0, embed[None])[0].detach()
    norm = plain.transformer.ln_f if architecture == "gpt2" else plain.model.norm
    words = plain.get_output_embeddings().weight.detach() * getattr(norm, "_original_component", norm).weight.detach()
    if architecture == "gpt2":
        words = words - words.mean(-1, keepdim=True)
    for layer in range(2):
        for head in range(HEADS):
            v, o = reading(model, layer, "v")[head // group], writing(model, layer)[head]
            values = np.linalg.eigvals((embed @ v @ o @ words.T).double().numpy())
            assert float(found[layer, head]) == pytest.approx(values.real.sum() / np.abs(values).sum(), abs=1e-3)


def test_copying_and_suppressing_heads_of_the_toys_and_no_other() -> None:
    copying = mi.copying_scores(mi.toys.copy().model)
    assert {label: round(value, 3) for label, value in copying.top(8)} == {
        "L1.H2": 1.0, "L0.H1": -1.0, "L0.H0": 0.0, "L0.H2": 0.0, "L0.H3": 0.0, "L1.H0": 0.0, "L1.H1": 0.0, "L1.H3": 0.0,
    }  # fmt: skip
    # In the induction toy nothing but the induction head says tokens; a0.h3 writes them where logits do not read.
    assert [(label, round(value, 3)) for label, value in mi.copying_scores(mi.toys.induction().model).top(2)] == [
        ("L1.H5", 1.0),
        ("L0.H0", 0.0),
    ]


# -- composition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
@pytest.mark.parametrize("port", ["q", "k", "v"])
def test_composition_is_that_of_transformer_lens(architecture: str, port: str) -> None:
    model = mi.load(module_of(architecture), name="m")
    found = mi.composition(model, port, unit="score", folded=False).as_dict()
    theirs = model.bridge.all_composition_scores(port.upper()).scores
    assert len(found) == HEADS * HEADS
    for (src, dst, _), value in found.items():
        assert value == pytest.approx(float(theirs[0, int(src[-1]), 1, int(dst[-1])]), abs=1e-5)


@pytest.mark.parametrize("port", ["q", "k", "v"])
def test_folded_composition_is_that_of_transformer_lens_in_compatibility_mode(port: str) -> None:
    found = mi.composition(mi.load(module_of("gpt2"), name="m"), port, unit="score").as_dict()
    other = mi.load(module_of("gpt2"), name="m").bridge
    other.enable_compatibility_mode()
    theirs = other.all_composition_scores(port.upper()).scores
    for (src, dst, _), value in found.items():
        assert value == pytest.approx(float(theirs[0, int(src[-1]), 1, int(dst[-1])]), abs=1e-4)


@pytest.mark.parametrize("port", ["q", "k", "v"])
def test_grouped_readers_read_for_all_their_queries(port: str) -> None:
    model = mi.load(module_of("llama"), name="m")
    found = mi.composition(model, port, unit="score", folded=False).as_dict()
    qk, ov = model.bridge.QK, model.bridge.OV
    reader = {"q": qk, "k": qk.T, "v": ov}[port]
    names = {dst for _, dst, _ in found}
    assert names == ({f"a1.h{i}" for i in range(4)} if port == "q" else {"a1.kv0", "a1.kv1"})
    for (src, dst, _), value in found.items():
        index = int(dst[-1])
        members = [index] if port == "q" else [2 * index, 2 * index + 1]
        left = ov[0, int(src[-1])].AB.squeeze().double()
        right = torch.cat([reader[1, each].AB.squeeze().double() for each in members], dim=1)
        assert value == pytest.approx(float((left @ right).norm() / left.norm() / right.norm()), abs=1e-5)


def test_chance_is_a_reader_turned_at_random(gpt2_of: Callable[[int], Any]) -> None:
    from scipy.stats import ortho_group

    model = gpt2_of(2)
    z, score = (mi.composition(model, "k", unit=unit).as_dict() for unit in ("z", "score"))
    pair = ("a0.h1", "a1.h2", "k")
    left = (reading(model, 0, "v")[1] @ writing(model, 0)[1]).double().numpy()
    right = (reading(model, 1, "k")[2] @ reading(model, 1, "q")[2].T).double().numpy()
    turned = ortho_group.rvs(model.cfg.d_model, size=3000, random_state=0)
    drawn = np.linalg.norm(left @ turned @ right, axis=(1, 2)) / np.linalg.norm(left) / np.linalg.norm(right)
    assert (drawn**2).mean() == pytest.approx(1 / model.cfg.d_model, rel=0.02)
    assert (score[pair] ** 2 - (drawn**2).mean()) / (drawn**2).std() == pytest.approx(z[pair], abs=0.15)


def test_the_planted_pair_composes_most() -> None:
    found = mi.composition(mi.toys.induction().model, "k")
    (first, one), (second, other), (_, rest) = found.top(3)
    # a1.h2 looks exactly like the induction head; they differ in what they write.
    assert {first, second} == {"a0.h3->a1.h5<k>", "a0.h3->a1.h2<k>"}
    assert one == pytest.approx(other, rel=1e-4) and abs(rest) < one / 3
    assert mi.composition(mi.toys.gqa_induction().model, "k").top(1)[0][0] == "a0.h2->a1.kv0<k>"


# -- messages -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_of() -> Callable[[int], Any]:
    return lambda seed: mi.load(module_of("gpt2", seed), name="tiny-gpt2")


@pytest.mark.usefixtures("unchecked_types")
def test_messages(gpt2_of: Callable[[int], Any]) -> None:
    model = gpt2_of(0)
    for call, error, message in [
        (lambda: mi.qk_circuit(model, "L0.H7"), GraphError, "There is no node a0.h7: the heads of a layer are 0 to 3."),
        (lambda: mi.ov_circuit(model, "m0"), GraphError, "'m0' is not a head; write it as 'L9.H6' or 'a9.h6'"),
        (
            lambda: mi.qk_circuit(model, "L0.H1", distance=1),
            ModelError,
            "the positions of tiny-gpt2 are learned: they do not turn queries and keys, so that the distance between them is not "
            "in the weights; leave out distance=",
        ),
        (
            lambda: mi.qk_circuit(model, "L0.H1", distance=-1),
            ModelError,
            "distance=-1: a query stands 0 to 31 positions behind its key in tiny-gpt2",
        ),
        (
            lambda: mi.qk_circuit(model, "L0.H1", through="token"),
            ModelError,
            "there is no way through 'token'. Did you mean 'tokens'?",
        ),
        (lambda: mi.composition(model, "x"), ModelError, "there is no port 'x' of composition. There are: q, k, v."),
        (
            lambda: mi.composition(model, "k", unit="zz"),
            ModelError,
            "there is no unit 'zz' of composition. Did you mean 'z'?",
        ),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_circuits_in_other_precisions(architecture: str, dtype: torch.dtype) -> None:
    exact = mi.load(module_of(architecture), name="m")
    rounded = mi.load(module_of(architecture).to(dtype), name="m")
    for head in range(HEADS):
        one, other = (mi.qk_circuit(each, f"L1.H{head}").AB for each in (exact, rounded))
        assert float((one - other).norm() / one.norm()) < 0.02


@pytest.mark.parametrize("name", ["Phi", "StableLM", "Phi-3"])
def test_where_only_some_coordinates_turn(name: str) -> None:
    """The rotation written down: the first coordinates of a head in pairs half of them apart, the others as they are."""
    module = wider_module_of(name)
    turning = int(D_HEAD * module.config.rope_parameters.get("partial_rotary_factor", 1.0))
    model = mi.load(module, name="m")
    theta = module.config.rope_parameters["rope_theta"]
    q, k = reading(model, 1, "q")[2].double(), reading(model, 1, "k")[2 * model.cfg.n_kv_heads // 4].double()

    def turned(weight: Tensor, place: int) -> Tensor:
        angle = place * theta ** (-torch.arange(0, turning, 2).double() / turning)
        one, other, rest = weight.split([turning // 2, turning // 2, D_HEAD - turning], dim=-1)
        return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin(), rest], dim=-1)

    for distance in (0, 3):
        found = mi.qk_circuit(model, "L1.H2", distance=distance).AB
        assert torch.allclose(found, (turned(q, 4 + distance) @ turned(k, 4).T).float(), atol=1e-5)
    if name != "Phi-3":
        assert turning < D_HEAD


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Gemma 3",
            "the attention scores of layer 1 of m (Gemma3ForCausalLM) are not the products of its queries and keys, turned",
        ),
        ("Bloom", "the attention scores of layer 1 of m (BloomForCausalLM) are not the products of its queries and keys (off by"),
        (
            "GPT-J",
            "the queries and keys of m (GPTJForCausalLM) are turned by their positions, but its code has no one module "
            "rotary_emb and function apply_rotary_pos_emb to take the angles from, so where a head looks cannot be told from its "
            "weights",
        ),
    ],
)
def test_what_else_has_no_circuit(name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        mi.qk_circuit(mi.load(wider_module_of(name), name="m"), "L1.H2", distance=0 if name == "Bloom" else 2)
    assert str(caught.value).startswith(message)


def test_normed_queries_have_no_circuit() -> None:
    import transformers as hf

    config = hf.Qwen3Config(
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48, head_dim=8,
        vocab_size=VOCAB, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    module = hf.Qwen3ForCausalLM(config).eval()
    for dtype in (torch.float32, torch.bfloat16):
        model = mi.load(copy.deepcopy(module).to(dtype), name="qwen")
        with pytest.raises(ModelError) as caught:
            mi.qk_circuit(model, "L0.H1")
        message = "the attention scores of layer 0 of qwen (Qwen3ForCausalLM) are not the products of its"
        assert str(caught.value).startswith(message)
    with pytest.raises(ModelError) as caught:
        mi.composition(model, "q")
    assert str(caught.value) == "qwen has one layer, so no head reads another"
