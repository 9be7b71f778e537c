"""AdaLoRA: ranks shared out by importance while training (Zhang et al. 2023, arXiv:2303.10512).

y = base(x) + s * B (E * (A dropout(x))),  s = alpha / init_r: E holds singular values, A and B are kept near orthogonal

A rank's importance is the smoothed |weight * gradient| of its singular value and vectors, times how much that varies.
After each step the least important of all layers' ranks have their singular value set to zero, until on average
`target_r` are left; these are what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.config import LayeredConfig, register
from slimtune.core.delta import Delta, wrong_kind
from slimtune.core.frozen import Site
from slimtune.errors import ConfigError, TargetError, check_choice, check_number, check_whole
from slimtune.methods.lora.config import LoraConfig
from slimtune.methods.lora.layers import LoraConv, LoraDelta, LoraLinear

SVD = ("lora_A", "lora_E", "lora_B")


@register
@dataclass
class AdaLoraConfig(LayeredConfig):
    """What to adapt with AdaLoRA, and how; names, defaults and meanings are those of `peft.AdaLoraConfig`.

    The ranks stay at `init_r` for `tinit` steps, then fall to `target_r` on average, with a new allocation each
    `deltaT` steps, and stay for the last `tfinal` of `total_step` steps. `beta1` and `beta2` smooth the importance and
    its variation. `orth_reg_weight` times the mean distance of A A^T and B^T B from identity is added to the loss of a
    model in training. `rank_pattern` is what was found: which ranks of each layer are left.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "ADALORA"
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool = True

    learning_rate: ClassVar[float] = 1e-3
    sizes: ClassVar[tuple[str, ...]] = ("init_r",)
    inert: ClassVar[Mapping[str, Any]] = {
        **LoraConfig.inert,
        "r": 8, "use_rslora": False, "use_dora": False, "lora_bias": False, "alpha_pattern": {}, "eva_config": None,
        "loftq_config": {}, "target_parameters": None, "trainable_token_indices": None,
        "ensure_weight_tying": False, "layer_replication": None, "alora_invocation_tokens": None,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("target_r", 1), ("init_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            check_whole(name, getattr(self, name), least)
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), 0, 1)
        check_number("orth_reg_weight", self.orth_reg_weight, 0)
        check_number("lora_alpha", self.lora_alpha)
        check_number("lora_dropout", self.lora_dropout, 0, 1)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        check_choice("init_lora_weights", self.init_lora_weights, (True, False))
        if self.target_r > self.init_r:
            raise ConfigError(f"ranks only fall: target_r must be at most init_r={self.init_r}, found {self.target_r}")
        if self.total_step is not None:
            self.plan(self.total_step)

    def plan(self, total_step: int) -> None:
        """Set the number of training steps. Raises: ConfigError, where none are left in which ranks could fall."""
        check_whole("total_step", total_step)
        if self.tinit >= total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of {total_step} steps in which ranks could "
                "fall; decrease them or train longer"
            )
        self.total_step = total_step

    def further_modules(self, model: Any, modules: Mapping[str, nn.Module], chosen: Sequence[str]) -> list[str]:
        """The model itself, to whose loss the distance from orthogonality is added."""
        return [] if self.inference_mode or not self.orth_reg_weight else [""]

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> Delta:
        """The three factors for one site, with the ranks that are left of it. Raises: TargetError, ConfigError."""
        if not site.name:
            return Orthogonality(self.orth_reg_weight)
        # A file holds the ranks that were left, and its pattern says which of `init_r` they were.
        kept = (self.rank_pattern or {}).get(f"{site.name}.lora_E")
        r = self.init_r if kept is None else sum(kept)
        # `peft` divides by the rank that training began with plus 1e-5, so that is what its files mean.
        scaling = (self.lora_alpha if self.lora_alpha > 0 else r) / (self.init_r + 1e-5)
        delta = _kind(site)(site, r, scaling, self.lora_dropout, autocast_adapter_dtype)
        if self.bias == "lora_only" and getattr(site.module, "bias", None) is not None:
            delta.hold(site, "bias")
        return delta

    def link_deltas(self, model: Any, drafted: list[tuple[Site, Any]]) -> None:
        """Show the factors of all layers to what keeps them near orthogonal."""
        for _, delta in drafted:
            if isinstance(delta, Orthogonality):
                delta.watched = [other for _, other in drafted if isinstance(other, SvdDelta)]

    def allocate(self, drafted: Sequence[tuple[Site, Any]], step: int) -> None:
        """Share the ranks out anew after a training step, the first of which is step 0.

        Raises:
            ConfigError: it isn't known how many steps there are, or there are no gradients.
        """
        if self.total_step is None:
            raise ConfigError("AdaLoRA's ranks fall over total_step steps; set it in AdaLoraConfig")
        deltas = {f"{site.name}.lora_E": delta for site, delta in drafted if isinstance(delta, SvdDelta)}
        last = self.total_step - self.tfinal
        if step < last:
            for delta in deltas.values():
                delta.observe(self.beta1, self.beta2)
        # Between two allocations the masked singular values get gradients and may come back, as in the paper.
        # At the last step too, whatever deltaT divides: the pattern that is stored must have exactly the final budget.
        if step == last or (self.tinit < step < last and step % self.deltaT == 0):
            kept = most_important(list(deltas.values()), self.budget(deltas.values(), step))
            self.rank_pattern = dict(zip(deltas, kept, strict=True))
            for delta, mask in zip(deltas.values(), kept, strict=True):
                delta.keep(mask)
        # An optimizer's step moves the masked singular values away from zero, by their gradients and by Adam's
        # momentum: after the last allocation they are zeroed each time.
        elif step > last:
            for delta in deltas.values():
                delta.keep(delta.kept)

    def budget(self, deltas: Any, step: int) -> int:
        """How many ranks all layers have together after a step: from all to `target_r` a layer, as a cubic."""
        ranks = [delta.r for delta in deltas]
        target, last = self.target_r * len(ranks), (self.total_step or 0) - self.tfinal
        # At tinit the bracket is 1, at `last` 0: steep at first, flat near the end, as in the paper's schedule.
        return int((sum(ranks) - target) * (1 - (step - self.tinit) / (last - self.tinit)) ** 3 + target)


class SvdDelta(LoraDelta):
    """What the kinds share: a LoRA whose A is E_R1 * A_RI, and which knows how important each of its ranks is.

    Attributes:
        kept: which ranks are left, once they were shared out.
    """

    on_disk = {"whole.bias": "base_layer.bias"}

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        super().__init__(site, r, scaling, dropout, autocast)
        # (r, 1) and not (r,): the shape in `peft`'s files.
        self.lora_E = nn.Parameter(self.trained[0].new_empty(r, 1))
        self.kept: list[bool] | None = None
        self.smoothed: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = self.trained
        # E (r, 1) times the rows of A (r, in, ...): LoRA's own product does the rest.
        return a * self.lora_E.view(-1, *[1] * (a.ndim - 1)), b

    def initialise(self, config: Any, site: Site) -> None:
        """Draw A and B, and E where `init_lora_weights` is off; it is zero otherwise, and the update with it."""
        for factor in (*self.trained, self.lora_E):
            # Near orthogonality is learned, by the penalty, and not drawn.
            nn.init.normal_(factor, std=0.02 if config.init_lora_weights else 1.0)
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_E)

    def distances(self) -> list[Tensor]:
        """||A A^T - I|| and ||B^T B - I||."""
        a_RI, b_OR = (factor.flatten(1) for factor in self.trained)
        identity = torch.eye(self.r, device=a_RI.device, dtype=a_RI.dtype)
        return [torch.linalg.norm(a_RI @ a_RI.t() - identity), torch.linalg.norm(b_OR.t() @ b_OR - identity)]

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Take this step's |weight * gradient| into the smoothed importance and its variation. Raises: ConfigError."""
        for name in SVD:
            factor = self.get_parameter(name)
            if factor.grad is None:
                raise ConfigError("ranks are shared out by their gradients: call it after backward, before zero_grad")
            now = (factor * factor.grad).abs()
            mean, variation = self.smoothed.get(name) or (torch.zeros_like(now), torch.zeros_like(now))
            # From zero and without Adam's correction for it: only the order of ranks matters, and all start alike.
            mean = beta1 * mean + (1 - beta1) * now
            # The variation is around the new mean, as in the authors' code.
            self.smoothed[name] = mean, beta2 * variation + (1 - beta2) * (now - mean).abs()

    def importance(self) -> Tensor:
        """The importance of each rank. Raises: ConfigError, where no step was observed."""
        if not self.smoothed:
            raise ConfigError("ranks can't be shared out before a step was observed; call it after each step")
        means, variations = zip(*(self.smoothed[name] for name in SVD), strict=True)
        # A rank is one row of A, one number of E and one column of B.
        a_RI, e_R1, b_OR = ((m * v).flatten(1) for m, v in zip(means, variations, strict=True))
        return e_R1.view(-1) + a_RI.mean(1) + b_OR.mean(0)

    @torch.no_grad()
    def keep(self, ranks: list[bool] | None) -> None:
        """Leave these ranks, and set the singular values of the others to zero."""
        self.kept = ranks
        if ranks is not None:
            self.lora_E[~torch.tensor(ranks, dtype=torch.bool, device=self.lora_E.device)] = 0.0

    def progress(self) -> dict[str, Tensor]:
        """The smoothed importance with its variation, and the ranks that are left."""
        parts = zip(("mean", "variation"), zip(*self.smoothed.values(), strict=True), strict=False)
        progress = {f"{part}.{n}": t for part, tensors in parts for n, t in zip(self.smoothed, tensors, strict=True)}
        return progress if self.kept is None else {**progress, "kept": torch.tensor(self.kept, dtype=torch.bool)}

    def restore_progress(self, stored: Mapping[str, Tensor]) -> None:
        names = [name.removeprefix("mean.") for name in stored if name.startswith("mean.")]
        device = self.lora_E.device
        self.smoothed = {n: (stored[f"mean.{n}"].to(device), stored[f"variation.{n}"].to(device)) for n in names}
        self.kept = stored["kept"].tolist() if "kept" in stored else None

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ranks that are left, as matrices."""
        factors = {"lora_A": own["lora_A"].flatten(1), "lora_E": own["lora_E"], "lora_B": own["lora_B"].flatten(1)}
        if self.kept is not None:
            factors = {n: t[:, self.kept] if n == "lora_B" else t[self.kept] for n, t in factors.items()}
        return super().to_disk({**own, **factors})

    def from_disk(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = super().from_disk(stored)
        for name, factor in self.state_dict().items():
            # The file has the kept ranks alone. A pruned one gets E = 0 and with it no part in the product, whatever
            # its A and B, which stay as they were drawn and could come back in training.
            if name in SVD and self.kept is not None:
                whole = torch.zeros_like(factor) if name == "lora_E" else factor.clone()
                part = state[name].to(whole)
                whole.flatten(1)[(slice(None), self.kept) if name == "lora_B" else self.kept] = part
                state[name] = whole
            else:
                state[name] = state[name].reshape(factor.shape)
        return state


class AdaLoraLinear(SvdDelta, LoraLinear):
    """y_TO = base(x_TI) + s * ((x_TI A_RI^T) * E_R) B_OR^T."""


class AdaLoraConv(SvdDelta, LoraConv):
    """A is a convolution like the base's into r channels, B a 1x1 convolution out of them."""


def _kind(site: Site) -> type[SvdDelta]:
    if site.kind == "conv" and site.module.groups > 1:
        raise TargetError(f"AdaLoRA has no form for '{site.name}', a grouped convolution; exclude it")
    kinds: dict[str, type[SvdDelta]] = {"linear": AdaLoraLinear, "conv": AdaLoraConv}
    if site.kind not in kinds:
        raise wrong_kind(site, "AdaLoRA", "linear and convolution layers")
    return kinds[site.kind]


def most_important(deltas: list[SvdDelta], budget: int) -> list[list[bool]]:
    """Which ranks of each layer are among the `budget` most important ones of all layers."""
    scores = [delta.importance() for delta in deltas]
    excess = sum(len(score) for score in scores) - budget
    # One bound for all layers: that is how ranks move from one layer to another.
    # On the CPU: layers may be on several devices, and `kthvalue` over some thousand numbers costs nothing there.
    bound = torch.cat([score.cpu() for score in scores]).kthvalue(excess).values.item() if excess > 0 else -1.0
    # Strictly above: ties at the bound fall together, so that the budget is a ceiling.
    return [(score > bound).tolist() for score in scores]


class Orthogonality(Delta):
    """At the model's root: in training, weight * mean(||A A^T - I||, ||B^T B - I||) over all layers joins the loss.

    Attributes:
        share: of the loss of a step that this batch gives, where several give it together.
        joined: whether it has joined a loss since this was last set to False.
    """

    reweighs = rests = True

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight, self.share, self.joined = weight, 1.0, False
        self.watched: list[SvdDelta] = []

    def penalty(self, device: torch.device) -> Tensor:
        """What joins the loss."""
        # A model that is spread over devices has its factors on several.
        distances = [distance.to(device) for delta in self.watched for distance in delta.distances()]
        return self.share * self.weight * torch.stack(distances).mean()

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = base(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        if self.training and isinstance(loss, Tensor) and self.watched:
            # Here and not in a trainer, so that any loop that calls backward on the model's loss learns it.
            outputs.loss = loss + self.penalty(loss.device)
            self.joined = True
        return outputs
