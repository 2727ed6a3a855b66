"""Write docs/ioi.md: the IOI circuit of SmolLM2-135M, how good it is, how sure, and what does not follow.

The certificate is read from circuits/ioi-thorough-smollm2-135m; the rest is measured here, in some minutes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import mechinterp as mi
from mechinterp.graph import connected_edges
from mechinterp.lens.detectors import DETECTORS
from mechinterp.verifying import rebuild_task

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "circuits" / "ioi-thorough-smollm2-135m"
EDGES = ROOT / "circuits" / "edges-ioi-smollm2-135m" / "effects.safetensors"
PAGE = ROOT / "docs" / "ioi.md"
HEADS = 16

TEXT = """# Who receives the gift: a circuit of SmolLM2-135M, and how far to believe it

> Then, Mary and John went to the store, and John gave a drink to ... Mary

{edges} of the {all_edges} edges of the model ({share:.1%}, {nodes} of {all_nodes} nodes) carry {faithfulness:.0%} of what tells the model
that Mary receives the gift (95% interval {low:.0%} to {high:.0%}, on {prompts} prompts that did not find them). **So the other {rest:.0%}
is elsewhere**: this is the strongest part of the mechanism, not the mechanism.

The file is [circuits/ioi-thorough-smollm2-135m](../circuits/ioi-thorough-smollm2-135m/report.md), made by

    {command}

and this page by `python scripts/ioi_page.py`, which measures what is not in that file. The model is a quantised copy (Q4_1) of
SmolLM2-135M-Instruct. Clean prompts name John twice; the counterfactual has a third name in place of the second John (S2), so that
nothing says who receives. Effects are shares of what that changes in the logit
difference between Mary and John: {clean:.2f} and {corrupt:.2f} on the prompts that found the circuit.

## Which heads

The {n_heads} strongest of the circuit. *Effect*: what replacing the head's output by its counterfactual changes (1 is everything,
negative works against the answer), on the prompts that found the circuit, measured. *Known to do*: what `mi.head_scores` finds on 32
sequences of random tokens said twice, that is without any of these prompts; only what differs from its null (Holm over all heads and
detectors, p < 0.01) with a score of 0.2. *On these prompts*: the same on the held-out prompts.
Resting on the first token, as most heads do where they find nothing to look at, is left out.

| head | effect | looks from | to | the pattern is called | known to do, on random tokens | on these prompts |
| --- | ---: | --- | --- | --- | --- | --- |
{heads}

Read together, with the literature's words for it (Wang et al. 2022, on GPT-2 small):

{story}

The words describe attention. Scores held against a null say the same of {supported}; of the others they do
not, so that their names rest on attention alone. What supports any of them as a *cause* is the effect in the second column, and nothing
else on this page.

## How good is it?

| | |
| --- | --- |
| faithfulness on held-out prompts | {faithfulness:.3f} ({low:.3f} to {high:.3f}); mean of ratios {ratios:.3f} |
| accuracy of the circuit alone | {circuit_accuracy:.3f}, of the model {model_accuracy:.3f} |
| {n_random} random circuits of as many edges | {random_mean:.3f} on average, {beaten} of {n_random} beaten |
| the other way: the model without the circuit's edges | {without:.3f} of the behaviour is left |
| faithfulness under other ablations | {ablations} |
| KL of its answers from the model's | {kl:.3f} |

The rows on the other way and on other ablations, and what follows, are of {few} of the held-out prompts.

- **Not complete.** With nothing removed circuit and model differ by {nothing:.3f}; with random halves of the nodes taken from both by
  {random_gap:.3f} on average, at worst of {sets} sets by {worst:.3f}.
- **Not minimal, edge by edge.** Of {sampled} edges drawn by chance {no_drop} can go alone without a drop of 0.001 in faithfulness; the
  median drop is {median:.4f}. Beside edges of random paths {needless} of them are shown to do no more (p < 0.05, Holm).
- **Hypotheses of an ideal circuit** (Shi et al. 2024): {tests}. Rejected at 0.05: {rejected}. Not to be rejected is no proof, with {few}
  prompts least of all; independence is a weak question here, since what the rest answers to the counterfactual may depend on the pair.
- **Size.** Faithfulness of the best-scored edges, by how many of them connect: {curve}. CPR {cpr:.3f}, CMD {cmd:.3f} over the share of
  edges.

## How much hangs on the prompts and on the method?

| | |
| --- | --- |
| chosen again from resampled prompts | Jaccard {jaccard:.3f} ({jaccard_low:.3f} to {jaccard_high:.3f}); {core} of {edges} edges in 95% of {resamples} |
| found on other prompts (seed {other_seed}) | Jaccard {other_iou:.3f}; faithfulness {other_faithfulness:.3f} on the same held-out prompts |
| chosen by exact effects instead of estimates | Jaccard {exact_iou:.3f}; faithfulness {exact_faithfulness:.3f} on the same held-out prompts |
| edges in both, and in the circuit of seed {other_seed} | {common} edges; faithfulness {common_faithfulness:.3f} |

Exact effects are those of [all 70,651 edges](../circuits/edges-ioi-smollm2-135m/report.md), of 8 pairs; the circuit's scores are
EAP-IG. All are judged by the same {prompts} prompts, and the interval above is as wide as these differences.

{compared} of the circuit's edges measured exactly on 8 held-out prompts (`mi.compare_to_exact`): rank correlation with the scores
{spearman:.3f}, correlation {pearson:.3f}, same sign {signs:.0%}, {saturated} estimated far too small, {cancelling} whose effects cancel over
prompts.

## What does not follow

- *That this is how the model does it.* {faithfulness:.0%} is carried, and without these edges {without:.0%} is left: what is needed and what
  is enough are two questions, and only the second one makes an explanation. (The edges out of the first layer are on nearly every path,
  so that taking them away says little about the others.)
- *That an edge which is missing does not matter.* {edges} is a number that was asked for. The curve above shows what more edges bring.
- *That an edge which is there matters.* Of {sampled} tried {no_drop} can go alone, and {core} of {edges} are chosen whatever the sample of
  prompts.
- *That heads do this on other text.* All prompts are of {n_templates} templates with two names of one token; the counterfactual changes one
  token, and whatever both prompts share is in no circuit: finding names, that a gift is given, position.
- *That zero or mean ablation would say the same.* See the row of other ablations: this circuit was found for resampling.
- *That SmolLM2 before instruction tuning and quantisation has it.* It was not looked at.
"""  # noqa: E501


def roles(stories: Any) -> str:
    """The heads of each sort in one line each."""
    found: dict[str, list[Any]] = {}
    for story in stories:
        if story.clear:
            sort = story.role or ("other heads that help" if story.effect > 0 else "other heads that work against the answer")
            found.setdefault(sort, []).append(story)
    meaning = {
        "duplicate token": "at the second mention of the subject, look back at the first",
        "induction": "at the second mention of the subject, look at what followed the first",
        "S-inhibition": "at the end, look at the second mention of the subject; what they write moves the queries of later heads",
        "name mover": "at the end, look at the receiver and write it into the logits",
        "negative name mover": "at the end, look at the receiver and write against it",
        "copy suppression": "at the end, look at the subject and write straight into the logits, against it",
    }
    return "\n".join(
        f"- *{sort}*: {', '.join(f'`{each.node}` ({each.effect:+.2f})' for each in members)}"
        + (f": {meaning[sort]}." if sort in meaning else ".")
        for sort, members in found.items()
    )


def supported(stories: Any, *labels: dict[str, str]) -> str:
    """The heads whose pattern has the name that scores give them too."""
    both = [
        each.node for each in stories if each.role and any(f"{each.role} " in f"{found.get(each.node, '')} " for found in labels)
    ]
    return ", ".join(f"`{node}`" for node in both) or "none"


def head_rows(stories: Any, known: dict[str, str], here: dict[str, str]) -> str:
    """The table of heads."""
    return "\n".join(
        f"| `{each.node}` | {each.effect:+.2f} ± {each.error:.2f} | {each.at[0]} | "
        + ", ".join(f"{where} {share:.0%}" for where, share in each.attends_to)
        + f" | {each.role} | {known.get(each.node, '')} | {here.get(each.node, '')} |"
        for each in stories
    )


def scored_labels(scores: Any) -> dict[str, str]:
    """The sorts of each head, with the score of each."""
    found = {}
    for node, sorts in scores.named().items():
        layer, head = map(int, node.removeprefix("a").split(".h"))
        # Most heads rest on the first token where they find nothing to look at.
        told = [name for name in sorts if name != "bos_sink"]
        found[node] = ", ".join(f"{DETECTORS[name].label} {float(scores[name].values[layer, head]):.2f}" for name in told)
    return found


def main() -> None:
    """Read, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--seed", type=int, default=1, help="of the other prompts")
    arguments = parser.parse_args()
    started = time.monotonic()

    def say(what: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:6.0f} s  {what}\n")

    model, circuit = mi.load("smollm2"), mi.Circuit.load(FOLDER)
    certificate, origin = circuit.certificate, circuit.provenance
    if certificate is None or "further" not in certificate.claims:
        raise SystemExit(f"{FOLDER} has no thorough certificate; make circuits")
    claims, further = certificate.claims, certificate.claims["further"]
    found_on = rebuild_task(model, origin["task_provenance"], "ioi")
    held_out = rebuild_task(model, certificate.prompts, "ioi")
    say("heads")
    stories = mi.describe(circuit, model, found_on, heads=HEADS)
    known = scored_labels(mi.head_scores(model, seed=0))
    here = scored_labels(mi.head_scores(model, held_out))
    say("other prompts")
    others = mi.tasks.ioi(model.tokenizer, n=len(found_on), seed=arguments.seed)
    again = mi.discover(model, others, edges=len(circuit), progress=True)
    table = load_file(EDGES)["mean"].float().tolist()
    scores = dict(zip(mi.Circuit.full(model).edges, table, strict=True))
    exact = connected_edges(model, scores, len(circuit))
    common = (circuit & again & exact).connected()
    say("the circuits beside each other")
    outs = mi.run_circuits(model, held_out, [again, exact, common], progress=True)
    shares = ((outs.circuits - outs.empty).mean(1) / (outs.clean - outs.empty).mean()).tolist()
    say("exact effects")
    agreement = mi.compare_to_exact(circuit, model, held_out[:8], sample=100, seed=0, progress=True)
    low, high = claims["faithfulness_interval"]
    curve, stable, complete, minimal = (further[name] for name in ("curve", "stability", "completeness", "minimality"))
    tests = further["hypotheses"]
    text = TEXT.format(
        edges=claims["connected"],
        all_edges=f"{claims['all_edges']:,}",
        share=claims["connected"] / claims["all_edges"],
        nodes=claims["nodes"],
        all_nodes=len(circuit.shape.nodes),
        faithfulness=claims["faithfulness"],
        low=low,
        high=high,
        prompts=claims["prompts"],
        command=shlex.join(certificate.command),
        rest=1 - claims["faithfulness"],
        clean=origin["baseline"]["clean"],
        corrupt=origin["baseline"]["corrupt"],
        supported=supported(stories, known, here),
        n_heads=len(stories),
        heads=head_rows(stories, known, here),
        story=roles(stories),
        ratios=claims["mean_of_ratios"],
        circuit_accuracy=claims["circuit_accuracy"],
        model_accuracy=claims["model_accuracy"],
        n_random=certificate.random_circuits,
        random_mean=round(sum(claims["random_faithfulness"]) / certificate.random_circuits, 3) + 0.0,
        beaten=claims["beats_random"],
        without=further["without"],
        ablations=", ".join(f"{kind} {share:.3f}" for kind, share in further["ablations"].items()),
        kl=claims["kl"],
        few=further["prompts"],
        nothing=complete["nothing"],
        random_gap=complete["random"],
        worst=complete["worst"],
        sets=complete["sets"],
        sampled=minimal["edges"],
        no_drop=minimal["no_drop"],
        median=minimal["median"],
        needless=tests["needless"],
        tests=", ".join(f"{name} p {p:.2g}" for name, p in tests["p"].items()),
        rejected=", ".join(tests["rejected"]) or "none",
        curve=", ".join(f"{n:,}: {f:.2f}" for n, f in zip(curve["connected"], curve["faithfulness"], strict=True)),
        cpr=curve["cpr"],
        cmd=curve["cmd"],
        jaccard=stable["jaccard"],
        jaccard_low=stable["low"],
        jaccard_high=stable["high"],
        core=stable["core"],
        resamples=stable["resamples"],
        other_seed=arguments.seed,
        other_iou=circuit.iou(again),
        other_faithfulness=shares[0],
        exact_iou=circuit.iou(exact),
        exact_faithfulness=shares[1],
        common=len(common),
        common_faithfulness=shares[2],
        compared=len(agreement.edges),
        spearman=agreement.spearman,
        pearson=agreement.pearson,
        signs=agreement.sign_agreement,
        saturated=int(agreement.saturated.sum()),
        cancelling=int(agreement.cancelling.sum()),
        n_templates=len(origin["task_provenance"]["templates"]),
    )
    arguments.out.write_text(text, encoding="utf-8")
    say(str(arguments.out))


if __name__ == "__main__":
    main()
