"""How long does ACDC take beside auto-circuit's, on the same model, pairs, measure, threshold and order of edges?

auto-circuit needs a transformer_lens of before 3, so that it runs in an environment of its own, as a process that waits while
ours runs. It visits the edges in an order of its own, which ours is then given. Both run in float32: what stays is the same but
for edges that rounding decides at the threshold, and what follows from them.

    python -m venv peer && peer/bin/pip install auto-circuit "transformer_lens<3" "datasets<4" "pyarrow<20"
    python benchmarks/acdc_peer.py --peer peer/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = {"n_layers": 4, "d_model": 96, "n_heads": 12}
# Of the KL of the answers from the whole model's, in nats.
THRESHOLD = 3e-6


def ours(peer_python: str, rounds: int, layers: int, threshold: float) -> dict[str, Any]:
    """Both in turns, ours after its peer, whose order of edges it takes."""
    import torch
    from safetensors.torch import save_file
    from sweeps import gpt2, random_pairs, seconds

    import mechinterp as mi

    model, task = gpt2(layers, SIZES["d_model"]), random_pairs(50257, 15, 10)[:4]
    times: dict[str, list[float]] = {"mi.acdc": [], "auto-circuit": []}
    with tempfile.TemporaryDirectory() as folder:
        state = {name.replace("_original_component.", ""): value for name, value in model.hf.state_dict().items()}
        save_file({name: value.contiguous().clone() for name, value in state.items()}, Path(folder) / "weights.safetensors")
        pairs = {"clean": task.clean.tolist(), "corrupt": task.corrupt.tolist()}
        (Path(folder) / "pairs.json").write_text(json.dumps(pairs | {"layers": layers, "threshold": threshold}))
        command = [peer_python, __file__, "--worker", folder]
        environment = os.environ | {"PYTHONHASHSEED": "0", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as worker:
            assert worker.stdin is not None and worker.stdout is not None
            for _ in range(rounds):
                worker.stdin.write("go\n")
                worker.stdin.flush()
                theirs = next(json.loads(line[5:]) for line in worker.stdout if line.startswith("peer "))
                order = [mi.Edge(*edge) for edge in theirs["order"]]

                def run(order: list[mi.Edge] = order) -> mi.Circuit:
                    return mi.acdc(model, task, threshold, metric="kl", signed=True, normalize=False, order=order)[0]

                took, circuit = seconds(run, model.device)
                times["mi.acdc"].append(took)
                times["auto-circuit"].append(theirs["seconds"])
            worker.stdin.close()
    kept = {mi.Edge(*edge) for edge in theirs["kept"]}
    return {
        "model": model.name,
        "threads": torch.get_num_threads(),
        "work": f"{len(order)} edges, {len(task)} pairs of {task.clean.shape[1]} tokens that first differ at 10, KL, {threshold}",
        "edges that stay": {"mi.acdc": len(circuit), "auto-circuit": len(kept), "in both": len(kept & set(circuit))},
        "seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "auto-circuit / mi.acdc, each round": [
            round(b / a, 2) for a, b in zip(times["mi.acdc"], times["auto-circuit"], strict=True)
        ],
    }


def worker(folder: Path) -> None:
    """auto-circuit's ACDC, once for each line that is read; this runs in its environment."""
    import time

    import torch
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.ACDC import acdc_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    given = json.loads((folder / "pairs.json").read_text())
    heads, width = SIZES["n_heads"], SIZES["d_model"]
    hf = GPT2LMHeadModel(GPT2Config(n_layer=given["layers"], n_embd=width, n_head=heads))
    hf.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    hf.tie_weights()
    hf.eval()
    config = HookedTransformerConfig(
        n_layers=given["layers"], d_model=width, n_heads=heads, d_head=width // heads, d_mlp=4 * width, d_vocab=50257, n_ctx=1024,
        act_fn="gelu_new", normalization_type="LN", eps=1e-5,
    )  # fmt: skip
    whole = HookedTransformer(config)
    whole.load_state_dict(convert_gpt2_weights(hf, config), strict=False)
    whole.set_use_attn_result(True)
    whole.set_use_split_qkv_input(True)
    whole.set_use_hook_mlp_in(True)
    whole.eval()
    clean, corrupt = (torch.tensor(given[name]) for name in ("clean", "corrupt"))
    with torch.no_grad():
        gap = (whole(clean)[:, -1].softmax(-1) - hf(clean).logits[:, -1].softmax(-1)).abs().max()
    assert gap < 1e-5, f"the two models differ by {gap}"
    model = patchable_model(whole, factorized=True, slice_output="last_seq", separate_qkv=True, device=torch.device("cpu"))
    nothing = [torch.tensor([0])] * len(clean)
    data = PromptDataset(list(clean), list(corrupt), nothing, nothing)
    loader = PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=len(clean), shuffle=False)

    def node(name: str) -> tuple[str, str]:
        """Its name here, and the port."""
        if name.startswith("A"):
            layer, head, *port = name[1:].split(".")
            return f"a{layer}.h{head}", port[0].lower() if port else "in"
        return {"Resid Start": "embed", "Resid End": "logits"}.get(name) or f"m{name.split()[1]}", "in"

    def told(edge: Any) -> tuple[str, str, str]:
        return node(edge.src.name)[0], *node(edge.dest.name)

    for _ in sys.stdin:
        started = time.perf_counter()
        scores = acdc_prune_scores(model, loader, None, tao_exps=[0], tao_bases=[given["threshold"]])
        took = time.perf_counter() - started
        order = sorted(model.edges, key=lambda edge: edge.dest.layer, reverse=True)
        kept = [told(edge) for edge in order if bool(edge.prune_score(scores).isinf())]
        said = {"seconds": took, "order": [told(edge) for edge in order], "kept": kept}
        sys.stdout.write(f"peer {json.dumps(said)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the Python of the environment with auto-circuit")
    parser.add_argument("--layers", type=int, default=SIZES["n_layers"])
    parser.add_argument("--threshold", type=float, default=THRESHOLD)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file to keep the numbers in")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
    elif not arguments.peer:
        parser.error("--peer is missing: the Python of an environment with auto-circuit")
    else:
        from sweeps import keep

        found = ours(arguments.peer, arguments.rounds, arguments.layers, arguments.threshold)
        sys.stdout.write(f"{json.dumps(found, indent=1)}\n")
        if arguments.out:
            keep(arguments.out, "beside auto-circuit", found)
