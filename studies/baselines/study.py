"""Do our baselines remove what their authors' code removes? Both run on one random LLaMA, on the same ids.

    git clone https://github.com/CASIA-IVA-Lab/FLAP FLAP
    git clone https://github.com/horseee/LLM-Pruner LLM-Pruner
    git clone https://github.com/icip-cas/ShortGPT ShortGPT
    python -m studies.baselines.study FLAP LLM-Pruner ShortGPT

The references run as they are: their modules are imported, what they would download is replaced by the ids, what they
need a GPU for runs on the CPU, and what they remove is watched. They know no grouped heads and FLAP's heads are 128
wide, so the model is one of 6 layers with 4 such heads and 384 FFN channels. Of ours, as many weights go as of theirs.

"the same" is the share of removed structures that both remove (intersection over union), "rank" the lowest Spearman
correlation of the scores over all layers.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from studies.common import parser_of

LAYERS, HEADS, HEAD_DIM, FFN, VOCAB = 6, 4, 128, 384, 256
KEPT = frozenset({0, LAYERS - 1})  # stands for LLM-Pruner's first 4 and last 2
RATIO = 0.25
Gone = set[tuple[int, str, int]]  # (layer, ffn | group, index)
Scores = dict[tuple[int, str], torch.Tensor]
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HEADS * HEAD_DIM, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip


def our_model() -> Any:
    """A random LLaMA whose channels and heads differ in size, so that a ranking means something."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            rows, columns = parameter.shape
            spread = torch.exp(0.5 * (torch.randn(rows, 1) + torch.randn(columns)))
            parameter.data = 0.05 * torch.randn_like(parameter) * spread
        else:
            parameter.data = torch.exp(0.3 * torch.randn_like(parameter))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= torch.exp(torch.randn(HEADS)).repeat_interleave(HEAD_DIM)
    return model


def their_model(package: str, source: Any) -> Any:
    """The reference's own LLaMA with the weights of ``source``."""
    from transformers import LlamaConfig

    module = importlib.import_module(f"{package}.hf_llama.modeling_llama")
    model = module.LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        parameter.data.zero_()  # FLAP's biases, which no checkpoint holds
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(("bias", "inv_freq")) for name in missing), (missing, unexpected)
    return model


@contextmanager
def imported_from(directory: Path, *stubs: str) -> Iterator[None]:
    """Import from a checked-out repository, with empty modules for what it imports and does not need here."""
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    for name in stubs:
        stub = types.ModuleType(name)
        stub.__getattr__ = lambda attribute: None  # type: ignore[method-assign]
        sys.modules.setdefault(name, stub)
    cuda, torch.Tensor.cuda = torch.Tensor.cuda, lambda self, *_, **__: self
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        torch.Tensor.cuda = cuda
        sys.path.remove(str(directory))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("lib", "models", "LLMPruner", "metrics", *stubs):
                del sys.modules[name]


def flap(directory: Path, source: Any, ids: torch.Tensor, method: str, ratio: float, cut: bool) -> tuple[Gone, Scores]:
    """What FLAP's prune_flap (AL-AM, WIFV) or prune_wanda_sp removes, and the scores they sort.

    With ``cut`` a layer is cut before the next one is scored, as prune_wanda_sp does.
    """
    scores: Scores = {}
    gone: Gone = set()
    with imported_from(directory, "datasets"):
        prune = importlib.import_module("lib.prune")
        model = their_model("models", source)
        model.seqlen = ids.shape[1]
        place = {id(m): i for i, layer in enumerate(model.model.layers) for m in layer.modules()}
        place |= {id(layer): i for i, layer in enumerate(model.model.layers)}
        prune.get_loaders = lambda *_, **__: ([(row[None], None) for row in ids], None)
        compress = prune.compress

        def watch_compress(layer: Any, attention: Any, mlp: Any, *rest: Any, **named: Any) -> None:
            for kind, mask in (("group", attention), ("ffn", mlp)):
                if mask is not None:
                    gone.update((place[id(layer)], kind, int(i)) for i in torch.where(~mask)[0])
            if cut:
                compress(layer, attention, mlp, *rest, **named)

        def watch_metric(wrapped: Any, subset: Any, name: str) -> torch.Tensor:
            value = wifv(wrapped, subset, name)
            layer = place[id(subset[name])]
            if "o_proj" in name:
                scores[layer, "group"] = standard(value**2).view(-1, HEAD_DIM).mean(1)
            else:
                scores[layer, "ffn"] = standard(value)
            return value

        class Watched(prune.WrappedGPT):  # type: ignore[misc, name-defined]
            def free(self) -> None:
                value = self.dense.abs().mean(0) * self.scaler_row.sqrt()
                head = self.dense.shape[1] == HEADS * HEAD_DIM
                key = (place[id(self.layer)], "group" if head else "ffn")
                scores[key] = value.view(-1, HEAD_DIM).sum(1) if head else value

            def __init__(self, layer: Any, *rest: Any) -> None:
                super().__init__(layer, *rest)
                self.dense = layer.weight.data.clone()

        wifv, prune.metrics["WIFV"] = prune.metrics["WIFV"], watch_metric
        prune.compress, prune.WrappedGPT = watch_compress, Watched
        given = argparse.Namespace(nsamples=len(ids), seed=0, pruning_ratio=ratio, metrics="WIFV", structure="AL-AM")
        given.unstr, given.remove_heads = False, -1
        run = prune.prune_flap if method == "flap" else prune.prune_wanda_sp
        run(given, model, None, torch.device("cpu"))
    return gone, scores


def standard(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std()


def llm_pruner(directory: Path, source: Any, ids: torch.Tensor, method: str) -> tuple[Gone, Scores]:
    """What LLM-Pruner's MetaPruner would remove block-wise, and the importance it sorts."""
    scores: Scores = {}
    gone: Gone = set()
    with imported_from(directory, "sentencepiece"):
        pruning = importlib.import_module("LLMPruner.torch_pruning")
        llama = importlib.import_module("LLMPruner.pruner.hf_llama_pruner")
        model = their_model("LLMPruner.models", source)
        layers = model.model.layers
        free = [i for i in range(LAYERS) if i not in KEPT]
        roots = {id(layers[i].self_attn.q_proj): (i, "group") for i in free}
        roots |= {id(layers[i].mlp.gate_proj): (i, "ffn") for i in free}
        taylor = "vectorize" if method == "vector" else method
        score = llama.TaylorImportance("sum", taylor=taylor)
        if method == "magnitude":
            score = llama.MagnitudeImportance(p=2)

        def watched(group: Any, **named: Any) -> torch.Tensor:
            value = score(group, **named)
            key = roots[id(group[0][0].target.module)]
            scores[key] = value.view(HEADS, -1).sum(1) if key[1] == "group" else value
            return value

        pruner = pruning.pruner.MetaPruner(
            model, ids[:2, :8], importance=watched, ch_sparsity=RATIO, iterative_steps=1, ignored_layers=[],
            consecutive_groups={layer.self_attn.q_proj: HEAD_DIM for layer in layers},
            customized_pruners={type(model.model.norm): llama.hf_rmsnorm_pruner}, root_module_types=None,
            root_instances=[m for i in free for m in (layers[i].self_attn.q_proj, layers[i].mlp.gate_proj)],
        )  # fmt: skip
        if method != "magnitude":
            their_gradients(model, ids)
        for group in pruner.step(interactive=True):
            layer, kind = roots[id(group[0][0].target.module)]
            width = HEAD_DIM if kind == "group" else 1
            gone.update((layer, kind, index // width) for index in group[0][1])
    return gone, scores


def their_gradients(model: Any, ids: torch.Tensor) -> None:
    """grad of the mean loss and acc_grad, mean of squared gradients, where LLM-Pruner's importance looks for them."""
    for row in ids:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                squared = parameter.grad.square() / len(ids)
                parameter.acc_grad = squared + getattr(parameter, "acc_grad", 0)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()


def shortgpt(directory: Path, source: Any, ids: torch.Tensor) -> torch.Tensor:
    """Summed block influence of each layer, from ShortGPT's function on transformers' hidden states."""
    with imported_from(directory / "shortgpt"), torch.no_grad():
        influence: Callable[..., torch.Tensor] = importlib.import_module("metrics").block_influence
        hidden = source(ids, output_hidden_states=True).hidden_states
        return torch.stack([influence(a, b).sum() for a, b in pairwise(hidden)])


def ours(source: Any, ids: torch.Tensor, method: str, kept: frozenset[int] | None, gone: Gone) -> tuple[Gone, Scores]:
    """The beginning of our ranking whose weights are nearest to what the reference removed, and our scores."""
    from saap.models.architectures import shape_of
    from saap.prune.baselines import methods as baselines
    from saap.prune.options import PruneOptions

    shape = shape_of(source.config)
    weights = {"ffn": 3 * shape.hidden, "group": 4 * HEAD_DIM * shape.hidden}
    need = sum(weights[kind] for _, kind, _ in gone)
    options = PruneOptions(method=method, keep_layers=kept, heads=True, group_size=1)
    steps = baselines.rank(source, shape, ids, options).removals
    removed: Gone = set()
    for step in steps:
        if need < step.weights / 2:
            break
        need -= step.weights
        removed |= {(step.layer, step.kind, index) for index in step.gone}
    scores = baselines._scores(method, source, shape, ids, 0, None)
    pairs = {(i, kind): getattr(scores, kind)[i] for i in range(LAYERS) for kind in ("ffn", "group")}
    return removed, pairs


def row(name: str, theirs: tuple[Gone, Scores], mine: tuple[Gone, Scores]) -> str:
    from scipy.stats import spearmanr

    cells = []
    for kind in ("ffn", "group"):
        a, b = ({g for g in side[0] if g[1] == kind} for side in (theirs, mine))
        rank = min(spearmanr(theirs[1][key], mine[1][key]).statistic for key in theirs[1] if key[1] == kind)
        same = f"{len(a & b) / len(a | b):.3f}" if a | b else "-"
        cells.append(f"{len(a)} / {len(b)} | {same} | {rank:.4f}")
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("flap", type=Path, help="a checkout of FLAP")
    parser.add_argument("llm_pruner", type=Path, help="a checkout of LLM-Pruner")
    parser.add_argument("shortgpt", type=Path, help="a checkout of ShortGPT")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    import transformers

    source = our_model()
    ids = torch.randint(1, VOCAB, (given.sequences, given.tokens), generator=torch.Generator().manual_seed(1))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {tuple(ids.shape)} ids\n")
    print("| method | channels gone, theirs / ours | the same | rank | heads gone, theirs / ours | the same | rank |")
    print("|---|---|---|---|---|---|---|")
    for name, method, ratio, cut in (
        ("flap, 25 %", "flap", 0.25, False),
        ("flap, 60 %", "flap", 0.6, False),
        ("wanda_sp", "wanda_sp", RATIO, True),
        ("wanda_sp, scored before any cut", "wanda_sp", RATIO, False),
    ):
        theirs = flap(given.flap, source, ids, method, ratio, cut)
        print(row(name, theirs, ours(source, ids, method, None, theirs[0])))
    for method in ("magnitude", "vector", "param_first", "param_second", "param_mix"):
        theirs = llm_pruner(given.llm_pruner, source, ids, method)
        print(row(method, theirs, ours(source, ids, method, KEPT, theirs[0])))
    from saap.models.architectures import shape_of
    from saap.prune.scores.activations import collect

    mine = collect(source, shape_of(source.config), ids).influence
    theirs_bi = shortgpt(given.shortgpt, source, ids) / ids.numel()
    print(f"\nshortgpt, block influence: theirs {[round(v, 4) for v in theirs_bi.tolist()]}")
    print(f"                             ours {[round(v, 4) for v in mine.tolist()]}")


if __name__ == "__main__":
    main()
