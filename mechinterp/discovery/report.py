"""The page a researcher reads: what was found, how sure it is, and what it cost."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from mechinterp.core.ablation import ABLATIONS
from mechinterp.discovery.describe import HeadStory
from mechinterp.discovery.evaluate import Report
from mechinterp.discovery.further import told as further
from mechinterp.graph import Circuit, draw
from mechinterp.graph.neurons import neuron_name
from mechinterp.graph.nodes import counted

__all__ = ["report_markdown", "save_all", "summary"]


def report_markdown(
    circuit: Circuit, report: Report, stories: Sequence[HeadStory], *, command: Sequence[str] = (), seconds: float = 0.0
) -> str:
    """The report as Markdown.

    Parameters
    ----------
    circuit
        With its provenance.
    report
        From `mechinterp.evaluate`, on held-out prompts.
    stories
        From `mechinterp.describe`.
    command
        What made it, as words; shown so that it can be run again.
    seconds
        Wall-clock time of everything.
    """
    origin = circuit.provenance
    low, high = report.faithfulness_interval
    chance, rivals = _chance(report)
    helping = [story for story in stories if story.clear and story.effect > 0]
    against = [story for story in stories if story.clear and story.effect < 0]
    found_on = counted(origin["prompts"], "prompt") if "prompts" in origin else "prompts"
    # What rounds to nothing is no row of the table.
    told = [story for story in stories if abs(story.effect) >= 0.005]
    lines = [
        f"# The circuit of {report.task} in {report.model}",
        "",
        f"{report.connected} of {counted(report.all_edges, 'edge')}{_at_spans(report)} "
        f"{'carries' if report.connected == 1 else 'carry'} {_percent(report.faithfulness)} of what the clean prompts add to the "
        f"{report.metric} "
        f"({report.confidence:.0%} interval {_percent(low)} to {_percent(high)}), on "
        f"{counted(report.prompts, 'prompt')} that {'was' if report.prompts == 1 else 'were'} not used to find it.{chance}",
        "",
        "## What it is",
        "",
        *_paragraph(helping, against),
        "",
        *_table(told, edges=any(circuit.scores.values())),
        "",
        *_neurons(circuit),
        "Effect, with its standard error over prompts: measured normalised effect of replacing the head's output by its "
        "value on the corrupt prompt (1 is the whole "
        "difference, negative means that the head works against the answer). Attention is the mean over clean prompts from the "
        "position where the head matters most. The last column names a pattern of attention; it is not a proof. Heads "
        "that matter less than twice their standard error, or than 1 % of the difference, are not listed above the table.",
        "",
        "## How good it is",
        "",
        "| | clean | corrupt | circuit |",
        "| --- | ---: | ---: | ---: |",
        f"| {report.metric} | {report.clean:.3f} | {report.corrupt:.3f} | {report.circuit:.3f} |",
        f"| accuracy | {report.model_accuracy:.3f} | | {report.circuit_accuracy:.3f} |",
        *([] if report.kl is None else [f"| KL from the model | 0.000 | | {report.kl:.3f} |"]),
        "",
        "| | |",
        "| --- | --- |",
        f"| faithfulness, ratio of means | {report.faithfulness:.3f} ({low:.3f} to {high:.3f}) |",
        f"| faithfulness, mean of ratios | {report.mean_of_ratios:.3f} |",
        *rivals,
        f"| {_asked_what(circuit, report)} asked for | {_asked(circuit, report)} |",
        f"| edges kept, connected | {report.edges}, {report.connected} |",
        *([] if report.pairs is None else [f"| pairs of edge and span, connected | {report.pairs} |"]),
        f"| nodes | {report.nodes} |",
        *([] if report.neurons is None else [f"| neurons, of {_counted_mlps(circuit)} | {report.neurons} |"]),
        f"| ablation | {report.ablation}: every edge outside carries {_carried(report)} |",
        "",
        f"Faithfulness is {_ratio(report)}, unclamped. Above 1 the circuit lacks parts that work against "
        "the answer; below 1 it lacks parts that work for it.",
        "",
        *(line for each in further(report.further) for line in (f"{each[0].upper()}{each[1:]}.", "")),
        *(line for caveat in report.caveats for line in (f"**Caution**: {caveat}.", "")),
        "## How it was found",
        "",
        f"{origin.get('estimator', origin.get('method', ''))} on {found_on}: "
        f"{origin.get('forwards', '?')} forward and {origin.get('backwards', '?')} backward passes over them, "
        f"{origin.get('seconds', '?')} s. Evaluation: {report.forwards} forward passes over {counted(report.prompts, 'prompt')}, "
        f"{report.seconds} s. Everything: {seconds:.0f} s.",
        "",
    ]
    if command:
        lines += ["```sh", shlex.join(command), "```", ""]
    lines += ["Files: `circuit.json` (graph, scores, provenance), `diagram.svg`, `diagram.html` (open in a browser).", ""]
    return "\n".join(lines)


def _at_spans(report: Report) -> str:
    at = "" if report.pairs is None else f", at some spans of the prompts ({counted(report.pairs, 'pair')} of edge and span),"
    return at + ("" if report.neurons is None else f", with {counted(report.neurons, 'neuron')} in the place of whole MLPs,")


def _counted_mlps(circuit: Circuit) -> str:
    return counted(len(circuit.connected().neurons), "MLP")


def _chance(report: Report) -> tuple[str, list[str]]:
    """What random circuits did, as a sentence and as rows of the table; nothing where there were none."""
    values, interval = report.random_faithfulness, report.random_interval
    if interval is None:
        return "", []
    mean = report.random_mean
    row = (
        f"| {counted(len(values), 'random circuit')} of equal size | mean {mean:.3f} ({interval[0]:.3f} to {interval[1]:.3f}); "
        f"{report.beats_random} of {len(values)} beaten |"
    )
    kinds = "of about the same kinds of edges" if report.neurons is None else "of as many heads, MLPs and neurons"
    return f" Random circuits of the same size, {kinds}, carry {_percent(mean)}.", [row]


def _carried(report: Report) -> str:
    if report.ablation == "resample":
        return "the value of the corrupt prompt"
    meaning = ABLATIONS[report.ablation.split(",")[0]]
    return meaning if meaning == "zero" else meaning.replace("its", "its writer's", 1)


def _ratio(report: Report) -> str:
    if report.ablation == "resample":
        return "(circuit - corrupt) / (clean - corrupt)"
    return f"(circuit - empty) / (clean - empty), where empty = {report.empty:.3f} is the {report.metric} with everything ablated"


def _percent(share: float) -> str:
    shown = f"{share:.0%}"
    return "0%" if shown == "-0%" else shown


def _asked(circuit: Circuit, report: Report) -> str:
    selection = circuit.provenance.get("selection", {})
    taken = f", found among the best {selection['taken']}" if "taken" in selection else ""
    rule = f" ({selection['rule']}{taken})" if "rule" in selection else ""
    return f"{selection.get('n_nodes', selection.get('n', report.edges))}{rule}"


def _asked_what(circuit: Circuit, report: Report) -> str:
    if "n_nodes" in circuit.provenance.get("selection", {}):
        return "heads and neurons" if circuit.provenance.get("unit") == "neuron" else "heads and MLPs"
    return "edges" if report.pairs is None else "pairs of edge and span"


def _paragraph(helping: Sequence[HeadStory], against: Sequence[HeadStory]) -> list[str]:
    lines = []
    by_role: dict[str, list[HeadStory]] = {}
    for story in helping:
        by_role.setdefault(story.role, []).append(story)
    for role, members in by_role.items():
        if not role:
            continue
        looks = members[0]
        heads = ", ".join(f"`{story.node}`" for story in members)
        lines.append(
            f"- **{role}**: {heads} {'attends' if len(members) == 1 else 'attend'} "
            f"from {looks.at[0]} to {looks.attends_to[0][0]}."
        )
    others = by_role.get("", [])
    if others:
        told = "; ".join(f"`{story.node}` from {story.at[0]} to {story.attends_to[0][0]}" for story in others)
        lines.append(f"- **other heads that help**: {told}.")
    if against:
        told = "; ".join(
            f"`{story.node}` from {story.at[0]} to {story.attends_to[0][0]}" + (f" ({story.role})" if story.role else "")
            for story in against
        )
        lines.append(f"- **heads that work against the answer**: {told}.")
    return lines


def _table(stories: Sequence[HeadStory], *, edges: bool) -> list[str]:
    """What each head does; its strongest ``edges`` where they have scores, as those among chosen nodes do not."""
    heads = ["head", "effect", "at", "attends to", *(["reads from", "writes to"] if edges else []), "usually called"]
    line = ["---:" if head == "effect" else "---" for head in heads]
    return [f"| {' | '.join(cells)} |" for cells in (heads, line, *(_row(story, edges) for story in stories))]


def _neurons(circuit: Circuit) -> list[str]:
    """The neurons with the largest scores, and how many each MLP keeps."""
    if not circuit.neurons:
        return []
    scores = {neuron_name(mlp, i): score or 0.0 for mlp, kept in circuit.neurons.items() for i, score in kept.items()}
    best = sorted(scores, key=lambda name: -abs(scores[name]))[:12]
    told = ", ".join(f"`{name}` {scores[name]:+.3f}" for name in best)
    counts = ", ".join(f"{mlp} {len(kept)}" for mlp, kept in circuit.neurons.items())
    return [f"**Neurons** with the largest scores: {told}. Kept of each MLP: {counts}.", ""]


def _row(story: HeadStory, edges: bool) -> list[str]:
    looks = ", ".join(f"{where} {share:.0%}" for where, share in story.attends_to)
    return [
        f"`{story.node}`",
        f"{story.effect:+.2f}" + ("" if math.isnan(story.error) else f" ± {story.error:.2f}"),
        f"{story.at[0]} ({story.at[1]:.0%})",
        looks,
        *([", ".join(story.reads), ", ".join(story.writes)] if edges else []),
        story.role,
    ]


def _how(circuit: Circuit) -> str:
    """How edges were chosen, and where it is not as many as were asked for, that."""
    origin = circuit.provenance
    said, method = origin["selection"], origin["method"]
    unit = origin.get("unit", "edge")
    # Some methods choose by themselves.
    how = method if said["rule"] == method else f"{method}, {said['rule'] if unit == 'edge' else f'{unit}s'}"
    asked = said.get("n", circuit.n_pairs)
    return how if asked == circuit.n_pairs else f"{how}; {asked} asked for, {circuit.n_pairs} found"


def summary(circuit: Circuit, report: Report, stories: Sequence[HeadStory]) -> str:
    """The report in seven lines, for a terminal."""
    low, high = report.faithfulness_interval
    rivals = f", random circuits {report.random_mean:.3f}" if report.random_faithfulness else ""
    roles = ", ".join(f"{story.node} {story.effect:+.2f}" for story in stories[:5] if story.clear)
    kept = counted(report.connected, "connected edge")
    kept = kept if report.pairs is None else f"{counted(report.pairs, 'pair')} of edge and span on {kept}"
    kept = kept if report.neurons is None else f"{counted(report.neurons, 'neuron')} in the place of whole MLPs, {kept}"
    origin = circuit.provenance
    found = counted(origin["prompts"], "prompt")
    return "\n".join(
        [
            f"circuit        {kept} of {report.all_edges}, {counted(report.nodes, 'node')} ({_how(circuit)})",
            f"task           {report.task} on {report.model}, {found} to find it, {report.prompts} held out",
            f"{report.metric:<14} clean {report.clean:.3f}, corrupt {report.corrupt:.3f}, circuit {report.circuit:.3f}",
            f"accuracy       model {report.model_accuracy:.3f}, circuit {report.circuit_accuracy:.3f}",
            f"faithfulness   {report.faithfulness:.3f} ({low:.3f} to {high:.3f}){rivals}",
            f"heads          {roles or 'none with a clear effect'}",
            f"cost           {origin['forwards'] + report.forwards} forward, {origin['backwards']} backward passes",
        ]
    )


def save_all(
    folder: Path,
    circuit: Circuit,
    report: Report,
    stories: Sequence[HeadStory],
    *,
    command: Sequence[str] = (),
    seconds: float = 0.0,
) -> list[Path]:
    """Write ``circuit.json``, ``diagram.svg``, ``diagram.html`` and ``report.md``; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    told = circuit.with_report(report.to_json() | ({"command": list(command)} if command else {}))
    labels = {story.node: story.role for story in stories if story.role}
    paths = [told.save(folder / "circuit.json")]
    paths.append(draw(told, max_edges=40, labels=labels).save(folder / "diagram.svg"))
    paths.append(draw(told, max_edges=100, labels=labels).save(folder / "diagram.html"))
    page = folder / "report.md"
    page.write_text(report_markdown(told, report, stories, command=command, seconds=seconds), encoding="utf-8")
    return [*paths, page]
