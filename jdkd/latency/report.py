"""What a measurement returns and how it is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jdkd.latency.statistics import Latency, Ratio, bootstrap_ratio


@dataclass(frozen=True)
class ModelLatency:
    """Latencies of one model, per call.

    Args:
        end_to_end: images on the host to boxes on the host; None where it was not asked for, as the others.
        model_only: normalised batch to boxes after NMS.
        backbone_replay: CUDA-graph replay of the backbone.
        facts: parameters, dtypes, channels_last, batch_norms (left unfolded) and the id of its architecture.
    """

    end_to_end: Latency | None = None
    model_only: Latency | None = None
    backbone_replay: Latency | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def modes(self) -> dict[str, Latency]:
        """The modes that were measured."""
        named = {name: getattr(self, name) for name in ("end_to_end", "model_only", "backbone_replay")}
        return {name: latency for name, latency in named.items() if latency is not None}


@dataclass(frozen=True)
class LatencyReport:
    """A measurement: every model's samples, the machine and the protocol.

    Args:
        models: by name, the base first.
        environment: device, versions, threads, TF32, GPU state before and after.
        protocol: order, batch size, images, schedule, and how warm-up and timing went.
    """

    models: dict[str, ModelLatency]
    environment: dict[str, Any]
    protocol: dict[str, Any]

    @property
    def base(self) -> str:
        """Name of the model that ratios refer to."""
        return next(iter(self.models))

    def ratio(self, name: str, *, mode: str = "end_to_end") -> Ratio:
        """Median latency of a model over that of the base, with a 95 % interval.

        Args:
            name: of the model.
            mode: `end_to_end`, `model_only` or `backbone_replay`.

        Returns:
            See :func:`jdkd.latency.statistics.bootstrap_ratio`.
        """
        own, base = (self.models[each].modes()[mode].samples for each in (name, self.base))
        return bootstrap_ratio(own, base)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form with raw samples, percentiles (ms) and the ratios to the base."""
        models = {}
        for name, model in self.models.items():
            modes = {}
            for mode, latency in model.modes().items():
                ratio = self.ratio(name, mode=mode)
                modes[mode] = {
                    **latency.to_json(),
                    "ratio": ratio.value,
                    "ratio_interval": list(ratio.interval),
                }
            models[name] = {**modes, "facts": model.facts}
        return {
            "base": self.base,
            "models": models,
            "environment": self.environment,
            "protocol": self.protocol,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyReport:
        """Inverse of :meth:`to_json`; summaries are computed anew from the samples."""
        models = {}
        names = sorted(data["models"], key=lambda name: name != data["base"])  # base first, the others in order
        for name in names:
            entry = data["models"][name]
            modes = {mode: Latency.from_json(value) for mode, value in entry.items() if mode != "facts"}
            models[name] = ModelLatency(**modes, facts=entry["facts"])
        return cls(models, data["environment"], data["protocol"])
