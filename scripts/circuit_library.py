"""Write circuits/README.md: what the model can do, and what each circuit's file claims.

The first table runs the model (a minute); ``--keep`` leaves it as it is. The second is read from the files.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from mechinterp.graph import Certificate, Circuit

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "circuits" / "README.md"
ABILITY = ("mechinterp", "tasks", "--model", "smollm2", "--n", "128", "--seed", "0")
# The interval of a task's accuracy lies above this, or it is not explained.
ABLE = 0.9

TEXT = """# Circuits

Each folder holds a circuit as data (`circuit.json`: graph, scores, provenance and certificate), two pictures (`diagram.svg`, and
`diagram.html` to look around in) and what was found in words (`report.md`). `mechinterp verify` measures again what the files claim,
`make circuits` makes them again. This page is made by `python scripts/circuit_library.py`.

## What the model can do

Asked before anything is discovered, by `{command}`. SmolLM2-135M-Instruct here is a quantised copy (Q4_1), so these are not
numbers of the original weights.

{abilities}

Accuracy: the best right answer has a larger logit than the best wrong one; in brackets Wilson's 95% interval. On corrupt
prompts: the same, by the clean prompts' answers (where right and wrong trade places, 0 is perfect). First choice: the right answer
is the most likely of all tokens. The last two columns are means of the metric.

A task is explained here if that interval lies above {able}. {left_out}

## What was found

{circuits}

Faithfulness is (circuit - corrupt) / (clean - corrupt) in the metric, on prompts that did not find the circuit, in brackets the 95%
bootstrap interval over them; everything outside of the circuit carries what it carries on the corrupt prompt. Random circuits have
as many edges of about the same kinds. `thorough`: also judged by completeness, minimality, other ablations, hypotheses, size and
stability. Sizes were chosen by hand to be drawn and read, not to reach a faithfulness: low numbers are findings too.

Made by:

{commands}

`ioi-thorough-smollm2-135m` is the circuit of `ioi-smollm2-135m`, edge by edge; `make demo` writes the latter in two minutes, and the
former takes longer to judge. [docs/ioi.md](../docs/ioi.md) tells what is in it and how sure that is.
[edges-ioi-smollm2-135m](edges-ioi-smollm2-135m/report.md) is no circuit: it is the exact effect of every edge of the model.
"""  # noqa: E501


def certificates() -> dict[str, Certificate]:
    """What each file claims, by its folder."""
    found = {}
    for file in sorted((ROOT / "circuits").glob("*/circuit.json")):
        certificate = Circuit.load(file).certificate
        if certificate is None:
            raise SystemExit(f"{file} carries no evaluation; `mechinterp discover` writes one")
        found[file.parent.name] = certificate
    return found


def rows(found: dict[str, Certificate]) -> str:
    """The table of circuits."""
    lines = [
        "| circuit | edges | nodes | held-out prompts | faithfulness | random circuits | accuracy: model | circuit | |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | --- |",
    ]
    for folder, certificate in found.items():
        claims = certificate.claims
        low, high = claims["faithfulness_interval"]
        chance = claims["random_faithfulness"]
        # A mean that is nothing but rounding has no sign.
        mean = round(sum(chance) / len(chance), 3) + 0.0
        lines.append(
            f"| [{folder}]({folder}/report.md) | {claims['connected']} of {claims['all_edges']} | {claims['nodes']} | "
            f"{claims['prompts']} | {claims['faithfulness']:.3f} ({low:.3f} to {high:.3f}) | mean {mean:.3f}, "
            f"{claims['beats_random']} of {len(chance)} beaten | {claims['model_accuracy']:.3f} | "
            f"{claims['circuit_accuracy']:.3f} | {'thorough' if 'further' in claims else ''} |"
        )
    return "\n".join(lines)


def unable(abilities: str) -> list[str]:
    """The tasks whose accuracy may be 0.9 or less, as the table says."""
    found = re.findall(r"^\| (\w+) \| \d+ \| \d+ \| [\d.]+ \(([\d.]+) to", abilities, flags=re.MULTILINE)
    return [name for name, low in found if float(low) <= ABLE]


def page(abilities: str) -> str:
    """The whole page."""
    found, lacking = certificates(), unable(abilities)
    return TEXT.format(
        command=shlex.join(ABILITY),
        abilities=abilities,
        able=ABLE,
        left_out=f"Left out: {', '.join(lacking)}." if lacking else "None is left out.",
        circuits=rows(found),
        commands="\n".join(f"    {shlex.join(each.command)}" for each in found.values()),
    )


def kept(text: str) -> str:
    """The first table of a page that is there."""
    return "\n".join(line for line in text.split("## What was found")[0].splitlines() if line.startswith("|"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the table of abilities as it is")
    if parser.parse_args().keep:
        table = kept(PAGE.read_text(encoding="utf-8"))
    else:
        words = [sys.executable, "-m", *ABILITY]
        table = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    PAGE.write_text(page(table), encoding="utf-8")
