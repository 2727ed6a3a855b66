"""Plain modules: a CNN and an MLP, with named activations."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mechinterp as mi
from mechinterp.errors import EditError, InertError, MechInterpError, ModelError, SelectorError, SiteError

IMAGE = ("batch", "channel", "height", "width")


class Net(nn.Module):
    """Two convolutions, of which the first is followed by a ReLU that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 3, 3)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(3 * 4 * 4, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.relu(self.second(self.relu(self.first(image)))).flatten(1))


class Deep(nn.Module):
    """An MLP over positions, with layers of one sort."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, stream: Tensor) -> Tensor:
        for layer in self.layers:
            stream = stream + layer(stream)
        return stream


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 1, 8, 8)


@pytest.fixture
def cnn(image: Tensor) -> Any:
    return mi.load(Net(), sites={"first": ("first", IMAGE), "second": ("second", IMAGE)}, example=image, name="net")


@pytest.fixture
def mlp() -> Any:
    return mi.load(Deep(), sites={"act": ("layers.{}.1", ("batch", "pos", "neuron"))}, example=torch.randn(2, 4, 6))


def test_what_it_is(cnn: Any, mlp: Any, image: Tensor) -> None:
    assert repr(cnn) == "Model net: plain Net, sites first, second"
    assert cnn.sites == ("first", "second")
    assert cnn.audit.refused == {}
    assert cnn.describe()["sites"] == {"first": ["first", *IMAGE], "second": ["second", *IMAGE]}
    assert torch.equal(cnn(image), cnn.hf(image))
    assert [str(site) for site in mi.select("L*.act", mlp.cfg)] == ["L0.act", "L1.act", "L2.act"]
    assert mi.load(mlp) is mlp
    assert repr(mi.run(cnn, image, capture="first")) == "Run: inputs [2, 1, 8, 8], 1 activations captured"


def test_captures_are_the_modules_outputs(cnn: Any, image: Tensor) -> None:
    """Also where the module behind works in place."""
    net = cnn.hf
    run = mi.run(cnn, image, capture="first | second")
    with torch.no_grad():
        first = net.first(image)
        second = net.second(first.relu())
    assert torch.equal(run["first"], first)
    assert torch.equal(run["second"], second)
    assert torch.equal(run["N2.first"], first[:, 2])
    assert [str(site) for site in run.cache] == ["first", "second"]
    assert "first" in repr(run.cache)


def test_edits_do_what_is_done_by_hand(cnn: Any, image: Tensor) -> None:
    net = cnn.hf
    found = mi.run(cnn, image, edits=[mi.Zero("N2.first"), mi.Scale("second", 0.5, rows=(1, 2))], capture="second")
    with torch.no_grad():
        first = net.first(image)
        first[:, 2] = 0.0
        second = net.second(first.relu())
        second[1] *= 0.5
        wanted = net.head(second.relu().flatten(1))
    assert torch.equal(found.logits, wanted)
    assert torch.equal(found["second"], second)


def test_layers_and_positions(mlp: Any) -> None:
    stream = torch.randn(2, 4, 6)
    site = "L1.N3.act[-1]"
    found = mi.run(mlp, stream, edits=[mi.Zero(site)], capture="L*.act")
    with torch.no_grad():
        value = stream
        for i, layer in enumerate(mlp.hf.layers):
            act = layer(value)
            if i == 1:
                act[:, -1, 3] = 0.0
            value = value + act
    assert torch.equal(found.logits, value)
    assert found[site].tolist() == [0.0, 0.0]
    assert found["L2.act"].shape == (2, 4, 6)


def test_registry_and_the_callers_hooks(cnn: Any, image: Tensor) -> None:
    seen: list[int] = []
    cnn.hf.second.register_forward_hook(lambda *_: seen.append(1))
    before = [(name, list(module._forward_hooks)) for name, module in cnn.hf.named_modules()]
    registry = mi.HookRegistry(cnn)
    registry.add("first", lambda value, site: value * 2)
    with registry:
        cnn.hf(image)
    with pytest.raises(EditError):
        mi.run(cnn, image, edits=[mi.Call("first", lambda value, site: value[:1])])
    assert [(name, list(module._forward_hooks)) for name, module in cnn.hf.named_modules()] == before
    assert seen == [1]


def test_gradients(cnn: Any, image: Tensor) -> None:
    run = mi.run(cnn, image, capture="first", grad=True)
    (gradient,) = torch.autograd.grad(run.logits.sum(), run["first"])
    first = cnn.hf.first(image).detach().requires_grad_()
    net = cnn.hf
    (wanted,) = torch.autograd.grad(net.head(net.second(first.relu()).relu().flatten(1)).sum(), first)
    torch.testing.assert_close(gradient, wanted)


def test_edits_that_are_refused(cnn: Any, image: Tensor, unchecked_types: None) -> None:
    cases: list[tuple[type[MechInterpError], str, Any]] = [
        (EditError, "Replace at first: the value has shape [1], but the activation there has [2, 4, 6, 6]",
         mi.Replace("first", torch.zeros(1))),
        (SiteError, "in 'frist': there is no site 'frist'. Did you mean 'first'?", mi.Zero("frist")),
        (SelectorError, "there is no channel 4 in 'N4.first': this model has channels 0 to 3", mi.Zero("N4.first")),
        (SelectorError, "'first' has no positions in 'first[0]': its axes are batch channel height width", mi.Zero("first[0]")),
        (SelectorError, "'first' is not split by head in 'H1.first'; per head there are: none", mi.Zero("H1.first")),
        (SelectorError, "'first' has no layers: write 'first', not 'L0.first'", mi.Zero("L0.first")),
    ]  # fmt: skip
    for kind, message, edit in cases:
        with pytest.raises(kind, match=f"^{re.escape(message)}"):
            mi.run(cnn, image, edits=[edit])
    with pytest.raises(ModelError, match=r"^net is a plain module, which unembeds nothing; leave out keep=$"):
        mi.run(cnn, image, keep=[0])
    with pytest.raises(ModelError, match=r"^net is a plain module without transformer blocks; mi.run and mi.HookRegistry work"):
        cnn.block(0)


def test_sites_that_are_refused(image: Tensor) -> None:
    """A module used twice, one never used, one whose axes are other ones."""
    sites = {"relu": ("relu", IMAGE), "unused": ("unused", ("batch", "d")), "first": ("first", ("batch", "channel"))}
    model = mi.load(Net(), sites=sites, example=image, name="net")
    assert model.sites == ()
    assert "fired 2 times in 1 forward passes" in model.audit.refused["relu"]
    assert "fired 0 times in 1 forward passes" in model.audit.refused["unused"]
    assert model.audit.refused["first"] == "first has shape [2, 4, 6, 6] where the axes are batch channel"
    with pytest.raises(SiteError, match=r"^'unused' is refused on net: "):
        mi.run(model, image, capture="unused")
    dead = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(dead[1].weight)
    model = mi.load(dead, sites={"a": ("0", ("batch", "d"))}, example=torch.ones(1, 2))
    assert model.audit.refused == {"a": "pushing a far away does not reach the output"}


LOADING = [
    (
        {"sites": {"a": ("frist", IMAGE)}},
        "site 'a': Net has no submodule 'frist'. Did you mean 'first'?",
    ),
    ({"sites": {"a b": ("first", IMAGE)}}, "'a b' cannot be a site's name; use letters, digits and _"),
    ({"sites": {"a": ("first", ("channel",))}}, "site 'a' has the axes ('channel',); name each once, 'batch' first"),
    ({"sites": {"a": "first"}}, "site 'a' is given as 'first'; write ('path.of.module', ('batch', ...))"),
    ({"sites": {}}, "sites= names no activation; write sites={'hidden': ('path.of.module', ('batch', 'neuron'))}"),
    (
        {"sites": {"a": ("first", IMAGE)}, "example": None},
        "a plain module is loaded with both sites= and example=: mi.load(module, sites={'hidden': "
        "('path.of.module', ('batch', 'neuron'))}, example=inputs)",
    ),
]


@pytest.mark.parametrize(("options", "message"), LOADING, ids=[message[:30] for _, message in LOADING])
def test_loading_that_is_refused(options: dict[str, Any], message: str, image: Tensor, unchecked_types: None) -> None:
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        mi.load(Net(), **({"example": image} | options))


def test_output_that_is_no_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(2, 2)

        def forward(self, value: Tensor) -> Any:
            return self.inner(value)

    with pytest.raises(ModelError, match=r"^Two gives tuple, not a tensor; wrap it in a module whose forward returns the tensor"):
        mi.load(Two(), sites={"a": ("inner", ("batch", "d"))}, example=torch.ones(1, 2))


def test_calls_are_counted(mlp: Any) -> None:
    """Two calls of the module are two passes; none is an error."""
    registry = mi.HookRegistry(mlp)
    registry.add(mi.Zero("L0.act"))
    with registry:
        nn.Sequential(mlp.hf, mlp.hf)(torch.randn(1, 4, 6))
    with pytest.raises(InertError, match="no forward pass ran"), registry:
        pass
