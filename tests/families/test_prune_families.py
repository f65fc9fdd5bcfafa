"""``prune()`` on hand-written detectors and segmenters, and on Hugging Face's models from their configurations.

Each result has the MACs that were asked for and gives what the original gives without the removed channels.
"""

import pytest

from benchmarks.robustness import nets_families, nets_yolo
from benchmarks.robustness.bench import parameters, picked
from benchmarks.robustness.checks import Checks
from benchmarks.robustness.judge import OK, judged
from benchmarks.robustness.line import Line
from ippro_tp import prune

QUICK = ("unet-transposed", "conv1d", "conv3d", "super-resolution", "generator", "vae")
WRITTEN = {line.name: line for line in (*nets_yolo.LINES, *nets_families.LINES)}
HF = (
    "hf-bert",
    "hf-roberta",
    "hf-distilbert",
    "hf-vit",
    "hf-deit",
    "hf-swin",
    "hf-segformer",
    "hf-convnext",
    "hf-wav2vec2",
    "hf-gpt2",
    "hf-llama",
    "hf-whisper",
)


def hf_lines() -> dict[str, Line]:
    pytest.importorskip("transformers")
    from benchmarks.robustness import nets_hf

    return {line.name: line for line in nets_hf.LINES}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in WRITTEN])
def test_a_hand_written_net_is_the_silenced_original(name):
    checks = Checks(WRITTEN[name])
    cell = judged(checks.prune)
    assert cell.verdict == OK, cell


def narrowed(before, after, words) -> list[str]:
    """Layers whose weights lost rows and whose names end in one of ``words``."""
    old, new = dict(before.named_modules()), dict(after.named_modules())
    return [
        name
        for name, module in old.items()
        if name.split(".")[-1] in words and new[name].weight.shape != module.weight.shape
    ]


HEADS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "c_attn")
HIDDEN = ("fc1", "lin1", "up_proj", "c_fc", "pwconv1", "intermediate_dense", "dense", "dense1")


@pytest.mark.slow
@pytest.mark.parametrize("name", HF)
def test_hidden_layers_and_heads_of_hugging_face_are_pruned(name):
    checks = Checks(hf_lines()[name])
    model = checks.model(planted=False)
    loader = [(picked(checks.many, at, at + 8), None) for at in range(0, checks.line.samples, 8)]
    options = {
        "macs": 0.6,
        "scope": "local",
        "compensation": False,
        "progress": False,
    }  # all that can lose channels
    result = prune(model, picked(checks.many, 0, 1), loader, **options)
    assert abs(result.macs - 0.6) <= 0.0101
    assert parameters(result.model) < parameters(model)
    assert narrowed(model, result.model, HIDDEN), result
    if name != "hf-convnext":
        assert narrowed(model, result.model, HEADS), result
    assert checks._same_as_silenced(model, result.model) is None
