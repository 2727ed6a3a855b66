"""Names of hook points, as people know them from transformer_lens."""

from __future__ import annotations

import pytest

from mechinterp.core.names import refuse_hook_name, site_for_hook
from mechinterp.core.select import select
from mechinterp.core.sites import KINDS
from mechinterp.errors import SelectorError


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.0.attn.hook_z", "L0.z"),
        ("blocks.11.attn.hook_q", "L11.q"),
        ("blocks.3.attn.hook_attn_scores", "L3.scores"),
        ("blocks.3.attn.hook_result", "L3.head_out"),
        ("blocks.3.hook_q_input", "L3.q_in"),
        ("blocks.2.mlp.hook_post", "L2.mlp_post"),
        ("blocks.2.hook_resid_mid", "L2.resid_mid"),
        ("hook_embed", "embed"),
        ("hook_pos_embed", "pos_embed"),
        ("ln_final.hook_normalized", "final_norm"),
        # What bridges call them.
        ("blocks.0.attn.o.hook_in", "L0.z"),
        ("blocks.7.attn.q.hook_out", "L7.q"),
        ("blocks.1.hook_out", "L1.resid_post"),
        ("embed.hook_out", "embed"),
        # No hook points, or none that is a site.
        ("L0.z", None),
        ("blocks.0.ln1.hook_scale", None),
        ("blocks.0.attn.hook_zz", None),
        ("hook_z", None),
        ("transformer.h.0.attn", None),
    ],
)
def test_the_site_of_a_hook_point(hook: str, site: str | None) -> None:
    assert site_for_hook(hook) == site


def test_every_hook_point_of_a_site_is_known(settings) -> None:
    """The bridge's own list, and what it calls each of them besides."""
    model = settings["gpt2"].model
    for hook in model.bridge.hook_dict:
        site = site_for_hook(hook)
        assert site is None or len(select(site, model.cfg)) == 1
    for kind in KINDS.values():
        if kind.point is not None:
            assert site_for_hook(kind.point.format(1)) == (f"L1.{kind.name}" if kind.per_layer else kind.name)


def test_a_hook_name_is_refused_with_the_site() -> None:
    refuse_hook_name("L0.z")
    with pytest.raises(SelectorError) as caught:
        refuse_hook_name(" blocks.0.attn.hook_z")
    assert str(caught.value) == (
        "'blocks.0.attn.hook_z' is the name of a hook point, and sites have shorter ones. Did you mean 'L0.z'?"
    )
