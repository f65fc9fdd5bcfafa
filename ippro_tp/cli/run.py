"""``prune``: one network from start to end. Each finished phase is recorded; a rerun continues with the next."""

from __future__ import annotations

import copy
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..pruning.saving import load_pruned, save_pruned
from . import dry, export
from .config import PruneRunConfig, check, identity
from .data import Images, build_images
from .errors import UsageError
from .evaluate import reestimate_batchnorm
from .figures import draw_all
from .files import as_dict, environment, write_json
from .latency import latencies
from .listing import read_listing
from .masks import draw_masks
from .networks import Network, build_network
from .objectives import Classification, Segmentation
from .plan import Plan, Planner
from .report import markdown
from .store import Store, check_folder
from .training import Trainer
from .transforms import mask_size
from .weights import fingerprint

TRAINED = "unpruned.safetensors"
"""The network that --train-epochs trained, in the folder of what a killed run needs; it stays."""
BATCH_NORM = nn.modules.batchnorm._BatchNorm


def run(config: PruneRunConfig) -> None:
    """Prune as ``config`` says; all bad input is found before anything is written."""
    check(config)
    if config.export_onnx:
        export.check_packages()
    device = config.torch_device()
    listing = read_listing(config)
    network = build_network(config, listing.classes)
    images = build_images(config, listing, network)
    if config.task == "segmentation":
        network.example = torch.zeros(1, 3, *mask_size(config, listing))
    who = identity(config, fingerprint(network.model), listing.counts())
    if not config.dry_run:
        check_folder(config.out, who)
    batches = images.calibration(config.calibration_images)
    run = _Run(config, network, images, batches, device)
    run.look_ahead()
    if config.dry_run:
        assert run.plan is not None
        print(dry.table(run.plan))
        if config.checkpoint is None and not config.pretrained:
            print("The network is untrained: sizes tell something, scores do not.")
        return
    run.store = Store(config.out, who, as_dict(config))
    run.all()


@dataclass
class _Run:
    """The phases of one run."""

    config: PruneRunConfig
    network: Network
    images: Images
    batches: list[Any]
    device: torch.device
    plan: Plan | None = None
    planned: float = 0.0
    store: Store = field(init=False)
    objective: Classification | Segmentation = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.objective = (
            Segmentation(self.network.outputs, config.ignore_index)
            if config.task == "segmentation"
            else Classification()
        )
        self.planner = Planner(config, self.network, self.batches, self.device)

    def look_ahead(self) -> None:
        """Plan before anything is written, so that what cannot be pruned is refused at once.

        A network that will be trained first has no scores yet; that Torch-Pruning can prune it so far is tried.
        """
        if self.config.dry_run or self.config.train_epochs == 0:
            if not (self.config.out / "progress" / "pruned.json").exists() or self.config.dry_run:
                begin = time.perf_counter()
                self.plan = self.planner.plan(self.network.model)
                self.planned = time.perf_counter() - begin
        elif not (self.config.out / "progress" / "unpruned.json").exists():
            self.planner.probe(self.network.model)

    def all(self) -> None:
        """Run what is missing."""
        if self.store.result("finished") is None:
            unpruned = self.unpruned()
            model = self.reestimated(self.pruned(unpruned))
            model = self.finetuned(model, unpruned)
            self.finish(model, unpruned)
        print((self.config.out / "report.md").read_text().split("![")[0].strip())
        print(f"\nwrote {self.config.out / 'report.md'} and {self.config.out / 'model.safetensors'}")

    # -- phases ------------------------------------------------------------------------------------------

    def unpruned(self) -> nn.Module:
        """Return the unpruned network on the device, trained if so configured, with its quality recorded."""
        config, model, store = self.config, self.network.model, self.store
        path = store.progress / TRAINED
        if store.result("unpruned") is None:
            training = None
            if config.train_epochs:
                model.to(self.device)
                recipe = config.recipe(config.train_epochs, config.train_lr or config.lr)
                training = self._trainer().train(model, recipe, "trained", self.network.frozen)
                partial = path.with_suffix(".tmp")
                save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, partial)
                partial.replace(path)
            self._record("unpruned", model, training)
            store.drop_checkpoint("trained")
        elif path.exists():
            model.load_state_dict(load_file(path))
        return model.to(self.device).eval()

    def pruned(self, unpruned: nn.Module) -> nn.Module:
        """Return the pruned network."""
        if self.store.result("pruned") is None:
            begin = time.perf_counter()
            plan = self.plan if self.plan is not None else self._planned(unpruned)
            self._keep("pruned", plan.model)
            write_json(self.store.progress / "plan.json", plan.record() | {"compensation": plan.compensation})
            seconds = self.planned + time.perf_counter() - begin
            self._record("pruned", plan.model, {"seconds": round(seconds, 2)})
        return self._kept("pruned")

    def _planned(self, unpruned: nn.Module) -> Plan:
        """Plan; if the flags turn out to be impossible, say where the network is that was trained for them."""
        try:
            return self.planner.plan(unpruned)
        except UsageError as error:
            trained = self.store.progress / TRAINED
            raise UsageError(
                f"{error}; the trained network is {trained}, for --checkpoint and another --out"
            ) from error

    def reestimated(self, model: nn.Module) -> nn.Module:
        """Return the network with BatchNorm statistics of the calibration images, if it has BatchNorm."""
        when = self.config.bn_reestimate
        wanted = when == "always" or (when == "auto" and not self.config.compensate)
        if not wanted or not any(isinstance(m, BATCH_NORM) for m in model.modules()):
            return model
        if self.store.result("bn") is None:
            begin = time.perf_counter()
            reestimate_batchnorm(model, self.batches, self.device)
            self._keep("bn", model)
            self._record("bn", model, {"seconds": round(time.perf_counter() - begin, 2)})
        return self._kept("bn")

    def finetuned(self, model: nn.Module, unpruned: nn.Module) -> nn.Module:
        """Return the fine-tuned network."""
        config = self.config
        if config.finetune_epochs == 0:
            return model
        if self.store.result("finetuned") is None:
            recipe = config.recipe(config.finetune_epochs, config.lr, config.norm_statistics == "frozen")
            teacher = unpruned if config.distill else None
            training = self._trainer().train(model, recipe, "finetuned", self.network.frozen, teacher)
            self._keep("finetuned", model)
            self._record("finetuned", model, training)
            self.store.drop_checkpoint("finetuned")
        return self._kept("finetuned")

    def finish(self, model: nn.Module, unpruned: nn.Module) -> None:
        """Write the network, the results, the figures and the report."""
        folder, store, config = self.config.out, self.store, self.config
        model, unpruned = model.eval(), unpruned.eval()
        save_pruned(model, folder, self.network.saved_as)
        phases = {p: r for p in ("unpruned", "pruned", "bn", "finetuned") if (r := store.result(p)) is not None}
        plan = self._read_plan()
        example = self.network.example.to(self.device)
        result = {
            "title": f"{config.model} ({config.library}), {self._aim()}",
            "command": _command(config),
            "how": self._how(),
            "unit": {"macs": "MACs", "params": "parameters", "latency": "latency", "ratio": "channels"}[
                config.target[0]
            ],
            "importance": config.importance + ("" if config.cost_unit == "none" else f" / {config.cost_unit}"),
            "metric": self.objective.metric,
            "quality": {p: r["quality"] for p, r in phases.items()},
            "seconds": {p: r.get("seconds", 0.0) for p, r in phases.items()},
            "distilled": config.distill,
            "history": {
                name: phases[phase]["loss"]
                for name, phase in (("trained", "unpruned"), ("finetuned", "finetuned"))
                if "loss" in phases.get(phase, {})
            },
            "latency": latencies({"unpruned": unpruned, "pruned": model}, example),
            "images": {
                "train": len(self.images.train),
                "val": len(self.images.val),
                "classes": self.network.outputs,
            },
            "compensation": plan.pop("compensation"),
            "plan": plan,
            "snippet": self._snippet(),
            "environment": environment(),
        }
        if isinstance(self.objective, Segmentation):
            networks = {"unpruned": unpruned, "pruned, fine-tuned" if "finetuned" in phases else "pruned": model}
            path = folder / "figures" / "masks.png"
            draw_masks(path, self.images.val, networks, self.device, self.objective, self.network.data)
        figures = draw_all(folder / "figures", result)
        if config.task == "segmentation":
            figures.append(folder / "figures" / "masks.png")
        if config.export_onnx:
            cpu = copy.deepcopy(model).cpu()
            result["onnx_difference"] = export.export_onnx(cpu, self.network.example, folder / "model.onnx")
        write_json(folder / "results.json", result)
        partial = folder / "report.tmp"
        partial.write_text(markdown(result, figures))
        partial.replace(folder / "report.md")
        store.record("finished", {"metric": self.objective.metric, "quality": result["quality"]})
        store.clean()

    # -- helpers -----------------------------------------------------------------------------------------

    def _trainer(self) -> Trainer:
        return Trainer(self.images, self.objective, self.store, self.device, self.config.checkpoint_every)

    def _record(self, phase: str, model: nn.Module, extra: dict[str, Any] | None = None) -> None:
        quality = self.objective.evaluate(model.to(self.device), self.images.validation(), self.device)
        print(f"{phase}: {self.objective.metric} {100 * quality:.2f} %", file=sys.stderr)
        self.store.record(phase, {"quality": quality} | (extra or {}))

    def _keep(self, phase: str, model: nn.Module) -> None:
        save_pruned(model, self.store.progress / phase, self.network.saved_as)

    def _kept(self, phase: str) -> nn.Module:
        """Read the network back: an undisturbed run and a resumed one go on from the very same file."""
        return load_pruned(self.store.progress / phase, device=self.device)

    def _read_plan(self) -> dict[str, Any]:
        return json.loads((self.store.progress / "plan.json").read_text())

    def _aim(self) -> str:
        unit, goal = self.config.target
        if unit == "ratio":
            return f"{100 * goal:g} % of the channels removed"
        return f"{ {'macs': 'MACs', 'params': 'parameters'}.get(unit, unit) } at {100 * goal:g} %"

    def _how(self) -> str:
        config = self.config
        parts = [f"Importance `{config.importance}`", f"{config.scope} ranking"]
        if config.cost_unit != "none":
            parts.append(f"scores divided by the {config.cost_unit} of a channel")
        if config.depletion_kind != "none":
            parts.append(f"scores rise with depletion ({config.depletion_kind})")
        parts.append("with compensation" if config.compensate else "without compensation")
        return f"{', '.join(parts)}; {_count(self.batches)} calibration images, seed {config.seed}."

    def _snippet(self) -> str:
        return f'from ippro_tp import load_pruned\n\nmodel = load_pruned("{self.config.out}")'


def _count(batches: list[Any]) -> int:
    return sum(len(images) for images, _ in batches)


def _command(config: PruneRunConfig) -> str:
    """Return the command line of ``config``, without what is the default."""
    default, words = as_dict(PruneRunConfig()), ["ippro-tp", "prune"]
    for name, value in as_dict(config).items():
        if value == default[name]:
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            words.append(f"--no-{flag[2:]}")
        elif value is True:
            words.append(flag)
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
