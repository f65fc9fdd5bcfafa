"""The scan tells Torch-Pruning's failures from ours, in child processes, and can be resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

from benchmarks.errors import UsageError
from benchmarks.scan import command as scan
from benchmarks.scan import model as scan_model
from benchmarks.scan import pruned as scan_pruned
from benchmarks.scan import zoo as scan_zoo
from benchmarks.scan.command import ScanConfig

sys.path.insert(0, str(Path(__file__).parent))
import scan_nets


def config(out, *names, **options):
    return ScanConfig(out=out, models=tuple(f"scan_nets:{name}" for name in names), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A scan of networks that need no time."""
    out = tmp_path_factory.mktemp("scan")
    names = ("Net", "FixedWidth", "Untraceable", "Moody", "Large", "Unbuildable", "Hungry", "Dying")
    table = scan.run(config(out, *names, limit_seconds=120, limit_gb=4))
    return out, table.set_index(table.name.str.partition(":")[2])


def record_of(out, name):
    return json.loads((out / "models" / f"scan_nets__{name}.json").read_text())


def test_verdicts(finished):
    verdicts = finished[1].verdict.to_dict()
    assert verdicts == {
        "Net": "works",
        "Large": "works",
        "FixedWidth": "TP fails",
        "Untraceable": "not traced",
        "Hungry": "not traced",
        "Dying": "not traced",
        "Moody": "ours",
        "Unbuildable": "not built",
    }


def test_what_is_measured_of_a_model_that_works(finished):
    out, table = finished
    row = table.loc["Net"]
    assert (row.side, row.groups, row.sigma, row.identity, row["none"]) == (64, 2, 2, 0, 0)
    assert table.loc["Large"].side == 96
    stages = record_of(out, "Net")["stages"]
    for arm in ("magnitude", "pro"):
        step = stages[f"{arm} local"]
        assert step["ok"]
        assert step["finite"]
        # int(8 * 0.7) = 5 and int(12 * 0.7) = 8 channels remain
        assert step["params_after"] == 3 * 5 * 9 + 2 * 5 + 5 * 8 * 9 + 8 + 8 * 5 + 5
    assert stages["scores"]["activations"] == {"relu": 1, "silu": 1}


def test_reasons_are_kept(finished):
    out, _ = finished
    error = record_of(out, "Untraceable")["stages"]["trace"]["error"]
    assert (error["type"], error["message"]) == ("RuntimeError", "no gradients here")
    assert "in with_gradients" in error["frame"]
    assert error["tp_frame"].startswith("torch_pruning/dependency/graph.py")
    assert "12" in record_of(out, "FixedWidth")["stages"]["magnitude local"]["error"]["message"]
    moody = record_of(out, "Moody")["stages"]["calibrate local"]["error"]
    assert moody["type"] == "ObservationError"
    assert moody["own_frame"].startswith("ippro_tp/tracing/observer.py")
    assert record_of(out, "Hungry")["stages"]["trace"]["error"]["type"] == "MemoryLimit"
    assert "exit code 3" in record_of(out, "Dying")["stages"]["trace"]["error"]["message"]
    assert "pixels will not do" in record_of(out, "Unbuildable")["stages"]["build"]["error"]["message"]


def test_report(finished):
    text = (finished[0] / "scan.md").read_text()
    ours, theirs = text.partition("## Where only PRO fails")[2].split("## Where Torch-Pruning fails")
    assert {line.split("**")[1] for line in ours.splitlines() if line} == {"scan_nets:Moody"}
    assert {name for name in dir(scan_nets) if f"scan_nets:{name}**" in theirs} == {
        "FixedWidth",
        "Untraceable",
        "Hungry",
        "Dying",
    }
    total = next(line for line in text.splitlines() if line.startswith("| all"))
    # 7 of 8 could be built; 4 are traced; 3 work locally with magnitude, 2 of them with PRO; the same globally
    assert [int(cell) for cell in total.split("|")[2:-1]] == [7, 4, 3, 2, 2, 3, 2, 2]


def test_prune_is_scanned_beside_the_drop_in(tmp_path):
    names = ("Net", "FixedWidth", "Unbuildable")
    table = scan.run(config(tmp_path, *names, prune=True, limit_seconds=120, limit_gb=4))
    table = table.set_index(table.name.str.partition(":")[2])
    assert table.verdict.to_dict() == {"Net": "works", "FixedWidth": "refused", "Unbuildable": "not built"}
    net, fixed = table.loc["Net"], table.loc["FixedWidth"]
    assert (net.proved, net["left whole"], fixed.proved, fixed["left whole"]) == (2, 1, 1, 2)
    assert fixed["MACs for 0.7"] > 0.71  # the nearest
    assert "invalid for input of size" in fixed["why whole"]
    for target in (0.7, 0.5):
        assert abs(net[f"MACs for {target}"] - target) <= 0.01
    assert net.difference < 1e-6
    assert net.silenced < 1e-6
    assert net.saved
    assert net["error compensated"] <= net["error"]
    assert (tmp_path / "prune.csv").exists()
    assert "1 x its channels are the model's output" in (tmp_path / "prune.md").read_text()
    record = json.loads((tmp_path / "prune" / "scan_nets__Net.json").read_text())
    record["stages"]["same 0.7"] = {"ok": False, "error": {"type": "ArithmeticError", "message": "differs"}}
    assert scan_pruned.verdict(record) == "differs"
    record["stages"]["prune 0.7"]["refused"] = "the nearest is 0.8"
    assert scan_pruned.verdict(record) == "refused"


def test_finished_models_are_skipped_and_failed_ones_repeated_on_demand(finished, monkeypatch):
    out, _ = finished
    started = []

    def start(look, entry, *args):
        started.append(entry.name)
        raise OSError("not in this test")

    monkeypatch.setattr(scan, "start_child", start)
    scan.run(config(out, "Net", "Moody"))
    assert started == []
    kept = (out / "models" / "scan_nets__Moody.json").read_text()
    with pytest.raises(OSError, match="not in this test"):
        scan.run(config(out, "Net", "Moody", retry_failed=True))
    assert started == ["scan_nets:Moody"]
    (out / "models" / "scan_nets__Moody.json").write_text(kept)


def test_limits_end_what_does_not_end(tmp_path, monkeypatch):
    scan.run(config(tmp_path, "Sleeper", limit_seconds=3))
    soft = record_of(tmp_path, "Sleeper")
    assert soft["status"] == "time limit"
    assert soft["stages"]["build"]["error"]["type"] == "TimeLimit"
    assert "in with_gradients" in soft["stages"]["build"]["error"]["frame"]
    assert not scan.stale(soft, config(tmp_path, limit_seconds=3))
    assert scan.stale(soft, config(tmp_path, limit_seconds=4))
    monkeypatch.setattr(scan, "GRACE", 1)
    scan.run(config(tmp_path, "Deaf", limit_seconds=3))
    hard = record_of(tmp_path, "Deaf")
    assert hard["status"] == "killed"
    assert "killed after 4 s" in hard["stages"]["build"]["error"]["message"]


def test_a_model_without_a_result_is_never_counted_as_working(finished):
    record = record_of(finished[0], "Net")
    assert scan.judge(record)["verdict"] == "works"
    del record["stages"]["pro global"]
    assert scan.judge(record)["verdict"] == "unfinished"
    record["stages"]["pro global"] = {"ok": False, "error": {"type": "TimeLimit", "message": ""}}
    row = scan.judge({**record, "status": "time limit"})
    assert row["verdict"] == "unfinished"
    assert "|              0 |" in scan.totals(scan.pd.DataFrame([row]))


def test_channels_that_break_the_model_whoever_chose_them_are_not_ours(finished):
    record = record_of(finished[0], "Net")
    error = {"type": "RuntimeError", "message": "expected 63 channels, but got 64"}
    record["stages"]["pro global"] = {"ok": False, "error": error}
    record["stages"]["random global"] = {"ok": True}
    assert scan.judge(record)["verdict"] == "ours"
    record["stages"]["random global"] = {"ok": False, "seed": 2, "error": error}
    assert scan.judge(record)["verdict"] == "TP fails"
    assert [stage for stage, _ in scan.their_failures(record)] == ["random global"]


def test_large_models_are_left_out_until_the_limit_rises(tmp_path, monkeypatch):
    entry = scan_zoo.Entry("timm/huge", "timm/huge", 70_000_000)
    record = scan.examine(entry, config(tmp_path))
    assert record["status"] == "too large"
    assert scan.judge(record)["verdict"] == "too large"
    assert not scan.stale(record, config(tmp_path))
    assert scan.stale(record, config(tmp_path, max_params=80))
    scan.run(ScanConfig(out=tmp_path, report_only=True, report=tmp_path / "r.md"))
    assert "timm/huge (70 M)" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("torchvision/resnet19",)}, "resnet19"),
        ({"models": ("scan_nets:Missing",)}, "Missing"),
        ({"families": ("timm/none",)}, "timm/none"),
        ({"report_only": True}, "no results"),
        ({"limit_gb": 0}, "limit-gb"),
    ],
)
def test_wrong_flags_are_named(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        scan.run(ScanConfig(out=tmp_path, **options))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda n: None, "no score"),
        (lambda n: torch.ones(n + 1), "channels"),
        (lambda n: torch.full((n,), float("nan")), "not finite"),
    ],
)
def test_bad_scores_are_refused(scores, message):
    model = scan_nets.Net()
    asked = scan_model.Checked(lambda group: scores(len(group[0].idxs)))
    pruner = tp.pruner.BasePruner(model, (torch.randn(1, 3, 8, 8),), importance=asked, ignored_layers=[model.fc])
    with pytest.raises(ArithmeticError, match=message):
        pruner.step()


def change_weight(model):
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] += 1e-6


TOUCHES = {
    "value": change_weight,
    "training": lambda model: model.conv1.train(),
    "hook": lambda model: model.bn1.register_forward_hook(print),
    "buffer": lambda model: model.bn1.running_mean.add_(1),
    "grad": lambda model: model(torch.randn(2, 3, 8, 8)).sum().backward(),
    "flag": lambda model: model.fc.weight.requires_grad_(False),
    "attribute": lambda model: setattr(model.fc, "note", 1),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_a_touched_model_is_noticed(touch):
    model = scan_nets.Net().eval()
    before = scan_model.fingerprint(model)
    assert scan_model.changes(before, scan_model.fingerprint(model)) == []
    touch(model)
    assert scan_model.changes(before, scan_model.fingerprint(model)) != []


def test_the_zoo_is_small_and_the_same_at_every_call(tmp_path):
    counts = scan_zoo.Counts(tmp_path / "parameters.json")
    (entry,) = scan_zoo.resolve("torchvision/vit_b_16", counts)
    assert entry.params == 86_567_656
    assert entry.family == "torchvision/vision_transformer"
    assert json.loads((tmp_path / "parameters.json").read_text())["torchvision/vit_b_16"] == entry.params
    a, b = (scan_zoo.subject("timm/vit_tiny_patch16_224") for _ in range(2))
    assert a.side == 64
    assert len(a.num_heads) == 12
    assert a.ignored == [a.model.head]
    assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))


def test_the_smallest_variants_are_found_and_kept(tmp_path, monkeypatch):
    small = ["test_vit", "test_vit2", "test_vit3", "test_vit4"]
    monkeypatch.setattr(timm, "list_models", lambda module: ["vit_small_patch32_224", *small])
    variants = scan_zoo.timm_variants("timm/vision_transformer", scan_zoo.Counts(tmp_path / "parameters.json"))
    sizes = {f"timm/{n}": sum(p.numel() for p in timm.create_model(n).parameters()) for n in small}
    assert [(v.name, v.params) for v in variants] == sorted(sizes.items(), key=lambda item: item[1])
    monkeypatch.setattr(scan_zoo, "count_parameters", None)
    again = scan_zoo.timm_variants("timm/vision_transformer", scan_zoo.Counts(tmp_path / "parameters.json"))
    assert again == variants


def test_larger_variants_are_tried_from_the_largest(tmp_path, monkeypatch):
    sizes = {f"timm/{name}": size for name, size in (("a", 1e6), ("b", 2e6), ("c", 3e6), ("d", 2e8))}
    monkeypatch.setattr(scan, "timm_families", lambda: [f"timm/{number}" for number in range(10)])
    monkeypatch.setattr(scan, "timm_variants", lambda f, _: [scan_zoo.Entry(n, f, s) for n, s in sizes.items()])
    counts = scan_zoo.Counts(tmp_path / "parameters.json")
    config = scan.ScanConfig(out=tmp_path, prune=True, variants="larger", sample=4, max_params=150)
    total, candidates = scan.choose(config, counts)
    lists = list(candidates)
    assert total == len(lists) == 4
    assert [[entry.name[-1] for entry in one] for one in lists] == [["c", "b", "a"]] * 4
    assert [one[0].family for one in lists] == ["timm/0", "timm/2", "timm/5", "timm/7"]


def test_counting_stops_at_the_limit():
    assert scan_zoo.count_parameters(lambda: nn.Linear(10, 9), 100) == 99
    with pytest.raises(OverflowError):
        scan_zoo.count_parameters(lambda: nn.Linear(10, 10), 100)


def test_constants_become_different_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    weight = model[0].weight.clone()
    scan_zoo.spread_constants(model)
    assert torch.equal(model[0].weight, weight)
    assert len(model[1].weight.unique()) == 4
